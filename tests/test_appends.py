"""Versions after the first: more places and dates, and another try at what failed."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import shapely
from shapely.geometry import box

from pipeline.appends import leave_out_earlier, plan_retry
from pipeline.grid import Cell
from pipeline.ingest import build_planned_shard
from pipeline.manifest import items_table, plan_pairs, rejections_table
from pipeline.pairing import Pair, PairRules, acquisitions, pair_cells
from pipeline.store import Store, StoreError
from pipeline.verification import verify
from pipeline.versions import Version, begin, latest_sealed
from tests.made_units import LAYOUT, SPLITS, Maker, chip_of, grid, objects_of, pair, planned

Key = tuple[str, str]


def built(version: Version, maker: Maker | None = None) -> Version:
    for shard in version.shards():
        build_planned_shard(version, shard, maker or Maker())
    version.seal()
    return version


def appended(url: str, pairs: list[Pair], *, number: int, block_cells: int = 2) -> Version:
    """The version after another, without what that has; planned."""
    version = begin(url, {"number": number}, number=number)
    planner = plan_pairs(
        pairs,
        block_cells=block_cells,
        shard_chips=LAYOUT.shard_chips,
        first_row=version.first_shard() * LAYOUT.shard_chips,
        splits=SPLITS,
    )
    leave_out_earlier(planner, version)
    version.write_planned(planner, items_table(pairs), [rejections_table([])])
    return version


def keys(pairs: list[Pair]) -> set[Key]:
    return {(pair.cell.id, pair.id) for pair in pairs}


def written(version: Version) -> list[Key]:
    return [(row["cell"], row["pair"]) for row in version.all_chips().to_pylist() if row["status"] == "written"]


@pytest.fixture
def url(tmp_path: Path) -> str:
    return str(tmp_path / "store")


def test_an_append_builds_what_is_new_and_says_what_is_not(url: str) -> None:
    first, more = grid(range(6), range(3)), grid(range(4, 10), range(3), days=(0, 9))
    one = built(planned(url, first))
    before = objects_of(url)
    # In other blocks than before, which does not change what is new.
    two = appended(url, more, number=2, block_cells=1)
    new = keys(more) - keys(first)
    manifest = two.manifest().to_pylist()
    assert {(row["cell"], row["pair"]) for row in manifest} == new
    assert len(manifest) == len(new)
    assert min(row["row"] for row in manifest) == one.shards().stop * LAYOUT.shard_chips
    refused = two.rejections().to_pylist()
    assert {(row["cell"], row["detail"]) for row in refused} == keys(more) & keys(first)
    assert {row["reason"] for row in refused} == {"in_earlier_version"}
    assert {row["optical"] for row in refused} == {pair.optical.id for pair in first}
    built(two)
    assert sorted(written(two)) == sorted(keys(first) | keys(more))
    assert sorted(written(one)) == sorted(keys(first))
    assert two.written_rows().tolist() == sorted({*one.written_rows().tolist(), *two.chips()["row"].to_pylist()})
    after = objects_of(url)
    changed = {path for path in before if before[path] != after[path]}
    # The arrays become longer, which is in Zarr's metadata.
    assert changed == {f"{name}/zarr.json" for name in LAYOUT.arrays()}
    for version in (one, two):
        assert verify(version, pixels=True).ok


def test_a_third_version_knows_both_before_it(url: str) -> None:
    built(planned(url, grid(range(2), range(2))))
    built(appended(url, grid(range(4), range(2)), number=2))
    third = appended(url, grid(range(6), range(2)), number=3)
    assert {row["column"] for row in third.manifest().to_pylist()} == {4, 5}
    assert third.rejections().num_rows == 8
    assert sorted(written(built(third))) == sorted(keys(grid(range(6), range(2))))


def test_the_splits_of_cells_stay(url: str) -> None:
    built(planned(url, grid(range(16), range(2))))
    version = built(appended(url, grid(range(16), range(2), days=(3,)), number=2))
    splits: dict[str, set[str]] = {}
    for row in version.all_chips().to_pylist():
        splits.setdefault(row["cell"], set()).add(row["split"])
    assert all(len(of_cell) == 1 for of_cell in splits.values())
    assert len(set.union(*splits.values())) > 1


def test_an_append_of_nothing_new_is_refused(url: str) -> None:
    pairs = grid(range(3), range(2))
    built(planned(url, pairs))
    with pytest.raises(StoreError, match="earlier versions have all 6 candidates; nothing is new"):
        appended(url, pairs, number=2)
    assert latest_sealed(url).number == 1


WITHOUT_NAMES: dict[str, Any] = {"absolute_orbit": None, "datatake": ""}


@pytest.mark.parametrize("before", [{}, WITHOUT_NAMES], ids=["named alike", "named since"])
def test_a_larger_search_finds_nothing_new_of_the_same_cells(url: str, before: dict[str, Any]) -> None:
    """One slice and one tile more of each overpass, both earlier than those over the cells."""
    cells = [Cell(epsg=32633, column=column, row=20_000, side_m=240) for column in range(4)]
    west, south, east, north = shapely.union_all([cell.footprint for cell in cells]).bounds
    here, beyond = box(west - 1, south - 1, east + 1, north + 1), box(west - 1, north + 1, east + 1, north + 3)

    def pairs(parts: dict[str, Any], **more: Any) -> list[Pair]:
        looks = [
            acquisitions(
                replace(item, id=f"{item.id}-{name}", footprint=part, datetime=item.datetime - earlier, **more)
                for item in (side.items[0] for side in (getattr(pair(0, 0, day), sensor) for day in (0, 5)))
                for name, (part, earlier) in parts.items()
            )
            for sensor in ("optical", "radar")
        ]
        rules = PairRules(max_dt_days=1, max_cloud_percent=100, min_overlap=0.9, per_cell="all")
        return pair_cells(cells, *looks, rules)[0]

    small = {"b": (here, timedelta(0))}
    built(planned(url, pairs(small, **before)))
    with pytest.raises(StoreError, match="earlier versions have all 8 candidates; nothing is new"):
        appended(url, pairs({"a": (beyond, timedelta(seconds=25)), **small}), number=2)


def test_failures_are_tried_again_in_a_version_of_their_own(url: str) -> None:
    pairs = grid(range(6), range(3), days=(0, 4))
    one = built(planned(url, pairs), Maker(failing=frozenset({1, 4}), rejected=frozenset({3})))
    before = objects_of(url)
    failed = {row["row"]: row for row in one.chips().to_pylist() if row["status"] == "failed"}
    assert len(failed) == 12
    two = begin(url, {"retry": 1}, number=2)
    plan = plan_retry(two, {"note": "again"})
    assert (plan["num_chips"], plan["note"], plan["retries"]) == (12, "again", True)
    old, new = one.manifest().to_pylist(), two.manifest().to_pylist()
    what = [name for name in old[0] if name not in ("row", "shard")]
    assert sorted([str({n: row[n] for n in what}) for row in new]) == sorted(
        [str({n: row[n] for n in what}) for row in old if row["row"] in failed]
    )
    built(two, Maker(failing=frozenset({4})))
    seen = two.all_chips().to_pylist()
    assert len({(row["cell"], row["pair"]) for row in seen}) == len(seen) == len(pairs), "a candidate is seen twice"
    status = {row["cell"]: row["status"] for row in seen}
    assert {status[pair.cell.id] for pair in pairs if pair.cell.column == 4} == {"failed"}
    assert {status[pair.cell.id] for pair in pairs if pair.cell.column == 3} == {"rejected"}
    assert len(written(two)) == len(set(written(two))) == 4 * 6
    assert sorted(row["row"] for row in one.all_chips().to_pylist() if row["status"] == "failed") == sorted(failed)
    assert {path: data for path, data in objects_of(url).items() if path in before and "zarr.json" not in path} == {
        path: data for path, data in before.items() if "zarr.json" not in path
    }
    assert verify(two, pixels=True).ok
    assert all(items_of_manifest(two) <= set(v.items()["id"].to_pylist()) for v in (one, two))


def test_what_fails_again_is_tried_once_more_and_no_more_than_that(url: str) -> None:
    pairs = grid(range(6), range(3))
    built(planned(url, pairs), Maker(failing=frozenset({1, 4})))
    for number, failing in ((2, {4}), (3, set[int]())):
        version = begin(url, {"retry": number}, number=number)
        plan_retry(version)
        assert {row["column"] for row in version.manifest().to_pylist()} == ({1, 4} if number == 2 else {4})
        built(version, Maker(failing=frozenset(failing)))
    assert sorted(written(latest_sealed(url))) == sorted(keys(pairs))
    with pytest.raises(StoreError, match="no candidate of an earlier version failed"):
        plan_retry(begin(url, {"retry": 4}, number=4))


def test_failures_of_an_append_and_of_what_came_before_are_tried_together(url: str) -> None:
    built(planned(url, grid(range(3), range(2))), Maker(failing=frozenset({1})))
    built(appended(url, grid(range(3, 6), range(2)), number=2), Maker(failing=frozenset({4})))
    third = begin(url, {"retry": 3}, number=3)
    plan_retry(third)
    assert sorted(row["column"] for row in third.manifest().to_pylist()) == [1, 1, 4, 4]
    built(third)
    assert sorted(written(third)) == sorted(keys(grid(range(6), range(2))))
    stored = Store.open(url)
    for row in third.all_chips().to_pylist():
        if row["status"] == "written":
            expected = chip_of(row["cell"], row["pair"])
            assert all((stored.read_chip(row["row"])[name] == expected[name]).all() for name in expected)


def test_a_store_that_is_not_of_the_grid_cannot_be_appended_to_by_cells(tmp_path: Path) -> None:
    url = Store.create(str(tmp_path / "imported"), LAYOUT).url
    version = begin(url, {"import": 1})
    rows: dict[str, Any] = {name: [f"{name}-0"] for name in ("cell", "pair", "unit", "split")}
    version.write_plan(pa.table({}), pa.table({}), [pa.table({"row": [0], "shard": [0], **rows})])
    build_planned_shard(version, 0, failing_import)
    version.seal()
    with pytest.raises(StoreError, match="version 1 was not planned on the grid of cells"):
        appended(url, grid(range(2), range(2)), number=2)
    with pytest.raises(StoreError, match="version 1 was not planned on the grid of cells"):
        plan_retry(begin(url, {"number": 2}, number=2))


def failing_import(rows: Any, items: Any) -> Any:
    named = [{name: row[name] for name in ("row", "cell", "pair", "unit", "split")} for row in rows]
    return {}, [{**row, "status": "failed", "error": "no such file"} for row in named]


def items_of_manifest(version: Version) -> set[str]:
    rows = version.manifest().to_pylist()
    return {name for row in rows for name in (*row["optical_items"], *row["radar_items"])}
