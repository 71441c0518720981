"""GeoTIFFs of a dataset's folder, and their numbers on the store's scales."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from affine import Affine
from numpy.typing import NDArray
from pyproj import CRS, Transformer
from pyproj.exceptions import CRSError
from rasterio.errors import NotGeoreferencedWarning, RasterioError

from pipeline.bands import NATIVE_GROUPS, RADAR_BANDS, RADAR_NODATA
from pipeline.imports.samples import Reading, Sample, Unfit
from pipeline.layout import Layout
from pipeline.radiometry import FLOOR_CENTI_DB, harmonise
from pipeline.types import ChipArrays, ChipError

_GDAL = {"GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR"}
"""Without it each opening lists a folder, which can hold hundreds of thousands of files."""

_SAME_GRID_PX = 0.05
_MAX_BELOW_OFFSET = 0.05
"""Share of a chip's pixels: few are so dark, all are where the offset was taken out before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Where the pixels of a file lie, as its header says."""

    crs: str
    transform: Affine
    width: int
    height: int

    @property
    def lonlat(self) -> tuple[float, float] | None:
        """Centre in degrees; None where the CRS is unknown."""
        x, y = self.transform @ (self.width / 2, self.height / 2)
        try:
            return _to_lonlat(self.crs).transform(x, y)
        except CRSError:
            return None

    def located(self) -> dict[str, Any]:
        """What a sample says of its place."""
        return {"crs": self.crs, "transform": tuple(self.transform)[:6], "lonlat": self.lonlat}


@dataclass(frozen=True, slots=True, kw_only=True)
class Raster:
    """A whole file."""

    pixels: NDArray[Any]
    """(band, y, x)."""

    grid: Grid


def read_raster(path: Path) -> Raster:
    """All bands of a file.

    Raises:
        ChipError: It is missing or damaged; names the file.
    """
    try:
        with _opened(path) as dataset:
            return Raster(pixels=dataset.read(), grid=_grid(dataset))
    except RasterioError as error:
        raise ChipError(_said(path, error)) from error


def read_grid(path: Path) -> Grid | None:
    """Of a file's header; None where it cannot be read, which reading the pixels will say."""
    try:
        with _opened(path) as dataset:
            return _grid(dataset)
    except RasterioError:
        return None


def located(path: Path) -> dict[str, Any]:
    """What a sample says of its place, from the header of one of its files."""
    grid = read_grid(path)
    return grid.located() if grid else {}


def read_single_bands(paths: Sequence[Path]) -> Raster:
    """Files of one band each, of one grid, as one raster.

    Raises:
        ChipError: One is missing or damaged, or they have different sizes.
    """
    rasters = [read_raster(path) for path in paths]
    for path, raster in zip(paths, rasters, strict=True):
        if raster.pixels.shape != (1, *rasters[0].pixels.shape[1:]):
            raise ChipError(
                f"{path.name}: shape {raster.pixels.shape} where (1, {rasters[0].grid.height}, "
                f"{rasters[0].grid.width}) is expected"
            )
    return Raster(pixels=np.concatenate([raster.pixels for raster in rasters]), grid=rasters[0].grid)


def same_grid(path: Path, grid: Grid, expected: Grid) -> None:
    """Refuse a file that lies on another grid than its partner: it would have to be resampled.

    Raises:
        ChipError: The CRS, the size or a corner differs.
    """
    corners = ((0, 0), (grid.width, grid.height))
    there = [np.subtract(grid.transform @ corner, expected.transform @ corner) for corner in corners]
    off_px = max(float(np.abs(step).max()) for step in there) / abs(expected.transform.a)
    shapes_differ = (grid.width, grid.height) != (expected.width, expected.height)
    if grid.crs != expected.crs or shapes_differ or off_px > _SAME_GRID_PX:
        raise ChipError(f"{path.name}: on another grid than the chip's other files, by {off_px:.2f} px")


def to_optical(dn: NDArray[Any], *, offset_dn: int, what: str) -> NDArray[np.uint16]:
    """Integers of a file -> reflectance x 10 000 without offset; what is not positive is no data.

    Raises:
        ChipError: The numbers are no integers, or many lie below the offset that they are said to have.
    """
    if dn.dtype.kind not in "ui":
        raise ChipError(f"{what}: {dn.dtype} where integers of reflectance x 10 000 are expected")
    valid = dn > 0
    below = float((dn[valid] < offset_dn).mean()) if valid.any() else 0.0
    if below > _MAX_BELOW_OFFSET:
        raise ChipError(f"{what}: {below:.0%} of the pixels are below the offset of {offset_dn} they should have")
    return harmonise(np.where(valid, dn, 0).astype(np.uint16), offset_dn=offset_dn)


def to_radar(decibel: NDArray[Any], *, what: str) -> NDArray[np.int16]:
    """Decibel -> hundredths of a decibel, at least -5000; NaN is no data.

    Raises:
        ChipError: The numbers are linear power, or were cut to whole decibels on their way here.
    """
    valid = ~np.isnan(decibel) & (decibel != np.inf)
    if valid.any():
        values = decibel[valid]
        if values.min() >= 0:
            raise ChipError(f"{what}: no value below 0, which is linear power where decibel is expected")
        finite = values[np.isfinite(values)]
        if finite.size > 1 and np.all(finite == np.round(finite)) and np.ptp(finite) > 0:
            raise ChipError(f"{what}: only whole decibels; the values were truncated before they came here")
    hundredths = np.round(np.where(valid, decibel, 0).astype(np.float64) * 100)
    return np.where(valid, hundredths.clip(FLOOR_CENTI_DB, 32767), RADAR_NODATA).astype(np.int16)


def optical_groups(bands: NDArray[np.uint16], names: Sequence[str]) -> ChipArrays:
    """Bands of one grid, (band, y, x) with their names, as the store's optical arrays."""
    return {
        group: np.ascontiguousarray(bands[[names.index(band) for band in members]])
        for group, members in NATIVE_GROUPS.items()
    }


def radar_array(decibel: NDArray[Any], names: Sequence[str], *, what: str) -> ChipArrays:
    """Polarisations (band, y, x) with their names, as the store's radar array."""
    return {"radar": to_radar(decibel[[names.index(band) for band in RADAR_BANDS]], what=what)}


def fitting(chip: ChipArrays, layout: Layout) -> ChipArrays:
    """The chip, if its arrays have the store's shapes; raises Unfit."""
    for name, spec in layout.arrays().items():
        if name in chip and chip[name].shape != spec.shape:
            raise Unfit("wrong_size")
    return chip


def each_alone(
    read_one: Callable[[Path, Sample, Layout], ChipArrays], folder: Path, samples: Sequence[Sample], layout: Layout
) -> Iterator[Reading]:
    """Read samples one by one, each in files of its own."""
    for sample in samples:
        try:
            yield fitting(read_one(folder, sample, layout), layout)
        except (ChipError, Unfit) as error:
            yield error


def _opened(path: Path) -> Any:
    with warnings.catch_warnings(), rasterio.Env(**_GDAL):
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        return rasterio.open(path)


def _grid(dataset: Any) -> Grid:
    crs = dataset.crs.to_string() if dataset.crs else ""
    return Grid(crs=crs, transform=dataset.transform, width=dataset.width, height=dataset.height)


def _said(path: Path, error: Exception) -> str:
    return f"{path.name}: {'is missing' if not path.exists() else error} ({path.parent})"


@lru_cache(maxsize=256)
def _to_lonlat(crs: str) -> Transformer:
    return Transformer.from_crs(CRS.from_user_input(crs), 4326, always_xy=True)
