"""From the store to batches on Ray Data: read tasks decode and crop, blocks are some batches of a rank.

Native-resolution integers travel; scaling, upsampling and flips are the model side's. Which samples there are is
worked out in `pipeline.epochs`, where they go in `pipeline.positions`; here they are only fetched.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import ray.data
from numpy.typing import NDArray
from ray.data import Datasource, ReadTask
from ray.data.block import Block, BlockAccessor, BlockMetadata

from pipeline.batch_buffers import Allocate
from pipeline.block_buffers import BlockBuffers
from pipeline.chip_filter import EVERY_CHIP, ChipFilter, choose
from pipeline.epochs import SampleOrder, crop_windows
from pipeline.layout import ArraySpec, Layout
from pipeline.mixture import Part
from pipeline.objects import Objects
from pipeline.positions import Course, Span, plan_spans, rank_lanes, rank_spans
from pipeline.row_sets import RowSet
from pipeline.shard_cache import ShardCache
from pipeline.shard_reader import ChipShards, Cut, ShardReader
from pipeline.sources import Source, Sources, choose_all
from pipeline.store import Store
from pipeline.types import ChipArrays
from pipeline.versions import Version, latest_sealed

Batch = dict[str, NDArray[Any]]
"""b10 (B,4,h,w) uint16, b20 (B,6,h/2,w/2) uint16, b60 (B,2,h/6,w/6) uint16, radar (B,2,h,w) int16, row (B,) int64;
where they are crops, k (B,) int32, epoch (B,) int32 (a batch can span two) and position (B,) int64, the number of the
sample in the run. Where the store has all bands on 10 m, b20 and b60 are h x w too. Arrays that the store lacks are
left out."""

MODEL_ARRAYS = ("b10", "b20", "b60", "radar")

ROWS_FILE = "rows.npz"
"""A `RowSet`."""

MODEL_COLUMNS = {"row": np.int64, "k": np.int32, "epoch": np.int32, "position": np.int64}
"""What a crop is, beside its pixels."""

_BLOCK_BYTES = 128 * 2**20
"""Of a rank that is alone, about: what a block costs beside its bytes is as much as 40 MB do."""

_TASK_CHIPS = 256

_BUFFERS = BlockBuffers()
"""Of the process that reads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Feed:
    """What is fed to training."""

    url: str
    """Of the store."""

    version: int
    """Number of a version: its chips and those of the versions before it."""

    others: tuple[Source, ...] = ()
    """Stores beside this one, whose rows follow its own, see `pipeline.sources`."""

    parts: tuple[Part, ...] = ()
    """See `SampleOrder`; needed where there are others."""

    only: ChipFilter = EVERY_CHIP
    """Conditions that a chip must meet."""

    cache: ShardCache | None = None
    """Where each node keeps shards."""

    split: str = "train"

    rows_in: str | None = None
    """Directory where `keep_rows` has put the rows that are fed; unset: every process looks for them in chip tables."""

    crop_px: int = 120
    """Side of a crop in 10 m pixels; a multiple of 6, unless the store has all bands on 10 m."""

    seed: int = 0
    crops_per_chip: int = 1
    """See `SampleOrder`, as for what follows."""

    global_batch: int = 64
    lanes: int = 1
    window_chips: int = 1024

    ranks: int = 1
    """That share a global batch; the order does not depend on it."""

    def __post_init__(self) -> None:
        if self.global_batch % self.ranks:
            raise ValueError(f"global_batch={self.global_batch} is no multiple of ranks={self.ranks}")

    @property
    def sources(self) -> tuple[Source, ...]:
        """All stores, in the order of their rows."""
        return (Source(url=self.url, version=self.version), *self.others)

    def open(self) -> Sources:
        """The stores, to read from."""
        return Sources(self.sources, cache=self.cache)

    @property
    def batch_size(self) -> int:
        """The part of a global batch that is one rank's."""
        return self.global_batch // self.ranks

    @property
    def order(self) -> SampleOrder:
        """What decides the order of an epoch."""
        return SampleOrder(**{field.name: getattr(self, field.name) for field in fields(SampleOrder)})


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
        self.feed = feed
        self.seen = seen
        self.members = tuple(range(feed.ranks) if members is None else members)
        self._store = Sources(feed.sources)
        self._specs = _specs(self._store, MODEL_ARRAYS)
        # Refuses a crop that does not fit, here and not in a task.
        self._store.layout.check_window(0, 0, feed.crop_px)

    @cached_property
    def rows(self) -> NDArray[np.int64]:
        """Rows of the chips that are fed, ascending."""
        if self.feed.rows_in is not None:
            return _kept_rows(self.feed.rows_in)
        chosen = choose_all(self.feed.sources, self.feed.only, split=self.feed.split)
        return np.concatenate([self._store.rows_of(number, each.rows) for number, each in enumerate(chosen)])

    @cached_property
    def course(self) -> Course:
        """How long an epoch is."""
        samples = self.feed.order.epoch_chips(len(self.rows)) * self.feed.crops_per_chip
        return Course(epoch_samples=samples, global_batch=self.feed.global_batch)

    def plan(self, epoch: int, lanes: range | None = None) -> Iterator[Span]:
        """What is read for an epoch, in the order it is read, from where the run stands; of some lanes, or all."""
        order = self.feed.order
        return plan_spans(
            self.rows, shard_chips=self.shard_chips, order=order, epoch=epoch, seen=self.seen, lanes=lanes
        )

    @property
    def shard_chips(self) -> int:
        """Rows per shard."""
        return self._store.layout.shard_chips

    def sample_bytes(self) -> int:
        """Bytes of one sample."""
        return _bytes(self._specs, self.feed.crop_px)

    @property
    def block_batches(self) -> int | None:
        """Batches of a block; None: all of a task's are one, for it is by blocks that tasks are dealt out in turn."""
        if len(self.members) > 1:
            return None
        return max(1, _BLOCK_BYTES // (self.feed.batch_size * self.sample_bytes()))

    def estimate_inmemory_data_size(self) -> int:
        """Bytes of all samples of an epoch."""
        return self.course.epoch_samples * self.sample_bytes()

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        """A task for each rank's part of a span; how many there are is the epoch's business, not `parallelism`'s."""
        epoch, feed = self._epoch(data_context), self.feed
        first, last = (rank_lanes(feed.order, rank=self.members[n], ranks=feed.ranks) for n in (0, -1))
        sample_bytes = self.sample_bytes()
        return [
            self._task(parts[rank], rank, sample_bytes, per_task_row_limit)
            for span in self.plan(epoch, range(first.start, last.stop))
            for parts in rank_spans(span, feed.order, ranks=feed.ranks)
            for rank in self.members
        ]

    def num_tasks(self) -> int:
        """Read tasks of the first execution."""
        spans = self.plan(self._epoch(None), range(0))
        return sum(
            len(self.members) for span in spans for _ in rank_spans(span, self.feed.order, ranks=self.feed.ranks)
        )

    def _epoch(self, data_context: Any) -> int:
        return self.course.epoch_of(self.seen) + _executions_before(data_context)

    def _task(self, span: Span, rank: int, sample_bytes: int, limit: int | None) -> ReadTask:
        feed, together = self.feed, self.block_batches

        def read() -> Iterator[Block]:
            return _blocks(span, feed=feed, rank=rank, together=together)

        num_samples = span.num_batches * feed.batch_size
        return ReadTask(read, _metadata(num_samples, sample_bytes), per_task_row_limit=limit)

    def __getstate__(self) -> dict[str, Any]:
        # Every process that plans reads the rows itself: they can be many, and the dataset travels often.
        return {key: value for key, value in self.__dict__.items() if key != "rows"}


def keep_rows(feed: Feed, url: str) -> Feed:
    """The same, with the rows that are fed in a directory where all processes of a run find them, if not there yet."""
    objects = Objects.at(url)
    if not objects.exists(ROWS_FILE):
        source = ChipSource(feed)
        objects.put(ROWS_FILE, RowSet.of(source.rows, shard_chips=source.shard_chips).to_bytes())
    return replace(feed, rows_in=url)


@lru_cache(1)
def _kept_rows(url: str) -> NDArray[np.int64]:
    rows = RowSet.from_bytes(Objects.at(url).get(ROWS_FILE)).rows()
    # Of all who ask.
    rows.flags.writeable = False
    return rows


class WholeChipSource(Datasource):
    """Whole chips in the order of their rows, for evaluation and embedding."""

    def __init__(self, store: str, rows: NDArray[np.int64], *, arrays: Sequence[str], batch_size: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.store, self.rows, self.arrays, self.batch_size = store, rows, tuple(arrays), batch_size
        opened = Store.open(store)
        self.chip_bytes = _bytes(_specs(opened, self.arrays), opened.layout.side_px)
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

        return ReadTask(read, _metadata(len(rows), self.chip_bytes), per_task_row_limit=limit)


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
    block_bytes = together and together * feed.batch_size * source.sample_bytes()
    return _dataset(source, num_tasks=source.num_tasks(), block_bytes=block_bytes)


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
    return _dataset(source, num_tasks=num_tasks, block_bytes=batch_size * source.chip_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """Samples and where they go, (sample,) each."""

    row: NDArray[np.int64]
    k: NDArray[np.int64]
    epoch: NDArray[np.int64]
    position: NDArray[np.int64]
    """In the run."""

    batch: NDArray[np.int64]
    """Number of the global batch in the run."""

    place: NDArray[np.int64]
    """In the rank's part of it."""

    corner: NDArray[np.int64]
    """(sample, 2): y and x of the crop in 10 m pixels."""


def rank_samples(span: Span, *, feed: Feed, layout: Layout, rank: int) -> Placed:
    """A rank's samples of a span, lane after lane."""
    side_px, step_px = layout.side_px, layout.window_step_px
    columns = []
    for piece in span.pieces:
        positions = piece.positions(feed.order)
        batch, place = np.divmod(positions, feed.global_batch)
        own = place // feed.batch_size == rank
        samples, epoch = piece.samples(feed.order)[own], piece.window.epoch
        corner = crop_windows(
            samples, seed=feed.seed, epoch=epoch, side_px=side_px, crop_px=feed.crop_px, step_px=step_px
        )
        columns.append((*samples.T, np.full(len(samples), epoch), positions[own], batch[own], place[own], corner))
    row, k, epochs, position, batch, place, corner = (np.concatenate(each) for each in zip(*columns, strict=True))
    return Placed(
        row=row, k=k, epoch=epochs, position=position, batch=batch, place=place % feed.batch_size, corner=corner
    )


def cut_batches(
    store: ChipShards,
    span: Span,
    *,
    feed: Feed,
    rank: int = 0,
    together: int | None = 1,
    allocate: Allocate = np.empty,
) -> Iterator[Batch]:
    """A rank's batches of a span, so many together, or all: each chip is decoded once, its crops go where they belong.

    All of them are in memory until they are handed over.
    """
    specs, size = _specs(store, MODEL_ARRAYS), feed.batch_size
    samples = rank_samples(span, feed=feed, layout=store.layout, rank=rank)
    at = (samples.batch - span.first) * size + samples.place
    step = (together or span.num_batches) * size
    total = span.num_batches * size
    sizes = [min(step, total - first) for first in range(0, total, step)]
    blocks = [_empty(specs, each, feed.crop_px, MODEL_COLUMNS, allocate) for each in sizes]
    for name in MODEL_COLUMNS:
        values = np.empty(total, np.int64)
        values[at] = getattr(samples, name)
        for number, block in enumerate(blocks):
            block[name][:] = values[number * step : number * step + len(block[name])]
    cuts: dict[int, list[Cut]] = {}
    for row, place, (y_px, x_px) in zip(samples.row.tolist(), at.tolist(), samples.corner.tolist(), strict=True):
        cuts.setdefault(row, []).append((blocks[place // step], place % step, y_px, x_px))
    scratch: ChipArrays | None = None
    for reader, row in _chips(store, np.array(sorted(cuts), dtype=np.int64), tuple(specs)):
        scratch = scratch or reader.scratch()
        reader.cut(row, cuts[row], feed.crop_px, scratch)
    cuts.clear()
    # Handed over one by one, so that each can be freed before the next is needed.
    blocks.reverse()
    while blocks:
        yield blocks.pop()


def _blocks(span: Span, *, feed: Feed, rank: int, together: int | None) -> Iterator[Block]:
    """What a read task does; apart from the task, which travels by value, so that the buffers stay where they are."""
    for batches in cut_batches(feed.open(), span, feed=feed, rank=rank, together=together, allocate=_BUFFERS.empty):
        yield BlockAccessor.batch_to_block(batches)


def whole_batches(
    store: ChipShards, rows: NDArray[np.int64], *, arrays: Sequence[str], batch_size: int
) -> Iterator[Batch]:
    """Whole chips in the order of rows, in batches."""
    specs = _specs(store, arrays)
    chips = _chips(store, rows, tuple(specs))
    scratch: ChipArrays | None = None
    for start in range(0, len(rows), batch_size):
        of_batch = rows[start : start + batch_size]
        batch = _empty(specs, len(of_batch), store.layout.side_px, {"row": np.int64})
        batch["row"][:] = of_batch
        for index in range(len(of_batch)):
            reader, row = next(chips)
            scratch = scratch or reader.scratch()
            reader.cut(row, [(batch, index, 0, 0)], store.layout.side_px, scratch)
        yield batch


def _chips(store: ChipShards, rows: NDArray[np.int64], arrays: Sequence[str]) -> Iterator[tuple[ShardReader, int]]:
    """Every row with the reader of its shard, ascending."""
    for of_shard in np.split(rows, np.flatnonzero(np.diff(rows // store.layout.shard_chips)) + 1):
        reader = ShardReader(store, int(of_shard[0]) // store.layout.shard_chips, arrays, of_shard.tolist())
        for row in of_shard.tolist():
            yield reader, row


def _empty(
    specs: Mapping[str, ArraySpec],
    size: int,
    size_px: int,
    columns: Mapping[str, type],
    allocate: Allocate = np.empty,
) -> Batch:
    """A batch to be filled."""
    sides = {name: size_px // spec.step_px for name, spec in specs.items()}
    batch: Batch = {
        name: allocate((size, *spec.shape[:-2], sides[name], sides[name]), spec.dtype) for name, spec in specs.items()
    }
    return batch | {name: np.empty(size, dtype) for name, dtype in columns.items()}


def _dataset(source: Datasource, *, num_tasks: int, block_bytes: int | None) -> ray.data.Dataset:
    """A dataset whose blocks are of so many bytes; None: one of each task, whatever its size."""
    dataset: ray.data.Dataset = ray.data.read_datasource(source, override_num_blocks=num_tasks)
    # Ray collects blocks until they are larger than this, and cuts those that are larger by half.
    dataset.context.target_max_block_size = max(1, int(block_bytes * 0.9)) if block_bytes else None
    return dataset


def _executions_before(data_context: Any) -> int:
    """How often the dataset was executed to its end; the one place that knows Ray Data's private name for it."""
    return 0 if data_context is None else int(data_context._execution_idx)


def _specs(store: ChipShards, arrays: Sequence[str]) -> dict[str, ArraySpec]:
    return {name: spec for name, spec in store.layout.arrays().items() if name in arrays}


def _bytes(specs: dict[str, ArraySpec], size_px: int) -> int:
    """Bytes of one sample of this side, with what it is."""
    pixels = {name: (size_px // spec.step_px) ** 2 * int(np.prod(spec.shape[:-2])) for name, spec in specs.items()}
    return sum(pixels[name] * spec.dtype.itemsize for name, spec in specs.items()) + 24


def _metadata(num_samples: int, sample_bytes: int) -> BlockMetadata:
    return BlockMetadata(num_rows=num_samples, size_bytes=num_samples * sample_bytes, input_files=None, exec_stats=None)
