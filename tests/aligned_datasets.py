"""Folders as other datasets have them, made up or cut out of the real ones, for tests of what imports them."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import xarray as xr
from numpy.typing import NDArray
from rasterio.transform import from_origin

from pipeline.bands import OPTICAL_BANDS

SIDE_PX = 264


def write_ssl4eo_v11(folder: Path, *, split: str, number: int, places: list[str], dates: int = 2) -> dict[str, Any]:
    """One file of each sensor of SSL4EO-S12 v1.1, described as its authors do; pixels are random, some are missing.

    Returns:
        `S2L2A` and `S1GRD`: their pixels (place, date, band, y, x) as stored.
    """
    rng = np.random.default_rng([number, len(places)])
    # As the release has it: an offset of 1000 in optical bands, half precision in decibel.
    optical = rng.integers(1001, 9000, (len(places), dates, 12, SIDE_PX, SIDE_PX)).astype(np.int16)
    optical[:, :, :, :3, :5] = 0
    optical[:, :, 0, 10, 10] = 990
    radar = rng.normal(-14, 5, (len(places), dates, 2, SIDE_PX, SIDE_PX)).astype(np.float16)
    radar[:, :, :, -1, :] = np.nan
    start = np.datetime64("2020-04-19T09:40:31", "ns") + np.arange(dates) * np.timedelta64(90, "D")
    for product, pixels, bands, late in (
        ("S2L2A", optical, list(OPTICAL_BANDS), np.timedelta64(0, "h")),
        ("S1GRD", radar, ["vv", "vh"], np.timedelta64(31, "h")),
    ):
        times = np.broadcast_to((start + late).astype("datetime64[ns]"), (len(places), dates))
        x = 500_005.0 + 10 * np.arange(SIDE_PX)
        dataset = xr.Dataset(
            {
                "bands": (("sample", "time", "band", "y", "x"), pixels),
                "center_lat": (("sample",), np.full(len(places), 38.0)),
                "center_lon": (("sample",), np.full(len(places), 15.0)),
                "crs": (("sample",), np.full(len(places), 32633)),
                "file_id": (
                    ("sample", "time"),
                    np.array([[f"{product}_{p}_{d}" for d in range(dates)] for p in places]),
                ),
                "sample_id": (("sample", "time"), np.array([[f"{p}_{d}" for d in range(dates)] for p in places])),
                "time_": (("sample", "time"), times),
                "x_": (("sample", "x"), x + 10_000 * np.arange(len(places))[:, None]),
                "y_": (("sample", "y"), np.broadcast_to(4_212_995.0 - 10 * np.arange(SIDE_PX), (len(places), SIDE_PX))),
            },
            coords={"band": bands, "sample": places, "time": np.arange(dates)},
        )
        path = folder / split / product / f"ssl4eos12_{split}_seasonal_data_{number:06d}.zarr.zip"
        plain = path.with_suffix("")
        dataset.to_zarr(plain, zarr_format=2, encoding={"bands": {"chunks": (len(places), 1, *pixels.shape[2:])}})
        with zipfile.ZipFile(path, "w") as archive:
            for file in sorted(plain.rglob("*")):
                if file.is_file():
                    archive.write(file, file.relative_to(plain))
        shutil.rmtree(plain)
    return {"S2L2A": optical, "S1GRD": radar}


def write_tif(path: Path, pixels: NDArray[Any], *, west: float = 400_000.0, north: float = 5_000_040.0) -> None:
    """(band, y, x) as a GeoTIFF of 10 m pixels in UTM zone 33."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with rasterio.open(
        path,
        "w",
        driver="GTiff",
        width=pixels.shape[2],
        height=pixels.shape[1],
        count=pixels.shape[0],
        dtype=pixels.dtype,
        crs="EPSG:32633",
        transform=from_origin(west, north, 10, 10),
    ) as file:
        file.write(pixels)


def read_tif(path: Path) -> NDArray[Any]:
    """All bands, as rasterio reads them."""
    with rasterio.open(path) as file:
        pixels: NDArray[Any] = file.read()
    return pixels


def state_of(folder: Path) -> Mapping[str, int]:
    """Path -> time of the last write, of all files."""
    return {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob("*")) if path.is_file()}
