"""A version whose plan and chip table are in several parts: read whole, in waves and by shard, always the same."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import plans, tables
from pipeline.chip_table import SCHEMA, equal
from pipeline.ingest import build_planned_shard
from pipeline.manifest import MANIFEST_SCHEMA, ROWS_SCHEMA, items_table, plan_pairs, plan_rows, rejections_table
from pipeline.objects import Objects
from pipeline.pairing import Rejection
from pipeline.store import Store, StoreError
from pipeline.versions import Version, begin
from tests.made_units import LAYOUT, SPLITS, Maker, grid, planned

PAIRS = grid(range(12), range(6), days=(0, 3))


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "_GROUP_ROWS", 8)
    monkeypatch.setattr(plans, "_PART_ROWS", 24)
    monkeypatch.setattr(plans, "_GROUP_LOOKS", 1)
    monkeypatch.setattr(plans, "_REJECTIONS_AT_ONCE", 5)


@pytest.fixture
def version(tmp_path: Path, small_parts: None) -> Version:
    return planned(str(tmp_path / "store"), PAIRS)


def expected() -> pa.Table:
    return plan_rows(PAIRS, block_cells=2, shard_chips=LAYOUT.shard_chips, first_row=0, splits=SPLITS)


def test_the_manifest_at_rest_is_numbers_in_parts_of_bounded_size(version: Version) -> None:
    paths = version.objects.list("manifest")
    plan = version.plan
    assert plan is not None
    assert len(paths) == len(plan["part_rows"]) == 6
    for path, first_row in zip(paths, plan["part_rows"], strict=True):
        part = version.objects.get_table(path)
        assert part.schema.equals(ROWS_SCHEMA)
        rows = part["row"].to_numpy()
        assert rows[0] == first_row
        assert rows[0] // 24 == rows[-1] // 24
    assert plan["block_cells"] == 2
    assert plan["note"] == "made up"


def test_however_it_is_read_the_manifest_says_the_same(version: Version) -> None:
    whole = expected()
    assert version.manifest().equals(whole)
    assert version.manifest().schema.equals(MANIFEST_SCHEMA)
    assert pa.concat_tables(version.manifest_batches()).equals(whole)
    assert max(batch.num_rows for batch in version.manifest_batches()) <= 8
    by_shard = [version.manifest_of(shard) for shard in version.shards()]
    assert pa.concat_tables(by_shard).equals(whole)
    for columns in (["cell"], ["row"], ["split", "row"], ["unit", "dt_s"], ["overlap", "pair"]):
        assert version.manifest(columns=columns).equals(whole.select(columns))
        assert version.manifest_of(5, columns=columns).equals(by_shard[5].select(columns))


def test_a_shard_is_read_without_the_rest(version: Version, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "_TAIL_BYTES", 64)
    read: dict[str, int] = {}
    plain = Objects.get_ranges

    def noting(self: Objects, path: str, ranges: list[tuple[int, int]]) -> object:
        read[path] = read.get(path, 0) + sum(end - start for start, end in ranges)
        return plain(self, path, ranges)

    monkeypatch.setattr(Objects, "get_ranges", noting)
    planned_there = version.manifest_of(7)
    assert planned_there.equals(expected().filter(np.asarray(expected()["shard"]) == 7))
    items = version.items_of(planned_there)
    named = {name for row in planned_there.to_pylist() for name in (*row["optical_items"], *row["radar_items"])}
    assert named <= set(items["id"].to_pylist())
    assert [path for path in read if path.startswith("manifest")] == ["manifest/part-00001.parquet"]


def test_parts_depend_on_the_rows_alone(tmp_path: Path, small_parts: None) -> None:
    whole, contents = expected(), []
    for name, size in (("one", 1000), ("few", 7), ("single", 1)):
        version = begin(Store.create(str(tmp_path / name), LAYOUT).url, {})
        pieces = [whole.slice(start, size) for start in range(0, whole.num_rows, size)]
        version.write_plan(items_table(PAIRS), rejections_table([]), pieces)
        contents.append({path: version.objects.get(path) for path in version.objects.list("manifest")})
        # Rows with their names in them need no looks.
        assert version.looks() is None
        assert version.manifest().equals(whole)
        assert version.manifest_of(3).equals(whole.filter(np.asarray(whole["shard"]) == 3))
    assert contents[0] == contents[1] == contents[2]


def test_rejections_are_streamed(tmp_path: Path, small_parts: None) -> None:
    rejections = [Rejection(cell=f"c{n}", optical="o", reason="cloudy_scene", detail="") for n in range(23)]
    version = begin(Store.create(str(tmp_path / "store"), LAYOUT).url, {})
    planner = plan_pairs(PAIRS, block_cells=2, shard_chips=4, first_row=0, splits=SPLITS)
    parts = (rejections_table(rejections[start : start + 9]) for start in range(0, 23, 9))
    assert version.write_planned(planner, items_table(PAIRS), parts)["num_rejections"] == 23
    assert version.rejections().equals(rejections_table(rejections))
    assert max(batch.num_rows for batch in version.rejection_batches()) <= 5
    assert version.summary()["num_rejections"] == 23


def test_a_plan_that_was_killed_and_had_more_parts_leaves_none(version: Version, tmp_path: Path) -> None:
    fewer = begin(Store.create(str(tmp_path / "other"), LAYOUT).url, {})
    for path in version.objects.list("manifest"):
        fewer.objects.put(path, b"of a killed planning")
    fewer.objects.put("rejections/part-00007.parquet", b"also")
    planner = plan_pairs(PAIRS[:5], block_cells=2, shard_chips=4, first_row=0, splits=SPLITS)
    fewer.write_planned(planner, items_table(PAIRS[:5]))
    assert fewer.manifest().num_rows == 5
    assert fewer.rejections().num_rows == 0


def test_the_sealed_chip_table_is_that_of_all_parts(version: Version) -> None:
    maker = Maker(failing=frozenset({1}), rejected=frozenset({2, 3}))
    for shard in version.shards():
        build_planned_shard(version, shard, maker)
    building = version.chips()
    parts = {shard: version.chips_of(shard) for shard in version.shards()}
    counts_before = version.counts()
    failed_before = pa.concat_tables(version.failures())
    counts = version.seal()
    assert len(version.objects.list("chip_table")) == len(counts["part_rows"]) == 6
    assert equal(version.chips(), building)
    assert version.chips().schema.equals(SCHEMA)
    assert version.counts() == counts_before
    assert (counts["failed"], counts["rejected"], counts["written"]) == (12, 24, 108)
    assert equal(pa.concat_tables(version.failures()), failed_before)
    assert all(equal(version.chips_of(shard), parts[shard]) for shard in version.shards())
    assert max(batch.num_rows for batch in version.chip_batches()) <= 8
    assert version.chips(columns=["status", "row"]).column_names == ["status", "row"]
    digest = hashlib.sha256(b"".join(version.objects.get(path) for path in version.objects.list("chip_table")))
    assert counts["sha256"] == digest.hexdigest()
    written = [row["row"] for row in building.to_pylist() if row["status"] == "written"]
    assert version.written_rows().tolist() == written
    for split in ("train", "val"):
        of_split = [row["row"] for row in building.to_pylist() if row["status"] == "written" and row["split"] == split]
        assert version.written_rows(split=split).tolist() == of_split


def test_a_version_is_described_without_reading_a_table(version: Version, monkeypatch: pytest.MonkeyPatch) -> None:
    for shard in list(version.shards())[:4]:
        build_planned_shard(version, shard, Maker(failing=frozenset(range(12)) if shard == 2 else frozenset()))
    shards, url = len(version.shards()), version.url

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a table was read")

    monkeypatch.setattr(Objects, "get_table", refuse)
    monkeypatch.setattr(tables, "open_parquet", refuse)
    assert version.finished_shards() == {0, 1, 3}
    assert version.failed_shards() == {2}
    assert version.summary() == {
        "url": url,
        "version": 1,
        "state": "building",
        "request": {"number": 1},
        "num_chips": 144,
        "num_rejections": 0,
        "first_shard": 0,
        "end_shard": shards,
        "shard_chips": 4,
        "done_shards": 4,
        "shards_with_failures": 1,
    }
    monkeypatch.undo()
    for shard in version.shards():
        build_planned_shard(version, shard, Maker())
    version.seal()
    monkeypatch.setattr(tables, "open_parquet", refuse)
    assert version.summary()["ledger"] == {"requested": 144, "written": 144, "rejected": 0, "failed": 0, "reasons": {}}


def test_of_two_parts_of_a_shard_the_one_without_failures_counts(version: Version) -> None:
    build_planned_shard(version, 2, Maker(failing=frozenset(range(12))))
    failed = version.objects.get("chips/shard-000002.failed.parquet")
    build_planned_shard(version, 2, Maker())
    version.objects.put("chips/shard-000002.failed.parquet", failed)
    assert version.finished_shards() == {2}
    assert version.failed_shards() == set()
    assert version.counts()["failed"] == 0


def test_sealing_names_the_first_difference_in_any_part(version: Version) -> None:
    for shard in version.shards():
        build_planned_shard(version, shard, Maker())
    last = version.shards()[-1]
    part = version.part(last)
    assert part is not None
    version.write_part(last, part.set_column(1, "cell", pa.array(["elsewhere"] * part.num_rows)))
    with pytest.raises(StoreError, match="cell differs between manifest and ledger"):
        version.seal()
    assert version.state == "building"
    version.write_part(last, part)
    assert version.seal()["requested"] == 144


@given(
    st.lists(st.integers(0, 60), unique=True, min_size=1).map(sorted),
    st.lists(st.integers(1, 9), min_size=1),
    st.integers(1, 20),
)
@settings(max_examples=60)
def test_tables_are_cut_anew_by_value(rows: list[int], cuts: list[int], step: int) -> None:
    table = pa.table({"row": rows})
    pieces, start = [], 0
    while start < len(rows):
        size = cuts[len(pieces) % len(cuts)]
        pieces.append(table.slice(start, size))
        start += size
    groups = list(tables.grouped(pieces, column="row", first=0, step=step))
    assert [number for number, _ in groups] == sorted({row // step for row in rows})
    assert all(row // step == number for number, group in groups for row in group["row"].to_pylist())
    assert [row for _, group in groups for row in group["row"].to_pylist()] == rows


@given(st.lists(st.integers(0, 50), min_size=1).map(sorted), st.sets(st.integers(-5, 60)), st.integers(1, 9))
@settings(max_examples=60)
def test_matching_finds_what_a_filter_finds(values: list[int], wanted: set[int], group: int) -> None:
    objects = Objects.in_memory()
    table = pa.table({"list": [[str(value)] for value in values], "row": values, "name": [f"n{v:02d}" for v in values]})
    objects.put("t.parquet", tables.encode(tables.slices(table, group)))
    expected = [value for value in values if value in wanted]
    found = tables.matching(objects, "t.parquet", "row", sorted(wanted))
    assert found["row"].to_pylist() == expected
    assert found["list"].to_pylist() == [[str(value)] for value in expected]
    by_name = tables.matching(objects, "t.parquet", "name", [f"n{v:02d}" for v in wanted], columns=["row"])
    assert by_name["row"].to_pylist() == expected
