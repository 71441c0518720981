"""The grid: cells, owners, covers, blocks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import shapely
from hypothesis import given
from hypothesis import strategies as st
from pyproj import Transformer

from pipeline.grid import (
    Cell,
    block_key,
    cell_at,
    cells_at,
    cells_covering,
    cells_near,
    in_plane,
    is_owned,
    owned,
    surely_owned,
    transform_of,
    utm_epsg,
    utm_epsgs,
    utm_zone,
)

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


@given(st.lists(st.tuples(longitudes, latitudes), min_size=1, max_size=20))
def test_many_points_have_the_zones_and_cells_of_each(points: list[tuple[float, float]]) -> None:
    exceptions = [(lon, lat) for lon in (0, 3, 6, 9, 12, 21, 33, 42, -180, 180) for lat in (0, 56, 64, 72, 83.9)]
    lon, lat = np.array([*points, *exceptions], np.float64).T
    assert utm_epsgs(lon, lat).tolist() == [utm_epsg(x, y) for x, y in zip(lon, lat, strict=True)]
    cells = [
        Cell(epsg=e, column=c, row=r, side_m=SIDE_M)
        for e, c, r in np.stack(cells_at(lon, lat, side_m=SIDE_M), 1).tolist()
    ]
    assert cells == [cell_at(x, y, side_m=SIDE_M) for x, y in zip(lon, lat, strict=True)]


@given(longitudes, latitudes, st.sampled_from([480, 2640, 5100]))
def test_many_cells_have_the_owners_of_each(lon: float, lat: float, side_m: int) -> None:
    # Around the point, and around the eastern border of its zone at that latitude.
    zone = utm_zone(lon, lat)
    places = [(lon, lat), (6 * zone - 180 - 1e-6, lat)]
    for middle in (cell_at(x, y, side_m=side_m) for x, y in places):
        columns, rows = (
            a.ravel() for a in np.meshgrid(middle.column + np.arange(-3, 4), middle.row + np.arange(-2, 3))
        )
        expected = [
            is_owned(Cell(epsg=middle.epsg, column=c, row=r, side_m=side_m))
            for c, r in zip(columns.tolist(), rows.tolist(), strict=True)
        ]
        assert owned(middle.epsg, columns, rows, side_m=side_m).tolist() == expected
        sure = surely_owned(middle.epsg, columns, rows, side_m=side_m)
        assert not (sure & ~np.array(expected)).any()


@pytest.mark.parametrize(
    ("lon", "lat"), [(12.0, 48.0), (30.0, 0.0), (180.0, -17.0), (3.0, 60.0), (21.0, 78.5), (-42, 83)]
)
def test_a_cover_is_that_of_trying_every_cell(lon: float, lat: float) -> None:
    outline = shapely.Point(0, 0).buffer(0.06, quad_segs=2)
    shape = shapely.transform(outline, lambda c: c * (1 / np.cos(np.radians(lat)), 1) + (lon, lat))
    east = shapely.transform(shape.intersection(shapely.box(180, -90, 540, 90)), lambda c: c - (360, 0))
    region = shapely.union_all([shape.intersection(shapely.box(-180, -90, 180, 90)), east])
    expected = set()
    for epsg in {utm_epsg(x, y) for x in (lon - 0.2, lon + 0.2) for y in (lat - 0.1, lat + 0.1)} | {32732, 32637}:
        forward = Transformer.from_crs(4326, epsg, always_xy=True)
        # Followed closely, because what is straight in degrees is not straight in the plane.
        plane = shapely.transform(shapely.segmentize(region, 0.002), lambda c: np.column_stack(forward.transform(*c.T)))  # noqa: B023
        middle = forward.transform(lon, lat)
        first, origin = int(middle[0] // SIDE_M), 0 if epsg < 32700 else 10_000_000
        for column in range(first - 12, first + 13):
            for row in range(int((middle[1] - origin) // SIDE_M) - 12, int((middle[1] - origin) // SIDE_M) + 13):
                cell = Cell(epsg=epsg, column=column, row=row, side_m=SIDE_M)
                if is_owned(cell) and plane.intersection(shapely.box(*cell.bounds)).area > 1000:
                    expected.add(cell)
    found = set(cells_covering(region, side_m=SIDE_M))
    assert expected <= found
    # What is covered by less than 1000 m² may be in or out here.
    assert len(found - expected) <= 3
    assert all(is_owned(cell) for cell in found)


def test_a_wide_cover_takes_every_zone_for_its_own_part() -> None:
    cells = cells_covering(shapely.box(0.0, 40.0, 24.0, 40.05), side_m=SIDE_M, owners_only=False)
    assert {cell.epsg for cell in cells} == {32631, 32632, 32633, 32634}
    for cell in cells:
        west = 6 * (cell.epsg % 100) - 186
        assert west - 0.2 < cell.centre_lonlat[0] < west + 6.2


@given(longitudes, latitudes, st.integers(0, 2))
def test_cells_near_one_are_owned_and_hold_those_around_it(lon: float, lat: float, reach: int) -> None:
    cell = cell_at(lon, lat, side_m=SIDE_M)
    near = cells_near(cell, reach=reach)
    assert len(near) == len(set(near))
    assert all(is_owned(other) for other in near)
    left, bottom, right, top = cell.bounds
    grow = reach * SIDE_M - 5
    backward = Transformer.from_crs(cell.epsg, 4326, always_xy=True)
    for x in np.linspace(left - grow, right + grow, 4):
        for y in np.linspace(bottom - grow, top + grow, 4):
            other = cell_at(*backward.transform(x, y), side_m=SIDE_M)
            assert other in near or not is_owned(other)


def test_footprints_of_real_items_are_straight_in_the_plane(shared_data: Path) -> None:
    recorded = sorted((shared_data / "stac" / "earth-search").glob("item*.json"))
    whole = 0
    for path in recorded:
        content = json.loads(path.read_text())
        for feature in content.get("features", [content]):
            asset = next((a for a in feature["assets"].values() if "proj:transform" in a), None)
            code = str(feature["properties"].get("proj:code") or feature["properties"].get("proj:epsg"))
            if asset is None:
                continue
            step, _, left, _, _, top = asset["proj:transform"][:6]
            rows, columns = asset["proj:shape"]
            raster = shapely.box(left, top - rows * step, left + columns * step, top)
            footprint = shapely.geometry.shape(feature["geometry"])
            (plane,) = in_plane([footprint], int(code.removeprefix("EPSG:")))
            if plane.area > 0.99 * raster.area:
                whole += 1
                (bent,) = in_plane([shapely.segmentize(footprint, 0.01)], int(code.removeprefix("EPSG:")))
                assert plane.symmetric_difference(raster).area < 2e-4 * raster.area
                assert bent.symmetric_difference(raster).area > 1e-3 * raster.area
    assert whole >= 3


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
