"""Which acquisitions cover which cells, how much of them, and by which of their items; in the planes of the cells."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import numpy as np
import shapely
from numpy.typing import NDArray
from shapely import STRtree
from shapely.geometry.base import BaseGeometry

from pipeline.grid import Cell, cell_squares, cells_bounds, in_plane, utm_box_lonlat
from pipeline.types import Acquisition, Item

Indices = NDArray[np.int64]
Floats = NDArray[np.float64]

_LEAST_SHARE: Final = 1e-6
"""Of a cell, 7 m² of 7 km²: what covers or adds less is taken not to."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sightings:
    """Acquisitions over cells, one entry for each that meets a cell; sorted by cell, time and id."""

    cell: Indices
    """(n,) place of the cell among the cells given."""

    time_us: Indices
    """(n,) start of the earliest item needed, microseconds since 1970, UTC."""

    share: Floats
    """(n,) fraction of the cell that the acquisition covers."""

    cloud_percent: Floats
    """(n,) of the cloudiest item needed."""

    narrowed: Indices
    """(n,) place in `acquisitions`."""

    acquisitions: list[Acquisition]
    """Reduced to the items that a cell needs, shared by all cells that need the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Hits:
    """Items over cells, one entry for each item that meets a cell; sorted by cell and item."""

    cell: Indices
    item: Indices
    share: Floats
    aligned: NDArray[np.bool_]
    """The item lies in the cell's zone: its pixels need no resampling."""

    whole: NDArray[np.bool_]
    """The item covers all of the cell."""

    piece: NDArray[Any]
    """What the item covers of the cell, in metres of the cell's zone."""


def sightings(cells: Sequence[Cell], looks: Sequence[Acquisition]) -> Sightings:
    """Find which acquisitions meet which cells, and reduce each to the fewest items that cover what it covers.

    Of the items of an acquisition a cell needs: those of its own zone before others, then those which cover more of it,
    then the earlier, then by id; each only if it adds something, and none that the others make superfluous. So where
    tiles overlap, one is read, and it is the same for all cells that it covers.
    """
    ordered = sorted(looks, key=lambda look: look.id)
    items = [
        (number, item)
        for number, look in enumerate(ordered)
        for item in sorted(look.items, key=lambda item: (item.datetime, item.id))
    ]
    if not items or not cells:
        none, nothing = np.empty(0, np.int64), np.empty(0, np.float64)
        return Sightings(cell=none, time_us=none, share=nothing, cloud_percent=nothing, narrowed=none, acquisitions=[])
    look_of_item = np.array([number for number, _ in items])
    hits = _hits(cells, [item for _, item in items])
    groups = _groups(hits.cell * len(ordered) + look_of_item[hits.item])
    chosen, share = _needed(hits, groups)
    acquisitions: list[Acquisition] = []
    known: dict[tuple[int, ...], int] = {}
    narrowed = np.empty(len(groups), np.int64)
    for place, members in enumerate(chosen):
        if members not in known:
            known[members] = len(acquisitions)
            look = ordered[look_of_item[members[0]]]
            acquisitions.append(replace(look, items=tuple(items[m][1] for m in members)))
        narrowed[place] = known[members]
    times = np.array([moment_us(look.datetime) for look in acquisitions], np.int64)
    clouds = np.array([max(item.cloud_percent for item in look.items) for look in acquisitions], np.float64)
    cell = hits.cell[groups]
    # By the ids that the cells know the acquisitions by, not by those of all that was found of an overpass.
    by_id = np.unique([look.id for look in acquisitions], return_inverse=True)[1]
    order = np.lexsort((by_id[narrowed], times[narrowed], cell))
    narrowed = narrowed[order]
    return Sightings(
        cell=cell[order],
        time_us=times[narrowed],
        share=share[order],
        cloud_percent=clouds[narrowed],
        narrowed=narrowed,
        acquisitions=acquisitions,
    )


def moment_us(moment: datetime) -> int:
    """Microseconds since 1970, UTC."""
    return (moment - _EPOCH) // timedelta(microseconds=1)


def lonlat_bounds(footprints: Iterable[BaseGeometry]) -> Floats:
    """(n, 4) west, south, east, north in degrees; east is beyond 180 for what crosses the antimeridian.

    That is taken to be what would otherwise reach around half the world: nothing that a satellite sees at once does.
    """
    shapes = np.asarray(list(footprints), dtype=object)
    bounds: Floats = shapely.bounds(shapes).reshape(-1, 4)
    for place in np.flatnonzero(bounds[:, 2] - bounds[:, 0] > 180.0):
        lon = shapely.get_coordinates(shapes[place])[:, 0]
        lon = np.where(lon < 0.0, lon + 360.0, lon)
        bounds[place, [0, 2]] = lon.min(), lon.max()
    return bounds


def meet_window(bounds: Floats, window: tuple[float, float, float, float]) -> NDArray[np.bool_]:
    """(n,) which of the bounds (n, 4) meet a window, all as in `lonlat_bounds`; full turns make no difference."""
    west, south, east, north = window
    meet = np.zeros(len(bounds), np.bool_)
    for turn in (-360.0, 0.0, 360.0):
        meet |= (bounds[:, 0] + turn <= east) & (bounds[:, 2] + turn >= west)
    return meet & (bounds[:, 1] <= north) & (bounds[:, 3] >= south)


def zones_of(cells: Sequence[Cell]) -> Iterator[tuple[int, Indices, tuple[float, float, float, float]]]:
    """(EPSG code, places of its cells, (west, south, east, north) around them in degrees) of every zone with cells."""
    members: dict[tuple[int, int], list[int]] = defaultdict(list)
    for place, cell in enumerate(cells):
        members[cell.epsg, cell.side_m].append(place)
    for (epsg, _), places in members.items():
        outline = utm_box_lonlat(epsg, cells_bounds(cells[place] for place in places))
        west, south, east, north = outline.bounds
        # Between the points at which the outline is followed it bulges a little.
        yield epsg, np.array(places), (west - 0.1, south - 0.1, east + 0.1, north + 0.1)


class Finder:
    """Finds what may be seen from a window among many acquisitions."""

    def __init__(self, looks: Sequence[Acquisition]) -> None:
        self._looks = looks
        self._items = [(number, item) for number, look in enumerate(looks) for item in look.items]
        self._tree = STRtree(shapely.box(*lonlat_bounds([item.footprint for _, item in self._items]).T))

    def near(self, window: tuple[float, float, float, float]) -> list[Acquisition]:
        """Acquisitions reduced to the items whose bounds meet (west, south, east, north), in the order given."""
        west, south, east, north = window
        turned = shapely.box(
            np.array([west - 360, west, west + 360]), south, np.array([east - 360, east, east + 360]), north
        )
        found: dict[int, list[Item]] = defaultdict(list)
        for place in np.unique(self._tree.query(turned)[1]).tolist():
            number, item = self._items[place]
            found[number].append(item)
        return [replace(self._looks[number], items=tuple(items)) for number, items in found.items()]


def _hits(cells: Sequence[Cell], items: Sequence[Item]) -> _Hits:
    footprints = np.array([item.footprint for item in items], dtype=object)
    bounds = lonlat_bounds(footprints)
    zone_of_item = np.array([item.epsg for item in items])
    parts: list[tuple[NDArray[Any], ...]] = []
    for epsg, places, window in zones_of(cells):
        near = np.flatnonzero(meet_window(bounds, window))
        planes = in_plane(footprints[near], epsg)
        columns, rows = (np.array([getattr(cells[p], name) for p in places]) for name in ("column", "row"))
        side_m = cells[places[0]].side_m
        squares = cell_squares(epsg, columns, rows, side_m=side_m)
        shapely.prepare(planes)
        item, cell = STRtree(squares).query(planes, predicate="intersects")
        whole = shapely.covers(planes[item], squares[cell])
        share = np.ones(len(item))
        piece = squares[cell]
        piece[~whole] = shapely.intersection(planes[item[~whole]], piece[~whole])
        share[~whole] = shapely.area(piece[~whole]) / side_m**2
        meets = share >= _LEAST_SHARE
        parts.append(
            (
                places[cell[meets]],
                near[item[meets]],
                share[meets],
                zone_of_item[near[item[meets]]] == epsg,
                whole[meets],
                piece[meets],
            )
        )
    cell, item, share, aligned, whole, piece = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.argsort(cell * len(items) + item)
    return _Hits(
        cell=cell[order],
        item=item[order],
        share=share[order],
        aligned=aligned[order],
        whole=whole[order],
        piece=piece[order],
    )


def _groups(keys: Indices) -> Indices:
    """First place of every run of equal keys."""
    return np.flatnonzero(np.diff(keys, prepend=-1))


def _needed(hits: _Hits, groups: Indices) -> tuple[list[tuple[int, ...]], Floats]:
    """Items that each cell needs of each acquisition, in order, and the share of the cell that they cover."""
    if not len(groups):
        return [], np.empty(0)
    ends = np.append(groups[1:], len(hits.cell))
    group_of = np.repeat(np.arange(len(groups)), ends - groups)
    some_aligned = np.logical_or.reduceat(hits.aligned, groups)
    # One item is enough where it covers all of the cell and no item of a better zone covers a part.
    enough = (hits.whole & (hits.aligned | ~some_aligned[group_of])) | (ends - groups == 1)[group_of]
    first = np.minimum.reduceat(np.where(enough, np.arange(len(enough)), len(enough)), groups)
    single = first < len(enough)
    share = hits.share[np.where(single, first, 0)]
    chosen: list[tuple[int, ...]] = [(item,) for item in hits.item[np.where(single, first, 0)].tolist()]
    for group in np.flatnonzero(~single):
        members = np.arange(groups[group], ends[group])
        kept, covered = _fewest(hits, members)
        chosen[group] = tuple(hits.item[kept].tolist())
        share[group] = covered
    return chosen, np.clip(np.round(share, 9), 0.0, 1.0).astype(np.float64)


def _fewest(hits: _Hits, members: Indices) -> tuple[list[int], float]:
    """Those of the members that together cover what all cover, in order; and the share of the cell that this is."""
    # Shares of almost the same size are the same: else which tile is read would change from cell to cell.
    order = sorted(members.tolist(), key=lambda m: (not hits.aligned[m], -round(float(hits.share[m]), 5), m))
    cell_area = shapely.area(hits.piece[members[0]]) / hits.share[members[0]]
    kept: list[int] = []
    covered = shapely.Polygon()
    for member in order:
        more = shapely.union(covered, hits.piece[member])
        if more.area - covered.area > _LEAST_SHARE * cell_area:
            kept.append(member)
            covered = more
    for member in reversed(kept[:]):
        others = shapely.union_all([hits.piece[other] for other in kept if other != member])
        if covered.area - others.area <= _LEAST_SHARE * cell_area:
            kept.remove(member)
    return sorted(kept), float(covered.area / cell_area)
