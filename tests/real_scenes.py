"""Real Sentinel pixels as an archive: items and COGs that a STAC server serves like any other.

The samples lie off every grid, so their corners are moved onto the grid of 1200 m cells (nothing is resampled where
bands and sensors share pixels); radar decibels become the linear gamma0 that an archive serves, and the offset of
processing baselines from 04.00 on, which the samples had removed, is put back.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import shapely
from numpy.typing import NDArray
from pyproj import Transformer
from rasterio.warp import Resampling, reproject

from pipeline.bands import OPTICAL_BANDS, RADAR_BANDS
from pipeline.grid import Cell, cells_bounds, cells_covering, origin_northing_m
from pipeline.simulation.archive import write_catalog
from pipeline.simulation.cog import write_cog
from pipeline.simulation.frame import Frame, Ground, Plane
from pipeline.simulation.items import collection_of, optical_item, radar_item, resolution_m
from pipeline.simulation.scenes import OpticalScene, RadarScene, Scene

CELL_M = 1200
"""Side of the cells: chips of 120 px."""

Bbox = tuple[float, float, float, float]
Bands = dict[str, NDArray[np.float32]]
"""Band -> (row, column) at its own resolution: reflectance x 10 000 without offset, or linear gamma0."""

# place -> EPSG code, processing baseline on that date; Sentinel-1 looked from which side
_TERRAMESH = {
    "38D_378R_2_3": (32736, "05.09", True),
    "282D_485L_3_3": (32722, "03.01", False),
    "637U_59R_1_3": (32632, "02.06", False),
}
_SSL4EO_EPSG = 32643


@dataclass(frozen=True, kw_only=True)
class RealArchive:
    """What lies in the directory."""

    directory: Path

    regions: dict[str, Bbox]
    """Place -> west, south, east, north of its whole cells, a little inside their edges."""

    cells: dict[str, list[Cell]]
    """Place -> the cells of 1200 m that its scenes cover whole."""

    periods: dict[str, str]
    """Place -> first and last day of its scenes."""

    pairs_within_3_days: int = 4
    """One Sentinel-1 acquisition within three days of a Sentinel-2 one at each place."""


def write_real_archive(shared_data: Path, directory: Path) -> RealArchive:
    """Write items and COGs of TerraMesh's three example places and of one location of SSL4EO-S12."""
    items: list[dict[str, Any]] = []
    frames: dict[str, Frame] = {}
    days: defaultdict[str, set[str]] = defaultdict(set)
    for place, scene, bands in _scenes(shared_data):
        frames.setdefault(place, scene.frame)
        days[place].add(scene.sensed.date().isoformat())
        items.append(_write(directory, scene, bands))
    write_catalog(directory, items)
    cells = {place: _whole_cells(frame) for place, frame in frames.items()}
    return RealArchive(
        directory=directory,
        cells=cells,
        regions={place: _region(own) for place, own in cells.items()},
        periods={place: f"{min(own)}/{max(own)}" for place, own in days.items()},
    )


def _scenes(shared_data: Path) -> Iterator[tuple[str, Scene, Bands]]:
    for place, (epsg, baseline, ascending) in _TERRAMESH.items():
        yield from _terramesh(shared_data / "terramind-examples" / place, epsg, baseline, ascending)
    yield from _ssl4eo(shared_data / "ssl4eo-s12")


def _terramesh(folder: Path, epsg: int, baseline: str, ascending: bool) -> Iterator[tuple[str, Scene, Bands]]:
    with rasterio.open(folder / "LULC.tif") as land_use:
        optical_time = datetime.fromisoformat(land_use.tags()["datetime"][:19]).replace(tzinfo=UTC)
    with rasterio.open(folder / "S1RTC.tif") as file:
        assert file.crs.to_epsg() == epsg, (folder, file.crs)
        radar_time = datetime.fromisoformat(file.tags()["datetime"][:19]).replace(tzinfo=UTC)
        # Whole 60 m pixels: 222 of the 224; the cell begins 480 m from the corner.
        frame = _moved(file.transform.c, file.transform.f, epsg, size_px=222, before_cell_m=480)
        decibels = file.read()[:, :222, :222]
    with rasterio.open(folder / "S2L2A.tif") as file:
        reflectance = file.read()[:, :222, :222].astype(np.float32)
    native = {band: _block_mean(reflectance[i], resolution_m(band) // 10) for i, band in enumerate(OPTICAL_BANDS)}
    yield folder.name, _optical_scene("S2A", optical_time, baseline, frame), native
    yield folder.name, _radar_scene(radar_time, ascending, frame), _linear(decibels)


def _ssl4eo(folder: Path) -> Iterator[tuple[str, Scene, Bands]]:
    place = "ssl4eo-s12-0000200"
    for scene_folder in sorted((folder / "s2a/0000200").iterdir()):
        about = json.loads((scene_folder / "metadata.json").read_text())
        sensed = datetime.strptime(scene_folder.name[:15], "%Y%m%dT%H%M%S").replace(tzinfo=UTC)
        with rasterio.open(scene_folder / "B2.tif") as file:
            transform, crs = file.transform, file.crs
        to_zone = Transformer.from_crs(4326, _SSL4EO_EPSG, always_xy=True)
        corner = to_zone.transform(transform.c, transform.f)
        frame = _moved(*corner, _SSL4EO_EPSG, size_px=264, before_cell_m=120)
        bands = {band: _read(scene_folder / f"{band.replace('B0', 'B')}.tif") for band in OPTICAL_BANDS}
        yield place, _optical_scene(about["PRODUCT_ID"][:3], sensed, about["PROCESSING_BASELINE"], frame), bands
    for scene_folder in sorted((folder / "s1/0000200").iterdir()):
        sensed = datetime.strptime(scene_folder.name.split("_")[4], "%Y%m%dT%H%M%S").replace(tzinfo=UTC)
        power = np.zeros((2, 264, 264), np.float32)
        for index, band in enumerate(RADAR_BANDS):
            with rasterio.open(scene_folder / f"{band}.tif") as file:
                # The sensors' pixels differ by 0.7 %: brought together as power, not as decibels.
                reproject(
                    10.0 ** (file.read(1) / 10.0), power[index],
                    src_transform=file.transform, src_crs=file.crs, dst_transform=transform, dst_crs=crs,
                    src_nodata=np.nan, dst_nodata=-32768, resampling=Resampling.bilinear,
                )  # fmt: skip
        yield place, _radar_scene(sensed, sensed.hour > 9, frame), dict(zip(RADAR_BANDS, power, strict=True))


def _write(directory: Path, scene: Scene, bands: Bands) -> dict[str, Any]:
    folder = directory / collection_of(scene) / scene.id
    hrefs = {band: folder / f"{band}.tif" for band in bands}
    if isinstance(scene, RadarScene):
        for band, pixels in bands.items():
            write_cog(hrefs[band], pixels, scene.frame, nodata=-32768)
        return radar_item(scene, hrefs)
    assert isinstance(scene, OpticalScene)
    for band, pixels in bands.items():
        coded = np.clip(np.rint(pixels), 1, 65535 - scene.offset_dn).astype(np.uint16) + np.uint16(scene.offset_dn)
        write_cog(hrefs[band], coded, scene.frame.coarser(resolution_m(band) // 10), nodata=0)
    classes = _clear_classes(bands)
    hrefs["SCL"] = folder / "SCL.tif"
    write_cog(hrefs["SCL"], classes, scene.frame.coarser(2), nodata=0, classes=True)
    return optical_item(scene, hrefs, classes)


def _clear_classes(bands: Bands) -> NDArray[np.uint8]:
    """The samples have no scene classification and no clouds: vegetation, bare or water by two thresholds."""
    red, infrared = _block_mean(bands["B04"], 2), bands["B8A"]
    vegetation = (infrared - red) / np.maximum(infrared + red, 1) > 0.4
    return np.where(infrared < 800, 6, np.where(vegetation, 4, 5)).astype(np.uint8)


def _optical_scene(platform: str, sensed: datetime, baseline: str, frame: Frame) -> OpticalScene:
    return OpticalScene(
        platform=platform, sensed=sensed, baseline=baseline, cloud_fraction=0.0, frame=frame, ground=_ground(frame)
    )


def _radar_scene(sensed: datetime, ascending: bool, frame: Frame) -> RadarScene:
    return RadarScene(
        platform="S1A", sensed=sensed, ascending=ascending, incidence_deg=38.0, frame=frame, ground=_ground(frame)
    )


def _ground(frame: Frame) -> Ground:
    return Ground(plane=Plane(epsg=frame.epsg, anchor_x_m=frame.left, anchor_y_m=frame.top), frame=frame)


def _moved(left: float, top: float, epsg: int, *, size_px: int, before_cell_m: int) -> Frame:
    """The nearest frame whose first whole cell begins `before_cell_m` from its upper-left corner."""
    origin = origin_northing_m(epsg)
    return Frame(
        epsg=epsg,
        left=float(round(left / CELL_M) * CELL_M - before_cell_m),
        top=float(origin + round((top - origin) / CELL_M) * CELL_M + before_cell_m),
        resolution=10.0,
        width_px=size_px,
        height_px=size_px,
    )


def _whole_cells(frame: Frame) -> list[Cell]:
    outline = shapely.box(*frame.bounds)
    candidates = cells_covering(frame.footprint(), side_m=CELL_M)
    return [cell for cell in candidates if cell.epsg == frame.epsg and outline.covers(shapely.box(*cell.bounds))]


def _region(cells: list[Cell]) -> Bbox:
    """Inside the outer edges by 90 m, so that it touches these cells and no others."""
    left, bottom, right, top = cells_bounds(cells)
    inner = shapely.box(left + 90, bottom + 90, right - 90, top - 90)
    to_lonlat = Transformer.from_crs(cells[0].epsg, 4326, always_xy=True)
    lonlat = shapely.transform(inner, lambda xy: np.column_stack(to_lonlat.transform(xy[:, 0], xy[:, 1])))
    west, south, east, north = lonlat.bounds
    return west, south, east, north


def _linear(decibels: NDArray[np.float64]) -> Bands:
    power = np.where(np.isfinite(decibels), 10.0 ** (decibels / 10.0), -32768.0).astype(np.float32)
    return dict(zip(RADAR_BANDS, power, strict=True))


def _block_mean(pixels: NDArray[np.float32], step: int) -> NDArray[np.float32]:
    rows, columns = pixels.shape
    return pixels.reshape(rows // step, step, columns // step, step).mean(axis=(1, 3))


def _read(path: Path) -> NDArray[np.float32]:
    with rasterio.open(path) as file:
        pixels: NDArray[np.float32] = file.read(1).astype(np.float32)
        return pixels
