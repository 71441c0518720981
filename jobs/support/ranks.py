"""What all ranks have, on each of them."""

from __future__ import annotations

import torch
from ray.train.torch import get_device
from torch import Tensor, distributed

from model.losses import num_ranks


def of_all_ranks(values: Tensor) -> Tensor:
    """(B, ...) of each rank, B being equal -> (ranks * B, ...) in rank order, on the device ranks exchange from."""
    if num_ranks() == 1:
        return values
    own = values.to(get_device()).contiguous()
    gathered = [torch.empty_like(own) for _ in range(num_ranks())]
    distributed.all_gather(gathered, own)
    return torch.cat(gathered)
