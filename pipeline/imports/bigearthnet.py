"""BigEarthNet, first and second release: patches of 120 px on native grids, with land cover of 19 classes.

The first release has a folder per patch with its labels of 43 classes beside the bands; the radar patch names its
optical one. The second has patches below their tiles, and one table that names pairs, labels and splits. Radar is
kept as decibel with two decimals: the usual reader cuts it to whole decibels.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import pyarrow.parquet as pq

from pipeline.bands import NATIVE_GROUPS, OPTICAL_BANDS, RADAR_BANDS
from pipeline.imports.rasters import each_alone, located, read_single_bands, same_grid, to_optical, to_radar
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
from pipeline.layout import Layout
from pipeline.types import ChipArrays

CLASSES: Final = (
    "Urban fabric",
    "Industrial or commercial units",
    "Arable land",
    "Permanent crops",
    "Pastures",
    "Complex cultivation patterns",
    "Land principally occupied by agriculture, with significant areas of natural vegetation",
    "Agro-forestry areas",
    "Broad-leaved forest",
    "Coniferous forest",
    "Mixed forest",
    "Natural grassland and sparsely vegetated areas",
    "Moors, heathland and sclerophyllous vegetation",
    "Transitional woodland, shrub",
    "Beaches, dunes, sands",
    "Inland wetlands",
    "Coastal wetlands",
    "Inland waters",
    "Marine waters",
)
"""In the order of their codes."""

CLASS_OF_43: Final[Mapping[str, int | None]] = {
    "Continuous urban fabric": 0,
    "Discontinuous urban fabric": 0,
    "Industrial or commercial units": 1,
    "Road and rail networks and associated land": None,
    "Port areas": None,
    "Airports": None,
    "Mineral extraction sites": None,
    "Dump sites": None,
    "Construction sites": None,
    "Green urban areas": None,
    "Sport and leisure facilities": None,
    "Non-irrigated arable land": 2,
    "Permanently irrigated land": 2,
    "Rice fields": 2,
    "Vineyards": 3,
    "Fruit trees and berry plantations": 3,
    "Olive groves": 3,
    "Annual crops associated with permanent crops": 3,
    "Pastures": 4,
    "Complex cultivation patterns": 5,
    "Land principally occupied by agriculture, with significant areas of natural vegetation": 6,
    "Agro-forestry areas": 7,
    "Broad-leaved forest": 8,
    "Coniferous forest": 9,
    "Mixed forest": 10,
    "Natural grassland": 11,
    "Sparsely vegetated areas": 11,
    "Moors and heathland": 12,
    "Sclerophyllous vegetation": 12,
    "Transitional woodland/shrub": 13,
    "Beaches, dunes, sands": 14,
    "Bare rock": None,
    "Burnt areas": None,
    "Inland marshes": 15,
    "Peatbogs": 15,
    "Salt marshes": 16,
    "Salines": 16,
    "Intertidal flats": None,
    "Water courses": 17,
    "Water bodies": 17,
    "Coastal lagoons": 18,
    "Estuaries": 18,
    "Sea and ocean": 18,
}
"""CORINE's classes of the third level -> their class of 19; None where they have none."""

LABEL: Final = "bigearthnet"

_OPTICAL_FOLDERS: Final = ("BigEarthNet-v1.0", "BigEarthNet-S2", "s2")
_RADAR_FOLDERS: Final = ("BigEarthNet-S1-v1.0", "BigEarthNet-S1", "s1")
_TABLE: Final = "metadata.parquet"
_SPLIT_LISTS: Final = {split: (f"bigearthnet-{split}.csv", f"{split}.csv") for split in ("train", "val", "test")}
_BASELINE: Final = re.compile(r"_N(\d{2})(\d{2})_")


def layout(choices: Choices) -> Layout:
    """120 px on native grids."""
    return Layout(
        side_px=120,
        has_optical=choices.optical,
        has_radar=choices.radar,
        optical_level="l2a",
        has_classes=False,
        radar_product="sigma0_grd",
        grid=None,
        chip_labels={LABEL: dict(enumerate(CLASSES))},
    )


def find(folder: Path, choices: Choices) -> Found:
    """A sample per patch that has the sensors asked for; its labels are those of the optical patch."""
    optical = _patches(folder, _OPTICAL_FOLDERS) if choices.optical else {}
    radar = _patches(folder, _RADAR_FOLDERS) if choices.radar else {}
    if not (optical or radar):
        _refuse(folder)
    table = _table(folder)
    radar_of = _partners(folder, radar, table)
    entries: list[Sample | NotTaken]
    if choices.optical:
        entries = [
            _sample(folder, name, path, radar_of.get(name), table, choices) for name, path in sorted(optical.items())
        ]
        alone = radar.keys() - {radar_of[name][0] for name in optical if name in radar_of}
        entries += [NotTaken(name=name, reason="no_optical") for name in sorted(alone)]
    else:
        entries = [_sample(folder, name, None, (name, path), table, choices) for name, path in sorted(radar.items())]
    splits = _splits(folder, choices, table)
    taken = with_splits((entry for entry in entries if isinstance(entry, Sample)), splits)
    return found([*taken, *(entry for entry in entries if isinstance(entry, NotTaken))])


def read(folder: Path, samples: Sequence[Sample], layout: Layout) -> Iterator[Reading]:
    """Each patch."""
    return each_alone(_read_one, folder, samples, layout)


def _patches(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """Patch name -> its folder, below the first of the folders that is there; patches may lie below tiles or scenes."""
    for top in (folder / name for name in names):
        if top.is_dir():
            patches = [patch for path in _folders(top) for patch in _folders(path) or [path]]
            return {path.name: path.relative_to(folder).as_posix() for path in patches}
    return {}


def _folders(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_dir()]


def _refuse(folder: Path) -> None:
    if any(folder.glob("*/s2.tif")):
        raise ValueError(
            f"{folder} holds patches that were repacked as s2.tif with some of the bands: all {len(OPTICAL_BANDS)} are "
            "needed, and missing ones cannot be made up; import the release of the authors"
        )
    expected = ", ".join(_OPTICAL_FOLDERS + _RADAR_FOLDERS)
    raise ValueError(f"{folder} holds no BigEarthNet: expected one of the folders {expected}")


def _table(folder: Path) -> dict[str, dict[str, Any]]:
    """The second release's table by optical patch; empty for the first."""
    path = folder / _TABLE
    if not path.is_file():
        return {}
    columns = ["patch_id", "labels", "split", "s1_name"]
    return {row["patch_id"]: row for row in pq.read_table(path, columns=columns).to_pylist()}


def _partners(
    folder: Path, radar: Mapping[str, str], table: Mapping[str, Mapping[str, Any]]
) -> dict[str, tuple[str, str]]:
    """Optical patch -> name and folder of its radar patch."""
    if table:
        return {name: (row["s1_name"], radar[row["s1_name"]]) for name, row in table.items() if row["s1_name"] in radar}
    partners = {}
    for name, path in sorted(radar.items()):
        said = _json(folder / path / f"{name}_labels_metadata.json")
        if "corresponding_s2_patch" in said:
            partners[said["corresponding_s2_patch"]] = (name, path)
    return partners


def _splits(folder: Path, choices: Choices, table: Mapping[str, Mapping[str, Any]]) -> dict[str, str] | None:
    official = {name: "val" if row["split"] == "validation" else str(row["split"]) for name, row in table.items()}
    return official or read_split_lists(folder, choices, _SPLIT_LISTS, key=lambda entry: entry)


def _sample(
    folder: Path,
    name: str,
    optical: str | None,
    radar: tuple[str, str] | None,
    table: Mapping[str, Mapping[str, Any]],
    choices: Choices,
) -> Sample | NotTaken:
    said: dict[str, Any] = {"files": {}}
    labels: Sequence[str] | None = None
    if choices.radar:
        if radar is None:
            return NotTaken(name=name, reason="no_radar")
        radar_name, path = radar
        metadata = _json(folder / path / f"{radar_name}_labels_metadata.json")
        labels = metadata.get("labels")
        said["files"]["radar"] = path
        if optical is None:
            said |= located(_file(folder / path, f"{radar_name}_VV"))
        said |= {"radar_id": radar_name, "radar_datetime": _moment(radar_name.split("_")[4])}
    if optical is not None:
        metadata = _json(folder / optical / f"{name}_labels_metadata.json")
        labels = table[name]["labels"] if name in table else metadata.get("labels", labels)
        said["files"]["optical"] = optical
        said |= located(_file(folder / optical, f"{name}_B02"))
        baseline = _BASELINE.search(str(metadata.get("tile_source", "")))
        said |= {
            "optical_id": name,
            "optical_datetime": _moment(name.split("_")[2]),
            # All were processed to Level-2A by the dataset's authors, before the offset came.
            "baseline": ".".join(baseline.groups()) if baseline else "",
        }
    return Sample(name=name, labels={LABEL: None if labels is None else to_codes(labels, name)}, **said)


def to_codes(labels: Sequence[str], name: str) -> list[int]:
    """Codes of 19 classes, ascending, from names of 19 or 43; classes that have none are left out.

    Raises:
        ValueError: A name is of neither.
    """
    unknown = [label for label in labels if label not in CLASS_OF_43 and label not in CLASSES]
    if unknown:
        raise ValueError(f"{name}: {unknown[0]!r} is no class of BigEarthNet")
    codes = (CLASSES.index(label) if label in CLASSES else CLASS_OF_43[label] for label in labels)
    return sorted({code for code in codes if code is not None})


def _moment(text: str) -> datetime | None:
    """Some names of the first release lack leading zeros of the hour: 20170924T93021."""
    day, _, time = text.partition("T")
    try:
        return datetime.strptime(f"{day}T{time.zfill(6)}", "%Y%m%dT%H%M%S").replace(tzinfo=UTC)
    except ValueError:
        return None


def _json(path: Path) -> dict[str, Any]:
    """A patch's file of facts; empty where there is none or it is damaged."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _file(folder: Path, name: str) -> Path:
    """A band's file; some copies spell the ending in full."""
    full = folder / f"{name}.tiff"
    return full if full.is_file() else folder / f"{name}.tif"


def _read_one(folder: Path, sample: Sample, layout: Layout) -> ChipArrays:
    chip: ChipArrays = {}
    grid = None
    if layout.has_optical:
        for group, bands in NATIVE_GROUPS.items():
            paths = [_file(folder / sample.files["optical"], f"{sample.optical_id}_{band}") for band in bands]
            raster = read_single_bands(paths)
            chip[group] = to_optical(raster.pixels, offset_dn=sample.offset_dn, what=f"{sample.name} {group}")
            grid = grid or raster.grid
    if layout.has_radar:
        paths = [_file(folder / sample.files["radar"], f"{sample.radar_id}_{band}") for band in RADAR_BANDS]
        raster = read_single_bands(paths)
        if grid is not None:
            same_grid(paths[0], raster.grid, grid)
        chip["radar"] = to_radar(raster.pixels, what=f"{sample.name} radar")
    return chip
