"""Maps of patch encodings: a raster per UTM zone, filled cell by cell as they come, then written as COGs."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import matplotlib.image
import numpy as np
import rasterio
import rasterio.shutil
from numpy.typing import NDArray
from rasterio.io import DatasetReader, DatasetWriter
from rasterio.windows import Window

from jobs.support.principal import Basis
from pipeline.grid import PIXEL_M, Cell, cells_bounds, transform_of

NO_COLOUR: Final = 0
"""In the picture's three bands where there is no chip."""

_TILE_PX: Final = 128
"""The smallest that GDAL takes for a COG: a tile of hundreds of bands is many bytes all the same."""

_PICTURE_TILE_PX: Final = 256
_PNG_SIDE_PX: Final = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class MapGrid:
    """The tokens of the cells of one UTM zone, as pixels of a north-up raster."""

    epsg: int

    bounds: tuple[float, float, float, float]
    """(left, bottom, right, top) in metres."""

    token_m: int
    """Side of a token."""

    @classmethod
    def around(cls, cells: Iterable[Cell], *, patch_px: int) -> MapGrid:
        """The smallest grid that holds some cells of one zone."""
        cells = list(cells)
        return cls(epsg=cells[0].epsg, bounds=cells_bounds(cells), token_m=patch_px * PIXEL_M)

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        left, bottom, right, top = self.bounds
        return round((top - bottom) / self.token_m), round((right - left) / self.token_m)

    def window(self, cell: Cell) -> Window:
        """Where a cell's tokens lie; its side is a whole number of tokens."""
        left, _, _, top = cell.bounds
        assert cell.epsg == self.epsg, (cell, self)
        assert cell.side_m % self.token_m == 0, (cell, self)
        tokens = cell.side_m // self.token_m
        return Window(
            round((left - self.bounds[0]) / self.token_m), round((self.bounds[3] - top) / self.token_m), tokens, tokens
        )

    def profile(self, *, count: int, dtype: str, nodata: float) -> dict[str, Any]:
        """For a tiled GeoTIFF of this grid that is filled piece by piece; what is never written costs nothing."""
        rows, columns = self.shape
        return {
            "driver": "GTiff",
            "height": rows,
            "width": columns,
            "count": count,
            "dtype": dtype,
            "nodata": nodata,
            "crs": f"EPSG:{self.epsg}",
            "transform": transform_of(self.bounds, self.token_m),
            "tiled": True,
            "blockxsize": _TILE_PX,
            "blockysize": _TILE_PX,
            "interleave": "pixel",
            "bigtiff": "if_safer",
            "sparse_ok": True,
        }


class DenseMaps:
    """Rasters on local disk, one per zone, open for writing: float32 encodings, NaN where there is no chip."""

    def __init__(self, folder: Path, grids: Iterable[MapGrid], *, width: int) -> None:
        self._folder = folder
        self.width = width
        self.grids = {grid.epsg: grid for grid in grids}
        self._stack = ExitStack()
        self._files: dict[int, DatasetWriter] = {
            epsg: self._stack.enter_context(
                rasterio.open(
                    folder / f"{epsg}.tif", "w", **grid.profile(count=width, dtype="float32", nodata=float("nan"))
                )
            )
            for epsg, grid in self.grids.items()
        }

    def write(self, cell: Cell, encodings: NDArray[np.float32]) -> None:
        """Place the tokens of a cell's chip: (N, D), row by row."""
        window = self.grids[cell.epsg].window(cell)
        planes = encodings.T.reshape(-1, window.height, window.width)
        self._files[cell.epsg].write(planes, window=window)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def path(self, epsg: int) -> Path:
        """The raster of a zone; complete once the maps are closed."""
        return self._folder / f"{epsg}.tif"


def write_dense_cog(source: Path, target: Path, *, tags: Mapping[str, str]) -> None:
    """Encodings as a COG: float32 as the model gave them, zstd with the floating-point predictor."""
    with rasterio.open(source, "r+") as file:
        file.update_tags(**tags)
    _to_cog(source, target, compress="ZSTD", tile_px=_TILE_PX, resampling="AVERAGE")


def write_picture(source: Path, target: Path, png: Path, basis: Basis, grid: MapGrid) -> None:
    """Paint encodings by their principal components: a COG of three bytes per token, and a PNG for looking.

    Args:
        source: Raster of encodings, read block by block.
        target: COG to write; 0 where there is no chip.
        png: At most 2048 px wide and high, transparent where there is no chip.
        basis: The run's.
        grid: Of the raster.
    """
    plain = target.with_suffix(".plain.tif")
    profile = grid.profile(count=3, dtype="uint8", nodata=NO_COLOUR) | {"photometric": "RGB"}
    with rasterio.open(source) as encodings, rasterio.open(plain, "w", **profile) as picture:
        for _, window in encodings.block_windows(1):
            picture.write(_paint(encodings, window, basis), window=window)
    _to_cog(plain, target, compress="DEFLATE", tile_px=_PICTURE_TILE_PX, resampling="AVERAGE")
    with rasterio.open(plain) as picture:
        _write_png(picture, png)
    plain.unlink()


def _paint(encodings: DatasetReader, window: Window, basis: Basis) -> NDArray[np.uint8]:
    """(3, rows, columns) of a window."""
    values = encodings.read(window=window)
    painted = np.full((3, *values.shape[1:]), NO_COLOUR, np.uint8)
    there = np.isfinite(values[0])
    painted[:, there] = basis.colours(values[:, there].T).T
    return painted


def _write_png(picture: DatasetReader, path: Path) -> None:
    # Every n-th token, not a mean: the picture shows what there is.
    step = -(-max(picture.shape) // _PNG_SIDE_PX)
    height, width = (-(-side // step) for side in picture.shape)
    colours = picture.read(out_shape=(3, height, width)).transpose(1, 2, 0)
    alpha = np.where((colours == NO_COLOUR).all(axis=2, keepdims=True), 0, 255).astype(np.uint8)
    matplotlib.image.imsave(path, np.concatenate([colours, alpha], axis=2))


def _to_cog(source: Path, target: Path, *, compress: str, tile_px: int, resampling: str) -> None:
    rasterio.shutil.copy(
        source,
        target,
        driver="COG",
        compress=compress,
        predictor="YES",
        blocksize=tile_px,
        overview_resampling=resampling,
        bigtiff="IF_SAFER",
        num_threads=str(os.cpu_count() or 1),
    )
