"""What an import is made of: samples found in a dataset's folder, before any pixel is read."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Literal, Protocol

from pipeline.layout import Layout
from pipeline.types import ChipArrays

Label = int | list[int] | None
"""Of a chip: a code, or several; None where it has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """What to take of a dataset, as far as it offers a choice."""

    sensors: Literal["both", "optical", "radar"] = "both"
    """Samples that lack a sensor asked for are not taken."""

    level: Literal["l2a", "l1c"] = "l2a"
    """Of Sentinel-2, where a dataset has both."""

    pairing: Literal["nearest", "index"] = "nearest"
    """Where a place has several looks: each optical one with the radar one nearest in time, or the n-th with the
    n-th, both in the order of time."""

    max_dt_days: float = 30.0
    """Pairs further apart are not taken."""

    offset_dn: int | None = None
    """What the dataset added to reflectance x 10 000; None: what is known of it."""

    split_lists: str | None = None
    """Folder of the official split lists; None: looked for in the dataset's folder."""

    @property
    def optical(self) -> bool:
        """Whether optical pixels are wanted."""
        return self.sensors != "radar"

    @property
    def radar(self) -> bool:
        """Whether radar pixels are wanted."""
        return self.sensors != "optical"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A chip to be: where its pixels lie, and what its dataset says of it."""

    name: str
    """As the dataset calls it; names are distinct within a dataset."""

    files: Mapping[str, str]
    """Role -> path below the dataset's folder."""

    unit: str = ""
    """Samples of one unit are read together; empty: this one alone."""

    index: tuple[int, ...] = ()
    """Where in the files it lies, if they hold several."""

    optical_id: str = ""
    radar_id: str = ""
    optical_datetime: datetime | None = None
    """UTC."""

    radar_datetime: datetime | None = None
    orbit_state: str = ""
    """Of the radar look: ascending or descending."""

    relative_orbit: int | None = None
    baseline: str = ""
    """Sentinel-2 processing baseline, such as 02.14."""

    offset_dn: int = 0
    """What is in the files beyond reflectance x 10 000."""

    split: str | None = None
    """train, val or test where the dataset says so."""

    lonlat: tuple[float, float] | None = None
    """Of its centre, degrees."""

    crs: str | None = None
    transform: tuple[float, ...] | None = None
    """Six numbers: (column, row) -> (x, y) in the CRS, for pixels of 10 m."""

    labels: Mapping[str, Label] = field(default_factory=dict)
    """Name -> label of the whole chip."""

    @property
    def dt_s(self) -> int | None:
        """Radar time minus optical time, seconds."""
        if self.optical_datetime is None or self.radar_datetime is None:
            return None
        return round((self.radar_datetime - self.optical_datetime).total_seconds())


@dataclass(frozen=True, slots=True, kw_only=True)
class NotTaken:
    """What is in the folder but will not be a chip."""

    name: str
    reason: str
    """no_optical | no_radar | no_label | dt | not_in_split_lists | unreadable."""

    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a folder holds."""

    samples: Sequence[Sample]
    not_taken: Sequence[NotTaken]


class Unfit(Exception):  # noqa: N818  # not an error: the chip is read, and judged
    """A chip is not to be kept; the message is the reason, as the ledger counts it."""


Reading = ChipArrays | Exception
"""A chip, or why there is none: Unfit, or ChipError."""


class Source(Protocol):
    """What a dataset's module offers."""

    def layout(self, choices: Choices) -> Layout:
        """Of the store; shard and codec are the importer's."""

    def find(self, folder: Path, choices: Choices) -> Found:
        """All samples of a folder.

        Raises:
            ValueError: The folder does not hold this dataset; says what was expected.
        """

    def read(self, folder: Path, samples: Sequence[Sample], layout: Layout) -> Iterator[Reading]:
        """The pixels of one unit, in the order of its samples; never raises for what a file holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """One scene of one sensor over a place."""

    path: str
    """Below the dataset's folder."""

    datetime: datetime


def pair_looks(
    optical: Sequence[Look], radar: Sequence[Look], choices: Choices
) -> tuple[list[tuple[Look, Look]], list[NotTaken]]:
    """Which radar look goes with each optical look of a place; of two equally near the earlier."""
    optical, radar = sorted(optical, key=_time), sorted(radar, key=_time)
    pairs, not_taken = [], []
    for number, look in enumerate(optical):
        if choices.pairing == "index":
            other = radar[number] if number < len(radar) else None
        else:
            other = min(radar, key=lambda each: abs(each.datetime - look.datetime), default=None)
        if other is None:
            not_taken.append(NotTaken(name=look.path, reason="no_radar"))
        elif abs(other.datetime - look.datetime) > timedelta(days=choices.max_dt_days):
            days = abs(other.datetime - look.datetime).total_seconds() / 86400
            not_taken.append(NotTaken(name=look.path, reason="dt", detail=f"{days:.1f} days to {other.path}"))
        else:
            pairs.append((look, other))
    return pairs, not_taken


def read_split_lists(
    folder: Path, choices: Choices, files: Mapping[str, Sequence[str]], *, key: Callable[[str], str]
) -> dict[str, str] | None:
    """Sample key -> split, from the official lists; None where there are none.

    Args:
        folder: Of the dataset.
        choices: May name another folder.
        files: Split -> file names that a list may have; the first column of each line counts.
        key: What of an entry names the sample.

    Raises:
        ValueError: A folder was named that holds no lists.
    """
    where = Path(choices.split_lists) if choices.split_lists else folder
    splits: dict[str, str] = {}
    for split, names in files.items():
        for name in names:
            for path in sorted({where / name, where / "splits" / name}):
                if path.is_file():
                    with path.open(newline="") as lines:
                        splits |= {key(line[0].strip()): split for line in csv.reader(lines) if line}
    if not splits and choices.split_lists:
        expected = ", ".join(name for names in files.values() for name in names)
        raise ValueError(f"split_lists={where}: none of {expected} is there")
    return splits or None


def with_splits(samples: Iterable[Sample], splits: Mapping[str, str] | None) -> Iterator[Sample | NotTaken]:
    """Samples with their official split; with lists, those that are in none are left out, as their authors did."""
    for sample in samples:
        if splits is None:
            yield sample
        elif sample.name in splits:
            yield replace(sample, split=splits[sample.name])
        else:
            yield NotTaken(name=sample.name, reason="not_in_split_lists")


def found(entries: Iterable[Sample | NotTaken]) -> Found:
    """Sorted into what is taken and what is not."""
    entries = list(entries)
    return Found(
        samples=[entry for entry in entries if isinstance(entry, Sample)],
        not_taken=[entry for entry in entries if isinstance(entry, NotTaken)],
    )


def _time(look: Look) -> tuple[datetime, str]:
    return look.datetime, look.path
