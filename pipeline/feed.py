"""From the store to batches on Ray Data: read tasks decode and crop, blocks are batches.

Native-resolution integers travel; scaling, upsampling and flips are the model side's. Which samples there are is
worked out in `pipeline.epochs`, where they go in `pipeline.positions`; here they are only fetched.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import ray.data
from numpy.typing import NDArray
from ray.data import Datasource, ReadTask
from ray.data.block import Block, BlockAccessor, BlockMetadata

from pipeline.chip_filter import EVERY_CHIP, ChipFilter, choose
from pipeline.epochs import SampleOrder, crop_windows
from pipeline.layout import ArraySpec, Layout
from pipeline.mixture import Part
from pipeline.positions import Course, Piece, plan_pieces, share_out
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

MODEL_COLUMNS = {"row": np.int64, "k": np.int32, "epoch": np.int32, "position": np.int64}
"""What a crop is, beside its pixels."""

TASK_SAMPLES = 2048
"""Below about 500 samples a task's start costs more than its work."""

_TASK_CHIPS = 256


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
    crop_px: int = 120
    """Side of a crop in 10 m pixels; a multiple of 6, unless the store has all bands on 10 m."""

    seed: int = 0
    crops_per_chip: int = 1
    """See `SampleOrder`, as for what follows."""

    global_batch: int = 64
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
        """Samples per block, the part of a global batch that is one rank's."""
        return self.global_batch // self.ranks

    @property
    def order(self) -> SampleOrder:
        """What decides the order of an epoch."""
        return SampleOrder(**{field.name: getattr(self, field.name) for field in fields(SampleOrder)})


class ChipSource(Datasource):
    """Samples for training: each execution of a dataset made from it is an epoch.

    The first one goes on where the run stands.
    """

    def __init__(self, feed: Feed, *, seen: int = 0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.feed = feed
        self.seen = seen
        self._store = Sources(feed.sources)
        self._specs = _specs(self._store, MODEL_ARRAYS)
        # Refuses a crop that does not fit, here and not in a task.
        self._store.layout.check_window(0, 0, feed.crop_px)

    @cached_property
    def rows(self) -> NDArray[np.int64]:
        """Rows of the chips that are fed, ascending."""
        chosen = choose_all(self.feed.sources, self.feed.only, split=self.feed.split)
        return np.concatenate([self._store.rows_of(number, each.rows) for number, each in enumerate(chosen)])

    @cached_property
    def course(self) -> Course:
        """How long an epoch is."""
        samples = self.feed.order.epoch_chips(len(self.rows)) * self.feed.crops_per_chip
        return Course(epoch_samples=samples, global_batch=self.feed.global_batch)

    def plan(self, epoch: int) -> list[Piece]:
        """What is read for an epoch, in the order it is read, from where the run stands."""
        shard_chips = self._store.layout.shard_chips
        return plan_pieces(self.rows, shard_chips=shard_chips, order=self.feed.order, epoch=epoch, seen=self.seen)

    def sample_bytes(self) -> int:
        """Bytes of one sample."""
        return _bytes(self._specs, self.feed.crop_px)

    def estimate_inmemory_data_size(self) -> int:
        """Bytes of all samples of an epoch."""
        return self.course.epoch_samples * self.sample_bytes()

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        """Tasks of several windows each; how many there are is the epoch's business, not `parallelism`'s."""
        epoch = self.course.epoch_of(self.seen) + _executions_before(data_context)
        groups = share_out(self.plan(epoch), at_least=TASK_SAMPLES, multiple_of=self.feed.batch_size)
        sample_bytes = self.sample_bytes()
        return [self._task(pieces, sample_bytes, per_task_row_limit) for pieces in groups]

    def _task(self, pieces: list[Piece], sample_bytes: int, limit: int | None) -> ReadTask:
        def read(feed: Feed = self.feed, pieces: list[Piece] = pieces) -> Iterator[Block]:
            for batch in cut_batches(feed.open(), pieces, feed=feed):
                yield BlockAccessor.batch_to_block(batch)

        num_samples = sum(piece.num_samples for piece in pieces)
        return ReadTask(read, _metadata(num_samples, sample_bytes), per_task_row_limit=limit)

    def __getstate__(self) -> dict[str, Any]:
        # Every process that plans reads the rows itself: they can be many, and the dataset travels often.
        return {key: value for key, value in self.__dict__.items() if key != "rows"}


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


def training_samples(feed: Feed, *, seen: int = 0) -> ray.data.Dataset:
    """A dataset of crops whose blocks are batches; iterating it again gives the next epoch.

    The order in which blocks arrive is the plan's only where the execution options ask for `preserve_order`.

    Args:
        feed: What is fed.
        seen: Samples of the run that were seen; the first iteration gives what is left of that epoch.
    """
    source = ChipSource(feed, seen=seen)
    return _dataset(source, block_bytes=feed.batch_size * source.sample_bytes())


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
    return _dataset(source, block_bytes=batch_size * source.chip_bytes)


def cut_batches(store: ChipShards, pieces: Sequence[Piece], *, feed: Feed) -> Iterator[Batch]:
    """The batches that consecutive pieces fill: each chip is decoded once, its crops go where the order has them.

    A piece's crops are in memory together, and beside them those of a batch that the piece before has begun.
    """
    specs = _specs(store, MODEL_ARRAYS)
    size, left = feed.batch_size, sum(piece.num_samples for piece in pieces)
    batches: list[Batch] = []
    filled = 0
    for piece in pieces:
        samples = piece.samples(feed.order)
        while len(batches) * size < filled + len(samples):
            batches.append(_empty(specs, min(size, left), feed.crop_px, MODEL_COLUMNS))
            left -= len(batches[-1]["row"])
        _cut_piece(store, piece, samples, batches, filled, feed=feed)
        whole, filled = divmod(filled + len(samples), size)
        # Handed over one by one, so that each can be freed before the next is needed.
        batches.reverse()
        for _ in range(whole):
            yield batches.pop()
    # A last one that nothing has filled up.
    yield from batches


def _cut_piece(
    store: ChipShards, piece: Piece, samples: NDArray[np.int64], batches: Sequence[Batch], first: int, *, feed: Feed
) -> None:
    """Put the samples of a piece into batches, from place `first` on, counted over all batches."""
    layout, specs = store.layout, _specs(store, MODEL_ARRAYS)
    size, epoch = feed.batch_size, piece.window.epoch
    columns = {
        "row": samples[:, 0],
        "k": samples[:, 1],
        "epoch": np.full(len(samples), epoch),
        "position": np.arange(piece.position, piece.position + len(samples)),
    }
    for number, batch in enumerate(batches):
        start, stop = max(number * size, first), min((number + 1) * size, first + len(samples))
        for name, values in columns.items():
            batch[name][start - number * size : stop - number * size] = values[start - first : stop - first]
    corners = corners_of(samples, epoch, feed=feed, layout=layout).tolist()
    cuts: dict[int, list[Cut]] = {}
    for place, (row, (y_px, x_px)) in enumerate(zip(samples[:, 0].tolist(), corners, strict=True), first):
        cuts.setdefault(row, []).append((batches[place // size], place % size, y_px, x_px))
    scratch: ChipArrays | None = None
    for reader, row in _chips(store, np.array(sorted(cuts), dtype=np.int64), tuple(specs)):
        scratch = scratch or reader.scratch()
        reader.cut(row, cuts[row], feed.crop_px, scratch)


def corners_of(samples: NDArray[np.int64], epoch: int, *, feed: Feed, layout: Layout) -> NDArray[np.int64]:
    """(sample, 2): y and x of the crop of every sample (row and k) in 10 m pixels."""
    side_px, step_px = layout.side_px, layout.window_step_px
    return crop_windows(samples, seed=feed.seed, epoch=epoch, side_px=side_px, crop_px=feed.crop_px, step_px=step_px)


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


def _empty(specs: Mapping[str, ArraySpec], size: int, size_px: int, columns: Mapping[str, type]) -> Batch:
    """A batch to be filled."""
    sides = {name: size_px // spec.step_px for name, spec in specs.items()}
    batch: Batch = {
        name: np.empty((size, *spec.shape[:-2], sides[name], sides[name]), spec.dtype) for name, spec in specs.items()
    }
    return batch | {name: np.empty(size, dtype) for name, dtype in columns.items()}


def _dataset(source: Datasource, *, block_bytes: int) -> ray.data.Dataset:
    num_tasks = len(source.get_read_tasks(1))
    dataset: ray.data.Dataset = ray.data.read_datasource(source, override_num_blocks=num_tasks)
    # Ray collects blocks until they are larger than this, and would make several batches one block.
    dataset.context.target_max_block_size = max(1, int(block_bytes * 0.9))
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
