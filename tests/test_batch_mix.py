"""How many shards and blocks a batch mixes, counted over ranks; over real ranks in test_pretrain_sources."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from jobs.support.batch_mix import distinct_over_ranks, mixed, num_distinct
from pipeline.neighbourhoods import Neighbourhoods


@given(steps=st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=12), min_size=1, max_size=6))
def test_distinct_numbers_are_those_of_a_set(steps: list[list[int]]) -> None:
    widest = max(map(len, steps))
    padded = torch.tensor([[*each, *[torch.iinfo(torch.int64).min] * (widest - len(each))] for each in steps])
    assert num_distinct(padded).tolist() == [len(set(each)) for each in steps]
    assert distinct_over_ranks([torch.tensor(each) for each in steps]) == [len(set(each)) for each in steps]


def test_a_batch_is_of_the_shards_and_blocks_of_its_rows() -> None:
    where = Neighbourhoods(starts=np.array([0, 3, 8, 11]), blocks=np.array([5, 7, 5, 9]))
    batches = [torch.tensor([1, 2, 9, 9]), torch.tensor([3, 10, 12]), torch.tensor([4])]
    assert mixed(batches, where, shard_chips=8) == {"shards": [2, 2, 1], "blocks": [1, 3, 1]}
