"""How fast a store gives what training needs, tried on a shard or two."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pipeline.crops import cut_batches
from pipeline.fed_chips import Feed
from pipeline.layout import MODEL_ARRAYS
from pipeline.objects import concurrently
from pipeline.positions import plan_spans
from pipeline.shard_reader import ChipShards
from pipeline.sources import Sources


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedRate:
    """What was measured."""

    shards: int
    """That were read."""

    num_bytes: int
    """Of their objects."""

    chip_bytes: int
    """Read for each chip that is trained on: whole objects, with the chips of other splits in them."""

    bytes_per_s: float
    """Whole objects, one shard after the other, its arrays at once."""

    samples_per_s: float
    """One process that reads, decodes and crops; the objects are read a second time for it."""


def measure_feed(feed: Feed, rows: NDArray[np.int64], *, shards: int = 2) -> FeedRate:
    """Read some shards of a store, evenly from first to last, as training would.

    Args:
        feed: What is fed.
        rows: Rows that hold chips, ascending.
        shards: How many to read at the most.
    """
    store = Sources(feed.sources)
    groups = np.split(rows, np.flatnonzero(np.diff(rows // store.layout.shard_chips)) + 1)
    chosen = [groups[at] for at in sorted({round(at) for at in np.linspace(0, len(groups) - 1, shards)})]
    start = time.perf_counter()
    sizes = [_fetch(store, int(group[0]) // store.layout.shard_chips) for group in chosen]
    fetched = time.perf_counter()
    samples = sum(_cut(store, group, feed) for group in chosen)
    cut = time.perf_counter()
    chips = sum(len(group) for group in chosen)
    return FeedRate(
        shards=len(chosen),
        num_bytes=sum(sizes),
        chip_bytes=round(sum(sizes) / chips),
        bytes_per_s=sum(sizes) / (fetched - start),
        samples_per_s=samples / (cut - fetched),
    )


def _fetch(chips: ChipShards, shard: int) -> int:
    names: Sequence[str] = [*chips.layout.arrays_of(MODEL_ARRAYS)]
    store, own = chips.holder(shard)
    return sum(concurrently(lambda name: len(store.objects.view(store.shard_key(name, own))), names))


def _cut(store: ChipShards, rows: NDArray[np.int64], feed: Feed) -> int:
    alone = replace(feed, global_batch=len(rows) * feed.crops_per_chip, lanes=1, ranks=1, parts=())
    spans = plan_spans(rows, shard_chips=store.layout.shard_chips, order=alone.order, epoch=0)
    return sum(len(batch["row"]) for span in spans for batch in cut_batches(store, span, feed=alone))
