"""Where a run stands: interrupted runs see what an undisturbed one sees, on any number of ranks."""

from __future__ import annotations

from collections import Counter
from itertools import chain, pairwise

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.epochs import SampleOrder
from pipeline.positions import Course, Span, plan_spans, rank_lanes, rank_spans

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
    lanes=st.sampled_from([1, 2, 3, 4, 6, 12]),
    window_chips=st.integers(1, 30),
)


def spans_of(rows: NDArray[np.int64], order: SampleOrder, epoch: int, seen: int = 0) -> list[Span]:
    return list(plan_spans(rows, shard_chips=SHARD_CHIPS, order=order, epoch=epoch, seen=seen))


def samples_at(span: Span, order: SampleOrder) -> dict[int, Sample]:
    """Samples of a span by their position in the run."""
    return {
        position: (piece.window.epoch, row, k)
        for piece in span.pieces
        for position, (row, k) in zip(piece.positions(order).tolist(), piece.samples(order).tolist(), strict=True)
    }


def dealt(spans: list[Span], order: SampleOrder, ranks: int) -> list[list[list[Sample]]]:
    """What each rank gets of every global batch: step, rank, samples."""
    size = order.global_batch // ranks
    steps: list[list[list[Sample]]] = []
    for span in spans:
        for parts in rank_spans(span, order, ranks=ranks):
            assert len({(part.first, part.stop) for part in parts}) == 1, "a rank would take a step more than another"
            of_ranks = [samples_at(part, order) for part in parts]
            for batch in range(parts[0].first, parts[0].stop):
                starts = [batch * order.global_batch + rank * size for rank in range(ranks)]
                steps.append([[own[at] for at in range(start, start + size)] for own, start in zip(
                    of_ranks, starts, strict=True)])  # fmt: skip
    return steps


def undisturbed(rows: NDArray[np.int64], order: SampleOrder, epochs: int) -> list[Sample]:
    """All samples of a run in their order."""
    spans = chain(*(spans_of(rows, order, epoch) for epoch in range(epochs)))
    return list(chain(*chain(*dealt(list(spans), order, 1))))


@given(
    rows=some_rows,
    order=some_orders,
    epochs=st.integers(1, 4),
    interruptions=st.lists(st.tuples(st.integers(0, 12), st.integers(1, 4), st.sampled_from([1, 2, 3, 4])), max_size=6),
)
@example(
    # 4 -> 2 -> 3 ranks; epochs of 50 samples are no multiple of 12.
    rows=np.arange(50),
    order=SampleOrder(global_batch=12, window_chips=16, lanes=4),
    epochs=3,
    interruptions=[(3, 2, 4), (4, 1, 2), (7, 3, 3)],
)
@settings(max_examples=150)
def test_an_interrupted_run_sees_every_sample_once_counting_from_checkpoints(
    rows: NDArray[np.int64], order: SampleOrder, epochs: int, interruptions: list[tuple[int, int, int]]
) -> None:
    """Each interruption: steps that are taken, steps between checkpoints, ranks."""
    epoch_samples = len(rows) * order.crops_per_chip
    course = Course(epoch_samples=epoch_samples, global_batch=order.global_batch)
    total = course.seen_after(epochs)
    kept: list[list[Sample]] = []
    seen = 0
    for steps, between, ranks in [*interruptions, (10**6, 1, 3)]:
        batches = []
        for epoch in range(course.epoch_of(seen), epochs):
            of_epoch = dealt(spans_of(rows, order, epoch, seen), order, ranks)
            batches += [list(chain(*of_ranks)) for of_ranks in of_epoch]
        taken = batches[:steps]
        # What was learnt after the last checkpoint is lost, and must come again.
        safe = len(taken) if len(taken) == len(batches) else len(taken) // between * between
        kept += taken[:safe]
        seen += safe * order.global_batch
    assert seen == total
    # Not only the multiset: batch by batch what the undisturbed run has, whatever the ranks.
    assert list(chain(*kept)) == undisturbed(rows, order, epochs)
    times = Counter(chain(*kept))
    assert set(times.values()) == {1}
    assert total - epochs * epoch_samples == -course.left_over(epochs) > -order.global_batch
    for epoch in range(epochs):
        seen_of_it = sum(1 for each in times if each[0] == epoch)
        assert seen_of_it == epoch_samples - (course.left_over(epochs) if epoch == epochs - 1 else 0)


@given(rows=some_rows, order=some_orders, epoch=st.integers(0, 4), steps=st.integers(0, 20))
@settings(max_examples=200)
def test_an_epoch_is_planned_from_where_the_run_stands(
    rows: NDArray[np.int64], order: SampleOrder, epoch: int, steps: int
) -> None:
    course = Course(epoch_samples=len(rows) * order.crops_per_chip, global_batch=order.global_batch)
    first, end = course.seen_after(epoch), course.seen_after(epoch + 1)
    seen = min(first + steps * order.global_batch, end)
    rest = spans_of(rows, order, epoch, seen)
    batches = [bound for span in rest for bound in (span.first, span.stop)]
    assert batches[::2] == [seen // order.global_batch, *batches[1:-1:2]][: len(rest)]
    assert not rest or batches[-1] == end // order.global_batch
    everything = {at: each for span in spans_of(rows, order, epoch) for at, each in samples_at(span, order).items()}
    assert sorted(everything) == list(range(first, end))
    found = [samples_at(span, order) for span in rest]
    assert {at: each for span in found for at, each in span.items()} == {
        at: each for at, each in everything.items() if at >= seen
    }
    # What is read of it is whole batches: a span is read without any other.
    for span, own in zip(rest, found, strict=True):
        assert sorted(own) == list(range(span.first * order.global_batch, span.stop * order.global_batch))
    # Nothing that was seen is read again.
    assert all(0 <= piece.start < piece.stop <= piece.window.num_samples for span in rest for piece in span.pieces)
    for at in range(first, end, order.global_batch):
        assert course.epoch_of(at) == epoch


@given(rows=some_rows, order=some_orders, epoch=st.integers(0, 2), lane=st.integers(0, 11))
def test_a_lane_can_be_planned_alone(rows: NDArray[np.int64], order: SampleOrder, epoch: int, lane: int) -> None:
    assume(lane < order.lanes)
    alone = plan_spans(rows, shard_chips=SHARD_CHIPS, order=order, epoch=epoch, lanes=range(lane, lane + 1))
    for own, span in zip(alone, spans_of(rows, order, epoch), strict=True):
        assert own == span.of_lanes(range(lane, lane + 1))
        places = [at % order.global_batch // order.lane_share for at in samples_at(own, order)]
        assert places == [lane] * (own.num_batches * order.lane_share)


@given(order=some_orders, ranks=st.sampled_from([1, 2, 3, 4]))
def test_a_rank_reads_no_more_lanes_than_its_part_is_of(order: SampleOrder, ranks: int) -> None:
    size = order.global_batch // ranks
    for rank in range(ranks):
        lanes = {place // order.lane_share for place in range(rank * size, (rank + 1) * size)}
        assert set(rank_lanes(order, rank=rank, ranks=ranks)) == lanes


@given(rows=some_rows, order=some_orders, epoch=st.integers(0, 2))
@settings(max_examples=200)
def test_spans_have_as_many_batches_as_windows_need_and_not_twice_as_many(
    rows: NDArray[np.int64], order: SampleOrder, epoch: int
) -> None:
    spans = spans_of(rows, order, epoch)
    assert all(one.stop == other.first for one, other in pairwise(spans))
    if len(spans) > 1:
        assert min(span.num_batches for span in spans) >= order.window_batches
        assert max(span.num_batches for span in spans) < 2 * order.window_batches
    # A chip is in one window alone, but where a window ends; and decoded once for all of its crops, as a whole lane is
    # a rank's.
    in_windows = Counter(
        chip
        for span in spans
        for piece in span.pieces
        for chip in zip(*piece.window.rows_and_turns(), strict=True)
        if piece.window.epoch == epoch
    )
    windows = sum(len(span.pieces) for span in spans)
    assert sum(in_windows.values()) - len(in_windows) <= windows - 1
    for parts in rank_spans(spans[0], order, ranks=order.lanes) if order.lanes <= 4 else ():
        assert [(part.first, part.stop) for part in parts] == [(spans[0].first, spans[0].stop)] * order.lanes


def test_the_remainder_of_an_epoch_begins_the_next_one() -> None:
    order = SampleOrder(global_batch=4, window_chips=8)
    epochs = [list(chain(*chain(*dealt(spans_of(np.arange(10), order, epoch), order, 1)))) for epoch in range(3)]
    assert [len(epoch) for epoch in epochs] == [8, 12, 8]
    assert [[sample[0] for sample in epoch[:3]] for epoch in epochs] == [[0, 0, 0], [0, 0, 1], [2, 2, 2]]
    course = Course(epoch_samples=10, global_batch=4)
    assert [course.left_over(n) for n in (1, 2, 3)] == [2, 0, 2]


def test_an_epoch_without_a_whole_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="an epoch of 6 samples has no batch of 8"):
        spans_of(np.arange(3), SampleOrder(crops_per_chip=2, global_batch=8), 0)
