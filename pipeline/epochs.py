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
class RowSet:
    """Rows, as bits: an epoch of 10^8 chips is planned in a third of the memory that numbers take."""

    shard_chips: int
    """Rows per shard."""

    shards: tuple[int, ...]
    """Numbers of the shards that have rows of these, ascending."""

    bits: bytes
    """Whether a row is one of them, for all rows of these shards; filled up to whole bytes at the end."""

    @classmethod
    def of(cls, rows: NDArray[np.int64], *, shard_chips: int) -> RowSet:
        """These rows, ascending, each of them once."""
        shard = rows // shard_chips
        starts = np.concatenate([[0], np.flatnonzero(np.diff(shard)) + 1])
        shards = shard[starts]
        # How far the rows of a shard move down when the shards between are left out.
        moved = (shards - np.arange(len(shards))) * shard_chips
        flags = np.zeros(len(shards) * shard_chips, bool)
        flags[rows - np.repeat(moved, np.diff(starts, append=len(rows)))] = True
        return cls(shard_chips=shard_chips, shards=tuple(shards.tolist()), bits=np.packbits(flags).tobytes())

    def rows(self) -> NDArray[np.int64]:
        """(chip,) ascending."""
        flags = np.unpackbits(np.frombuffer(self.bits, np.uint8), count=len(self.shards) * self.shard_chips)
        shard, place = np.nonzero(flags.reshape(len(self.shards), self.shard_chips))
        rows: NDArray[np.int64] = np.array(self.shards)[shard] * self.shard_chips + place
        return rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Chips that are read, decoded and shuffled together."""

    epoch: int
    """Counted from 0."""

    number: int
    """Of the window in its epoch."""

    num_chips: int
    """One that comes twice counts twice."""

    chips: tuple[tuple[int, RowSet], ...]
    """How often chips came before in the epoch, see `pipeline.mixture`, and which those are; ascending."""

    @classmethod
    def of(
        cls,
        rows: NDArray[np.int64],
        turns: NDArray[np.int64] | None = None,
        *,
        epoch: int,
        number: int,
        shard_chips: int,
    ) -> Window:
        """A window of rows (chip,) in any order, each once in a turn; without turns, all come the first time."""
        turns = np.zeros_like(rows) if turns is None else turns
        sets = ((turn, np.sort(rows[turns == turn])) for turn in np.unique(turns).tolist())
        chips = tuple((turn, RowSet.of(own, shard_chips=shard_chips)) for turn, own in sets)
        return cls(epoch=epoch, number=number, num_chips=len(rows), chips=chips)

    @property
    def rows(self) -> NDArray[np.int64]:
        """(chip,) ascending; worked out anew at each call."""
        return self.rows_and_turns()[0]

    def rows_and_turns(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(chip,) rows, ascending, and how often each came before; worked out anew at each call."""
        sets = [(turn, own.rows()) for turn, own in self.chips]
        rows = np.concatenate([own for _, own in sets])
        turns = np.concatenate([np.full_like(own, turn) for turn, own in sets])
        if len(sets) > 1:
            order = np.lexsort([turns, rows])
            rows, turns = rows[order], turns[order]
        return rows, turns

    def num_samples(self, crops_per_chip: int) -> int:
        """Samples of this window."""
        return self.num_chips * crops_per_chip


def plan_epoch(
    rows: NDArray[np.int64], *, shard_chips: int, order: SampleOrder, epoch: int, skip_samples: int = 0
) -> tuple[Window, ...]:
    """Cut an epoch into windows of shuffled shards, in the order they are read; every chip is in one of them.

    Of several sources it is as many chips as the epoch takes of each, see `SampleOrder.parts`.

    Counted from the first sample of the run, windows end where a global batch ends, if they have room for one: chips
    too many for that go into the next window.

    Args:
        rows: (chip,) rows that hold chips, ascending.
        shard_chips: Rows per shard.
        order: What decides the order.
        epoch: Counted from 0.
        skip_samples: Samples of the epoch that are not wanted: windows that hold no others are left out.
    """
    # Windows have the numbers from 1 on.
    rng = np.random.default_rng([order.seed, epoch, 0])
    if order.parts:
        shards = iter(stretches(rows, order.parts, shard_chips=shard_chips, seed=order.seed, epoch=epoch))
    else:
        bounds = _shard_bounds(rows, shard_chips)
        shuffled = rng.permutation(len(bounds) - 1).tolist()
        shards = (Stretch(rows=rows[bounds[number] : bounds[number + 1]], turn=0) for number in shuffled)
    groups = _windows(shards, order, _chips_to_fill(order.epoch_chips(len(rows)), order, epoch), rng)
    # With fewer chips in the last one, the crops of a chip would not be kept apart.
    at_least = min(order.global_batch, order.window_chips)
    windows, samples = [], 0
    for number, group in enumerate(_last_joined(groups, at_least)):
        samples += group.shape[1] * order.crops_per_chip
        if samples > skip_samples:
            windows.append(Window.of(*group, epoch=epoch, number=number, shard_chips=shard_chips))
    return tuple(windows)


def sample_order(window: Window, *, order: SampleOrder) -> NDArray[np.int64]:
    """The samples of a window in the order they fill batches.

    Every chip comes once in each of K passes. A pass is shuffled, but a chip comes again only after half a window,
    and never within a global batch's length where the window has that many chips.

    Returns:
        (sample, 2): row and k.
    """
    rng = np.random.default_rng([order.seed, window.epoch, 1 + window.number])
    num_rows = window.num_chips
    distance = max(1, num_rows // 2, order.global_batch if order.global_batch <= num_rows else 0)
    passes = [rng.permutation(num_rows)]
    for _ in range(1, order.crops_per_chip):
        passes.append(_shuffle_apart(passes[-1], distance, rng))
    places = np.concatenate(passes)
    rows, turns = window.rows_and_turns()
    k = np.repeat(np.arange(order.crops_per_chip), num_rows) + turns[places] * order.crops_per_chip
    return np.column_stack([rows[places], k])


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


def _last_joined(groups: Iterable[NDArray[np.int64]], at_least: int) -> Iterator[NDArray[np.int64]]:
    """(2, chip) each; the last one joined to the one before it if it is smaller than that."""
    held: list[NDArray[np.int64]] = []
    for group in groups:
        held.append(group)
        if len(held) > 2:
            yield held.pop(0)
    if len(held) == 2 and held[-1].shape[1] < at_least:
        held = [np.concatenate(held, axis=1)]
    yield from held


def _shard_bounds(rows: NDArray[np.int64], shard_chips: int) -> list[int]:
    """Where each shard that has rows begins among them, and where the last one ends."""
    # Found, not computed row by row: that would take several times the memory of the rows.
    first, last = int(rows[0]) // shard_chips, int(rows[-1]) // shard_chips
    starts = np.searchsorted(rows, np.arange(first, last + 1) * shard_chips)
    # A shard without rows begins where the next one does.
    bounds: list[int] = np.unique(np.append(starts, len(rows))).tolist()
    return bounds


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
