"""The feed from an S3 server 40 ms away behind a line of 100 MB/s, and how fast plain requests fill the same line.

Example:
    python -m tests.bench_feed_s3
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipeline.fed_chips import Feed
from pipeline.grid import Cell
from pipeline.layout import Layout
from pipeline.local_feed import rank_batches
from pipeline.objects import Objects
from tests.bench_feed import answering, ask
from tests.bench_growth import cpu_seconds
from tests.feed_data import make_chips
from tests.seaweed import BUCKET, seaweed
from tests.small_stores import Candidate, write_store

LATENCY_MS, MB_PER_S = 40, 100
NUM_ROWS = 640
ROUNDS = 3
URL = f"s3://{BUCKET}/chips.zarr"


def plain(keys: list[str]) -> int:
    """Every object whole, twelve at once."""
    objects = Objects.at(URL)
    with ThreadPoolExecutor(12) as pool:
        return sum(pool.map(lambda key: len(objects.view(key)), keys))


def fed(crops_per_chip: int) -> int:
    """An epoch."""
    feed = Feed(url=URL, version=1, crops_per_chip=crops_per_chip, global_batch=64, window_chips=256)
    return sum(len(batch["row"]) for batch in rank_batches(feed, rank=0, epochs=1, threads=2))


def main() -> None:
    """Measure and print a table."""
    layout = Layout(has_classes=False, shard_chips=64)
    chips = make_chips(layout.shard_chips, layout)
    cells = [Cell(epsg=32633, column=100 + row, row=2000, side_m=2640) for row in range(NUM_ROWS)]
    with tempfile.TemporaryDirectory() as folder, seaweed(Path(folder)) as server:
        os.environ.update(server.environment)
        candidates = [Candidate(cell=cell) for cell in cells]
        write_store(
            URL, layout, candidates, lambda row: {name: a[row % len(a)] for name, a in chips.items()}, request={}
        )
        keys = [path for path in Objects.at(URL).list() if "/c/" in path]
        stored_mb = sum(Objects.at(URL).size(key) for key in keys) / 1e6
        ways: dict[str, Callable[[], int]] = {
            "plain requests": lambda: plain(keys),
            "feed": lambda: fed(1),
            "feed, 4 crops per chip": lambda: fed(4),
        }
        proxy = [sys.executable, "-m", "tests.slow_proxy", str(server.ports[0]), str(LATENCY_MS), str(MB_PER_S)]
        with answering(proxy) as line:
            os.environ["AWS_ENDPOINT"] = f"http://127.0.0.1:{ask(line, '')['port']}"
            sys.stdout.write(
                f"| {stored_mb:.0f} MB in {len(keys)} objects | s | of {MB_PER_S} MB/s | fetched more than once "
                "| large objects at once | CPU s | load |\n|---|---|---|---|---|---|---|\n"
            )
            for _ in range(ROUNDS):
                for name, way in ways.items():
                    ask(line, "")
                    start, busy = time.perf_counter(), cpu_seconds()
                    way()
                    seconds, busy = time.perf_counter() - start, cpu_seconds() - busy
                    passed = ask(line, "")
                    sys.stdout.write(
                        f"| {name} | {seconds:.2f} | {stored_mb / seconds / MB_PER_S:.2f} "
                        f"| {passed['body_bytes'] / 1e6 / stored_mb - 1:.2f} | {passed['most_at_once']} "
                        f"| {busy:.2f} | {os.getloadavg()[0]:.1f} |\n"
                    )
                    sys.stdout.flush()


if __name__ == "__main__":
    main()
