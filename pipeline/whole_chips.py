"""Whole chips on Ray Data, each once, for evaluation and embedding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import ray.data
from numpy.typing import NDArray
from ray.data import Datasource, ReadTask
from ray.data.block import Block, BlockAccessor

from pipeline.chip_filter import EVERY_CHIP, choose
from pipeline.crops import Batch, chips_in_order, empty_batch
from pipeline.feed import dataset_of, read_metadata
from pipeline.layout import MODEL_ARRAYS
from pipeline.shard_reader import ChipShards
from pipeline.store import Store
from pipeline.types import ChipArrays
from pipeline.versions import Version, latest_sealed

_TASK_CHIPS = 256


class WholeChipSource(Datasource):
    """Whole chips in the order of their rows, for evaluation and embedding."""

    def __init__(self, store: str, rows: NDArray[np.int64], *, arrays: Sequence[str], batch_size: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.store, self.rows, self.arrays, self.batch_size = store, rows, tuple(arrays), batch_size
        opened = Store.open(store)
        self.chip_bytes = opened.layout.window_bytes(opened.layout.side_px, self.arrays)
        self._shard_chips = opened.layout.shard_chips

    def estimate_inmemory_data_size(self) -> int:
        """Bytes of all chips."""
        return len(self.rows) * self.chip_bytes

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        """Tasks of whole batches, about a shard each."""
        return [self._task(rows, per_task_row_limit) for rows in self._groups()]

    def _groups(self) -> list[NDArray[np.int64]]:
        size = max(1, _TASK_CHIPS // self.batch_size) * self.batch_size
        return [self.rows[start : start + size] for start in range(0, len(self.rows), size)]

    def _task(self, rows: NDArray[np.int64], limit: int | None) -> ReadTask:
        url, arrays, batch_size = self.store, self.arrays, self.batch_size

        def read() -> Iterator[Block]:
            for batch in whole_batches(Store.open(url), rows, arrays=arrays, batch_size=batch_size):
                yield BlockAccessor.batch_to_block(batch)

        return ReadTask(read, read_metadata(len(rows), self.chip_bytes), per_task_row_limit=limit)


def read_chips(
    store: str,
    *,
    version: int | None = None,
    split: str | None = None,
    arrays: Sequence[str] = MODEL_ARRAYS,
    batch_size: int = 32,
) -> ray.data.Dataset:
    """A dataset of whole chips, each once, with their rows; to run a model over with ``map_batches``.

    Args:
        store: URL.
        version: Number; unset: the newest sealed one.
        split: train, val, test or buffer; unset: all written chips.
        arrays: Names of the arrays wanted; those the store lacks are left out.
        batch_size: Chips per block.

    Raises:
        StoreError: No store, no such version, or no written chips.
    """
    number = latest_sealed(store).number if version is None else version
    rows = choose(Version(store, number), EVERY_CHIP, split=split).or_refuse().rows
    source = WholeChipSource(store, rows, arrays=arrays, batch_size=batch_size)
    num_tasks = len(source.get_read_tasks(1))
    return dataset_of(source, num_tasks=num_tasks, block_bytes=batch_size * source.chip_bytes)


def whole_batches(
    store: ChipShards, rows: NDArray[np.int64], *, arrays: Sequence[str], batch_size: int
) -> Iterator[Batch]:
    """Whole chips in the order of rows, in batches."""
    specs = store.layout.arrays_of(arrays)
    chips = chips_in_order(store, rows, tuple(specs))
    scratch: ChipArrays | None = None
    for start in range(0, len(rows), batch_size):
        of_batch = rows[start : start + batch_size]
        batch = empty_batch(specs, len(of_batch), store.layout.side_px, {"row": np.int64})
        batch["row"][:] = of_batch
        for index in range(len(of_batch)):
            reader, row = next(chips)
            scratch = scratch or reader.scratch()
            reader.cut(row, [(batch, index, 0, 0)], store.layout.side_px, scratch)
        yield batch
