"""A minute without the store and some of the archive's files: it costs a build that minute, and nothing else."""

from __future__ import annotations

import signal
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import ray

from pipeline.objects import Objects
from pipeline.simulation.server import StacServer
from pipeline.versions import Version
from tests.building import built
from tests.faulty_server import Fault, FaultyServer
from tests.seaweed import BUCKET, Seaweed, seaweed

AWAY_S = 60.0
CPUS = 4
"""More tasks at a time than there are shards whose files are away."""

SMALL = {"shard_chips": 4, "labels": "none"}
"""Many shards, so that some are begun, some half done, and some done when the minute begins."""

pytestmark = [
    pytest.mark.slow,
    # Ray's own settings object warns about its own fields when it is copied.
    pytest.mark.filterwarnings("ignore:.* is deprecated:Warning:ray.data.context"),
    pytest.mark.filterwarnings("ignore:.* is deprecated:Warning:ray.data._internal"),
]


@dataclass(frozen=True)
class Archive:
    """The simulated archive, its files behind a server."""

    stac: str
    files: FaultyServer


@pytest.fixture(scope="module")
def archive(simulated_archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Archive]:
    copy = tmp_path_factory.mktemp("served")
    with FaultyServer(simulated_archive) as files:
        for path in simulated_archive.glob("*/*.json"):
            target = copy / path.relative_to(simulated_archive)
            target.parent.mkdir(exist_ok=True)
            target.write_text(path.read_text().replace(f"{simulated_archive}/", f"{files.url}/"))
        with StacServer(copy) as server:
            yield Archive(server.url, files)


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seaweed]:
    """An S3 server, and this process's environment, and so the cluster's, as a job on it has it."""
    with seaweed(tmp_path_factory.mktemp("seaweed")) as running, pytest.MonkeyPatch.context() as patch:
        for name, value in running.environment.items():
            patch.setenv(name, value)
        yield running


@pytest.fixture(scope="module")
def cluster(s3: Seaweed) -> Iterator[None]:
    ray.init(
        address="local", num_cpus=CPUS, include_dashboard=False, log_to_driver=False, object_store_memory=300_000_000
    )
    yield
    ray.shutdown()


def rarest_item(version: Version) -> tuple[str, set[int]]:
    """The optical item that the fewest shards need, of those the one that is needed first; and these shards."""
    shards = defaultdict[str, set[int]](set)
    for row in version.manifest().to_pylist():
        for name in row["optical_items"]:
            shards[name].add(row["shard"])
    return min(shards.items(), key=lambda item: (len(item[1]), min(item[1])))


def content(version: Version) -> dict[str, bytes]:
    """Every object but leases, and but the description, in which the store's own URL stands."""
    objects = Objects.at(version.url)
    return {path: objects.get(path) for path in objects.list() if "/leases/" not in path and "/stac/" not in path}


def take_away(server: Seaweed) -> float:
    """Let it answer nothing for a while, then crash, and come back after a minute; for how long it was away."""
    begun = time.monotonic()
    server.pause()
    time.sleep(AWAY_S / 3)
    server.stop(signal.SIGKILL)
    time.sleep(max(0.0, begun + AWAY_S - time.monotonic()))
    server.start()
    return time.monotonic() - begun


@pytest.mark.usefixtures("cluster")
def test_a_minute_without_store_and_archive_costs_only_time(archive: Archive, s3: Seaweed, tmp_path: Path) -> None:
    undisturbed = built(archive.stac, tmp_path / "chips.zarr", **SMALL)
    archive.files.mend()
    url, fault = f"s3://{BUCKET}/chips.zarr", Fault(status=503, lasts_s=AWAY_S)
    rarest, hit = rarest_item(undisturbed)
    archive.files.faults = {rarest: fault}
    was_away_s: list[float] = []
    left: set[int] = set()

    def watch() -> None:
        while fault.since_s is None:
            if over.wait(0.005):
                return
        left.update(set(undisturbed.shards()) - Version(url, 1).finished_shards())
        was_away_s.append(take_away(s3))

    over = threading.Event()
    watching = threading.Thread(target=watch)
    watching.start()
    begun = time.monotonic()
    try:
        version = built(archive.stac, url, **SMALL)
    finally:
        over.set()
        watching.join()
    assert was_away_s, "the build was over before anything went away"
    assert time.monotonic() - begun > was_away_s[0] >= AWAY_S
    assert fault.since_s is not None
    meanwhile = [one.status for one in archive.files.asked if 0 <= one.at_s - fault.since_s < AWAY_S]
    assert meanwhile.count(503) > 3
    # Some tasks wait for files; at least one at a time does not need them, and waits for the store.
    assert len(hit) < CPUS
    assert left - hit
    assert version.sealed == undisturbed.sealed
    there, here = content(version), content(undisturbed)
    assert there.keys() == here.keys()
    assert [path for path in here if there[path] != here[path]] == []
    # A second run finds everything done, on S3 too.
    archive.files.asked.clear()
    built(archive.stac, url, **SMALL)
    assert content(version) == there
    assert archive.files.asked == []
