"""From an archive's numbers to the store's: one scale for all optical baselines, centi-dB for radar."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeline.bands import OPTICAL_NODATA, RADAR_NODATA

FLOOR_CENTI_DB = -5000
"""gamma0 of 1e-5 and below, far under any sensor's noise."""


def harmonise(dn: NDArray[np.uint16], *, offset_dn: int) -> NDArray[np.uint16]:
    """Bring Sentinel-2 digital numbers to the scale used before processing baseline 04.00.

    Args:
        dn: Any shape, reflectance x 10 000 plus the archive's offset; 0 where there is no data.
        offset_dn: What was added: 1000 from processing baseline 04.00 on, else 0.

    Returns:
        Same shape, reflectance x 10 000; 0 where there is no data and only there.
    """
    # A valid pixel darker than the offset would become 0 and read as "no data": it stays valid.
    shifted = np.maximum(dn.astype(np.int32) - offset_dn, 1).astype(np.uint16)
    return np.where(dn == OPTICAL_NODATA, np.uint16(OPTICAL_NODATA), shifted)


def to_centi_db(gamma0: NDArray[np.float32]) -> NDArray[np.int16]:
    """Linear gamma0 to hundredths of a decibel.

    Args:
        gamma0: Any shape, linear power; no data is NaN or the archive's -32768 (any value <= -1).

    Returns:
        Same shape, int16: round(1000 * log10(gamma0)), at least -5000; -32768 where there is no data. Values of
        zero and the small negative ones that noise removal leaves are valid, at the floor.
    """
    valid = np.isfinite(gamma0) & (gamma0 > -1.0)
    power = np.maximum(np.where(valid, gamma0, 1.0), 1e-5).astype(np.float64)
    centi_db = np.round(1000.0 * np.log10(power)).clip(FLOOR_CENTI_DB, 32767).astype(np.int16)
    return np.where(valid, centi_db, np.int16(RADAR_NODATA))


def looks_like_decibel(gamma0: NDArray[np.float32]) -> bool:
    """Whether an array that should be linear power is in decibel: half of its valid pixels are below zero."""
    valid = gamma0[np.isfinite(gamma0) & (gamma0 > -1000.0)]
    return bool(valid.size) and bool(np.median(valid) < 0.0)
