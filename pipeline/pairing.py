"""Which radar acquisition goes with which optical one, cell by cell, and why the others do not."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from datetime import datetime, timedelta
from operator import itemgetter
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.grid import Cell, block_key
from pipeline.overlap import Finder, Sightings, moment_us, sightings, zones_of
from pipeline.types import Acquisition, Item, Sensor

_OVERPASS_GAP = timedelta(minutes=30)
"""Items of one track that start further apart than this are of different overpasses, if they do not say of which."""

_SLICE_GAP = timedelta(minutes=1)
"""A pass gets a new orbit number at the equator: its slices follow each other by half a minute all the same."""

_ORBIT = timedelta(minutes=100)
"""So far apart at most start items of one overpass; archives date some by the granule, others by the datatake."""

_DIRECTIONS: Final = ("ascending", "descending", "")
"""In the order of preference; the last is an archive that does not say."""

_DAY_US: Final = 86_400_000_000

_NEVER: Final = np.iinfo(np.int64).max

Indices = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class PairRules:
    """What makes a pair."""

    max_dt_days: float
    """Largest |time between the two acquisitions|."""

    max_cloud_percent: float
    """Optical acquisitions of which an item has more cloud over its whole scene are not considered."""

    min_overlap: float
    """Smallest fraction of the cell that both acquisitions cover, each."""

    per_cell: Literal["all", "one", "season"]
    """All pairs of a cell, the best one, or the best `per_season` of each meteorological quarter."""

    per_season: int = 1
    """With `per_cell="season"`: most pairs of a cell in a quarter (December to February, March to May, ...)."""

    orbit: Literal["any", "ascending", "descending", "same"] = "any"
    """Direction of the radar's orbit; `same` is one direction for all pairs of a cell."""

    one_track: bool = False
    """One relative orbit of the radar for all pairs of a cell: the same look angle every time."""

    relative_orbits: tuple[int, ...] = ()
    """Only these relative orbits of the radar; none named is all."""

    period: tuple[datetime, datetime] | None = None
    """When the optical acquisition of a pair must see the cell, half-open, UTC; the radar may be of before or after. So
    periods that follow each other have the pairs of all of them together."""

    def __post_init__(self) -> None:
        if self.per_season < 1:
            raise ValueError(f"per_season must be at least 1, got {self.per_season}")
        if not 0 < self.min_overlap <= 1:
            raise ValueError(f"min_overlap must be above 0 and at most 1, got {self.min_overlap}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One optical and one radar acquisition of a cell."""

    cell: Cell
    optical: Acquisition
    """Only the items that the cell needs."""

    radar: Acquisition
    """Only the items that the cell needs."""

    id: str
    """Names the two overpasses, see `Acquisition.id`; the same whatever else was searched."""

    overlap: float
    """Smaller of the two fractions of the cell that the acquisitions cover."""

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
    """The first that holds of: excluded | no_optical | cloudy_scene | too_little_overlap | no_radar |
    no_radar_in_time | other_orbit | another_pair_taken."""

    detail: str


def periods_to_search(
    period: tuple[datetime, datetime], *, max_dt_days: float
) -> dict[Sensor, tuple[datetime, datetime]]:
    """When to look for items of each sensor, for all pairs of a period."""
    start, end = period
    reach = timedelta(days=max_dt_days) + _ORBIT
    return {"optical": (start - _ORBIT, end + _ORBIT), "radar": (start - reach, end + reach)}


def acquisitions(items: Iterable[Item]) -> list[Acquisition]:
    """Group the items of one sensor by overpass, in order of time.

    Items of one platform and orbit since launch are of one overpass, whatever lies between them and whether that was
    found. Where a pass crosses the equator its orbit counts on: slices that lead up to the first of a new orbit, each
    starting within a minute of the next, go with the new orbit.

    Where an archive does not tell the orbit since launch, an overpass is a run of items of one relative orbit, each
    starting less than half an hour after the one before; it goes on across the equator in the same way.
    """
    platforms: dict[str, list[Item]] = defaultdict(list)
    for item in sorted(items, key=lambda item: (item.datetime, item.relative_orbit, item.id)):
        platforms[item.platform].append(item)
    runs = [run for flown in platforms.values() for run in (*_by_orbit(flown), *_by_time(flown))]
    found = [Acquisition(sensor=run[0].sensor, items=tuple(run)) for run in runs]
    return sorted(found, key=lambda acquisition: (acquisition.datetime, acquisition.id))


def _by_orbit(flown: Iterable[Item]) -> Iterator[list[Item]]:
    """The overpasses of one platform whose orbits are known; items in order of time."""
    orbits: dict[int, list[Item]] = defaultdict(list)
    for item in flown:
        if item.absolute_orbit is not None:
            orbits[item.absolute_orbit].append(item)
    tails = {orbit: _tail(run, orbits[orbit + 1][0]) for orbit, run in orbits.items() if orbit + 1 in orbits}
    for orbit, run in orbits.items():
        whole = [*tails.get(orbit - 1, ()), *run[: len(run) - len(tails.get(orbit, ()))]]
        if whole:
            yield whole


def _tail(run: Sequence[Item], following: Item) -> list[Item]:
    """The last of the items that lead up to another without a gap."""
    tail: list[Item] = []
    for item in reversed(run):
        if following.datetime - item.datetime > _SLICE_GAP:
            break
        tail.insert(0, following := item)
    return tail


def _by_time(flown: Iterable[Item]) -> list[list[Item]]:
    """The overpasses of one platform whose orbits are not known; items in order of time."""
    runs: list[list[Item]] = []
    current: dict[int, list[Item]] = {}
    previous: list[Item] = []
    for item in flown:
        if item.absolute_orbit is not None:
            continue
        run = current.get(item.relative_orbit, [])
        if not run or item.datetime - run[-1].datetime > _OVERPASS_GAP:
            run = previous if previous and _counts_on(previous[-1], item) else []
        if not run:
            runs.append(run)
        run.append(item)
        current[item.relative_orbit] = previous = run
    return runs


def _counts_on(before: Item, after: Item) -> bool:
    """Whether two items are of one pass on both sides of the equator; the last orbit of a cycle is followed by 1."""
    consecutive = after.relative_orbit in (before.relative_orbit + 1, 1)
    return consecutive and after.datetime - before.datetime <= _SLICE_GAP


def pair_cells(
    cells: Sequence[Cell], optical: Sequence[Acquisition], radar: Sequence[Acquisition], rules: PairRules
) -> tuple[list[Pair], list[Rejection]]:
    """Pair the acquisitions over each cell.

    Every optical acquisition of a cell goes with the radar acquisition nearest in time, as the cell sees them: by the
    start of the earliest item that it needs of each. Of equally near ones it is the earlier, then the one whose id
    comes first.

    Which of a cell's pairs are taken: with `per_cell="one"` the least cloudy; ties go to the smaller |dt|, then to the
    earlier optical acquisition, then by its id. With "season" the first of a quarter is chosen so, and each further one
    is the one furthest in time from those that are taken in the quarter; ties go to the less cloudy, and so on. What is
    taken in a quarter does not depend on other quarters: a later period adds pairs and changes none.

    With `orbit="same"` or `one_track`, a cell has the direction or relative orbit that gives it the most pairs under
    all other rules; ties go to the smaller sum of |dt|, then to the lower relative orbit, then to ascending. Near the
    equator, where orbits are counted on, a track may go by two numbers.

    The order of the arguments makes no difference but to the order of the results. What does not meet a cell makes none
    to what is said of it: the same pairs with the same ids come of every search that holds the cell.

    Returns:
        Pairs in the order of `cells` and of time; and what was not taken, with the reason, in the same order. Every
        (cell, optical acquisition that meets it in the period) is in exactly one of the two, and a cell without any is
        in the second.
    """
    seen, heard = _within(sightings(cells, optical), rules.period), sightings(cells, radar)
    chosen = _choose(seen, heard, rules)
    names = _PairNames(seen, heard)
    paired = np.flatnonzero(chosen.twin >= 0)
    twins = chosen.twin[paired]
    columns = (seen.cell[paired], seen.narrowed[paired], heard.narrowed[twins])
    overlap = np.minimum(seen.share[paired], heard.share[twins])
    pairs = [
        Pair(
            cell=cells[cell],
            optical=seen.acquisitions[look],
            radar=heard.acquisitions[twin],
            id=names[look, twin],
            overlap=share,
        )
        for cell, look, twin, share in zip(*(column.tolist() for column in (*columns, overlap)), strict=True)
    ]
    return pairs, _rejections(cells, seen, heard, chosen, rules, names)


def pairing_areas(
    cells: Sequence[Cell], optical: Sequence[Acquisition], radar: Sequence[Acquisition], *, cells_per_side: int
) -> Iterator[tuple[list[Cell], list[Acquisition], list[Acquisition]]]:
    """Cut what is to be paired into areas that can be paired apart, with the same result for every cell.

    Args:
        cells: In any order.
        optical: Of all areas.
        radar: Of all areas.
        cells_per_side: Side of the square areas in cells. A multiple of the side of blocks keeps blocks whole.

    Yields:
        Arguments of `pair_cells`: cells of one area, in the order given, and what may meet them. Areas come in the
        order of zones, columns and rows.
    """
    areas: dict[tuple[int, int, int], list[Cell]] = defaultdict(list)
    for cell in cells:
        areas[block_key(cell, cells_per_side=cells_per_side)].append(cell)
    finders = Finder(optical), Finder(radar)
    for key in sorted(areas):
        ((_, _, window),) = zones_of(areas[key])
        yield areas[key], finders[0].near(window), finders[1].near(window)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Choice:
    """What becomes of every optical sighting."""

    twin: Indices
    """(n,) radar sighting that it is paired with, -1 where it is not."""

    best: Indices
    """(n,) optical sighting that was taken instead, -1 where that is not the reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Candidates:
    """Optical sightings with a radar sighting near enough; each may be there once for every track of its cell."""

    track: Indices
    """(n,) the cell's track: place among all tracks of all cells."""

    optical: Indices
    """(n,) optical sighting."""

    radar: Indices
    """(n,) radar sighting."""

    dt_us: Indices
    """(n,) |time between them|, microseconds."""


def _within(seen: Sightings, period: tuple[datetime, datetime] | None) -> Sightings:
    """The sightings of a period."""
    if period is None:
        return seen
    start, end = (moment_us(moment) for moment in period)
    kept = np.flatnonzero((seen.time_us >= start) & (seen.time_us < end))
    columns = [column.name for column in fields(Sightings) if column.name != "acquisitions"]
    return replace(seen, **{name: getattr(seen, name)[kept] for name in columns})


def _choose(seen: Sightings, heard: Sightings, rules: PairRules) -> _Choice:
    usable = np.flatnonzero((seen.share >= rules.min_overlap) & (seen.cloud_percent <= rules.max_cloud_percent))
    cell_of_track, track_of_radar = _tracks(heard, rules)
    candidates = _candidates(seen, heard, usable, cell_of_track, track_of_radar, rules)
    taken, best = _taken(seen, candidates, rules)
    # Of each cell, the track with the most pairs, then with the smaller sum of |dt|, then the first.
    num_tracks = len(cell_of_track)
    pairs = np.bincount(candidates.track[taken], minlength=num_tracks)
    total_dt = np.zeros(num_tracks, np.int64)
    np.add.at(total_dt, candidates.track[taken], candidates.dt_us[taken])
    order = np.lexsort((np.arange(num_tracks), total_dt, -pairs, cell_of_track))
    winners = order[np.flatnonzero(np.diff(cell_of_track[order], prepend=-1))]
    won = np.zeros(num_tracks, np.bool_)
    won[winners] = True
    here = won[candidates.track]
    twin, instead = np.full((2, len(seen.cell)), -1)
    twin[candidates.optical[taken & here]] = candidates.radar[taken & here]
    instead[candidates.optical[here & ~taken]] = best[here & ~taken]
    return _Choice(twin=twin, best=instead)


def _tracks(heard: Sightings, rules: PairRules) -> tuple[Indices, Indices]:
    """Cut each cell's radar sightings into those that may be taken together.

    Returns:
        (track,) cell of each track, in order of cells, then of relative orbit, then ascending first; and (n,) track of
        each radar sighting, -1 for those that may not be taken.
    """
    firsts = [look.items[0] for look in heard.acquisitions]
    states = np.array([_DIRECTIONS.index(item.orbit_state) for item in firsts], np.int64)
    orbits = np.array([item.relative_orbit for item in firsts], np.int64)
    state, orbit = states[heard.narrowed], orbits[heard.narrowed]
    allowed = heard.share >= rules.min_overlap
    if rules.orbit in _DIRECTIONS:
        allowed &= state == _DIRECTIONS.index(rules.orbit)
    if rules.relative_orbits:
        allowed &= np.isin(orbit, rules.relative_orbits)
    kind = np.zeros(len(state), np.int64)
    if rules.one_track:
        kind = orbit * len(_DIRECTIONS) + state
    elif rules.orbit == "same":
        kind = state
    keys = heard.cell * (1 << 20) + kind
    distinct, places = np.unique(keys[allowed], return_inverse=True)
    track = np.full(len(keys), -1)
    track[allowed] = places
    return distinct >> 20, track


def _candidates(
    seen: Sightings,
    heard: Sightings,
    usable: Indices,
    cell_of_track: Indices,
    track_of_radar: Indices,
    rules: PairRules,
) -> _Candidates:
    # Every usable optical sighting, once for each track of its cell.
    first, last = (np.searchsorted(cell_of_track, seen.cell[usable], side=side) for side in ("left", "right"))
    optical = np.repeat(usable, last - first)
    track = np.arange(len(optical)) - np.repeat(np.cumsum(last - first) - last, last - first)
    allowed = np.flatnonzero(track_of_radar >= 0)
    nearest, dt_us = _nearest(track, seen.time_us[optical], track_of_radar[allowed], heard.time_us[allowed])
    near = dt_us <= _limit_us(rules)
    return _Candidates(track=track[near], optical=optical[near], radar=allowed[nearest[near]], dt_us=dt_us[near])


def _nearest(keys: Indices, times: Indices, among_keys: Indices, among_times: Indices) -> tuple[Indices, Indices]:
    """For each (key, time), the nearest in time with the same key; of equally near ones the earlier, then the first.

    Returns:
        (n,) places, -1 where no entry has the key; and (n,) |difference|, the largest integer where there is none.
    """
    nearest, gap = np.full(len(keys), -1), np.full(len(keys), _NEVER)
    if not len(among_keys):
        return nearest, gap
    order = np.lexsort((among_times, among_keys))
    # Key and rank of the time in one number, to search for both at once.
    moments = np.unique(among_times)
    ranked = among_keys[order] * (len(moments) + 1) + np.searchsorted(moments, among_times[order])
    after = np.searchsorted(ranked, keys * (len(moments) + 1) + np.searchsorted(moments, times))
    # Before comes the last that is earlier; the first of those that are equally early.
    before = np.searchsorted(ranked, ranked[np.maximum(after - 1, 0)])
    for place in (before, after):
        there = order[np.minimum(place, len(order) - 1)]
        valid = (among_keys[there] == keys) & (place < len(order))
        distance = np.where(valid, np.abs(among_times[there] - times), _NEVER)
        closer = distance < gap
        nearest[closer], gap[closer] = there[closer], distance[closer]
    return nearest, gap


def _taken(seen: Sightings, candidates: _Candidates, rules: PairRules) -> tuple[NDArray[np.bool_], Indices]:
    """Which candidates their track takes; and for each the optical sighting that is taken first where it competes."""
    num = len(candidates.track)
    if rules.per_cell == "all" or num == 0:
        return np.ones(num, np.bool_), candidates.optical
    keys = candidates.track
    if rules.per_cell == "season":
        season = _quarter(seen.time_us[candidates.optical])
        keys = keys * (1 << 20) + season
    # Sightings of a cell are in order of time and id.
    order = np.lexsort((candidates.optical, candidates.dt_us, seen.cloud_percent[candidates.optical], keys))
    starts = np.flatnonzero(np.diff(keys[order], prepend=-1))
    sizes = np.diff(np.append(starts, num))
    taken = np.zeros(num, np.bool_)
    taken[order[starts]] = True
    best = np.empty(num, np.int64)
    best[order] = np.repeat(candidates.optical[order[starts]], sizes)
    if rules.per_cell == "season" and rules.per_season > 1:
        for start, size in zip(starts.tolist(), sizes.tolist(), strict=True):
            members = order[start : start + size]
            taken[members[_spread(seen.time_us[candidates.optical[members]], rules.per_season)]] = True
    return taken, best


def _spread(times: Indices, num: int) -> list[int]:
    """Places of `num` of the times: the first, then again and again the one furthest from those already there."""
    chosen = [0]
    gap = np.abs(times - times[0])
    gap[0] = -1
    while len(chosen) < min(num, len(times)):
        chosen.append(int(np.argmax(gap)))
        gap = np.minimum(gap, np.abs(times - times[chosen[-1]]))
        gap[chosen] = -1
    return chosen


def _quarter(time_us: Indices) -> Indices:
    """Number of the meteorological quarter, counted from December 1969; December opens the next year's first."""
    months = time_us.astype("datetime64[us]").astype("datetime64[M]").astype(np.int64)
    return (months + 1) // 3


def _limit_us(rules: PairRules) -> int:
    return timedelta(days=rules.max_dt_days) // timedelta(microseconds=1)


class _PairNames(dict[tuple[int, int], str]):
    """(place of the optical acquisition, place of the radar acquisition) -> id of the pair."""

    def __init__(self, seen: Sightings, heard: Sightings) -> None:
        self._seen, self._heard = seen.acquisitions, heard.acquisitions

    def __missing__(self, places: tuple[int, int]) -> str:
        name = f"{self._seen[places[0]].id}+{self._heard[places[1]].id}"
        self[places] = name
        return name


def _rejections(
    cells: Sequence[Cell], seen: Sightings, heard: Sightings, chosen: _Choice, rules: PairRules, names: _PairNames
) -> list[Rejection]:
    whole = np.flatnonzero(heard.share >= rules.min_overlap)
    fullest = np.zeros(len(cells))
    np.maximum.at(fullest, heard.cell, heard.share)
    left = np.flatnonzero(chosen.twin < 0)
    nearest, dt_us = _nearest(seen.cell[left], seen.time_us[left], heard.cell[whole], heard.time_us[whole])
    columns = (seen.cell, seen.narrowed, seen.cloud_percent, seen.share, chosen.best)
    rows = zip(*(column[left].tolist() for column in columns), nearest.tolist(), dt_us.tolist(), strict=True)
    limit_us = _limit_us(rules)
    ids = [cell.id for cell in cells]
    looks = [look.id for look in seen.acquisitions]
    found: list[tuple[int, Rejection]] = []
    for cell, look, cloud, share, instead, near, dt in rows:
        if cloud > rules.max_cloud_percent:
            reason, detail = "cloudy_scene", f"{cloud:.1f} %"
        elif share < rules.min_overlap:
            reason, detail = "too_little_overlap", f"{share:.3f} of the cell"
        elif near < 0:
            reason, detail = "no_radar", f"the radar acquisition with most of the cell has {fullest[cell]:.3f} of it"
        elif dt > limit_us:
            reason, detail = "no_radar_in_time", f"nearest is {dt / _DAY_US:.2f} days away"
        elif instead < 0:
            other = heard.acquisitions[heard.narrowed[whole[near]]]
            days = f"{dt / _DAY_US:.2f} days away"
            reason, detail = "other_orbit", f"nearest is {other.id}, {other.items[0].orbit_state}, {days}"
        else:
            twin = chosen.twin[instead]
            reason, detail = "another_pair_taken", names[int(seen.narrowed[instead]), int(heard.narrowed[twin])]
        found.append((cell, Rejection(cell=ids[cell], optical=looks[look], reason=reason, detail=detail)))
    for cell in np.setdiff1d(np.arange(len(cells)), seen.cell).tolist():
        detail = "no optical item of the period meets the cell"
        found.append((cell, Rejection(cell=ids[cell], optical="", reason="no_optical", detail=detail)))
    return [rejection for _, rejection in sorted(found, key=itemgetter(0))]
