"""Where chips lie, for very many at once: corners and centres in longitude/latitude from integers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyproj import CRS, Transformer
from pyproj.exceptions import CRSError

from pipeline.grid import PIXEL_M, SOUTH_FALSE_NORTHING_M
from pipeline.layout import Layout

CORNERS: Final = ((0, 0), (1, 0), (1, 1), (0, 1))
"""(east, north) steps of the corners, counterclockwise from the south-west."""


def utm_bounds(
    epsg: NDArray[np.integer[Any]], column: NDArray[np.integer[Any]], row: NDArray[np.integer[Any]], *, side_m: int
) -> NDArray[np.float64]:
    """(chip, 4): left, bottom, right, top in metres of each cell's zone."""
    left = column.astype(np.int64) * side_m
    bottom = row.astype(np.int64) * side_m + np.where(epsg < 32700, 0, SOUTH_FALSE_NORTHING_M)
    return np.column_stack([left, bottom, left + side_m, bottom + side_m]).astype(np.float64)


def centres(corners: NDArray[np.float64]) -> NDArray[np.float64]:
    """(chip, 2) longitude -180 to 180 and latitude of the middle of the corners."""
    middle: NDArray[np.float64] = corners.mean(axis=1)
    middle[:, 0] = (middle[:, 0] + 180) % 360 - 180
    return middle


def place_columns(layout: Layout) -> tuple[str, ...]:
    """Columns of a manifest that say where its chips lie."""
    return ("epsg", "column", "cell_row") if layout.grid else ("crs", "transform")


def georeferences(table: pa.Table, layout: Layout) -> tuple[list[str], NDArray[np.float64]]:
    """Where the pixels of chips lie.

    Args:
        table: Rows of a manifest with `place_columns`.
        layout: Of their store.

    Returns:
        CRS of each chip, empty where it has none, and (chip, 6) numbers: (column, row) -> (x, y) in that CRS for
        pixels of 10 m; NaN where it has none.
    """
    if layout.grid:
        epsg, column, row = (table[name].to_numpy().astype(np.int64) for name in place_columns(layout))
        bounds = utm_bounds(epsg, column, row, side_m=layout.side_px * PIXEL_M)
        transform = np.zeros((len(epsg), 6))
        transform[:, 0], transform[:, 4] = PIXEL_M, -PIXEL_M
        transform[:, 2], transform[:, 5] = bounds[:, 0], bounds[:, 3]
        return [f"EPSG:{code}" for code in epsg], transform
    transform = np.full((table.num_rows, 6), np.nan)
    for place, numbers in enumerate(table["transform"].to_pylist()):
        if numbers:
            transform[place] = numbers
    return [crs or "" for crs in table["crs"].to_pylist()], transform


def footprints(crs: Sequence[str], transform: NDArray[np.float64], *, side_px: int) -> NDArray[np.float64]:
    """Corners of chips in longitude/latitude.

    Args:
        crs: Of each chip, from `georeferences`.
        transform: (chip, 6), from `georeferences`.
        side_px: Side of the chips, pixels of 10 m.

    Returns:
        (chip, 4, 2), counterclockwise from the south-west; across the antimeridian, longitudes run past 180; NaN
        where a chip has no place or its CRS is unknown.
    """
    # A north-up raster counts its rows from the north.
    across = np.array([east for east, _ in CORNERS]) * side_px
    down = np.array([1 - north for _, north in CORNERS]) * side_px
    a, b, c, d, e, f = (transform[:, index, None] for index in range(6))
    xs, ys = a * across + b * down + c, d * across + e * down + f
    corners = np.full((len(transform), 4, 2), np.nan)
    codes = np.asarray(crs, dtype=object)
    for code in set(crs) - {""}:
        here = (codes == code) & np.isfinite(transform).all(axis=1)
        try:
            lon, lat = _to_lonlat(code).transform(xs[here], ys[here])
        except CRSError:
            continue
        corners[here] = np.stack([lon, lat], axis=-1)
    lon = corners[:, :, 0]
    with np.errstate(invalid="ignore"):
        torn = np.ptp(lon, axis=1) > 180
    lon[torn[:, None] & (lon < 0)] += 360
    return corners


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


@lru_cache(maxsize=128)
def _to_lonlat(crs: str) -> Transformer:
    return Transformer.from_crs(CRS.from_user_input(crs), 4326, always_xy=True)
