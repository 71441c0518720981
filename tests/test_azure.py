"""Signed reads and the chip store on a real blob server, under the archive's own host names."""

from __future__ import annotations

import io
import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import parse_qs

import numpy as np
import planetary_computer
import pytest
import rasterio
import requests
from numpy.typing import NDArray
from planetary_computer.sas import TOKEN_CACHE
from rasterio.windows import Window

from pipeline import broker
from pipeline.access import Access, SigningRefused
from pipeline.broker import AccessSpec, ProcessAccess, ThreadConnection
from pipeline.grid import Cell
from pipeline.limits import HostLimits
from pipeline.objects import Objects
from pipeline.redaction import Redacting, describe, redact
from pipeline.shard_reader import ShardReader
from pipeline.signing import sign
from pipeline.store import Store
from pipeline.versions import Version
from tests.azurite import AzuriteLab, azurite_lab, first_byte
from tests.sample_chips import LAYOUT, make_chip
from tests.small_stores import Candidate, write_store
from tests.token_server import sdk_settings

OPTICAL, RADAR, STORE = "sentinel2l2a01", "sentinel1euwestrtc", "chipstore"
FREE = HostLimits(rate_per_s=1e6, burst=1_000_000, turns=100)
SPEC = AccessSpec(signing="planetary-computer", storage=FREE, api=FREE)
SIDE_PX = 1024
LATER = datetime(2099, 1, 1, tzinfo=UTC)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AzuriteLab]:
    accounts = {OPTICAL: ["sentinel2-l2"], RADAR: ["sentinel1-grd-rtc"], STORE: ["chips"]}
    with azurite_lab(tmp_path_factory.mktemp("azurite"), accounts) as lab:
        yield lab


@pytest.fixture
def lab(running: AzuriteLab, monkeypatch: pytest.MonkeyPatch) -> Iterator[AzuriteLab]:
    """The lab without faults, and this process's environment as it must be to reach it."""
    for name, value in running.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("GDAL_DISABLE_READDIR_ON_OPEN", "EMPTY_DIR")
    running.requests.clear()
    running.tokens.asked.clear()
    TOKEN_CACHE.clear()
    with sdk_settings(PC_SDK_SAS_URL=running.tokens.url):
        yield running
    running.tokens.issue = running.token
    running.fault, running.tokens.lifetime_s, running.tokens.wanted_key = None, 3600.0, None
    running.tokens.faults.clear()


@pytest.fixture
def access() -> Iterator[ProcessAccess]:
    connection = ThreadConnection()
    yield ProcessAccess(SPEC, connection)
    connection.close()


PIXELS = np.random.default_rng(3).integers(1, 10_000, (SIDE_PX, SIDE_PX)).astype(np.uint16)


@pytest.fixture(scope="module")
def files(running: AzuriteLab, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Account -> href of a file with `PIXELS` that cannot be compressed."""
    path = tmp_path_factory.mktemp("files") / "B02.tif"
    profile = {
        "driver": "GTiff",
        "width": SIDE_PX,
        "height": SIDE_PX,
        "count": 1,
        "dtype": "uint16",
        "crs": "EPSG:32632",
    }
    transform = rasterio.Affine(10, 0, 600_000, 0, -10, 5_300_040)
    with rasterio.open(path, "w", tiled=True, blockxsize=256, blockysize=256, transform=transform, **profile) as file:
        file.write(PIXELS, 1)
    return {
        OPTICAL: running.upload(OPTICAL, "sentinel2-l2", "32/U/MV/B02.tif", path),
        RADAR: running.upload(RADAR, "sentinel1-grd-rtc", "GRD/vv.tif", path),
    }


def read(access: Access, href: str, window: Window, *, attempts: int = 3) -> NDArray[np.uint16]:
    """What a reader does: a turn, a signature, the read; and once more with another signature."""
    for attempt in range(1, attempts + 1):
        with access.turn(href, requests=4):
            try:
                with rasterio.open(access.sign(href)) as file:
                    pixels: NDArray[np.uint16] = file.read(1, window=window)
                    return pixels
            except rasterio.RasterioIOError as error:
                message = describe(error)
                access.failed(href, status=403 if "403" in message else None)
                if attempt == attempts:
                    raise OSError(message) from None
    raise AssertionError


def test_only_what_is_signed_rightly_and_in_time_is_answered(lab: AzuriteLab, files: dict[str, str]) -> None:
    href = files[OPTICAL]
    token = lab.token(OPTICAL, "sentinel2-l2", datetime.now(UTC) + timedelta(hours=1))
    expired = lab.token(OPTICAL, "sentinel2-l2", datetime.now(UTC) - timedelta(seconds=5))
    others = lab.token(RADAR, "sentinel1-grd-rtc", datetime.now(UTC) + timedelta(hours=1))
    assert requests.get(f"{href}?{token}", timeout=10).status_code == 200
    assert requests.get(f"{href[:-4]}X.tif?{token}", timeout=10).status_code == 404
    for query in ("", expired, others, token.replace("sp=rl", "sp=rwl"), f"{token}x"):
        assert requests.get(f"{href}?{query}", timeout=10).status_code == 403, redact(query)


def test_our_signatures_are_those_of_the_sdk(lab: AzuriteLab, files: dict[str, str], access: ProcessAccess) -> None:
    for href in files.values():
        theirs, ours = planetary_computer.sign(href), access.sign(href)
        assert theirs.partition("?")[0] == ours.partition("?")[0] == href
        assert parse_qs(theirs.partition("?")[2]).keys() == parse_qs(ours.partition("?")[2]).keys()
        assert requests.head(ours, timeout=10).status_code == requests.head(theirs, timeout=10).status_code == 200


def test_signed_reads_are_right_and_many_threads_take_one_token_for_each_container(
    lab: AzuriteLab, files: dict[str, str], access: ProcessAccess
) -> None:
    windows = [Window(256 * x, 256 * y, 256, 256) for x in range(4) for y in range(4)]
    work = [(href, window) for href in files.values() for window in windows]
    with ThreadPoolExecutor(16) as pool:
        results = list(pool.map(lambda each: read(access, *each), work))
    for (_, window), pixels in zip(work, results, strict=True):
        np.testing.assert_array_equal(pixels, PIXELS[window.toslices()])
    assert len(lab.tokens.asked) == 2
    assert {request.status for request in lab.requests} <= {200, 206}
    assert all(request.signed for request in lab.requests)


def test_a_token_that_dies_between_two_reads_of_one_block_is_renewed_and_the_read_repeated(
    lab: AzuriteLab, files: dict[str, str], access: ProcessAccess
) -> None:
    lab.tokens.lifetime_s = 2.0
    href = files[OPTICAL]
    died = threading.Event()

    def once_dead(method: str, path: str, headers: object) -> tuple[int, dict[str, str]] | None:
        # The first read's request for pixels stalls on the server for longer than its token lives.
        if method == "GET" and len(lab.requests) >= 2 and not died.is_set():
            died.set()
            time.sleep(2.2)
        return None

    lab.fault = once_dead
    np.testing.assert_array_equal(read(access, href, Window(0, 0, SIDE_PX, SIDE_PX)), PIXELS)
    assert died.is_set()
    statuses = [request.status for request in lab.requests]
    assert 403 in statuses, "nothing expired"
    assert statuses[-1] in (200, 206)
    assert len(lab.tokens.asked) == 2


def test_a_token_that_the_storage_no_longer_accepts_is_replaced(
    lab: AzuriteLab, files: dict[str, str], access: ProcessAccess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broker, "_YOUNG_S", 0.0)
    bad = access.sign(files[OPTICAL]).partition("?")[2]
    lab.fault = lambda method, path, headers: (403, {}) if bad in path else None
    np.testing.assert_array_equal(read(access, files[OPTICAL], Window(0, 0, 99, 99)), PIXELS[:99, :99])
    assert len(lab.tokens.asked) == 2


def test_a_giver_of_tokens_under_load_is_left_alone_and_the_read_waits(
    lab: AzuriteLab, files: dict[str, str], access: ProcessAccess
) -> None:
    lab.tokens.faults += [(429, {"Retry-After": "1"})]
    np.testing.assert_array_equal(read(access, files[RADAR], Window(0, 0, 99, 99)), PIXELS[:99, :99])
    first, second = (at for at, _, _ in lab.tokens.asked)
    assert second - first >= 1.0
    assert all(request.signed for request in lab.requests), "somebody went ahead without a signature"


def test_an_account_is_asked_for_where_it_is_missing_and_no_request_goes_unsigned(
    lab: AzuriteLab, files: dict[str, str], access: ProcessAccess
) -> None:
    lab.tokens.wanted_key = "hUsHkey"
    with pytest.raises(SigningRefused, match="PC_SDK_SUBSCRIPTION_KEY is not set on node"):
        read(access, files[RADAR], Window(0, 0, 9, 9))
    assert lab.requests == []


def test_no_signature_is_in_any_log_or_error_of_a_read_that_fails(
    lab: AzuriteLab, files: dict[str, str], access: ProcessAccess, capfd: pytest.CaptureFixture[str]
) -> None:
    log = io.StringIO()
    handler = logging.StreamHandler(log)
    handler.addFilter(Redacting())
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    # Below this level no library may be trusted with a URL; the filter must hold all the same.
    root.setLevel(logging.DEBUG)
    try:
        with pytest.raises(OSError, match="404") as missing:
            read(access, files[OPTICAL].replace("B02", "B99"), Window(0, 0, 9, 9))
        lab.fault = lambda method, path, headers: (503, {})
        with pytest.raises(OSError, match="503") as trouble:
            read(access, files[RADAR], Window(0, 0, 9, 9))
        logging.getLogger(__name__).error("could not read %s", access.sign(files[RADAR]), exc_info=trouble.value)
    finally:
        root.setLevel(level)
        root.removeHandler(handler)
    shown = "".join([str(missing.value), str(trouble.value), log.getvalue(), *capfd.readouterr()])
    assert "could not read https://sentinel1euwestrtc.blob.core.windows.net/sentinel1-grd-rtc/GRD/vv.tif?…" in shown
    for secret in ("sig=", "se=20", *lab.keys.values()):
        assert secret not in shown.replace("sig=…", "").replace("se=…", "")


CANDIDATES = [Candidate(cell=Cell(epsg=32632, column=100 + row, row=5, side_m=240)) for row in range(6)]


def test_a_store_on_azure_has_the_bytes_of_one_on_a_disk(
    lab: AzuriteLab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in lab.store_environment(STORE).items():
        monkeypatch.setenv(name, value)
    url = "az://chips/region/store"

    def written(where: str) -> Version:
        return write_store(where, LAYOUT, CANDIDATES, make_chip, request={"what": "test"}, statistics=True)

    remote, local = written(url), written(str(tmp_path / "store"))
    assert remote.state == local.state == "sealed"
    there, here = Objects.at(url), Objects.at(tmp_path / "store")
    assert there.list() == here.list()
    assert [path for path in here.list() if there.get(path) != here.get(path)] == []
    store = Store.open(url)
    np.testing.assert_equal(store.read_chip(5), make_chip(5))
    reader = ShardReader(store, 1, ["radar"], [4, 5])
    out = reader.scratch()
    reader.read(5, out)
    np.testing.assert_array_equal(out["radar"], make_chip(5)["radar"])
    with pytest.raises(FileExistsError):
        there.put("zarr.json", b"", create=True)
    there.delete("zarr.json")
    assert not there.exists("zarr.json")


def signature(token: str) -> str:
    """Of a token, as it was before it became part of a URL."""
    return parse_qs(token)["sig"][0]


def test_a_signature_with_a_slash_is_not_taken_for_the_name_of_a_file(
    lab: AzuriteLab, files: dict[str, str], access: ProcessAccess
) -> None:
    tokens = (lab.token(OPTICAL, "sentinel2-l2", LATER) for _ in range(999))
    # What lies between its slashes is long enough not to be in a message by chance.
    token = next(token for token in tokens if "/" in token and min(map(len, signature(token).split("/"))) >= 8)
    lab.tokens.issue = lambda *_: token
    for signed in (access.sign(files[OPTICAL]), sign(files[OPTICAL], "planetary-computer")):
        assert "/" not in signed.partition("?")[2]
        assert requests.head(signed, timeout=10).status_code == 200
    # A file that opens; then there is no time, and GDAL says what it was reading.
    lab.fault = lambda method, path, headers: (503, {}) if first_byte(headers) else None
    with pytest.raises(OSError, match=r"B02\.tif") as trouble:
        read(access, files[OPTICAL], Window(0, 0, SIDE_PX, SIDE_PX), attempts=1)
    assert not any(part in str(trouble.value) for part in signature(token).split("/"))


def test_a_wrong_account_key_is_refused_in_one_line_without_it(
    lab: AzuriteLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in lab.store_environment(STORE).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", lab.keys[OPTICAL])
    with pytest.raises(PermissionError, match=r"az://chips/x/y.*check the credentials") as refusal:
        Objects.at("az://chips/x").put("y", b"1")
    assert lab.keys[OPTICAL] not in str(refusal.value)


def test_the_rate_of_reads_is_kept(lab: AzuriteLab, files: dict[str, str]) -> None:
    connection = ThreadConnection()
    limited = ProcessAccess(replace(SPEC, storage=replace(FREE, rate_per_s=20, burst=4, turns=2)), connection)
    start = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda x: read(limited, files[OPTICAL], Window(x, 0, 8, 8)), range(10)))
    assert time.monotonic() - start >= (10 * 4 - 4 - 4) / 20
    connection.close()
