"""The order of samples: everything once, crops of a chip apart, decided by seed and epoch alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from numpy.typing import NDArray

from pipeline.epochs import EpochPlan, SampleOrder, crop_windows, plan_epoch, sample_order

SHARD_CHIPS = 8

some_rows = st.lists(st.integers(0, 150), min_size=1, max_size=100, unique=True).map(
    lambda rows: np.array(sorted(rows), dtype=np.int64)
)
some_orders = st.builds(
    lambda ranks, **fields: SampleOrder(multiple_of=ranks * fields["batch_size"] if ranks else 1, **fields),
    ranks=st.integers(0, 3),
    seed=st.integers(0, 3),
    crops_per_chip=st.integers(1, 5),
    batch_size=st.integers(1, 12),
    window_chips=st.integers(1, 40),
)


def plan(rows: NDArray[np.int64], order: SampleOrder, epoch: int = 0) -> EpochPlan:
    return plan_epoch(rows, shard_chips=SHARD_CHIPS, order=order, epoch=epoch)


def batches_of(epoch_plan: EpochPlan, order: SampleOrder) -> list[NDArray[np.int64]]:
    """(sample, 2) per batch, in the order of the epoch."""
    batches = []
    for window in epoch_plan.windows:
        samples = sample_order(window, order=order, epoch=epoch_plan.epoch)
        assert len(samples) == window.num_samples(order.crops_per_chip)
        batches += np.split(samples, range(order.batch_size, len(samples), order.batch_size))
    return batches


@given(rows=some_rows, order=some_orders, epoch=st.integers(0, 3))
@settings(max_examples=300)
def test_an_epoch_has_every_sample_once_but_those_left_over(
    rows: NDArray[np.int64], order: SampleOrder, epoch: int
) -> None:
    total = len(rows) * order.crops_per_chip
    assume(total >= order.multiple_of)
    epoch_plan = plan(rows, order, epoch)
    batches = batches_of(epoch_plan, order)
    samples = [tuple(sample) for batch in batches for sample in batch.tolist()]
    assert len(samples) == len(set(samples)) == epoch_plan.num_samples
    assert set(samples) <= {(row, k) for row in rows.tolist() for k in range(order.crops_per_chip)}
    assert epoch_plan.num_left_over == total - len(samples) == total % order.multiple_of
    # A chip is decoded once in an epoch: it is in one window only.
    seen = np.concatenate([window.rows for window in epoch_plan.windows])
    assert len(seen) == len(np.unique(seen))


@given(rows=some_rows, order=some_orders, epoch=st.integers(0, 3))
@settings(max_examples=300)
def test_all_batches_are_full_but_perhaps_the_last(rows: NDArray[np.int64], order: SampleOrder, epoch: int) -> None:
    assume(len(rows) * order.crops_per_chip >= order.multiple_of)
    sizes = [len(batch) for batch in batches_of(plan(rows, order, epoch), order)]
    assert set(sizes[:-1]) <= {order.batch_size}
    assert 0 < sizes[-1] <= order.batch_size
    if order.multiple_of > 1:
        assert sizes[-1] == order.batch_size


@given(rows=some_rows, order=some_orders, epoch=st.integers(0, 3))
@example(
    # The chip with fewer samples must not count when a last window is judged large enough.
    rows=np.arange(4),
    order=SampleOrder(crops_per_chip=5, batch_size=2, window_chips=1, multiple_of=6),
    epoch=0,
)
@settings(max_examples=300)
def test_crops_of_a_chip_are_in_different_batches_where_there_are_enough(
    rows: NDArray[np.int64], order: SampleOrder, epoch: int
) -> None:
    assume(len(rows) * order.crops_per_chip >= order.multiple_of)
    epoch_plan = plan(rows, order, epoch)
    assume(epoch_plan.num_samples >= order.crops_per_chip * order.batch_size)
    for batch in batches_of(epoch_plan, order):
        assert len(np.unique(batch[:, 0])) == len(batch)


def test_a_chip_comes_again_only_after_half_a_window() -> None:
    order = SampleOrder(crops_per_chip=4, batch_size=4, window_chips=64)
    for window in plan(np.arange(200), order).windows:
        rows = sample_order(window, order=order, epoch=0)[:, 0]
        for row in window.rows:
            assert np.diff(np.flatnonzero(rows == row)).min() >= len(window.rows) // 2


@given(rows=some_rows, order=some_orders, epoch=st.integers(0, 3))
def test_the_order_is_the_same_for_the_same_seed_and_epoch(
    rows: NDArray[np.int64], order: SampleOrder, epoch: int
) -> None:
    assume(len(rows) * order.crops_per_chip >= order.multiple_of)
    once, again = (batches_of(plan(rows.copy(), order, epoch), order) for _ in range(2))
    for one, other in zip(once, again, strict=True):
        assert_array_equal(one, other)


@pytest.mark.parametrize("change", [{"seed": 1}, {"epoch": 1}])
def test_another_seed_or_epoch_is_another_order_with_other_left_overs(change: dict[str, Any]) -> None:
    rows = np.arange(201)

    def samples(*, seed: int = 0, epoch: int = 0) -> NDArray[np.int64]:
        order = SampleOrder(seed=seed, crops_per_chip=2, batch_size=8, window_chips=32, multiple_of=16)
        return np.concatenate(batches_of(plan(rows, order, epoch), order))

    first, other = samples(), samples(**change)
    assert len(first) == len(other) == 400
    assert not np.array_equal(first[:100], other[:100])
    assert set(map(tuple, first.tolist())) != set(map(tuple, other.tolist()))


def test_batches_are_no_neighbourhoods() -> None:
    order = SampleOrder(batch_size=16, window_chips=64)
    distinct = [len(np.unique(batch[:, 0] // SHARD_CHIPS)) for batch in batches_of(plan(np.arange(640), order), order)]
    # 16 of 64 chips of 8 shards.
    assert np.mean(distinct) > 6


def test_every_place_of_an_epoch_is_open_to_every_chip() -> None:
    order = SampleOrder(batch_size=4, window_chips=8)
    places = np.array(
        [np.argsort(np.concatenate(batches_of(plan(np.arange(32), order, epoch), order))[:, 0]) for epoch in range(400)]
    )
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


def test_fewer_samples_than_one_global_batch_are_refused() -> None:
    with pytest.raises(ValueError, match="3 chips give 6 samples, fewer than one batch of 8"):
        plan(np.arange(3), SampleOrder(crops_per_chip=2, batch_size=4, multiple_of=8))


def test_an_order_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple_of=100 must be a multiple of batch_size=64"):
        SampleOrder(multiple_of=100)
    with pytest.raises(ValueError, match="crops_per_chip must be positive, got 0"):
        SampleOrder(crops_per_chip=0)
