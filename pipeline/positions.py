"""Where a run stands: its samples in one row, epoch after epoch, cut into global batches; pure arithmetic.

Sample q of a run is in global batch q div G, whatever the number of ranks, and batch by batch a run goes through epoch
after epoch, T samples each. The remainder of an epoch below a global batch is carried into the next epoch, and only at
the very end can samples be left over. As the order of every epoch follows from the seed, *the number of samples seen is
the whole position of a run*: what is still to come follows from it, on however many ranks.

The samples of the B batches that are counted to an epoch, the carried ones first, are cut into lanes of equal length,
one after the other; batch b is made of the b-th part of every lane. Lanes are cut into windows at the same batches, and
so a *span*, the windows of all lanes between two of these batches, is what ranks can read apart from each other: rank r
takes the r-th part of every batch, which where there are as many lanes as ranks is a lane of its own.

The other way, to keep the ids that each rank has seen and to plan what is missing, needs no fixed order, but a file
of ids per rank in every checkpoint, and resumes with other batches than the undisturbed run would have had. The price
of ours is that ranks must be handed exactly the blocks that are theirs: Ray Data keeps the order of blocks when asked
to (`preserve_order`) and then deals them out in turn, since all are equally long. Every sample carries its position,
and the training loop checks it: a run that would stray stops instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from pipeline.epochs import EpochChips, SampleOrder, Window, sample_order


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """A run's length and step, in samples."""

    epoch_samples: int
    """T: chips that an epoch takes times crops per chip."""

    global_batch: int
    """G."""

    def __post_init__(self) -> None:
        if not 0 < self.global_batch <= self.epoch_samples:
            raise ValueError(f"an epoch of {self.epoch_samples} samples has no batch of {self.global_batch}")

    def seen_after(self, epochs: int) -> int:
        """Samples seen when so many epochs have passed: whole global batches."""
        return epochs * self.epoch_samples // self.global_batch * self.global_batch

    def left_over(self, epochs: int) -> int:
        """Samples, fewer than a global batch, that a run of so many epochs ends without."""
        return epochs * self.epoch_samples - self.seen_after(epochs)

    def epoch_of(self, seen: int) -> int:
        """The epoch in which the next global batch ends, which is the one that it is counted to."""
        assert seen % self.global_batch == 0, (seen, self.global_batch)
        return (seen + self.global_batch - 1) // self.epoch_samples


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Consecutive samples of a window."""

    window: Window

    start: int
    """First sample, counted in the window's order."""

    stop: int
    """One past the last."""

    lane: int

    offset: int
    """Of the first sample in its lane, counted from the start of the run."""

    @property
    def num_samples(self) -> int:
        """How many they are."""
        return self.stop - self.start

    def samples(self, order: SampleOrder) -> NDArray[np.int64]:
        """(sample, 2): row and k."""
        return sample_order(self.window, order=order)[self.start : self.stop]

    def positions(self, order: SampleOrder) -> NDArray[np.int64]:
        """(sample,) where each is in the run."""
        batches, places = np.divmod(self.offset + np.arange(self.num_samples), order.lane_share)
        return batches * order.global_batch + self.lane * order.lane_share + places

    def between(self, first: int, stop: int, order: SampleOrder) -> Piece | None:
        """What it has for the global batches from `first` to before `stop`, counted in the run."""
        start = max(self.start, self.start + first * order.lane_share - self.offset)
        end = min(self.stop, self.start + stop * order.lane_share - self.offset)
        if start >= end:
            return None
        return replace(self, start=start, stop=end, offset=self.offset + start - self.start)


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Consecutive global batches, whose samples are whole windows of every lane, or what is left of them."""

    first: int
    """Number of the first batch in the run."""

    stop: int
    """One past the last."""

    pieces: tuple[Piece, ...]
    """Lane after lane, of those that are wanted."""

    @property
    def num_batches(self) -> int:
        """How many they are."""
        return self.stop - self.first

    def between(self, first: int, stop: int, order: SampleOrder) -> Span:
        """Some of its batches."""
        first, stop = max(first, self.first), min(stop, self.stop)
        pieces = (piece.between(first, stop, order) for piece in self.pieces)
        return Span(first=first, stop=stop, pieces=tuple(piece for piece in pieces if piece))

    def of_lanes(self, lanes: range) -> Span:
        """The same batches, of some lanes."""
        return replace(self, pieces=tuple(piece for piece in self.pieces if piece.lane in lanes))


def even_parts(whole: range, number: int) -> list[range]:
    """A range in so many parts, one after the other, none of which is longer than another by more than one."""
    bounds = [whole.start + n * len(whole) // number for n in range(number + 1)]
    return [range(start, stop) for start, stop in pairwise(bounds)]


def rank_lanes(order: SampleOrder, *, rank: int, ranks: int) -> range:
    """The lanes from which a rank's part of every global batch is."""
    size = order.global_batch // ranks
    return range(rank * size // order.lane_share, -(-(rank + 1) * size // order.lane_share))


def plan_spans(
    rows: NDArray[np.int64],
    *,
    shard_chips: int,
    order: SampleOrder,
    epoch: int,
    seen: int = 0,
    lanes: range | None = None,
) -> Iterator[Span]:
    """What is to be read for the global batches that are counted to an epoch, without those seen already.

    Args:
        rows: (chip,) rows that hold chips, ascending.
        shard_chips: Rows per shard.
        order: What decides the order.
        epoch: Counted from 0.
        seen: Samples of the run that were seen.
        lanes: That are wanted; unset: all.

    Raises:
        ValueError: An epoch has fewer samples than a global batch.
    """
    course = Course(epoch_samples=order.epoch_chips(len(rows)) * order.crops_per_chip, global_batch=order.global_batch)
    begin, end = course.seen_after(epoch), course.seen_after(epoch + 1)
    carried = epoch * course.epoch_samples - begin
    # Where in the samples of these batches an epoch's own are, and which of the epoch's the first of them is.
    sources = [(0, carried, course.epoch_samples - carried, epoch - 1)] if carried else []
    sources.append((carried, end - begin, 0, epoch))
    chips = {of: EpochChips(rows, shard_chips=shard_chips, order=order, epoch=of) for *_, of in sources}
    first_batch, num_batches = begin // order.global_batch, (end - begin) // order.global_batch
    num_spans = max(1, num_batches // order.window_batches)
    share, to_come = order.lane_share, seen // order.global_batch
    for part in even_parts(range(num_batches), num_spans):
        first, stop = part.start, part.stop
        if first_batch + stop <= to_come:
            continue
        pieces = []
        for lane in range(order.lanes) if lanes is None else lanes:
            own = [(lane * num_batches + batch) * share for batch in (first, stop)]
            for lower, upper, base, of in sources:
                start, past = max(own[0], lower), min(own[1], upper)
                if start < past:
                    window = chips[of].window(base + start - lower, base + past - lower)
                    offset = (first_batch + first) * share + start - own[0]
                    pieces.append(Piece(window=window, start=0, stop=past - start, lane=lane, offset=offset))
        span = Span(first=first_batch + first, stop=first_batch + stop, pieces=tuple(pieces))
        yield span.between(to_come, span.stop, order)


def rank_spans(span: Span, order: SampleOrder, *, ranks: int) -> Iterator[tuple[Span, ...]]:
    """A span cut for ranks: each time some of its batches, in as many parts as there are ranks, in their order.

    So few batches that a rank with several lanes reads about as many samples as a window has: chips whose crops are in
    several of these are then decoded several times.
    """
    lanes = [rank_lanes(order, rank=rank, ranks=ranks) for rank in range(ranks)]
    cuts = min(span.num_batches, max(map(len, lanes)))
    for batches in even_parts(range(span.first, span.stop), cuts):
        part = span.between(batches.start, batches.stop, order)
        yield tuple(part.of_lanes(own) for own in lanes)
