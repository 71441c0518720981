"""The fixed grid: square cells per UTM zone, anchored so that Sentinel pixels are copied, never resampled.

Cell edges lie at multiples of the cell side from easting 0 and from the equator (northing 0 in the north,
10 000 000 m in the south). Sentinel-2 tile origins are multiples of 60 m from that anchor in both hemispheres,
so a side that is a multiple of 60 m falls on the edges of 10, 20 and 60 m pixels alike.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import shapely
from affine import Affine
from pyproj import Transformer
from shapely.geometry import box
from shapely.geometry.base import BaseGeometry

PIXEL_M = 10
"""Side of the finest pixel of both sensors, in metres."""

SOUTH_FALSE_NORTHING_M = 10_000_000
"""Northing of the equator in southern UTM zones."""

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


def cell_at(lon: float, lat: float, *, side_m: int) -> Cell:
    """The cell, in the zone that owns the point, which holds the point."""
    epsg = utm_epsg(lon, lat)
    x, y = _from_lonlat(epsg).transform(lon, lat)
    row = math.floor((y - origin_northing_m(epsg)) / side_m)
    return Cell(epsg=epsg, column=math.floor(x / side_m), row=row, side_m=side_m)


def is_owned(cell: Cell) -> bool:
    """Whether the cell's centre lies in its own zone: exactly one zone may sample a place."""
    return utm_epsg(*cell.centre_lonlat) == cell.epsg


def cells_covering(region: BaseGeometry, *, side_m: int, owners_only: bool = True) -> list[Cell]:
    """Cells that a region touches, in a fixed order.

    Args:
        region: Polygon or multipolygon in longitude/latitude.
        side_m: Side of the cells in metres.
        owners_only: Take each place once, by the zone of the cell's centre (for sampling). Otherwise every cell
            that touches the region, in every zone that the region touches (for wall-to-wall maps).

    Returns:
        Cells whose interior meets the region, sorted by zone, row from north to south, column.
    """
    shapely.prepare(region)
    cells = [
        cell
        for epsg in _zones_of(region)
        for cell in _cells_of_zone(region, epsg=epsg, side_m=side_m)
        if not owners_only or is_owned(cell)
    ]
    return sorted(cells, key=lambda c: (c.epsg, -c.row, c.column))


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


def _zones_of(region: BaseGeometry) -> list[int]:
    """EPSG codes of every zone that meets the region (a little generous at the exceptions)."""
    zones: set[int] = set()
    for part in getattr(region, "geoms", [region]):
        west, south, east, north = part.bounds
        for lat in {south, north, *(edge for edge in (0.0, 56.0, 63.99, 72.0) if south <= edge <= north)}:
            steps = [*np.arange(west, east, 0.5).tolist(), east]
            zones.update(utm_epsg(lon, lat) for lon in steps)
        if south < 0.0 <= north:
            zones.update(zone + 100 if zone < 32700 else zone - 100 for zone in list(zones))
    return sorted(zones)


def _cells_of_zone(region: BaseGeometry, *, epsg: int, side_m: int) -> Iterator[Cell]:
    forward = _from_lonlat(epsg)
    outline = shapely.segmentize(region, 0.05)
    xy = shapely.transform(outline, lambda c: np.column_stack(forward.transform(c[:, 0], c[:, 1])))
    if not shapely.is_valid(xy):
        xy = shapely.make_valid(xy)
    shapely.prepare(xy)
    left, bottom, right, top = xy.bounds
    origin = origin_northing_m(epsg)
    columns = range(math.floor(left / side_m), math.ceil(right / side_m) + 1)
    rows = range(math.floor((bottom - origin) / side_m), math.ceil((top - origin) / side_m) + 1)
    for row in rows:
        for column in columns:
            cell = Cell(epsg=epsg, column=column, row=row, side_m=side_m)
            square = box(*cell.bounds)
            if xy.intersects(square) and not xy.touches(square):
                yield cell


@lru_cache(maxsize=128)
def _to_lonlat(epsg: int) -> Transformer:
    return Transformer.from_crs(epsg, 4326, always_xy=True)


@lru_cache(maxsize=128)
def _from_lonlat(epsg: int) -> Transformer:
    return Transformer.from_crs(4326, epsg, always_xy=True)
