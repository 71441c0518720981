"""Codes of reasons and flags in words that a person understands without the code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

PAIR_REASONS: Final[Mapping[str, str]] = {
    "excluded": "the cell lies in or near an excluded area",
    "no_optical": "no optical acquisition covers the cell",
    "cloudy_scene": "the optical scene is too cloudy",
    "too_little_overlap": "the optical acquisition covers too little of the cell",
    "no_radar": "no radar acquisition covers the cell",
    "no_radar_in_time": "no radar acquisition near enough in time",
    "other_orbit": "the radar acquisitions in time have another orbit than was asked for",
    "another_pair_taken": "another pair of the cell was taken",
    "in_earlier_version": "an earlier version of the store has it",
    "dt": "the two looks are too far apart in time",
    "not_in_split_lists": "not in the dataset's lists of splits",
}
"""Why a candidate never came into the plan."""

CHIP_REASONS: Final[Mapping[str, str]] = {
    "no_optical_data": "no optical pixel has data",
    "too_little_valid": "too few pixels have data",
    "cloudy": "too much cloud or cloud shadow among its pixels",
    "shadowed": "too much cloud shadow among its pixels",
    "snowy": "too much snow among its pixels",
    "border_noise": "too much radar border noise",
    "suspect": "its pixels contradict what is said of their scale",
}
"""Why a planned chip was not kept, from its pixels."""

FLAGS: Final[Mapping[str, str]] = {
    "offset_suspect": "an offset of 1000 seems to be left in the digital numbers",
    "double_offset_suspect": "an offset of 1000 seems to be taken off twice",
    "radar_scale_suspect": "the radar is far too bright: power taken for decibel, perhaps",
}
"""What to beware of in a chip."""


def in_words(code: str) -> str:
    """A reason or a flag in words; an unknown one as it is, without underscores."""
    return {**PAIR_REASONS, **CHIP_REASONS, **FLAGS}.get(code, code.replace("_", " "))


def count(number: float) -> str:
    """A number of things, grouped in threes by thin spaces."""
    return f"{number:,.0f}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def size(number: float) -> str:
    """Bytes in the unit that keeps the number short."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if number < 1000 or unit == "TB":
            break
        number /= 1000
    return f"{number:.0f} {unit}" if number >= 100 or unit == "B" else f"{number:.3g} {unit}"


def duration(seconds: float) -> str:
    """A time a person can plan with: seconds, minutes, hours or days."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02d} min"
    return f"{hours / 24:.1f} days"
