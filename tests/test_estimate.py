"""What building would cost: counted like the plan itself, and as the measured rates say."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import numpy as np
import pytest
from shapely.geometry import box

from jobs.support import words
from jobs.support.estimate import (
    READING,
    Workload,
    estimate,
    estimate_lines,
    paper_plan,
    paper_section,
    paper_workload,
    with_share,
    workload_of,
)
from pipeline.grid import Cell, block_key
from pipeline.layout import Layout
from pipeline.limits import HostLimits
from pipeline.manifest import plan_pairs
from pipeline.pairing import Pair
from pipeline.splits import SplitRules
from pipeline.types import Acquisition, Item, Sensor

SPLITS = SplitRules(block_cells=16, val_fraction=0.1, test_fraction=0.1, buffer_cells=1, seed=0)
SLOW = HostLimits(rate_per_s=400.0)


def look(sensor: Sensor, name: str, cloud: float = 0.0) -> Acquisition:
    item = Item(
        id=name, collection="c", sensor=sensor, datetime=datetime(2023, 7, 1, tzinfo=UTC), epsg=32633, assets={},
        footprint=box(0, 0, 1, 1), platform="p", relative_orbit=1, orbit_state="ascending", cloud_percent=cloud,
    )  # fmt: skip
    return Acquisition(sensor=sensor, items=(item,))


def pairs() -> list[Pair]:
    rng = np.random.default_rng(0)
    clouds = {"a": 20.0, "b": 60.0}
    return [
        Pair(
            cell=Cell(epsg=32633, column=column, row=2000 + row, side_m=2640),
            optical=look("optical", name, clouds[name]),
            radar=look("radar", f"r{name}"),
            id=name,
            overlap=1.0,
        )
        for name in clouds
        for column in range(20)
        for row in range(15)
        if rng.random() < 0.7
    ]


def counted() -> tuple[list[Pair], Workload]:
    found = pairs()
    planner = plan_pairs(found, block_cells=8, shard_chips=64, first_row=0, splits=SPLITS)
    work = workload_of(
        planner.parts(),
        planner.looks(),
        {"a": 20.0, "b": 60.0},
        block_cells=8,
        max_cloud_fraction=0.2,
        cells=400,
        items=4,
    )
    return found, work


def test_a_workload_counts_what_the_plan_holds() -> None:
    found, work = counted()
    blocks: dict[object, list[Cell]] = {}
    for pair in found:
        blocks.setdefault((block_key(pair.cell, cells_per_side=8), pair.id), []).append(pair.cell)
    assert work.candidates == len(found)
    assert work.units == len(blocks)
    assert work.cells_with_pairs == len({pair.cell for pair in found})
    areas: dict[int, int] = {}
    for cells in blocks.values():
        columns, rows = {cell.column for cell in cells}, {cell.row for cell in cells}
        area = (max(columns) - min(columns) + 1) * (max(rows) - min(rows) + 1)
        areas[area] = areas.get(area, 0) + 1
    assert dict(work.unit_areas) == areas
    expected = sum(1 - pair.optical.items[0].cloud_percent / 100 * 0.8 for pair in found)
    assert work.expected_chips == pytest.approx(expected)
    planner = plan_pairs(found, block_cells=8, shard_chips=64, first_row=0, splits=SPLITS)
    assert work.shards == len({shard for part in planner.parts() for shard in part["shard"].to_pylist()})


@pytest.mark.parametrize("reader", ["window", "stackstac"])
@pytest.mark.parametrize("side", [1, 2, 4, 8, 16])
def test_full_clear_blocks_cost_what_was_measured(reader: str, side: int) -> None:
    work = with_share(paper_workload(side**2 * 100, block_cells=side), 1.0)
    found = estimate(work, Layout(), reader=reader, cpus=[2])
    requests, megabytes, _ = READING[reader][side]
    chips = side**2 * 100
    assert found.requests == (round(requests * chips),) * 2
    assert found.download_bytes[1] == pytest.approx(megabytes * chips * 1e6)
    assert found.store_bytes[0] == pytest.approx(chips * 0.727e6, rel=0.02)


def test_chips_of_another_side_cost_by_their_area() -> None:
    whole = estimate(with_share(paper_workload(6400), 1.0), Layout(), cpus=[1])
    # 4 x 4 chips of 528 px are the ground of 8 x 8 of 264 px.
    double = estimate(with_share(paper_workload(1600, block_cells=4), 1.0), Layout(side_px=528), cpus=[1])
    assert double.download_bytes == whole.download_bytes
    assert double.cpu_hours == whole.cpu_hours
    assert double.store_bytes == whole.store_bytes


def test_time_falls_with_cpus_until_the_archive_is_the_limit() -> None:
    work = paper_workload(1_000_000)
    found = estimate(work, Layout(), limits=SLOW, cpus=[8, 16, 10_000])
    assert found.hours[8] == pytest.approx(2 * found.hours[16], rel=1e-3)
    assert found.bound_by == {8: "cpu", 16: "cpu", 10_000: "archive"}
    assert found.hours[10_000] * 3600 * SLOW.rate_per_s == pytest.approx(found.requests[0] * 13 / 15, rel=1e-3)
    assert found.hours[10_000] > estimate(work, Layout(), limits=None, cpus=[10_000]).hours[10_000]


def test_clouds_spare_downloads_but_never_all() -> None:
    work = paper_workload(64_000)
    clear, half, none = (estimate(with_share(work, share), Layout()) for share in (1.0, 0.5, 0.0))
    assert clear.requests[0] > half.requests[0] > none.requests[0] > 0
    assert clear.download_bytes[0] == clear.download_bytes[1] == half.download_bytes[1]
    assert none.store_bytes[0] == 0
    assert none.download_bytes[0] == pytest.approx(none.download_bytes[1] / 15, rel=1e-3)


def test_signatures_are_renewed_as_long_as_it_takes() -> None:
    work = with_share(paper_workload(10_000_000), 1.0)
    found = estimate(work, Layout(), cpus=[16])
    assert found.tokens == 2 * -(-found.hours[16] * 3600 // 2700)
    assert estimate(work, Layout(), cpus=[16], signed=False).tokens == 0


def test_an_estimate_is_lines_and_json() -> None:
    found = estimate(counted()[1], Layout(), limits=SLOW)
    text = "\n".join(estimate_lines(found))
    for said in ("candidate chips", "expected", "download", "store about", "on 16 CPUs", "USD", "signatures"):
        assert said in text
    content = json.loads(json.dumps(found.to_dict()))
    assert content["workload"]["candidates"] == found.workload.candidates
    assert content["hours"]["16"] == found.hours[16]


def test_nothing_to_build_costs_nothing() -> None:
    work = Workload(cells=3, cells_with_pairs=0, candidates=0, units=0, shards=0, items=0, expected_chips=0.0,
                    rejected_units=0.0, unit_areas=())  # fmt: skip
    found = estimate(work, Layout())
    assert found.download_bytes == (0, 0)
    assert found.cpu_hours == 0
    assert any("0 candidate chips" in line for line in estimate_lines(found))


def test_the_paper_plan_adds_up() -> None:
    plan = paper_plan(1_000_000, limits=SLOW)
    assert plan["candidates"] == round(1e6 / 0.6)
    assert plan["tasks"] == pytest.approx(plan["candidates"] / 256, abs=1)
    assert plan["objects"] == 5 * plan["tasks"]
    assert plan["sealing_s"] == pytest.approx(plan["tasks"] * 0.012, abs=0.1)
    assert plan["store_tb"] == pytest.approx(0.73, abs=0.02)
    hundred = paper_plan(100_000_000, limits=SLOW)
    assert hundred["requests"] == pytest.approx(100 * plan["requests"], rel=1e-3)
    section = paper_section(SLOW)
    assert f"| {hundred['tasks']:,} |".replace(",", " ") in section
    assert "400 requests per second" in section
    limit = hundred["archive_is_the_limit_from_nodes"]
    assert hundred["hours"][limit] > hundred["hours_without_limit"][limit]


@pytest.mark.parametrize(
    ("seconds", "said"), [(12, "12 s"), (600, "10 min"), (7260, "2 h 01 min"), (86400 * 3, "3.0 days")]
)
def test_times_are_said_in_units_to_plan_with(seconds: float, said: str) -> None:
    assert words.duration(seconds) == said


@pytest.mark.parametrize(("number", "said"), [(0, "0 B"), (999, "999 B"), (1.23e6, "1.23 MB"), (4.56e14, "456 TB")])
def test_sizes_are_said_in_units_that_keep_them_short(number: float, said: str) -> None:
    assert words.size(number) == said
