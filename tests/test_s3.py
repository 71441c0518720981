"""The chip store on a real S3 server: the same bytes as on a disk, one winner, and what its absence does."""

from __future__ import annotations

import pickle
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import xarray as xr
import zarr

from pipeline.chip_table import chip_table
from pipeline.grid import Cell
from pipeline.leases import hold
from pipeline.manifest import ITEMS_SCHEMA, MANIFEST_SCHEMA, REJECTIONS_SCHEMA
from pipeline.objects import Objects
from pipeline.shard_reader import ShardReader
from pipeline.store import Store, StoreError, chip_hash
from pipeline.versions import Version, begin
from tests.sample_chips import LAYOUT, make_chip
from tests.seaweed import BUCKET, Seaweed, seaweed
from tests.small_stores import Candidate, _ledger_row, _manifest_row, write_store

NUM_ROWS = 10
CANDIDATES = [
    Candidate(cell=Cell(epsg=32632, column=100 + row, row=5, side_m=240), status="rejected" if row == 6 else "written")
    for row in range(NUM_ROWS)
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seaweed]:
    with seaweed(tmp_path_factory.mktemp("seaweed")) as running:
        yield running


@pytest.fixture
def s3(server: Seaweed, monkeypatch: pytest.MonkeyPatch) -> Seaweed:
    """The server, and this process's environment as a job on it has it."""
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return server


def written(url: str) -> Version:
    return write_store(url, LAYOUT, CANDIDATES, make_chip, request={"what": "test"}, statistics=True)


def content(objects: Objects) -> dict[str, bytes]:
    """All objects but the leases, which hold times."""
    return {path: objects.get(path) for path in objects.list() if "/lease" not in path}


@pytest.mark.usefixtures("s3")
def test_a_store_on_s3_has_the_bytes_of_one_on_a_disk(tmp_path: Path) -> None:
    remote, local = written(f"s3://{BUCKET}/same"), written(str(tmp_path / "same"))
    there, here = content(Objects.at(f"s3://{BUCKET}/same")), content(Objects.at(tmp_path / "same"))
    assert there.keys() == here.keys()
    assert [path for path in here if there[path] != here[path]] == []
    assert any(path.startswith("b10/c/") for path in here)
    assert remote.state == local.state == "sealed"
    assert remote.sealed == local.sealed


@pytest.mark.usefixtures("s3")
def test_a_sealed_store_is_read_back_whole_in_parts_and_by_other_tools() -> None:
    url = f"s3://{BUCKET}/read"
    written(url)
    store = Store.open(url)
    for row in (0, 5, 9):
        np.testing.assert_equal(store.read_chip(row), make_chip(row))
    reader = ShardReader(store, 1, ["b10", "radar"], [5, 7])
    out = reader.scratch()
    reader.read(7, out)
    np.testing.assert_equal(out["b10"], make_chip(7)["b10"])
    assert store.rows_there("b10", 1) == {4, 5, 7}
    zarr_store = Objects.at(url).zarr_store(read_only=True)
    group = zarr.open_group(zarr_store, mode="r")
    np.testing.assert_array_equal(group["radar"][9], make_chip(9)["radar"])
    with xr.open_dataset(zarr_store, engine="zarr", consolidated=False, mask_and_scale=False) as dataset:
        np.testing.assert_array_equal(dataset["b20"][3].values, make_chip(3)["b20"])


@pytest.mark.usefixtures("s3")
def test_a_store_is_appended_to_and_its_first_version_stays() -> None:
    url = f"s3://{BUCKET}/append"
    first = written(url)
    before = content(Objects.at(url))
    second = begin(url, {"what": "more"}, number=2)
    rows = range(second.first_shard() * LAYOUT.shard_chips, second.first_shard() * LAYOUT.shard_chips + 3)
    assert rows.start == 12, "the short last shard stays short"
    manifest = [_manifest_row(row, CANDIDATES[0], LAYOUT.shard_chips) for row in rows]
    rejections = REJECTIONS_SCHEMA.empty_table()
    planned = pa.Table.from_pylist(manifest, schema=MANIFEST_SCHEMA)
    second.write_plan(ITEMS_SCHEMA.empty_table(), rejections, [planned])
    hashes = Store.open(url).write_shard(3, ((row, make_chip(row)) for row in rows))
    second.write_part(3, chip_table([_ledger_row(row, CANDIDATES[0], hashes) for row in manifest]))
    second.seal()
    after = content(Objects.at(url))
    changed = {path for path in before if after[path] != before[path]}
    assert changed == {f"{name}/zarr.json" for name in LAYOUT.arrays()}, "only the length of the arrays"
    assert Version(url, 1).sealed == first.sealed
    np.testing.assert_equal(Store.open(url).read_chip(14), make_chip(14))
    np.testing.assert_equal(Store.open(url).read_chip(9), make_chip(9))


@pytest.mark.usefixtures("s3")
def test_of_many_who_create_an_object_at_once_one_wins() -> None:
    objects = Objects.at(f"s3://{BUCKET}/claims")

    def create(number: int) -> int | None:
        try:
            objects.put(f"claim-{number // 16}", str(number).encode(), create=True)
        except FileExistsError:
            return None
        return number

    with ThreadPoolExecutor(16) as pool:
        winners = [number for number in pool.map(create, range(160)) if number is not None]
    assert [number // 16 for number in winners] == list(range(10))
    assert [objects.get(f"claim-{n // 16}") for n in winners] == [str(n).encode() for n in winners]


@pytest.mark.usefixtures("s3")
def test_a_lease_is_held_by_one_and_taken_over_when_it_has_expired() -> None:
    objects = Objects.at(f"s3://{BUCKET}/leases")
    now = datetime(2026, 11, 22, tzinfo=UTC)
    with hold(objects, what="store", owner="one", ttl_s=60, clock=lambda: now) as lease:
        with (
            pytest.raises(StoreError, match="store is being built by one"),
            hold(objects, what="store", owner="two", ttl_s=60, clock=lambda: now),
        ):
            pass
        later = now + timedelta(seconds=61)
        with (
            hold(objects, what="store", owner="two", ttl_s=60, clock=lambda: later),
            pytest.raises(StoreError, match="the lease was lost to two"),
        ):
            lease.renew()


def test_a_wrong_key_is_refused_at_once_in_one_line_without_it(s3: Seaweed, monkeypatch: pytest.MonkeyPatch) -> None:
    Objects.at(f"s3://{BUCKET}/key").put("x", b"1")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hUsHwrong")
    objects = Objects.at(f"s3://{BUCKET}/key")
    start = time.monotonic()
    for action in (lambda: objects.get("x"), lambda: objects.put("y", b"1"), objects.list, lambda: objects.exists("x")):
        with pytest.raises(
            PermissionError, match=r"s3://chips/key.*check the credentials in the environment"
        ) as refusal:
            action()
        for secret in ("hUsH", s3.key, "Signature"):
            assert secret not in str(refusal.value)
        assert "\n" not in str(refusal.value)
    assert time.monotonic() - start < 5, "a refusal is not retried"


def test_what_is_not_signed_is_refused(s3: Seaweed, monkeypatch: pytest.MonkeyPatch) -> None:
    Objects.at(f"s3://{BUCKET}/open").put("x", b"1")
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    with pytest.raises(PermissionError):
        Objects.at(f"s3://{BUCKET}/open").get("x")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["crash", "hang"])
def test_a_server_that_is_away_while_shards_are_written_costs_only_time(s3: Seaweed, tmp_path: Path, how: str) -> None:
    url = f"s3://{BUCKET}/away-{how}"
    store = Store.create(url, LAYOUT)
    store.resize(40)
    went_away, written_shards = threading.Event(), []

    def write() -> None:
        for shard in range(10):
            if shard == 3:
                went_away.wait()
            store.write_shard(shard, [(row, make_chip(row)) for row in store.rows_of(shard)])
            written_shards.append(shard)

    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write)
        if how == "crash":
            s3.stop(signal.SIGKILL)
        else:
            s3.pause()
        went_away.set()
        gone = time.monotonic()
        while time.monotonic() - gone < 3:
            assert not writing.done()
            time.sleep(0.1)
        assert len(written_shards) < 10
        if how == "crash":
            s3.start()
        else:
            s3.resume()
        writing.result(timeout=120)
    local = Store.create(str(tmp_path / "local"), LAYOUT)
    local.resize(40)
    for shard in range(10):
        local.write_shard(shard, [(row, make_chip(row)) for row in local.rows_of(shard)])
    assert content(store.objects) == content(local.objects)


def test_a_server_that_is_not_there_is_a_plain_error(s3: Seaweed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr("pipeline.objects.RETRY_S", 1.0)
    with pytest.raises(OSError, match=r"^could not write s3://chips/nowhere/x: [^\n]*127\.0\.0\.1:1[^\n]*$") as refusal:
        Objects.at(f"s3://{BUCKET}/nowhere").put("x", b"1")
    assert s3.key not in str(refusal.value)


@pytest.mark.usefixtures("s3")
def test_tables_chips_and_hashes_are_the_same_through_a_pickle() -> None:
    objects = pickle.loads(pickle.dumps(Objects.at(f"s3://{BUCKET}/pickled")))
    table = pa.table({"row": list(range(1000))})
    objects.put_table("t.parquet", table)
    assert objects.get_table("t.parquet").equals(table)
    url = f"s3://{BUCKET}/pickled/store"
    written(url)
    store = pickle.loads(pickle.dumps(Store.open(url)))
    assert chip_hash(store.read_chip(3)) == chip_hash(make_chip(3))
