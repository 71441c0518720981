"""The plan: rows, shards, units."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.grid import Cell
from pipeline.manifest import items_from_table, items_table, plan_rows
from pipeline.pairing import Pair
from pipeline.splits import SplitRules
from pipeline.types import Acquisition, Item, Sensor

SPLITS = SplitRules(block_cells=4, val_fraction=0.2, test_fraction=0.2, buffer_cells=0, seed=3)


def pair(column: int, row: int, day: int) -> Pair:
    cell = Cell(epsg=32733, column=column, row=row, side_m=2640)

    def look(sensor: Sensor, hours: int) -> Acquisition:
        item = Item(
            id=f"{sensor}-{day}",
            collection="c",
            sensor=sensor,
            epsg=32733,
            platform="p",
            relative_orbit=day,
            datetime=datetime(2023, 1, 1, tzinfo=UTC) + timedelta(days=day, hours=hours),
            footprint=cell.footprint.envelope,
            assets={"B02": "https://a/b02.tif"},
            orbit_state="descending",
            absolute_orbit=None if day == 0 else 41_000 + day,
            datatake=f"202301{day + 1:02d}T000000" if sensor == "optical" else "",
            baseline="04.00",
            offset_dn=1000,
        )
        return Acquisition(sensor=sensor, items=(item,))

    optical, radar = look("optical", 0), look("radar", 5)
    return Pair(cell=cell, optical=optical, radar=radar, id=f"{optical.id}+{radar.id}", overlap=1.0)


candidates = st.lists(
    st.builds(pair, st.integers(100, 110), st.integers(-5, 5), st.integers(0, 3)),
    min_size=1,
    max_size=60,
    unique_by=lambda p: (p.cell, p.id),
)


@given(candidates, st.sampled_from([4, 5, 16]), st.integers(0, 3))
def test_every_pair_has_one_row_and_no_unit_straddles_shards(
    pairs: list[Pair], shard_chips: int, shards_before: int
) -> None:
    first = shards_before * shard_chips
    table = plan_rows(pairs, block_cells=2, shard_chips=shard_chips, first_row=first, splits=SPLITS)
    rows = table.to_pylist()
    assert sorted((r["cell"], r["pair"]) for r in rows) == sorted((p.cell.id, p.id) for p in pairs)
    assert len({r["row"] for r in rows}) == len(rows)
    assert [r["row"] for r in rows] == sorted(r["row"] for r in rows)
    assert all(r["row"] >= first and r["shard"] == r["row"] // shard_chips for r in rows)
    shards_of: dict[str, set[int]] = {}
    for r in rows:
        shards_of.setdefault(r["unit"], set()).add(r["shard"])
    assert all(len(shards) == 1 for shards in shards_of.values())


@given(candidates)
def test_the_plan_does_not_depend_on_the_order_of_pairs(pairs: list[Pair]) -> None:
    def plan(order: list[Pair]) -> str:
        table = plan_rows(order, block_cells=2, shard_chips=8, first_row=0, splits=SPLITS)
        return hashlib.sha256(str(table.to_pylist()).encode()).hexdigest()

    assert plan(pairs) == plan(pairs[::-1])


def test_a_block_larger_than_a_shard_is_refused() -> None:
    with pytest.raises(ValueError, match="block_cells=8: 64 chips do not fit a shard of 32"):
        plan_rows([pair(1, 1, 0)], block_cells=8, shard_chips=32, first_row=0, splits=SPLITS)


def test_items_survive_the_table() -> None:
    pairs = [pair(100, 2, 0), pair(101, 2, 0), pair(100, 2, 1)]
    restored = items_from_table(items_table(pairs))
    assert restored == {item.id: item for p in pairs for look in (p.optical, p.radar) for item in look.items} | {
        # The same item lies in several pairs; the table has it once.
        name: restored[name]
        for name in ("optical-0", "radar-0")
    }
