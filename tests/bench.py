"""Alternatives against each other, interleaved in one run: medians of wall time and CPU time, and ratios.

Example:
    make bench
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pipeline.feed import Feed, cut_batches
from pipeline.grid import Cell
from pipeline.layout import Layout
from pipeline.positions import plan_pieces
from pipeline.store import Store
from tests.sample_chips import make_chip
from tests.small_stores import Candidate, write_store

NUM_CHIPS = 128
ROUNDS = 5
CROP_PX = 120


def crops_by_zarr(url: str) -> int:
    """Every chip through zarr-python, one crop each."""
    store = Store.open(url)
    for row in range(NUM_CHIPS):
        store.read_window(row, 72, 72, CROP_PX)
    return NUM_CHIPS


def crops_by_feed(url: str, crops_per_chip: int) -> int:
    """Every chip through the feed's own reader, decoded once and cut several times."""
    store = Store.open(url)
    feed = Feed(url=url, version=1, crop_px=CROP_PX, crops_per_chip=crops_per_chip, global_batch=64)
    rows = np.arange(NUM_CHIPS)
    pieces = plan_pieces(rows, shard_chips=store.layout.shard_chips, order=feed.order, epoch=0)
    return sum(len(batch["row"]) for batch in cut_batches(store, pieces, feed=feed))


def main() -> None:
    """Measure and print a table."""
    with tempfile.TemporaryDirectory() as folder:
        url = str(Path(folder) / "chips.zarr")
        layout = Layout(shard_chips=64)
        cells = [Cell(epsg=32633, column=100 + n, row=2000, side_m=2640) for n in range(NUM_CHIPS)]
        write_store(
            url, layout, [Candidate(cell=cell) for cell in cells], lambda row: make_chip(row, layout), request={}
        )
        ways: dict[str, Callable[[], int]] = {
            "zarr-python, chip by chip": lambda: crops_by_zarr(url),
            "feed, 1 crop per chip": lambda: crops_by_feed(url, 1),
            "feed, 4 crops per chip": lambda: crops_by_feed(url, 4),
        }
        wall: dict[str, list[float]] = {name: [] for name in ways}
        cpu: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(ROUNDS):
            for name, way in ways.items():
                start, busy = time.perf_counter(), time.process_time()
                num_crops = way()
                wall[name].append((time.perf_counter() - start) / num_crops)
                cpu[name].append((time.process_time() - busy) / num_crops)
    base = statistics.median(cpu["zarr-python, chip by chip"])
    sys.stdout.write(
        f"{'crops of 120 px, lz4, random pixels':38} {'crops/s':>9} {'CPU ms/crop':>12} {'CPU ratio':>10}\n"
    )
    for name in ways:
        seconds, busy = statistics.median(wall[name]), statistics.median(cpu[name])
        sys.stdout.write(f"{name:38} {1 / seconds:9.0f} {1000 * busy:12.2f} {base / busy:10.2f}\n")


if __name__ == "__main__":
    main()
