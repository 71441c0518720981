"""One step of pretraining and what surrounds it: parameter groups, the learning rate, and what a step reports.

Nothing here knows of files or Ray. Wrapped in DistributedDataParallel, the same step trains on many ranks.
"""

# B samples

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Optimizer

from model.augmentation import draw_squares, resize_squares
from model.croma import CromaPretraining
from model.losses import ContrastiveGradient, Losses, Projections, num_ranks
from model.masking import Masks, draw_masks
from model.normalisation import Normalisation
from model.preprocessing import prepare
from model.randomness import sample_keys


class NonFiniteError(ArithmeticError):
    """The loss or its gradient is not a number; the weights were left as they were."""

    def __init__(self, message: str, *, here: bool = False, values: Mapping[str, float] | None = None) -> None:
        super().__init__(message)
        self.here = here
        """Whether this rank's samples are at fault: those with a reconstruction loss that is not finite, if there are
        any. Contrasts and gradients span all ranks, and are not finite on all of them."""

        self.values = dict(values or {})
        """What the step would have reported on this rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSettings:
    """What a step does besides the arithmetic of the model."""

    seed: int
    """Decides masks, flips and turns, together with the epoch and the sample."""

    mask_fraction: float = 0.75
    """Share of the patches hidden, for each sensor on its own."""

    shared_masks: bool = False
    """Hide the same patches of both sensors."""

    augment: bool = True
    """Flip and turn."""

    scale_sides_px: tuple[int, int] | None = None
    """Scale augmentation: of each window take a random square with a side from the first to the second, and bring it to
    `scaled_px`. The paper has 60 to 180, of windows of 180 px. Unset: the window as it comes."""

    scaled_px: int = 120

    max_gradient_norm: float = 1.0
    """Longer gradients are shortened to this."""

    max_logit_scale: float | None = None
    """Keep the log of the inverse temperature at or below this; ln 100 is usual."""

    bfloat16: bool = False
    """Matrix products in bfloat16. Weights, losses, distances and the sum that a token's layers add to stay float32:
    over 24 layers that takes the error of encodings from 1.7 to 1.3 %, and on GPUs norms work in float32 anyhow."""

    micro_batch: int | None = None
    """Samples whose activations are held at a time; unset: the whole batch. The contrastive loss spans the whole batch
    of all ranks all the same, for a second pass through the two sensors' encoders (gradient caching)."""


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
) -> Losses:
    """The losses of a batch of the feed, on the batch's device; `model` is a CromaPretraining or a wrapper of one.

    Raises:
        ValueError: When a sensor is absent from the batch.
    """
    patch_px = unwrapped(model).config.patch_px
    optical, radar, masks = pretraining_inputs(batch, patch_px=patch_px, normalisation=normalisation, settings=settings)
    with _autocast(optical.device, settings):
        losses: Losses = model(optical, radar, masks)
    return losses


def unwrapped(model: nn.Module) -> CromaPretraining:
    """The model itself, out of DistributedDataParallel and torch.compile in any order."""
    while not isinstance(model, CromaPretraining):
        inner = getattr(model, "_orig_mod" if hasattr(model, "_orig_mod") else "module", None)
        assert isinstance(inner, nn.Module), type(model)
        model = inner
    return model


def pretraining_inputs(
    batch: Mapping[str, Tensor], *, patch_px: int, normalisation: Normalisation, settings: StepSettings
) -> tuple[Tensor, Tensor, Masks]:
    """Optical (B, 12, h, w), radar (B, 2, h, w) and masks of a batch, each sample's decided by its own key alone.

    Args:
        batch: As in `train_step`.
        patch_px: Side of the model's patches, which masks hide.
        normalisation: Means and σ per band.
        settings: The same for all steps of a run.

    Raises:
        ValueError: When a sensor is absent from the batch.
    """
    keys = sample_keys(batch["row"], batch["k"], seed=settings.seed, epoch=batch["epoch"])
    optical, radar = prepare(batch, normalisation, keys=keys if settings.augment else None)
    if optical is None or radar is None:
        raise ValueError("pretraining needs both sensors in every batch")
    if settings.scale_sides_px is not None:
        squares = draw_squares(keys, optical.shape[-1], settings.scale_sides_px)
        optical, radar = (resize_squares(image, squares, settings.scaled_px) for image in (optical, radar))
    num_patches = (optical.shape[-2] // patch_px) * (optical.shape[-1] // patch_px)
    masks = draw_masks(keys, num_patches, mask_fraction=settings.mask_fraction, shared=settings.shared_masks)
    return optical, radar, masks


def accumulate_gradients(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    *,
    normalisation: Normalisation,
    settings: StepSettings,
) -> Losses:
    """Add the gradients of a batch to those of the parameters, `settings.micro_batch` samples at a time.

    In parts, gradients and losses equal those of the whole batch: with a contrastive loss, the projections of all
    parts are computed first without keeping activations, the loss and its gradient follow from those, and then
    each part is run again and carries its share of that gradient back (gradient caching, Gao et al. 2021). That can
    be, because a sample's masks and turns are the same both times.

    Args:
        model: A CromaPretraining, compiled or not; in a DistributedDataParallel ranks exchange gradients once.
        batch: As in `train_step`; equally many samples on every rank.
        normalisation: Means and σ per band.
        settings: The same for all steps of a run.

    Returns:
        The losses of the whole batch, without graph.
    """
    num_samples = len(batch["row"])
    size = min(settings.micro_batch or num_samples, num_samples)
    if size == num_samples:
        losses = pretraining_losses(model, batch, normalisation=normalisation, settings=settings)
        losses.total.backward()  # type: ignore[no-untyped-call]
        return Losses(*(each.detach() for each in losses))

    # Made again in the second pass: inputs in float32 weigh several times what the batch's integers do.
    parts = [{name: values[at : at + size] for name, values in batch.items()} for at in range(0, num_samples, size)]
    plain = unwrapped(model)
    inputs = partial(
        pretraining_inputs,
        patch_px=plain.config.patch_px,
        normalisation=normalisation,
        settings=settings,
    )
    weights = plain.objective
    contrastive = match_fraction = plain.logit_scale.new_zeros(())
    gradients: list[ContrastiveGradient | None] = [None] * len(parts)
    if weights.contrastive_weight:
        projections = []
        for part in parts:
            optical, radar, masks = inputs(part)
            with torch.no_grad(), _autocast(optical.device, settings):
                projections.append(plain.project(plain.encode(optical, radar, masks)))
        contrastive, match_fraction, gradients = _contrastive_gradients(plain, projections)

    from_optical = from_radar = torch.zeros_like(contrastive)
    for index, (part, gradient) in enumerate(zip(parts, gradients, strict=True)):
        share = len(part["row"]) / num_samples
        optical, radar, masks = inputs(part)
        last = index == len(parts) - 1
        with nullcontext() if last else _without_exchange(model):
            with _autocast(optical.device, settings):
                losses = model(optical, radar, masks, gradient)
            (share * losses.total).backward()
        from_optical = from_optical + share * losses.reconstruction_optical.detach()
        from_radar = from_radar + share * losses.reconstruction_radar.detach()
    total = weights.contrastive_weight * contrastive + weights.reconstruction_weight * (from_optical + from_radar)
    return Losses(total, contrastive, from_optical, from_radar, match_fraction)


def _contrastive_gradients(
    model: CromaPretraining, parts: Sequence[Projections]
) -> tuple[Tensor, Tensor, list[ContrastiveGradient | None]]:
    """The contrastive loss of the projections of all parts, the match fraction, and each part's gradient."""
    sizes = [len(part.optical) for part in parts]
    leaves = [torch.cat(sensor).float().requires_grad_() for sensor in zip(*parts, strict=True)]
    contrastive, match_fraction = model.contrast(Projections(*leaves))
    *of_projections, of_scale = torch.autograd.grad(contrastive, [*leaves, model.logit_scale])
    gradients: list[ContrastiveGradient | None] = [
        ContrastiveGradient(optical * sum(sizes) / size, radar * sum(sizes) / size, of_scale)
        for size, optical, radar in zip(sizes, *(torch.split(each, sizes) for each in of_projections), strict=True)
    ]
    return contrastive.detach(), match_fraction, gradients


def _without_exchange(model: nn.Module) -> AbstractContextManager[None]:
    """Leave gradients on their rank for now."""
    parallel = model if isinstance(model, DistributedDataParallel) else getattr(model, "_orig_mod", None)
    return parallel.no_sync() if isinstance(parallel, DistributedDataParallel) else nullcontext()


def _autocast(device: torch.device, settings: StepSettings) -> torch.autocast:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=settings.bfloat16)


def train_step(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    optimizer: Optimizer,
    *,
    normalisation: Normalisation,
    settings: StepSettings,
    learning_rate: float,
) -> dict[str, float]:
    """Learn from one batch.

    Args:
        model: A CromaPretraining in training mode, compiled or not, in a DistributedDataParallel or not.
        batch: One batch of the feed on the model's device: row, k, epoch and what `model.preprocessing.prepare` takes.
        optimizer: From `build_optimizer`.
        normalisation: Means and σ per band.
        settings: The same for all steps of a run.
        learning_rate: For this step.

    Returns:
        loss, contrastive, reconstruction_optical, reconstruction_radar, match_fraction (this rank's), temperature,
        gradient_norm (before clipping) and learning_rate.

    Raises:
        NonFiniteError: On every rank when it is so on any, before the weights change.
    """
    optimizer.zero_grad(set_to_none=True)
    losses = accumulate_gradients(model, batch, normalisation=normalisation, settings=settings)
    gradient_norm = nn.utils.clip_grad_norm_(model.parameters(), settings.max_gradient_norm)
    logit_scale = unwrapped(model).logit_scale
    names = ("loss", "contrastive", "reconstruction_optical", "reconstruction_radar", "match_fraction")
    values = torch.stack([*losses, gradient_norm, (-logit_scale.detach()).exp()])
    # One copy off the device for all of them.
    own = torch.stack([losses.reconstruction_optical, losses.reconstruction_radar])
    *reported, on_ranks, at_fault = torch.cat([values, _ranks_not_finite(values, own)]).tolist()
    report = dict(zip((*names, "gradient_norm", "temperature"), reported, strict=True))
    if on_ranks:
        here = not all(map(math.isfinite, own.tolist() if at_fault else reported))
        raise NonFiniteError(
            f"not finite on {at_fault or on_ranks:.0f} of {num_ranks()} ranks", here=here, values=report
        )
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    if settings.max_logit_scale is not None:
        with torch.no_grad():
            logit_scale.clamp_(max=settings.max_logit_scale)
    return report | {"learning_rate": learning_rate}


def _ranks_not_finite(*groups: Tensor) -> Tensor:
    """(group,) on how many ranks something in each group is not finite: the same on all of them."""
    found = torch.stack([~group.isfinite().all() for group in groups]).to(groups[0].dtype)
    if num_ranks() > 1:
        # A rank that raised alone would leave the others waiting for it in the next step.
        distributed.all_reduce(found)
    return found
