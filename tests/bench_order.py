"""What keeping the order of blocks costs: the feed through Ray Data to two consumers, with and without, in turn.

Example:
    python -m tests.bench_order
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import ray
from numpy.typing import NDArray
from ray.data import DataIterator

from pipeline.fed_chips import Feed
from pipeline.feed import training_samples
from pipeline.grid import Cell
from pipeline.layout import Layout
from pipeline.quiet import quiet_data
from tests.sample_chips import make_chip
from tests.small_stores import Candidate, write_store

NUM_CHIPS, CROPS_PER_CHIP, CROP_PX, GLOBAL_BATCH, CONSUMERS = 1024, 16, 120, 128, 2
ROUNDS = 5


def samples_per_s(feed: Feed, *, ordered: bool) -> tuple[float, bool]:
    """Of one epoch, from the first batch to the last: what starting takes is not in it; and whether order was kept."""
    dataset = training_samples(feed)
    dataset.context.execution_options.preserve_order = ordered
    splits = dataset.streaming_split(CONSUMERS, equal=True)
    with ThreadPoolExecutor(CONSUMERS) as pool:
        found = list(pool.map(_consumed, splits))
    start, end = min(first for first, _, _ in found), max(last for _, last, _ in found)
    kept = all(bool((np.diff(positions) > 0).all()) for _, _, positions in found)
    return sum(len(positions) for _, _, positions in found) / (end - start), kept


def _consumed(split: DataIterator) -> tuple[float, float, NDArray[np.int64]]:
    """When the first batch came and when the last, and positions of the samples after the first batch."""
    first, positions = 0.0, []
    for batch in split.iter_batches(batch_size=None):
        if first:
            positions.append(batch["position"])
        else:
            first = time.perf_counter()
    return first, time.perf_counter(), np.concatenate(positions)


def main() -> None:
    """Measure and print a table."""
    os.environ["RAY_AUTH_MODE"] = "disabled"
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    quiet_data()
    rates: dict[bool, list[float]] = {True: [], False: []}
    rounds_in_order = {True: 0, False: 0}
    with tempfile.TemporaryDirectory() as folder:
        url, layout = str(Path(folder) / "chips.zarr"), Layout(side_px=132, shard_chips=64)
        cells = [Cell(epsg=32633, column=100 + n, row=2000, side_m=1320) for n in range(NUM_CHIPS)]
        write_store(
            url, layout, [Candidate(cell=cell) for cell in cells], lambda row: make_chip(row, layout), request={}
        )
        feed = Feed(
            url=url,
            version=1,
            crop_px=CROP_PX,
            crops_per_chip=CROPS_PER_CHIP,
            global_batch=GLOBAL_BATCH,
            lanes=CONSUMERS,
            ranks=CONSUMERS,
            window_chips=128,
        )
        samples_per_s(feed, ordered=True)  # the object store's pages are touched for the first time
        for _ in range(ROUNDS):
            for ordered in rates:
                rate, kept = samples_per_s(feed, ordered=ordered)
                rates[ordered].append(rate)
                rounds_in_order[ordered] += kept
    ray.shutdown()
    ratios = [kept / free for kept, free in zip(rates[True], rates[False], strict=True)]
    for ordered, found in rates.items():
        each = ", ".join(f"{rate:.0f}" for rate in found)
        kept_in = f"in order in {rounds_in_order[ordered]} of {ROUNDS} rounds"
        said = f"{statistics.median(found):.0f} samples/s ({each}), {kept_in}"
        sys.stdout.write(f"preserve_order={ordered}: {said}\n")
    sys.stdout.write(
        f"ratio of a round, median {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})\n"
    )


if __name__ == "__main__":
    main()
