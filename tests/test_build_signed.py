"""build_dataset against storage that refuses unsigned requests: the SDK, GDAL, the broker and Ray, all of it real."""

from __future__ import annotations

import os
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from urllib.parse import parse_qs

import pytest
import ray
from planetary_computer.sas import TOKEN_CACHE

from pipeline.archives import known_archives
from pipeline.archives.planetary_computer import PLANETARY_COMPUTER
from pipeline.broker import ACTOR, ACTOR_OPTIONS
from pipeline.limits import HostLimits
from pipeline.simulation.server import StacServer
from pipeline.versions import Version
from tests.azurite import AzuriteLab, azurite_lab, first_byte
from tests.building import PROFILE, built, exit_code, words
from tests.token_server import sdk_settings

pytestmark = [
    pytest.mark.slow,
    # Ray's own settings object warns about its own fields when it is copied.
    pytest.mark.filterwarnings("ignore:.* is deprecated:Warning:ray.data.context"),
    pytest.mark.filterwarnings("ignore:.* is deprecated:Warning:ray.data._internal"),
]

PLACES = {
    "sentinel-2-l2a": ("sentinel2l2a01", "sentinel2-l2"),
    "sentinel-1-rtc": ("sentinel1euwestrtc", "sentinel1-grd-rtc"),
    "esa-worldcover": ("ai4edataeuwest", "esa-worldcover"),
}
"""Collection -> account and container, as Planetary Computer has them."""

QUICK = HostLimits(rate_per_s=1000.0, burst=1000, pause_s=0.5, window_s=10.0)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AzuriteLab]:
    """Azurite, with this process's environment, and so the cluster's, as it must be to reach it."""
    accounts = {account: [container] for account, container in PLACES.values()}
    with azurite_lab(tmp_path_factory.mktemp("azurite"), accounts) as running:
        before = dict(os.environ)
        os.environ.update(running.environment)
        TOKEN_CACHE.clear()
        with sdk_settings(PC_SDK_SAS_URL=running.tokens.url):
            yield running
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(scope="module")
def archive(lab: AzuriteLab, simulated_archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Name of an archive whose files lie in the lab."""
    copy = tmp_path_factory.mktemp("signed")
    texts = {path: path.read_text() for path in simulated_archive.glob("*/*.json")}
    for collection, (account, container) in PLACES.items():
        folder = simulated_archive / collection
        for file in sorted(folder.rglob("*.tif")):
            name = str(file.relative_to(folder))
            href = lab.upload(account, container, name, file)
            texts = {path: text.replace(f'"{file}"', f'"{href}"') for path, text in texts.items()}
    for path, text in texts.items():
        target = copy / path.relative_to(simulated_archive)
        target.parent.mkdir(exist_ok=True)
        target.write_text(text)
    with StacServer(copy) as server:
        known_archives()["lab"] = replace(
            PLANETARY_COMPUTER,
            name="lab",
            stac_url=server.url,
            account_variable=None,
            api_limits=QUICK,
            storage_limits=QUICK,
        )
        yield "lab"
        del known_archives()["lab"]


@pytest.fixture(scope="module")
def cluster(lab: AzuriteLab) -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=300_000_000)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def plain(cluster: None, simulated_stac: str, tmp_path_factory: pytest.TempPathFactory) -> Version:
    """What the same files give where they lie open."""
    return built(simulated_stac, tmp_path_factory.mktemp("plain") / "chips.zarr")


@pytest.fixture
def forgotten(cluster: None) -> dict[str, object]:
    """Settings with which no process of the cluster knows a token yet."""
    ray.kill(ray.get_actor(ACTOR, namespace=ACTOR_OPTIONS["namespace"]))
    return {"politeness.storage_turns": 63}


def pixels(version: Version) -> dict[str, bytes]:
    folder = Path(version.url)
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.glob("*/c/**/*") if p.is_file()}


def assert_no_signature(lab: AzuriteLab, folder: Path, said: str) -> None:
    """In nothing that was written or said by the job or by any process of the cluster; nor a part of one."""
    signatures = {value for token in lab.tokens.given for value in parse_qs(token)["sig"]}
    assert signatures
    parts = {part for signature in signatures for part in re.split(r"[/+=]", signature) if len(part) >= 8}
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 10
    for path in files:
        assert b"sig=" not in path.read_bytes(), path
    logs = [path for path in Path(ray._private.worker._global_node.get_logs_dir_path()).rglob("*") if path.is_file()]
    assert any(path.name.startswith("worker-") for path in logs)
    for path in (*files, *logs):
        content = path.read_bytes().decode("latin-1")
        assert not any(part in content for part in parts), path
    assert "sig=" not in said
    assert not any(part in said for part in parts)


def test_signed_files_give_the_same_store_and_leave_no_signature(
    plain: Version, lab: AzuriteLab, archive: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lab.requests.clear()
    lab.tokens.asked.clear()
    version = built(archive, tmp_path / "chips.zarr")
    assert pixels(version) == pixels(plain)
    assert pixels(version)
    assert version.sealed == plain.sealed
    read = [request for request in lab.requests if request.method == "GET"]
    assert read
    assert all(request.signed and request.status < 400 for request in read)
    # One token for each container, whoever asked first.
    asked = [(account, container) for _, account, container in lab.tokens.asked]
    assert sorted(asked) == sorted(set(asked))
    assert set(asked) == set(PLACES.values())
    assert_no_signature(lab, tmp_path, caplog.text)


@pytest.mark.parametrize("status", [403, 503])
def test_a_build_that_fails_leaves_no_signature_either(
    plain: Version,
    lab: AzuriteLab,
    archive: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    status: int,
) -> None:
    asked: Counter[str] = Counter()

    def refused(method: str, path: str, headers: Mapping[str, str]) -> tuple[int, dict[str, str]] | None:
        # Files that open, and are refused then.
        name = path.partition("?")[0]
        asked[name] += 1
        return (status, {}) if name.endswith("B08.tif") and asked[name] > 2 else None

    lab.fault = refused
    south = {"region": ",".join(map(str, PROFILE.southern_region)), "labels": "none", "reading.attempts": 2}
    try:
        assert exit_code(words(archive, tmp_path / "chips.zarr", **south)) == 1
    finally:
        lab.fault = None
    said = caplog.text + "".join(capfd.readouterr())
    assert "could not be read" in said
    assert "could not be read" in (tmp_path / "chips.zarr.run" / "run.json").read_text()
    errors = " ".join(row["error"] for row in Version(str(tmp_path / "chips.zarr"), 1).chips().to_pylist())
    assert f"HTTP {status}" in errors
    assert_no_signature(lab, tmp_path, said)


def test_storage_that_is_away_only_costs_time(plain: Version, lab: AzuriteLab, archive: str, tmp_path: Path) -> None:
    begun = time.monotonic()
    away_until = begun + 12.0
    lab.requests.clear()

    def away(*_: object) -> tuple[int, dict[str, str]] | None:
        return (503, {}) if begun + 2.0 < time.monotonic() < away_until else None

    lab.fault = away
    try:
        version = built(archive, tmp_path / "chips.zarr")
    finally:
        lab.fault = None
    assert time.monotonic() > away_until, "the build was over before the storage went away"
    assert any(request.status == 503 for request in lab.requests)
    assert pixels(version) == pixels(plain)
    assert version.sealed == plain.sealed


def test_tokens_that_die_while_pixels_are_read_only_cost_time(
    plain: Version, lab: AzuriteLab, archive: str, forgotten: dict[str, object], tmp_path: Path
) -> None:
    lab.requests.clear()
    lab.tokens.asked.clear()
    lab.tokens.lifetime_s = 2.0
    stalled = threading.Event()

    def once_stalled(method: str, path: str, headers: Mapping[str, str]) -> tuple[int, dict[str, str]] | None:
        # A request for pixels, of a file that is open, waits on the server for longer than its token lives.
        if method == "GET" and first_byte(headers) and not stalled.is_set():
            stalled.set()
            time.sleep(2.2)
            # Those that are given from now on live as usual.
            lab.tokens.lifetime_s = 3600.0
        return None

    lab.fault = once_stalled
    try:
        version = built(archive, tmp_path / "chips.zarr", **forgotten)
    finally:
        lab.fault, lab.tokens.lifetime_s = None, 3600.0
    assert stalled.is_set()
    refused = [request for request in lab.requests if request.status >= 400]
    assert {request.status for request in refused} == {403}, "nothing expired"
    assert all(request.signed for request in refused)
    assert len(lab.tokens.asked) > len({(account, container) for _, account, container in lab.tokens.asked})
    assert pixels(version) == pixels(plain)
    assert version.sealed == plain.sealed
