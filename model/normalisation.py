"""How pixel values become model input: per band, mean - 2 σ to mean + 2 σ becomes 0 to 1, and the rest is clipped.

The statistics are fixed and travel with the weights: never those of the batch at hand, which would make a chip's
embedding depend on its neighbours. The units they were taken in travel too, because one wrong unit costs a model most
of its worth.
"""

# B samples, C bands of one sensor

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

OPTICAL_BANDS: Final = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12")
RADAR_BANDS: Final = ("VV", "VH")

OPTICAL_UNIT: Final = "reflectance x 10000"
RADAR_UNIT: Final = "gamma0 dB"
LEVELS: Final = ("l2a", "l1c")

# Both are decibels; they differ by the cosine of the incidence angle, about 1 dB, a fifth of a band's σ.
_SAME_SCALE: Final = (frozenset({"gamma0 dB", "sigma0 dB"}),)


@dataclass(frozen=True, slots=True, kw_only=True)
class BandScaling:
    """Mean and standard deviation of one sensor's bands, in a stated unit."""

    bands: tuple[str, ...]
    """In the order of the model's channels."""

    unit: str
    """Such as ``reflectance x 10000`` or ``gamma0 dB``."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if not len(self.bands) == len(self.mean) == len(self.std):
            raise ValueError(
                f"{len(self.bands)} bands, {len(self.mean)} means and {len(self.std)} deviations do not match"
            )
        for band, mean, std in zip(self.bands, self.mean, self.std, strict=True):
            if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
                raise ValueError(f"band {band} needs a finite mean and a std above 0, got mean={mean}, std={std}")

    def affine(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(C, 1, 1) factor and offset that take the mean to 0.5 and mean +- 2 σ to 0 and 1, before clipping."""
        mean = torch.tensor(self.mean, dtype=torch.float32, device=device)[:, None, None]
        std = torch.tensor(self.std, dtype=torch.float32, device=device)[:, None, None]
        factor = 1 / (4 * std)
        return factor, 0.5 - mean * factor

    def apply(self, pixels: Tensor) -> Tensor:
        """(..., C, H, W) in `unit` -> float32 in [0, 1]; NaN, meaning no data, becomes 0.5, the mean."""
        factor, offset = self.affine(pixels.device)
        return (pixels.float() * factor + offset).nan_to_num(nan=0.5).clamp(0, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Normalisation:
    """The scaling of both sensors; kept in every checkpoint."""

    optical: BandScaling
    radar: BandScaling

    source: str
    """What the statistics were taken from."""

    level: str | None = None
    """Of the optical images: l2a (surface) or l1c (top of the atmosphere); None where either may be given."""

    def __post_init__(self) -> None:
        if self.level not in (None, *LEVELS):
            raise ValueError(f"level must be one of {', '.join(LEVELS)}, or None: got {self.level!r}")

    def check(
        self,
        *,
        optical_bands: Sequence[str] = OPTICAL_BANDS,
        radar_bands: Sequence[str] = RADAR_BANDS,
        optical_unit: str = OPTICAL_UNIT,
        radar_unit: str = RADAR_UNIT,
        level: str | None = None,
    ) -> None:
        """Refuse pixels in other units, another band order or of another level than the statistics were taken in.

        Raises:
            ValueError: Naming both.
        """
        for scaling, bands, unit in (
            (self.optical, optical_bands, optical_unit),
            (self.radar, radar_bands, radar_unit),
        ):
            if tuple(bands) != scaling.bands:
                raise ValueError(f"bands {' '.join(bands)} were given where {' '.join(scaling.bands)} is expected")
            if unit != scaling.unit and not any({unit, scaling.unit} <= same for same in _SAME_SCALE):
                raise ValueError(f"pixels in {unit!r} were given where {scaling.unit!r} is expected")
        if None not in (level, self.level) and level != self.level:
            raise ValueError(f"optical images of level {level} were given where {self.level} is expected")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as checkpoints hold them."""
        sensors = {
            name: {"bands": list(each.bands), "unit": each.unit, "mean": list(each.mean), "std": list(each.std)}
            for name, each in (("optical", self.optical), ("radar", self.radar))
        }
        return {**sensors, "source": self.source, "level": self.level}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Normalisation:
        """The inverse of `to_dict`; raises ValueError where something is missing or wrong."""
        try:
            optical, radar = (
                BandScaling(
                    bands=tuple(values[name]["bands"]),
                    unit=values[name]["unit"],
                    mean=tuple(float(value) for value in values[name]["mean"]),
                    std=tuple(float(value) for value in values[name]["std"]),
                )
                for name in ("optical", "radar")
            )
            # Files from before there was a level have none.
            return cls(optical=optical, radar=radar, source=str(values["source"]), level=values.get("level"))
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a normalisation: {error!r}") from error


def from_statistics(
    mean: Sequence[float],
    std: Sequence[float],
    *,
    source: str,
    radar_unit: str = RADAR_UNIT,
    level: str | None = None,
) -> Normalisation:
    """Statistics of the twelve optical bands (reflectance x 10000), then VV and VH (in `radar_unit`)."""
    split = len(OPTICAL_BANDS)
    return Normalisation(
        optical=BandScaling(
            bands=OPTICAL_BANDS,
            unit=OPTICAL_UNIT,
            mean=tuple(float(value) for value in mean[:split]),
            std=tuple(float(value) for value in std[:split]),
        ),
        radar=BandScaling(
            bands=RADAR_BANDS,
            unit=radar_unit,
            mean=tuple(float(value) for value in mean[split:]),
            std=tuple(float(value) for value in std[split:]),
        ),
        source=source,
        level=level,
    )


SSL4EO_S12: Final = Normalisation(
    optical=BandScaling(
        bands=OPTICAL_BANDS,
        unit=OPTICAL_UNIT,
        mean=(752.4, 884.3, 1144.2, 1297.5, 1624.9, 2194.6, 2422.2, 2517.8, 2581.6, 2645.5, 2368.5, 1805.1),
        std=(1108.0, 1155.2, 1183.6, 1368.1, 1370.3, 1355.6, 1416.5, 1474.8, 1439.3, 1582.3, 1455.5, 1343.5),
    ),
    radar=BandScaling(bands=RADAR_BANDS, unit="sigma0 dB", mean=(-12.548, -20.192), std=(5.257, 5.912)),
    source="SSL4EO-S12, 50 000 places, Level-2A and GRD (statistics published with the dataset)",
    level="l2a",
)
"""Statistics of the dataset CROMA was pretrained on; the reference publishes none with its weights."""
