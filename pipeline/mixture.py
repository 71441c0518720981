"""Several sources of chips mixed by weight: what an epoch takes of each, and in which order; pure arithmetic.

A source's chips stand in an endless row, round after round of all of them in a shuffled order; each epoch takes the
next so many. So one that is to give fewer than it has gives all of them before any comes again, and one that is to
give more begins again within the epoch, with other crops. Where an epoch stands in that row follows from its number,
as does everything else here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One of several sources, whose rows follow those of the one before."""

    num_chips: int
    """That it has."""

    taken: int
    """That an epoch takes; more than it has: some come again, with other k."""

    def __post_init__(self) -> None:
        if self.num_chips <= 0 or self.taken <= 0:
            raise ValueError(f"a source gives {self.taken} of {self.num_chips} chips: both must be positive")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """Chips of one shard that an epoch takes together."""

    rows: NDArray[np.int64]
    """(chip,)"""

    turn: int
    """How often the round of this source's chips has begun anew in the epoch: crops of a turn have numbers k of their
    own."""


def parts_by_weight(num_chips: Sequence[int], weights: Sequence[float]) -> tuple[Part, ...]:
    """How many chips an epoch takes of each source: as many in all as there are, by weight, of each at least one."""
    total, chips = math.fsum(weights), sum(num_chips)
    wanted = [max(1.0, chips * weight / total) for weight in weights]
    taken = [math.floor(each) for each in wanted]
    # What rounding down has left over goes to those that lost most by it, what the least one has added is taken from
    # the largest.
    by_loss = sorted(range(len(wanted)), key=lambda n: (taken[n] - wanted[n], n))
    for n in by_loss[: max(0, chips - sum(taken))]:
        taken[n] += 1
    while sum(taken) > chips:
        taken[taken.index(max(taken))] -= 1
    return tuple(Part(num_chips=n, taken=t) for n, t in zip(num_chips, taken, strict=True))


def stretches(
    rows: NDArray[np.int64], parts: Sequence[Part], *, shard_chips: int, seed: int, epoch: int
) -> list[Stretch]:
    """What an epoch takes, in the order it is read: shards shuffled, each source spread evenly over the epoch.

    Args:
        rows: (chip,) rows of all sources, ascending.
        parts: The sources, in the order of their rows; no shard has chips of two.
        shard_chips: Rows per shard.
        seed: Of the order.
        epoch: Counted from 0.

    Raises:
        ValueError: There are other chips than the sources have.
    """
    ends = [0, *accumulate(part.num_chips for part in parts)]
    if ends[-1] != len(rows):
        raise ValueError(f"the sources are said to have {ends[-1]} chips, but there are {len(rows)}")
    rng = np.random.default_rng([seed, epoch, 0])
    placed: list[tuple[float, int, int, Stretch]] = []
    for number, (part, (start, stop)) in enumerate(zip(parts, pairwise(ends), strict=True)):
        before = 0
        for at, stretch in enumerate(_of_part(rows[start:stop], part, shard_chips, (seed, number), epoch)):
            place = (before + rng.random() * len(stretch.rows)) / part.taken
            placed.append((place, number, at, stretch))
            before += len(stretch.rows)
    return [stretch for *_, stretch in sorted(placed, key=lambda each: each[:3])]


def _of_part(
    rows: NDArray[np.int64], part: Part, shard_chips: int, key: tuple[int, int], epoch: int
) -> Iterator[Stretch]:
    """The next so many chips of one source, round after round."""
    shards = np.split(rows, np.flatnonzero(np.diff(rows // shard_chips)) + 1)
    first, last = epoch * part.taken, (epoch + 1) * part.taken
    begun = first // part.num_chips
    for turn in range((last - 1) // part.num_chips - begun + 1):
        # Rounds are counted through all epochs. The last number is none that `pipeline.epochs` draws with.
        stream = (key[0], begun + turn, key[1])
        start = (begun + turn) * part.num_chips
        for number in np.random.default_rng([*stream, 1]).permutation(len(shards)):
            shard = shards[number]
            wanted = max(first - start, 0), min(last - start, len(shard))
            if wanted[0] < wanted[1]:
                if wanted != (0, len(shard)):
                    shard = np.random.default_rng([*stream, 2 + number]).permutation(shard)
                yield Stretch(rows=shard[slice(*wanted)], turn=turn)
            start += len(shard)


def pooled(
    means: NDArray[np.float64], stds: NDArray[np.float64], shares: Sequence[float]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and deviation per band of a mixture.

    Args:
        means: (source, band).
        stds: (source, band).
        shares: Of each source in the samples; they need not sum to 1.
    """
    weights = np.asarray(shares, dtype=np.float64) / math.fsum(shares)
    mean: NDArray[np.float64] = weights @ means
    # Law of total variance.
    return mean, np.sqrt(weights @ (stds**2 + (means - mean) ** 2))
