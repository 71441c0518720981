"""Which ranks share a process that deals out to them, and that no CPU is left without work for it."""

from __future__ import annotations

from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.support.dealing import dealt_together


@given(num_ranks=st.integers(1, 100), spare=st.lists(st.integers(0, 64), min_size=1, max_size=20))
def test_every_rank_is_in_one_group_and_most_cpus_are_used(num_ranks: int, spare: list[int]) -> None:
    groups = dealt_together(num_ranks, spare)
    assert list(chain(*groups)) == list(range(num_ranks))
    assert max(map(len, groups)) - min(map(len, groups)) <= 1
    number = len(groups)
    # What Ray gives to each of them.
    assert number == 1 or number * sum(cpus // number for cpus in spare) >= 0.8 * sum(spare)


@pytest.mark.parametrize(
    ("num_ranks", "spare", "expected"),
    [
        (8, [4], 1),
        # A group per node of eight GPUs, if each has CPUs for all groups.
        (64, [24] * 8, 8),
        (64, [24] * 8 + [64] * 4, 8),
        # Seven CPUs of each node are of use to seven groups, not to eight.
        (64, [7] * 64, 7),
        (64, [2] * 64, 2),
        (16, [1, 1], 1),
        (64, [0] * 8, 8),
    ],
)
def test_as_many_groups_as_nodes_have_cpus_for(num_ranks: int, spare: list[int], expected: int) -> None:
    assert len(dealt_together(num_ranks, spare)) == expected
