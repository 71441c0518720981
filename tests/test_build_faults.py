"""Processes that die while a dataset is built: a reader, a writer, a node, the driver. The end is always the same."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from pipeline.versions import Version, latest_sealed
from tests.building import ROOT, built, words

MANY_SHARDS = {"shard_chips": 4}
"""So that there are enough moments to be caught."""

pytestmark = [
    pytest.mark.slow,
    # Ray's own settings object warns about its own fields when it is copied.
    pytest.mark.filterwarnings("ignore:.* is deprecated:Warning:ray.data.context"),
    pytest.mark.filterwarnings("ignore:.* is deprecated:Warning:ray.data._internal"),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head that only drives, and two nodes that work."""
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "include_dashboard": False, "object_store_memory": 150_000_000},
    )
    for _ in range(2):
        cluster.add_node(num_cpus=1, object_store_memory=150_000_000)
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, simulated_stac: str, tmp_path_factory: pytest.TempPathFactory) -> Version:
    """What every disturbed build must come to."""
    store = tmp_path_factory.mktemp("built") / "chips.zarr"
    return built(simulated_stac, store, **MANY_SHARDS)


def assert_same(version: Version, expected: Version) -> None:
    """The ledger is the request's, and every object of both stores has the same bytes."""
    assert version.chips()["row"].to_pylist() == version.manifest()["row"].to_pylist()
    ours, theirs = (
        {
            str(path.relative_to(v.url)): path.read_bytes()
            for path in sorted(Path(v.url).rglob("*"))
            # What a killed write leaves behind has a name that no reader lists.
            if path.is_file() and path.relative_to(v.url).parts[:1] != ("versions",) and "#" not in path.name
        }
        for v in (version, expected)
    )
    assert ours == theirs
    assert version.sealed == expected.sealed


def working() -> list[int]:
    """Process ids of the Ray workers under this process that run a task of the build now."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            title = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if title.startswith(b"ray::") and b"Map" in title and descends(int(folder.name)):
            found.append(int(folder.name))
    return found


def descends(pid: int) -> bool:
    while pid > 1:
        if pid == os.getpid():
            return True
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            return False
    return False


def meanwhile(act: Callable[[threading.Event], None]) -> tuple[threading.Thread, threading.Event]:
    """Do something while the build runs in this thread."""
    over = threading.Event()
    thread = threading.Thread(target=act, args=(over,), daemon=True)
    thread.start()
    return thread, over


def build_while(act: Callable[[threading.Event], None], stac: str, store: Path) -> Version:
    thread, over = meanwhile(act)
    try:
        built(stac, store, **MANY_SHARDS)
    finally:
        over.set()
        thread.join()
    return latest_sealed(str(store))


def test_a_reader_that_is_killed_is_followed_by_another(
    undisturbed: Version, simulated_stac: str, tmp_path: Path
) -> None:
    killed: list[int] = []

    def kill_a_reader(over: threading.Event) -> None:
        while not over.is_set() and not killed:
            time.sleep(0.005)
            for pid in working()[:1]:
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)

    version = build_while(kill_a_reader, simulated_stac, tmp_path / "chips.zarr")
    assert killed, "no task was seen"
    assert_same(version, undisturbed)


def test_a_writer_that_is_killed_in_the_middle_of_a_shard_leaves_no_trace(
    undisturbed: Version, simulated_stac: str, tmp_path: Path
) -> None:
    store = tmp_path / "chips.zarr"
    killed: list[int] = []

    def half_written() -> list[str]:
        written = {path.parts[-4] for path in store.glob("b10/c/*/0/0/0")}
        return [shard for shard in written if not list(store.glob(f"versions/0001/chips/shard-{int(shard):06d}*"))]

    def kill_a_writer(over: threading.Event) -> None:
        while not over.is_set() and not killed:
            if not half_written():
                time.sleep(0.001)
                continue
            workers = working()
            for pid in workers:
                os.kill(pid, signal.SIGKILL)
            if half_written():
                killed.extend(workers)

    version = build_while(kill_a_writer, simulated_stac, store)
    assert killed, "no half-written shard was seen"
    assert_same(version, undisturbed)


def test_a_node_that_dies_is_followed_by_another(
    undisturbed: Version, cluster: Cluster, simulated_stac: str, tmp_path: Path
) -> None:
    store = tmp_path / "chips.zarr"
    lost: list[object] = []
    doomed = next(node for node in cluster.list_all_nodes() if node is not cluster.head_node)

    def kill_a_node(over: threading.Event) -> None:
        while not over.is_set() and not lost:
            if list(store.glob("b10/c/*/0/0/0")):
                cluster.remove_node(doomed, allow_graceful=False)
                lost.append(doomed)
            time.sleep(0.001)

    version = build_while(kill_a_node, simulated_stac, store)
    assert lost, "the build was over before a node could be killed"
    assert len([node for node in ray.nodes() if node["Alive"]]) == 2
    assert_same(version, undisturbed)
    cluster.add_node(num_cpus=1, object_store_memory=150_000_000)


def test_a_driver_that_is_killed_is_followed_by_the_same_command(
    undisturbed: Version, cluster: Cluster, simulated_stac: str, tmp_path: Path
) -> None:
    store = tmp_path / "chips.zarr"
    command = [
        sys.executable,
        "-m",
        "jobs.build_dataset",
        *words(simulated_stac, store, ray_address=cluster.address, **MANY_SHARDS),
    ]
    driver = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while driver.poll() is None and not list(store.glob("b10/c/*/0/0/0")):
        time.sleep(0.001)
    assert driver.poll() is None, "the build was over before its driver could be killed"
    driver.kill()
    driver.wait()
    assert Version(str(store), 1).state == "building"
    assert_same(built(simulated_stac, store, **MANY_SHARDS), undisturbed)
