"""Areas that no chip may come near: the footprints of evaluation sets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray
from shapely import STRtree

from pipeline.grid import Cell, cell_squares, in_plane
from pipeline.overlap import zones_of
from pipeline.pairing import Rejection
from pipeline.places import Places


@dataclass(frozen=True, slots=True, kw_only=True)
class ExclusionRules:
    """What is kept out."""

    areas: Places
    """Points, boxes and polygons."""

    buffer_m: float
    """A cell is out if its square comes within this distance of an area, in the plane of its zone."""

    def __post_init__(self) -> None:
        if self.buffer_m < 0:
            raise ValueError(f"buffer_m must not be negative, got {self.buffer_m}")


def keep_out(cells: Sequence[Cell], rules: ExclusionRules) -> tuple[list[Cell], list[Rejection]]:
    """Take out the cells that come too near to an area.

    Returns:
        Cells that are left, in the order given; and one rejection for each that is not, which names the nearest area.
    """
    nearest = np.full(len(cells), -1)
    distance = np.full(len(cells), np.inf)
    for epsg, places, window in zones_of(cells):
        area, shapes = _near(rules, window)
        columns, rows = (np.array([getattr(cells[p], name) for p in places]) for name in ("column", "row"))
        squares = cell_squares(epsg, columns, rows, side_m=cells[places[0]].side_m)
        planes = in_plane(shapes, epsg)
        shapely.prepare(planes)
        hit, cell = STRtree(squares).query(planes, predicate="dwithin", distance=rules.buffer_m)
        gap = shapely.distance(planes[hit], squares[cell])
        order = np.lexsort((area[hit], gap, cell))
        first = order[np.flatnonzero(np.diff(cell[order], prepend=-1))]
        nearest[places[cell[first]]], distance[places[cell[first]]] = area[hit[first]], gap[first]
    kept = [cell for cell, area in zip(cells, nearest.tolist(), strict=True) if area < 0]
    rejections = [
        Rejection(cell=cell.id, optical="", reason="excluded", detail=f"{rules.areas.names[area]} is {gap:.0f} m away")
        for cell, area, gap in zip(cells, nearest.tolist(), distance.tolist(), strict=True)
        if area >= 0
    ]
    return kept, rejections


def _near(rules: ExclusionRules, window: tuple[float, float, float, float]) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """(place among the areas, what of it may be within the buffer of a window of longitude/latitude)."""
    west, south, east, north = window
    up = rules.buffer_m / 110_000.0
    aside = up / np.cos(np.radians(min(max(abs(south), abs(north)) + up, 89.0)))
    bounds = shapely.bounds(rules.areas.shapes)
    areas, shapes = [], []
    for turn in (-360.0, 0.0, 360.0):
        box = shapely.box(west - aside + turn, south - up, east + aside + turn, north + up)
        left, bottom, right, top = box.bounds
        meet = (bounds[:, 0] <= right) & (bounds[:, 2] >= left) & (bounds[:, 1] <= top) & (bounds[:, 3] >= bottom)
        parts = shapely.intersection(rules.areas.shapes[meet], box)
        there = ~shapely.is_empty(parts)
        areas.append(np.flatnonzero(meet)[there])
        # Lines that are straight in degrees are curves in the plane.
        shapes.append(shapely.segmentize(parts[there], 0.05))
    return np.concatenate(areas), np.concatenate(shapes)
