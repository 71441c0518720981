"""The grid: cells, owners, covers, blocks."""

from __future__ import annotations

import numpy as np
import pytest
import shapely
from hypothesis import given
from hypothesis import strategies as st
from pyproj import Transformer

from pipeline.grid import Cell, block_key, cell_at, cells_covering, is_owned, transform_of, utm_epsg, utm_zone

SIDE_M = 2640

longitudes = st.floats(-179.99, 179.99)
latitudes = st.floats(-79.0, 83.0)


@given(longitudes, latitudes)
def test_a_cell_holds_the_point_it_was_made_from(lon: float, lat: float) -> None:
    cell = cell_at(lon, lat, side_m=SIDE_M)
    x, y = Transformer.from_crs(4326, cell.epsg, always_xy=True).transform(lon, lat)
    left, bottom, right, top = cell.bounds
    assert left <= x < right
    assert bottom <= y < top


@given(longitudes, latitudes)
def test_a_cell_is_known_by_its_id(lon: float, lat: float) -> None:
    cell = cell_at(lon, lat, side_m=SIDE_M)
    assert Cell.from_id(cell.id, side_m=SIDE_M) == cell


@given(longitudes, latitudes)
def test_cell_edges_lie_on_sentinel_2_pixel_edges(lon: float, lat: float) -> None:
    # Tile origins are multiples of 60 m from easting 0 and the equator, in both hemispheres.
    cell = cell_at(lon, lat, side_m=SIDE_M)
    equator = 0 if cell.epsg < 32700 else 10_000_000
    left, _, _, top = cell.bounds
    assert left % 60 == 0
    assert (top - equator) % 60 == 0


@pytest.mark.parametrize(
    ("lon", "lat", "zone"),
    [
        (2.0, 48.0, 31),
        (5.0, 60.0, 32),
        (2.9, 60.0, 31),
        (10.0, 78.0, 33),
        (8.0, 78.0, 31),
        (41.9, 78.0, 37),
        (-180.0, 0, 1),
        (180.0, 0, 1),
    ],
)
def test_zones_follow_mgrs_with_norway_and_svalbard(lon: float, lat: float, zone: int) -> None:
    assert utm_zone(lon, lat) == zone


@given(st.floats(-179.0, 178.0), st.floats(-70.0, 70.0), st.floats(0.02, 0.2), st.floats(0.02, 0.15))
def test_every_point_of_a_region_far_from_zone_borders_lies_in_one_cell_of_its_cover(
    west: float, south: float, width: float, height: float
) -> None:
    region = shapely.box(west, south, west + width, south + height)
    cells = cells_covering(region, side_m=SIDE_M, owners_only=False)
    points = np.random.default_rng(0).uniform((west, south), (west + width, south + height), (20, 2))
    for lon, lat in points:
        # Without regard to owners, the cover holds every point in its own zone.
        assert cell_at(lon, lat, side_m=SIDE_M) in cells


def test_a_cover_takes_each_place_once_at_a_zone_border() -> None:
    region = shapely.box(11.9, 48.0, 12.1, 48.1)
    owned = cells_covering(region, side_m=SIDE_M)
    touching = cells_covering(region, side_m=SIDE_M, owners_only=False)
    assert {c.epsg for c in owned} == {32632, 32633}
    assert set(owned) < set(touching)
    assert all(is_owned(c) for c in owned)
    assert all(utm_epsg(*c.centre_lonlat) == c.epsg for c in owned)


def test_a_cover_across_the_equator_has_cells_of_both_hemispheres() -> None:
    cells = cells_covering(shapely.box(15.0, -0.05, 15.05, 0.05), side_m=SIDE_M)
    assert {c.epsg for c in cells} == {32633, 32733}
    assert all(c.row >= 0 for c in cells if c.epsg == 32633)
    assert all(c.row < 0 for c in cells if c.epsg == 32733)


def test_a_cover_across_the_antimeridian_has_cells_of_both_zones() -> None:
    region = shapely.MultiPolygon([shapely.box(179.95, -17.0, 180, -16.95), shapely.box(-180, -17.0, -179.95, -16.95)])
    assert {c.epsg for c in cells_covering(region, side_m=SIDE_M)} == {32760, 32701}


@given(longitudes, latitudes, st.integers(1, 16))
def test_a_block_is_a_square_of_cells(lon: float, lat: float, cells_per_side: int) -> None:
    cell = cell_at(lon, lat, side_m=SIDE_M)
    epsg, column, row = block_key(cell, cells_per_side=cells_per_side)
    assert epsg == cell.epsg
    assert 0 <= cell.column - column * cells_per_side < cells_per_side
    assert 0 <= cell.row - row * cells_per_side < cells_per_side


def test_a_raster_over_a_cell_starts_at_its_north_west_corner() -> None:
    cell = Cell(epsg=32633, column=108, row=2013, side_m=SIDE_M)
    assert transform_of(cell.bounds, 10) @ (0, 0) == (108 * SIDE_M, 2014 * SIDE_M)
    assert transform_of(cell.bounds, 10) @ (264, 264) == (109 * SIDE_M, 2013 * SIDE_M)


@pytest.mark.parametrize(("field", "value"), [("epsg", 4326), ("side_m", 2645), ("side_m", 0)])
def test_a_cell_off_the_grid_is_refused_with_its_value(field: str, value: int) -> None:
    values = {"epsg": 32633, "column": 0, "row": 0, "side_m": SIDE_M, field: value}
    with pytest.raises(ValueError, match=str(value)):
        Cell(**values)
