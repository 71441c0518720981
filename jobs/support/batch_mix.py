"""How well a global batch is mixed: from how many shards, and from how many blocks of neighbouring cells, it is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from jobs.support.ranks import of_all_ranks
from pipeline.neighbourhoods import Neighbourhoods

_NONE = torch.iinfo(torch.int64).min


def mixed(rows: Sequence[Tensor], where: Neighbourhoods, shard_chips: int) -> dict[str, list[int]]:
    """By step: shards and blocks of the global batch. All ranks take part, and get the same.

    Args:
        rows: For each step, those of this rank's samples.
        where: The chips' blocks.
        shard_chips: Rows of a shard.
    """
    of_steps = [np.unique(each.cpu().numpy()) for each in rows]
    numbers = {
        "shards": [np.unique(each // shard_chips) for each in of_steps],
        "blocks": [np.unique(where.of(each)) for each in of_steps],
    }
    return {name: distinct_over_ranks([torch.from_numpy(each) for each in steps]) for name, steps in numbers.items()}


def distinct_over_ranks(numbers: Sequence[Tensor]) -> list[int]:
    """How many distinct numbers each step has over all ranks, all of which take part; the same list on each.

    Args:
        numbers: For each step, (n,) int64 of this rank; n may differ.
    """
    longest = int(of_all_ranks(torch.tensor([max(len(each) for each in numbers)])).max())
    own = torch.full((len(numbers), longest), _NONE)
    for row, each in zip(own, numbers, strict=True):
        row[: len(each)] = each
    return num_distinct(of_all_ranks(own.T).T).tolist()


def num_distinct(numbers: Tensor) -> Tensor:
    """(step, n) int64, of which the lowest there is is none -> (step,) how many distinct numbers each has."""
    ordered = numbers.sort(dim=1).values
    first = torch.cat([torch.full_like(ordered[:, :1], _NONE), ordered[:, :-1]], dim=1)
    return (ordered != first).sum(dim=1)
