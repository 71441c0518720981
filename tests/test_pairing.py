"""Pairing: against a brute-force search, and the reasons for what is not taken."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import cache
from itertools import combinations

import numpy as np
import pytest
import shapely
from hypothesis import given
from hypothesis import strategies as st
from pyproj import Transformer

from pipeline.grid import Cell, cell_at, utm_box_lonlat
from pipeline.pairing import (
    Pair,
    PairRules,
    Rejection,
    acquisitions,
    pair_cells,
    pairing_areas,
    periods_to_search,
)
from pipeline.types import Acquisition, Item, Sensor

START = datetime(2023, 6, 1, tzinfo=UTC)
SIDE_M = 2640
CELLS = [Cell(epsg=32633, column=180 + c, row=2010 + r, side_m=SIDE_M) for r in range(2) for c in range(2)]
EVERYWHERE = shapely.union_all([cell.footprint for cell in CELLS]).envelope.buffer(0.1)

PLACES = {
    "plain": (13.0, 48.0),
    "zone border": (12.0, 48.0),
    "south": (30.001, -0.001),
    "antimeridian": (180.0, -17.0),
    "norway": (3.0, 60.0),
    "svalbard": (21.0, 78.5),
    "far north": (-42.0, 82.5),
}


def item(
    sensor: Sensor, hours: float, *, orbit: int = 1, footprint: shapely.Geometry = EVERYWHERE, **more: object
) -> Item:
    moment = START + timedelta(hours=hours)
    values: dict[str, object] = {
        "id": f"{sensor}-{hours:09.3f}-{orbit}",
        "collection": "c",
        "sensor": sensor,
        "datetime": moment,
        "epsg": 32633,
        "footprint": footprint,
        "assets": {},
        "platform": f"{sensor}-a",
        "relative_orbit": orbit,
        "orbit_state": "ascending",
        **more,
    }
    return Item(**values)  # type: ignore[arg-type]


def rules(**more: object) -> PairRules:
    values: dict[str, object] = {
        "max_dt_days": 3,
        "max_cloud_percent": 60,
        "min_overlap": 0.99,
        "per_cell": "all",
        **more,
    }
    return PairRules(**values)  # type: ignore[arg-type]


def as_is(polygon: shapely.Geometry) -> shapely.Geometry:
    return polygon


def cut_at_the_antimeridian(polygon: shapely.Geometry) -> shapely.Geometry:
    """As GeoJSON wants it: parts on both sides of 180 degrees."""
    parts = [
        shapely.transform(
            polygon.intersection(shapely.box(west, -90, west + 360, 90)), lambda c, w=west: c - (w + 180, 0)
        )
        for west in (-540, -180, 180)
    ]
    there = [polygon for part in parts for polygon in shapely.get_parts(part) if polygon.area > 0]
    return shapely.MultiPolygon(there) if len(there) > 1 else there[0]


def around_the_world(polygon: shapely.Geometry) -> shapely.Geometry:
    """As many catalogs have it: every longitude between -180 and 180, edges the wrong way round."""
    return shapely.transform(polygon, lambda c: np.column_stack([(c[:, 0] + 180) % 360 - 180, c[:, 1]]))


WRITTEN = [as_is, cut_at_the_antimeridian, around_the_world]


def cells_at(place: tuple[float, float]) -> list[Cell]:
    """Owned and other cells around a place, of all zones that meet there."""
    lon, lat = place
    found = []
    for east, north in ((-0.02, -0.01), (0.02, 0.01), (0.02, -0.01)):
        middle = cell_at((lon + east + 180) % 360 - 180, lat + north, side_m=SIDE_M)
        found += [replace(middle, column=middle.column + c) for c in (0, 1)]
    return list(dict.fromkeys(found))


@cache
def transformer(epsg: int) -> Transformer:
    return Transformer.from_crs(4326, epsg, always_xy=True)


@cache
def plane(geometry: shapely.Geometry, epsg: int) -> shapely.Geometry:
    """The footprint's corners, one by one, in metres of a zone."""
    forward = transformer(epsg)
    rings = [[forward.transform(x, y) for x, y in part.exterior.coords] for part in shapely.get_parts(geometry)]
    return shapely.union_all([shapely.make_valid(shapely.Polygon(ring)) for ring in rings])


def square(cell: Cell) -> shapely.Geometry:
    return shapely.box(*cell.bounds)


def share(cell: Cell, items: Sequence[Item]) -> float:
    return share_of(cell, tuple(item.footprint for item in items))


@cache
def share_of(cell: Cell, footprints: tuple[shapely.Geometry, ...]) -> float:
    covered = shapely.union_all([plane(footprint, cell.epsg).intersection(square(cell)) for footprint in footprints])
    return float(covered.area / square(cell).area)


NAMINGS = ["orbit", "datatakes of one orbit", "across the equator", "nothing"]
"""What the items of an overpass have in common, as the archive says."""


def named(naming: str, number: int, slice_number: int) -> dict[str, object]:
    """What the archive says of the overpass of an item."""
    orbit = 1000 + 10 * number
    return {
        "orbit": {"absolute_orbit": orbit},
        "datatakes of one orbit": {
            "absolute_orbit": orbit,
            "datatake": f"{START + timedelta(days=number, minutes=40 * slice_number):%Y%m%dT%H%M%S}",
        },
        "across the equator": {"absolute_orbit": orbit + slice_number, "relative_orbit": number + slice_number},
        "nothing": {},
    }[naming]


@st.composite
def scenes(draw: st.DrawFn) -> tuple[list[Cell], list[Item], list[Item]]:
    """Cells of a place and items of both sensors, written and named in all ways, some of several slices."""
    naming = draw(st.sampled_from(NAMINGS))
    cells = cells_at(PLACES[draw(st.sampled_from(sorted(PLACES)))])
    write = draw(st.sampled_from(WRITTEN))
    found: dict[Sensor, list[Item]] = {"optical": [], "radar": []}
    for sensor in found:
        for number in range(draw(st.integers(0, 5))):
            home = draw(st.sampled_from(cells))
            left, bottom, _, top = home.bounds
            # Multiples of a tenth of a cell: nothing is decided by the last bit.
            west, east = sorted(draw(st.lists(st.integers(-30, 30), min_size=2, max_size=2, unique=True)))
            middle = draw(st.integers(-1, 15))
            boxes = [(-30, middle), (middle, 30)] if draw(st.booleans()) else [(west, east)]
            hours = draw(st.integers(0, 150)) + number * 200
            for slice_number, (start, end) in enumerate(boxes):
                outline = utm_box_lonlat(
                    home.epsg,
                    (left + start * SIDE_M / 10, bottom - 5 * SIDE_M, left + end * SIDE_M / 10, top + 5 * SIDE_M),
                )
                same = {
                    "relative_orbit": draw(st.integers(1, 3)),
                    "orbit_state": draw(st.sampled_from(["ascending", "descending"])),
                }
                if slice_number:
                    same = {name: getattr(found[sensor][-1], name) for name in same}
                more: dict[str, object] = {
                    **same,
                    "id": f"{sensor}-{number}-{slice_number}",
                    "platform": f"{sensor}-{number}",
                    "footprint": write(outline),
                    "epsg": home.epsg,
                    "cloud_percent": float(number * 17 % 80),
                    **named(naming, number, slice_number),
                }
                found[sensor].append(item(sensor, hours if sensor == "optical" else hours // 3 * 3, **more))
    return cells, found["optical"], found["radar"]


anything = st.builds(
    rules,
    max_dt_days=st.sampled_from([1, 6, 30]),
    min_overlap=st.sampled_from([0.05, 0.45, 0.995]),
    per_cell=st.sampled_from(["all", "one", "season"]),
    per_season=st.sampled_from([1, 2, 3]),
    orbit=st.sampled_from(["any", "same", "ascending", "descending"]),
    one_track=st.booleans(),
    relative_orbits=st.sampled_from([(), (), (1, 3)]),
)


def over(cell: Cell, looks: Sequence[Acquisition]) -> list[Acquisition]:
    """The acquisitions that meet a cell, by the items that do; what no two slices share needs no choosing."""
    met = [(look, tuple(i for i in look.items if share(cell, [i]) > 1e-5)) for look in looks]
    return [replace(look, items=items) for look, items in met if items]


def quarter(moment: datetime) -> tuple[int, int]:
    """(year, number) of the meteorological quarter; December is of the next year."""
    return (moment.year + 1, 0) if moment.month == 12 else (moment.year, moment.month // 3)


def brute_force(
    cell: Cell, optical: list[Acquisition], radar: list[Acquisition], asked: PairRules
) -> set[tuple[str, str]]:
    """(optical, radar) acquisitions taken for one cell, by trying everything; items of a look are alike in time."""
    limit = timedelta(days=asked.max_dt_days)
    optical, radar = over(cell, optical), over(cell, radar)
    looks = [
        look
        for look in optical
        if share(cell, look.items) >= asked.min_overlap and look.items[0].cloud_percent <= asked.max_cloud_percent
    ]
    twins = [
        twin
        for twin in radar
        if share(cell, twin.items) >= asked.min_overlap
        and asked.orbit in ("any", "same", twin.items[0].orbit_state)
        and twin.items[0].relative_orbit in (asked.relative_orbits or range(1000))
    ]

    def kind(twin: Acquisition) -> tuple[int, str]:
        first = twin.items[0]
        if asked.one_track:
            return first.relative_orbit, first.orbit_state
        return 0, first.orbit_state if asked.orbit == "same" else ""

    def quality(pair: tuple[Acquisition, Acquisition]) -> tuple[object, ...]:
        look, twin = pair
        return look.items[0].cloud_percent, abs(look.datetime - twin.datetime), look.datetime, look.id

    def taken(pairs: list[tuple[Acquisition, Acquisition]]) -> list[tuple[Acquisition, Acquisition]]:
        if asked.per_cell == "all":
            return pairs
        pairs = sorted(pairs, key=quality)
        if asked.per_cell == "one":
            return pairs[:1]
        kept: list[tuple[Acquisition, Acquisition]] = []
        for season in {quarter(look.datetime) for look, _ in pairs}:
            rest = [pair for pair in pairs if quarter(pair[0].datetime) == season]
            chosen = [rest.pop(0)]
            while rest and len(chosen) < asked.per_season:
                gaps = [min(abs(look.datetime - other.datetime) for other, _ in chosen) for look, _ in rest]
                chosen.append(rest.pop(gaps.index(max(gaps))))
            kept += chosen
        return kept

    choices = []
    for group in sorted({kind(twin) for twin in twins}):
        pairs = []
        for look in looks:
            near = min(
                (twin for twin in twins if kind(twin) == group),
                key=lambda t, look=look: (abs(t.datetime - look.datetime), t.datetime, t.id),  # type: ignore[misc]
            )
            if abs(near.datetime - look.datetime) <= limit:
                pairs.append((look, near))
        kept = taken(pairs)
        choices.append((-len(kept), sum((abs(a.datetime - b.datetime) for a, b in kept), timedelta()), group, kept))
    best = min(choices, key=lambda choice: choice[:3], default=(0, 0, 0, []))[3]
    return {(look.id, twin.id) for look, twin in best}


@given(scenes(), anything)
def test_pairs_are_those_of_a_brute_force_search(
    scene: tuple[list[Cell], list[Item], list[Item]], asked: PairRules
) -> None:
    cells, optical, radar = scene
    looks, twins = acquisitions(optical), acquisitions(radar)
    pairs, rejections = pair_cells(cells, looks, twins, asked)
    for cell in cells:
        found = {(p.optical.id, p.radar.id) for p in pairs if p.cell == cell}
        assert found == brute_force(cell, looks, twins, asked)
        # Taken, or refused with one reason; a cell without a candidate has a reason too.
        candidates = {look.id for look in over(cell, looks)} or {""}
        refused = [r.optical for r in rejections if r.cell == cell.id]
        assert sorted(refused + [look for look, _ in found]) == sorted(candidates)
    for pair in pairs:
        both = [share(pair.cell, look.items) for look in (pair.optical, pair.radar)]
        assert pair.overlap == pytest.approx(min(both), abs=1e-6)


@given(scenes(), anything)
def test_a_reason_is_true(scene: tuple[list[Cell], list[Item], list[Item]], asked: PairRules) -> None:
    cells, optical, radar = scene
    found, twins = acquisitions(optical), acquisitions(radar)
    pairs, rejections = pair_cells(cells, found, twins, asked)
    by_id = {cell.id: cell for cell in cells}
    for rejection in rejections:
        cell = by_id[rejection.cell]
        if rejection.reason == "no_optical":
            assert not over(cell, found)
            continue
        look = {look.id: look for look in over(cell, found)}[rejection.optical]
        usable = [twin for twin in twins if share(cell, twin.items) >= asked.min_overlap]
        near = [t for t in usable if abs(t.datetime - look.datetime) <= timedelta(days=asked.max_dt_days)]
        assert {
            "cloudy_scene": look.items[0].cloud_percent > asked.max_cloud_percent,
            "too_little_overlap": share(cell, look.items) < asked.min_overlap,
            "no_radar": not usable,
            "no_radar_in_time": bool(usable) and not near,
            "other_orbit": bool(near) and (asked.orbit != "any" or asked.one_track or bool(asked.relative_orbits)),
            "another_pair_taken": asked.per_cell != "all"
            and rejection.detail in {p.id for p in pairs if p.cell == cell},
        }[rejection.reason]


def told(pairs: list[Pair], rejections: list[Rejection]) -> list[tuple[object, ...]]:
    """All that is said of a pairing, in an order of its own."""
    taken = [(p.cell.id, p.id, [i.id for i in (*p.optical.items, *p.radar.items)], p.overlap, p.dt_s) for p in pairs]
    return sorted([*taken, *((r.cell, r.optical, r.reason, r.detail) for r in rejections)], key=repr)


@given(scenes(), st.randoms(use_true_random=False), anything)
def test_the_order_of_what_is_given_makes_no_difference(
    scene: tuple[list[Cell], list[Item], list[Item]], random: Callable[..., object], asked: PairRules
) -> None:
    cells, optical, radar = scene
    expected = pair_cells(cells, acquisitions(optical), acquisitions(radar), asked)
    shuffled = [[*values] for values in (cells, optical, radar)]
    for values in shuffled:
        random.shuffle(values)  # type: ignore[attr-defined]
    looks = [acquisitions(values)[::-1] for values in shuffled[1:]]
    found = pair_cells(shuffled[0], looks[0], looks[1], asked)
    assert told(*found) == told(*expected)


@given(scenes(), st.integers(1, 3), anything)
def test_areas_paired_apart_are_paired_as_all_at_once(
    scene: tuple[list[Cell], list[Item], list[Item]], cells_per_side: int, asked: PairRules
) -> None:
    cells, optical, radar = scene
    looks, twins = acquisitions(optical), acquisitions(radar)
    pairs: list[Pair] = []
    rejections: list[Rejection] = []
    for area in pairing_areas(cells, looks, twins, cells_per_side=cells_per_side):
        some_pairs, some_rejections = pair_cells(*area, asked)
        pairs += some_pairs
        rejections += some_rejections
    expected = pair_cells(cells, looks, twins, asked)
    assert told(pairs, rejections) == told(*expected)


@given(scenes(), st.data(), anything)
def test_what_else_is_found_changes_nothing_of_a_cell(
    scene: tuple[list[Cell], list[Item], list[Item]], data: st.DataObject, asked: PairRules
) -> None:
    cells, *items = scene
    everything = pair_cells(cells, *map(acquisitions, items), asked)
    cell = data.draw(st.sampled_from(cells))
    # A search over the cell finds what meets it, and some of what does not.
    met = [[one for one in of_sensor if share(cell, [one]) > 0 or data.draw(st.booleans())] for of_sensor in items]
    found = pair_cells([cell], *map(acquisitions, met), asked)
    expected = [p for p in everything[0] if p.cell == cell], [r for r in everything[1] if r.cell == cell.id]
    assert told(*found) == told(*expected)


@given(scenes(), st.integers(-100, 1200), st.sampled_from([1, 6, 30]))
def test_two_periods_have_the_pairs_of_one(
    scene: tuple[list[Cell], list[Item], list[Item]], hours: int, max_dt_days: int
) -> None:
    cells, optical, radar = scene
    start, end = START - timedelta(days=10), START + timedelta(days=60)
    middle = START + timedelta(hours=hours)

    def built(*period: datetime) -> list[tuple[object, ...]]:
        searched = periods_to_search((period[0], period[1]), max_dt_days=max_dt_days)
        found = (
            acquisitions(one for one in items if searched[sensor][0] <= one.datetime < searched[sensor][1])
            for sensor, items in (("optical", optical), ("radar", radar))
        )
        pairs, rejections = pair_cells(cells, *found, rules(max_dt_days=max_dt_days, period=period, min_overlap=0.45))
        return told(pairs, [r for r in rejections if r.reason not in ("no_optical", "no_radar", "no_radar_in_time")])

    assert sorted([*built(start, middle), *built(middle, end)], key=repr) == built(start, end)


def test_an_overpass_over_the_turn_of_a_period_is_whole_in_the_period_it_began_in() -> None:
    west, south, east, north = CELLS[0].footprint.bounds
    middle = (west + east) / 2
    halves = [shapely.box(west - 1, south - 1, middle, north + 1), shapely.box(middle, south - 1, east + 1, north + 1)]
    turn = START + timedelta(days=1)
    tiles = [
        item("optical", 24 + seconds / 3600, absolute_orbit=7, footprint=half)
        for seconds, half in zip((-10, 10), halves, strict=True)
    ]
    taken = []
    for period in ((START, turn), (turn, turn + timedelta(days=1))):
        start, end = periods_to_search(period, max_dt_days=3)["optical"]
        looks = acquisitions(tile for tile in tiles if start <= tile.datetime < end)
        pairs, rejections = pair_cells(CELLS[:1], looks, acquisitions([item("radar", 0)]), rules(period=period))
        taken.append((len(pairs), [r.reason for r in rejections]))
    assert taken == [(1, []), (0, ["no_optical"])]


tenths = st.integers(-12, 22)


@given(
    st.lists(st.tuples(tenths, tenths, tenths, tenths, st.sampled_from([32632, 32633])), min_size=1, max_size=5),
)
def test_a_cell_needs_the_fewest_items_that_cover_what_all_cover(
    boxes: list[tuple[int, int, int, int, int]],
) -> None:
    cell = CELLS[0]
    left, bottom, _, _ = cell.bounds
    step = SIDE_M / 10
    tiles = []
    for number, (x0, x1, y0, y1, epsg) in enumerate(boxes):
        bounds = (left + min(x0, x1) * step, bottom + min(y0, y1) * step)
        bounds += (left + (max(x0, x1) + 1) * step, bottom + (max(y0, y1) + 1) * step)
        tiles.append(
            item("optical", 0.0001 * number, id=f"t{number}", footprint=utm_box_lonlat(32633, bounds), epsg=epsg)
        )
    all_of_it = share(cell, tiles)
    asked = rules(min_overlap=1e-5)
    pairs, _ = pair_cells([cell], acquisitions(tiles), acquisitions([item("radar", 1)]), asked)
    if all_of_it < 1e-5:
        assert not pairs
        return
    needed = pairs[0].optical.items
    assert share(cell, needed) == pytest.approx(all_of_it, abs=1e-5)
    for fewer in combinations(needed, len(needed) - 1):
        assert share(cell, fewer) < all_of_it - 1e-5
    own_zone = [tile for tile in tiles if tile.epsg == cell.epsg]
    if share(cell, own_zone) > all_of_it - 1e-5:
        # What would be resampled is not read where aligned items do.
        assert {tile.epsg for tile in needed} == {cell.epsg}


def test_cells_of_a_tile_overlap_read_the_same_tile() -> None:
    tiles = [item("optical", 0, id=name, footprint=EVERYWHERE) for name in ("b", "a")]
    pairs, _ = pair_cells(CELLS, acquisitions(tiles), acquisitions([item("radar", 1)]), rules())
    assert [[i.id for i in p.optical.items] for p in pairs] == [["a"]] * len(CELLS)


@pytest.mark.parametrize("write", WRITTEN)
def test_a_footprint_across_the_antimeridian_covers_cells_on_both_sides(
    write: Callable[[shapely.Geometry], shapely.Geometry],
) -> None:
    cells = cells_at(PLACES["antimeridian"])
    assert {cell.epsg for cell in cells} == {32760, 32701}
    west, south, east, north = 179.8, -17.2, 180.2, -16.8
    outline = write(shapely.Polygon([(west, south), (east, south), (east, north), (west, north)]))
    looks = acquisitions([item("optical", 0, footprint=outline)])
    twins = acquisitions([item("radar", 1, footprint=outline)])
    pairs, rejections = pair_cells(cells, looks, twins, rules())
    assert [pair.cell for pair in pairs] == cells
    assert not rejections
    elsewhere = [cell_at(0.0, -17.0, side_m=SIDE_M), cell_at(178.0, -17.0, side_m=SIDE_M)]
    assert not pair_cells(elsewhere, looks, twins, rules())[0]


def test_overlap_at_high_latitude_is_that_of_the_plane() -> None:
    # The chord between the corners of a 100 km edge is 0.9 km from the parallel that is straight in degrees.
    cell = cell_at(-42.0, 75.0, side_m=SIDE_M)
    left, bottom, right, top = cell.bounds
    corners = [
        shapely.get_coordinates(utm_box_lonlat(cell.epsg, (x, y, x + 1, y + 1)))[0]
        for x, y in (
            (left - 50_000, bottom - 50_000),
            (right + 50_000, bottom - 50_000),
            (right + 50_000, top),
            (left - 50_000, top),
        )
    ]
    tile = shapely.Polygon(corners)
    assert tile.intersection(cell.footprint).area / cell.footprint.area < 0.9
    looks, twins = (acquisitions([item(sensor, 0, footprint=tile)]) for sensor in ("optical", "radar"))
    pairs, _ = pair_cells([cell], looks, twins, rules(min_overlap=0.999))
    assert len(pairs) == 1


def test_the_least_cloudy_pair_is_taken_when_one_is_asked_for() -> None:
    optical = [
        item("optical", hours, orbit=hours, cloud_percent=cloud) for hours, cloud in ((0, 30.0), (120, 5.0), (240, 5.0))
    ]
    radar = [item("radar", hours, orbit=hours) for hours in (10, 121, 230)]
    pairs, rejections = pair_cells(CELLS[:1], acquisitions(optical), acquisitions(radar), rules(per_cell="one"))
    assert [p.optical.items[0].id for p in pairs] == [optical[1].id]
    assert pairs[0].dt_s == 3600
    assert [r.reason for r in rejections] == ["another_pair_taken"] * 2


def days_taken(days: Sequence[int], clouds: Sequence[float], **more: object) -> list[int]:
    """Days after the start of the optical looks that are taken, each with a radar look an hour later."""
    optical = [
        item("optical", 24 * day, orbit=day, cloud_percent=cloud) for day, cloud in zip(days, clouds, strict=True)
    ]
    radar = [item("radar", 24 * day + 1, orbit=day) for day in days]
    pairs, _ = pair_cells(CELLS[:1], acquisitions(optical), acquisitions(radar), rules(**more))
    return [(pair.optical.datetime - START).days for pair in pairs]


def test_several_pairs_of_a_season_are_spread_over_it() -> None:
    # The season is June to August: days 0 to 91.
    days, clouds = [0, 5, 40, 45, 88, 95, 100], [50.0, 0.0, 20.0, 30.0, 40.0, 10.0, 0.0]
    assert days_taken(days, clouds, per_cell="season") == [5, 100]
    assert days_taken(days, clouds, per_cell="season", per_season=2) == [5, 88, 95, 100]
    assert days_taken(days, clouds, per_cell="season", per_season=3) == [5, 45, 88, 95, 100]
    assert days_taken(days, clouds, per_cell="season", per_season=9) == days


def test_december_is_of_the_same_season_as_the_january_after_it() -> None:
    days = [182, 183, 213, 214, 244, 273, 274]  # 30 November, 1 and 31 December, 1 and 31 January, 29 February, 1 March
    assert days_taken(days, [0.0, 9.0, 8.0, 1.0, 7.0, 6.0, 0.0], per_cell="season") == [182, 214, 274]


@given(st.lists(st.integers(0, 180), unique=True, min_size=1, max_size=12), st.integers(1, 3))
def test_a_later_period_changes_nothing_of_seasons_that_are_over(days: list[int], per_season: int) -> None:
    clouds = [float(day * 37 % 60) for day in days]
    asked = {"per_cell": "season", "per_season": per_season}
    before = [(day, cloud) for day, cloud in zip(days, clouds, strict=True) if day < 92]
    if before:
        earlier = days_taken(*zip(*before, strict=True), **asked)  # type: ignore[arg-type]
        assert [day for day in days_taken(days, clouds, **asked) if day < 92] == earlier


def orbits_taken(**more: object) -> tuple[list[tuple[str, int]], list[str]]:
    """(direction, relative orbit) of the pairs' radar looks over one cell, and the reasons for the rest.

    Optical looks on days 0, 10, 20, 30; radar looks of two descending and two ascending tracks.
    """
    optical = [item("optical", 240 * n, orbit=n) for n in range(4)]
    tracks = [
        ("descending", 7, (1, 241)),
        ("descending", 8, (482,)),
        ("ascending", 9, (6, 246)),
        ("ascending", 5, (726,)),
    ]
    radar = [item("radar", hours, orbit=orbit, orbit_state=state) for state, orbit, times in tracks for hours in times]
    pairs, rejections = pair_cells(CELLS[:1], acquisitions(optical), acquisitions(radar), rules(**more))
    found = [(p.radar.items[0].orbit_state, p.radar.items[0].relative_orbit) for p in pairs]
    return found, [r.reason for r in rejections]


def test_one_direction_is_that_of_most_pairs_and_then_of_the_smaller_gaps() -> None:
    assert orbits_taken()[0] == [("descending", 7), ("descending", 7), ("descending", 8), ("ascending", 5)]
    found, reasons = orbits_taken(orbit="same")
    # Both directions give three pairs; those of the descending one are 4 hours apart in all, of the other 18.
    assert found == [("descending", 7), ("descending", 7), ("descending", 8)]
    assert reasons == ["other_orbit"]


def test_a_direction_can_be_asked_for() -> None:
    found, reasons = orbits_taken(orbit="ascending")
    assert found == [("ascending", 9), ("ascending", 9), ("ascending", 5)]
    assert reasons == ["other_orbit"]


def test_one_track_is_that_of_most_pairs() -> None:
    found, reasons = orbits_taken(one_track=True)
    assert found == [("descending", 7), ("descending", 7)]
    assert reasons == ["other_orbit"] * 2


def test_tracks_can_be_named() -> None:
    found, reasons = orbits_taken(relative_orbits=(5, 9))
    assert found == [("ascending", 9), ("ascending", 9), ("ascending", 5)]
    assert orbits_taken(relative_orbits=(5, 9), one_track=True)[0] == [("ascending", 9), ("ascending", 9)]
    assert reasons == ["other_orbit"]


def test_what_there_is_not_has_a_reason_of_its_own() -> None:
    optical, radar = acquisitions([item("optical", 0)]), acquisitions([item("radar", 1)])
    small = acquisitions([item("radar", 1, footprint=CELLS[0].footprint.centroid.buffer(0.01))])
    reasons = [
        pair_cells(CELLS[:1], *looks, rules())[1][0].reason
        for looks in (([], radar), ([], []), (optical, []), (optical, small))
    ]
    assert reasons == ["no_optical", "no_optical", "no_radar", "no_radar"]
    assert pair_cells([], optical, radar, rules()) == ([], [])


def test_a_limit_in_days_is_included() -> None:
    optical = acquisitions([item("optical", 0)])
    assert len(pair_cells(CELLS[:1], optical, acquisitions([item("radar", 72)]), rules())[0]) == 1
    pairs, rejections = pair_cells(CELLS[:1], optical, acquisitions([item("radar", 72.001)]), rules())
    assert not pairs
    assert rejections[0].reason == "no_radar_in_time"
    assert "3.00" in rejections[0].detail


def test_items_of_one_overpass_are_one_acquisition() -> None:
    slices = [item("radar", 0.01 * n, orbit=15) for n in range(3)]
    later = item("radar", 24 * 12, orbit=15)
    other_pass = item("radar", 1.7, orbit=16)
    found = acquisitions([later, *slices, other_pass])
    assert sorted(len(a.items) for a in found) == [1, 1, 3]


def test_an_overpass_is_known_by_its_name_whatever_was_found_of_it() -> None:
    tiles = [item("optical", n, id=f"t{n}", datatake="20230601T101559", absolute_orbit=41475) for n in range(3)]
    slices = [item("radar", n * 0.3, id=f"s{n}", absolute_orbit=48795, orbit=95) for n in range(3)]
    for kept in (slice(0, 3), slice(1, 3), slice(0, 3, 2), slice(2, 3)):
        assert [a.id for a in acquisitions(tiles[kept])] == ["optical-a_20230601T101559_R001"]
        assert [a.id for a in acquisitions(slices[kept])] == ["radar-a_O048795_R095"]
    # The track is flown again twelve days later, another satellite flies it as well.
    others = [
        replace(slices[0], id="later", absolute_orbit=48970, datetime=slices[0].datetime + timedelta(days=12)),
        replace(slices[0], id="other", platform="radar-b"),
    ]
    assert len({a.id for a in acquisitions([*slices, *others])}) == 3


def test_a_pass_is_not_carried_on_into_the_next_one() -> None:
    # Both orbits cross the equator with slices on both sides; an hour and a half lies between.
    slices = [
        item("radar", hours, orbit=orbit - 48000, absolute_orbit=orbit, id=f"{orbit}-{hours:.3f}")
        for orbit, hours in ((48001, 0), (48002, 0.007), (48002, 1.64), (48003, 1.647), (48003, 1.7))
    ]
    found = acquisitions(slices)
    assert [len(a.items) for a in found] == [2, 3]
    assert [a.id for a in found] == ["radar-a_O048001_R001", "radar-a_O048002_R002"]


@pytest.mark.parametrize("first_orbit", [None, 48790])
def test_a_pass_goes_on_across_the_equator(first_orbit: int | None) -> None:
    orbits = [None if first_orbit is None else first_orbit + n // 2 for n in range(4)]
    slices = [item("radar", n * 25 / 3600, orbit=15 + n // 2, absolute_orbit=orbits[n]) for n in range(4)]
    assert [len(a.items) for a in acquisitions(slices)] == [4]
    # The cycle of 175 orbits starts anew.
    slices = [item("radar", 0, orbit=175), item("radar", 25 / 3600, orbit=1)]
    assert [len(a.items) for a in acquisitions(slices)] == [2]
    other_satellite = [slices[0], replace(slices[1], platform="radar-b")]
    assert [len(a.items) for a in acquisitions(other_satellite)] == [1, 1]


def test_tiles_together_cover_a_cell_that_neither_covers_alone() -> None:
    west, south, east, north = CELLS[0].footprint.bounds
    middle = (west + east) / 2
    halves = [
        shapely.box(west - 0.1, south - 0.1, middle, north + 0.1),
        shapely.box(middle, south - 0.1, east + 0.1, north + 0.1),
    ]
    optical = acquisitions([item("optical", 0.001 * n, footprint=half) for n, half in enumerate(halves)])
    pairs, _ = pair_cells(CELLS[:1], optical, acquisitions([item("radar", 1)]), rules())
    assert len(pairs) == 1
    assert len(pairs[0].optical.items) == 2


@pytest.mark.parametrize(("field", "value"), [("per_season", 0), ("min_overlap", 0.0), ("min_overlap", 1.5)])
def test_a_rule_that_cannot_be_is_refused_with_its_value(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{field}.*{value}"):
        rules(**{field: value})
