"""Which samples an epoch has, in which order, and which window of its chip each one is; pure arithmetic.

A sample is (row, k), the k-th crop of a chip. An epoch's shards are shuffled, and its samples counted as its chips come
then, the K crops of each one after the other. Windows are stretches of that count, whose chips are read and decoded
together and whose samples are shuffled. Everything follows from the seed and the epoch, and nothing from how many ranks
there are, so any process can work out its part alone. Which stretches are windows, where in a run their samples stand,
and which of them make up a batch, is in `pipeline.positions`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.layout import WINDOW_STEP_PX
from pipeline.mixture import Part, stretches
from pipeline.row_sets import RowSet

ORDER_VERSION = 2
"""Of the arithmetic here: another number, another order, and a run cannot go on within an epoch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleOrder:
    """What decides an epoch, beside the chips there are."""

    seed: int = 0

    crops_per_chip: int = 1
    """K: samples cut from a chip each time it is decoded. They go into different global batches where an epoch has
    enough for that, but for a chip or two whose crops lie in two lanes."""

    global_batch: int = 64
    """Samples per step of all ranks together."""

    lanes: int = 1
    """Parts that an epoch's samples are cut into, all read at a time: each gives as many samples to every global batch.
    With as many lanes as ranks, each rank reads chips of its own, whole windows one after the other."""

    window_chips: int = 1024
    """Chips of a lane shuffled together, or as many as it gives samples to a global batch, if those are more. All their
    crops are in memory at once (218 kB each at 120 px), and of several ranks one block of Ray Data."""

    parts: tuple[Part, ...] = ()
    """What an epoch takes of several sources, in the order of their rows; none: every chip once."""

    def __post_init__(self) -> None:
        for name in ("crops_per_chip", "global_batch", "lanes", "window_chips"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.global_batch % self.lanes:
            raise ValueError(f"global_batch={self.global_batch} is no multiple of lanes={self.lanes}")

    @property
    def lane_share(self) -> int:
        """Samples that a lane gives to a global batch."""
        return self.global_batch // self.lanes

    @property
    def window_batches(self) -> int:
        """Global batches that a window has samples for where an epoch has as many: it keeps crops of a chip apart."""
        # More chips than samples of a batch, as some crops of the chips at its ends can be another window's.
        chips = max(self.window_chips, self.lane_share + 2 * (self.crops_per_chip - 1))
        return -(-chips * self.crops_per_chip // self.lane_share)

    def epoch_chips(self, num_chips: int) -> int:
        """Chips that an epoch takes where there are so many, those that come again counted again."""
        return sum(part.taken for part in self.parts) or num_chips


def usual_window(crops_per_chip: int) -> int:
    """Chips of a window that are worth a task, 2048 samples; no fewer than a shard usually has."""
    return max(256, 2048 // crops_per_chip)


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Chips that are read, decoded and shuffled together: those of consecutive samples of an epoch."""

    epoch: int
    """Counted from 0."""

    first: int
    """Sample, counted in the epoch as its chips come."""

    stop: int
    """One past the last."""

    ends: tuple[tuple[int, int], tuple[int, int]]
    """Row and turn of the first and the last chip as they come: of these, some crops can be another window's."""

    chips: tuple[tuple[int, RowSet], ...]
    """How often chips came before in the epoch, see `pipeline.mixture`, and which those are; ascending."""

    @classmethod
    def of(
        cls,
        rows: NDArray[np.int64],
        turns: NDArray[np.int64],
        *,
        epoch: int,
        first: int,
        stop: int,
        shard_chips: int,
    ) -> Window:
        """A window of rows (chip,) in the order they come, each once in a turn."""
        sets = ((turn, np.sort(rows[turns == turn])) for turn in np.unique(turns).tolist())
        chips = tuple((turn, RowSet.of(own, shard_chips=shard_chips)) for turn, own in sets)
        ends = ((int(rows[0]), int(turns[0])), (int(rows[-1]), int(turns[-1])))
        return cls(epoch=epoch, first=first, stop=stop, ends=ends, chips=chips)

    @property
    def num_samples(self) -> int:
        """How many they are."""
        return self.stop - self.first

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


class EpochChips:
    """The chips of an epoch as they come: shards shuffled, of several sources as many chips as it takes of each.

    Args:
        rows: (chip,) rows that hold chips, ascending.
        shard_chips: Rows per shard.
        order: What decides the order.
        epoch: Counted from 0.
    """

    def __init__(self, rows: NDArray[np.int64], *, shard_chips: int, order: SampleOrder, epoch: int) -> None:
        self.order, self.epoch = order, epoch
        self._rows, self._shard_chips = rows, shard_chips
        self._mixed = None
        if order.parts:
            self._mixed = stretches(rows, order.parts, shard_chips=shard_chips, seed=order.seed, epoch=epoch)
            lengths = np.array([len(stretch.rows) for stretch in self._mixed])
        else:
            bounds = _shard_bounds(rows, shard_chips)
            self._starts = np.random.default_rng([order.seed, epoch, 0]).permutation(bounds[:-1])
            lengths = bounds[np.searchsorted(bounds, self._starts) + 1] - self._starts
        self._ends = np.cumsum(lengths)

    def window(self, first: int, stop: int) -> Window:
        """The window of these samples, as they come."""
        crops = self.order.crops_per_chip
        first_chip, stop_chip = first // crops, -(-stop // crops)
        begun, ended = np.searchsorted(self._ends, [first_chip, stop_chip - 1], side="right").tolist()
        found = [self._stretch(n, shuffled=n in (begun, ended)) for n in range(begun, ended + 1)]
        begins = int(self._ends[begun - 1]) if begun else 0
        wanted = slice(first_chip - begins, stop_chip - begins)
        rows, turns = (np.concatenate(each)[wanted] for each in zip(*found, strict=True))
        return Window.of(rows, turns, epoch=self.epoch, first=first, stop=stop, shard_chips=self._shard_chips)

    def _stretch(self, number: int, *, shuffled: bool) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The chips of a shard, and how often they came before.

        Shuffled is what can be cut between two windows, in the same way for both: neighbours are not to stay together.
        """
        if self._mixed is not None:
            rows, turn = self._mixed[number].rows, self._mixed[number].turn
        else:
            length = self._ends[number] - (self._ends[number - 1] if number else 0)
            rows, turn = self._rows[self._starts[number] :][:length], 0
        if shuffled:
            rows = np.random.default_rng([self.order.seed, self.epoch, 0, 0, number]).permutation(rows)
        return rows, np.full(len(rows), turn)


def sample_order(window: Window, *, order: SampleOrder) -> NDArray[np.int64]:
    """The samples of a window in the order they fill batches.

    Every chip comes once in each of K passes. A pass is shuffled, but a chip comes again only after about half a
    window, and never within what a lane gives to a global batch where the window has a few chips more than that.

    Returns:
        (sample, 2): row and k.
    """
    rng = np.random.default_rng([order.seed, window.epoch, 0, 1, window.first])
    rows, turns = window.rows_and_turns()
    crops, num_chips = order.crops_per_chip, len(rows)
    # Those that are missing can all lie between two of a chip.
    apart = order.lane_share + crops * num_chips - window.num_samples
    distance = max(1, num_chips // 2, apart if apart <= num_chips else 0)
    passes = [rng.permutation(num_chips)]
    for _ in range(1, crops):
        passes.append(_shuffle_apart(passes[-1], distance, rng))
    places = np.concatenate(passes)
    k = np.repeat(np.arange(crops), num_chips)
    own = np.full(len(places), True)
    first, last = (np.flatnonzero((rows == row) & (turns == turn))[0] for row, turn in window.ends)
    own[(places == first) & (k < window.first % crops)] = False
    own[(places == last) & (k > (window.stop - 1) % crops)] = False
    samples: NDArray[np.int64] = np.column_stack([rows[places], k + turns[places] * crops])[own]
    return samples


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


def _shard_bounds(rows: NDArray[np.int64], shard_chips: int) -> NDArray[np.int64]:
    """Where each shard that has rows begins among them, and where the last one ends."""
    # Found, not computed row by row: that would take several times the memory of the rows.
    first, last = int(rows[0]) // shard_chips, int(rows[-1]) // shard_chips
    starts = np.searchsorted(rows, np.arange(first, last + 1) * shard_chips)
    # A shard without rows begins where the next one does.
    return np.unique(np.append(starts, len(rows)))


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
