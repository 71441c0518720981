"""How well a global batch is mixed: from how many shards, and from how many blocks of neighbouring cells, it is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from ray.train.torch import get_device
from torch import Tensor, distributed

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
    device = get_device() if distributed.is_initialized() else torch.device("cpu")
    return {
        name: distinct_over_ranks([torch.from_numpy(each).to(device) for each in steps])
        for name, steps in numbers.items()
    }


def distinct_over_ranks(numbers: Sequence[Tensor]) -> list[int]:
    """How many distinct numbers each step has over all ranks, all of which take part; the same list on each.

    Args:
        numbers: For each step, (n,) int64 of this rank; n may differ.
    """
    longest = torch.tensor(max(len(each) for each in numbers), device=numbers[0].device)
    several = distributed.is_initialized()
    if several:
        distributed.all_reduce(longest, op=distributed.ReduceOp.MAX)
    own = torch.full((len(numbers), int(longest)), _NONE, dtype=torch.int64, device=numbers[0].device)
    for row, each in zip(own, numbers, strict=True):
        row[: len(each)] = each
    gathered = [own]
    if several:
        gathered = [torch.empty_like(own) for _ in range(distributed.get_world_size())]
        distributed.all_gather(gathered, own)
    return num_distinct(torch.cat(gathered, dim=1)).tolist()


def num_distinct(numbers: Tensor) -> Tensor:
    """(step, n) int64, of which the lowest there is is none -> (step,) how many distinct numbers each has."""
    ordered = numbers.sort(dim=1).values
    first = torch.cat([torch.full_like(ordered[:, :1], _NONE), ordered[:, :-1]], dim=1)
    return (ordered != first).sum(dim=1)
