"""Codes of reasons and flags in words that a person understands without the code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

PAIR_REASONS: Final[Mapping[str, str]] = {
    "no_optical": "no optical acquisition covers the cell",
    "cloudy_scene": "the optical scene is too cloudy",
    "too_little_overlap": "a footprint covers too little of the cell",
    "no_radar_in_time": "no radar acquisition near enough in time",
    "another_pair_taken": "another pair of the cell was taken",
}
"""Why a candidate never came into the plan."""

CHIP_REASONS: Final[Mapping[str, str]] = {
    "cloudy": "too much cloud or shadow among its pixels",
    "no_optical_data": "no optical pixel has data",
    "too_little_valid": "too few pixels have data",
}
"""Why a planned chip was not kept, from its pixels."""

FLAGS: Final[Mapping[str, str]] = {
    "offset_suspect": "digital numbers look as if an offset of 1000 were left in or taken off twice",
}
"""What to beware of in a chip that was kept."""


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
