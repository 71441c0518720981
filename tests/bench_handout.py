"""What the one process that hands blocks to all training workers spends on a block, and Ray on a read task.

Ray Data deals out an epoch from a single process, whatever the number of workers: about as many blocks a second as its
CPU time per block allows. Blocks are of zeros, so that nothing but handing out is seen. Before that, every read task of
the epoch is put where Ray's workers find it.

Example:
    python -m tests.bench_handout
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.data import Datasource, ExecutionOptions, ReadTask
from ray.data.block import Block, BlockAccessor, BlockMetadata

from pipeline.fed_chips import Feed
from pipeline.feed import ChipSource
from pipeline.layout import Layout
from pipeline.quiet import quiet_data
from pipeline.store import Store

BATCH = 16
"""Samples of a block."""

SAMPLE_BYTES = 8192
"""A block is above what Ray sends without its object store."""

BLOCKS_PER_TASK = 1


class Zeros(Datasource):
    """Blocks that cost nothing to make."""

    def __init__(self, num_blocks: int) -> None:
        super().__init__()
        self.num_tasks = num_blocks // BLOCKS_PER_TASK

    def estimate_inmemory_data_size(self) -> int:
        return self.num_tasks * BLOCKS_PER_TASK * BATCH * SAMPLE_BYTES

    def get_read_tasks(self, parallelism: int, per_task_row_limit: Any = None, data_context: Any = None) -> list[Any]:
        def read() -> Iterator[Block]:
            for _ in range(BLOCKS_PER_TASK):
                yield BlockAccessor.batch_to_block({"pixels": np.zeros((BATCH, SAMPLE_BYTES), np.uint8)})

        rows = BLOCKS_PER_TASK * BATCH
        facts = BlockMetadata(num_rows=rows, size_bytes=rows * SAMPLE_BYTES, input_files=None, exec_stats=None)
        return [ReadTask(read, facts) for _ in range(self.num_tasks)]


@ray.remote(num_cpus=0)
def consume(split: Any) -> int:
    """Take every batch of an epoch, as a worker does that has nothing to compute; how many they were."""
    return sum(1 for _ in split.iter_batches(batch_size=BATCH, drop_last=False))


def coordinator_seconds() -> float:
    """CPU time so far of the process that hands out."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            named = (folder / "cmdline").read_text().startswith("ray::SplitCoordinator")
            if named and _below(folder, os.getpid()):
                fields = _stat(folder)
                return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        except OSError:
            continue
    raise LookupError("no process hands out")


def _below(folder: Path, ancestor: int) -> bool:
    while (parent := int(_stat(folder)[1])) > 1:
        if parent == ancestor:
            return True
        folder = Path("/proc", str(parent))
    return False


def _stat(folder: Path) -> list[str]:
    """State, parent, …; what comes after the name, which may hold blanks."""
    return (folder / "stat").read_text().rpartition(")")[2].split()


def hand_out(num_workers: int, num_blocks: int) -> dict[str, float]:
    """Two epochs over so many workers; of the second: blocks, seconds, and CPU seconds of the process."""
    source = Zeros(num_blocks)
    data = ray.data.read_datasource(source, override_num_blocks=source.num_tasks)
    data.context.target_max_block_size = int(0.9 * BATCH * SAMPLE_BYTES)
    data.context.execution_options = ExecutionOptions(preserve_order=True)
    splits = data.streaming_split(num_workers, equal=True)
    ray.get([consume.remote(split) for split in splits])
    start, busy = time.perf_counter(), coordinator_seconds()
    blocks = sum(ray.get([consume.remote(split) for split in splits]))
    return {"blocks": blocks, "seconds": time.perf_counter() - start, "cpu_s": coordinator_seconds() - busy}


def put_tasks(url: str, num_tasks: int) -> tuple[float, float]:
    """Wall and CPU milliseconds to put a read task of the feed, measured over so many."""
    Store.create(url, Layout())
    feed = Feed(url=url, version=1, global_batch=7168, lanes=64, ranks=64)
    source = ChipSource(feed)
    source.chips.__dict__["rows"] = np.arange(feed.order.window_batches * feed.batch_size * num_tasks)
    tasks = source.get_read_tasks(1)
    start, busy = time.perf_counter(), time.process_time()
    held = [ray.put(task) for task in tasks]
    return 1e3 * (time.perf_counter() - start) / len(held), 1e3 * (time.process_time() - busy) / len(held)


def main() -> None:
    """Measure and print a table."""
    os.environ["RAY_AUTH_MODE"] = "disabled"
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    quiet_data()
    with tempfile.TemporaryDirectory() as folder:
        wall_ms, cpu_ms = put_tasks(f"{folder}/chips.zarr", 2000)
    sys.stdout.write(f"a read task put: {wall_ms:.2f} ms, {cpu_ms:.2f} ms of CPU\n")
    sys.stdout.write(f"{'workers':>8} {'blocks':>7} {'blocks/s':>9} {'CPU ms/block':>13}\n")
    for num_workers in (2, 8):
        found = hand_out(num_workers, 1000)
        rate, cpu_ms = found["blocks"] / found["seconds"], 1e3 * found["cpu_s"] / found["blocks"]
        sys.stdout.write(f"{num_workers:8} {found['blocks']:7.0f} {rate:9.0f} {cpu_ms:13.2f}\n")
        sys.stdout.flush()
    ray.shutdown()


if __name__ == "__main__":
    main()
