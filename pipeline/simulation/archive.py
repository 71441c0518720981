"""Write a simulated archive: rasters, items and collections in a directory that any STAC server can serve.

```
<directory>/archive.json                    what it is: profile, seed, version of the simulator
<directory>/collections/<collection>.json
<directory>/items/<collection>.json         one feature collection each; asset hrefs are absolute paths
<directory>/<collection>/<item>/<band>.tif
```
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import shutil
import time
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import lru_cache
from pathlib import Path

import numpy as np

from pipeline.simulation.cog import write_cog
from pipeline.simulation.frame import Frame, Ground, Plane
from pipeline.simulation.items import (
    Json,
    asset_bands,
    collection_of,
    label_item,
    optical_item,
    radar_item,
    resolution_m,
)
from pipeline.simulation.landcover import CODES, Land, cover_at, survey
from pipeline.simulation.optical import OpticalConditions, bands_of
from pipeline.simulation.profiles import Profile
from pipeline.simulation.radar import NODATA, RadarConditions, backscatter_of
from pipeline.simulation.scenes import LabelScene, OpticalScene, RadarScene, Scene, sun_position
from pipeline.simulation.stac_collections import collections

SIMULATOR_VERSION = 3
"""Raise with every change of the pixels or items: an archive of another version is not reused."""

MARKER = "archive.json"

logger = logging.getLogger(__name__)


def is_complete(directory: Path, profile: Profile, *, seed: int) -> bool:
    """Whether a directory holds exactly this archive."""
    try:
        found = json.loads((directory / MARKER).read_text())
    except FileNotFoundError:
        return False
    return bool(found == _identity(profile, seed))


def write_archive(directory: Path, profile: Profile, *, seed: int = 0, processes: int = 1) -> None:
    """Write an archive, or leave a complete one as it is.

    Everything is written beside the directory and moved into place at the end: the directory either holds a whole
    archive or does not exist (or is empty).

    Args:
        directory: Where the archive will lie; the items name it in their hrefs.
        profile: What to simulate.
        seed: Decides every pixel.
        processes: How many scenes are made at the same time.

    Raises:
        ValueError: The directory holds something else.
    """
    directory = directory.resolve()
    if is_complete(directory, profile, seed=seed):
        logger.info("%s holds this archive already", directory)
        return
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"{directory} is not empty and holds no archive of profile {profile.name}, seed {seed}")
    unfinished = directory.with_name(f".{directory.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    items = sorted(_write_scenes(unfinished, directory, profile, seed, processes), key=lambda item: str(item["id"]))
    write_catalog(unfinished, items)
    (unfinished / MARKER).write_text(json.dumps(_identity(profile, seed), indent=1))
    unfinished.replace(directory)


def write_scene(scene: Scene, directory: Path, *, seed: int, served_from: Path | None = None) -> Json:
    """Write the rasters of one scene.

    Args:
        scene: What to simulate.
        directory: Archive to write into.
        seed: Of the archive.
        served_from: Where the archive will lie in the end, if elsewhere.

    Returns:
        Its item.
    """
    place = f"{collection_of(scene)}/{scene.id}"
    files = {band: directory / place / f"{band}.tif" for band in asset_bands(scene)}
    hrefs = {band: (served_from or directory) / place / f"{band}.tif" for band in files}
    match scene:
        case OpticalScene():
            return _write_optical(scene, files, hrefs, seed)
        case RadarScene():
            return _write_radar(scene, files, hrefs, seed)
        case LabelScene():
            return _write_labels(scene, files, hrefs, seed)


def _write_scenes(unfinished: Path, directory: Path, profile: Profile, seed: int, processes: int) -> Iterator[Json]:
    started = time.monotonic()
    # Large scenes first, so that the last one to finish is small.
    scenes = sorted(profile.scenes, key=lambda scene: -scene.frame.width_px * scene.frame.height_px)
    for done, item in enumerate(_items(scenes, unfinished, directory, seed, processes), 1):
        logger.info("%d of %d scenes, %.0f s: %s", done, len(scenes), time.monotonic() - started, item["id"])
        yield item


def _items(scenes: list[Scene], unfinished: Path, directory: Path, seed: int, processes: int) -> Iterator[Json]:
    if processes == 1:
        for scene in scenes:
            yield write_scene(scene, unfinished, seed=seed, served_from=directory)
        return
    # Spawned, because a fork of a process with threads (Ray, GDAL) may hang.
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        tasks = [pool.submit(write_scene, scene, unfinished, seed=seed, served_from=directory) for scene in scenes]
        for task in as_completed(tasks):
            yield task.result()


def _write_optical(scene: OpticalScene, files: dict[str, Path], hrefs: dict[str, Path], seed: int) -> Json:
    frame, plane = scene.frame, scene.ground.plane
    lon, lat = frame.footprint().centroid.coords[0]
    zenith, azimuth = sun_position(scene.sensed, lon, lat)
    conditions = OpticalConditions(
        season_day=_season_day(scene),
        cloud_fraction=scene.cloud_fraction,
        sun_zenith_deg=zenith,
        sun_azimuth_deg=azimuth,
        offset_dn=scene.offset_dn,
        seed=_derived(seed, scene.platform, scene.sensed.isoformat()),
    )
    coarse = frame.coarser(6)
    valid = np.ones((coarse.height_px, coarse.width_px), np.bool_)
    if scene.swath:
        valid &= scene.swath.holds(coarse, plane)
    bands, classes = bands_of(
        _land_under(frame, scene.ground, seed),
        frame,
        plane,
        conditions,
        valid=valid,
        noise_seed=_derived(seed, scene.id),
    )
    for band, pixels in bands.items():
        write_cog(files[band], pixels, frame.coarser(resolution_m(band) // 10), nodata=0)
    write_cog(files["SCL"], classes, frame.coarser(2), nodata=0, classes=True)
    return optical_item(scene, hrefs, classes)


def _write_radar(scene: RadarScene, files: dict[str, Path], hrefs: dict[str, Path], seed: int) -> Json:
    frame, plane = scene.frame, scene.ground.plane
    conditions = RadarConditions(
        season_day=_season_day(scene),
        ascending=scene.ascending,
        incidence_deg=scene.incidence_deg,
        seed=_derived(seed, scene.id),
    )
    valid = np.ones((frame.height_px, frame.width_px), np.bool_)
    if scene.swath:
        valid &= scene.swath.holds(frame, plane)
    bands = backscatter_of(_land_under(frame, scene.ground, seed), frame, plane, conditions, valid=valid)
    for band, pixels in bands.items():
        write_cog(files[band], pixels, frame, nodata=NODATA)
    return radar_item(scene, hrefs)


def _write_labels(scene: LabelScene, files: dict[str, Path], hrefs: dict[str, Path], seed: int) -> Json:
    x_m, y_m = np.broadcast_arrays(*scene.frame.on_plane(scene.ground.plane))
    cover, _ = cover_at(x_m, y_m, seed=_land_seed(seed, scene.ground.plane))
    write_cog(files["map"], CODES[cover], scene.frame, nodata=0, classes=True)
    return label_item(scene, hrefs["map"])


def _land_under(frame: Frame, ground: Ground, seed: int) -> Land:
    """The landscape; scenes in the ground's own projection share one survey, of which each takes its window."""
    land_seed = _land_seed(seed, ground.plane)
    if frame.epsg != ground.plane.epsg:
        return _survey(frame, ground.plane, land_seed)
    row, column = ground.offset_of(frame)
    return _survey(ground.frame, ground.plane, land_seed).window(row, column, frame.height_px, frame.width_px)


@lru_cache(maxsize=2)
def _survey(frame: Frame, plane: Plane, land_seed: int) -> Land:
    return survey(frame, plane, seed=land_seed)


def write_catalog(directory: Path, items: Iterable[Json]) -> None:
    """Write the collections and the items as the files that a server is given."""
    features = list(items)
    for folder in ("collections", "items"):
        (directory / folder).mkdir(parents=True)
    for collection in collections():
        own = [item for item in features if item["collection"] == collection["id"]]
        name = f"{collection['id']}.json"
        (directory / "collections" / name).write_text(json.dumps(collection, indent=1))
        (directory / "items" / name).write_text(json.dumps({"type": "FeatureCollection", "features": own}, indent=1))


def _identity(profile: Profile, seed: int) -> Json:
    return {
        "profile": profile.name,
        "seed": seed,
        "simulator_version": SIMULATOR_VERSION,
        "scenes": sorted(scene.id for scene in profile.scenes),
    }


def _season_day(scene: OpticalScene | RadarScene) -> int:
    """Day of the northern year with the same season."""
    return scene.sensed.timetuple().tm_yday + (0 if scene.frame.epsg < 32700 else 182)


def _land_seed(seed: int, plane: Plane) -> int:
    return _derived(seed, str(plane.epsg))


def _derived(seed: int, *names: str) -> int:
    """A seed of one's own for something named, below 2^31."""
    return zlib.crc32("/".join((str(seed), *names)).encode()) & 0x7FFFFFFF
