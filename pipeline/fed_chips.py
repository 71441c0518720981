"""What is fed to training: which chips of which stores, and when each of their crops has its turn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pipeline.chip_filter import EVERY_CHIP, ChipFilter
from pipeline.epochs import SampleOrder
from pipeline.layout import MODEL_ARRAYS
from pipeline.mixture import Part
from pipeline.objects import Objects
from pipeline.positions import Course, Span, plan_spans
from pipeline.row_sets import RowSet
from pipeline.shard_cache import ShardCache
from pipeline.sources import Source, Sources, choose_all

MODEL_COLUMNS: Final = {"row": np.int64, "k": np.int32, "epoch": np.int32, "position": np.int64}
"""What a sample is, beside its pixels."""

ROWS_FILE: Final = "rows.npz"
"""A `RowSet`."""


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


class FedChips:
    """The chips of a feed, and what is read of them epoch by epoch.

    Args:
        feed: What is fed.
        seen: Samples of the run that were seen.

    Raises:
        ValueError: The crop is larger than the chips.
    """

    def __init__(self, feed: Feed, *, seen: int = 0) -> None:
        self.feed, self.seen = feed, seen
        self._store = Sources(feed.sources)
        self.layout = self._store.layout
        # Refuses a crop that does not fit, here and not in a task.
        self.layout.check_window(0, 0, feed.crop_px)

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
        order, shard_chips = self.feed.order, self.layout.shard_chips
        return plan_spans(self.rows, shard_chips=shard_chips, order=order, epoch=epoch, seen=self.seen, lanes=lanes)

    def sample_bytes(self) -> int:
        """Bytes of one sample."""
        columns = sum(np.dtype(each).itemsize for each in MODEL_COLUMNS.values())
        return self.layout.window_bytes(self.feed.crop_px, MODEL_ARRAYS) + columns

    def __getstate__(self) -> dict[str, Any]:
        # Every process that plans reads the rows itself: they can be many, and a dataset travels often.
        return {key: value for key, value in self.__dict__.items() if key != "rows"}


def keep_rows(feed: Feed, url: str) -> Feed:
    """The same, with the rows that are fed in a directory where all processes of a run find them, if not there yet."""
    objects = Objects.at(url)
    if not objects.exists(ROWS_FILE):
        chips = FedChips(feed)
        objects.put(ROWS_FILE, RowSet.of(chips.rows, shard_chips=chips.layout.shard_chips).to_bytes())
    return replace(feed, rows_in=url)


@lru_cache(1)
def _kept_rows(url: str) -> NDArray[np.int64]:
    rows = RowSet.from_bytes(Objects.at(url).get(ROWS_FILE)).rows()
    # Of all who ask.
    rows.flags.writeable = False
    return rows
