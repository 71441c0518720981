"""One step of pretraining and what surrounds it: parameter groups, the learning rate, and what a step reports.

Nothing here knows of processes, files or Ray. Wrapped in DistributedDataParallel, the same step trains on many ranks.
"""

# B samples

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from model.losses import Losses
from model.masking import draw_masks
from model.normalisation import Normalisation
from model.preprocessing import prepare
from model.randomness import sample_keys


class NonFiniteError(ArithmeticError):
    """The loss or its gradient is not a number; the weights were left as they were."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSettings:
    """What a step does besides the arithmetic of the model."""

    seed: int
    """Decides masks, flips and turns, together with the epoch and the sample."""

    patch_px: int = 8

    mask_fraction: float = 0.75
    """Share of the patches hidden, for each sensor on its own."""

    shared_masks: bool = False
    """Hide the same patches of both sensors."""

    augment: bool = True
    """Flip and turn."""

    max_gradient_norm: float = 1.0
    """Longer gradients are shortened to this."""

    max_logit_scale: float | None = None
    """Keep the log of the inverse temperature at or below this; ln 100 is usual."""

    bfloat16: bool = False
    """Matrix products in bfloat16; weights, bias and losses stay float32."""


def build_optimizer(
    model: nn.Module,
    *,
    weight_decay: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.95),
) -> AdamW:
    """AdamW that decays matrices only: no biases, norms, mask token or temperature.

    The learning rate is 0 until `train_step` sets it.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [each for each in trained if each.dim() >= 2], "weight_decay": weight_decay},
        {"params": [each for each in trained if each.dim() < 2], "weight_decay": 0.0},
    ]
    return AdamW(groups, lr=0.0, betas=betas, fused=True)


def learning_rate(
    samples_seen: int, *, peak: float, warmup_samples: int, total_samples: int, final_fraction: float = 0.0
) -> float:
    """A straight rise to `peak`, then half a cosine down to `final_fraction` of it.

    Counted in samples, so that it does not depend on the batch size or the number of ranks.
    """
    if samples_seen < warmup_samples:
        return peak * samples_seen / warmup_samples
    progress = min(1.0, (samples_seen - warmup_samples) / max(1, total_samples - warmup_samples))
    return peak * (final_fraction + (1 - final_fraction) * 0.5 * (1 + math.cos(math.pi * progress)))


def pretraining_losses(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    *,
    normalisation: Normalisation,
    settings: StepSettings,
    epoch: int,
) -> Losses:
    """The losses of a batch of the feed, on the batch's device; `model` is a CromaPretraining or a wrapper of one.

    Raises:
        ValueError: When a sensor is absent from the batch.
    """
    keys = sample_keys(batch["row"], batch["k"], seed=settings.seed, epoch=epoch)
    optical, radar = prepare(batch, normalisation, keys=keys if settings.augment else None)
    if optical is None or radar is None:
        raise ValueError("pretraining needs both sensors in every batch")
    num_patches = (optical.shape[-2] // settings.patch_px) * (optical.shape[-1] // settings.patch_px)
    masks = draw_masks(keys, num_patches, mask_fraction=settings.mask_fraction, shared=settings.shared_masks)
    with torch.autocast(optical.device.type, dtype=torch.bfloat16, enabled=settings.bfloat16):
        losses: Losses = model(optical, radar, masks)
    return losses


def train_step(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    optimizer: Optimizer,
    *,
    normalisation: Normalisation,
    settings: StepSettings,
    epoch: int,
    learning_rate: float,
) -> dict[str, float]:
    """Learn from one batch.

    Args:
        model: A CromaPretraining or a DistributedDataParallel of one, in training mode.
        batch: One batch of the feed on the model's device: row, k and what `model.preprocessing.prepare` takes.
        optimizer: From `build_optimizer`.
        normalisation: Means and σ per band.
        settings: The same for all steps of a run.
        epoch: Counted from 0.
        learning_rate: For this step.

    Returns:
        loss, contrastive, reconstruction_optical, reconstruction_radar, match_fraction (this rank's), temperature,
        gradient_norm (before clipping) and learning_rate.

    Raises:
        NonFiniteError: Before the weights change. As gradients are averaged over ranks, all ranks raise together.
    """
    losses = pretraining_losses(model, batch, normalisation=normalisation, settings=settings, epoch=epoch)
    optimizer.zero_grad(set_to_none=True)
    losses.total.backward()  # type: ignore[no-untyped-call]
    gradient_norm = nn.utils.clip_grad_norm_(model.parameters(), settings.max_gradient_norm)
    logit_scale = _logit_scale(model)
    names = ("loss", "contrastive", "reconstruction_optical", "reconstruction_radar", "match_fraction")
    # One copy off the device for all of them.
    values = torch.stack([*(each.detach() for each in losses), gradient_norm, (-logit_scale.detach()).exp()]).tolist()
    report = dict(zip((*names, "gradient_norm", "temperature"), values, strict=True))
    if not (math.isfinite(report["loss"]) and math.isfinite(report["gradient_norm"])):
        raise NonFiniteError(f"not finite: {report}; chips in rows {batch['row'].tolist()}")
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    if settings.max_logit_scale is not None:
        with torch.no_grad():
            logit_scale.clamp_(max=settings.max_logit_scale)
    return report | {"learning_rate": learning_rate}


def _logit_scale(model: nn.Module) -> Tensor:
    unwrapped = getattr(model, "module", model)
    scale = unwrapped.logit_scale
    assert isinstance(scale, Tensor), type(unwrapped)
    return scale
