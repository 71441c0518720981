"""What Sentinel-1 sees: terrain-free gamma0 of the same land under one pass's geometry, weather and speckle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pipeline.bands import RADAR_BANDS
from pipeline.simulation.fields import smooth_field
from pipeline.simulation.frame import Frame, Plane
from pipeline.simulation.landcover import Land, greenness
from pipeline.simulation.noise import Floats
from pipeline.simulation.spectra import BUILT, CROPS, LAND_COVERS, REFERENCE_INCIDENCE_DEG, of_class

NODATA: Final = -32768.0
LOOKS: Final = 4.4
"""Equivalent number of looks of Sentinel-1 IW GRDH."""

_STRIP_PX: Final = 60
_NUISANCE_M: Final = 4600.0
_KEPT_BITS: Final = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class RadarConditions:
    """How one pass differs from another; nothing here says what the land is."""

    season_day: int
    """Day of the northern year with the same season."""

    ascending: bool
    incidence_deg: float
    """At the plane's anchor."""

    seed: int
    gain_spread_db: float = 0.8
    """Standard deviation of the pass's calibration, common to both polarisations."""

    incidence_slope_deg: float = 6.0
    """Change of incidence across the swath, per 30 km (steeper than in orbit, as areas here are small)."""

    attenuation_spread_db: float = 1.0
    """Standard deviation of what rain and wet canopies take or add, over kilometres."""

    wetness_spread_db: float = 1.3
    """Standard deviation of what soil moisture (over water: wind) adds, over kilometres."""


def backscatter_of(
    land: Land, frame: Frame, plane: Plane, conditions: RadarConditions, *, valid: NDArray[np.bool_]
) -> dict[str, Floats]:
    """Linear gamma0 per polarisation on a 10 m frame, -32768 outside the swath.

    Args:
        land: Landscape under the frame.
        frame: 10 m raster.
        plane: World plane.
        conditions: Of the pass.
        valid: (row, column) at 10 m: inside the swath.
    """
    growth = greenness(land, conditions.season_day)
    weather, moisture, incidence = _fields(frame, plane, conditions)
    rng = np.random.default_rng(conditions.seed + 2)
    offsets_db = rng.normal(0, conditions.gain_spread_db) + rng.normal(0, 0.3, len(RADAR_BANDS))
    bands = {band: np.empty(land.cover.shape, np.float32) for band in RADAR_BANDS}
    for start in range(0, frame.height_px, _STRIP_PX):
        part = np.s_[start : start + _STRIP_PX]
        common_db = weather[part] + _common_db(land, part, moisture[part], incidence[part], conditions.ascending)
        numbers = of_class(land.cover[part], "gamma0_db", "growth_db")
        for index, band in enumerate(RADAR_BANDS):
            gamma0_db = common_db + numbers[index] + numbers[2 + index] * growth[part] + np.float32(offsets_db[index])
            speckle = rng.standard_gamma(LOOKS, gamma0_db.shape, np.float32) / np.float32(LOOKS)
            bands[band][part] = _rounded(np.exp(gamma0_db * np.float32(np.log(10) / 10)) * speckle)
    for pixels in bands.values():
        pixels[~valid] = NODATA
    return bands


def _common_db(land: Land, part: slice, moisture: Floats, incidence: Floats, ascending: bool) -> Floats:
    """What changes both polarisations alike: parcel, texture, soil moisture, incidence and look direction."""
    names = ("slope_db_deg", "wetness", "radar_spread_db", "radar_contrast_db")
    slope, wetness, spread, contrast = of_class(land.cover[part], *names)
    facing = _LOOK_DB[land.cover[part]] * land.facing[part] * (1 if ascending else -1)
    common: Floats = spread * land.roughness[part] + contrast * land.scatter[part] + facing
    return common + wetness * moisture + slope * (incidence - np.float32(REFERENCE_INCIDENCE_DEG))


_LOOK_DB: Final = np.array([{BUILT: 1.0, CROPS: 0.5}.get(cover, 0.0) for cover in LAND_COVERS], np.float32)
"""Walls and furrows answer one look direction more than the other."""


def _fields(frame: Frame, plane: Plane, conditions: RadarConditions) -> tuple[Floats, Floats, Floats]:
    """Weather (dB), soil moisture (dB for a class of wetness 1) and incidence (degrees)."""
    weather = smooth_field(frame, plane, spacing_m=_NUISANCE_M, seed=conditions.seed + 21)
    moisture = smooth_field(frame, plane, spacing_m=_NUISANCE_M, seed=conditions.seed + 22)
    x_m, y_m = frame.on_plane(plane)
    # Right-looking: ascending passes look east, so incidence grows eastwards; descending ones westwards.
    per_m = conditions.incidence_slope_deg / 30_000 * (1 if conditions.ascending else -1)
    incidence = np.float32(conditions.incidence_deg) + np.float32(per_m) * (x_m + np.zeros_like(y_m))
    return conditions.attenuation_spread_db * weather, conditions.wetness_spread_db * moisture, incidence


def _rounded(gamma0: Floats) -> Floats:
    """Keep 8 bits of the fraction (steps of 0.017 dB or less): what is below is speckle, and does not compress."""
    dropped = 23 - _KEPT_BITS
    bits = gamma0.view(np.uint32) + np.uint32(1 << (dropped - 1))
    return (bits & np.uint32(0xFFFFFFFF << dropped & 0xFFFFFFFF)).view(np.float32)
