"""What it costs to choose cells, pair them, share them out and keep areas out: on synthetic footprints, CPU time.

Scenes are laid out as real ones: tiles of 109.8 km that overlap by a tenth, on both sides of a zone border, each
every five days; four slices of a swath every three days.

Example:
    python -m tests.bench_pairing
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import numpy as np
import shapely

from pipeline.exclusions import ExclusionRules, keep_out
from pipeline.grid import cells_covering, utm_box_lonlat
from pipeline.pairing import PairRules, acquisitions, pair_cells, pairing_areas
from pipeline.places import Places
from pipeline.sampling import CityRules, sample_around, sample_uniform
from pipeline.splits import SplitRules, splits_of
from pipeline.types import Item, Sensor

SIDE_M = 2640
START = datetime(2023, 1, 1, tzinfo=UTC)
DAYS = 90
REGION = shapely.box(10.0, 47.0, 13.5, 49.0)


def item(sensor: Sensor, name: str, moment: datetime, epsg: int, footprint: shapely.Geometry, cloud: float) -> Item:
    return Item(
        id=name,
        collection="c",
        sensor=sensor,
        datetime=moment,
        epsg=epsg,
        footprint=footprint,
        assets={},
        platform=sensor,
        relative_orbit=22 if sensor == "optical" else 44,
        orbit_state="ascending",
        absolute_orbit=40_000 + (moment - START).days * 14,
        datatake=f"{moment:%Y%m%dT%H%M%S}" if sensor == "optical" else "",
        cloud_percent=cloud,
    )


def scenes() -> tuple[list[Item], list[Item]]:
    random = np.random.default_rng(0)
    tiles = [
        (epsg, utm_box_lonlat(epsg, (x, y - 9_780, x + 109_800, y + 100_020)))
        for epsg in (32632, 32633)
        for x in range(300_000, 800_000, 100_000)
        for y in range(5_100_000, 5_600_000, 100_000)
    ]
    optical, radar = [], []
    for day in range(DAYS):
        moment = START + timedelta(days=day, hours=10)
        for number, (epsg, outline) in enumerate(tiles):
            if (day + number % 2) % 5 == 0:
                cloud = float(random.uniform(0, 100))
                optical.append(item("optical", f"S2_{day}_{number}", moment, epsg, outline, cloud))
        for number in range(4 if day % 3 == 0 else 0):
            south = 46.0 + number * 1.4
            outline = shapely.Polygon([(9, south), (15, south + 0.8), (14.6, south + 2.25), (8.6, south + 1.45)])
            moment = START + timedelta(days=day, hours=5, seconds=25 * number)
            radar.append(item("radar", f"S1_{day}_{number}", moment, 32632, outline, 0.0))
    return optical, radar


def say(what: str, run: Callable[[], int], unit: str) -> None:
    start = time.process_time()
    number = run()
    seconds = time.process_time() - start
    sys.stdout.write(f"{what:52} {number:11,} {unit:8} {seconds:7.2f} s {number / seconds:12,.0f} /s\n")
    sys.stdout.flush()


def measure_pairing() -> None:
    cells = cells_covering(REGION, side_m=SIDE_M)
    optical, radar = (acquisitions(items) for items in scenes())
    every = PairRules(max_dt_days=3, max_cloud_percent=80, min_overlap=0.999, per_cell="all")
    some = PairRules(
        max_dt_days=3, max_cloud_percent=80, min_overlap=0.999, per_cell="season", per_season=2, one_track=True
    )

    def candidates(rules: PairRules) -> int:
        return sum(map(len, pair_cells(cells, optical, radar, rules)))

    def by_areas() -> int:
        areas = pairing_areas(cells, optical, radar, cells_per_side=32)
        return sum(len(pair_cells(*area, every)[0]) for area in areas)

    say("cells of a region of 57 000 km2", lambda: len(cells_covering(REGION, side_m=SIDE_M)), "cells")
    say("pairs, all", lambda: len(pair_cells(cells, optical, radar, every)[0]), "pairs")
    say("pairs, all, by areas of 32 x 32 cells", by_areas, "pairs")
    say("pairs and reasons, two a season of one track", lambda: candidates(some), "rows")


def measure_sampling() -> None:
    random = np.random.default_rng(0)
    world = shapely.box(-180, -60, 180, 80)
    spots = shapely.points(random.uniform(-180, 180, 10_000), random.uniform(-50, 70, 10_000))
    cities = Places(names=[str(n) for n in range(10_000)], shapes=spots, population=np.zeros(10_000))
    around = CityRules(cities=cities)
    say("uniform over the world", lambda: len(sample_uniform(world, 10_000, side_m=SIDE_M, seed=0)), "cells")
    say("around 10 000 cities", lambda: len(sample_around(around, 250_000, side_m=SIDE_M, seed=0)), "cells")


def measure_splits() -> None:
    random = np.random.default_rng(0)
    cells = cells_covering(shapely.box(0, 40, 24, 60), side_m=SIDE_M)
    places = np.array([(cell.epsg, cell.column, cell.row) for cell in cells], np.int32)
    chips = places[np.sort(random.integers(0, len(places), 10_000_000))].T.copy()
    rules = SplitRules(block_cells=16, val_fraction=0.1, test_fraction=0.1, buffer_cells=1, seed=0)
    say(f"splits of chips of {len(cells):,} cells", lambda: len(splits_of(*chips, side_m=SIDE_M, rules=rules)), "chips")
    distinct = places.T.copy()
    say("splits, every chip of another cell", lambda: len(splits_of(*distinct, side_m=SIDE_M, rules=rules)), "chips")


def measure_exclusions() -> None:
    random = np.random.default_rng(0)
    west, south = random.uniform(0, 30, 100_000), random.uniform(40, 60, 100_000)
    boxes = shapely.box(west, south, west + 0.012, south + 0.012)
    areas = Places(names=[str(n) for n in range(100_000)], shapes=boxes, population=np.zeros(100_000))
    cells = cells_covering(shapely.box(0, 40, 24, 50), side_m=SIDE_M)
    rules = ExclusionRules(areas=areas, buffer_m=1000)
    say("cells held against 100 000 areas", lambda: sum(map(len, keep_out(cells, rules))), "cells")


def main() -> None:
    """Measure and print."""
    measure_pairing()
    measure_sampling()
    measure_splits()
    measure_exclusions()


if __name__ == "__main__":
    main()
