"""2D-ALiBi and X-ALiBi: attention biased by the distance between patches (paper section 3.2).

bias[h, i, j] = -slope[h] * euclidean distance between patches i and j, in patch sides. It is never learned, stays
float32 and lies in no state dict: it follows from the grid, so weights serve any image size. Optical and
radar share one grid, so X-ALiBi is the same bias between the patches of the two.
"""

# B samples, H heads, N patches of a grid, Q queries, K keys

from __future__ import annotations

import math

import torch
from torch import Tensor

from model.constants import kept


def slopes(heads: int) -> tuple[float, ...]:
    """One slope per head: 2^(-8/heads), its square, and so on; other counts borrow from the next power of two."""
    power = 2 ** math.floor(math.log2(heads))
    first = tuple(2.0 ** (-8.0 * (head + 1) / power) for head in range(power))
    return first if power == heads else first + slopes(2 * power)[0::2][: heads - power]


def patch_positions(rows: int, columns: int, device: torch.device | str = "cpu") -> Tensor:
    """(N, 2) float32: row and column of each patch of a rows x columns grid, in row-major order."""
    grid = torch.meshgrid(
        torch.arange(rows, device=device, dtype=torch.float32),
        torch.arange(columns, device=device, dtype=torch.float32),
        indexing="ij",
    )
    return torch.stack(grid, dim=-1).reshape(-1, 2)


def distance_bias(queries: Tensor, keys: Tensor, heads: int) -> Tensor:
    """Patch positions queries (..., Q, 2) and keys (..., K, 2) -> bias (..., H, Q, K) float32."""
    # Not torch.cdist: it goes through a matrix product, which autocast would round to bfloat16.
    distance = (queries.unsqueeze(-2) - keys.unsqueeze(-3)).square().sum(-1).sqrt()
    return distance.unsqueeze(-3) * -_slopes_on(queries.device, heads).view(-1, 1, 1)


@kept
def grid_bias(rows: int, columns: int, heads: int, device: torch.device) -> Tensor:
    """Bias (1, H, N, N) float32 between all patches of a grid, kept for the next call with the same grid."""
    positions = patch_positions(rows, columns, device)
    return distance_bias(positions, positions, heads).unsqueeze(0)


@kept
def _slopes_on(device: torch.device, heads: int) -> Tensor:
    """(H,) float32. Filled in one by one: what is made of a list lies on the CPU first, in compiled programs too."""
    return torch.cat([torch.full((1,), slope, device=device) for slope in slopes(heads)])
