"""Where chips lie, for very many at once: corners and centres in longitude/latitude from integers."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyproj import Transformer

from pipeline.grid import SOUTH_FALSE_NORTHING_M

CORNERS: Final = ((0, 0), (1, 0), (1, 1), (0, 1))
"""(east, north) steps of the corners, counterclockwise from the south-west."""


def utm_bounds(
    epsg: NDArray[np.integer[Any]], column: NDArray[np.integer[Any]], row: NDArray[np.integer[Any]], *, side_m: int
) -> NDArray[np.float64]:
    """(chip, 4): left, bottom, right, top in metres of each cell's zone."""
    left = column.astype(np.int64) * side_m
    bottom = row.astype(np.int64) * side_m + np.where(epsg < 32700, 0, SOUTH_FALSE_NORTHING_M)
    return np.column_stack([left, bottom, left + side_m, bottom + side_m]).astype(np.float64)


def corners_lonlat(crs: NDArray[Any], bounds: NDArray[np.float64]) -> NDArray[np.float64]:
    """Corners of boxes in longitude/latitude.

    Args:
        crs: (chip,) EPSG numbers.
        bounds: (chip, 4) left, bottom, right, top in units of each chip's CRS.

    Returns:
        (chip, 4, 2), counterclockwise from the south-west; across the antimeridian, longitudes run past 180.
    """
    xs = np.stack([bounds[:, 2 * east] for east, _ in CORNERS], axis=1)
    ys = np.stack([bounds[:, 1 + 2 * north] for _, north in CORNERS], axis=1)
    corners = np.empty((len(bounds), 4, 2))
    for code in np.unique(crs):
        here = crs == code
        lon, lat = Transformer.from_crs(int(code), 4326, always_xy=True).transform(xs[here], ys[here])
        corners[here] = np.stack([lon, lat], axis=-1)
    lon = corners[:, :, 0]
    across = lon.max(axis=1, initial=-360) - lon.min(axis=1, initial=360) > 180 if len(lon) else np.zeros(0, bool)
    lon[across[:, None] & (lon < 0)] += 360
    return corners


def centres(corners: NDArray[np.float64]) -> NDArray[np.float64]:
    """(chip, 2) longitude -180 to 180 and latitude of the middle of the corners."""
    middle: NDArray[np.float64] = corners.mean(axis=1)
    middle[:, 0] = (middle[:, 0] + 180) % 360 - 180
    return middle


def bounds_of(table: pa.Table, *, side_m: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """EPSG numbers and bounds of rows that name their cell by `epsg`, `column`, `cell_row`.

    Args:
        table: A manifest, or part of one.
        side_m: Side of a cell.

    Returns:
        (chip,) and (chip, 4).
    """
    epsg, column, row = (table[name].to_numpy() for name in ("epsg", "column", "cell_row"))
    return epsg.astype(np.int64), utm_bounds(epsg, column, row, side_m=side_m)


def unrolled(lon: NDArray[np.float64]) -> NDArray[np.float64]:
    """Longitudes such that a region across the antimeridian is not torn apart: beyond 180 where that keeps them near.

    Args:
        lon: Longitudes in degrees, -180 to 180.
    """
    if len(lon) < 2:
        return lon
    ordered = np.unique(lon)
    gaps = np.diff(ordered, append=ordered[0] + 360)
    widest = int(gaps.argmax())
    if widest == len(ordered) - 1:
        return lon
    return np.where(lon <= ordered[widest], lon + 360, lon)
