"""How well a global batch is mixed: from how many shards its samples are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, distributed

_NONE = -1


def shards_over_ranks(shards: Sequence[Tensor]) -> list[int]:
    """Distinct shards of each step over all ranks, all of which take part; the same list on each.

    Args:
        shards: For each step, (n,) numbers of the shards of this rank's samples; n may differ.
    """
    longest = torch.tensor(max(len(each) for each in shards), device=shards[0].device)
    several = distributed.is_initialized()
    if several:
        distributed.all_reduce(longest, op=distributed.ReduceOp.MAX)
    own = torch.full((len(shards), int(longest)), _NONE, dtype=torch.int64, device=shards[0].device)
    for row, each in zip(own, shards, strict=True):
        row[: len(each)] = each
    gathered = [own]
    if several:
        gathered = [torch.empty_like(own) for _ in range(distributed.get_world_size())]
        distributed.all_gather(gathered, own)
    return num_distinct(torch.cat(gathered, dim=1)).tolist()


def num_distinct(numbers: Tensor) -> Tensor:
    """(step, n), of which -1 is none -> (step,) how many distinct numbers each has."""
    ordered = numbers.sort(dim=1).values
    first = torch.cat([torch.full_like(ordered[:, :1], _NONE), ordered[:, :-1]], dim=1)
    return (ordered != first).sum(dim=1)
