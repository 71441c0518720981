"""From the store to the batches of one rank within its own process: threads decode, and crop into batches at once.

The same samples in the same order as `pipeline.feed` sends through Ray Data, without its copies between processes. A
rank reads the chips of its own samples alone, and goes on into the next epoch without a stop.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, groupby, pairwise

import numpy as np

from pipeline.batch_buffers import Allocate, BatchBuffers
from pipeline.crops import Batch, empty_batch, rank_samples
from pipeline.fed_chips import MODEL_COLUMNS, FedChips, Feed
from pipeline.layout import MODEL_ARRAYS, Layout
from pipeline.positions import Span, rank_lanes
from pipeline.shard_reader import ChipShards, ShardReader
from pipeline.store import Store
from pipeline.types import ChipArrays

_OBJECTS_IN_FLIGHT = 12
"""Of an object store: one line alone does not fill the network, and the small objects of a shard hardly count."""

_OPEN_SHARDS = 64
"""Of a local store; each has a file per array."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One of a chip's crops, and where it goes."""

    k: int
    y_px: int
    x_px: int
    batch: int
    """Number of the global batch in the run."""

    place: int
    """In the rank's part of it."""

    position: int
    """In the run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chip:
    """What is done with a chip that is decoded once."""

    row: int
    epoch: int
    opens: int
    """The first batch that has to have room before the chip is begun: its own, or the first of its span."""

    samples: tuple[Sample, ...]


def rank_batches(
    feed: Feed,
    *,
    rank: int,
    epochs: int,
    seen: int = 0,
    threads: int = 4,
    ahead: int = 4,
    allocate: Allocate = np.empty,
) -> Iterator[Batch]:
    """A rank's part of every global batch from where a run stands to its end; read ahead, in threads.

    The arrays of a batch are used again as soon as the next one is asked for. In memory are, of a local store and with
    one crop per chip, `ahead` batches and one; else the rank's part of about two spans, which are two windows where
    there are as many lanes as ranks, and of an object store four shards as they are stored, or what is wanted of them.

    Args:
        feed: What is fed.
        rank: Whose part.
        epochs: Of the run.
        seen: Samples of the run that were seen.
        threads: That decode and crop.
        ahead: Batches that are made while one is used, at the least.
        allocate: Makes the arrays of batches, (shape, dtype) -> array; for memory that devices read from.
    """
    source = FedChips(feed, seen=seen)
    store = feed.open()
    specs = store.layout.arrays_of(MODEL_ARRAYS)
    local = all(Store.open(each.url).is_local for each in feed.sources)
    # A crop of a batch that comes later is cut when its chip is decoded for the first: the whole span is open then.
    scattered = feed.crops_per_chip > 1 or not local
    lead = max(ahead, feed.order.window_batches) if scattered else ahead
    lanes = rank_lanes(feed.order, rank=rank, ranks=feed.ranks)
    spans = (
        chips_of(span, feed=feed, layout=store.layout, rank=rank, scattered=scattered)
        for epoch in range(source.course.epoch_of(seen), epochs)
        for span in source.plan(epoch, lanes)
    )
    first, end = (samples // feed.global_batch for samples in (seen, source.course.seen_after(epochs)))
    buffers = BatchBuffers(
        lambda: empty_batch(specs, feed.batch_size, feed.crop_px, MODEL_COLUMNS, allocate),
        size=feed.batch_size,
        first=first,
        lead=lead,
    )
    with ThreadPoolExecutor(-(-_OBJECTS_IN_FLIGHT // len(specs)), "fetch") as fetching:
        coming = _opened(store, specs, spans) if local else _fetched(store, specs, visits(spans, store), fetching)
        turn = threading.Lock()
        workers = [
            threading.Thread(target=_work, args=(coming, turn, buffers, feed.crop_px), name=f"feed-{n}", daemon=True)
            for n in range(threads)
        ]
        for worker in workers:
            worker.start()
        try:
            for _ in range(first, end):
                yield buffers.take()
        finally:
            buffers.close()
            fetching.shutdown(wait=False, cancel_futures=True)
            for worker in workers:
                worker.join()


def chips_of(span: Span, *, feed: Feed, layout: Layout, rank: int, scattered: bool) -> list[Chip]:
    """The chips of a rank's samples in a span, in the order of their first use."""
    samples = rank_samples(span, feed=feed, layout=layout, rank=rank)
    by_chip: dict[tuple[int, int], list[Sample]] = {}
    columns = np.column_stack(
        [samples.row, samples.epoch, samples.k, samples.corner, samples.batch, samples.place, samples.position]
    )
    for row, epoch, k, y_px, x_px, batch, place, position in columns[np.argsort(samples.position)].tolist():
        sample = Sample(k=k, y_px=y_px, x_px=x_px, batch=batch, place=place, position=position)
        by_chip.setdefault((row, epoch), []).append(sample)
    return [
        Chip(row=row, epoch=epoch, opens=span.first if scattered else each[0].batch, samples=tuple(each))
        for (row, epoch), each in by_chip.items()
    ]


def visits(spans: Iterable[list[Chip]], store: ChipShards) -> Iterator[tuple[int, list[Chip]]]:
    """Shards in the order in which they are fetched, each with its chips.

    A shard whose chips are in two spans that follow each other comes last in the one and first in the other, so that it
    is fetched once for both.
    """

    def by_shard(chips: list[Chip]) -> dict[int, list[Chip]]:
        shards: dict[int, list[Chip]] = {}
        for chip in chips:
            shards.setdefault(chip.row // store.layout.shard_chips, []).append(chip)
        return shards

    def in_order() -> Iterator[tuple[int, list[Chip]]]:
        last: int | None = None
        for shards, following in pairwise(chain(map(by_shard, spans), [{}])):
            order = sorted(shards, key=lambda shard: (shard != last, shard in following))
            for last in order:
                yield last, shards[last]

    for shard, of_shard in groupby(in_order(), key=lambda visit: visit[0]):
        yield shard, [chip for _, chips in of_shard for chip in chips]


def _opened(
    store: ChipShards, arrays: Iterable[str], spans: Iterable[list[Chip]]
) -> Iterator[tuple[ShardReader, Chip]]:
    """Of a local store: chips as they are needed, wherever they lie."""
    opened = lru_cache(_OPEN_SHARDS)(lambda shard: ShardReader(store, shard, arrays, []))
    for chips in spans:
        for chip in chips:
            yield opened(chip.row // store.layout.shard_chips), chip


def _fetched(
    store: ChipShards, arrays: Iterable[str], planned: Iterable[tuple[int, list[Chip]]], pool: ThreadPoolExecutor
) -> Iterator[tuple[ShardReader, Chip]]:
    """Of an object store: shard after shard, several of them being fetched while one is decoded."""
    coming: deque[tuple[Future[ShardReader], list[Chip]]] = deque()
    for visit in chain(planned, [None]):
        if visit is not None:
            shard, chips = visit
            rows = sorted({chip.row for chip in chips})
            coming.append((pool.submit(ShardReader, store, shard, tuple(arrays), rows), chips))
        while len(coming) > (-(-_OBJECTS_IN_FLIGHT // len(tuple(arrays))) if visit is not None else 0):
            reader, chips = coming.popleft()
            yield from ((reader.result(), chip) for chip in chips)


def _work(
    coming: Iterator[tuple[ShardReader, Chip]], turn: threading.Lock, buffers: BatchBuffers, crop_px: int
) -> None:
    """What every thread does: take the next chip when there is room for it, decode it, cut its crops."""
    scratch: ChipArrays | None = None
    try:
        while True:
            with turn:
                taken = next(coming, None)
                if taken is None or not buffers.wait_for_room(taken[1].opens):
                    return
            reader, chip = taken
            scratch = scratch or reader.scratch()
            cuts = [(buffers.at(each.batch), each.place, each.y_px, each.x_px) for each in chip.samples]
            reader.cut(chip.row, cuts, crop_px, scratch)
            for each, (batch, place, _, _) in zip(chip.samples, cuts, strict=True):
                what = {"row": chip.row, "k": each.k, "epoch": chip.epoch, "position": each.position}
                for name, value in what.items():
                    batch[name][place] = value
            for each in chip.samples:
                buffers.filled(each.batch)
    except BaseException as error:  # noqa: BLE001  # raised where the batches are taken
        buffers.fail(error)
