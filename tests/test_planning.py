"""Rows for candidates by whole arrays, against one candidate after another."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import planning
from pipeline.grid import Cell
from pipeline.manifest import LOOKS_SCHEMA, ROWS_SCHEMA, joined
from pipeline.planning import Planner, pack
from pipeline.splits import SPLITS

BITS = 64
MASK = 2**BITS - 1


@dataclass(frozen=True)
class Candidate:
    """A cell and what it was seen by."""

    epsg: int
    column: int
    cell_row: int
    pair: str
    items: tuple[str, ...]
    overlap: float = 1.0

    @property
    def key(self) -> tuple[int, int, int, str]:
        return self.epsg, self.column, self.cell_row, self.pair


def planner(block_cells: int = 2, shard_chips: int = 8, first_row: int = 0, seed: int = 0) -> Planner:
    def by_column(epsg: Any, column: Any, cell_row: Any) -> Any:
        return (column % 3).astype(np.uint8)

    return Planner(
        block_cells=block_cells, shard_chips=shard_chips, first_row=first_row, seed=seed, splits_of=by_column
    )


def give(to: Planner, candidates: Sequence[Candidate]) -> None:
    looks = list(dict.fromkeys((c.pair, c.items) for c in candidates))
    moment = datetime(2023, 5, 1, tzinfo=UTC)
    table = pa.table(
        {
            "pair": [pair for pair, _ in looks],
            "optical_items": [list(items) for _, items in looks],
            "radar_items": [["radar"]] * len(looks),
            "optical_datetime": [moment] * len(looks),
            "radar_datetime": [moment] * len(looks),
            "dt_s": [0] * len(looks),
            "orbit_state": ["ascending"] * len(looks),
            "relative_orbit": [1] * len(looks),
            "baseline": ["05.09"] * len(looks),
            "offset_dn": [1000] * len(looks),
        },
        schema=pa.schema([LOOKS_SCHEMA.field(name) for name in LOOKS_SCHEMA.names[1:]]),
    )
    to.add(
        *(np.array([getattr(c, name) for c in candidates], np.int32) for name in ("epsg", "column", "cell_row")),
        np.array([looks.index((c.pair, c.items)) for c in candidates], np.int32),
        np.array([c.overlap for c in candidates], np.float32),
        looks=table,
    )


def manifest(of: Planner) -> pa.Table:
    rows = pa.concat_tables(of.parts())
    assert rows.schema.equals(ROWS_SCHEMA)
    return joined(rows, of.looks(), block_cells=of.block_cells)


def scattered(number: int) -> int:
    """SplitMix64's finaliser, in Python's own integers."""
    number ^= number >> 30
    number = number * 0xBF58476D1CE4E5B9 & MASK
    number ^= number >> 27
    number = number * 0x94D049BB133111EB & MASK
    return number ^ number >> 31


def text_hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


def one_after_another(
    candidates: Sequence[Candidate], *, block_cells: int, shard_chips: int, first_row: int, seed: int
) -> list[tuple[int, Candidate]]:
    """(row, candidate) by the plain rule: units in the order of a hash, the next shard where one does not fit."""
    units: dict[tuple[int, tuple[int, int, int], str], list[Candidate]] = defaultdict(list)
    for c in candidates:
        block = (c.epsg, c.column // block_cells, c.cell_row // block_cells)
        code = (block[0] - 32600) << 48 | (block[1] + 2**23) << 24 | (block[2] + 2**23)
        order = scattered(scattered(code ^ text_hash(f"seed {seed}")) ^ text_hash(c.pair))
        units[order >> 16, block, c.pair].append(c)
    placed, row = [], first_row
    for unit in sorted(units):
        if row % shard_chips + len(units[unit]) > shard_chips:
            row = (row // shard_chips + 1) * shard_chips
        for c in sorted(units[unit], key=lambda c: (-c.cell_row, c.column)):
            placed.append((row, c))
            row += 1
    return placed


candidates_lists = st.lists(
    st.builds(
        Candidate,
        st.sampled_from([32601, 32660, 32733]),
        st.integers(-3, 4),
        st.integers(-4, 3),
        st.sampled_from(["a+x", "b+x", "c+y"]),
        st.sampled_from([("one",), ("one", "two")]),
    ),
    min_size=1,
    max_size=60,
    unique_by=lambda c: c.key,
)


@given(candidates_lists, st.sampled_from([4, 5, 9, 64]), st.integers(0, 3), st.integers(0, 5))
def test_rows_are_those_of_one_candidate_after_another(
    candidates: list[Candidate], shard_chips: int, shards_before: int, seed: int
) -> None:
    how = {"block_cells": 2, "shard_chips": shard_chips, "first_row": shards_before * shard_chips, "seed": seed}
    planned = planner(**how)
    give(planned, candidates)
    expected = one_after_another(candidates, **how)
    rows = manifest(planned).to_pylist()
    assert [row["row"] for row in rows] == [row for row, _ in expected]
    for found, (_, c) in zip(rows, expected, strict=True):
        cell = Cell(epsg=c.epsg, column=c.column, row=c.cell_row, side_m=2640)
        assert (found["cell"], found["pair"], found["optical_items"]) == (cell.id, c.pair, list(c.items))
        assert found["unit"] == f"{c.epsg}_{c.column // 2}_{c.cell_row // 2}/{c.pair}"
        assert found["split"] == SPLITS[c.column % 3]
        assert found["shard"] == found["row"] // shard_chips
    assert planned.num_rows == len(candidates)


@given(candidates_lists, st.randoms(use_true_random=False), st.integers(1, 5))
def test_the_plan_does_not_depend_on_order_or_areas(candidates: list[Candidate], random: Any, num_areas: int) -> None:
    whole = planner()
    give(whole, candidates)
    shuffled = list(candidates)
    random.shuffle(shuffled)
    in_areas = planner()
    for area in range(num_areas):
        if shuffled[area::num_areas]:
            give(in_areas, shuffled[area::num_areas])
    assert in_areas.looks().equals(whole.looks())
    assert pa.concat_tables(in_areas.parts()).equals(pa.concat_tables(whole.parts()))
    # And again from the same planner.
    assert pa.concat_tables(whole.parts()).equals(pa.concat_tables(in_areas.parts()))


@given(candidates_lists)
def test_units_of_one_hash_stay_whole(candidates: list[Candidate]) -> None:
    def weak(numbers: Any) -> Any:
        return (numbers & np.uint64(1)) << np.uint64(40)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "mix", weak)
        planned = planner()
        give(planned, candidates)
        rows = manifest(planned).to_pylist()
        other = planner()
        give(other, candidates[::-1])
        assert manifest(other).to_pylist() == rows
    assert sorted((r["cell"], r["pair"]) for r in rows) == sorted(
        (Cell(epsg=c.epsg, column=c.column, row=c.cell_row, side_m=60).id, c.pair) for c in candidates
    )
    units = [r["unit"] for r in rows]
    starts = [unit for before, unit in zip([None, *units], units, strict=False) if unit != before]
    assert len(starts) == len(set(units)), "a unit is in two pieces"
    shards = {unit: {r["shard"] for r in rows if r["unit"] == unit} for unit in units}
    assert all(len(of_unit) == 1 for of_unit in shards.values())


@given(candidates_lists, st.sets(st.integers(0, 59)))
def test_what_an_earlier_version_has_is_left_out_and_said(candidates: list[Candidate], known: set[int]) -> None:
    old = [c for place, c in enumerate(candidates) if place in known]
    new = [c for place, c in enumerate(candidates) if place not in known]
    planned = planner()
    pairs = sorted({c.pair for c in candidates})

    def leave_out() -> None:
        # One more that is no candidate now, and what two earlier versions have twice.
        gone = [Candidate(32601, 100, 100, pairs[0], ()), *old, *old[:2]]
        planned.leave_out(
            *(np.array([getattr(c, name) for c in gone], np.int32) for name in ("epsg", "column", "cell_row")),
            np.array([pairs.index(c.pair) for c in gone]),
            pairs=pairs,
        )

    if len(old) % 2:
        leave_out()
    give(planned, candidates)
    if not len(old) % 2:
        leave_out()
    if not new:
        assert list(planned.parts()) == []
    else:
        alone = planner()
        give(alone, new)
        assert manifest(planned).to_pylist() == manifest(alone).to_pylist()
    left_out = [row for table in planned.left_out() for row in table.to_pylist()]
    assert sorted((row["cell"], row["detail"]) for row in left_out) == sorted(
        (Cell(epsg=c.epsg, column=c.column, row=c.cell_row, side_m=60).id, c.pair) for c in old
    )
    assert all(row["reason"] == "in_earlier_version" for row in left_out)
    assert all(row["optical"] == row["detail"][0] for row in left_out)


def test_many_rows_cross_the_borders_of_buckets_as_if_there_were_none(monkeypatch: pytest.MonkeyPatch) -> None:
    candidates = [
        Candidate(32633, column, row, f"p{pair}+r", ("one",))
        for column in range(30)
        for row in range(20)
        for pair in range(4)
        if (column * 7 + row * 3 + pair) % 5
    ]
    monkeypatch.setattr(planning, "_FLUSH_ROWS", 100)
    planned = planner(block_cells=3, shard_chips=16)
    for start in range(0, len(candidates), 77):
        give(planned, candidates[start : start + 77])
    expected = one_after_another(candidates, block_cells=3, shard_chips=16, first_row=0, seed=0)
    rows = manifest(planned)
    assert rows["row"].to_pylist() == [row for row, _ in expected]
    assert rows["column"].to_pylist() == [c.column for _, c in expected]
    assert rows["pair"].to_pylist() == [c.pair for _, c in expected]


def test_another_seed_is_another_order() -> None:
    candidates = [Candidate(32633, column, 0, "a+x", ()) for column in range(0, 60, 2)]
    orders = []
    for seed in (0, 1):
        planned = planner(seed=seed)
        give(planned, candidates)
        orders.append(manifest(planned)["column"].to_pylist())
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])


@pytest.mark.parametrize("items", [(), ("another",)])
def test_a_cell_that_comes_twice_with_a_pair_is_refused(items: tuple[str, ...]) -> None:
    planned = planner()
    give(planned, [Candidate(32633, 7, -2, "a+x", ()), Candidate(32633, 8, -2, "a+x", ())])
    give(planned, [Candidate(32633, 7, -2, "a+x", items)])
    with pytest.raises(ValueError, match=r"cell 33N_0007_-002 was given twice with pair a\+x"):
        list(planned.parts())


def test_what_cannot_be_planned_is_refused() -> None:
    with pytest.raises(ValueError, match="block_cells=8: 64 chips do not fit a shard of 32"):
        planner(block_cells=8, shard_chips=32)
    with pytest.raises(ValueError, match="block_cells=300: at most 256"):
        planner(block_cells=300, shard_chips=100_000)
    for column, epsg in ((2**23, 32601), (0, 32600), (0, 4326), (-(2**23) - 1, 32601)):
        with pytest.raises(ValueError, match="no cell of a UTM zone"):
            give(planner(), [Candidate(epsg, column, 0, "a+x", ())])
    with pytest.raises(ValueError, match="no candidates were given"):
        planner().looks()


def next_fit(sizes: Sequence[int], capacity: int, row: int) -> Iterator[int]:
    for size in sizes:
        if row % capacity + size > capacity:
            row = (row // capacity + 1) * capacity
        yield row
        row += size


@given(st.lists(st.integers(1, 8), min_size=1), st.integers(8, 20), st.integers(0, 60))
@settings(max_examples=300)
def test_units_are_packed_as_if_one_after_another(sizes: list[int], capacity: int, next_row: int) -> None:
    first_rows, end_row = pack(np.array(sizes), capacity=capacity, next_row=next_row)
    expected = list(next_fit(sizes, capacity, next_row))
    assert first_rows.tolist() == expected
    assert end_row == expected[-1] + sizes[-1]
