"""Several sources mixed by weight: each gives its share, goes round whole, and an interrupted run sees the same."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from fractions import Fraction
from itertools import chain

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from numpy.typing import NDArray

from pipeline.epochs import SampleOrder
from pipeline.mixture import Part, parts_by_weight, pooled, stretches
from pipeline.positions import Course
from tests.test_positions import dealt, spans_of, undisturbed

SHARD_CHIPS = 8

some_parts = st.lists(
    st.builds(Part, num_chips=st.integers(1, 60), taken=st.integers(1, 90)), min_size=1, max_size=4
).map(tuple)


def rows_of(parts: tuple[Part, ...], seed: int = 0) -> list[NDArray[np.int64]]:
    """Rows of each source with holes; each begins at a shard of its own."""
    rng = np.random.default_rng(seed)
    found, first = [], 0
    for part in parts:
        rows = first + np.sort(rng.choice(2 * part.num_chips, part.num_chips, replace=False))
        found.append(rows.astype(np.int64))
        first = (int(rows[-1]) // SHARD_CHIPS + 1) * SHARD_CHIPS
    return found


def source_of(rows: list[NDArray[np.int64]]) -> dict[int, int]:
    return {row: number for number, each in enumerate(rows) for row in each.tolist()}


@given(
    sources=st.lists(st.tuples(st.integers(1, 10**6), st.floats(0.01, 100)), min_size=1, max_size=6),
)
def test_shares_are_the_weights_to_a_chip_and_an_epoch_has_as_many_chips_as_there_are(
    sources: list[tuple[int, float]],
) -> None:
    chips, weights = zip(*sources, strict=True)
    parts = parts_by_weight(chips, weights)
    assert [part.num_chips for part in parts] == list(chips)
    assert sum(part.taken for part in parts) == sum(chips)
    exact = [sum(map(Fraction, chips)) * Fraction(weight) / sum(map(Fraction, weights)) for weight in weights]
    if min(exact) >= 1:
        assert all(abs(part.taken - each) <= 1 for part, each in zip(parts, exact, strict=True))
    assert all(part.taken >= 1 for part in parts)


@given(parts=some_parts, seed=st.integers(0, 3), epochs=st.integers(1, 8))
@settings(max_examples=150)
def test_a_source_gives_all_of_its_chips_before_any_comes_again(
    parts: tuple[Part, ...], seed: int, epochs: int
) -> None:
    rows = rows_of(parts)
    where = source_of(rows)
    taken: list[list[tuple[int, int, int]]] = [[] for _ in parts]
    for epoch in range(epochs):
        of_epoch = stretches(np.concatenate(rows), parts, shard_chips=SHARD_CHIPS, seed=seed, epoch=epoch)
        for stretch in of_epoch:
            assert len({row // SHARD_CHIPS for row in stretch.rows.tolist()}) == 1
            for row in stretch.rows.tolist():
                taken[where[row]].append((epoch, stretch.turn, row))
    for part, chips, own in zip(parts, taken, rows, strict=True):
        assert len(chips) == epochs * part.taken
        # In the order in which an epoch is read, a source's stretches are in the order of its rounds.
        for start in range(0, len(chips), part.num_chips):
            round_ = [row for *_, row in chips[start : start + part.num_chips]]
            assert len(set(round_)) == len(round_)
            if len(round_) == part.num_chips:
                assert sorted(round_) == own.tolist()
        assert len(set(chips)) == len(chips), "a chip comes twice in a turn"


@given(
    parts=some_parts,
    order=st.builds(
        SampleOrder,
        seed=st.integers(0, 3),
        crops_per_chip=st.integers(1, 3),
        global_batch=st.sampled_from([12, 24]),
        lanes=st.sampled_from([1, 2, 4, 12]),
        window_chips=st.integers(1, 30),
    ),
    epochs=st.integers(1, 4),
    interruptions=st.lists(st.tuples(st.integers(0, 12), st.integers(1, 4), st.sampled_from([1, 2, 3, 4])), max_size=5),
)
@example(
    # A small source four times over beside a large one that gives a part of its chips; 4 -> 2 -> 3 ranks.
    parts=(Part(num_chips=5, taken=20), Part(num_chips=60, taken=33)),
    order=SampleOrder(global_batch=12, lanes=2, window_chips=16, crops_per_chip=2),
    epochs=3,
    interruptions=[(3, 2, 4), (4, 1, 2), (7, 3, 3)],
)
@settings(max_examples=120)
def test_an_interrupted_run_over_a_mixture_sees_every_sample_once(
    parts: tuple[Part, ...],
    order: SampleOrder,
    epochs: int,
    interruptions: list[tuple[int, int, int]],
) -> None:
    """Each interruption: steps that are taken, steps between checkpoints, ranks."""
    order = replace(order, parts=parts)
    of_sources = rows_of(parts)
    rows = np.concatenate(of_sources)
    epoch_samples = sum(part.taken for part in parts) * order.crops_per_chip
    assume(epoch_samples >= order.global_batch)
    course = Course(epoch_samples=epoch_samples, global_batch=order.global_batch)
    kept: list[list[tuple[int, int, int]]] = []
    seen = 0
    for steps, between, ranks in [*interruptions, (10**6, 1, 3)]:
        batches = []
        for epoch in range(course.epoch_of(seen), epochs):
            batches += [list(chain(*each)) for each in dealt(spans_of(rows, order, epoch, seen), order, ranks)]
        taken = batches[:steps]
        safe = len(taken) if len(taken) == len(batches) else len(taken) // between * between
        kept += taken[:safe]
        seen += safe * order.global_batch
    everything = list(chain(*kept))
    assert everything == undisturbed(rows, order, epochs)
    assert max(Counter(everything).values()) == 1, "a sample comes twice"
    where = source_of(of_sources)
    # Of the last one some samples are left over.
    for epoch in range(epochs - 1):
        shares = Counter(where[row] for each, row, _ in everything if each == epoch)
        assert [shares[n] for n in range(len(parts))] == [part.taken * order.crops_per_chip for part in parts]


@given(rows=st.integers(36, 70).map(np.arange), seed=st.integers(0, 3), epoch=st.integers(0, 3))
def test_one_source_taken_whole_gives_what_a_store_alone_does(rows: NDArray[np.int64], seed: int, epoch: int) -> None:
    rows = rows[: len(rows) // 12 * 12]
    plain = SampleOrder(seed=seed, global_batch=12)
    mixed = replace(plain, parts=(Part(num_chips=len(rows), taken=len(rows)),))
    found, expected = (undisturbed(rows, order, epoch + 1)[-len(rows) :] for order in (mixed, plain))
    assert sorted(found) == sorted(expected)


def test_a_batch_mixes_sources_in_their_shares() -> None:
    parts = parts_by_weight([4000, 400, 2000], [6.0, 3.0, 1.0])
    of_sources = rows_of(parts)
    where = source_of(of_sources)
    # Windows of many shards, as they are beside batches of thousands.
    order = SampleOrder(global_batch=400, window_chips=400, parts=parts)
    for epoch in range(3):
        for (batch,) in dealt(spans_of(np.concatenate(of_sources), order, epoch), order, 1):
            shares = Counter(where[row] for _, row, _ in batch)
            for number, share in enumerate((0.6, 0.3, 0.1)):
                assert abs(shares[number] / 400 - share) < 0.06, (epoch, shares)


def test_parts_that_are_not_the_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="said to have 9 chips, but there are 8"):
        stretches(np.arange(8), [Part(num_chips=9, taken=1)], shard_chips=4, seed=0, epoch=0)
    with pytest.raises(ValueError, match="both must be positive"):
        Part(num_chips=0, taken=1)


@given(seed=st.integers(0, 100), shares=st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_pooled_statistics_are_those_of_all_values(seed: int, shares: list[int]) -> None:
    rng = np.random.default_rng(seed)
    values = [rng.normal(rng.uniform(-5, 5), rng.uniform(0.1, 3), (20, 2)) for _ in shares]
    everything = np.concatenate([np.tile(each, (share, 1)) for each, share in zip(values, shares, strict=True)])
    mean, std = pooled(np.array([v.mean(axis=0) for v in values]), np.array([v.std(axis=0) for v in values]), shares)
    assert_allclose(mean, everything.mean(axis=0), atol=1e-9)
    assert_allclose(std, everything.std(axis=0), atol=1e-9)
