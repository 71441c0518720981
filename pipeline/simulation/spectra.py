"""What each land cover looks like to both sensors: reflectances, seasons and backscatter.

Reflectances (12 Sentinel-2 bands, 0-1) are set by hand near the band means of a few published Sentinel-2 L2A
samples (BigEarthNet: Sumbul et al. 2021, doi:10.1109/MGRS.2021.3089174; TerraMesh: Blumenstiel et al. 2025,
arXiv:2504.11172). Built-up, dry soil and dormant vegetation are given the shapes that spectral libraries show
(ECOSTRESS: Meerdink et al. 2019, doi:10.1016/j.rse.2019.05.015; USGS: Kokaly et al. 2017, doi:10.3133/ds1035);
no table of theirs was copied.

Backscatter (gamma0 in dB at 38 degrees) is set near the Sentinel-1 means of the same samples (forest -8/-14 dB,
pasture -11/-16 dB, fields -10 to -12/-17 dB for VV/VH); that it falls with incidence, and for which covers most, is
the behaviour that Ulaby and Dobson describe (1989, Handbook of Radar Scattering Statistics for Terrain).

Contrasts within parcels and spreads between them are chosen, not published: patterns are more marked than in real
scenes, and band averages say less, so that minutes of training can tell a model that learns from one that does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pipeline.simulation.noise import Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class LandCover:
    """One class of the landscape."""

    code: int
    """ESA WorldCover code."""

    name: str
    share: float
    """Of the land, 0-1."""

    green: tuple[float, ...]
    """Reflectance when fully grown, in the order of OPTICAL_BANDS."""

    dormant: tuple[float, ...]
    """Reflectance out of season."""

    greenness: tuple[float, float]
    """Share of `green` in the mixture: lowest and highest of the year."""

    peak_day: float
    """Day of the northern year with the highest greenness."""

    season_days: float
    """Standard deviation of the season."""

    spread_days: float
    """Standard deviation of the peak between parcels."""

    brightness_spread: float
    """Relative standard deviation of reflectance between parcels."""

    optical_contrast: float
    """Relative standard deviation of the texture within a parcel."""

    gamma0_db: tuple[float, float]
    """VV, VH at 38 degrees, out of season."""

    growth_db: tuple[float, float]
    """What full greenness adds to VV, VH."""

    slope_db_deg: float
    """Change with incidence angle."""

    wetness: float
    """How much of a change in soil moisture (or, for water, in wind) the class shows, 0 and up."""

    radar_spread_db: float
    """Standard deviation between parcels."""

    radar_contrast_db: float
    """Standard deviation of the texture within a parcel."""


WATER: Final = LandCover(
    code=80, name="water", share=0.08,
    green=(0.045, 0.050, 0.058, 0.036, 0.032, 0.024, 0.023, 0.021, 0.020, 0.018, 0.010, 0.007),
    dormant=(0.030, 0.032, 0.035, 0.020, 0.018, 0.014, 0.013, 0.012, 0.011, 0.010, 0.006, 0.004),
    greenness=(0.1, 0.7), peak_day=215, season_days=60, spread_days=30,
    brightness_spread=0.25, optical_contrast=0.08,
    gamma0_db=(-19.0, -26.5), growth_db=(0.0, 0.0), slope_db_deg=-0.30, wetness=1.6,
    radar_spread_db=1.5, radar_contrast_db=0.8,
)  # fmt: skip
TREES: Final = LandCover(
    code=10, name="tree cover", share=0.19,
    green=(0.020, 0.027, 0.045, 0.030, 0.070, 0.175, 0.215, 0.225, 0.235, 0.240, 0.115, 0.055),
    dormant=(0.025, 0.032, 0.048, 0.044, 0.075, 0.125, 0.150, 0.160, 0.172, 0.180, 0.125, 0.068),
    greenness=(0.25, 1.0), peak_day=185, season_days=55, spread_days=15,
    brightness_spread=0.22, optical_contrast=0.34,
    gamma0_db=(-8.6, -14.2), growth_db=(0.3, 0.5), slope_db_deg=-0.02, wetness=0.25,
    radar_spread_db=0.9, radar_contrast_db=3.2,
)  # fmt: skip
SHRUBS: Final = LandCover(
    code=20, name="shrubland", share=0.13,
    green=(0.028, 0.036, 0.060, 0.045, 0.095, 0.200, 0.245, 0.260, 0.272, 0.275, 0.180, 0.100),
    dormant=(0.038, 0.050, 0.074, 0.078, 0.112, 0.155, 0.178, 0.192, 0.206, 0.212, 0.205, 0.130),
    greenness=(0.2, 0.9), peak_day=170, season_days=60, spread_days=20,
    brightness_spread=0.22, optical_contrast=0.31,
    gamma0_db=(-10.2, -16.4), growth_db=(0.5, 1.0), slope_db_deg=-0.06, wetness=0.6,
    radar_spread_db=1.0, radar_contrast_db=3.2,
)  # fmt: skip
GRASS: Final = LandCover(
    code=30, name="grassland", share=0.18,
    green=(0.035, 0.042, 0.082, 0.052, 0.130, 0.320, 0.395, 0.410, 0.430, 0.435, 0.210, 0.112),
    dormant=(0.050, 0.065, 0.100, 0.105, 0.160, 0.215, 0.240, 0.255, 0.275, 0.285, 0.290, 0.200),
    greenness=(0.15, 0.95), peak_day=150, season_days=60, spread_days=28,
    brightness_spread=0.22, optical_contrast=0.28,
    gamma0_db=(-11.8, -17.8), growth_db=(0.6, 1.2), slope_db_deg=-0.10, wetness=1.0,
    radar_spread_db=1.0, radar_contrast_db=3.0,
)  # fmt: skip
CROPS: Final = LandCover(
    code=40, name="cropland", share=0.19,
    green=(0.030, 0.038, 0.075, 0.045, 0.120, 0.330, 0.415, 0.435, 0.455, 0.460, 0.190, 0.095),
    dormant=(0.065, 0.080, 0.112, 0.138, 0.172, 0.200, 0.220, 0.235, 0.255, 0.265, 0.320, 0.255),
    greenness=(0.05, 1.0), peak_day=170, season_days=42, spread_days=38,
    brightness_spread=0.22, optical_contrast=0.31,
    gamma0_db=(-11.6, -18.4), growth_db=(0.8, 2.2), slope_db_deg=-0.12, wetness=1.0,
    radar_spread_db=1.0, radar_contrast_db=3.2,
)  # fmt: skip
BUILT: Final = LandCover(
    code=50, name="built-up", share=0.11,
    green=(0.060, 0.070, 0.095, 0.090, 0.130, 0.210, 0.240, 0.255, 0.260, 0.262, 0.205, 0.150),
    dormant=(0.085, 0.100, 0.120, 0.130, 0.145, 0.160, 0.170, 0.180, 0.186, 0.190, 0.205, 0.180),
    greenness=(0.1, 0.6), peak_day=180, season_days=60, spread_days=15,
    brightness_spread=0.22, optical_contrast=0.34,
    gamma0_db=(-8.8, -15.8), growth_db=(0.0, 0.3), slope_db_deg=-0.06, wetness=0.2,
    radar_spread_db=1.2, radar_contrast_db=3.5,
)  # fmt: skip
BARE: Final = LandCover(
    code=60, name="bare or sparse vegetation", share=0.06,
    green=(0.060, 0.075, 0.110, 0.120, 0.160, 0.210, 0.235, 0.250, 0.265, 0.270, 0.290, 0.220),
    dormant=(0.085, 0.106, 0.146, 0.180, 0.205, 0.222, 0.236, 0.248, 0.262, 0.268, 0.335, 0.285),
    greenness=(0.0, 0.25), peak_day=150, season_days=50, spread_days=20,
    brightness_spread=0.22, optical_contrast=0.28,
    gamma0_db=(-13.2, -20.5), growth_db=(0.5, 1.0), slope_db_deg=-0.15, wetness=1.2,
    radar_spread_db=1.2, radar_contrast_db=3.2,
)  # fmt: skip
WETLAND: Final = LandCover(
    code=90, name="herbaceous wetland", share=0.06,
    green=(0.030, 0.038, 0.062, 0.048, 0.100, 0.205, 0.250, 0.262, 0.272, 0.272, 0.135, 0.072),
    dormant=(0.035, 0.045, 0.065, 0.064, 0.095, 0.130, 0.148, 0.158, 0.166, 0.168, 0.118, 0.070),
    greenness=(0.15, 0.9), peak_day=200, season_days=50, spread_days=20,
    brightness_spread=0.22, optical_contrast=0.31,
    gamma0_db=(-11.0, -17.6), growth_db=(1.0, 1.5), slope_db_deg=-0.10, wetness=0.9,
    radar_spread_db=1.2, radar_contrast_db=3.5,
)  # fmt: skip

LAND_COVERS: Final = (WATER, TREES, SHRUBS, GRASS, CROPS, BUILT, BARE, WETLAND)
"""The landscape's classes; a place holds an index into this."""

CLOUD: Final = (0.62, 0.61, 0.60, 0.60, 0.61, 0.62, 0.63, 0.63, 0.64, 0.52, 0.46, 0.36)
"""Reflectance of an opaque water cloud in the order of OPTICAL_BANDS."""

CENTRE_UM: Final = (0.443, 0.490, 0.560, 0.665, 0.704, 0.740, 0.783, 0.842, 0.865, 0.945, 1.610, 2.190)
"""Centre wavelengths in the order of OPTICAL_BANDS."""

REFERENCE_INCIDENCE_DEG: Final = 38.0


def of_class(cover: NDArray[np.uint8], *names: str) -> list[Floats]:
    """The classes' numbers at every place of a class map, one array per number; a field of two numbers gives two."""
    rows = [np.hstack([getattr(kind, name) for name in names]) for kind in LAND_COVERS]
    index = cover.astype(np.intp)
    return [np.take(column, index) for column in np.array(rows, np.float32).T.copy()]
