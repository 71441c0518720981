"""Clouds, their shadows and thin cirrus, as one overpass sees them from any tile."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pipeline.simulation.fields import nodes_of, over_pixels
from pipeline.simulation.frame import Frame, Plane
from pipeline.simulation.noise import Floats, fractal

_CLOUD_M: Final = 3200.0
_CIRRUS_M: Final = 5200.0
_HEIGHT_M: Final = 1300.0

SCL_NODATA: Final = 0
SCL_SHADOW: Final = 3
SCL_UNCLASSIFIED: Final = 7
SCL_CLOUD_MEDIUM: Final = 8
SCL_CLOUD_HIGH: Final = 9
SCL_CIRRUS: Final = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Sky:
    """What hides the land under a frame, one (row, column) array each."""

    opacity: Floats
    """Of water clouds, 0-1."""

    cirrus: Floats
    """Opacity of thin high cloud, 0 to about 0.25."""

    shadow: Floats
    """Share of the direct light that a cloud takes away, 0-1."""


def sky_over(
    frame: Frame, plane: Plane, *, cloud_fraction: float, sun_zenith_deg: float, sun_azimuth_deg: float, seed: int
) -> Sky:
    """The sky of one overpass; tiles of the same overpass (the same seed) share their clouds.

    Args:
        frame: Raster to cover.
        plane: World plane on which the clouds drift.
        cloud_fraction: Of the sky covered by water clouds, 0 to below 1.
        sun_zenith_deg: Angle of the sun from the vertical; shadows lengthen with it.
        sun_azimuth_deg: Direction of the sun, clockwise from north.
        seed: Of the overpass.
    """
    x_m, y_m = nodes_of(frame).on_plane(plane)
    length_m = _HEIGHT_M * np.tan(np.deg2rad(sun_zenith_deg))
    # A place lies in the shadow of the cloud that stands between it and the sun.
    to_cloud_x = np.float32(length_m * np.sin(np.deg2rad(sun_azimuth_deg)))
    to_cloud_y = np.float32(length_m * np.cos(np.deg2rad(sun_azimuth_deg)))
    opacity = _water_clouds(x_m, y_m, cloud_fraction, seed)
    shadow = _water_clouds(x_m + to_cloud_x, y_m + to_cloud_y, cloud_fraction, seed)
    high = fractal(x_m, y_m, spacing_m=_CIRRUS_M, seed=seed + 7, octaves=2)
    cirrus = 0.25 * np.clip(high - 1.3, 0.0, 1.0) if cloud_fraction else np.zeros_like(opacity)
    return Sky(
        opacity=over_pixels(opacity, frame),
        cirrus=over_pixels(cirrus, frame),
        shadow=over_pixels(shadow, frame),
    )


def scene_classification(sky: Sky, green: NDArray[np.bool_], water: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Sentinel-2's classes on the pixels of the sky: 3 shadow, 4 vegetation, 5 bare, 6 water, 7-10 clouds."""
    clear = np.where(water, 6, np.where(green, 4, 5))
    return np.select(
        [sky.opacity > 0.55, sky.opacity > 0.2, sky.opacity > 0.08, sky.cirrus > 0.06, sky.shadow > 0.3],
        [SCL_CLOUD_HIGH, SCL_CLOUD_MEDIUM, SCL_UNCLASSIFIED, SCL_CIRRUS, SCL_SHADOW],
        clear,
    ).astype(np.uint8)


def _water_clouds(x_m: Floats, y_m: Floats, cloud_fraction: float, seed: int) -> Floats:
    if cloud_fraction <= 0:
        return np.zeros(np.broadcast(x_m, y_m).shape, np.float32)
    billows = fractal(x_m, y_m, spacing_m=_CLOUD_M, seed=seed, octaves=4)
    threshold = np.float32(NormalDist().inv_cdf(1.0 - cloud_fraction))
    opacity: Floats = np.clip((billows - threshold) * np.float32(2.5) + np.float32(0.5), 0.0, 1.0)
    return opacity
