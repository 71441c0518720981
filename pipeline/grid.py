"""The fixed grid: square cells per UTM zone, anchored so that Sentinel pixels are copied, never resampled.

Cell edges lie at multiples of the cell side from easting 0 and from the equator (northing 0 in the north,
10 000 000 m in the south). Sentinel-2 tile origins are multiples of 60 m from that anchor in both hemispheres,
so a side that is a multiple of 60 m falls on the edges of 10, 20 and 60 m pixels alike.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Final

import numpy as np
import shapely
from affine import Affine
from numpy.typing import NDArray
from pyproj import Transformer
from shapely.geometry import box
from shapely.geometry.base import BaseGeometry

PIXEL_M = 10
"""Side of the finest pixel of both sensors, in metres."""

SOUTH_FALSE_NORTHING_M = 10_000_000
"""Northing of the equator in southern UTM zones."""

Integers = NDArray[np.integer[Any]]
Floats = NDArray[np.float64]

_DEGREE_M = 111_275.0
"""Length of a degree of the equator on a zone's middle meridian."""

_EXCEPTIONS: Final = {
    31: [(0, 0, 6, 56), (0, 56, 3, 64), (0, 64, 6, 72), (0, 72, 9, 84)],
    32: [(6, 0, 12, 56), (3, 56, 12, 64), (6, 64, 12, 72)],
    33: [(12, 0, 18, 72), (9, 72, 21, 84)],
    34: [(18, 0, 24, 72)],
    35: [(24, 0, 30, 72), (21, 72, 33, 84)],
    36: [(30, 0, 36, 72)],
    37: [(36, 0, 42, 72), (33, 72, 42, 84)],
}
"""Northern zone -> (west, south, east, north) of what it owns, around Norway and Svalbard."""

_CELL_ID = re.compile(r"(\d{2})([NS])_(-?\d+)_(-?\d+)")


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Cell:
    """One square of the fixed UTM grid; a chip covers exactly one cell."""

    epsg: int
    """UTM zone, 32601-32660 north or 32701-32760 south."""

    column: int
    """Steps of one side east of easting 0."""

    row: int
    """Steps of one side north of the equator (negative in the south)."""

    side_m: int
    """Side in metres, a multiple of 60."""

    def __post_init__(self) -> None:
        if not (32601 <= self.epsg <= 32660 or 32701 <= self.epsg <= 32760):
            raise ValueError(f"epsg must be a UTM zone, got {self.epsg}")
        if self.side_m <= 0 or self.side_m % 60:
            raise ValueError(f"side_m must be a positive multiple of 60 m, got {self.side_m}")

    @property
    def id(self) -> str:
        """Zone, hemisphere, column and row, as in ``33N_0108_2013``; the side is the store's."""
        return f"{self.epsg % 100:02d}{'N' if self.epsg < 32700 else 'S'}_{self.column:04d}_{self.row:04d}"

    @classmethod
    def from_id(cls, cell_id: str, *, side_m: int) -> Cell:
        """The cell of an id made by `id`."""
        match = _CELL_ID.fullmatch(cell_id)
        if not match:
            raise ValueError(f"cell id must look like 33N_0108_2013, got {cell_id!r}")
        zone, hemisphere, column, row = match.groups()
        epsg = (32600 if hemisphere == "N" else 32700) + int(zone)
        return cls(epsg=epsg, column=int(column), row=int(row), side_m=side_m)

    @property
    def side_px(self) -> int:
        """Side in 10 m pixels."""
        return self.side_m // PIXEL_M

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        """(left, bottom, right, top) in metres of the zone, half-open."""
        return cells_bounds([self])

    @property
    def centre_lonlat(self) -> tuple[float, float]:
        """(longitude, latitude) of the centre in degrees."""
        left, bottom, right, top = self.bounds
        lon, lat = _to_lonlat(self.epsg).transform((left + right) / 2, (bottom + top) / 2)
        return float(lon), float(lat)

    @property
    def footprint(self) -> BaseGeometry:
        """Outline in longitude/latitude; across the antimeridian, longitudes run past 180."""
        return utm_box_lonlat(self.epsg, self.bounds)


def origin_northing_m(epsg: int) -> int:
    """Northing of the equator: where rows are counted from."""
    return 0 if epsg < 32700 else SOUTH_FALSE_NORTHING_M


def cells_bounds(cells: Iterable[Cell]) -> tuple[float, float, float, float]:
    """(left, bottom, right, top) in metres around cells of one zone and side."""
    cells = list(cells)
    side, origin = cells[0].side_m, origin_northing_m(cells[0].epsg)
    assert all(c.epsg == cells[0].epsg and c.side_m == side for c in cells), "cells of several grids"
    columns, rows = [c.column for c in cells], [c.row for c in cells]
    return (
        float(min(columns) * side),
        float(origin + min(rows) * side),
        float((max(columns) + 1) * side),
        float(origin + (max(rows) + 1) * side),
    )


def transform_of(bounds: tuple[float, float, float, float], resolution_m: float) -> Affine:
    """Pixel (column, row) -> (x, y) in metres, for a north-up raster with this upper-left corner."""
    return Affine(resolution_m, 0.0, bounds[0], 0.0, -resolution_m, bounds[3])


def utm_zone(lon: float, lat: float) -> int:
    """UTM zone number of a point, with MGRS's exceptions for south-west Norway and Svalbard."""
    lon = (lon + 180.0) % 360.0 - 180.0
    zone = int((lon + 180.0) // 6.0) + 1
    if 56.0 <= lat < 64.0 and 3.0 <= lon < 12.0:
        return 32
    if 72.0 <= lat < 84.0 and 0.0 <= lon < 42.0:
        return 31 if lon < 9.0 else 33 if lon < 21.0 else 35 if lon < 33.0 else 37
    return zone


def utm_epsg(lon: float, lat: float) -> int:
    """EPSG code of the UTM zone that owns a point."""
    return (32600 if lat >= 0 else 32700) + utm_zone(lon, lat)


def utm_epsgs(lon: Floats, lat: Floats) -> NDArray[np.int64]:
    """`utm_epsg` of many points."""
    lon = (lon + 180.0) % 360.0 - 180.0
    zone = ((lon + 180.0) // 6.0).astype(np.int64) + 1
    zone[(lat >= 56.0) & (lat < 64.0) & (lon >= 3.0) & (lon < 12.0)] = 32
    svalbard = (lat >= 72.0) & (lat < 84.0) & (lon >= 0.0) & (lon < 42.0)
    zone[svalbard] = np.array([31, 33, 35, 37])[np.searchsorted([9.0, 21.0, 33.0], lon[svalbard], side="right")]
    return zone + np.where(lat >= 0.0, 32600, 32700)


def cell_at(lon: float, lat: float, *, side_m: int) -> Cell:
    """The cell, in the zone that owns the point, which holds the point."""
    epsg = utm_epsg(lon, lat)
    x, y = _from_lonlat(epsg).transform(lon, lat)
    row = math.floor((y - origin_northing_m(epsg)) / side_m)
    return Cell(epsg=epsg, column=math.floor(x / side_m), row=row, side_m=side_m)


def cells_at(lon: Floats, lat: Floats, *, side_m: int) -> tuple[Integers, Integers, Integers]:
    """(EPSG codes, columns, rows) of the cells, in the zones that own the points, which hold the points."""
    epsg = utm_epsgs(lon, lat)
    columns, rows = np.empty((2, len(epsg)), np.int64)
    for zone in np.unique(epsg).tolist():
        here = epsg == zone
        x, y = _from_lonlat(zone).transform(lon[here], lat[here])
        columns[here] = np.floor(np.asarray(x) / side_m)
        rows[here] = np.floor((np.asarray(y) - origin_northing_m(zone)) / side_m)
    return epsg, columns, rows


def is_owned(cell: Cell) -> bool:
    """Whether the cell's centre lies in its own zone: exactly one zone may sample a place."""
    return utm_epsg(*cell.centre_lonlat) == cell.epsg


def cells_covering(region: BaseGeometry, *, side_m: int, owners_only: bool = True) -> list[Cell]:
    """Cells that a region touches, in a fixed order.

    Args:
        region: Polygon or multipolygon in longitude/latitude.
        side_m: Side of the cells in metres.
        owners_only: Take each place once, by the zone of the cell's centre (for sampling). Otherwise every cell
            that touches the region in its own zone or up to a few cells beyond that zone's border (for wall-to-wall
            maps, where zones overlap).

    Returns:
        Cells whose interior meets the region, sorted by zone, row from north to south, column.
    """
    cells = [
        Cell(epsg=cover.epsg, column=int(column), row=int(row), side_m=side_m)
        for cover in zone_covers(region, side_m=side_m, owners_only=owners_only)
        for columns, rows in cover.pieces()
        for column, row in zip(*cover.meeting(columns, rows), strict=True)
    ]
    return sorted(cells, key=grid_order)


def grid_order(cell: Cell) -> tuple[int, int, int]:
    """Sorts cells by zone, row from north to south, column."""
    return cell.epsg, -cell.row, cell.column


@dataclass(frozen=True, slots=True, kw_only=True)
class ZoneCover:
    """The part of a region that one zone's cells have to cover."""

    epsg: int
    side_m: int

    owners_only: bool
    """Only cells whose centre the zone owns."""

    outline: BaseGeometry
    """In metres of the zone."""

    columns: range
    """Of the rectangle around the outline, as `rows`."""

    rows: range

    def pieces(self, max_cells: int = 1 << 17) -> Iterator[tuple[Integers, Integers]]:
        """(columns, rows) of every cell of the rectangle around the region, some rows at a time."""
        step = max(1, max_cells // len(self.columns))
        for first in range(self.rows.start, self.rows.stop, step):
            rows, columns = np.meshgrid(
                np.arange(first, min(first + step, self.rows.stop)), np.asarray(self.columns), indexing="ij"
            )
            yield columns.ravel(), rows.ravel()

    def meeting(self, columns: Integers, rows: Integers) -> tuple[Integers, Integers]:
        """(columns, rows) of those cells whose interior meets the region."""
        # A millimetre less on each side: a cell that only touches the region has nothing of it.
        squares = cell_squares(self.epsg, columns, rows, side_m=self.side_m, grow_m=-0.001)
        found = shapely.intersects(self.outline, squares)
        if self.owners_only:
            found[found] = owned(self.epsg, columns[found], rows[found], side_m=self.side_m)
        return columns[found], rows[found]


def zone_covers(region: BaseGeometry, *, side_m: int, owners_only: bool) -> Iterator[ZoneCover]:
    """A region (longitude/latitude) cut up by the zones that own it, each with a margin; in order of the zones."""
    # Three cells of margin, as wide in longitude as they are where the region is nearest to a pole.
    lat_deg = 3 * side_m / _DEGREE_M
    lon_deg = lat_deg / math.cos(math.radians(min(85.0, np.abs(region.bounds[1::2]).max() + lat_deg)))
    for epsg in _zones():
        grown = _territory(epsg, lon_deg=lon_deg, lat_deg=lat_deg)
        if (grown if owners_only else _territory(epsg)).intersection(region).area == 0:
            continue
        # Lines that are straight in degrees are curves in the plane.
        part = in_plane([shapely.segmentize(grown.intersection(region), 0.05)], epsg)[0]
        shapely.prepare(part)
        left, bottom, right, top = part.bounds
        origin = origin_northing_m(epsg)
        yield ZoneCover(
            epsg=epsg,
            side_m=side_m,
            owners_only=owners_only,
            outline=part,
            columns=range(math.floor(left / side_m), math.ceil(right / side_m) + 1),
            rows=range(math.floor((bottom - origin) / side_m), math.ceil((top - origin) / side_m) + 1),
        )


def in_plane(geometries: Iterable[BaseGeometry], epsg: int) -> NDArray[Any]:
    """Geometries in longitude/latitude as geometries in metres of a zone, straight lines between the same vertices.

    Footprints of Sentinel items are straight between their corners in the plane: so projected, recorded ones of whole
    tiles agree with their rasters to a ten-thousandth of the area, where lines that are straight in degrees are off by
    ten times that at 46 degrees of latitude. What is long and straight in degrees is to be segmentized before. A
    polygon that crosses the antimeridian the wrong way round, around the whole world, comes out right.
    """
    forward = _from_lonlat(epsg)
    shapes: NDArray[Any] = shapely.transform(
        np.asarray(list(geometries), dtype=object), lambda c: np.column_stack(forward.transform(c[:, 0], c[:, 1]))
    )
    broken = ~shapely.is_valid(shapes)
    shapes[broken] = shapely.make_valid(shapes[broken], method="structure", keep_collapsed=False)
    return shapes


def cell_squares(epsg: int, columns: Integers, rows: Integers, *, side_m: int, grow_m: float = 0.0) -> NDArray[Any]:
    """Squares of cells in metres of their zone, as geometries, larger by `grow_m` on every side."""
    left = columns.astype(np.float64) * side_m - grow_m
    bottom = origin_northing_m(epsg) + rows.astype(np.float64) * side_m - grow_m
    width = side_m + 2 * grow_m
    squares: NDArray[Any] = shapely.box(left, bottom, left + width, bottom + width)
    return squares


def centres_lonlat(epsg: int, columns: Integers, rows: Integers, *, side_m: int) -> tuple[Floats, Floats]:
    """(longitudes, latitudes) of the centres of cells, degrees."""
    x = (columns + 0.5) * side_m
    y = origin_northing_m(epsg) + (rows + 0.5) * side_m
    lon, lat = _to_lonlat(epsg).transform(x, y)
    return np.asarray(lon, np.float64), np.asarray(lat, np.float64)


def owned(epsg: int, columns: Integers, rows: Integers, *, side_m: int) -> NDArray[np.bool_]:
    """`is_owned` of many cells."""
    found = surely_owned(epsg, columns, rows, side_m=side_m)
    unsure = ~found
    found[unsure] = utm_epsgs(*centres_lonlat(epsg, columns[unsure], rows[unsure], side_m=side_m)) == epsg
    return found


def surely_owned(epsg: int, columns: Integers, rows: Integers, *, side_m: int) -> NDArray[np.bool_]:
    """Cells whose centre lies so far inside their zone that no projection is needed to tell; never one that does not.

    The meridians that bound a zone are never nearer to its middle than 0.99 of three degrees along the parallel.
    """
    x = (columns + 0.5) * side_m - 500_000.0
    from_equator = np.abs((rows + 0.5) * side_m)
    # A degree of the meridian is always longer: this latitude is on the pole's side of the true one.
    latitude = np.minimum(from_equator / 110_000.0 + 0.1, 90.0)
    inside = np.abs(x) < 0.99 * 3.0 * _DEGREE_M * np.cos(np.radians(latitude))
    inside &= (rows >= 0) if epsg < 32700 else (rows < 0)
    if 32631 <= epsg <= 32637:
        inside &= latitude < 55.5
    result: NDArray[np.bool_] = inside & (latitude < 84.0)
    return result


def cells_near(cell: Cell, *, reach: int) -> list[Cell]:
    """Owned cells with fewer than `reach` cells between them and a cell; itself among them if it is owned.

    In the cell's own zone these are `reach` steps to each side. Of another zone, they are those that meet the box
    around the cell's square, grown by `reach` sides, in that zone's plane: rather one too many than one too few.
    """
    steps = range(-reach, reach + 1)
    near = [replace(cell, column=cell.column + right, row=cell.row + up) for up in steps for right in steps]
    columns, rows = np.array([cell.column]), np.array([cell.row])
    zones = utm_epsgs(*ring_lonlat(cell.epsg, columns, rows, side_m=cell.side_m, reach=reach + 1))
    for epsg in {*zones.ravel().tolist()} - {cell.epsg}:
        ring = ring_lonlat(cell.epsg, columns, rows, side_m=cell.side_m, reach=reach)
        west, south, east, north = cells_around(epsg, *ring, side_m=cell.side_m)[0].tolist()
        near += [
            replace(cell, epsg=epsg, column=column, row=row)
            for row in range(south, north)
            for column in range(west, east)
        ]
    return [other for other in near if is_owned(other)]


def ring_lonlat(epsg: int, columns: Integers, rows: Integers, *, side_m: int, reach: int) -> tuple[Floats, Floats]:
    """(cell, 8) longitudes and latitudes: corners and middles of the edges of squares grown by `reach` sides."""
    across = np.array([0.0, 0.5, 1.0, 1.0, 1.0, 0.5, 0.0, 0.0]) * (2 * reach + 1) - reach
    up = np.array([0.0, 0.0, 0.0, 0.5, 1.0, 1.0, 1.0, 0.5]) * (2 * reach + 1) - reach
    x = (columns[:, None] + across) * side_m
    y = origin_northing_m(epsg) + (rows[:, None] + up) * side_m
    lon, lat = _to_lonlat(epsg).transform(x, y)
    return np.asarray(lon, np.float64), np.asarray(lat, np.float64)


def cells_around(epsg: int, lon: Floats, lat: Floats, *, side_m: int) -> NDArray[np.int64]:
    """(n, 4) first column, first row, end column and end row of the cells that meet the box around each ring of points.

    Args:
        epsg: Zone of the cells.
        lon: (n, points), degrees.
        lat: (n, points), degrees.
        side_m: Side of the cells in metres.
    """
    x, y = _from_lonlat(epsg).transform(lon, lat)
    y = np.asarray(y) - origin_northing_m(epsg)
    # A metre less: a square that only touches the ring is outside of it.
    first = np.stack([np.min(x, axis=1), np.min(y, axis=1)], axis=1) + 1.0
    last = np.stack([np.max(x, axis=1), np.max(y, axis=1)], axis=1) - 1.0
    return np.concatenate([np.floor(first / side_m), np.ceil(last / side_m)], axis=1).astype(np.int64)


def block_key(cell: Cell, *, cells_per_side: int) -> tuple[int, int, int]:
    """(epsg, block column, block row) of the square group of cells that holds the cell."""
    return cell.epsg, cell.column // cells_per_side, cell.row // cells_per_side


def utm_box_lonlat(epsg: int, bounds: tuple[float, float, float, float]) -> BaseGeometry:
    """Outline of a UTM rectangle in longitude/latitude, its edges followed at 9 points each."""
    left, bottom, right, top = bounds
    ring = shapely.segmentize(box(left, bottom, right, top), max((right - left), (top - bottom)) / 8)
    xy = shapely.get_coordinates(ring)
    lon, lat = _to_lonlat(epsg).transform(xy[:, 0], xy[:, 1])
    lon = np.asarray(lon)
    if lon.max() - lon.min() > 180.0:
        lon = np.where(lon < 0.0, lon + 360.0, lon)
    return shapely.Polygon(np.column_stack([lon, lat]))


def _zones() -> list[int]:
    """EPSG codes of all zones, the north's first."""
    return [*range(32601, 32661), *range(32701, 32761)]


@lru_cache(maxsize=1024)
def _territory(epsg: int, *, lon_deg: float = 0.0, lat_deg: float = 0.0) -> BaseGeometry:
    """What a zone owns, longitude/latitude, with a margin that goes on beyond the antimeridian."""
    zone, west = epsg % 100, 6 * (epsg % 100) - 186
    boxes = [(west, -80, west + 6, 0)] if epsg >= 32700 else _EXCEPTIONS.get(zone, [(west, 0, west + 6, 84)])
    grown = [
        box(west - lon_deg + turn, south - lat_deg, east + lon_deg + turn, north + lat_deg)
        for west, south, east, north in boxes
        for turn in (-360, 0, 360)
    ]
    return shapely.union_all(grown).intersection(box(-180, -90, 180, 90))


@lru_cache(maxsize=128)
def _to_lonlat(epsg: int) -> Transformer:
    return Transformer.from_crs(epsg, 4326, always_xy=True)


@lru_cache(maxsize=128)
def _from_lonlat(epsg: int) -> Transformer:
    return Transformer.from_crs(4326, epsg, always_xy=True)
