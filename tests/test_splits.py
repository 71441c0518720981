"""Splits: leak-safe by construction, stable, close to the fractions asked for."""

from __future__ import annotations

from collections import Counter

import shapely
from hypothesis import example, given
from hypothesis import strategies as st

from pipeline.grid import Cell, cell_at, cells_covering, is_owned
from pipeline.splits import SplitRules, split_of


def rules(**more: int | float) -> SplitRules:
    values = {"block_cells": 4, "val_fraction": 0.2, "test_fraction": 0.2, "buffer_cells": 1, "seed": 0, **more}
    return SplitRules(**values)  # type: ignore[arg-type]


@given(st.integers(100, 300), st.integers(-1000, 2000), st.integers(0, 2), st.integers(0, 5))
@example(253, 0, 1, 1)
def test_no_training_cell_is_within_the_buffer_of_a_held_out_one(column: int, row: int, buffer: int, seed: int) -> None:
    chosen = rules(buffer_cells=buffer, seed=seed)
    square = [
        Cell(epsg=32633, column=column + c, row=row + r, side_m=2640)
        for r in range(-buffer, buffer + 1)
        for c in range(-buffer, buffer + 1)
    ]
    middle = square[len(square) // 2]
    if is_owned(middle) and split_of(middle, chosen) == "train":
        # Across the equator and zone borders, another zone's cells are sampled instead.
        assert {split_of(cell, chosen) for cell in square if is_owned(cell)} <= {"train", "buffer"}


def test_cells_of_one_block_are_held_out_together() -> None:
    chosen = rules()
    for column in range(100, 140, 4):
        splits = {
            split_of(Cell(epsg=32633, column=column + c, row=2000 + r, side_m=2640), chosen)
            for r in range(4)
            for c in range(4)
        }
        assert splits in ({"val"}, {"test"}) or splits <= {"train", "buffer"}


def test_blocks_are_shared_out_by_the_fractions() -> None:
    chosen = rules(block_cells=1, buffer_cells=0)
    counts = Counter(
        split_of(Cell(epsg=32633, column=c, row=r, side_m=2640), chosen) for c in range(60) for r in range(60)
    )
    assert abs(counts["test"] / 3600 - 0.2) < 0.03
    assert abs(counts["val"] / 3600 - 0.2) < 0.03


def test_the_buffer_reaches_over_a_zone_border() -> None:
    cells = cells_covering(shapely.box(11.8, 47.8, 12.2, 48.2), side_m=2640)
    chosen = rules(block_cells=2, buffer_cells=1)
    border = [c for c in cells if c.epsg == 32632 and abs(c.centre_lonlat[0] - 12) < 0.03]
    assert border
    for cell in border:
        east = Cell(epsg=cell.epsg, column=cell.column + 1, row=cell.row, side_m=2640)
        owner = cell_at(*east.centre_lonlat, side_m=2640)
        if split_of(owner, chosen) in ("val", "test"):
            assert split_of(cell, chosen) != "train"


def test_another_seed_holds_out_other_blocks() -> None:
    cells = [Cell(epsg=32633, column=c, row=2000, side_m=2640) for c in range(0, 400, 4)]
    assert [split_of(c, rules(seed=0)) for c in cells] != [split_of(c, rules(seed=1)) for c in cells]
