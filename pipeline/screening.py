"""Which chips are worth keeping, from their own pixels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.bands import NATIVE_GROUPS, OPTICAL_NODATA, RADAR_NODATA, SCL_NODATA
from pipeline.types import ChipArrays

CLOUD_CLASSES = (3, 8, 9, 10)
"""Cloud shadow, cloud at medium and high probability, thin cirrus."""

SHADOW_CLASSES = (3,)
"""Cloud shadow."""

SNOW_CLASSES = (11,)
"""Snow or ice."""

CLEAR_CLASSES = (4, 5, 6)
"""Vegetation, not vegetated, water."""


_BORDER_NOISE_CENTI_DB: Final = -3000
"""Darker than calm water in VV; what noise removal leaves of a swath's edge."""

_BORDER_REACH_PX: Final = 50
"""How far from missing pixels darkness is taken for border noise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScreenRules:
    """What a chip must have."""

    max_cloud_fraction: float
    """Largest share of cloud and cloud shadow among the pixels with data."""

    min_valid_fraction: float
    """Smallest share of 10 m pixels with data in both sensors."""

    max_shadow_fraction: float = 1.0
    """Largest share of cloud shadow alone among the pixels with data."""

    max_snow_fraction: float = 1.0
    """Largest share of snow and ice among the pixels with data."""

    max_border_noise_fraction: float = 1.0
    """Largest share of radar pixels with data that are noise along a swath's edge."""

    on_suspect: Literal["keep", "reject"] = "keep"
    """What becomes of chips whose items' pixels contradict what is said of them; they are flagged either way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Screening:
    """What was seen of a chip; recorded whether it is kept or not. NaN is what was not looked at."""

    reason: str
    """Empty when the chip is kept: no_optical_data | too_little_valid | cloudy | shadowed | snowy | border_noise |
    suspect."""

    valid_fraction: float
    """Of all pixels: by the classification alone at first, then with data in every band of both sensors."""

    cloud_fraction: float
    """Cloud and cloud shadow, of the pixels with data, as are the other classes."""

    shadow_fraction: float
    snow_fraction: float
    clear_fraction: float

    radar_valid_fraction: float = float("nan")
    """Of all pixels, with data in both polarisations."""

    border_noise_fraction: float = float("nan")
    """Of the radar pixels with data."""

    flags: frozenset[str] = frozenset()
    """What is odd about the chip's items."""

    def as_columns(self) -> dict[str, Any]:
        """The columns of the chip table that screening fills, apart from the reason."""
        names = ("valid", "cloud", "shadow", "snow", "clear", "radar_valid", "border_noise")
        fractions = {f"{name}_fraction": getattr(self, f"{name}_fraction") for name in names}
        return {**fractions, "flags": " ".join(sorted(self.flags))}


def screen_classes(scl: NDArray[np.uint8], rules: ScreenRules) -> Screening:
    """Judge a chip by its scene classification alone, before any other asset is read.

    Args:
        scl: (y, x) Sentinel-2 scene classification, 0 where there is no data.
        rules: What a chip must have.
    """
    counts = np.bincount(scl.reshape(-1), minlength=256)
    valid = scl.size - int(counts[SCL_NODATA])
    cloud, shadow, snow, clear = (
        int(counts[list(classes)].sum()) / valid if valid else 0.0
        for classes in (CLOUD_CLASSES, SHADOW_CLASSES, SNOW_CLASSES, CLEAR_CLASSES)
    )
    if not valid:
        reason = "no_optical_data"
    elif valid / scl.size < rules.min_valid_fraction:
        reason = "too_little_valid"
    elif cloud > rules.max_cloud_fraction:
        reason = "cloudy"
    elif shadow > rules.max_shadow_fraction:
        reason = "shadowed"
    else:
        reason = "snowy" if snow > rules.max_snow_fraction else ""
    return Screening(
        reason=reason,
        valid_fraction=valid / scl.size,
        cloud_fraction=cloud,
        shadow_fraction=shadow,
        snow_fraction=snow,
        clear_fraction=clear,
    )


def screen_chip(
    chip: ChipArrays, seen: Screening, rules: ScreenRules, *, flags: frozenset[str] = frozenset()
) -> Screening:
    """Judge a whole chip.

    Args:
        chip: Its arrays.
        seen: What its classification said.
        rules: What it must have.
        flags: What is odd about its items.
    """
    radar = radar_valid(chip["radar"])
    noise = int(border_noise(chip["radar"]).sum()) / max(int(radar.sum()), 1)
    fraction = float(valid_pixels(chip).mean())
    if fraction < rules.min_valid_fraction:
        reason = "too_little_valid"
    elif noise > rules.max_border_noise_fraction:
        reason = "border_noise"
    else:
        reason = "suspect" if flags and rules.on_suspect == "reject" else ""
    return replace(
        seen,
        reason=seen.reason or reason,
        valid_fraction=fraction,
        radar_valid_fraction=float(radar.mean()),
        border_noise_fraction=noise,
        flags=flags,
    )


def border_noise(radar: NDArray[np.generic]) -> NDArray[np.bool_]:
    """(y, x): valid pixels of centi-dB `(VV VH, y, x)` that are nearly black, close to pixels without data.

    The strip of noise along a swath's edge is what it looks for; calm water far from an edge is left in peace.
    """
    valid = radar_valid(radar)
    if valid.all():
        return np.zeros(valid.shape, np.bool_)
    noise: NDArray[np.bool_] = valid & (radar[0] <= _BORDER_NOISE_CENTI_DB) & _near(~valid, _BORDER_REACH_PX)
    return noise


def _near(mask: NDArray[np.bool_], reach_px: int) -> NDArray[np.bool_]:
    """Where the mask is true within a square of 2 x reach + 1 pixels."""
    for axis in (0, 1):
        size = mask.shape[axis]
        counts = np.insert(np.cumsum(mask, axis=axis, dtype=np.int32), 0, 0, axis=axis)
        here = np.arange(size)
        upper = np.take(counts, np.minimum(here + reach_px + 1, size), axis=axis)
        mask = upper > np.take(counts, np.maximum(here - reach_px, 0), axis=axis)
    return mask


def radar_valid(radar: NDArray[np.generic]) -> NDArray[np.bool_]:
    """(y, x): True where both polarisations of centi-dB `(VV VH, y, x)` have data, which is above what has none."""
    valid: NDArray[np.bool_] = radar.min(axis=0) != RADAR_NODATA
    return valid


def valid_pixels(chip: ChipArrays) -> NDArray[np.bool_]:
    """(y, x) at 10 m: True where every band of both sensors has data."""
    valid = radar_valid(chip["radar"])
    side = valid.shape[0]
    for name in NATIVE_GROUPS:
        band_valid = chip[name].min(axis=0) != OPTICAL_NODATA
        if band_valid.all():
            continue
        repeat = side // band_valid.shape[0]
        valid &= band_valid.repeat(repeat, axis=0).repeat(repeat, axis=1)
    return valid
