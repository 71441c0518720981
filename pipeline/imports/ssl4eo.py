"""SSL4EO-S12 as first released: GeoTIFFs in `s1`, `s2a` and `s2c`, a folder per place, in it one per scene.

The two sensors, and the bands of 10, 20 and 60 m, were each cut out of their own UTM grid around the place's centre.
Their headers were made afterwards, by stretching the place's box in degrees over the pixels of each file: they put
radar pixels 3 to 5 px from where they are, with an error that changes across the chip. So pixels are taken as they
lie, row by row and column by column, as the dataset's own loader stacks them: on real chips the sensors then agree
within 2 px everywhere, and nothing is resampled. Bands of 60 m lie off the others in this release, by 4 to 5 px of
10 m on the same chips; that is kept as it is, and as CROMA was trained on it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.bands import NATIVE_GROUPS, RADAR_BANDS
from pipeline.imports.rasters import each_alone, located, read_single_bands, to_optical, to_radar
from pipeline.imports.samples import Choices, Found, Look, NotTaken, Reading, Sample, found, pair_looks
from pipeline.layout import Layout
from pipeline.types import ChipArrays

_OPTICAL_FOLDERS = {"l2a": "s2a", "l1c": "s2c"}
_RADAR_FOLDER = "s1"


def layout(choices: Choices) -> Layout:
    """264 px on native grids."""
    return Layout(
        side_px=264,
        has_optical=choices.optical,
        has_radar=choices.radar,
        optical_level=choices.level,
        has_classes=False,
        radar_product="sigma0_grd",
        grid=None,
    )


def find(folder: Path, choices: Choices) -> Found:
    """A sample per optical scene with its radar scene."""
    optical_folder = folder / _OPTICAL_FOLDERS[choices.level]
    wanted = ([optical_folder] if choices.optical else []) + ([folder / _RADAR_FOLDER] if choices.radar else [])
    missing = [path.name for path in wanted if not path.is_dir()]
    if missing:
        raise ValueError(
            f"{folder} has no folder {' and no folder '.join(missing)}: expected s1, s2a, s2c of SSL4EO-S12"
        )
    places = sorted({path.name for path in wanted[0].iterdir() if path.is_dir()})
    return found(entry for place in places for entry in _of_place(folder, place, choices))


def read(folder: Path, samples: Sequence[Sample], layout: Layout) -> Iterator[Reading]:
    """Each scene's files; see the module for how they are laid on each other."""
    return each_alone(_read_one, folder, samples, layout)


def _of_place(folder: Path, place: str, choices: Choices) -> Iterator[Sample | NotTaken]:
    optical = _looks(folder, f"{_OPTICAL_FOLDERS[choices.level]}/{place}", start_field=0) if choices.optical else []
    radar = _looks(folder, f"{_RADAR_FOLDER}/{place}", start_field=4) if choices.radar else []
    pairs: list[tuple[Look | None, Look | None]]
    if choices.optical and choices.radar:
        matched, not_taken = pair_looks(optical, radar, choices)
        yield from not_taken
        pairs = [*matched]
    else:
        pairs = [(look, None) for look in optical] or [(None, look) for look in radar]
    for number, (optical_look, radar_look) in enumerate(pairs):
        yield _sample(folder, f"{place}/{number}", optical_look, radar_look)


def _looks(folder: Path, below: str, *, start_field: int) -> list[Look]:
    scenes = sorted(path.name for path in (folder / below).glob("*") if path.is_dir())
    return [
        Look(
            path=f"{below}/{scene}",
            datetime=datetime.strptime(scene.split("_")[start_field], "%Y%m%dT%H%M%S").replace(tzinfo=UTC),
        )
        for scene in scenes
    ]


def _sample(folder: Path, name: str, optical: Look | None, radar: Look | None) -> Sample:
    said: dict[str, Any] = {"files": {}}
    if radar is not None:
        metadata = _metadata(folder / radar.path)
        said["files"]["radar"] = radar.path
        if optical is None:
            said |= located(folder / radar.path / "VV.tif")
        said |= {
            "radar_id": Path(radar.path).name,
            "radar_datetime": radar.datetime,
            "orbit_state": str(metadata.get("orbitProperties_pass", "")).lower(),
            "relative_orbit": metadata.get("relativeOrbitNumber_start"),
        }
    if optical is not None:
        metadata = _metadata(folder / optical.path)
        baseline = str(metadata.get("PROCESSING_BASELINE", ""))
        said["files"]["optical"] = optical.path
        said |= located(folder / optical.path / "B2.tif") | {
            "optical_id": str(metadata.get("PRODUCT_ID", Path(optical.path).name)),
            "optical_datetime": optical.datetime,
            "baseline": baseline,
            # The release is of 2020 and 2021, before the offset came; what was fetched again later may have it.
            "offset_dn": 1000 if baseline >= "04.00" else 0,
        }
    return Sample(name=name, **said)


def _metadata(scene: Path) -> dict[str, Any]:
    """What Earth Engine said of a scene; empty where that was not kept."""
    try:
        content = json.loads((scene / "metadata.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _read_one(folder: Path, sample: Sample, layout: Layout) -> ChipArrays:
    chip: ChipArrays = {}
    if layout.has_optical:
        scene = folder / sample.files["optical"]
        for group, bands in NATIVE_GROUPS.items():
            raster = read_single_bands([scene / f"{_file_band(band)}.tif" for band in bands])
            chip[group] = to_optical(raster.pixels, offset_dn=sample.offset_dn, what=f"{sample.name} {group}")
    if layout.has_radar:
        scene = folder / sample.files["radar"]
        raster = read_single_bands([scene / f"{band}.tif" for band in RADAR_BANDS])
        chip["radar"] = to_radar(raster.pixels, what=f"{sample.name} radar")
    return chip


def _file_band(band: str) -> str:
    """As Earth Engine writes it: B2 for B02."""
    return f"B{band[1:].lstrip('0')}"
