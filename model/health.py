"""What losses do not tell of representations: how much of their space they use, and how far sensors agree in it.

A contrastive loss can fall while embeddings shrink to a few directions; rank and spread say so. Alignment and
uniformity are the two things that it balances (Wang & Isola 2020).
"""

# B samples, D width

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from model.croma import CromaPretraining
from model.losses import Projections
from model.normalisation import Normalisation
from model.training import StepSettings, pretraining_inputs


class Representations(NamedTuple):
    """Of a batch as it is trained on, masks included."""

    optical: Tensor
    """(B, D), mean of the visible patches' encodings."""

    radar: Tensor
    """(B, D)."""

    projections: Projections | None
    """What the contrastive loss compares; None where it has no weight."""


@torch.no_grad()
def representations(
    model: CromaPretraining,
    batch: Mapping[str, Tensor],
    *,
    normalisation: Normalisation,
    settings: StepSettings,
) -> Representations:
    """Encode a batch of the feed once more, in float32 out; neither weights nor any generator's state change.

    Args:
        model: Unwrapped.
        batch: As in `model.training.train_step`.
        normalisation: Means and σ per band.
        settings: The same for all steps of a run.
    """
    optical, radar, masks = pretraining_inputs(
        batch, patch_px=model.config.patch_px, normalisation=normalisation, settings=settings
    )
    with torch.autocast(optical.device.type, dtype=torch.bfloat16, enabled=settings.bfloat16):
        visible = model.encode(optical, radar, masks)
        projections = model.project(visible) if model.objective.contrastive_weight else None
    return Representations(
        visible.optical.float().mean(dim=1),
        visible.radar.float().mean(dim=1),
        None if projections is None else Projections(*(each.float() for each in projections)),
    )


def health(found: Representations) -> dict[str, float]:
    """Numbers of the representations of two samples or more.

    Returns:
        Per sensor rank_optical and rank_radar, see `effective_rank`, and spread_optical and spread_radar, see `spread`;
        with projections also alignment, uniformity_optical and uniformity_radar.
    """
    sensors = {"optical": found.optical, "radar": found.radar}
    told = {f"rank_{name}": effective_rank(each) for name, each in sensors.items()}
    told |= {f"spread_{name}": spread(each) for name, each in sensors.items()}
    if found.projections is not None:
        told["alignment"] = alignment(found.projections)
        for name, each in found.projections._asdict().items():
            told[f"uniformity_{name}"] = uniformity(each)
    # One copy off the device for all of them.
    values: list[float] = torch.stack(list(told.values())).tolist()
    return dict(zip(told, values, strict=True))


def effective_rank(embeddings: Tensor) -> Tensor:
    """(B, D) -> how many directions they spread over: exp of the entropy of their variance's shares per direction.

    From 1 to min(B - 1, D); Roy & Vetterli (2007), of variances instead of singular values.
    """
    variances = torch.linalg.svdvals(embeddings - embeddings.mean(dim=0)).square()
    shares = variances / variances.sum().clamp_min(torch.finfo(variances.dtype).tiny)
    rank: Tensor = torch.special.entr(shares).sum().exp()
    return rank


def spread(embeddings: Tensor) -> Tensor:
    """(B, D) -> variance of the unit vectors around their mean: 0 where all are one, near 1 where none are alike."""
    directions = functional.normalize(embeddings, dim=-1)
    return directions.var(dim=0, correction=0).sum()


def alignment(projections: Projections) -> Tensor:
    """Mean squared distance of partners on the unit sphere: 0 when they are the same, 2 when nothing is learned."""
    optical, radar = (functional.normalize(each, dim=-1) for each in projections)
    return (optical - radar).square().sum(dim=-1).mean()


def uniformity(projections: Tensor) -> Tensor:
    """(B, D) -> log of the mean Gaussian potential between samples on the unit sphere.

    0 where all are one, toward -4 where they are spread evenly over the sphere.
    """
    distances = torch.pdist(functional.normalize(projections, dim=-1))
    return distances.square().mul(-2).exp().mean().log()
