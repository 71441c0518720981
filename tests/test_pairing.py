"""Pairing: against a brute-force search, and the reasons for what is not taken."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import shapely
from hypothesis import given
from hypothesis import strategies as st

from pipeline.grid import Cell
from pipeline.pairing import PairRules, acquisitions, pair_cells
from pipeline.types import Item, Sensor

START = datetime(2023, 6, 1, tzinfo=UTC)
CELLS = [Cell(epsg=32633, column=180 + c, row=2010 + r, side_m=2640) for r in range(2) for c in range(2)]
EVERYWHERE = shapely.union_all([cell.footprint for cell in CELLS]).envelope.buffer(0.1)


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


footprints = st.sampled_from(
    [EVERYWHERE, *(cell.footprint.buffer(1e-4) for cell in CELLS), CELLS[0].footprint.centroid.buffer(0.012)]
)
optical_items = st.builds(
    lambda hours, footprint, cloud: item("optical", hours, orbit=hours, footprint=footprint, cloud_percent=cloud),
    st.integers(0, 400),
    footprints,
    st.sampled_from([0.0, 20.0, 61.0]),
)
radar_items = st.builds(
    lambda hours, footprint: item("radar", hours, orbit=hours, footprint=footprint), st.integers(0, 400), footprints
)


@given(
    st.lists(optical_items, max_size=6, unique_by=lambda i: i.datetime),
    st.lists(radar_items, max_size=6, unique_by=lambda i: i.datetime),
)
def test_pairs_are_those_of_a_brute_force_search(optical: list[Item], radar: list[Item]) -> None:
    pairs, _ = pair_cells(CELLS, acquisitions(optical), acquisitions(radar), rules())
    found = {(p.cell.id, p.optical.items[0].id, p.radar.items[0].id) for p in pairs}
    expected = set()
    for cell in CELLS:
        box = cell.footprint

        def covers(i: Item, box: shapely.Geometry = box) -> bool:
            return bool(i.footprint.intersection(box).area / box.area >= 0.99)

        for look in optical:
            near = sorted((abs(r.datetime - look.datetime), r.datetime, r.id) for r in radar if covers(r))
            if covers(look) and look.cloud_percent <= 60 and near and near[0][0] <= timedelta(days=3):
                expected.add((cell.id, look.id, near[0][2]))
    assert found == expected


@given(
    st.lists(optical_items, max_size=6, unique_by=lambda i: i.datetime),
    st.lists(radar_items, max_size=6, unique_by=lambda i: i.datetime),
    st.sampled_from(["all", "one"]),
)
def test_every_candidate_is_taken_or_has_a_reason(optical: list[Item], radar: list[Item], per_cell: str) -> None:
    pairs, rejections = pair_cells(CELLS, acquisitions(optical), acquisitions(radar), rules(per_cell=per_cell))
    for cell in CELLS:
        candidates = sum(i.footprint.intersects(cell.footprint) for i in optical)
        taken = [p for p in pairs if p.cell == cell]
        refused = [r for r in rejections if r.cell == cell.id]
        assert len(taken) + len(refused) == max(candidates, 1)
        assert all(r.reason for r in refused)
        assert per_cell == "all" or len(taken) <= 1


def test_the_least_cloudy_pair_is_taken_when_one_is_asked_for() -> None:
    optical = [
        item("optical", hours, orbit=hours, cloud_percent=cloud) for hours, cloud in ((0, 30.0), (120, 5.0), (240, 5.0))
    ]
    radar = [item("radar", hours, orbit=hours) for hours in (10, 121, 230)]
    pairs, rejections = pair_cells(CELLS[:1], acquisitions(optical), acquisitions(radar), rules(per_cell="one"))
    assert [p.optical.items[0].id for p in pairs] == [optical[1].id]
    assert pairs[0].dt_s == 3600
    assert [r.reason for r in rejections] == ["another_pair_taken"] * 2


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
    other_track = item("radar", 1.7, orbit=16)
    found = acquisitions([later, *slices, other_track])
    assert sorted(len(a.items) for a in found) == [1, 1, 3]


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
