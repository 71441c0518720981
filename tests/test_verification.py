"""Verifying finds each kind of damage, and none where there is none."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.ingest import build_planned_shard
from pipeline.store import Store, StoreError
from pipeline.verification import verify, verify_shard
from pipeline.versions import Version, begin
from tests.made_units import LAYOUT, Maker, grid, planned

PAIRS = grid(range(6), range(2), days=(0, 1))


@pytest.fixture
def version(tmp_path: Path) -> Version:
    version = planned(str(tmp_path / "store"), PAIRS)
    for shard in version.shards():
        build_planned_shard(version, shard, Maker(failing=frozenset({1}), rejected=frozenset({2})))
    version.seal()
    return version


def test_a_sound_version_is_found_sound(version: Version) -> None:
    report = verify(version, pixels=True)
    assert (report.problems, report.num_problems, report.ok) == ((), 0, True)
    assert (report.shards, report.chips, report.pixels) == (len(version.shards()), 16, True)
    assert verify(version, pixels=False).ok


def object_of(version: Version, name: str, shard: int) -> tuple[Path, bytearray]:
    path = Path(version.url, Store.open(version.url).shard_key(name, shard))
    return path, bytearray(path.read_bytes())


def full_shard(version: Version) -> int:
    """A shard all of whose rows hold chips."""
    chips = version.chips().to_pylist()
    written = [row["row"] // LAYOUT.shard_chips for row in chips if row["status"] == "written"]
    return next(shard for shard in version.shards() if written.count(shard) == LAYOUT.shard_chips)


def one_pixel(version: Version) -> None:
    """A shard as a faulty task might have written it: sound but for one pixel."""
    store, shard = Store.open(version.url), full_shard(version)
    chips = {row: store.read_chip(row) for row in store.rows_of(shard)}
    chips[store.rows_of(shard)[2]]["b10"][1, 2, 3] += 1
    store.write_shard(shard, chips.items())


def damaged_index(version: Version) -> None:
    path, data = object_of(version, "radar", full_shard(version))
    data[-10] ^= 1
    path.write_bytes(data)


def torn(version: Version) -> None:
    path, data = object_of(version, "radar", full_shard(version))
    path.write_bytes(data[: len(data) // 2])


def missing(version: Version) -> None:
    object_of(version, "scl", full_shard(version))[0].unlink()


def another_shards(version: Version) -> None:
    """An object with a chip where the ledger has none."""
    with_holes = next(
        row["row"] // LAYOUT.shard_chips for row in version.chips().to_pylist() if row["status"] != "written"
    )
    whole, _ = object_of(version, "b60", full_shard(version))
    path = Path(version.url, Store.open(version.url).shard_key("b60", with_holes))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(whole.read_bytes())


def beyond(version: Version) -> None:
    _, data = object_of(version, "b20", 0)
    path = Path(version.url, Store.open(version.url).shard_key("b20", version.shards().stop + 5))
    path.parent.mkdir(parents=True)
    path.write_bytes(data)


def tampered_table(version: Version) -> None:
    path = "chip_table/part-00000.parquet"
    table = version.objects.get_table(path)
    keep = [number for number in range(table.num_rows) if number != 3]
    version.objects.put_table(path, table.take(keep))


def lost_table(version: Version) -> None:
    version.objects.delete("chip_table/part-00000.parquet")


@pytest.mark.parametrize(
    ("damage", "pixels_only", "message"),
    [
        (one_pixel, True, r"shard \d+: row \d+ has pixels of hash \w+…, the ledger says"),
        (damaged_index, False, r"radar/c/\d+/0/0/0: shard of \d+ bytes: its index is damaged"),
        (torn, False, "its index is damaged"),
        (missing, False, r"scl/c/\d+/0/0 lacks the chips of rows"),
        (another_shards, False, r"b60/c/\d+/0/0/0 has chips in rows .*, which the ledger does not"),
        (beyond, False, r"b20 has objects of shards \d+, which no version has"),
        (tampered_table, False, "its hash differs"),
        (tampered_table, False, "the ledger's counts: requested: 24 -> 23"),
        (tampered_table, False, r"rows \d+ are not in both manifest and ledger"),
    ],
)
def test_each_kind_of_damage_is_found(
    version: Version, damage: Callable[[Version], None], pixels_only: bool, message: str
) -> None:
    damage(version)
    report = verify(version, pixels=True)
    assert not report.ok
    assert any(re.search(message, problem) for problem in report.problems), report.problems
    assert verify(version, pixels=False).ok == pixels_only


def test_arrays_that_are_too_short_are_a_problem(tmp_path: Path) -> None:
    version = planned(str(tmp_path / "store"), grid(range(1), range(1)))
    build_planned_shard(version, 0, Maker())
    metadata = tmp_path / "store/b10/zarr.json"
    described = json.loads(metadata.read_text())
    described["shape"][0] = 0
    metadata.write_text(json.dumps(described))
    # The plan ends where its last candidate does, in the middle of a shard.
    assert verify(version, pixels=False).problems[0] == "the arrays end at row 0, the plan at 1"


def test_a_lost_chip_table_is_a_problem_and_no_crash(version: Version) -> None:
    lost_table(version)
    report = verify(version, pixels=False)
    assert any("the chip table cannot be read" in problem for problem in report.problems)


def test_what_is_not_done_yet_is_said(tmp_path: Path) -> None:
    version = planned(str(tmp_path / "store"), PAIRS)
    build_planned_shard(version, 0, Maker())
    report = verify(version, pixels=True)
    assert report.problems[0] == "shard 1: is not done"
    assert report.num_problems == len(version.shards()) - 1
    assert verify_shard(version, 0, pixels=True).problems == ()
    with pytest.raises(StoreError, match="is not planned yet"):
        verify(begin(Store.create(str(tmp_path / "other"), LAYOUT).url, {}), pixels=False)
