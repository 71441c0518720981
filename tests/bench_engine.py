"""What Ray Data costs beside a bare loop over the same tasks, which read the same scenes, or wait, or compute.

The bare loop is as many processes as Ray has CPUs, which take shards from one list. Both in one run, in turns.

`reading`: a shard is four blocks of cells, which `build_unit` reads from full-size scenes behind a server that answers
40 ms late; they are screened, encoded and written, and no URL is read twice. `waiting` and `working`: a shard of
made-up chips takes so many seconds of waiting, as for a server, or of a core; on a machine that others use too, only
what waits can be compared by the clock.

Example:
    python -m tests.bench_engine reading 4
    python -m tests.bench_engine waiting 64 1.0
"""

from __future__ import annotations

import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import ray

from pipeline.chips import Recipe
from pipeline.grid import Cell
from pipeline.ingest import MakeUnit, build, build_planned_shard
from pipeline.layout import Layout
from pipeline.pairing import Pair
from pipeline.types import Acquisition
from pipeline.versions import Version
from tests.bench_reading import SIDE_M, recipe, serving
from tests.full_size_scenes import EPSG, LEFT, OPTICAL_M, TOP, items, write_scenes
from tests.made_units import LAYOUT, Maker, grid, planned

CPUS = 2
ROUNDS = 3
BLOCK_CELLS = 8
BLOCKS_PER_SHARD = 4
"""So a shard has the 256 chips of the build's default."""

Plan = Callable[[str, int], Version]
"""(URL of a new store, shards) -> a version that waits for so many."""


def pairs_of(base: str, num_blocks: int, side: int) -> list[Pair]:
    """The pair of scenes over so many whole blocks of `side` x `side` cells."""
    first_column, end_column = -(-LEFT // SIDE_M // side), (LEFT + OPTICAL_M) // SIDE_M // side
    first_row, end_row = -(-(TOP - OPTICAL_M) // SIDE_M // side), TOP // SIDE_M // side
    blocks = [(c, r) for c in range(first_column, end_column) for r in range(first_row, end_row)]
    assert num_blocks <= len(blocks), f"the scenes hold {len(blocks)} blocks"
    scenes = items(base)
    looks = {name: Acquisition(sensor=scenes[name].sensor, items=(scenes[name],)) for name in ("S2", "S1")}
    name = f"{looks['S2'].id}+{looks['S1'].id}"
    return [
        Pair(
            cell=Cell(epsg=EPSG, column=column * side + c, row=row * side + r, side_m=SIDE_M),
            optical=looks["S2"],
            radar=looks["S1"],
            id=name,
            overlap=1.0,
        )
        for column, row in blocks[:num_blocks]
        for c, r in itertools.product(range(side), repeat=2)
    ]


@contextmanager
def reading(side: int) -> Iterator[tuple[Plan, Recipe]]:
    """Shards that are read: every plan from URLs of its own."""
    scenes = Path(tempfile.gettempdir()) / "twinlook-bench-reading"
    write_scenes(scenes)
    layout = Layout(shard_chips=BLOCKS_PER_SHARD * side * side)
    with serving(scenes) as server:

        def plan(url: str, num_shards: int) -> Version:
            return planned(
                url,
                pairs_of(server.fresh(), num_shards * BLOCKS_PER_SHARD, side),
                block_cells=side,
                layout=layout,
            )

        yield plan, recipe("window")


def made_up(url: str, num_shards: int) -> Version:
    """Shards that nothing is read for."""
    return planned(url, grid(range(2 * num_shards), range(LAYOUT.shard_chips // 2)))


def bare(version: Version, make: Recipe | MakeUnit, pool: ProcessPoolExecutor) -> None:
    """Every shard in a plain pool of processes."""
    receipts = list(pool.map(partial(build_planned_shard, version, recipe=make), version.shards()))
    assert all(receipt.written and not receipt.failed for receipt in receipts), receipts


def on_ray(version: Version, make: Recipe | MakeUnit) -> None:
    """The same as the build does it."""
    receipts = list(build(version, make))
    assert all(receipt.written and not receipt.failed for receipt in receipts), receipts
    assert len(receipts) == len(version.shards()), (len(receipts), len(version.shards()))


def measure(plan: Plan, make: Recipe | MakeUnit, num_shards: int) -> dict[str, list[float]]:
    """Seconds by way, of every round."""
    walls: dict[str, list[float]] = {"bare loop": [], "Ray Data": []}
    ray.init(
        address="local", num_cpus=CPUS, include_dashboard=False, log_to_driver=False, object_store_memory=150_000_000
    )
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(CPUS, get_context("spawn")) as pool:
        ways: dict[str, Callable[[Version], None]] = {
            "bare loop": lambda version: bare(version, make, pool),
            "Ray Data": lambda version: on_ray(version, make),
        }
        for name, way in ways.items():
            way(plan(f"{folder}/warm {name}", min(CPUS, num_shards)))
        for number in range(ROUNDS):
            # Each goes first in every other round.
            for name in list(ways)[:: 1 if number % 2 == 0 else -1]:
                version = plan(f"{folder}/{number} {name}", num_shards)
                assert len(version.shards()) == num_shards, (len(version.shards()), num_shards)
                start = time.perf_counter()
                ways[name](version)
                walls[name].append(time.perf_counter() - start)
    ray.shutdown()
    return walls


def show(what: str, walls: dict[str, list[float]]) -> None:
    """A table."""
    base = statistics.median(walls["bare loop"])
    sys.stdout.write(f"{what} on {CPUS} CPUs, {ROUNDS} rounds\n")
    sys.stdout.write(f"{'':12} {'wall s':>8} {'ratio':>7}   rounds\n")
    for name, found in walls.items():
        each = " ".join(f"{wall:.1f}" for wall in found)
        sys.stdout.write(f"{name:12} {statistics.median(found):8.1f} {statistics.median(found) / base:7.3f}   {each}\n")


def main() -> None:
    """Measure and print a table."""
    kind, number, *more = [*sys.argv[1:], *("reading", "4")[len(sys.argv) - 1 :]]
    if kind == "reading":
        side = int(more[0]) if more else BLOCK_CELLS
        with reading(side) as (plan, make):
            show(
                f"{number} shards of {BLOCKS_PER_SHARD} blocks of {side} x {side} cells, read,",
                measure(plan, make, int(number)),
            )
        return
    seconds = float(more[0]) if more else 1.0
    maker = Maker(waiting_s=seconds) if kind == "waiting" else Maker(seconds=seconds)
    show(f"{number} shards of {seconds} s ({kind})", measure(made_up, maker, int(number)))


if __name__ == "__main__":
    main()
