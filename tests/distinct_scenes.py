"""Tiny scenes in which every pixel has its own value, so that a shift by one is seen."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.transform import from_origin

from pipeline.bands import NATIVE_GROUPS, RADAR_BANDS, RESOLUTION_M
from pipeline.grid import utm_box_lonlat
from pipeline.types import Item

MOMENT = datetime(2023, 6, 1, 10, tzinfo=UTC)


def distinct(rows: int, columns: int, *, start: int) -> NDArray[np.uint16]:
    """(row, column): counts up from `start`, never 0."""
    return (1 + (start + np.arange(rows * columns)) % 60000).reshape(rows, columns).astype(np.uint16)


def write_tif(
    path: Path,
    values: NDArray[Any],
    *,
    epsg: int,
    left: float,
    top: float,
    pixel_m: float,
    nodata: float | None,
    block_px: int = 64,
) -> None:
    """One band, tiled, deflate."""
    rows, columns = values.shape
    with rasterio.open(
        path,
        "w",
        driver="GTiff",
        width=columns,
        height=rows,
        count=1,
        dtype=values.dtype,
        crs=f"EPSG:{epsg}",
        transform=from_origin(left, top, pixel_m, pixel_m),
        nodata=nodata,
        tiled=True,
        blockxsize=block_px,
        blockysize=block_px,
        compress="deflate",
    ) as file:
        file.write(values, 1)


def optical_item(
    folder: Path, *, epsg: int, left: int, top: int, side_px: int, offset_dn: int = 0, name: str = "S2"
) -> Item:
    """A scene of `side_px` 10 m pixels with all bands at native resolution and a clear classification, written."""
    item = placed_optical_item(folder, epsg=epsg, left=left, top=top, side_px=side_px, offset_dn=offset_dn, name=name)
    folder.mkdir(parents=True, exist_ok=True)
    for group, bands in NATIVE_GROUPS.items():
        pixel = RESOLUTION_M[group]
        for number, band in enumerate(bands):
            count = side_px * 10 // pixel
            values = distinct(count, count, start=1000 * number + pixel)
            write_tif(Path(item.assets[band]), values, epsg=epsg, left=left, top=top, pixel_m=pixel, nodata=0)
    clear = np.full((side_px // 2,) * 2, 4, np.uint8)
    write_tif(Path(item.assets["SCL"]), clear, epsg=epsg, left=left, top=top, pixel_m=20, nodata=0)
    return item


def placed_optical_item(
    folder: Path, *, epsg: int, left: int, top: int, side_px: int, offset_dn: int = 0, name: str = "S2"
) -> Item:
    """The item of `optical_item`, without its files."""
    bands = [*(band for bands in NATIVE_GROUPS.values() for band in bands), "SCL"]
    assets = {band: str(folder / f"{name}_{band}.tif") for band in bands}
    baseline = "04.00" if offset_dn else "03.01"
    return _item("optical", name, epsg, left, top, side_px, assets, offset_dn=offset_dn, baseline=baseline)


def radar_item(folder: Path, *, epsg: int, left: int, top: int, side_px: int, name: str = "S1") -> Item:
    """A scene of linear gamma0 that falls from pixel to pixel, written."""
    item = placed_radar_item(folder, epsg=epsg, left=left, top=top, side_px=side_px, name=name)
    folder.mkdir(parents=True, exist_ok=True)
    for number, band in enumerate(RADAR_BANDS):
        values = (distinct(side_px, side_px, start=500 * number).astype(np.float32) / 1e5).astype(np.float32)
        write_tif(Path(item.assets[band]), values, epsg=epsg, left=left, top=top, pixel_m=10, nodata=-32768)
    return item


def placed_radar_item(folder: Path, *, epsg: int, left: int, top: int, side_px: int, name: str = "S1") -> Item:
    """The item of `radar_item`, without its files."""
    assets = {band: str(folder / f"{name}_{band}.tif") for band in RADAR_BANDS}
    return _item("radar", name, epsg, left, top, side_px, assets, datetime=MOMENT + timedelta(hours=5))


def _item(
    sensor: str, name: str, epsg: int, left: int, top: int, side_px: int, assets: dict[str, str], **more: Any
) -> Item:
    values: dict[str, Any] = {
        "id": name,
        "collection": sensor,
        "sensor": sensor,
        "datetime": MOMENT,
        "epsg": epsg,
        "footprint": utm_box_lonlat(epsg, (left, top - side_px * 10, left + side_px * 10, top)),
        "assets": assets,
        "platform": f"{sensor}-a",
        "relative_orbit": 1,
        "orbit_state": "descending",
        "absolute_orbit": 41_475,
        **more,
    }
    return Item(**values)
