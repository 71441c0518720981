"""Crops out of chips, into batches: each chip is decoded once for all that is cut from it.

Native-resolution integers; scaling, upsampling and flips are the model side's. Which samples there are is worked out in
`pipeline.epochs`, where they go in `pipeline.positions`; here they are only fetched.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.batch_buffers import Allocate
from pipeline.epochs import crop_windows
from pipeline.fed_chips import MODEL_COLUMNS, Feed
from pipeline.layout import MODEL_ARRAYS, ArraySpec, Layout
from pipeline.positions import Span
from pipeline.shard_reader import ChipShards, Cut, ShardReader
from pipeline.types import ChipArrays

Batch = dict[str, NDArray[Any]]
"""b10 (B,4,h,w) uint16, b20 (B,6,h/2,w/2) uint16, b60 (B,2,h/6,w/6) uint16, radar (B,2,h,w) int16, row (B,) int64;
where they are crops, k (B,) int32, epoch (B,) int32 (a batch can span two) and position (B,) int64, the number of the
sample in the run. Where the store has all bands on 10 m, b20 and b60 are h x w too. Arrays that the store lacks are
left out."""


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
    specs, size = store.layout.arrays_of(MODEL_ARRAYS), feed.batch_size
    samples = rank_samples(span, feed=feed, layout=store.layout, rank=rank)
    at = (samples.batch - span.first) * size + samples.place
    step = (together or span.num_batches) * size
    total = span.num_batches * size
    sizes = [min(step, total - first) for first in range(0, total, step)]
    blocks = [empty_batch(specs, each, feed.crop_px, MODEL_COLUMNS, allocate) for each in sizes]
    for name in MODEL_COLUMNS:
        values = np.empty(total, np.int64)
        values[at] = getattr(samples, name)
        for number, block in enumerate(blocks):
            block[name][:] = values[number * step : number * step + len(block[name])]
    cuts: dict[int, list[Cut]] = {}
    for row, place, (y_px, x_px) in zip(samples.row.tolist(), at.tolist(), samples.corner.tolist(), strict=True):
        cuts.setdefault(row, []).append((blocks[place // step], place % step, y_px, x_px))
    scratch: ChipArrays | None = None
    for reader, row in chips_in_order(store, np.array(sorted(cuts), dtype=np.int64), tuple(specs)):
        scratch = scratch or reader.scratch()
        reader.cut(row, cuts[row], feed.crop_px, scratch)
    cuts.clear()
    # Handed over one by one, so that each can be freed before the next is needed.
    blocks.reverse()
    while blocks:
        yield blocks.pop()


def chips_in_order(
    store: ChipShards, rows: NDArray[np.int64], arrays: Sequence[str]
) -> Iterator[tuple[ShardReader, int]]:
    """Every row with the reader of its shard, ascending."""
    for of_shard in np.split(rows, np.flatnonzero(np.diff(rows // store.layout.shard_chips)) + 1):
        reader = ShardReader(store, int(of_shard[0]) // store.layout.shard_chips, arrays, of_shard.tolist())
        for row in of_shard.tolist():
            yield reader, row


def empty_batch(
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
    return batch | {name: allocate((size,), np.dtype(dtype)) for name, dtype in columns.items()}
