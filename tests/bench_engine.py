"""What Ray Data costs beside a bare loop over the same tasks: shards of made-up chips that take a second each.

The bare loop is as many processes as Ray has CPUs, which take shards from one list. Both in one run, in turns. A task
waits, as for a server, or works; on a machine that others use too, only what waits can be compared by the clock.

Example:
    python -m tests.bench_engine 64 1.0 waiting
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import ray

from pipeline.ingest import build, build_planned_shard
from pipeline.versions import Version
from tests.made_units import LAYOUT, Maker, grid, planned

CPUS = 2
ROUNDS = 3


def bare(version: Version, maker: Maker, pool: ProcessPoolExecutor) -> None:
    """Every shard in a plain pool of processes."""
    list(pool.map(partial(build_planned_shard, version, recipe=maker), version.shards()))


def main() -> None:
    """Measure and print a table."""
    num_shards, seconds = int((sys.argv[1:] or ["64"])[0]), float((sys.argv[2:] or ["1.0"])[0])
    kind = (sys.argv[3:] or ["waiting"])[0]
    # Units of as many chips as a shard holds: one per shard.
    pairs = grid(range(2 * num_shards), range(2))
    maker = Maker(waiting_s=seconds) if kind == "waiting" else Maker(seconds=seconds)
    walls: dict[str, list[float]] = {"bare loop": [], "Ray Data": []}
    ray.init(
        address="local", num_cpus=CPUS, include_dashboard=False, log_to_driver=False, object_store_memory=150_000_000
    )
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(CPUS, get_context("spawn")) as pool:
        warm = planned(f"{folder}/warm", pairs[: 4 * LAYOUT.shard_chips])
        list(build(warm, Maker()))
        bare(planned(f"{folder}/warm-bare", pairs[: 4 * LAYOUT.shard_chips]), Maker(), pool)
        for number in range(ROUNDS):
            version = planned(f"{folder}/bare-{number}", pairs)
            start = time.perf_counter()
            bare(version, maker, pool)
            walls["bare loop"].append(time.perf_counter() - start)
            version = planned(f"{folder}/ray-{number}", pairs)
            start = time.perf_counter()
            receipts = list(build(version, maker))
            walls["Ray Data"].append(time.perf_counter() - start)
            assert len(receipts) == len(version.shards()) == num_shards, (len(receipts), len(version.shards()))
    ray.shutdown()
    base = statistics.median(walls["bare loop"])
    sys.stdout.write(f"{num_shards} shards of {seconds} s ({kind}) on {CPUS} CPUs, {ROUNDS} rounds\n")
    sys.stdout.write(f"{'':12} {'wall s':>8} {'ratio':>7}   rounds\n")
    for name, found in walls.items():
        each = " ".join(f"{wall:.1f}" for wall in found)
        sys.stdout.write(f"{name:12} {statistics.median(found):8.1f} {statistics.median(found) / base:7.3f}   {each}\n")


if __name__ == "__main__":
    main()
