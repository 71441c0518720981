"""Splits: leak-safe by construction, stable, close to the fractions asked for."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import shapely
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pyproj import Transformer

from pipeline.grid import Cell, cell_at, cells_covering, is_owned
from pipeline.splits import SPLITS, SplitRules, split_of, splits_of


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


BORDERS = {
    "nowhere near": (15.3, 47.0),
    "zone": (12.0, 48.0),
    "equator": (33.5, 0.0),
    "zone and equator": (36.0, 0.0),
    "antimeridian": (180.0, -17.0),
    "norway": (3.0, 60.0),
    "norway's corner": (3.0, 64.0),
    "svalbard": (21.0, 79.0),
    "svalbard's edge": (15.0, 72.0),
    "far north": (-42.0, 83.0),
    "far south": (-66.0, -78.0),
}


def square_around(place: tuple[float, float], reach: int, side_m: int = 2640) -> list[Cell]:
    middle = cell_at((place[0] + 180) % 360 - 180, place[1], side_m=side_m)
    steps = range(-reach, reach + 1)
    return [
        Cell(epsg=middle.epsg, column=middle.column + c, row=middle.row + r, side_m=side_m)
        for r in steps
        for c in steps
    ]


@given(
    st.sampled_from(sorted(BORDERS)),
    st.tuples(st.floats(-0.15, 0.15), st.floats(-0.08, 0.08)),
    st.integers(1, 6),
    st.integers(0, 2),
    st.integers(0, 1000),
    st.sampled_from([480, 2640]),
)
def test_many_cells_are_split_as_each_is(
    border: str, moved: tuple[float, float], block_cells: int, buffer_cells: int, seed: int, side_m: int
) -> None:
    lon, lat = BORDERS[border]
    cells = square_around((lon + moved[0], lat + moved[1]), 2, side_m)
    # Another zone and hemisphere, and cells twice.
    cells += [*square_around((lon + 7, -lat), 1, side_m), *cells[:3]]
    chosen = rules(block_cells=block_cells, buffer_cells=buffer_cells, seed=seed)
    epsg, columns, rows = np.array([(c.epsg, c.column, c.row) for c in cells], np.int32).T
    codes = splits_of(epsg, columns, rows, side_m=side_m, rules=chosen)
    assert [SPLITS[code] for code in codes] == [split_of(cell, chosen) for cell in cells]


def test_no_cells_have_no_splits() -> None:
    nothing = np.empty(0, np.int32)
    assert splits_of(nothing, nothing, nothing, side_m=2640, rules=rules()).tolist() == []


@given(
    st.sampled_from(sorted(BORDERS)),
    st.tuples(st.floats(-0.1, 0.1), st.floats(-0.05, 0.05)),
    st.integers(0, 2),
    st.integers(0, 1000),
)
@settings(max_examples=40)
def test_the_buffer_is_kept_in_metres_also_between_zones(
    border: str, moved: tuple[float, float], buffer_cells: int, seed: int
) -> None:
    lon, lat = BORDERS[border][0] + moved[0], BORDERS[border][1] + moved[1]
    chosen = rules(block_cells=2, buffer_cells=buffer_cells, seed=seed)
    cell = cell_at((lon + 180) % 360 - 180, lat, side_m=2640)
    if not is_owned(cell) or split_of(cell, chosen) != "train":
        return
    reach_deg = 0.2 / np.cos(np.radians(lat))
    west = (lon - reach_deg + 180) % 360 - 180
    east = (lon + reach_deg + 180) % 360 - 180
    boxes = [(west, east)] if west < east else [(west, 180), (-180, east)]
    region = shapely.union_all([shapely.box(a, lat - 0.12, b, min(lat + 0.12, 84)) for a, b in boxes])
    forward = Transformer.from_crs(4326, cell.epsg, always_xy=True)
    for other in cells_covering(region, side_m=2640):
        if split_of(other, chosen) in ("val", "test"):
            corners = np.column_stack(forward.transform(*shapely.get_coordinates(other.footprint).T))
            gap = shapely.Polygon(corners).distance(shapely.box(*cell.bounds))
            # Zones' planes differ in scale by up to a thousandth.
            assert gap >= 0.998 * buffer_cells * 2640 - 2


def test_millions_of_chips_are_split_as_each_is() -> None:
    random = np.random.default_rng(0)
    chips = 2_000_000
    epsg = random.choice([32632, 32633, 32733], chips).astype(np.int32)
    columns = random.integers(120, 250, chips, dtype=np.int32)
    rows = np.where(epsg < 32700, 1, -1) * random.integers(0, 1900, chips, dtype=np.int32)
    codes = splits_of(epsg, columns, rows, side_m=2640, rules=rules(block_cells=16))
    shares = np.bincount(codes, minlength=4) / chips
    assert shares[1:3] == pytest.approx(0.2, abs=0.02)
    some = random.integers(0, chips, 200)
    for place in some:
        cell = Cell(epsg=int(epsg[place]), column=int(columns[place]), row=int(rows[place]), side_m=2640)
        assert split_of(cell, rules(block_cells=16)) == SPLITS[codes[place]]
