"""EuroSAT: patches of 64 px with all 13 Level-1C bands on one grid of about 10 m, the class in the folder's name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from pipeline.imports.rasters import each_alone, located, optical_groups, read_raster, to_optical
from pipeline.imports.samples import Choices, Found, Reading, Sample, found, read_split_lists, with_splits
from pipeline.layout import Layout
from pipeline.types import ChipArrays, ChipError

CLASSES: Final = (
    "AnnualCrop",
    "Forest",
    "HerbaceousVegetation",
    "Highway",
    "Industrial",
    "Pasture",
    "PermanentCrop",
    "Residential",
    "River",
    "SeaLake",
)
"""In the order of their codes; others count them otherwise, so compare names."""

BANDS: Final = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B09", "B10", "B11", "B12", "B8A")
"""Of a file. B8A is last, against the order of wavelengths that many readers assume."""

_SPLIT_LISTS: Final = {
    split: (f"eurosat-{split}.txt", f"eurosat-spatial-{split}.txt") for split in ("train", "val", "test")
}


def layout(choices: Choices) -> Layout:
    """64 px, optical alone."""
    return Layout(
        side_px=64,
        has_radar=False,
        optical_level="l1c",
        optical_grid="10m",
        grid=None,
        chip_labels={"eurosat": dict(enumerate(CLASSES))},
    )


def find(folder: Path, choices: Choices) -> Found:
    """A sample per file in a folder named as a class, at any depth."""
    if choices.sensors == "radar":
        raise ValueError("sensors=radar: EuroSAT has no radar")
    files = sorted(path for path in folder.rglob("*.tif") if path.parent.name in CLASSES)
    if not files:
        raise ValueError(
            f"{folder} holds no EuroSAT: expected <class>/<class>_<number>.tif, such as Forest/Forest_1.tif"
        )
    splits = read_split_lists(folder, choices, _SPLIT_LISTS, key=lambda entry: Path(entry).stem)
    return found(with_splits((_sample(folder, path) for path in files), splits))


def read(folder: Path, samples: Sequence[Sample], layout: Layout) -> Iterator[Reading]:
    """Each file; B10, which shows cirrus only, is left out."""
    return each_alone(_read_one, folder, samples, layout)


def _sample(folder: Path, path: Path) -> Sample:
    return Sample(
        name=path.stem,
        files={"optical": path.relative_to(folder).as_posix()},
        labels={"eurosat": CLASSES.index(path.parent.name)},
        optical_id=path.stem,
        **located(path),
    )


def _read_one(folder: Path, sample: Sample, layout: Layout) -> ChipArrays:
    path = folder / sample.files["optical"]
    raster = read_raster(path)
    if len(raster.pixels) != len(BANDS):
        raise ChipError(f"{path.name}: {len(raster.pixels)} bands where the {len(BANDS)} of Level-1C are expected")
    return optical_groups(to_optical(raster.pixels, offset_dn=sample.offset_dn, what=path.name), BANDS)
