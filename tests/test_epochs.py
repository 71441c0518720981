"""The order of samples: everything once, crops of a chip apart, decided by seed and epoch alone."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from numpy.typing import NDArray

from pipeline.epochs import EpochChips, SampleOrder, Window, crop_windows, sample_order
from pipeline.positions import plan_spans
from pipeline.row_sets import RowSet

SHARD_CHIPS = 8

some_rows = st.lists(st.integers(0, 150), min_size=1, max_size=100, unique=True).map(
    lambda rows: np.array(sorted(rows), dtype=np.int64)
)
some_orders = st.builds(
    lambda share, lanes, **how: SampleOrder(global_batch=share * lanes, lanes=lanes, **how),
    share=st.integers(1, 12),
    lanes=st.integers(1, 4),
    seed=st.integers(0, 3),
    crops_per_chip=st.integers(1, 5),
    window_chips=st.integers(1, 40),
)


def cut(rows: NDArray[np.int64], order: SampleOrder, epoch: int, cuts: list[float]) -> list[Window]:
    """Windows of a whole epoch, cut at these parts of it."""
    total = len(rows) * order.crops_per_chip
    bounds = sorted({0, total, *(round(each * total) for each in cuts)})
    chips = EpochChips(rows, shard_chips=SHARD_CHIPS, order=order, epoch=epoch)
    return [chips.window(first, stop) for first, stop in pairwise(bounds)]


def samples_of(rows: NDArray[np.int64], order: SampleOrder, epoch: int = 0) -> NDArray[np.int64]:
    """(sample, 2) of the batches of an epoch, in their order."""
    spans = plan_spans(rows, shard_chips=SHARD_CHIPS, order=order, epoch=epoch)
    pieces = [piece for span in spans for piece in span.pieces]
    samples = np.concatenate([piece.samples(order) for piece in pieces])
    in_order: NDArray[np.int64] = samples[np.argsort(np.concatenate([piece.positions(order) for piece in pieces]))]
    return in_order


some_cuts = st.lists(st.floats(0, 1), max_size=5)


@given(rows=some_rows, order=some_orders, epoch=st.integers(0, 3), cuts=some_cuts)
@settings(max_examples=300)
def test_however_an_epoch_is_cut_it_has_every_sample_once(
    rows: NDArray[np.int64], order: SampleOrder, epoch: int, cuts: list[float]
) -> None:
    samples: list[tuple[int, int]] = []
    for window in cut(rows, order, epoch, cuts):
        own = sample_order(window, order=order)
        assert window.epoch == epoch
        assert len(own) == window.num_samples > 0
        assert {row for row, _ in own.tolist()} == set(window.rows.tolist())
        samples += [(row, k) for row, k in own.tolist()]
    assert sorted(samples) == [(row, k) for row in rows.tolist() for k in range(order.crops_per_chip)]


@given(rows=some_rows, order=some_orders, epoch=st.integers(0, 3), cuts=some_cuts)
@settings(max_examples=300)
def test_windows_take_shards_whole_but_for_those_at_their_ends(
    rows: NDArray[np.int64], order: SampleOrder, epoch: int, cuts: list[float]
) -> None:
    windows = cut(rows, order, epoch, cuts)
    in_windows = [set((window.rows // SHARD_CHIPS).tolist()) for window in windows]
    for window, held in zip(windows, in_windows, strict=True):
        elsewhere = set(rows.tolist()) - set(window.rows.tolist())
        assert len(held & {row // SHARD_CHIPS for row in elsewhere}) <= 2


@given(rows=some_rows, shard_chips=st.integers(1, 40), seed=st.integers(0, 3))
def test_a_window_keeps_its_rows_in_a_bit_each(rows: NDArray[np.int64], shard_chips: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    twice = rows[rng.random(len(rows)) < 0.3]
    both = np.stack([np.concatenate([rows, twice]), np.repeat([0, 1], [len(rows), len(twice)])])
    window = Window.of(*rng.permutation(both, axis=1), epoch=0, first=0, stop=both.shape[1], shard_chips=shard_chips)
    assert sorted(zip(*window.rows_and_turns(), strict=True)) == sorted(zip(*both, strict=True))
    assert_array_equal(window.rows, np.sort(both[0]))
    first = dict(window.chips)[0]
    assert first.shards == tuple(sorted({row // shard_chips for row in rows.tolist()}))
    assert len(first.bits) == math.ceil(len(first.shards) * shard_chips / 8)
    assert RowSet.from_bytes(first.to_bytes()) == first


@given(rows=some_rows, order=some_orders, epoch=st.integers(0, 3), cuts=some_cuts)
@settings(max_examples=300)
def test_crops_of_a_chip_are_apart_in_their_window(
    rows: NDArray[np.int64], order: SampleOrder, epoch: int, cuts: list[float]
) -> None:
    for window in cut(rows, order, epoch, cuts):
        missing = order.crops_per_chip * len(window.rows) - window.num_samples
        assert 0 <= missing <= 2 * (order.crops_per_chip - 1)
        apart = len(window.rows) // 2 - missing
        if len(window.rows) >= order.lane_share + missing:
            apart = max(apart, order.lane_share)
        in_order = sample_order(window, order=order)[:, 0]
        for row in window.rows:
            assert np.all(np.diff(np.flatnonzero(in_order == row)) >= apart)


@given(
    num_rows=st.integers(60, 200), crops=st.integers(2, 4), lanes=st.integers(1, 4), share=st.integers(1, 8),
    window_chips=st.integers(1, 40), seed=st.integers(0, 2),
)  # fmt: skip
@settings(max_examples=200)
def test_crops_of_a_chip_go_into_different_global_batches(
    num_rows: int, crops: int, lanes: int, share: int, window_chips: int, seed: int
) -> None:
    order = SampleOrder(
        crops_per_chip=crops, lanes=lanes, global_batch=lanes * share, window_chips=window_chips, seed=seed
    )
    assume(num_rows * crops // order.global_batch > order.window_batches)
    batches = samples_of(np.arange(num_rows), order).reshape(-1, order.global_batch, 2)[:, :, 0]
    meeting = sum(order.global_batch - len(np.unique(batch)) for batch in batches)
    # A chip at the end of one lane and the start of the next has crops in both, which are read at the same time.
    assert meeting <= lanes - 1


def test_a_chip_comes_again_only_after_half_a_window() -> None:
    order = SampleOrder(crops_per_chip=4, global_batch=4, window_chips=64)
    spans = list(plan_spans(np.arange(200), shard_chips=SHARD_CHIPS, order=order, epoch=0))
    assert len(spans) == 3
    for span in spans:
        (piece,) = span.pieces
        rows = piece.samples(order)[:, 0]
        for row in piece.window.rows:
            assert np.diff(np.flatnonzero(rows == row), append=len(rows) * 2).min() >= len(piece.window.rows) // 2 - 6


@given(rows=some_rows, order=some_orders, epoch=st.integers(0, 3), cuts=some_cuts)
def test_the_order_is_the_same_for_the_same_seed_and_epoch(
    rows: NDArray[np.int64], order: SampleOrder, epoch: int, cuts: list[float]
) -> None:
    for one, other in zip(cut(rows.copy(), order, epoch, cuts), cut(rows, order, epoch, cuts), strict=True):
        assert_array_equal(sample_order(one, order=order), sample_order(other, order=order))


@pytest.mark.parametrize("change", [{"seed": 1}, {"epoch": 1}])
def test_another_seed_or_epoch_is_another_order(change: dict[str, Any]) -> None:
    def samples(*, seed: int = 0, epoch: int = 0) -> NDArray[np.int64]:
        order = SampleOrder(seed=seed, crops_per_chip=2, global_batch=16, window_chips=32)
        return samples_of(np.arange(200), order, epoch)

    assert np.mean(np.all(samples() == samples(**change), axis=1)) < 0.05


def test_batches_are_no_neighbourhoods() -> None:
    samples = samples_of(np.arange(640), SampleOrder(global_batch=16, window_chips=64))
    distinct = [len(np.unique(batch[:, 0] // SHARD_CHIPS)) for batch in np.split(samples, 40)]
    # 16 of 64 chips of 8 shards.
    assert np.mean(distinct) > 6


def test_with_lanes_a_batch_is_of_as_many_windows() -> None:
    order = SampleOrder(global_batch=16, lanes=8, window_chips=8)
    batches = samples_of(np.arange(640), order).reshape(40, 16, 2)
    for batch in batches:
        of_lanes = [{row // SHARD_CHIPS for row, _ in part.tolist()} for part in np.split(batch, 8)]
        assert all(len(held) <= 2 for held in of_lanes)
        # No two lanes read the same shard at the same time, but where one ends and the next begins.
        assert len(set().union(*of_lanes)) >= sum(map(len, of_lanes)) - 1


@pytest.mark.parametrize("lanes", [1, 4])
def test_every_place_of_an_epoch_is_open_to_every_chip(lanes: int) -> None:
    order = SampleOrder(global_batch=4, window_chips=8, lanes=lanes)
    places = np.array([np.argsort(samples_of(np.arange(32), order, epoch)[:, 0]) for epoch in range(400)])
    # The mean place of a uniform shuffle is 15.5, its deviation over 400 epochs 0.46.
    assert np.all(np.abs(places.mean(axis=0) - 15.5) < 5 * 0.46)


@given(
    side=st.integers(1, 50),
    crop=st.integers(1, 50),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 1000),
    samples=st.lists(st.tuples(st.integers(0, 2**40), st.integers(0, 7)), min_size=1, max_size=20, unique=True),
)
def test_crops_lie_inside_the_chip_on_multiples_of_six(
    side: int, crop: int, seed: int, epoch: int, samples: list[tuple[int, int]]
) -> None:
    assume(crop <= side)
    table = np.array(samples, dtype=np.int64)
    corners = crop_windows(table, seed=seed, epoch=epoch, side_px=side * 6, crop_px=crop * 6)
    assert np.all(corners % 6 == 0)
    assert np.all((corners >= 0) & (corners + crop * 6 <= side * 6))
    # A sample's crop does not depend on what else is asked for.
    alone = crop_windows(table[-1:], seed=seed, epoch=epoch, side_px=side * 6, crop_px=crop * 6)
    assert_array_equal(alone[0], corners[-1])


def test_all_crops_of_a_chip_are_equally_likely_and_change_with_each_of_their_causes() -> None:
    samples = np.array([(row, k) for row in range(5000) for k in range(5)])
    corners = crop_windows(samples, seed=1, epoch=2, side_px=264, crop_px=120)
    places = corners[:, 0] // 6 * 25 + corners[:, 1] // 6
    counts = np.bincount(places, minlength=625)
    # 40 expected in each of 625 places; chi-squared has mean 624 and deviation 35.
    assert abs(((counts - 40) ** 2 / 40).sum() - 624) < 5 * 35
    for other in ({"seed": 2, "epoch": 2}, {"seed": 1, "epoch": 3}, {"seed": 2, "epoch": 1}):
        changed = crop_windows(samples, side_px=264, crop_px=120, **other)
        assert np.mean(np.all(changed == corners, axis=1)) < 0.01
    by_k = places.reshape(5000, 5)
    assert np.mean(by_k[:, 0] == by_k[:, 1]) < 0.01


def test_a_crop_as_large_as_the_chip_is_the_chip() -> None:
    corners = crop_windows(np.array([(3, 0)]), seed=0, epoch=0, side_px=120, crop_px=120)
    assert corners.tolist() == [[0, 0]]


@pytest.mark.parametrize("crop_px", [0, 100, 270])
def test_a_crop_that_does_not_fit_is_refused(crop_px: int) -> None:
    with pytest.raises(ValueError, match=f"crop_px={crop_px} must be a multiple of 6 within a chip of 264 px"):
        crop_windows(np.array([(3, 0)]), seed=0, epoch=0, side_px=264, crop_px=crop_px)


def test_an_order_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="global_batch must be positive, got 0"):
        SampleOrder(global_batch=0)
    with pytest.raises(ValueError, match="crops_per_chip must be positive, got 0"):
        SampleOrder(crops_per_chip=0)
    with pytest.raises(ValueError, match="global_batch=10 is no multiple of lanes=4"):
        SampleOrder(global_batch=10, lanes=4)
