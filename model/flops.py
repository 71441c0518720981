"""Floating-point operations per sample, counted from the sizes: what a step's speed is compared with the hardware's by.

Matrix products and attention count, 2 per multiply and add; norms, GELU, softmax and losses do not. This is the work of
the model, not of an implementation: what activation checkpointing or gradient caching computes twice counts once.
"""

# N patches of an image, K kept patches, D width

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from model.croma import OPTICAL_CHANNELS, RADAR_CHANNELS, CromaConfig, Objective
from model.masking import num_kept

SENSORS: Final = ("optical", "radar")

TRAINING_FACTOR: Final = 3
"""Of a forward pass: the backward pass takes gradients of both the inputs and the weights of each product."""


def inference_flops(config: CromaConfig, num_patches: int, *, sensors: Collection[str] = SENSORS) -> int:
    """Of `Croma.forward` for one sample of `num_patches` patches, given one or both sensors."""
    flops = sum(_sensor(config, num_patches, sensor) + _head(config) for sensor in sensors)
    return flops + (_joint(config, num_patches) if set(SENSORS) <= set(sensors) else 0)


def pretraining_flops(
    config: CromaConfig,
    num_patches: int,
    *,
    mask_fraction: float = 0.75,
    num_contrasted: int = 1,
    objective: Objective | None = None,
) -> int:
    """Of `CromaPretraining.forward` for one sample; a training step takes `TRAINING_FACTOR` times as many.

    Args:
        config: Sizes.
        num_patches: N of the grid.
        mask_fraction: Share of the patches hidden, for each sensor.
        num_contrasted: Samples on all ranks, which each sample is compared with.
        objective: Its weights decide what is computed.
    """
    objective = objective or Objective()
    width, kept = config.width, num_kept(num_patches, mask_fraction)
    flops = sum(_sensor(config, kept, sensor) for sensor in SENSORS)
    if objective.contrastive_weight:
        projection, similarity = 2 * width**2, 2 * num_contrasted * width
        flops += len(SENSORS) * (_head(config) + projection + similarity)
    if objective.reconstruction_weight:
        inner, values = config.decoder_width, (OPTICAL_CHANNELS + RADAR_CHANNELS) * config.patch_px**2
        layers = config.decoder_depth * _layer(num_patches, inner)
        flops += _joint(config, kept) + 2 * kept * width * inner + layers + 2 * num_patches * inner * values
    return flops


def _layer(tokens: int, width: int) -> int:
    """Self-attention (queries, keys, values, output: 4 D²) and feed-forward (twice 4 D²)."""
    return 2 * tokens * 12 * width**2 + _attention(tokens, width)


def _attention(tokens: int, width: int) -> int:
    """Queries by keys, and weights by values, over all heads."""
    return 2 * 2 * tokens**2 * width


def _sensor(config: CromaConfig, tokens: int, sensor: str) -> int:
    channels, depth = {
        "optical": (OPTICAL_CHANNELS, config.optical_depth),
        "radar": (RADAR_CHANNELS, config.radar_depth),
    }[sensor]
    embedding = 2 * tokens * channels * config.patch_px**2 * config.width
    return embedding + depth * _layer(tokens, config.width)


def _joint(config: CromaConfig, tokens: int) -> int:
    """As a sensor's layers, with cross-attention (4 D² more) in each."""
    cross = 2 * tokens * 4 * config.width**2 + _attention(tokens, config.width)
    return config.joint_depth * (_layer(tokens, config.width) + cross)


def _head(config: CromaConfig) -> int:
    return 2 * 8 * config.width**2
