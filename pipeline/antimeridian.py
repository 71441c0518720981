"""Outlines in degrees across the antimeridian: counted on beyond 180 where they are made, cut where they are kept."""

from __future__ import annotations

import numpy as np
import shapely
from shapely.geometry.base import BaseGeometry


def within_180(geometry: BaseGeometry) -> BaseGeometry:
    """What lies beyond ±180 degrees of longitude moved to where it is; what lies within is returned as it is."""
    west, _, east, _ = geometry.bounds
    if west >= -180 and east <= 180:
        return geometry
    turns = (
        shapely.transform(geometry, lambda xy, turn=turn: xy + np.array([turn, 0.0])) for turn in (-360.0, 0.0, 360.0)
    )
    world = shapely.box(-180, -90, 180, 90)
    return polygons_of(shapely.union_all([turned.intersection(world) for turned in turns]))


def polygons_of(geometry: BaseGeometry) -> BaseGeometry:
    """Without the points and lines that repairing and cutting may leave."""
    parts = [part for part in shapely.get_parts(geometry) if part.geom_type in ("Polygon", "MultiPolygon")]
    return shapely.union_all(parts)
