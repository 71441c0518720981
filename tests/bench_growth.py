"""What a chip costs as a dataset grows: the same job for a hundred, a thousand and ten thousand chips.

Small cells of the simulated archive, so that ten thousand of them fit a small archive; what a chip costs beside its
pixels (planning, tasks, ledger, tables, the report) weighs all the more. Processor time is of the driver and of
all that Ray started for it.

Example:
    python -m tests.bench_growth
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import psutil
import ray

from jobs.build_dataset import BuildDataset, main
from jobs.support.settings import parse
from pipeline.simulation.archive import write_archive
from pipeline.simulation.profiles import PROFILES
from pipeline.simulation.server import StacServer
from pipeline.versions import latest_sealed

PROFILE = PROFILES["demo"]
SHARES = (0.01, 0.1, 1.0)
"""Of the demo's region."""

ROUNDS = 2
SIDE_PX = 60


def region_of(share: float) -> str:
    """A part of the demo's region with its proportions, from its south-western corner."""
    west, south, east, north = PROFILE.region
    side = share**0.5
    return ",".join(map(str, (west, south, west + (east - west) * side, south + (north - south) * side)))


def build(stac: str, store: Path, share: float) -> tuple[int, int]:
    """Build from a part of the region; candidates and chips."""
    words = {
        "archive": stac,
        "region": region_of(share),
        "period": PROFILE.period,
        "store": store,
        "side_px": SIDE_PX,
        "screening.max_cloud_fraction": 1.0,
        "screening.min_valid_fraction": 0.0,
    }
    main(parse(BuildDataset, [f"{key}={value}" for key, value in words.items()]))
    counts = latest_sealed(str(store)).sealed
    assert counts is not None
    return counts["requested"], counts["written"]


def cpu_seconds() -> float:
    """Used so far by this process and all that it started."""
    me = psutil.Process()
    times = [each.cpu_times() for each in (me, *me.children(recursive=True))]
    return sum(time.user + time.system + time.children_user + time.children_system for time in times)


def bench() -> None:
    """Measure and print a table."""
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=300_000_000)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_archive(folder / "archive", PROFILE, seed=0, processes=2)
        sys.stdout.write(
            "| candidates | chips | s | ms per candidate | CPU ms per candidate |\n|---|---|---|---|---|\n"
        )
        with StacServer(folder / "archive") as server:
            build(server.url, folder / "warm.zarr", SHARES[0])
            for number in range(ROUNDS):
                for share in SHARES:
                    start, busy = time.perf_counter(), cpu_seconds()
                    candidates, chips = build(server.url, folder / f"{number}-{share}.zarr", share)
                    seconds, busy = time.perf_counter() - start, cpu_seconds() - busy
                    sys.stdout.write(
                        f"| {candidates} | {chips} | {seconds:.1f} | {1000 * seconds / candidates:.1f} "
                        f"| {1000 * busy / candidates:.1f} |\n"
                    )
                    sys.stdout.flush()
    ray.shutdown()


if __name__ == "__main__":
    bench()
