"""Sen1Floods11's hand-labelled chips: 512 px of Sentinel-1 GRD, Sentinel-2 Level-1C and water, on one grid in degrees.

A pixel has 8.98e-5 degrees, 10 m from north to south and less from west to east away from the equator; chips are taken
as they are, and their `crs` and `transform` say so.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import numpy as np

from pipeline.bands import RADAR_BANDS
from pipeline.imports.rasters import (
    each_alone,
    located,
    optical_groups,
    radar_array,
    read_raster,
    same_grid,
    to_optical,
)
from pipeline.imports.samples import (
    Choices,
    Found,
    NotTaken,
    Reading,
    Sample,
    found,
    read_split_lists,
    with_splits,
)
from pipeline.layout import LABEL_NODATA, Layout
from pipeline.types import ChipArrays, ChipError

OPTICAL_BANDS: Final = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B10", "B11", "B12")
WATER: Final = {0: "not water", 1: "water"}

_ROLES: Final = {"radar": "S1Hand", "optical": "S2Hand", "label": "LabelHand"}
# The event that the dataset keeps apart, Bolivia, is a second test: its chips are told by their names.
_SPLIT_LISTS: Final = {
    "train": ("flood_train_data.csv",),
    "val": ("flood_valid_data.csv",),
    "test": ("flood_test_data.csv", "flood_bolivia_data.csv"),
}
_METADATA: Final = "Sen1Floods11_Metadata.geojson"


def layout(choices: Choices) -> Layout:
    """512 px, water per pixel."""
    return Layout(
        side_px=512,
        has_optical=choices.optical,
        has_radar=choices.radar,
        optical_level="l1c",
        optical_grid="10m",
        radar_product="sigma0_grd",
        grid=None,
        labels={"flood": WATER},
    )


def find(folder: Path, choices: Choices) -> Found:
    """A sample per labelled chip that has the sensors asked for."""
    files: dict[str, dict[str, str]] = {}
    for role, ending in _ROLES.items():
        for path in folder.rglob(f"*_{ending}.tif"):
            files.setdefault(path.stem.removesuffix(f"_{ending}"), {})[role] = path.relative_to(folder).as_posix()
    if not files:
        raise ValueError(f"{folder} holds no Sen1Floods11: expected <event>_<number>_S1Hand.tif and _LabelHand.tif")
    events = _events(folder)
    splits = read_split_lists(folder, choices, _SPLIT_LISTS, key=lambda entry: entry.rpartition("_")[0] or entry)
    samples = [_sample(folder, name, files[name], events, choices) for name in sorted(files)]
    taken = with_splits((sample for sample in samples if isinstance(sample, Sample)), splits)
    return found([*taken, *(entry for entry in samples if isinstance(entry, NotTaken))])


def read(folder: Path, samples: Sequence[Sample], layout: Layout) -> Iterator[Reading]:
    """Each chip; NaN becomes no data, label -1 missing, B10 is left out."""
    return each_alone(_read_one, folder, samples, layout)


def _events(folder: Path) -> dict[str, dict[str, Any]]:
    """What the dataset's table says of each flood, by its name in small letters; empty where there is no table."""
    tables = sorted(folder.rglob(_METADATA))
    if not tables:
        return {}
    features = json.loads(tables[0].read_bytes())["features"]
    return {str(each["properties"]["location"]).lower(): each["properties"] for each in features}


def _sample(
    folder: Path, name: str, files: Mapping[str, str], events: Mapping[str, Mapping[str, Any]], choices: Choices
) -> Sample | NotTaken:
    needed = (["optical"] if choices.optical else []) + (["radar"] if choices.radar else []) + ["label"]
    for role in needed:
        if role not in files:
            return NotTaken(name=name, reason=f"no_{role}")
    event = events.get(name.partition("_")[0].lower(), {})
    orbit = event.get("rel_orbit_num")
    return Sample(
        name=name,
        files={role: files[role] for role in needed},
        optical_id=f"{name}_S2Hand" if choices.optical else "",
        radar_id=f"{name}_S1Hand" if choices.radar else "",
        optical_datetime=_day(event.get("s2_date")) if choices.optical else None,
        radar_datetime=_day(event.get("s1_date")) if choices.radar else None,
        orbit_state=str(event.get("orbit", "")).lower() if choices.radar else "",
        relative_orbit=int(orbit) if orbit is not None and choices.radar else None,
        **located(folder / files["label"]),
    )


def _day(date: str | None) -> datetime | None:
    return datetime.strptime(date, "%Y/%m/%d").replace(tzinfo=UTC) if date else None


def _read_one(folder: Path, sample: Sample, layout: Layout) -> ChipArrays:
    paths = {role: folder / file for role, file in sample.files.items()}
    rasters = {role: read_raster(path) for role, path in paths.items()}
    for role, raster in rasters.items():
        same_grid(paths[role], raster.grid, rasters["label"].grid)
    chip: ChipArrays = {"label_flood": _water(rasters["label"].pixels[0], paths["label"].name)}
    if layout.has_optical:
        pixels = rasters["optical"].pixels
        _expect_bands(paths["optical"], pixels, len(OPTICAL_BANDS))
        chip |= optical_groups(to_optical(pixels, offset_dn=0, what=paths["optical"].name), OPTICAL_BANDS)
    if layout.has_radar:
        _expect_bands(paths["radar"], rasters["radar"].pixels, len(RADAR_BANDS))
        chip |= radar_array(rasters["radar"].pixels, RADAR_BANDS, what=paths["radar"].name)
    return chip


def _expect_bands(path: Path, pixels: Any, count: int) -> None:
    if len(pixels) != count:
        raise ChipError(f"{path.name}: {len(pixels)} bands where {count} are expected")


def _water(label: Any, what: str) -> Any:
    codes = np.unique(label)
    if not set(codes.tolist()) <= {-1, 0, 1}:
        raise ChipError(f"{what}: labels {codes.tolist()[:5]} where -1, 0 and 1 are expected")
    return np.where(label < 0, LABEL_NODATA, label).astype(np.uint8)
