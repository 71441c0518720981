"""Which samples an epoch has, in which order, and which window of its chip each one is; pure arithmetic.

A sample is (row, k), the k-th crop of a chip. Shards are shuffled, then cut into windows of so many chips that are
read and decoded together; within a window the samples are shuffled. Everything follows from the seed and the epoch,
and nothing from how many ranks there are, so any process can work out its part alone. Where in a run an epoch's
samples stand, and which of them make up a batch, is in `pipeline.positions`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.layout import WINDOW_STEP_PX
from pipeline.mixture import Part, Stretch, stretches

ORDER_VERSION = 1
"""Of the arithmetic here: another number, another order, and a run cannot go on within an epoch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleOrder:
    """What decides an epoch, beside the chips there are."""

    seed: int = 0

    crops_per_chip: int = 1
    """K: samples cut from a chip each time it is decoded. They go into different global batches where a window has as
    many chips as a global batch has samples, and as far apart as the window allows where it has fewer."""

    global_batch: int = 64
    """Samples per step of all ranks together."""

    window_chips: int = 1024
    """Chips shuffled together; all their crops are in memory at once (218 kB each at 120 px)."""

    parts: tuple[Part, ...] = ()
    """What an epoch takes of several sources, in the order of their rows; none: every chip once."""

    def __post_init__(self) -> None:
        for name in ("crops_per_chip", "global_batch", "window_chips"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")

    def epoch_chips(self, num_chips: int) -> int:
        """Chips that an epoch takes where there are so many, those that come again counted again."""
        return sum(part.taken for part in self.parts) or num_chips


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Chips that are read, decoded and shuffled together."""

    epoch: int
    """Counted from 0."""

    number: int
    """Of the window in its epoch."""

    rows: NDArray[np.int64]
    """(chip,) ascending."""

    turns: NDArray[np.int64] | None = None
    """(chip,) how often a chip came before in the epoch, see `pipeline.mixture`; None: all for the first time."""

    def num_samples(self, crops_per_chip: int) -> int:
        """Samples of this window."""
        return len(self.rows) * crops_per_chip


def plan_epoch(rows: NDArray[np.int64], *, shard_chips: int, order: SampleOrder, epoch: int) -> tuple[Window, ...]:
    """Cut an epoch into windows of shuffled shards, in the order they are read; every chip is in one of them.

    Of several sources it is as many chips as the epoch takes of each, see `SampleOrder.parts`.

    Counted from the first sample of the run, windows end where a global batch ends, if they have room for one: chips
    too many for that go into the next window.

    Args:
        rows: (chip,) rows that hold chips, ascending.
        shard_chips: Rows per shard.
        order: What decides the order.
        epoch: Counted from 0.
    """
    # Windows have the numbers from 1 on.
    rng = np.random.default_rng([order.seed, epoch, 0])
    if order.parts:
        shards = stretches(rows, order.parts, shard_chips=shard_chips, seed=order.seed, epoch=epoch)
    else:
        split = np.split(rows, np.flatnonzero(np.diff(rows // shard_chips)) + 1)
        shards = [Stretch(rows=split[number], turn=0) for number in rng.permutation(len(split))]
    groups = list(_windows(shards, order, _chips_to_fill(order.epoch_chips(len(rows)), order, epoch), rng))
    if len(groups) > 1 and len(groups[-1][0]) < min(order.global_batch, order.window_chips):
        # Too few chips to keep the crops of one apart.
        groups[-2:] = [np.concatenate(groups[-2:], axis=1)]
    return tuple(_window(epoch, number, group) for number, group in enumerate(groups))


def sample_order(window: Window, *, order: SampleOrder) -> NDArray[np.int64]:
    """The samples of a window in the order they fill batches.

    Every chip comes once in each of K passes. A pass is shuffled, but a chip comes again only after half a window,
    and never within a global batch's length where the window has that many chips.

    Returns:
        (sample, 2): row and k.
    """
    rng = np.random.default_rng([order.seed, window.epoch, 1 + window.number])
    num_rows = len(window.rows)
    distance = max(1, num_rows // 2, order.global_batch if order.global_batch <= num_rows else 0)
    passes = [rng.permutation(num_rows)]
    for _ in range(1, order.crops_per_chip):
        passes.append(_shuffle_apart(passes[-1], distance, rng))
    places = np.concatenate(passes)
    k = np.repeat(np.arange(order.crops_per_chip), num_rows)
    if window.turns is not None:
        k += window.turns[places] * order.crops_per_chip
    return np.column_stack([window.rows[places], k])


def crop_windows(
    samples: NDArray[np.int64], *, seed: int, epoch: int, side_px: int, crop_px: int, step_px: int = WINDOW_STEP_PX
) -> NDArray[np.int64]:
    """Where each sample's crop lies in its chip; a function of (seed, epoch, row, k) alone.

    Args:
        samples: (sample, 2): row and k.
        seed: Of the order.
        epoch: Counted from 0.
        side_px: Side of the chips in 10 m pixels.
        crop_px: Side of the crops in 10 m pixels.
        step_px: Of the layout's windows, in 10 m pixels.

    Returns:
        (sample, 2): y and x of the upper left corner in 10 m pixels, multiples of the step, all equally likely.

    Raises:
        ValueError: The crop is larger than the chip or not a multiple of the step.
    """
    if not 0 < crop_px <= side_px or crop_px % step_px:
        raise ValueError(f"crop_px={crop_px} must be a multiple of {step_px} within a chip of {side_px} px")
    positions = np.uint64((side_px - crop_px) // step_px + 1)
    bits = np.full(len(samples), 0, dtype=np.uint64)
    for value in (np.int64(seed), np.int64(epoch), samples[:, 0], samples[:, 1]):
        bits = _mix(bits ^ np.broadcast_to(value, len(samples)).astype(np.uint64))
    # The two halves of 64 mixed bits choose y and x by their leading bits, without the bias of a remainder.
    halves = np.column_stack([bits >> np.uint64(32), bits & np.uint64(0xFFFFFFFF)])
    return ((halves * positions) >> np.uint64(32)).astype(np.int64) * step_px


def _chips_to_fill(num_chips: int, order: SampleOrder, epoch: int) -> int:
    """Chips at an epoch's start whose samples end where a global batch ends, the last one being still unfilled."""
    common = math.gcd(order.global_batch, order.crops_per_chip)
    # n chips with (unfilled + n K) % global_batch == 0; `common` divides all three.
    unfilled = epoch * num_chips * order.crops_per_chip % order.global_batch
    whole = order.global_batch // common
    return -(unfilled // common) * pow(order.crops_per_chip // common, -1, whole) % whole


def _windows(
    shards: Iterable[Stretch], order: SampleOrder, to_fill: int, rng: np.random.Generator
) -> Iterator[NDArray[np.int64]]:
    """(2, chip) rows and turns of shards in groups that end with a global batch, but for the last one."""
    step = order.global_batch // math.gcd(order.global_batch, order.crops_per_chip)
    held: list[NDArray[np.int64]] = []
    num_held = num_before = 0
    for shard in shards:
        held.append(np.stack([shard.rows, np.full_like(shard.rows, shard.turn)]))
        num_held += len(shard.rows)
        if num_held >= order.window_chips:
            too_many = (num_before + num_held - to_fill) % step
            taken = num_held - too_many if too_many < num_held else num_held
            # What does not fit comes from the newest shard: the next window reads it beside others.
            held[-1] = held[-1][:, rng.permutation(held[-1].shape[1])]
            group = np.concatenate(held, axis=1)
            yield group[:, :taken]
            held, num_held, num_before = [group[:, taken:]], num_held - taken, num_before + taken
    if num_held:
        yield np.concatenate(held, axis=1)


def _window(epoch: int, number: int, group: NDArray[np.int64]) -> Window:
    """Of (2, chip) rows and turns."""
    if not group[1].any():
        return Window(epoch=epoch, number=number, rows=np.sort(group[0]))
    rows, turns = group[:, np.lexsort(group[::-1])]
    return Window(epoch=epoch, number=number, rows=rows, turns=turns)


def _shuffle_apart(chips: NDArray[np.int64], distance: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Shuffle a pass so that no chip comes again within `distance` places of its last one."""
    num_chips = len(chips)
    draws = rng.random(num_chips)
    # Place i may take any chip from the last pass's places up to i + num_chips - distance that was not taken yet.
    choice = list(chips[: num_chips - distance])
    shuffled = np.empty_like(chips)
    for place in range(num_chips):
        if (entering := place + num_chips - distance) < num_chips:
            choice.append(chips[entering])
        index = int(draws[place] * len(choice))
        shuffled[place] = choice[index]
        choice[index] = choice[-1]
        choice.pop()
    return shuffled


def _mix(bits: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Spread every bit over all 64: the finaliser of SplitMix64."""
    bits = bits + np.uint64(0x9E3779B97F4A7C15)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))
