"""From the store to batches on Ray Data: read tasks decode and crop, blocks are some batches of a rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import ray.data
from ray.data import Datasource, ReadTask
from ray.data.block import Block, BlockAccessor, BlockMetadata

from pipeline.block_buffers import BlockBuffers
from pipeline.crops import cut_batches
from pipeline.fed_chips import FedChips, Feed
from pipeline.positions import Span, rank_lanes, rank_spans

_BLOCK_BYTES = 128 * 2**20
"""Of a rank that is alone, about: what a block costs beside its bytes is as much as 40 MB do."""

_BUFFERS = BlockBuffers()
"""Of the process that reads."""


class ChipSource(Datasource):
    """Samples for training: each execution of a dataset made from it is an epoch.

    The first one goes on where the run stands.

    Args:
        feed: What is fed.
        seen: Samples of the run that were seen.
        members: Ranks whose parts are wanted, ascending; unset: all.
    """

    def __init__(self, feed: Feed, *, seen: int = 0, members: Sequence[int] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.chips = FedChips(feed, seen=seen)
        self.members = tuple(range(feed.ranks) if members is None else members)

    @property
    def feed(self) -> Feed:
        """What is fed."""
        return self.chips.feed

    @property
    def block_batches(self) -> int | None:
        """Batches of a block; None: all of a task's are one, for it is by blocks that tasks are dealt out in turn."""
        if len(self.members) > 1:
            return None
        return max(1, _BLOCK_BYTES // (self.feed.batch_size * self.chips.sample_bytes()))

    def estimate_inmemory_data_size(self) -> int:
        """Bytes of all samples of an epoch."""
        return self.chips.course.epoch_samples * self.chips.sample_bytes()

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        """A task for each rank's part of a span; how many there are is the epoch's business, not `parallelism`'s."""
        # Ray asks several times before it executes a dataset.
        return list(_planned_tasks(self, self._epoch(data_context), per_task_row_limit))

    def tasks_of(self, epoch: int, row_limit: int | None) -> list[ReadTask]:
        """The tasks of an epoch, planned anew at each call."""
        feed = self.feed
        first, last = (rank_lanes(feed.order, rank=self.members[n], ranks=feed.ranks) for n in (0, -1))
        return [
            self._task(parts[rank], rank, row_limit)
            for span in self.chips.plan(epoch, range(first.start, last.stop))
            for parts in rank_spans(span, feed.order, ranks=feed.ranks)
            for rank in self.members
        ]

    def num_tasks(self) -> int:
        """Read tasks of the first execution."""
        spans = self.chips.plan(self._epoch(None), range(0))
        parts = (part for span in spans for part in rank_spans(span, self.feed.order, ranks=self.feed.ranks))
        return len(self.members) * sum(1 for _ in parts)

    def _epoch(self, data_context: Any) -> int:
        return self.chips.course.epoch_of(self.chips.seen) + _executions_before(data_context)

    def _task(self, span: Span, rank: int, limit: int | None) -> ReadTask:
        feed, together = self.feed, self.block_batches

        def read() -> Iterator[Block]:
            return _blocks(span, feed=feed, rank=rank, together=together)

        metadata = read_metadata(span.num_batches * feed.batch_size, self.chips.sample_bytes())
        return ReadTask(read, metadata, per_task_row_limit=limit)


@lru_cache(2)
def _planned_tasks(source: ChipSource, epoch: int, row_limit: int | None) -> list[ReadTask]:
    return source.tasks_of(epoch, row_limit)


def training_samples(feed: Feed, *, seen: int = 0, members: Sequence[int] | None = None) -> ray.data.Dataset:
    """A dataset of crops whose blocks are several batches of a rank; iterating it again gives the next epoch.

    The order in which blocks arrive is the plan's only where the execution options ask for `preserve_order`: some
    batches of the first rank, the same ones of the second and so on, then the next batches.

    Args:
        feed: What is fed.
        seen: Samples of the run that were seen; the first iteration gives what is left of that epoch.
        members: Ranks whose parts are wanted, ascending; unset: all.
    """
    source = ChipSource(feed, seen=seen, members=members)
    together = source.block_batches
    block_bytes = together and together * feed.batch_size * source.chips.sample_bytes()
    dataset = dataset_of(source, num_tasks=source.num_tasks(), block_bytes=block_bytes)
    # Readers are to run ahead as far as the object store has room. Ray would hold them back by what the consumer has at
    # hand, and takes what only waits for its turn, as the order is kept, for more than is wanted.
    dataset.context.downstream_capacity_backpressure_ratio = None
    return dataset


def _blocks(span: Span, *, feed: Feed, rank: int, together: int | None) -> Iterator[Block]:
    """What a read task does; apart from the task, which travels by value, so that the buffers stay where they are."""
    for batches in cut_batches(feed.open(), span, feed=feed, rank=rank, together=together, allocate=_BUFFERS.empty):
        yield BlockAccessor.batch_to_block(batches)


def dataset_of(source: Datasource, *, num_tasks: int, block_bytes: int | None) -> ray.data.Dataset:
    """A dataset whose blocks are of so many bytes; None: one of each task, whatever its size."""
    dataset: ray.data.Dataset = ray.data.read_datasource(source, override_num_blocks=num_tasks)
    # Ray collects blocks until they are larger than this, and cuts those that are larger by half.
    dataset.context.target_max_block_size = max(1, int(block_bytes * 0.9)) if block_bytes else None
    return dataset


def _executions_before(data_context: Any) -> int:
    """How often the dataset was executed to its end; the one place that knows Ray Data's private name for it."""
    return 0 if data_context is None else int(data_context._execution_idx)


def read_metadata(num_samples: int, sample_bytes: int) -> BlockMetadata:
    """Of a read task."""
    return BlockMetadata(num_rows=num_samples, size_bytes=num_samples * sample_bytes, input_files=None, exec_stats=None)
