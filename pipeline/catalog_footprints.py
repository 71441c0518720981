"""Where an item has data: its geometry in degrees, valid and within ±180, or a reason why it cannot be had."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import pyproj
import pyproj.exceptions
import shapely
from shapely.geometry.base import BaseGeometry

from pipeline.antimeridian import polygons_of, within_180

Feature = Mapping[str, Any]
"""A STAC item as JSON."""

_WHERE_IT_SAYS = 0.9
"""A geometry in metres is believed if this share of it is where the item says elsewhere that its pixels are."""

_LONGEST_EDGE_M = 20_000.0


class ItemError(ValueError):
    """An item that cannot be used; the message says which and why."""


def footprint_of(feature: Feature, epsg: int, notes: list[str]) -> BaseGeometry:
    """The item's geometry in degrees, valid, within ±180."""
    if not feature.get("geometry"):
        raise ItemError("has no geometry")
    geometry = shapely.force_2d(shapely.geometry.shape(feature["geometry"]))
    if not np.isfinite(geometry.bounds).all():
        raise ItemError("has an empty geometry, or one with coordinates that are no numbers")
    west, south, east, north = geometry.bounds
    if west < -360 or east > 360 or south < -90 or north > 90:
        geometry = _out_of_metres(feature, geometry, epsg)
        notes.append(f"had a geometry in metres of EPSG:{epsg}: brought to degrees")
    if any(part.bounds[2] - part.bounds[0] > 180 for part in shapely.get_parts(geometry)):
        geometry = shapely.transform(geometry, _eastward)
        notes.append("had a geometry the long way around the earth: split at the antimeridian")
    if not geometry.is_valid:
        notes.append(f"had an invalid geometry ({shapely.is_valid_reason(geometry)}): repaired")
    geometry = within_180(_valid(geometry))
    if geometry.area == 0:
        raise ItemError("has a geometry without area")
    return geometry


def _out_of_metres(feature: Feature, geometry: BaseGeometry, epsg: int) -> BaseGeometry:
    """A geometry in the item's own projection in degrees, where the item says elsewhere that it lies there."""
    bounds = feature["properties"].get("proj:bbox") or _raster_bounds(feature["properties"])
    geometry = _valid(geometry)
    if bounds is None or share_within(geometry, [shapely.box(*bounds)]) < _WHERE_IT_SAYS:
        raise ItemError(
            f"has a geometry that is not in degrees (bounds {geometry.bounds}) and does not lie where proj:bbox or "
            f"proj:transform say (EPSG:{epsg}, {bounds})"
        )
    # Straight lines of a projection are curves in degrees.
    dense = shapely.segmentize(geometry, _LONGEST_EDGE_M)
    try:
        moved = shapely.transform(dense, _to_degrees(epsg).transform, interleaved=False)
    except pyproj.exceptions.ProjError as error:
        raise ItemError(f"has a geometry in metres of EPSG:{epsg}, from which there is no way: {error}") from error
    if not np.isfinite(moved.bounds).all():
        raise ItemError(f"has a geometry that lies nowhere in EPSG:{epsg}")
    return moved


def _raster_bounds(properties: Mapping[str, Any]) -> tuple[float, float, float, float] | None:
    transform, shape = properties.get("proj:transform"), properties.get("proj:shape")
    if not transform or not shape:
        return None
    x = sorted((transform[2], transform[2] + transform[0] * shape[1]))
    y = sorted((transform[5], transform[5] + transform[4] * shape[0]))
    return (x[0], y[0], x[1], y[1])


def _eastward(coordinates: Any) -> Any:
    return np.where(coordinates[:, :1] < 0, coordinates + np.array([360.0, 0.0]), coordinates)


def _valid(geometry: BaseGeometry) -> BaseGeometry:
    return geometry if geometry.is_valid else polygons_of(shapely.make_valid(geometry, method="structure"))


def share_within(geometry: BaseGeometry, others: list[BaseGeometry]) -> float:
    """Share of a geometry's area that lies in any of the others."""
    return float(geometry.intersection(shapely.union_all(others)).area / geometry.area) if geometry.area else 0.0


@cache
def _to_degrees(epsg: int) -> pyproj.Transformer:
    return pyproj.Transformer.from_crs(epsg, 4326, always_xy=True)
