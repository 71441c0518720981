"""Which radar acquisition goes with which optical one, cell by cell, and why the others do not."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Literal

import shapely
from shapely import STRtree

from pipeline.grid import Cell
from pipeline.types import Acquisition, Item

_OVERPASS_GAP = timedelta(minutes=30)
"""Items of one platform and relative orbit that start further apart than this are of different overpasses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PairRules:
    """What makes a pair."""

    max_dt_days: float
    """Largest |time between the two acquisitions|."""

    max_cloud_percent: float
    """Optical items with more cloud over their whole scene are not considered."""

    min_overlap: float
    """Smallest fraction of the cell that both footprints cover, each."""

    per_cell: Literal["all", "one"]
    """All pairs of a cell, or the best one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One optical and one radar acquisition of a cell."""

    cell: Cell
    optical: Acquisition
    """Only the items that meet the cell."""

    radar: Acquisition
    """Only the items that meet the cell."""

    id: str
    """Names the two overpasses; the same for all their cells."""

    overlap: float
    """Smaller of the two fractions of the cell that the footprints cover."""

    @property
    def dt_s(self) -> int:
        """Radar time minus optical time, seconds."""
        return round((self.radar.datetime - self.optical.datetime).total_seconds())


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejection:
    """A candidate that was not taken."""

    cell: str
    optical: str
    """Optical acquisition, empty if there was none."""

    reason: str
    """no_optical | cloudy_scene | too_little_overlap | no_radar_in_time | another_pair_taken."""

    detail: str


def acquisitions(items: Iterable[Item]) -> list[Acquisition]:
    """Group the items of one sensor by overpass: same platform and relative orbit, less than half an hour apart."""
    tracks: dict[tuple[str, int], list[Item]] = defaultdict(list)
    for item in items:
        tracks[item.platform, item.relative_orbit].append(item)
    found: list[Acquisition] = []
    for track in tracks.values():
        track.sort(key=lambda item: (item.datetime, item.id))
        start = 0
        for end in range(1, len(track) + 1):
            if end == len(track) or track[end].datetime - track[end - 1].datetime > _OVERPASS_GAP:
                found.append(Acquisition(sensor=track[0].sensor, items=tuple(track[start:end])))
                start = end
    return sorted(found, key=lambda acquisition: (acquisition.datetime, acquisition.id))


def pair_cells(
    cells: Sequence[Cell], optical: Sequence[Acquisition], radar: Sequence[Acquisition], rules: PairRules
) -> tuple[list[Pair], list[Rejection]]:
    """Pair the acquisitions over each cell.

    Every optical acquisition of a cell goes with the radar acquisition nearest in time; of two equally near, the
    earlier. With `per_cell="one"` the least cloudy of these pairs is taken; ties go to the smaller |dt|, then to the
    earlier optical acquisition.

    Returns:
        Pairs in the order of `cells` and of time; and what was not taken, with the reason. Every (cell, optical
        acquisition that meets it) is in exactly one of the two.
    """
    seen_by = [_over_cells(cells, acquisitions_) for acquisitions_ in (optical, radar)]
    pairs: list[Pair] = []
    rejections: list[Rejection] = []
    for index, cell in enumerate(cells):
        found, refused = _pairs_of_cell(cell, seen_by[0][index], seen_by[1][index], rules)
        if rules.per_cell == "one" and len(found) > 1:
            found.sort(key=lambda p: (_cloud_percent(p.optical), abs(p.dt_s), p.optical.datetime))
            refused += [_reject(cell, p.optical, "another_pair_taken", found[0].id) for p in found[1:]]
            found = found[:1]
        pairs += found
        rejections += refused
    return pairs, rejections


def _pairs_of_cell(
    cell: Cell, optical: list[Acquisition], radar: list[Acquisition], rules: PairRules
) -> tuple[list[Pair], list[Rejection]]:
    if not optical:
        return [], [Rejection(cell=cell.id, optical="", reason="no_optical", detail="no optical item meets the cell")]
    pairs: list[Pair] = []
    refused: list[Rejection] = []
    covering = [(other, _overlap(cell, other)) for other in radar]
    covering = [(other, share) for other, share in covering if share >= rules.min_overlap]
    for look in optical:
        share = _overlap(cell, look)
        if _cloud_percent(look) > rules.max_cloud_percent:
            refused.append(_reject(cell, look, "cloudy_scene", f"{_cloud_percent(look):.1f} %"))
        elif share < rules.min_overlap:
            refused.append(_reject(cell, look, "too_little_overlap", f"{share:.3f} of the cell"))
        elif not covering:
            refused.append(_reject(cell, look, "no_radar_in_time", "no radar acquisition covers the cell"))
        else:
            twin, twin_share = min(covering, key=lambda o: (abs(o[0].datetime - look.datetime), o[0].datetime))
            dt = abs(twin.datetime - look.datetime)
            if dt > timedelta(days=rules.max_dt_days):
                refused.append(
                    _reject(cell, look, "no_radar_in_time", f"nearest is {dt / timedelta(days=1):.2f} days away")
                )
            else:
                pairs.append(
                    Pair(
                        cell=cell,
                        optical=look,
                        radar=twin,
                        id=f"{look.id}+{twin.id}",
                        overlap=min(share, twin_share),
                    )
                )
    return pairs, refused


def _over_cells(cells: Sequence[Cell], looks: Sequence[Acquisition]) -> list[list[Acquisition]]:
    """For each cell, the acquisitions that meet it, reduced to the items that do; in order of time."""
    over: list[list[Acquisition]] = [[] for _ in cells]
    owners = [(look, item) for look in looks for item in look.items]
    if not owners:
        return over
    tree = STRtree([item.footprint for _, item in owners])
    hits: list[dict[int, list[Item]]] = [defaultdict(list) for _ in cells]
    positions = {id(look): number for number, look in enumerate(looks)}
    for cell_index, owner_index in tree.query([cell.footprint for cell in cells], predicate="intersects").T:
        look, item = owners[owner_index]
        hits[cell_index][positions[id(look)]].append(item)
    for index, found in enumerate(hits):
        for number in sorted(found):
            over[index].append(_narrowed(looks[number], found[number]))
    return over


def _narrowed(look: Acquisition, items: list[Item]) -> Acquisition:
    return replace(look, items=tuple(sorted(items, key=lambda i: (i.datetime, i.id))), overpass=look.id)


def _overlap(cell: Cell, look: Acquisition) -> float:
    footprint = cell.footprint
    covered = shapely.union_all([item.footprint for item in look.items]).intersection(footprint)
    return float(covered.area / footprint.area)


def _cloud_percent(look: Acquisition) -> float:
    return max(item.cloud_percent for item in look.items)


def _reject(cell: Cell, look: Acquisition, reason: str, detail: str) -> Rejection:
    return Rejection(cell=cell.id, optical=look.id, reason=reason, detail=detail)
