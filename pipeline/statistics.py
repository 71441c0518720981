"""What the pixels of accepted chips are like, band by band: counted in whole numbers, so that parts merge exactly.

Counts, sums and sums of squares are integers of any size: whatever order chips and shards come in, the results are
equal to the last bit.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from pipeline.bands import NATIVE_GROUPS, OPTICAL_BANDS, OPTICAL_NODATA, RADAR_BANDS, RADAR_NODATA
from pipeline.types import ChipArrays

BANDS: Final = (*OPTICAL_BANDS, *RADAR_BANDS)
"""In the order of the model: optical, then radar."""

OPTICAL_BIN: Final = 16
"""Width of a bin in reflectance x 10 000."""

RADAR_BIN: Final = 10
"""Width of a bin in centi-dB."""

_RADAR_LOWEST: Final = -32760
"""Lower edge of the first radar bin; below it is only what stands for no data."""

_FORMAT: Final = 1


class BandStatistics:
    """Histograms and moments of each band over valid pixels; optical in reflectance x 10 000, radar in dB."""

    def __init__(self) -> None:
        self.chips = 0
        self._histograms = {band: np.zeros(_bins(band), np.int64) for band in BANDS}
        self._sums = dict.fromkeys(BANDS, 0)
        self._squares = dict.fromkeys(BANDS, 0)

    @classmethod
    def of(cls, chip: ChipArrays, groups: Mapping[str, Sequence[str]] = NATIVE_GROUPS) -> Self:
        """Of one chip; see `add`."""
        statistics = cls()
        statistics.add(chip, groups)
        return statistics

    def add(self, chip: ChipArrays, groups: Mapping[str, Sequence[str]] = NATIVE_GROUPS) -> None:
        """Count one more chip; a sensor that it lacks is left alone.

        Args:
            chip: Arrays as they are stored.
            groups: Store array -> optical bands in it.
        """
        self.chips += 1
        for band, steps in _steps(chip, groups):
            # Each value of a band at its own place: moments come from the few that occur, exactly.
            counts = np.bincount(steps)
            counts[:1] = 0  # no data
            occurring = np.flatnonzero(counts)
            number, value = counts[occurring].astype(np.int64), occurring.astype(np.int64) - _nodata_below(band)
            self._sums[band] += int((number * value).sum())
            self._squares[band] += int((number * value * value).sum())
            np.add.at(self._histograms[band], np.maximum(value - _lowest(band), 0) // _width(band), number)

    def merge(self, other: BandStatistics) -> None:
        """Add what another has counted."""
        self.chips += other.chips
        for band in BANDS:
            self._histograms[band] += other._histograms[band]
            self._sums[band] += other._sums[band]
            self._squares[band] += other._squares[band]

    def count(self, band: str) -> int:
        """Valid pixels."""
        return int(self._histograms[band].sum())

    def mean(self, band: str) -> float:
        """NaN without a valid pixel."""
        count = self.count(band)
        return self._sums[band] / count / _unit(band) if count else float("nan")

    def std(self, band: str) -> float:
        """Of all valid pixels (not of a sample); NaN without one."""
        count = self.count(band)
        if not count:
            return float("nan")
        spread: float = (self._squares[band] * count - self._sums[band] ** 2) / count**2
        return float(np.sqrt(spread)) / _unit(band)

    def moments(self) -> tuple[list[float], list[float]]:
        """Means and standard deviations of `BANDS`, in their order."""
        return [self.mean(band) for band in BANDS], [self.std(band) for band in BANDS]

    def percentile(self, band: str, percent: float) -> float:
        """At most a bin's width from numpy's percentile of all valid pixels; NaN without one."""
        histogram = self._histograms[band]
        below = np.cumsum(histogram)
        if not below[-1]:
            return float("nan")
        # Ranks count from 0 as numpy's do; the two pixels that a rank lies between may be in different bins.
        rank = (int(below[-1]) - 1) * percent / 100.0
        lower, upper = (float(np.searchsorted(below, whole, side="right")) for whole in (int(rank), -int(-rank // 1)))
        place = lower + (upper - lower) * (rank - int(rank))
        return (_lowest(band) + (place + 0.5) * _width(band) - 0.5) / _unit(band)

    def histogram(self, band: str) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Counts (bins,) and the edges of the bins (bins + 1,), in the band's unit."""
        edges = (_lowest(band) + _width(band) * np.arange(_bins(band) + 1)) / _unit(band)
        return self._histograms[band].copy(), edges

    def to_json(self) -> str:
        """Compact: of each histogram, the part between the first and the last pixel."""
        bands = {band: self._band_to_json(band) for band in BANDS if self.count(band)}
        return json.dumps({"format": _FORMAT, "chips": self.chips, "bands": bands}, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The inverse of `to_json`.

        Raises:
            ValueError: It was written by another version.
        """
        read = json.loads(text)
        if read.get("format") != _FORMAT:
            raise ValueError(f"statistics: format must be {_FORMAT}, got {read.get('format')!r}")
        statistics = cls()
        statistics.chips = read["chips"]
        for band, values in read["bands"].items():
            statistics._band_from_json(band, values)
        return statistics

    def summary(self) -> dict[str, dict[str, float]]:
        """Band -> mean, std and some percentiles, for people and reports; bands without a pixel are left out."""
        return {
            band: {
                "count": self.count(band),
                "mean": self.mean(band),
                "std": self.std(band),
                **{f"p{percent:02d}": self.percentile(band, percent) for percent in (1, 2, 25, 50, 75, 98, 99)},
            }
            for band in BANDS
            if self.count(band)
        }

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BandStatistics) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        raise TypeError("statistics change as chips are added")

    def _band_to_json(self, band: str) -> dict[str, Any]:
        occupied = np.flatnonzero(self._histograms[band])
        first, last = int(occupied[0]), int(occupied[-1])
        counts = self._histograms[band][first : last + 1].tolist()
        return {"sum": self._sums[band], "squares": self._squares[band], "first": first, "counts": counts}

    def _band_from_json(self, band: str, values: Mapping[str, Any]) -> None:
        self._sums[band], self._squares[band] = values["sum"], values["squares"]
        first, counts = values["first"], values["counts"]
        self._histograms[band][first : first + len(counts)] = counts


def band_moments(chip: ChipArrays) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each of `BANDS` over the valid pixels of a chip; NaN where there are none."""
    return BandStatistics.of(chip).moments()


def _steps(chip: ChipArrays, groups: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, NDArray[np.uint16]]]:
    """Band and its pixels (n,), as steps above what stands for no data."""
    for group, bands in groups.items():
        if group in chip:
            for band, pixels in zip(bands, chip[group], strict=True):
                yield band, pixels.reshape(-1)
    if "radar" in chip:
        for band, pixels in zip(RADAR_BANDS, chip["radar"], strict=True):
            yield band, pixels.reshape(-1).view(np.uint16) ^ np.uint16(_nodata_below(band))


def _nodata_below(band: str) -> int:
    """How far below zero what stands for no data lies."""
    return (-RADAR_NODATA) if _is_radar(band) else -OPTICAL_NODATA


def _is_radar(band: str) -> bool:
    return band in RADAR_BANDS


def _width(band: str) -> int:
    return RADAR_BIN if _is_radar(band) else OPTICAL_BIN


def _lowest(band: str) -> int:
    return _RADAR_LOWEST if _is_radar(band) else 0


def _bins(band: str) -> int:
    return -(-(32768 - _RADAR_LOWEST) // RADAR_BIN) if _is_radar(band) else 65536 // OPTICAL_BIN


def _unit(band: str) -> float:
    """Stored steps in one of the unit that people use."""
    return 100.0 if _is_radar(band) else 1.0
