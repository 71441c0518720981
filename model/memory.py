"""Memory that pretraining takes on one device, counted from the sizes.

The count is of what autograd keeps for the backward pass (`tests/test_model_memory.py` holds it against torch's own
books), not of how an allocator cuts it up, and it supposes attention kernels that keep no scores.
"""

# T tokens, N patches of an image, K kept patches, D width, H heads

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Final

import torch

from model.croma import OPTICAL_CHANNELS, RADAR_CHANNELS, CromaConfig, CromaPretraining, Objective
from model.masking import num_kept

_FLOAT: Final = 4
_CHANNELS: Final = OPTICAL_CHANNELS + RADAR_CHANNELS


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingMemory:
    """Bytes on one device while a step is at its fullest."""

    parameters: int
    """In float32, with a copy in bfloat16 where that is multiplied in."""

    gradients: int
    """With the copies that are exchanged, where there are other ranks."""

    optimizer: int
    """Two moments of AdamW."""

    activations: int
    """Of as many samples as are in memory at a time."""

    inputs: int
    """The whole batch as it comes from the feed and one more that is fetched meanwhile, and pixels in float32 of the
    samples that are in memory at a time."""

    contrast: int
    """Projections of all ranks, and this rank's similarities to them."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(getattr(self, field.name) for field in fields(self))


def training_memory(
    config: CromaConfig,
    *,
    image_px: int,
    batch: int,
    micro_batch: int | None = None,
    num_ranks: int = 1,
    mask_fraction: float = 0.75,
    objective: Objective | None = None,
    bfloat16: bool = True,
    recompute: bool = False,
    window_px: int | None = None,
    sample_bytes: int = 0,
    averaged: bool = False,
) -> TrainingMemory:
    """What a step takes on one device.

    Args:
        config: Sizes.
        image_px: Side of what the model sees.
        batch: Samples of one rank.
        micro_batch: How many of them are in memory at a time; None for all.
        num_ranks: Devices that train together.
        mask_fraction: Share of the patches hidden, for each sensor.
        objective: Its weights decide what is computed.
        bfloat16: What is multiplied in; else float32.
        recompute: Whether only the layers' inputs are kept.
        window_px: Side of what is read of a chip, where images are made smaller from it; None for `image_px`.
        sample_bytes: Of one sample as it comes from the feed.
        averaged: Whether there is an average of the weights beside them.
    """
    objective = objective or Objective()
    with torch.device("meta"):
        model = CromaPretraining(config, objective)
    held = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    at_a_time = min(micro_batch or batch, batch)
    pixels = _CHANNELS * _FLOAT * (image_px**2 + (window_px**2 if window_px not in (None, image_px) else 0))
    num_patches = (image_px // config.patch_px) ** 2
    per_sample = activation_bytes(
        config, num_patches, mask_fraction=mask_fraction, objective=objective, bfloat16=bfloat16, recompute=recompute
    )
    compared = batch * num_ranks
    contrast = 4 * _FLOAT * (batch * compared + compared * config.width) if objective.contrastive_weight else 0
    return TrainingMemory(
        parameters=held * (_FLOAT * (2 if averaged else 1) + (2 if bfloat16 else 0)),
        gradients=trained * _FLOAT * (2 if num_ranks > 1 else 1),
        optimizer=trained * 2 * _FLOAT,
        activations=per_sample * at_a_time,
        inputs=pixels * at_a_time + 2 * sample_bytes * batch,
        contrast=contrast,
    )


def activation_bytes(
    config: CromaConfig,
    num_patches: int,
    *,
    mask_fraction: float = 0.75,
    objective: Objective | None = None,
    bfloat16: bool = True,
    recompute: bool = False,
) -> int:
    """Kept of one sample until its backward pass, see `training_memory`."""
    objective = objective or Objective()
    kept, unit = num_kept(num_patches, mask_fraction), 2 if bfloat16 else _FLOAT
    tokens = kept * config.width
    depths = {OPTICAL_CHANNELS: config.optical_depth, RADAR_CHANNELS: config.radar_depth}
    bias = config.heads * kept**2 * unit
    count, largest = 0, _layer(tokens, unit)
    for channels, depth in depths.items():
        layers = depth * (_FLOAT * tokens if recompute else _layer(tokens, unit))
        # Patches, the layers, the last norm's input and output, the distances.
        count += kept * channels * config.patch_px**2 * unit + layers + 2 * _FLOAT * tokens + bias
    if objective.reconstruction_weight:
        inner, values = num_patches * config.decoder_width, num_patches * _CHANNELS * config.patch_px**2
        largest = _layer(tokens, unit) + _cross(tokens, unit)
        layers = config.joint_depth * (_FLOAT * tokens if recompute else largest)
        count += layers + 2 * _FLOAT * tokens + bias + unit * tokens
        count += config.decoder_depth * _layer(inner, unit) + (_FLOAT + unit) * inner
        # Predictions and targets.
        count += 2 * _FLOAT * values
    return count + (largest if recompute else 0)


def _layer(tokens: int, unit: int) -> int:
    """Kept of an encoder's layer, whose feed-forward part is four times as wide."""
    norms, into_products, to_attention, into_gelu = 2, 1 + 1 + 1 + 4, 3, 4
    # What is attended is what the product after it takes: counted there.
    return (norms * _FLOAT + (into_products + to_attention + into_gelu) * unit) * tokens


def _cross(tokens: int, unit: int) -> int:
    """Kept of cross-attention; the context, normalised, is rounded to bfloat16 once for keys and once for values."""
    norms, into_products, to_attention = 1, 3 + (unit == 2), 3
    return (norms * _FLOAT + (into_products + to_attention) * unit) * tokens
