"""A pair of full-size scenes for measurements: 10 980 px of Sentinel-2 and 12 000 px of Sentinel-1, made once."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.transform import from_origin
from rasterio.windows import Window

from pipeline.bands import NATIVE_GROUPS, RADAR_BANDS, RESOLUTION_M, SCENE_CLASSIFICATION
from pipeline.grid import utm_box_lonlat
from pipeline.types import Item

EPSG, LEFT, TOP = 32633, 300_000, 5_400_000
OPTICAL_M, RADAR_M = 109_800, 120_000
RADAR_LEFT, RADAR_TOP = LEFT - 2_570, TOP + 3_570
"""Whole pixels off the optical grid, and off its files' blocks."""

_TEXTURE_PX = 3000
_BLOCK_PX = 512
_NOISE_BITS = 10

Rows = Callable[[int, int, int], NDArray[np.generic]]
"""(first row, rows, columns) -> pixels."""


def write_scenes(folder: Path) -> None:
    """Write what is not there yet; deflate leaves about three quarters of the bytes, as of real scenes."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    y, x = np.ogrid[:_TEXTURE_PX, :_TEXTURE_PX]
    relief = 1500 + 700 * np.sin(x / 300) + 700 * np.cos(y / 400)
    reflectance = (relief + rng.integers(0, 1 << _NOISE_BITS, relief.shape)).astype(np.uint16)
    gamma0 = rng.gamma(4, 0.03, relief.shape).astype(np.float32)
    for group, bands in NATIVE_GROUPS.items():
        for number, band in enumerate(bands):
            rows = _shifted(reflectance, 37 * number)
            _write(folder / f"{band}.tif", rows, "uint16", OPTICAL_M, RESOLUTION_M[group], LEFT, TOP, 0)
    classes = (4 + (relief > 1500)).astype(np.uint8)
    _write(folder / f"{SCENE_CLASSIFICATION}.tif", _shifted(classes, 0), "uint8", OPTICAL_M, 20, LEFT, TOP, 0)
    for number, band in enumerate(RADAR_BANDS):
        rows = _shifted(gamma0, 37 * number)
        _write(folder / f"{band}.tif", rows, "float32", RADAR_M, 10, RADAR_LEFT, RADAR_TOP, -32768)


def items(base: str) -> dict[str, Item]:
    """The two items, their assets below a URL or folder."""
    optical = (*(band for bands in NATIVE_GROUPS.values() for band in bands), SCENE_CLASSIFICATION)
    return {
        "S2": _item("S2", base, optical, LEFT, TOP, OPTICAL_M),
        "S1": _item("S1", base, RADAR_BANDS, RADAR_LEFT, RADAR_TOP, RADAR_M),
    }


def _item(name: str, base: str, bands: tuple[str, ...], left: int, top: int, side_m: int) -> Item:
    return Item(
        id=name,
        collection=name,
        sensor="optical" if name == "S2" else "radar",
        datetime=datetime(2023, 6, 1, tzinfo=UTC),
        epsg=EPSG,
        footprint=utm_box_lonlat(EPSG, (left, top - side_m, left + side_m, top)),
        assets={band: f"{base}/{band}.tif" for band in bands},
        platform=name,
        relative_orbit=1,
        orbit_state="ascending",
        absolute_orbit=41_475,
        baseline="03.01" if name == "S2" else "",
    )


def _shifted(texture: NDArray[np.generic], by: int) -> Rows:
    def rows(first: int, count: int, columns: int) -> NDArray[np.generic]:
        down = (np.arange(first, first + count) + by) % _TEXTURE_PX
        across = (np.arange(columns) + 3 * by) % _TEXTURE_PX
        return texture[np.ix_(down, across)]

    return rows


def _write(path: Path, rows: Rows, dtype: str, side_m: int, pixel_m: int, left: int, top: int, nodata: float) -> None:
    if path.exists():
        return
    side = side_m // pixel_m
    part = path.with_suffix(".part")
    with rasterio.open(
        part,
        "w",
        driver="GTiff",
        width=side,
        height=side,
        count=1,
        dtype=dtype,
        crs=f"EPSG:{EPSG}",
        transform=from_origin(left, top, pixel_m, pixel_m),
        nodata=nodata,
        tiled=True,
        blockxsize=_BLOCK_PX,
        blockysize=_BLOCK_PX,
        compress="deflate",
        predictor=2,
        zlevel=1,
        num_threads=2,
    ) as file:
        for first in range(0, side, _BLOCK_PX):
            count = min(_BLOCK_PX, side - first)
            file.write(rows(first, count, side), 1, window=Window(0, first, side, count))
    part.rename(path)
