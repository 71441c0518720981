"""What an epoch costs the process that plans it: rows of a version -> windows -> read tasks, as bytes.

Each size in a process of its own, so that its peak of memory is its own. The rows are synthetic: a store in which 4 of
10 candidates are holes, all of one split. The second epoch is planned, into which a remainder of the first is carried.

Example:
    python -m tests.bench_epochs 1_000_000 10_000_000 100_000_000
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time

import numpy as np
from ray import cloudpickle

from pipeline.epochs import usual_window
from pipeline.fed_chips import Feed
from pipeline.feed import ChipSource
from pipeline.layout import Layout
from pipeline.store import Store

SIZES = (1_000_000, 10_000_000, 100_000_000)
WRITTEN_FRACTION = 0.6
GLOBAL_BATCH = 7168
RANKS = 64


def synthetic_rows(num_chips: int) -> np.ndarray:
    """(chip,) ascending rows with holes; what making them takes is not counted."""
    rng = np.random.default_rng(0)
    rows = np.empty(num_chips, np.int64)
    filled = first = 0
    while filled < num_chips:
        found = first + np.flatnonzero(rng.random(1_000_000) < WRITTEN_FRACTION)[: num_chips - filled]
        rows[filled : filled + len(found)] = found
        filled, first = filled + len(found), first + 1_000_000
    return rows


def plan(num_chips: int, crops_per_chip: int, url: str) -> dict[str, float]:
    """Plan an epoch and pack its read tasks, as Ray does before it can start one."""
    Store.create(url, Layout())
    window = usual_window(crops_per_chip)
    feed = Feed(url=url, version=1, global_batch=GLOBAL_BATCH, lanes=RANKS, ranks=RANKS, window_chips=window,
                crops_per_chip=crops_per_chip)  # fmt: skip
    rows = synthetic_rows(num_chips)
    source = ChipSource(feed)
    source.chips.__dict__["rows"] = rows
    source.chips.seen = source.chips.course.seen_after(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, busy = time.perf_counter(), time.process_time()
    tasks = source.get_read_tasks(1)
    planned, planned_busy = time.perf_counter(), time.process_time()
    sizes = [len(cloudpickle.dumps(task)) for task in tasks]
    return {
        "chips": num_chips,
        "crops": crops_per_chip,
        "tasks": len(tasks),
        "plan_s": planned - start,
        "plan_cpu_s": planned_busy - busy,
        "pack_s": time.perf_counter() - planned,
        "pack_cpu_s": time.process_time() - planned_busy,
        "task_bytes": sum(sizes) / len(sizes),
        "before_gb": before / 1e6,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }


def main() -> None:
    """Measure and print a table."""
    if sys.argv[1:2] == ["--one"]:
        sys.stdout.write(json.dumps(plan(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])) + "\n")
        return
    sizes = [int(word) for word in sys.argv[1:]] or SIZES
    sys.stdout.write(
        f"{'chips':>12} {'K':>2} {'tasks':>8} {'plan s':>7} {'CPU s':>6} {'pack s':>7} {'CPU s':>6} {'B/task':>7} "
        f"{'peak GB':>8} {'rows GB':>8}\n"
    )
    for size in sizes:
        for crops_per_chip in (1, 4):
            with tempfile.TemporaryDirectory() as folder:
                words = ["--one", str(size), str(crops_per_chip), f"{folder}/store"]
                command = [sys.executable, "-m", "tests.bench_epochs", *words]
                found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
            sys.stdout.write(
                f"{found['chips']:12,} {found['crops']:2} {found['tasks']:8,} {found['plan_s']:7.1f} "
                f"{found['plan_cpu_s']:6.1f} {found['pack_s']:7.1f} {found['pack_cpu_s']:6.1f} "
                f"{found['task_bytes']:7.0f} {found['peak_gb']:8.2f} {8e-9 * size:8.2f}\n"
            )
            sys.stdout.flush()


if __name__ == "__main__":
    main()
