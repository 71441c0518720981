"""From the store to batches on Ray Data: read tasks decode and crop, blocks are batches.

Native-resolution integers travel; scaling, upsampling and flips are the model side's. Which samples there are and
where they go is worked out in `pipeline.epochs`; here they are only fetched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import ray.data
from numpy.typing import NDArray
from ray.data import Datasource, ReadTask
from ray.data.block import Block, BlockAccessor, BlockMetadata

from pipeline.epochs import EpochPlan, SampleOrder, Window, crop_windows, plan_epoch, sample_order
from pipeline.layout import ArraySpec
from pipeline.store import ShardReader, Store, StoreError
from pipeline.types import ChipArrays
from pipeline.versions import Version, latest_sealed

Batch = dict[str, NDArray[Any]]
"""b10 (B,4,h,w) uint16, b20 (B,6,h/2,w/2) uint16, b60 (B,2,h/6,w/6) uint16, radar (B,2,h,w) int16, row (B,) int64,
k (B,) int32; whole chips have no k. Where the store has all bands on 10 m, b20 and b60 are h x w too. Arrays that the
store lacks are left out."""

MODEL_ARRAYS = ("b10", "b20", "b60", "radar")

_TASK_SAMPLES = 2048
"""Below about 500 samples a task's start costs more than its work."""

_TASK_CHIPS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Feed:
    """What is fed to training."""

    url: str
    """Of the store."""

    version: int
    """Number of a version: its chips and those of the versions before it."""

    split: str = "train"
    crop_px: int = 120
    """Side of a crop in 10 m pixels; a multiple of 6, unless the store has all bands on 10 m."""

    seed: int = 0
    crops_per_chip: int = 1
    """See `SampleOrder`, as for what follows."""

    batch_size: int = 64
    window_chips: int = 1024
    multiple_of: int = 1

    @property
    def order(self) -> SampleOrder:
        """What decides the order of an epoch."""
        return SampleOrder(**{field.name: getattr(self, field.name) for field in fields(SampleOrder)})


class ChipSource(Datasource):
    """Samples for training: every execution of a dataset made from it is the next epoch."""

    def __init__(self, feed: Feed, *, start_epoch: int = 0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.feed = feed
        self.start_epoch = start_epoch
        self._store = Store.open(feed.url)
        self._specs = _specs(self._store, MODEL_ARRAYS)
        # Refuses a crop that does not fit, here and not in a task.
        self._store.layout.check_window(0, 0, feed.crop_px)

    @cached_property
    def rows(self) -> NDArray[np.int64]:
        """Rows of the split that hold chips, ascending."""
        return _rows(self.feed.url, self.feed.version, self.feed.split)

    def plan(self, epoch: int) -> EpochPlan:
        """The windows of an epoch, and how many samples it leaves over."""
        shard_chips = self._store.layout.shard_chips
        return plan_epoch(self.rows, shard_chips=shard_chips, order=self.feed.order, epoch=epoch)

    def sample_bytes(self) -> int:
        """Bytes of one sample."""
        return _bytes(self._specs, self.feed.crop_px)

    def estimate_inmemory_data_size(self) -> int:
        """Bytes of all samples of an epoch."""
        return len(self.rows) * self.feed.order.crops_per_chip * self.sample_bytes()

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        """Tasks of several windows each; how many there are is the epoch's business, not `parallelism`'s."""
        epoch = self.start_epoch + _executions_before(data_context)
        crops_per_chip = self.feed.order.crops_per_chip
        tasks = []
        for windows in _groups(self.plan(epoch).windows, crops_per_chip):
            num_samples = sum(window.num_samples(crops_per_chip) for window in windows)
            tasks.append(self._task(windows, epoch, num_samples, per_task_row_limit))
        return tasks

    def _task(self, windows: list[Window], epoch: int, num_samples: int, limit: int | None) -> ReadTask:
        def read(feed: Feed = self.feed, windows: list[Window] = windows, epoch: int = epoch) -> Iterator[Block]:
            store = Store.open(feed.url)
            for window in windows:
                for batch in cut_batches(store, window, feed=feed, epoch=epoch):
                    yield BlockAccessor.batch_to_block(batch)

        return ReadTask(read, _metadata(num_samples, self.sample_bytes()), per_task_row_limit=limit)

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


def training_samples(feed: Feed, *, start_epoch: int = 0) -> ray.data.Dataset:
    """A dataset of crops whose blocks are batches; iterating it again gives the next epoch.

    The order in which blocks arrive is the plan's only where the execution options ask for `preserve_order`.
    """
    source = ChipSource(feed, start_epoch=start_epoch)
    return _dataset(source, block_bytes=feed.order.batch_size * source.sample_bytes())


def num_samples(feed: Feed) -> int:
    """Samples there are for an epoch, before any are left over."""
    return len(_rows(feed.url, feed.version, feed.split)) * feed.crops_per_chip


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
    source = WholeChipSource(store, _rows(store, number, split), arrays=arrays, batch_size=batch_size)
    return _dataset(source, block_bytes=batch_size * source.chip_bytes)


def cut_batches(store: Store, window: Window, *, feed: Feed, epoch: int) -> Iterator[Batch]:
    """The batches of one window: every chip is decoded once, its crops go where the order has them."""
    layout, size_px = store.layout, feed.crop_px
    specs = _specs(store, MODEL_ARRAYS)
    samples = sample_order(window, order=feed.order, epoch=epoch)
    corners = crop_windows(
        samples,
        seed=feed.order.seed,
        epoch=epoch,
        side_px=layout.side_px,
        crop_px=size_px,
        step_px=layout.window_step_px,
    ).tolist()
    batch_size = feed.order.batch_size
    batches = [
        _empty(specs, samples[start : start + batch_size], size_px) for start in range(0, len(samples), batch_size)
    ]
    places: dict[int, list[int]] = {row: [] for row in window.rows.tolist()}
    for place, row in enumerate(samples[:, 0].tolist()):
        places[row].append(place)
    for row, chip in _decoded(store, window.rows, tuple(specs)):
        for place in places[row]:
            batch, index = batches[place // batch_size], place % batch_size
            y_px, x_px = corners[place]
            for name, spec in specs.items():
                batch[name][index] = spec.window(chip[name], y_px, x_px, size_px)
    batches.reverse()
    while batches:
        # Handed over one by one, so that each can be freed before the next is needed.
        yield batches.pop()


def whole_batches(store: Store, rows: NDArray[np.int64], *, arrays: Sequence[str], batch_size: int) -> Iterator[Batch]:
    """Whole chips in the order of rows, in batches."""
    specs = _specs(store, arrays)
    chips = _decoded(store, rows, tuple(specs))
    for start in range(0, len(rows), batch_size):
        of_batch = rows[start : start + batch_size]
        batch = _empty(specs, of_batch[:, np.newaxis], store.layout.side_px)
        for index in range(len(of_batch)):
            for name, pixels in next(chips)[1].items():
                batch[name][index] = pixels
        yield batch


def _decoded(store: Store, rows: NDArray[np.int64], arrays: Sequence[str]) -> Iterator[tuple[int, ChipArrays]]:
    """Every row with its pixels, ascending; the arrays are used again for the next row."""
    scratch: ChipArrays | None = None
    for of_shard in np.split(rows, np.flatnonzero(np.diff(rows // store.layout.shard_chips)) + 1):
        reader = ShardReader(store, int(of_shard[0]) // store.layout.shard_chips, arrays, of_shard.tolist())
        scratch = scratch or reader.scratch()
        for row in of_shard.tolist():
            reader.read(row, scratch)
            yield row, scratch


def _empty(specs: dict[str, ArraySpec], samples: NDArray[np.int64], size_px: int) -> Batch:
    """A batch to be filled, with its samples: (sample, 2) of row and k, or (sample, 1) of row alone."""
    sides = {name: size_px // spec.step_px for name, spec in specs.items()}
    batch: Batch = {
        name: np.empty((len(samples), *spec.shape[:-2], sides[name], sides[name]), spec.dtype)
        for name, spec in specs.items()
    }
    batch["row"] = samples[:, 0].copy()
    if samples.shape[1] > 1:
        batch["k"] = samples[:, 1].astype(np.int32)
    return batch


def _groups(windows: Sequence[Window], crops_per_chip: int) -> Iterator[list[Window]]:
    """Consecutive windows that are worth a task."""
    group: list[Window] = []
    for window in windows:
        group.append(window)
        if sum(member.num_samples(crops_per_chip) for member in group) >= _TASK_SAMPLES:
            yield group
            group = []
    if group:
        yield group


def _dataset(source: Datasource, *, block_bytes: int) -> ray.data.Dataset:
    num_tasks = len(source.get_read_tasks(1))
    dataset: ray.data.Dataset = ray.data.read_datasource(source, override_num_blocks=num_tasks)
    # Ray collects blocks until they are larger than this, and would make several batches one block.
    dataset.context.target_max_block_size = max(1, int(block_bytes * 0.9))
    return dataset


def _executions_before(data_context: Any) -> int:
    """How often the dataset was executed to its end; the one place that knows Ray Data's private name for it."""
    return 0 if data_context is None else int(data_context._execution_idx)


def _rows(store: str, version: int, split: str | None) -> NDArray[np.int64]:
    rows = Version(store, version).written_rows(split=split)
    if not rows.size:
        raise StoreError(f"{store} version {version} holds no chips" + (f" of split {split}" if split else ""))
    return rows


def _specs(store: Store, arrays: Sequence[str]) -> dict[str, ArraySpec]:
    return {name: spec for name, spec in store.layout.arrays().items() if name in arrays}


def _bytes(specs: dict[str, ArraySpec], size_px: int) -> int:
    """Bytes of one sample of this side, with its row and k."""
    pixels = {name: (size_px // spec.step_px) ** 2 * int(np.prod(spec.shape[:-2])) for name, spec in specs.items()}
    return sum(pixels[name] * spec.dtype.itemsize for name, spec in specs.items()) + 12


def _metadata(num_samples: int, sample_bytes: int) -> BlockMetadata:
    return BlockMetadata(num_rows=num_samples, size_bytes=num_samples * sample_bytes, input_files=None, exec_stats=None)
