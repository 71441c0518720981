"""What the driver does beside its tasks: finding out what is done, sealing, reading rows; by shard and by memory.

The chip tables are made up and full: 256 rows a shard, with statistics of bands.

Example:
    python -m tests.bench_sealing 500 4000
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline import chip_table
from pipeline.layout import Layout
from pipeline.manifest import ITEMS_SCHEMA
from pipeline.planning import Planner, splits_by
from pipeline.statistics import BandStatistics
from pipeline.store import Store
from pipeline.versions import Version, begin
from tests.bench_planning import RULES, SIDE_M, areas
from tests.sample_chips import make_chip

SHARD_CHIPS = 256


def planned(url: str, num_shards: int) -> Version:
    """A version of about so many shards that waits for its chips."""
    Store.create(url, Layout())
    version = begin(url, {})
    planner = Planner(
        block_cells=8, shard_chips=SHARD_CHIPS, first_row=0, seed=0, splits_of=splits_by(RULES, side_m=SIDE_M)
    )
    for candidates, looks in areas(num_shards * (SHARD_CHIPS - 10)):
        planner.add(**candidates, looks=looks)
    version.write_planned(planner, ITEMS_SCHEMA.empty_table())
    return version


def part_of(manifest: pa.Table, rng: np.random.Generator) -> pa.Table:
    """What became of the rows of a shard: all written, with numbers like real ones."""
    size = manifest.num_rows
    hashes = pa.array([row.tobytes().hex() for row in rng.integers(0, 256, (size, 32), dtype=np.uint8)])
    columns: dict[str, Any] = {name: manifest[name] for name in chip_table.FROM_MANIFEST}
    columns |= {"status": ["written"] * size, "reason": [""] * size, "error": [""] * size, "sha256": hashes}
    columns |= {name: rng.random(size, np.float32) for name in chip_table.SCHEMA.names if name.endswith("_fraction")}
    columns |= {"flags": [""] * size, **{name: list(rng.random((size, 14), np.float32)) for name in ("mean", "std")}}
    return pa.table({name: columns[name] for name in chip_table.SCHEMA.names}, schema=chip_table.SCHEMA)


def measure(num_shards: int, url: str) -> dict[str, float]:
    """Seconds of each step, of one process."""
    version, rng, statistics = planned(url, num_shards), np.random.default_rng(0), BandStatistics()
    statistics.add(make_chip(0, Layout()))
    found: dict[str, float] = {"shards": len(version.shards())}

    def timed(name: str, step: Callable[[], Any]) -> None:
        start = time.perf_counter()
        step()
        found[name] = time.perf_counter() - start

    def one_by_one() -> None:
        for shard in version.shards():
            version.write_part(shard, part_of(version.manifest_of(shard), rng), statistics=statistics)

    timed("parts", one_by_one)
    timed("finished", version.finished_shards)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    timed("seal", version.seal)
    timed("rows", lambda: version.written_rows(split="train"))
    found["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    found["before_gb"] = before / 1e6
    return found


def main() -> None:
    """Measure and print a table."""
    if sys.argv[1:2] == ["--one"]:
        sys.stdout.write(json.dumps(measure(int(sys.argv[2]), sys.argv[3])) + "\n")
        return
    sys.stdout.write("of it per shard, ms: a task's reading of its plan and writing of its part; the driver's rest\n")
    sys.stdout.write(
        f"{'shards':>8} {'plan+part':>10} {'finished':>9} {'seal':>6} {'rows':>6} {'peak GB':>8} {'before GB':>10}\n"
    )
    for size in [int(word) for word in sys.argv[1:]] or [500, 4000]:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "tests.bench_sealing", "--one", str(size), f"{folder}/store"]
            found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        of_shard = {name: 1000 * found[name] / found["shards"] for name in ("parts", "finished", "seal", "rows")}
        sys.stdout.write(
            f"{found['shards']:8,.0f} {of_shard['parts']:10.1f} {of_shard['finished']:9.3f} {of_shard['seal']:6.2f} "
            f"{of_shard['rows']:6.3f} {found['peak_gb']:8.2f} {found['before_gb']:10.2f}\n"
        )
        sys.stdout.flush()


if __name__ == "__main__":
    main()
