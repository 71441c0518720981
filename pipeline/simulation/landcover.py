"""The landscape: what lies at a place of the world plane, the same for every sensor, date and projection.

Polygons about 1.9 km wide carry a land cover, with smaller ones of another cover in some of them. Within, each
cover has its own pattern, seen by both sensors: canopies, shrub clumps, smooth swards, furrows within polygonal
fields, streets and houses, ripples, pools. What the sensors share of a place is this and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pipeline.simulation.frame import Frame, Plane
from pipeline.simulation.noise import Floats, Hashes, lattice_hash, normal, polygons, uniform, value_noise
from pipeline.simulation.spectra import (
    BARE,
    BUILT,
    CROPS,
    GRASS,
    LAND_COVERS,
    SHRUBS,
    TREES,
    WATER,
    WETLAND,
    LandCover,
    of_class,
)

_PATCH_M: Final = 1900.0
_INCLUSION_M: Final = 650.0
_INCLUSION_SHARE: Final = 0.12
_STRIP_PX: Final = 120
_CONTRAST_SPREAD: Final = np.float32(0.2)
"""Relative standard deviation of how marked a pattern is, between parcels."""

CODES: Final = np.array([cover.code for cover in LAND_COVERS], np.uint8)
"""Class index -> ESA WorldCover code."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Land:
    """The landscape under a frame, one (row, column) array per property."""

    cover: NDArray[np.uint8]
    """Index into LAND_COVERS."""

    brightness: Floats
    """How this field, stand or quarter differs from the class in all optical bands: standard normal."""

    vigour: Floats
    """How it differs in the step from red to near infrared: standard normal."""

    dryness: Floats
    """How it differs in the short-wave infrared: standard normal."""

    lateness: Floats
    """How late its season is: standard normal."""

    roughness: Floats
    """How it differs from the class for radar, standard normal."""

    texture: Floats
    """Pattern within the parcel as light sees it, about mean 0 and standard deviation 1."""

    scatter: Floats
    """Pattern within the parcel as radar sees it, about mean 0 and standard deviation 1."""

    facing: Floats
    """How squarely walls and furrows face east-west looks: -1 to 1."""

    def window(self, row: int, column: int, height_px: int, width_px: int) -> Land:
        """A part of it, as views."""
        part = np.s_[row : row + height_px, column : column + width_px]
        return Land(**{field.name: getattr(self, field.name)[part] for field in fields(self)})


def survey(frame: Frame, plane: Plane, *, seed: int) -> Land:
    """The landscape under every pixel of a frame, in any projection."""
    shape = frame.height_px, frame.width_px
    land = Land(
        cover=np.empty(shape, np.uint8),
        **{field.name: np.empty(shape, np.float32) for field in fields(Land) if field.name != "cover"},
    )
    for start in range(0, frame.height_px, _STRIP_PX):  # strips stay in the processor's cache
        stop = min(start + _STRIP_PX, frame.height_px)
        x_m, y_m = np.broadcast_arrays(*frame.rows(start, stop).on_plane(plane))
        _survey_into(land.window(start, 0, stop - start, frame.width_px), x_m, y_m, seed)
    return land


def cover_at(x_m: Floats, y_m: Floats, *, seed: int) -> tuple[NDArray[np.uint8], Hashes]:
    """Class index and patch hash of places of the plane."""
    # Bent coordinates: straight borders would give the polygons away.
    bent_x = x_m + np.float32(130.0) * value_noise(x_m, y_m, spacing_m=700.0, seed=seed + 1)
    bent_y = y_m + np.float32(130.0) * value_noise(x_m, y_m, spacing_m=700.0, seed=seed + 2)
    patch = polygons(bent_x, bent_y, spacing_m=_PATCH_M, seed=seed + 3)
    inclusion = polygons(bent_x, bent_y, spacing_m=_INCLUSION_M, seed=seed + 4)
    patch = np.where(uniform(inclusion, 1) < _INCLUSION_SHARE, inclusion, patch)
    limits = np.cumsum([cover.share for cover in LAND_COVERS]).astype(np.float32)[:-1]
    return np.searchsorted(limits, uniform(patch, 2), side="right").astype(np.uint8), patch


def greenness(land: Land, season_day: int) -> Floats:
    """Share of grown vegetation in each pixel's mixture (0-1) on a day of the northern year."""
    numbers = of_class(land.cover, "greenness", "peak_day", "season_days", "spread_days")
    lowest, highest, peak, season, spread = numbers
    days_off = (season_day - peak - spread * land.lateness + 182.5) % 365 - 182.5
    grown: Floats = lowest + (highest - lowest) * np.exp(-0.5 * (days_off / season) ** 2)
    return grown


def _survey_into(land: Land, x_m: Floats, y_m: Floats, seed: int) -> None:
    cover, patch = cover_at(x_m, y_m, seed=seed)
    land.cover[:] = cover
    for index, kind in enumerate(LAND_COVERS):
        here = cover == index
        if here.any():
            detail = _details(kind, x_m[here], y_m[here], patch[here], seed + 1000 * (index + 1))
            for name, values in detail.items():
                getattr(land, name)[here] = values


def _details(kind: LandCover, x_m: Floats, y_m: Floats, patch: Hashes, seed: int) -> dict[str, Floats]:
    """All but the cover, for places of one class."""
    angle = uniform(patch, 3) * np.float32(np.pi)
    along, across = _turned(x_m, y_m, angle)
    parcel = patch  # a lake is one; land is divided
    if kind is not WATER:
        parcel = polygons(along / np.float32(1.8), across, spacing_m=210.0, seed=seed) ^ patch
    texture, scatter = _PATTERNS[kind.name](_Place(x_m, y_m, along, across, parcel, seed))
    return {
        "brightness": _spread(parcel, patch, 4),
        "vigour": _spread(parcel, patch, 5),
        "dryness": _spread(parcel, patch, 6),
        "lateness": _spread(parcel, patch, 7),
        "roughness": _spread(parcel, patch, 8),
        "texture": texture * np.exp(_CONTRAST_SPREAD * _spread(parcel, patch, 9)),
        "scatter": scatter * np.exp(_CONTRAST_SPREAD * _spread(parcel, patch, 10)),
        "facing": np.cos(2 * angle),
    }


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a pattern is asked for: plane and patch-aligned coordinates in metres, and the parcel."""

    x_m: Floats
    y_m: Floats
    along_m: Floats
    across_m: Floats
    parcel: Hashes
    seed: int

    def noise(self, spacing_m: float, layer: int) -> Floats:
        return value_noise(self.x_m, self.y_m, spacing_m=spacing_m, seed=self.seed + layer)


Pattern = Callable[[_Place], tuple[Floats, Floats]]


def _canopy(place: _Place) -> tuple[Floats, Floats]:
    """Crowns and gaps 20-30 m wide; radar sees the same crowns."""
    crowns = place.noise(26.0, 1)
    return crowns, 0.8 * crowns + 0.6 * place.noise(30.0, 2)


def _clumps(place: _Place) -> tuple[Floats, Floats]:
    """Bushes on open ground: two levels, 60 m apart."""
    bushes: Floats = np.float32(1.05) * np.tanh(4.0 * (place.noise(62.0, 1) - 0.3))
    return -bushes, bushes


def _sward(place: _Place) -> tuple[Floats, Floats]:
    """Gentle moist and dry parts, 200 m wide."""
    moist = place.noise(210.0, 1)
    return moist, 0.8 * moist + 0.6 * place.noise(160.0, 2)


def _furrows(place: _Place) -> tuple[Floats, Floats]:
    """Straight beds 34-50 m wide along or across the field."""
    width_m = 34.0 + 16.0 * uniform(place.parcel, 11)
    position = np.where(uniform(place.parcel, 12) < 0.7, place.across_m, place.along_m)
    beds: Floats = np.float32(1.3) * np.sin(np.float32(2 * np.pi) * position / width_m)
    return beds, -beds


def _streets(place: _Place) -> tuple[Floats, Floats]:
    """Blocks of houses between dark streets; some houses send radar straight back."""
    street = np.minimum(_saw(place.along_m, 110.0), _saw(place.across_m, 80.0)) < 11.0
    column = np.floor(place.along_m / 20.0).astype(np.int32)
    row = np.floor(place.across_m / 20.0).astype(np.int32)
    house = lattice_hash(column, row, place.seed)
    roof = np.float32(2.6) * uniform(house, 1) - np.float32(1.0)
    corner = np.where(uniform(house, 2) > 0.85, np.float32(2.9), np.float32(-0.35))
    return np.where(street, np.float32(-1.2), roof), np.where(street, np.float32(-0.8), corner)


def _ripples(place: _Place) -> tuple[Floats, Floats]:
    """Curved ridges about 90 m apart."""
    bend = np.float32(60.0) * place.noise(260.0, 1)
    ridges: Floats = np.float32(1.2) * np.sin(np.float32(2 * np.pi / 90.0) * (place.across_m + bend))
    return ridges, ridges


def _pools(place: _Place) -> tuple[Floats, Floats]:
    """Reeds with open pools 100 m wide: dark to light, and far darker to radar."""
    reeds: Floats = np.float32(1.05) * np.tanh(3.0 * (place.noise(105.0, 1) + 0.45))
    return reeds, reeds


def _waves(place: _Place) -> tuple[Floats, Floats]:
    """Turbidity and wind streaks hundreds of metres long."""
    return place.noise(420.0, 1), place.noise(500.0, 2)


_PATTERNS: Final[dict[str, Pattern]] = {
    WATER.name: _waves,
    TREES.name: _canopy,
    SHRUBS.name: _clumps,
    GRASS.name: _sward,
    CROPS.name: _furrows,
    BUILT.name: _streets,
    BARE.name: _ripples,
    WETLAND.name: _pools,
}


def _turned(x_m: Floats, y_m: Floats, angle: Floats) -> tuple[Floats, Floats]:
    cosine, sine = np.cos(angle), np.sin(angle)
    return x_m * cosine + y_m * sine, y_m * cosine - x_m * sine


def _saw(position_m: Floats, period_m: float) -> Floats:
    """Distance to the nearest line of a grating."""
    distance: Floats = np.abs(position_m - np.round(position_m / period_m) * np.float32(period_m))
    return distance


def _spread(parcel: Hashes, patch: Hashes, draw: int) -> Floats:
    """Standard normal per parcel; the parcels of one patch are alike, as half of their variance is the patch's."""
    return np.float32(np.sqrt(0.5)) * (normal(parcel, 2 * draw) + normal(patch, 2 * draw + 1))
