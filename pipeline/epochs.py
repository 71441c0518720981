"""Which samples an epoch has, in which order, and which window of its chip each one is; pure arithmetic.

A sample is (row, k), the k-th crop of a chip. Shards are shuffled, then cut into windows of so many chips that are
read and decoded together; within a window the samples are shuffled into batches. Everything follows from the seed
and the epoch, so any process can work out its part alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.layout import WINDOW_STEP_PX


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleOrder:
    """What decides an epoch, beside the chips there are."""

    seed: int = 0

    crops_per_chip: int = 1
    """K: samples cut from a chip each time it is decoded; they go into different batches."""

    batch_size: int = 64
    """Samples per block that is handed over, the batch of one rank."""

    window_chips: int = 1024
    """Chips shuffled together, at least a batch; all their crops are in memory at once (218 kB each at 120 px)."""

    multiple_of: int = 1
    """Samples of an epoch are a multiple of this: ranks x batch, so that all ranks have equally many batches."""

    def __post_init__(self) -> None:
        for name in ("crops_per_chip", "batch_size", "window_chips", "multiple_of"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.multiple_of != 1 and self.multiple_of % self.batch_size:
            raise ValueError(f"multiple_of={self.multiple_of} must be a multiple of batch_size={self.batch_size}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Chips that are read, decoded and shuffled together."""

    number: int
    """Of the window in its epoch."""

    rows: NDArray[np.int64]
    """(chip,) ascending."""

    short_row: int = -1
    """The one chip that has fewer than K samples in this epoch, if it is in this window."""

    left_out: int = 0
    """How many samples fewer."""

    def num_samples(self, crops_per_chip: int) -> int:
        """Samples of this window."""
        return len(self.rows) * crops_per_chip - self.left_out


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochPlan:
    """The windows of one epoch, in the order they are read."""

    epoch: int
    windows: tuple[Window, ...]
    num_samples: int
    num_left_over: int
    """Samples this epoch goes without, to be a multiple; which ones they are changes with the epoch."""


def plan_epoch(rows: NDArray[np.int64], *, shard_chips: int, order: SampleOrder, epoch: int) -> EpochPlan:
    """Cut an epoch into windows of shuffled shards.

    Every window but the last has a whole number of batches: chips too many for that go into the next window. If
    the epoch's samples are a whole number of batches, so are the last window's.

    Args:
        rows: (chip,) rows that hold chips, ascending.
        shard_chips: Rows per shard.
        order: What decides the epoch.
        epoch: Counted from 0.

    Raises:
        ValueError: There are no chips, or fewer samples than `multiple_of`.
    """
    total = len(rows) * order.crops_per_chip
    num_left_over = total % order.multiple_of
    if total == num_left_over:
        raise ValueError(f"{len(rows)} chips give {total} samples, fewer than one batch of {order.multiple_of}")
    # Windows have the numbers from 1 on.
    rng = np.random.default_rng([order.seed, epoch, 0])
    kept, short_row, left_out = _leave_out(rows, num_left_over, order.crops_per_chip, rng)
    groups = list(_windows(kept[kept != short_row] if left_out else kept, shard_chips, order, rng))
    if len(groups) > 1 and len(groups[-1]) < order.batch_size:
        # Too few chips to keep the crops of one apart.
        groups[-2:] = [np.concatenate(groups[-2:])]
    if left_out:
        groups[-1] = np.append(groups[-1], short_row)
    windows = [Window(number=number, rows=np.sort(group)) for number, group in enumerate(groups)]
    if left_out:
        windows[-1] = Window(number=len(groups) - 1, rows=windows[-1].rows, short_row=short_row, left_out=left_out)
    return EpochPlan(
        epoch=epoch, windows=tuple(windows), num_samples=total - num_left_over, num_left_over=num_left_over
    )


def sample_order(window: Window, *, order: SampleOrder, epoch: int) -> NDArray[np.int64]:
    """The samples of a window in the order they fill batches.

    Every chip comes once in each of K passes. A pass is shuffled, but a chip comes again only after half a window,
    and never within a batch's length where the window has that many chips: so crops of one chip are in different
    batches, and as far apart as a good shuffle allows.

    Returns:
        (sample, 2): row and k.
    """
    rng = np.random.default_rng([order.seed, epoch, 1 + window.number])
    num_rows = len(window.rows)
    # Passes without the short row are one shorter.
    longest = num_rows - 1 if window.left_out else num_rows
    distance = max(1, min(max(order.batch_size, num_rows // 2), longest))
    chips = rng.permutation(num_rows)
    passes = [chips]
    for k in range(1, order.crops_per_chip):
        if k == order.crops_per_chip - window.left_out:
            chips = chips[window.rows[chips] != window.short_row]
        chips = _shuffle_apart(chips, distance, rng)
        passes.append(chips)
    rows = window.rows[np.concatenate(passes)]
    ks = np.repeat(np.arange(order.crops_per_chip), [len(chips) for chips in passes])
    return np.column_stack([rows, ks])


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


def _leave_out(
    rows: NDArray[np.int64], num_samples: int, crops_per_chip: int, rng: np.random.Generator
) -> tuple[NDArray[np.int64], int, int]:
    """Rows that stay, the row that stays with fewer samples, and how many fewer."""
    num_whole, left_out = divmod(num_samples, crops_per_chip)
    if not num_samples:
        return rows, -1, 0
    chosen = rng.choice(len(rows), num_whole + (left_out > 0), replace=False)
    short_row = int(rows[chosen[-1]]) if left_out else -1
    return np.delete(rows, chosen[:num_whole]), short_row, left_out


def _windows(
    rows: NDArray[np.int64], shard_chips: int, order: SampleOrder, rng: np.random.Generator
) -> Iterator[NDArray[np.int64]]:
    """Rows of shuffled shards in groups whose samples fill whole batches, but for the last group."""
    step = order.batch_size // math.gcd(order.batch_size, order.crops_per_chip)
    enough = max(order.window_chips, order.batch_size)
    shards = np.split(rows, np.flatnonzero(np.diff(rows // shard_chips)) + 1)
    held: list[NDArray[np.int64]] = []
    num_held = 0
    for number in rng.permutation(len(shards)):
        held.append(shards[number])
        num_held += len(shards[number])
        if num_held >= enough:
            whole = num_held // step * step
            # What does not fit comes from the newest shard: the next window reads it beside others.
            held[-1] = rng.permutation(held[-1])
            group = np.concatenate(held)
            yield group[:whole]
            held, num_held = [group[whole:]], num_held - whole
    yield np.concatenate(held)


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
