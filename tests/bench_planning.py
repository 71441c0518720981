"""What planning costs: synthetic candidates as integers, area by area, to a written plan.

Each size in a process of its own, so that its peak of memory is its own. Pairing is left out.

Example:
    python -m tests.bench_planning 1_000_000 10_000_000
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.layout import Layout
from pipeline.manifest import ITEMS_SCHEMA, LOOKS_SCHEMA
from pipeline.planning import Planner, splits_by
from pipeline.splits import SplitRules
from pipeline.store import Store
from pipeline.versions import begin

SIZES = (1_000_000, 10_000_000, 100_000_000)
SIDE_M = 2640
CELLS_PER_SIDE = 200
LOOKS_PER_AREA = 25
"""So an area is 10^6 candidates: 200 x 200 cells, each seen 25 times."""

RULES = SplitRules(block_cells=16, val_fraction=0.1, test_fraction=0.1, buffer_cells=1, seed=0)


def areas(num_rows: int) -> Iterator[tuple[dict[str, np.ndarray], pa.Table]]:
    """Candidates and looks of areas in a row of zones, 10^6 candidates each but for the last."""
    columns, rows = (part.ravel() for part in np.meshgrid(*[np.arange(CELLS_PER_SIDE, dtype=np.int32)] * 2))
    per_area = CELLS_PER_SIDE**2 * LOOKS_PER_AREA
    for area in range(-(-num_rows // per_area)):
        size = min(per_area, num_rows - area * per_area)
        candidates = {
            "epsg": np.full(size, 32601 + area % 60, np.int32),
            "column": np.tile(columns + 60, LOOKS_PER_AREA)[:size],
            "cell_row": np.tile(rows + 300 + CELLS_PER_SIDE * (area // 60), LOOKS_PER_AREA)[:size],
            "look": np.repeat(np.arange(LOOKS_PER_AREA, dtype=np.int32), CELLS_PER_SIDE**2)[:size],
            "overlap": np.ones(size, np.float32),
        }
        yield candidates, looks_of(area)


def looks_of(area: int) -> pa.Table:
    """Every look is of four optical and one radar item, as where tiles overlap."""
    moments = [
        datetime(2023, 1, 1, tzinfo=UTC) + timedelta(days=5 * look, minutes=area) for look in range(LOOKS_PER_AREA)
    ]
    names = [f"S2A_MSIL2A_{moment:%Y%m%dT%H%M%S}_R{area:03d}" for moment in moments]
    return pa.table(
        {
            "pair": [
                f"{name}+S1A_{moment:%Y%m%dT%H%M%S}_R{area:03d}" for name, moment in zip(names, moments, strict=True)
            ],
            "optical_items": [[f"{name}_T{tile}" for tile in range(4)] for name in names],
            "radar_items": [[f"S1A_IW_GRDH_{moment:%Y%m%dT%H%M%S}_{area:05d}_rtc"] for moment in moments],
            "optical_datetime": moments,
            "radar_datetime": moments,
            "dt_s": [0] * len(names),
            "orbit_state": ["descending"] * len(names),
            "relative_orbit": [area % 175] * len(names),
            "baseline": ["05.09"] * len(names),
            "offset_dn": [1000] * len(names),
        },
        schema=pa.schema([LOOKS_SCHEMA.field(name) for name in LOOKS_SCHEMA.names[1:]]),
    )


def plan(num_rows: int, url: str) -> dict[str, float]:
    """Plan so many candidates into a new store."""
    Store.create(url, Layout())
    version = begin(url, {"rows": num_rows})
    before = resource.getrusage(resource.RUSAGE_SELF)
    start, busy, synthetic = time.perf_counter(), time.process_time(), 0.0
    planner = Planner(block_cells=8, shard_chips=256, first_row=0, seed=0, splits_of=splits_by(RULES, side_m=SIDE_M))
    source = areas(num_rows)
    while True:
        began = time.process_time()
        area = next(source, None)
        synthetic += time.process_time() - began
        if area is None:
            break
        planner.add(**area[0], looks=area[1])
    added = time.perf_counter()
    written = version.write_planned(planner, ITEMS_SCHEMA.empty_table())
    assert written["num_chips"] == num_rows
    manifest = sum(path.stat().st_size for path in Path(url, "versions/0001").rglob("*") if path.is_file())
    return {
        "rows": num_rows,
        "wall_s": time.perf_counter() - start,
        "adding_s": added - start,
        "cpu_s": time.process_time() - busy - synthetic,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        "before_gb": before.ru_maxrss / 1e6,
        "shards": written["end_shard"],
        "bytes_per_row": manifest / num_rows,
    }


def main() -> None:
    """Measure and print a table."""
    if sys.argv[1:2] == ["--one"]:
        sys.stdout.write(json.dumps(plan(int(sys.argv[2]), sys.argv[3])) + "\n")
        return
    sizes = [int(word) for word in sys.argv[1:]] or SIZES
    sys.stdout.write(
        f"{'rows':>12} {'shards':>8} {'wall s':>7} {'of it adding':>13} {'CPU s':>7} {'peak GB':>8} {'B/row':>6}\n"
    )
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "tests.bench_planning", "--one", str(size), f"{folder}/store"]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        found = json.loads(output)
        sys.stdout.write(
            f"{found['rows']:12,} {found['shards']:8,} {found['wall_s']:7.1f} {found['adding_s']:13.1f} "
            f"{found['cpu_s']:7.1f} {found['peak_gb']:8.2f} {found['bytes_per_row']:6.2f}\n"
        )
        sys.stdout.flush()


if __name__ == "__main__":
    main()
