"""How many shards a batch mixes, counted over ranks; over real ranks in test_pretrain_sources."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from jobs.support.batch_mix import num_distinct, shards_over_ranks


@given(steps=st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=12), min_size=1, max_size=6))
def test_distinct_numbers_are_those_of_a_set(steps: list[list[int]]) -> None:
    widest = max(map(len, steps))
    padded = torch.tensor([[*each, *[-1] * (widest - len(each))] for each in steps])
    assert num_distinct(padded).tolist() == [len(set(each)) for each in steps]
    assert shards_over_ranks([torch.tensor(each) for each in steps]) == [len(set(each)) for each in steps]
