"""Where a run stands: its samples in one row, epoch after epoch, cut into global batches; pure arithmetic.

Sample q of a run is sample q mod T of epoch q div T, where T samples are an epoch; global batch g is samples g G to
(g + 1) G, whatever the number of ranks. So the remainder of an epoch below a global batch is carried into the next
epoch, and only at the very end can samples be left over. As the order of every epoch follows from the seed, *the
number of samples seen is the whole position of a run*: what is still to come follows from it, on however many ranks.

The other way, to keep the ids that each rank has seen and to plan what is missing, needs no fixed order, but a file
of ids per rank in every checkpoint, and resumes with other batches than the undisturbed run would have had. The price
of ours is that ranks must be handed exactly the blocks that are theirs: Ray Data keeps the order of blocks when asked
to (`preserve_order`) and then deals them out in turn, since all are equally long. Every sample carries its position,
and the training loop checks it: a run that would stray stops instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pipeline.epochs import SampleOrder, Window, plan_epoch, sample_order


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

    position: int
    """Of the first sample in the run."""

    @property
    def num_samples(self) -> int:
        """How many they are."""
        return self.stop - self.start

    def samples(self, order: SampleOrder) -> NDArray[np.int64]:
        """(sample, 2): row and k."""
        return sample_order(self.window, order=order)[self.start : self.stop]


def plan_pieces(
    rows: NDArray[np.int64], *, shard_chips: int, order: SampleOrder, epoch: int, seen: int = 0
) -> list[Piece]:
    """What is to be read for the global batches that are counted to an epoch, without those seen already.

    Args:
        rows: (chip,) rows that hold chips, ascending.
        shard_chips: Rows per shard.
        order: What decides the order.
        epoch: Counted from 0.
        seen: Samples of the run that were seen.

    Raises:
        ValueError: An epoch has fewer samples than a global batch.
    """
    epoch_samples = order.epoch_chips(len(rows)) * order.crops_per_chip
    course = Course(epoch_samples=epoch_samples, global_batch=order.global_batch)
    first, last = max(seen, course.seen_after(epoch)), course.seen_after(epoch + 1)
    carried = first < epoch * course.epoch_samples
    pieces = []
    for of_epoch in (epoch - 1, epoch) if carried else (epoch,):
        end_of_epoch = (of_epoch + 1) * course.epoch_samples
        windows = plan_epoch(
            rows,
            shard_chips=shard_chips,
            order=order,
            epoch=of_epoch,
            skip_samples=first - of_epoch * course.epoch_samples,
        )
        start = end_of_epoch - sum(window.num_samples(order.crops_per_chip) for window in windows)
        for window in windows:
            stop = start + window.num_samples(order.crops_per_chip)
            if (wanted := max(start, first)) < (end := min(stop, last)):
                pieces.append(Piece(window=window, start=wanted - start, stop=end - start, position=wanted))
            start = stop
    return pieces


def share_out(pieces: Sequence[Piece], *, at_least: int, multiple_of: int) -> Iterator[list[Piece]]:
    """Group consecutive pieces into parts of so many samples, each of them whole blocks, perhaps but for the last.

    A piece in which no block ends where it does is cut in two; chips with samples in both are decoded twice.

    Args:
        pieces: Of an epoch.
        at_least: Samples that are worth a task.
        multiple_of: Samples of a block.
    """
    group: list[Piece] = []
    held = 0
    for piece in pieces:
        group.append(piece)
        held += piece.num_samples
        too_many = held % multiple_of
        if held < at_least or too_many >= piece.num_samples:
            continue
        cut = piece.num_samples - too_many
        group[-1] = replace(piece, stop=piece.start + cut)
        yield group
        rest = replace(piece, start=piece.start + cut, position=piece.position + cut)
        group, held = ([rest] if too_many else []), too_many
    if group:
        yield group
