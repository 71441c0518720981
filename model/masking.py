"""Which patches the encoders see in pretraining (paper section 3.1): for each sensor its own random quarter."""

# B samples, N patches, K kept patches

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from model.randomness import draw

OPTICAL_STREAM = 101
RADAR_STREAM = 102


class Masks(NamedTuple):
    """The patches that stay visible: (B, K) int64 indices per sensor, ascending."""

    optical: Tensor
    radar: Tensor


def draw_masks(keys: Tensor, num_patches: int, *, mask_fraction: float = 0.75, shared: bool = False) -> Masks:
    """Masks that depend on each sample's key alone, not on its batch.

    Args:
        keys: (B,) int64 from `model.randomness.sample_keys`.
        num_patches: N of the grid.
        mask_fraction: Share of the patches to hide, in [0, 1).
        shared: Hide the same patches of both sensors.

    Raises:
        ValueError: When no patch would be kept.
    """
    kept = num_kept(num_patches, mask_fraction)
    if not 0 < kept <= num_patches:
        raise ValueError(f"mask_fraction={mask_fraction} keeps {kept} of {num_patches} patches")
    optical = _keep(keys, num_patches, kept, OPTICAL_STREAM)
    return Masks(optical, optical if shared else _keep(keys, num_patches, kept, RADAR_STREAM))


def num_kept(num_patches: int, mask_fraction: float) -> int:
    """K of N patches, rounded down, as in the reference."""
    return int(num_patches * (1 - mask_fraction))


def removed(kept: Tensor, num_patches: int) -> Tensor:
    """Kept (B, K) -> (B, N) bool, True where the patch is hidden."""
    hidden = torch.ones(kept.shape[0], num_patches, dtype=torch.bool, device=kept.device)
    return hidden.scatter(1, kept, torch.zeros_like(kept, dtype=torch.bool))


def _keep(keys: Tensor, num_patches: int, kept: int, stream: int) -> Tensor:
    """Keys (B,) -> (B, K): the first K of a random order of the patches."""
    return draw(keys, num_patches, stream=stream).argsort(dim=1)[:, :kept].sort(dim=1).values
