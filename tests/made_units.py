"""Plans of made-up candidates on the grid, and what makes their chips without any archive."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
from shapely.geometry import box

from pipeline.chip_table import FROM_MANIFEST
from pipeline.grid import Cell
from pipeline.layout import Layout
from pipeline.manifest import items_table, plan_pairs, rejections_table
from pipeline.pairing import Pair
from pipeline.splits import SplitRules
from pipeline.store import Store
from pipeline.types import Acquisition, ChipArrays, Item, Sensor
from pipeline.versions import Version, begin

LAYOUT = Layout(side_px=24, shard_chips=4)
SPLITS = SplitRules(block_cells=4, val_fraction=0.2, test_fraction=0.2, buffer_cells=0, seed=3)
MOMENT = datetime(2023, 6, 1, 10, tzinfo=UTC)
Candidate = tuple[int, int, int]
"""Column, row, day."""


def pair(column: int, row: int, day: int = 0) -> Pair:
    """One cell of zone 33N as it was seen on a day."""
    cell = Cell(epsg=32633, column=column, row=row, side_m=240)
    looks = [Acquisition(sensor=sensor, items=(_item(sensor, day),)) for sensor in ("optical", "radar")]
    return Pair(cell=cell, optical=looks[0], radar=looks[1], id=f"{looks[0].id}+{looks[1].id}", overlap=1.0)


def _item(sensor: Sensor, day: int) -> Item:
    return Item(
        id=f"{sensor}-{day}",
        collection=sensor,
        sensor=sensor,
        datetime=MOMENT + timedelta(days=day),
        epsg=32633,
        footprint=box(10, 40, 20, 50),
        assets={"B02": f"https://archive/{sensor}/{day}.tif"},
        platform="s",
        relative_orbit=1,
        orbit_state="ascending",
        absolute_orbit=1000 + day,
    )


def planned(
    url: str, pairs: Sequence[Pair], *, number: int = 1, block_cells: int = 2, layout: Layout = LAYOUT
) -> Version:
    """A version that waits for its chips, of a store that is made if it is not there."""
    Store.create(url, layout)
    version = begin(url, {"number": number}, number=number)
    planner = plan_pairs(
        pairs,
        block_cells=block_cells,
        shard_chips=layout.shard_chips,
        first_row=version.first_shard() * layout.shard_chips,
        splits=SPLITS,
    )
    version.write_planned(planner, items_table(pairs), [rejections_table([])], {"note": "made up"})
    return version


def chip_of(cell: str, pair_id: str) -> ChipArrays:
    """Pixels that differ between candidates; the same for the same candidate, whatever its row."""
    rng = np.random.default_rng(list(f"{cell}/{pair_id}".encode()))
    return {
        name: rng.integers(1, min(3000, np.iinfo(spec.dtype).max), spec.shape).astype(spec.dtype)
        for name, spec in LAYOUT.arrays().items()
    }


@dataclass(frozen=True)
class Maker:
    """Makes the chips of units; what fails and what is rejected is given by the columns of cells."""

    failing: frozenset[int] = frozenset()
    rejected: frozenset[int] = frozenset()
    seconds: float = 0.0
    """Of work per unit, of a core's time."""

    waiting_s: float = 0.0
    """Of waiting per unit, as for a server."""

    log: Path | None = field(default=None)
    """A line for every unit that was made."""

    def __call__(
        self, rows: Sequence[Mapping[str, Any]], items: Mapping[str, Item]
    ) -> tuple[dict[int, ChipArrays], list[dict[str, Any]]]:
        chips: dict[int, ChipArrays] = {}
        ledger = []
        for row in rows:
            assert {*row["optical_items"], *row["radar_items"]} <= items.keys()
            outcome: dict[str, Any] = {"status": "failed", "error": f"cell {row['cell']}: timed out"}
            if row["column"] in self.rejected:
                outcome = {"status": "rejected", "reason": "cloudy"}
            elif row["column"] not in self.failing:
                chips[row["row"]] = chip_of(row["cell"], row["pair"])
                outcome = {"status": "written"}
            ledger.append({**{name: row[name] for name in FROM_MANIFEST}, **outcome})
        work(self.seconds)
        if self.waiting_s:
            time.sleep(self.waiting_s)
        if self.log:
            with self.log.open("a") as file:
                file.write(f"{rows[0]['unit']}\n")
        return chips, ledger


def work(seconds: float) -> None:
    """Keep a core busy for so long a time of its own."""
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def objects_of(url: str) -> dict[str, bytes]:
    """Everything in a store but its leases, by path."""
    objects = Store.open(url).objects
    return {path: objects.get(path) for path in objects.list() if "/leases/" not in path}


def chips_only(content: Mapping[str, bytes]) -> dict[str, bytes]:
    """The objects that hold pixels."""
    return {path: data for path, data in content.items() if "/c/" in path}


def grid(columns: Iterable[int], rows: Iterable[int], days: Iterable[int] = (0,)) -> list[Pair]:
    """Pairs of a rectangle of cells on several days."""
    rows, days = list(rows), list(days)
    return [pair(column, row, day) for column in columns for row in rows for day in days]
