"""Which chips are worth keeping, from their own pixels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.bands import NATIVE_GROUPS, OPTICAL_BANDS, OPTICAL_NODATA, RADAR_BANDS, RADAR_NODATA, SCL_NODATA
from pipeline.types import ChipArrays

CLOUD_CLASSES = (3, 8, 9, 10)
"""Cloud shadow, cloud at medium and high probability, thin cirrus."""

CLEAR_CLASSES = (4, 5, 6)
"""Vegetation, not vegetated, water."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScreenRules:
    """What a chip must have."""

    max_cloud_fraction: float
    """Largest share of cloud and cloud shadow among the pixels with data."""

    min_valid_fraction: float
    """Smallest share of 10 m pixels with data in both sensors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Screening:
    """What was seen of a chip; recorded whether it is kept or not."""

    reason: str
    """Empty when the chip is kept: cloudy | no_optical_data | too_little_valid."""

    valid_fraction: float
    cloud_fraction: float
    clear_fraction: float


def screen_classes(scl: NDArray[np.uint8], rules: ScreenRules) -> Screening:
    """Judge a chip by its scene classification alone, before any other asset is read.

    Args:
        scl: (y, x) Sentinel-2 scene classification, 0 where there is no data.
        rules: What a chip must have.
    """
    valid = scl != SCL_NODATA
    count = int(valid.sum())
    valid_fraction = count / scl.size
    cloud = float(np.isin(scl, CLOUD_CLASSES).sum()) / count if count else 0.0
    clear = float(np.isin(scl, CLEAR_CLASSES).sum()) / count if count else 0.0
    if not count:
        reason = "no_optical_data"
    elif valid_fraction < rules.min_valid_fraction:
        reason = "too_little_valid"
    else:
        reason = "cloudy" if cloud > rules.max_cloud_fraction else ""
    return Screening(reason=reason, valid_fraction=valid_fraction, cloud_fraction=cloud, clear_fraction=clear)


def screen_chip(chip: ChipArrays, seen: Screening, rules: ScreenRules) -> Screening:
    """Judge a whole chip; `seen` is what its classification said."""
    fraction = float(valid_pixels(chip).mean())
    return Screening(
        reason=seen.reason or ("too_little_valid" if fraction < rules.min_valid_fraction else ""),
        valid_fraction=fraction,
        cloud_fraction=seen.cloud_fraction,
        clear_fraction=seen.clear_fraction,
    )


def valid_pixels(chip: ChipArrays) -> NDArray[np.bool_]:
    """(y, x) at 10 m: True where every band of both sensors has data."""
    valid: NDArray[np.bool_] = (chip["radar"] != RADAR_NODATA).all(axis=0)
    side = valid.shape[0]
    for name in NATIVE_GROUPS:
        band_valid = (chip[name] != OPTICAL_NODATA).all(axis=0)
        repeat = side // band_valid.shape[0]
        valid &= band_valid.repeat(repeat, axis=0).repeat(repeat, axis=1)
    return valid


def band_statistics(chip: ChipArrays) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per band over valid pixels: optical (reflectance x 10 000), then radar (dB)."""
    optical = {band: chip[group][index] for group, bands in NATIVE_GROUPS.items() for index, band in enumerate(bands)}
    values = [optical[band][optical[band] != OPTICAL_NODATA].astype(np.float64) for band in OPTICAL_BANDS]
    for index in range(len(RADAR_BANDS)):
        radar = chip["radar"][index]
        values.append(radar[radar != RADAR_NODATA].astype(np.float64) / 100.0)
    means = [float(v.mean()) if v.size else float("nan") for v in values]
    return means, [float(v.std()) if v.size else float("nan") for v in values]
