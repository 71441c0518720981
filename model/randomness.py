"""Random numbers that belong to a sample: a hash of (seed, epoch, row, k), never a generator's state.

What is drawn for a sample is the same on every rank, in every batch composition and after every resume.
The hash is splitmix64 (Steele, Lea and Flood 2014) on int64 tensors, whose products wrap around as uint64's do.
"""

# B samples, C draws per sample

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

_STEP: Final = 0x9E3779B97F4A7C15 - 2**64
_FIRST: Final = 0xBF58476D1CE4E5B9 - 2**64
_SECOND: Final = 0x94D049BB133111EB - 2**64


def sample_keys(row: Tensor, k: Tensor, *, seed: int, epoch: int | Tensor) -> Tensor:
    """One key per sample, from which everything random about it follows.

    Args:
        row: (B,) integers, the chip's row in the store.
        k: (B,) integers, which crop of the chip.
        seed: Of the run, any int64.
        epoch: Counted from 0; (B,) where samples are of several.

    Returns:
        (B,) int64.
    """
    key = torch.full_like(row, seed, dtype=torch.int64)
    epochs = torch.as_tensor(epoch, dtype=torch.int64, device=key.device)
    for part in (epochs.expand_as(key), row.long(), k.long()):
        key = _mix(key) ^ part
    return _mix(key)


def draw(keys: Tensor, count: int, *, stream: int) -> Tensor:
    """Keys (B,) -> (B, count) int64 with 64 random bits each; different streams are independent."""
    state = _mix(keys ^ stream)[:, None]
    return _mix(state + _STEP * torch.arange(count, device=keys.device))


def uniform(keys: Tensor, count: int, *, stream: int) -> Tensor:
    """Keys (B,) -> (B, count) float64 in [0, 1)."""
    return _shift(draw(keys, count, stream=stream), 11).double() * 2.0**-53


def _mix(state: Tensor) -> Tensor:
    state = state + _STEP
    state = (state ^ _shift(state, 30)) * _FIRST
    state = (state ^ _shift(state, 27)) * _SECOND
    return state ^ _shift(state, 31)


def _shift(state: Tensor, bits: int) -> Tensor:
    # int64's own >> copies the sign bit in from the left.
    return (state >> bits) & ((1 << (64 - bits)) - 1)
