"""A region and a period cut into pieces of about the size that a catalog answers gladly."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

import shapely
from shapely.geometry.base import BaseGeometry

SIDE_DEG = 5
"""Side of the grid of areas. A month of one area is some 500 Sentinel-2 items: a handful of pages."""


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Piece:
    """What is asked for at once: a box and at most one calendar month."""

    start: datetime
    end: datetime
    """Half-open, UTC."""

    bounds: tuple[float, float, float, float]
    """West, south, east, north in whole degrees."""

    @property
    def name(self) -> str:
        """As it is said in messages: ``10,45,15,50 in 2023-06-01/2023-07-01``."""
        return f"{','.join(f'{value:g}' for value in self.bounds)} in {_when(self.start)}/{_when(self.end)}"

    def key(self, stac_url: str, collection: str) -> str:
        """Name of what was found in it, the same for whoever asks the same catalog for the same piece."""
        asked = "|".join((stac_url, collection, *map(repr, self.bounds), self.start.isoformat(), self.end.isoformat()))
        return f"{collection}/{self.start:%Y-%m}/{hashlib.sha256(asked.encode()).hexdigest()[:20]}"


def pieces_of(region: BaseGeometry, period: tuple[datetime, datetime], *, side_deg: int = SIDE_DEG) -> list[Piece]:
    """Pieces that together hold a region and a period.

    Months follow each other without gap or overlap. Boxes are those of a fixed grid that the region meets, so that the
    next search in the neighbourhood finds what this one kept; where the region needs less than half of a box, it is cut
    to that, rounded outward to whole degrees.

    Args:
        region: Longitude/latitude; what crosses the antimeridian comes in two parts.
        period: Half-open, UTC.
        side_deg: Side of the grid's boxes, whole degrees.
    """
    boxes = list(boxes_of(region, side_deg=side_deg))
    return [Piece(start=start, end=end, bounds=box) for start, end in _months(*period) for box in boxes]


def boxes_of(region: BaseGeometry, *, side_deg: int = SIDE_DEG) -> Iterator[tuple[float, float, float, float]]:
    """The boxes of `pieces_of`."""
    shapely.prepare(region)
    west, south, east, north = region.bounds
    for x in _steps(west, east, side_deg):
        for y in _steps(south, north, side_deg):
            box = shapely.box(x, y, x + side_deg, y + side_deg)
            if not region.intersects(box):
                continue
            inside = region.intersection(box).bounds
            # What only touches a box from outside would leave it without area.
            left, bottom = min(math.floor(inside[0]), x + side_deg - 1), min(math.floor(inside[1]), y + side_deg - 1)
            right, top = max(math.ceil(inside[2]), left + 1), max(math.ceil(inside[3]), bottom + 1)
            if (right - left) * (top - bottom) >= side_deg**2 / 2:
                left, bottom, right, top = x, y, x + side_deg, y + side_deg
            yield (float(left), float(bottom), float(right), float(top))


def _steps(low: float, high: float, side: int) -> range:
    """Where the grid's boxes begin that meet an interval."""
    return range(math.floor(low / side) * side, max(math.ceil(high), math.floor(low) + 1), side)


def _months(start: datetime, end: datetime) -> Iterator[tuple[datetime, datetime]]:
    while start < end:
        year, month = divmod(start.year * 12 + start.month, 12)
        following = min(datetime(year, month + 1, 1, tzinfo=UTC), end)
        yield start, following
        start = following


def _when(time: datetime) -> str:
    midnight = time.hour == time.minute == time.second == time.microsecond == 0
    return f"{time:%Y-%m-%d}" if midnight else f"{time:%Y-%m-%dT%H:%M:%SZ}"
