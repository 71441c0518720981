"""Pixels of a file that lies on another grid than a window: read once, warped once, square by square.

GDAL's warper takes the scale of its kernel, and the points between which it interpolates coordinates, from whatever it
is asked for at a time: the same place comes out differently, by decibels, with other places around it, and smoother
than bilinear. Here the scale is said, coordinates are exact to a hundred-thousandth of a pixel, and a cell is warped
by itself, so that its pixels are the same whatever is read with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from affine import Affine
from numpy.typing import NDArray
from rasterio.crs import CRS
from rasterio.enums import Resampling
from rasterio.io import DatasetReader, MemoryFile
from rasterio.vrt import WarpedVRT
from rasterio.warp import transform_bounds
from rasterio.windows import Window as PixelWindow

from pipeline.grid import transform_of
from pipeline.reader_gdal import copy_pixels, fill_nodata, is_aligned
from pipeline.reader_types import Header, Source, Window

_TOLERANCE_PX: Final = 1e-5
_MARGIN_PX: Final = 2
"""More than a bilinear kernel reaches beyond the pixels that a square's outline meets."""

_OUTLINE_POINTS: Final = 21
"""Between two corners: the outline of a square is bent in another projection."""


def window_pixels(dataset: DatasetReader, header: Header, source: Source, window: Window) -> NDArray[Any]:
    """(y, x) of a window: the file's own pixels where it lies on the window's grid, else warped ones."""
    if is_aligned(header, window, source.resolution_m):
        return fill_nodata(copy_pixels(dataset, header, source, window), header, source)
    return warp_pixels(dataset, header, source, window)


def warp_pixels(dataset: DatasetReader, header: Header, source: Source, window: Window) -> NDArray[Any]:
    """(y, x) of a window on another grid than the file's; the fill outside the file and where it has no data.

    Classes come by nearest neighbour, from the file's overviews where far coarser pixels are wanted; everything else
    bilinearly, of the pixels with data alone.
    """
    resolution_m = source.resolution_m
    squares = window.squares()
    step = 1 if source.smooth else _step(dataset, squares[0], resolution_m)
    places = [_place(dataset, square, step) for square in squares]
    pixels = np.full(window.shape(resolution_m), source.fill, source.fill.dtype)
    there = [(square, place) for square, place in zip(squares, places, strict=True) if place is not None]
    if not there:
        return pixels
    around = _around([place for _, place in there])
    read = fill_nodata(_read(dataset, around, step, source), header, source)
    for square, (row0, row1, column0, column1) in there:
        part = read[row0 - around[0] : row1 - around[0], column0 - around[2] : column1 - around[2]]
        transform = dataset.transform * Affine.scale(step) * Affine.translation(column0, row0)
        rows, columns = square.shape(resolution_m)
        top = round((window.bounds[3] - square.bounds[3]) / resolution_m)
        left = round((square.bounds[0] - window.bounds[0]) / resolution_m)
        pixels[top : top + rows, left : left + columns] = _warped(part, transform, dataset.crs, source, square)
    return pixels


Place = tuple[int, int, int, int]
"""First and end row, first and end column, half-open, in steps of the file's pixels."""


def _extent_px(dataset: DatasetReader, square: Window) -> tuple[float, float, float, float]:
    """First and last row, first and last column of the file that a square meets, not clipped to the file."""
    left, bottom, right, top = transform_bounds(
        f"EPSG:{square.epsg}", dataset.crs, *square.bounds, densify_pts=_OUTLINE_POINTS
    )
    if right < left:  # across the antimeridian: counted on the side that the file lies on
        left, right = (left, right + 360.0) if dataset.bounds.right > 0.0 else (left - 360.0, right)
    corners = [~dataset.transform * (x, y) for x in (left, right) for y in (bottom, top)]
    columns, rows = zip(*corners, strict=True)
    return min(rows), max(rows), min(columns), max(columns)


def _step(dataset: DatasetReader, square: Window, resolution_m: int) -> int:
    """How many of the file's pixels make one that is wanted, at least."""
    row0, row1, column0, column1 = _extent_px(dataset, square)
    rows, columns = square.shape(resolution_m)
    return max(1, int(min((row1 - row0) / rows, (column1 - column0) / columns)))


def _place(dataset: DatasetReader, square: Window, step: int) -> Place | None:
    """What a square needs of the file, by itself; None where the file does not reach."""
    row0, row1, column0, column1 = (pixels / step for pixels in _extent_px(dataset, square))
    rows = max(0, int(np.floor(row0)) - _MARGIN_PX), min(dataset.height // step, int(np.ceil(row1)) + _MARGIN_PX)
    columns = (
        max(0, int(np.floor(column0)) - _MARGIN_PX),
        min(dataset.width // step, int(np.ceil(column1)) + _MARGIN_PX),
    )
    return (*rows, *columns) if rows[0] < rows[1] and columns[0] < columns[1] else None


def _around(places: Sequence[Place]) -> Place:
    row0, row1, column0, column1 = zip(*places, strict=True)
    return min(row0), max(row1), min(column0), max(column1)


def _read(dataset: DatasetReader, place: Place, step: int, source: Source) -> NDArray[Any]:
    row0, row1, column0, column1 = place
    rows, columns = row1 - row0, column1 - column0
    window = PixelWindow(column0 * step, row0 * step, columns * step, rows * step)
    read: NDArray[Any] = dataset.read(1, window=window, out_shape=(rows, columns))
    return read.astype(source.fill.dtype, copy=False)


def _warped(pixels: NDArray[Any], transform: Affine, crs: CRS, source: Source, square: Window) -> NDArray[Any]:
    """(y, x) of a square from pixels (y, x) around it, in which the fill is no data."""
    rows, columns = square.shape(source.resolution_m)
    nodata = source.fill.item()
    profile = {"count": 1, "dtype": pixels.dtype, "crs": crs, "transform": transform, "nodata": nodata}
    with MemoryFile() as memory:
        with memory.open(driver="GTiff", height=pixels.shape[0], width=pixels.shape[1], **profile) as file:
            file.write(pixels, 1)
        with (
            memory.open() as file,
            WarpedVRT(
                file,
                crs=f"EPSG:{square.epsg}",
                transform=transform_of(square.bounds, source.resolution_m),
                width=columns,
                height=rows,
                resampling=Resampling.bilinear if source.smooth else Resampling.nearest,
                src_nodata=nodata,
                nodata=nodata,
                tolerance=_TOLERANCE_PX,
                XSCALE=1,
                YSCALE=1,
            ) as warped,
        ):
            result: NDArray[Any] = warped.read(1)
            return result
