"""What Sentinel-2 sees: the land through one overpass's light, air, clouds and instrument."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pipeline.bands import NATIVE_GROUPS, OPTICAL_BANDS, RESOLUTION_M
from pipeline.simulation.clouds import SCL_NODATA, Sky, scene_classification, sky_over
from pipeline.simulation.fields import smooth_field
from pipeline.simulation.frame import Frame, Plane
from pipeline.simulation.landcover import Land, greenness
from pipeline.simulation.noise import Floats
from pipeline.simulation.spectra import CENTRE_UM, CLOUD, LAND_COVERS, WATER, of_class

Pixels = NDArray[np.uint16]

_STRIP_PX: Final = 60
_NUISANCE_M: Final = 4200.0
_HAZE_PER_BAND: Final = np.array([(um / 0.49) ** -1.6 for um in CENTRE_UM], np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class OpticalConditions:
    """How one overpass differs from another; nothing here says what the land is."""

    season_day: int
    """Day of the northern year with the same season."""

    cloud_fraction: float
    sun_zenith_deg: float
    sun_azimuth_deg: float
    offset_dn: int
    """1000 from processing baseline 04.00 on, else 0."""

    seed: int
    """Of the overpass: all its tiles share light, haze and clouds."""

    gain_spread: float = 0.10
    """Standard deviation of the overpass's gain, common to all bands."""

    band_gain_spread: float = 0.05
    light_spread: float = 0.16
    """Standard deviation of slow changes of light over the scene (sun-view geometry, adjacency)."""

    light_slope: float = 0.12
    """Change of light from one side of the swath to the other, per 30 km."""

    residual_spread: float = 0.06
    """Standard deviation of each of three slow fields that atmospheric correction left in, another one in every
    band."""

    haze: float = 0.030
    """Mean path reflectance at 490 nm that the atmospheric correction left in."""

    haze_spread: float = 0.022


def bands_of(
    land: Land, frame: Frame, plane: Plane, conditions: OpticalConditions, *, valid: NDArray[np.bool_], noise_seed: int
) -> tuple[dict[str, Pixels], NDArray[np.uint8]]:
    """Digital numbers per band at its own resolution, and the scene classification at 20 m.

    Args:
        land: Landscape under the 10 m frame.
        frame: 10 m raster, both sides multiples of 6 px.
        plane: World plane.
        conditions: Of the overpass.
        valid: (row, column) at 60 m: inside the swath.
        noise_seed: Of the instrument's noise: one per tile.
    """
    sky = sky_over(
        frame,
        plane,
        cloud_fraction=conditions.cloud_fraction,
        sun_zenith_deg=conditions.sun_zenith_deg,
        sun_azimuth_deg=conditions.sun_azimuth_deg,
        seed=conditions.seed,
    )
    growth = greenness(land, conditions.season_day)
    light, haze = _light_and_haze(frame, plane, conditions)
    gains, loadings, residuals = _calibration(frame, plane, conditions)
    rng = np.random.default_rng(noise_seed)
    bands = {band: np.empty(_size(frame, step), np.uint16) for band, step in _steps().items()}
    for start in range(0, frame.height_px, _STRIP_PX):
        part = np.s_[start : start + _STRIP_PX]
        surface = _Surface(
            cover=land.cover[part].astype(np.intp),
            growth=growth[part],
            shade=_shade(land, part) * light[part] * (1 - 0.55 * sky.shadow[part]),
            vigour=land.vigour[part],
            dryness=land.dryness[part],
            haze=haze[part] + sky.cirrus[part],
            opacity=sky.opacity[part],
        )
        for index, (band, step) in enumerate(_steps().items()):
            left_in = sum(load * field[part] for load, field in zip(loadings[index], residuals, strict=True))
            reflectance = _block_mean(surface.reflectance(index) * (gains[index] * (1 + left_in)), step)
            bands[band][start // step : (start + _STRIP_PX) // step] = _digitise(reflectance, conditions.offset_dn, rng)
    for band, step in _steps().items():
        bands[band][~_grow(valid, 6 // step)] = 0
    return bands, _classes(land, growth, sky, valid)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Surface:
    cover: NDArray[np.intp]
    growth: Floats
    shade: Floats
    vigour: Floats
    dryness: Floats
    haze: Floats
    opacity: Floats

    def reflectance(self, band: int) -> Floats:
        """0-1, (row, column) at 10 m."""
        land: Floats = np.take(_DORMANT[band], self.cover) + np.take(_GAINED[band], self.cover) * self.growth
        land *= self.shade * (1 + _VIGOUR[band] * self.vigour + _DRYNESS[band] * self.dryness)
        land += self.haze * _HAZE_PER_BAND[band]
        if self.opacity.any():  # a cloud is brighter where it is thick
            land += (np.float32(CLOUD[band]) * (0.75 + 0.5 * self.opacity) - land) * self.opacity
        return land


_DORMANT: Final = np.array([cover.dormant for cover in LAND_COVERS], np.float32).T.copy()
_GAINED: Final = np.array([cover.green for cover in LAND_COVERS], np.float32).T.copy() - _DORMANT
"""(band, class): reflectance out of season, and what full growth adds to it."""

_VIGOUR: Final = np.array([-0.06] * 4 + [0.0, 0.08] + [0.14] * 4 + [0.0, -0.06], np.float32)
_DRYNESS: Final = np.array([0.04] * 3 + [0.08] * 2 + [0.0] * 5 + [0.14, 0.18], np.float32)
"""Relative change per band of a parcel one standard deviation more vigorous or drier."""


def _shade(land: Land, part: slice) -> Floats:
    """What texture and parcel make of the class's reflectance."""
    spread, contrast = of_class(land.cover[part], "brightness_spread", "optical_contrast")
    shade: Floats = np.maximum(1 + contrast * land.texture[part], 0.15) * np.exp(spread * land.brightness[part])
    return shade


def _light_and_haze(frame: Frame, plane: Plane, conditions: OpticalConditions) -> tuple[Floats, Floats]:
    rng = np.random.default_rng(conditions.seed)
    x_m, y_m = frame.on_plane(plane)
    direction = rng.uniform(0, 2 * np.pi)
    slope = conditions.light_slope / 30_000
    ramp = (x_m * np.float32(slope * np.cos(direction)) + y_m * np.float32(slope * np.sin(direction))).astype(
        np.float32
    )
    slow = smooth_field(frame, plane, spacing_m=_NUISANCE_M, seed=conditions.seed + 11)
    light = np.exp(conditions.light_spread * slow + ramp).astype(np.float32)
    veil = smooth_field(frame, plane, spacing_m=_NUISANCE_M, seed=conditions.seed + 12)
    return light, np.maximum(conditions.haze + conditions.haze_spread * veil, 0.0)


def _calibration(frame: Frame, plane: Plane, conditions: OpticalConditions) -> tuple[Floats, Floats, list[Floats]]:
    """Gain per band, and slow fields with each band's share in them."""
    rng = np.random.default_rng(conditions.seed + 1)
    common = rng.normal(0, conditions.gain_spread)
    gains = np.exp(common + rng.normal(0, conditions.band_gain_spread, len(OPTICAL_BANDS))).astype(np.float32)
    loadings = rng.normal(0, conditions.residual_spread, (len(OPTICAL_BANDS), 3)).astype(np.float32)
    seeds = range(conditions.seed + 13, conditions.seed + 16)
    return gains, loadings, [smooth_field(frame, plane, spacing_m=_NUISANCE_M, seed=seed) for seed in seeds]


def _digitise(reflectance: Floats, offset_dn: int, rng: np.random.Generator) -> Pixels:
    """Add the instrument's noise and code; valid pixels are at least 1."""
    noise = rng.standard_normal(reflectance.shape, np.float32) * (np.float32(0.0006) + np.float32(0.004) * reflectance)
    coded: Pixels = np.clip(np.rint((reflectance + noise) * 10_000) + offset_dn, 1, 65_535).astype(np.uint16)
    return coded


def _classes(land: Land, growth: Floats, sky: Sky, valid: NDArray[np.bool_]) -> NDArray[np.uint8]:
    step = np.s_[::2, ::2]
    sky20 = Sky(
        opacity=_block_mean(sky.opacity, 2), cirrus=_block_mean(sky.cirrus, 2), shadow=_block_mean(sky.shadow, 2)
    )
    water = land.cover[step] == LAND_COVERS.index(WATER)
    classes = scene_classification(sky20, growth[step] > 0.35, water)
    classes[~_grow(valid, 3)] = SCL_NODATA
    return classes


def _steps() -> dict[str, int]:
    """Band -> its pixel side in 10 m pixels, in the order of OPTICAL_BANDS."""
    group_of = {band: group for group, bands in NATIVE_GROUPS.items() for band in bands}
    return {band: RESOLUTION_M[group_of[band]] // 10 for band in OPTICAL_BANDS}


def _size(frame: Frame, step: int) -> tuple[int, int]:
    return frame.height_px // step, frame.width_px // step


def _block_mean(values: Floats, step: int) -> Floats:
    if step == 1:
        return values
    rows = sum((values[i::step] for i in range(1, step)), start=values[0::step])
    total: Floats = sum((rows[:, i::step] for i in range(1, step)), start=rows[:, 0::step])
    return total / np.float32(step * step)


def _grow(mask: NDArray[np.bool_], factor: int) -> NDArray[np.bool_]:
    return mask.repeat(factor, axis=0).repeat(factor, axis=1)
