"""SSL4EO-S12 v1.1: zipped Zarr groups of 64 places x 4 dates, all bands on 10 m, both sensors on one UTM grid.

Below `train` and `val` each product has a folder of files with the same names. In this packing reflectance carries an
offset of 1000, as ESA's has from baseline 04.00 on (the later packing as tar files has none): it is taken out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final
from zipfile import BadZipFile

import numpy as np
import xarray as xr
import zarr
from numpy.typing import NDArray
from pyproj import Transformer

from pipeline.imports.rasters import fitting, optical_groups, radar_array, to_optical
from pipeline.imports.samples import Choices, Found, NotTaken, Reading, Sample, Unfit, found
from pipeline.layout import Layout
from pipeline.types import ChipArrays, ChipError

OFFSET_DN: Final = 1000

_OPTICAL_FOLDERS: Final = {"l2a": "S2L2A", "l1c": "S2L1C"}
_RADAR_FOLDER: Final = "S1GRD"
_SPLITS: Final = ("train", "val")
_ENDING: Final = ".zarr.zip"
_DAMAGE: Final = (BadZipFile, OSError, KeyError, ValueError, RuntimeError)
"""What opening or reading a damaged archive raises, depending on where the damage is."""


def layout(choices: Choices) -> Layout:
    """264 px, all bands on 10 m."""
    return Layout(
        side_px=264,
        has_optical=choices.optical,
        has_radar=choices.radar,
        optical_level=choices.level,
        optical_grid="10m",
        radar_product="sigma0_grd",
        grid=None,
    )


def find(folder: Path, choices: Choices) -> Found:
    """A sample per place and date."""
    main = _OPTICAL_FOLDERS[choices.level] if choices.optical else _RADAR_FOLDER
    files = [(split, path) for split in _SPLITS for path in sorted((folder / split / main).glob(f"*{_ENDING}"))]
    if not files:
        raise ValueError(
            f"{folder} holds no SSL4EO-S12 v1.1: expected files *{_ENDING} in train/{main} and val/{main}; tar files "
            "are to be unpacked from the release in Zarr"
        )
    return found(entry for split, path in files for entry in _of_file(folder, split, path.name, choices))


def read(folder: Path, samples: Sequence[Sample], layout: Layout) -> Iterator[Reading]:
    """The places of one file at one date: they are compressed together."""
    pixels = {
        role: list(_pixels(folder / path, [sample.index for sample in samples]))
        for role, path in samples[0].files.items()
    }
    for number, sample in enumerate(samples):
        try:
            yield fitting(_chip(sample, {role: of_role[number] for role, of_role in pixels.items()}), layout)
        except (ChipError, Unfit) as error:
            yield error


def _of_file(folder: Path, split: str, name: str, choices: Choices) -> Iterator[Sample | NotTaken]:
    files = {}
    if choices.optical:
        files["optical"] = f"{split}/{_OPTICAL_FOLDERS[choices.level]}/{name}"
    if choices.radar:
        files["radar"] = f"{split}/{_RADAR_FOLDER}/{name}"
    said = {}
    for role, path in files.items():
        try:
            said[role] = _facts(folder / path)
        except _DAMAGE as error:
            missing = not (folder / path).exists()
            reason = f"no_{role}" if missing else "unreadable"
            yield NotTaken(name=path, reason=reason, detail="is missing" if missing else str(error))
            return
    places = [facts["sample"].tolist() for facts in said.values()]
    if places[0] != places[-1]:
        yield NotTaken(name=name, reason="unreadable", detail="the two sensors' files hold other places")
        return
    facts = next(iter(said.values()))
    for place, row in enumerate(places[0]):
        located = _located(facts, place)
        for date in range(facts["time_"].shape[1]):
            looks: dict[str, Any] = {}
            for role, each in said.items():
                looks[f"{role}_id"] = str(each["file_id"][place, date])
                looks[f"{role}_datetime"] = _utc(each["time_"][place, date])
            yield Sample(
                name=f"{row}_{date}",
                files=files,
                unit=f"{split}/{name}/{date}",
                index=(place, date),
                split=split,
                offset_dn=_offset(choices) if choices.optical else 0,
                **looks,
                **located,
            )


def _offset(choices: Choices) -> int:
    return OFFSET_DN if choices.offset_dn is None else choices.offset_dn


@contextmanager
def _opened(path: Path) -> Iterator[xr.Dataset]:
    store = zarr.storage.ZipStore(path, mode="r")
    # Nothing is read before it is asked for, and then in this process.
    with xr.open_zarr(store, chunks=None) as dataset:
        try:
            yield dataset
        finally:
            store.close()


def _facts(path: Path) -> dict[str, NDArray[Any]]:
    """What a file says of its places and dates; no pixel is read."""
    with _opened(path) as dataset:
        return {name: dataset[name].to_numpy() for name in ("sample", "file_id", "time_", "crs", "x_", "y_")}


def _located(facts: dict[str, NDArray[Any]], place: int) -> dict[str, Any]:
    """From the coordinates of pixel centres."""
    x, y, crs = facts["x_"][place], facts["y_"][place], f"EPSG:{int(facts['crs'][place])}"
    step_x, step_y = float(x[1] - x[0]), float(y[1] - y[0])
    lon, lat = Transformer.from_crs(crs, 4326, always_xy=True).transform(x.mean(), y.mean())
    transform = (step_x, 0.0, float(x[0]) - step_x / 2, 0.0, step_y, float(y[0]) - step_y / 2)
    return {"crs": crs, "transform": transform, "lonlat": (lon, lat)}


def _utc(time: np.datetime64) -> datetime | None:
    if np.isnat(time):
        return None
    return datetime.fromtimestamp(int(time.astype("datetime64[s]").astype(int)), UTC)


_Pixels = tuple[list[str], NDArray[Any]]


def _pixels(path: Path, places: Sequence[tuple[int, ...]]) -> Iterator[_Pixels | ChipError]:
    """Names of the bands and pixels (band, y, x) of some (place, date), all of one date."""
    try:
        with _opened(path) as dataset:
            names = [str(name).upper() for name in dataset["band"].to_numpy()]
            date = places[0][1]
            try:
                whole = dataset["bands"][:, date].to_numpy()
            except _DAMAGE:
                # One damaged chunk must not take those with it that lie in others.
                for place, _ in places:
                    yield _one(dataset, names, place, date, path)
                return
            for place, _ in places:
                yield names, whole[place]
    except _DAMAGE as error:
        for _ in places:
            yield _damaged(path, error)


def _one(dataset: xr.Dataset, names: list[str], place: int, date: int, path: Path) -> _Pixels | ChipError:
    try:
        return names, dataset["bands"][place, date].to_numpy()
    except _DAMAGE as error:
        return _damaged(path, error)


def _damaged(path: Path, error: Exception) -> ChipError:
    return ChipError(f"{path.name}: {'is missing' if not path.exists() else error} ({path.parent})")


def _chip(sample: Sample, pixels: dict[str, _Pixels | ChipError]) -> ChipArrays:
    chip: ChipArrays = {}
    for role, read in pixels.items():
        if isinstance(read, ChipError):
            raise read
        names, bands = read
        if role == "optical":
            what = f"{sample.name} of {sample.files[role]}"
            chip |= optical_groups(to_optical(bands, offset_dn=sample.offset_dn, what=what), names)
        else:
            chip |= radar_array(bands.astype(np.float32), names, what=f"{sample.name} of {sample.files[role]}")
    return chip
