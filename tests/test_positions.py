"""Where a run stands: interrupted runs see what an undisturbed one sees, on any number of ranks."""

from __future__ import annotations

from collections import Counter
from itertools import chain, islice

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.epochs import SampleOrder, plan_epoch, sample_order
from pipeline.positions import Course, Piece, plan_pieces, share_out

SHARD_CHIPS = 8

Sample = tuple[int, int, int]
"""epoch, row, k"""

some_rows = st.builds(
    lambda num, seed: np.sort(np.random.default_rng(seed).choice(150, num, replace=False)),
    num=st.integers(36, 70),
    seed=st.integers(0, 100),
)
some_orders = st.builds(
    SampleOrder,
    seed=st.integers(0, 3),
    crops_per_chip=st.integers(1, 4),
    # Of 1, 2, 3 and 4 ranks.
    global_batch=st.sampled_from([12, 24, 36]),
    window_chips=st.integers(1, 30),
)


def undisturbed(rows: NDArray[np.int64], order: SampleOrder, epochs: int) -> list[Sample]:
    """All samples of a run in their order, one epoch after the other."""
    return [
        (epoch, row, k)
        for epoch in range(epochs)
        for window in plan_epoch(rows, shard_chips=SHARD_CHIPS, order=order, epoch=epoch)
        for row, k in sample_order(window, order=order).tolist()
    ]


def samples_of(pieces: list[Piece], order: SampleOrder) -> list[Sample]:
    return [(piece.window.epoch, row, k) for piece in pieces for row, k in piece.samples(order).tolist()]


def dealt(pieces: list[Piece], order: SampleOrder, ranks: int, at_least: int) -> list[list[list[Sample]]]:
    """Blocks as tasks cut them, dealt out in turn: step, rank, samples."""
    size = order.global_batch // ranks
    blocks = []
    for group in share_out(pieces, at_least=at_least, multiple_of=size):
        samples = samples_of(group, order)
        assert len(samples) % size == 0
        assert group[0].position % size == 0
        blocks += [samples[start : start + size] for start in range(0, len(samples), size)]
    assert len(blocks) % ranks == 0, "a rank would take a step more than another"
    return [blocks[start : start + ranks] for start in range(0, len(blocks), ranks)]


@given(
    rows=some_rows,
    order=some_orders,
    epochs=st.integers(1, 4),
    at_least=st.integers(1, 100),
    interruptions=st.lists(st.tuples(st.integers(0, 12), st.integers(1, 4), st.sampled_from([1, 2, 3, 4])), max_size=6),
)
@example(
    # 4 -> 2 -> 3 ranks; epochs of 50 samples are no multiple of 12.
    rows=np.arange(50),
    order=SampleOrder(global_batch=12, window_chips=16),
    epochs=3,
    at_least=20,
    interruptions=[(3, 2, 4), (4, 1, 2), (7, 3, 3)],
)
@settings(max_examples=150)
def test_an_interrupted_run_sees_every_sample_once_counting_from_checkpoints(
    rows: NDArray[np.int64],
    order: SampleOrder,
    epochs: int,
    at_least: int,
    interruptions: list[tuple[int, int, int]],
) -> None:
    """Each interruption: steps that are taken, steps between checkpoints, ranks."""
    course_samples = len(rows) * order.crops_per_chip
    course = Course(epoch_samples=course_samples, global_batch=order.global_batch)
    total = course.seen_after(epochs)
    kept: list[list[Sample]] = []
    seen = 0
    for steps, between, ranks in [*interruptions, (10**6, 1, 3)]:
        batches = []
        for epoch in range(course.epoch_of(seen), epochs):
            pieces = plan_pieces(rows, shard_chips=SHARD_CHIPS, order=order, epoch=epoch, seen=seen)
            batches += [list(chain(*of_ranks)) for of_ranks in dealt(pieces, order, ranks, at_least)]
        taken = list(islice(batches, steps))
        # What was learnt after the last checkpoint is lost, and must come again.
        safe = len(taken) if len(taken) == len(batches) else len(taken) // between * between
        kept += taken[:safe]
        seen += safe * order.global_batch
    assert seen == total
    everything = undisturbed(rows, order, epochs)
    # Not only the multiset: batch by batch what the undisturbed run has, whatever the ranks.
    assert list(chain(*kept)) == everything[:total]
    assert len(everything) - total == course.left_over(epochs) < order.global_batch
    times = Counter(everything[:total])
    assert set(times.values()) == {1}
    for epoch in range(epochs - 1):
        assert sum(1 for each in times if each[0] == epoch) == course_samples


@given(rows=some_rows, order=some_orders, epoch=st.integers(0, 4), steps=st.integers(0, 20))
@settings(max_examples=200)
def test_an_epoch_is_planned_from_where_the_run_stands(
    rows: NDArray[np.int64], order: SampleOrder, epoch: int, steps: int
) -> None:
    epoch_samples = len(rows) * order.crops_per_chip
    course = Course(epoch_samples=epoch_samples, global_batch=order.global_batch)
    whole = plan_pieces(rows, shard_chips=SHARD_CHIPS, order=order, epoch=epoch)
    first = course.seen_after(epoch)
    seen = first + steps * order.global_batch
    rest = plan_pieces(rows, shard_chips=SHARD_CHIPS, order=order, epoch=epoch, seen=seen)
    assert samples_of(rest, order) == samples_of(whole, order)[seen - first :]
    positions = [piece.position + n for piece in rest for n in range(piece.num_samples)]
    assert positions == list(range(seen, course.seen_after(epoch + 1)))
    # Windows that were seen whole are not read again.
    assert all(piece.num_samples for piece in rest)
    assert all(0 <= piece.start < piece.stop <= piece.window.num_samples(order.crops_per_chip) for piece in rest)
    for at in range(first, course.seen_after(epoch + 1), order.global_batch):
        assert course.epoch_of(at) == epoch


@given(rows=some_rows, order=some_orders, epoch=st.integers(0, 2), at_least=st.integers(1, 200))
def test_tasks_are_worth_their_start_and_cut_windows_only_where_blocks_end(
    rows: NDArray[np.int64], order: SampleOrder, epoch: int, at_least: int
) -> None:
    pieces = plan_pieces(rows, shard_chips=SHARD_CHIPS, order=order, epoch=epoch)
    groups = list(share_out(pieces, at_least=at_least, multiple_of=order.global_batch // 3))
    assert samples_of(list(chain(*groups)), order) == samples_of(pieces, order)
    longest = max(piece.num_samples for piece in pieces)
    for group in groups[:-1]:
        num_samples = sum(piece.num_samples for piece in group)
        assert num_samples > at_least - order.global_batch // 3
        assert num_samples < at_least + longest + order.global_batch // 3


def test_the_remainder_of_an_epoch_begins_the_next_one() -> None:
    order = SampleOrder(global_batch=4, window_chips=8)
    rows = np.arange(10)
    epochs = [
        samples_of(plan_pieces(rows, shard_chips=SHARD_CHIPS, order=order, epoch=epoch), order) for epoch in range(3)
    ]
    assert [len(epoch) for epoch in epochs] == [8, 12, 8]
    assert [[sample[0] for sample in epoch[:3]] for epoch in epochs] == [[0, 0, 0], [0, 0, 1], [2, 2, 2]]
    course = Course(epoch_samples=10, global_batch=4)
    assert [course.left_over(n) for n in (1, 2, 3)] == [2, 0, 2]


def test_an_epoch_without_a_whole_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="an epoch of 6 samples has no batch of 8"):
        plan_pieces(np.arange(3), shard_chips=8, order=SampleOrder(crops_per_chip=2, global_batch=8), epoch=0)
