"""From an archive's numbers to the store's: one scale for all optical baselines, centi-dB for radar."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pipeline.bands import NATIVE_GROUPS, OPTICAL_NODATA, RADAR_NODATA

FLOOR_CENTI_DB = -5000
"""gamma0 of 1e-5 and below, far under any sensor's noise."""

_STRIP: Final = 1 << 16
"""Pixels that are worked on at a time, so that what is worked on stays in the processor's cache."""

_EVIDENCE_CLASSES: Final = (4, 6)
"""Vegetation and water: in some band or other, both are dark wherever on Earth they are."""

_MIN_EVIDENCE_PX: Final = 200
"""Fewer pixels of these classes, after thinning, say nothing."""

_SAMPLE_PX: Final = 65536
"""About how many pixels of a window are looked at."""

_OFFSET_LEFT_IN_DN: Final = 900
"""Nearly all of 1000: over water the darkest pixels have negative reflectances, which is why there is an offset."""

_RADAR_SCALE_CENTI_DB: Final = 700
"""Half of a scene brighter than a gamma0 of 5 is no power but digital numbers."""


def harmonise(dn: NDArray[np.uint16], *, offset_dn: int) -> NDArray[np.uint16]:
    """Bring Sentinel-2 digital numbers to the scale used before processing baseline 04.00.

    Args:
        dn: Any shape, reflectance x 10 000 plus the archive's offset; 0 where there is no data.
        offset_dn: What was added: 1000 from processing baseline 04.00 on, else 0.

    Returns:
        Same shape, reflectance x 10 000; 0 where there is no data and only there.
    """
    if offset_dn == 0:
        return dn
    # A valid pixel darker than the offset would become 0 and read as "no data": it stays valid.
    shifted = np.maximum(dn, np.uint16(offset_dn + 1))
    shifted -= np.uint16(offset_dn)
    shifted[dn == OPTICAL_NODATA] = OPTICAL_NODATA
    return shifted


def to_centi_db(gamma0: NDArray[np.float32]) -> NDArray[np.int16]:
    """Linear gamma0 to hundredths of a decibel.

    Args:
        gamma0: Any shape, linear power; no data is NaN or the archive's -32768 (any value <= -1).

    Returns:
        Same shape, int16: round(1000 * log10(gamma0)), at least -5000; -32768 where there is no data. Values of
        zero and the small negative ones that noise removal leaves are valid, at the floor.
    """
    flat = np.ascontiguousarray(gamma0).reshape(-1)
    centi_db = np.empty(flat.shape, np.int16)
    for start in range(0, flat.size, _STRIP):
        strip = slice(start, start + _STRIP)
        centi_db[strip] = _centi_db(flat[strip])
    return centi_db.reshape(gamma0.shape)


def _centi_db(gamma0: NDArray[np.float32]) -> NDArray[np.int16]:
    valid = gamma0 > -1.0  # which NaN is not
    valid &= gamma0 < np.inf
    power = np.maximum(np.where(valid, gamma0, np.float32(1.0)), np.float32(1e-5))
    # The logarithm in single precision is many times faster, and sure but for what falls next to a rounding edge.
    quick = np.log(power) * np.float32(1000.0 / np.log(10.0))
    rounded = np.rint(quick)
    unsure = np.abs(np.abs(quick - rounded) - np.float32(0.5)) < np.float32(0.01)
    rounded[unsure] = np.round(1000.0 * np.log10(power[unsure].astype(np.float64)))
    centi_db = rounded.clip(FLOOR_CENTI_DB, 32767).astype(np.int16)
    centi_db[~valid] = RADAR_NODATA
    return centi_db


def looks_like_decibel(gamma0: NDArray[np.float32]) -> bool:
    """Whether an array that should be linear power is in decibel: half of its valid pixels are below zero."""
    valid = np.isfinite(gamma0) & (gamma0 > -1000.0)
    return 2 * int((gamma0[valid] < 0.0).sum()) > int(valid.sum())


def offset_flags(
    b10: Sequence[NDArray[np.uint16]], b20: Sequence[NDArray[np.uint16]], classes: Sequence[NDArray[np.uint8]]
) -> frozenset[str]:
    """Whether an item's harmonised pixels say that its offset was dealt with wrongly, whatever its metadata say.

    Looked at is vegetation and water only. `offset_suspect`: even the darkest hundredth of the darkest band reflects
    as much as the offset is, so that it was left in. `double_offset_suspect`: half of the pixels in blue, and a quarter
    in green, were darker than the offset, so that it had been taken off before. Deserts, snow and cloud have neither
    class and are never flagged: without something dark there is nothing to tell by.

    Args:
        b10: (4, y, x) at 10 m for each of some windows, as `harmonise` gives them.
        b20: (6, y, x) at 20 m.
        classes: (y, x) at 20 m, the scene classification.
    """
    samples = [_evidence(*arrays) for arrays in zip(b10, b20, classes, strict=True)]
    bands = np.concatenate(samples, axis=1) if samples else np.empty((10, 0), np.uint16)
    if bands.shape[1] < _MIN_EVIDENCE_PX:
        return frozenset()
    names = [*NATIVE_GROUPS["b10"], *NATIVE_GROUPS["b20"]]
    blue, green = bands[names.index("B02")], bands[names.index("B03")]
    flags = set()
    if np.percentile(bands, 1.0, axis=1).min() >= _OFFSET_LEFT_IN_DN:
        flags.add("offset_suspect")
    if (blue <= 1).mean() >= 0.5 and (green <= 1).mean() >= 0.25:
        flags.add("double_offset_suspect")
    return frozenset(flags)


def _evidence(b10: NDArray[Any], b20: NDArray[Any], classes: NDArray[np.uint8]) -> NDArray[Any]:
    """(10, pixel): all 10 and 20 m bands of some of the pixels that are vegetation or water and have data."""
    step = max(1, int(np.sqrt(classes.size / _SAMPLE_PX)))
    thin = slice(None, None, step)
    bands = np.concatenate([b10[:, ::2, ::2][:, thin, thin], b20[:, thin, thin]])
    sample: NDArray[Any] = bands[:, np.isin(classes[thin, thin], _EVIDENCE_CLASSES) & (bands > OPTICAL_NODATA).all(0)]
    return sample


def radar_flags(radar: Sequence[NDArray[np.int16]]) -> frozenset[str]:
    """Whether an item's centi-dB, (2, y, x) for each of some windows, are far too bright: `radar_scale_suspect`."""
    thin = [array[:, ::8, ::8] for array in radar]
    valid = np.concatenate([array[array != RADAR_NODATA] for array in thin]) if thin else np.empty(0, np.int16)
    bright = valid.size >= _MIN_EVIDENCE_PX and np.median(valid) > _RADAR_SCALE_CENTI_DB
    return frozenset(["radar_scale_suspect"] if bright else [])
