"""The two objectives (paper section 3.1): which radar chip belongs to which optical one, and what a mask hides."""

# B samples on this rank, G samples on all ranks, N patches, V values per patch, D width

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed
from torch.nn import functional


class Losses(NamedTuple):
    """Scalars of one batch; `total` is what training minimises, and what has no weight in it is 0."""

    total: Tensor
    contrastive: Tensor
    """InfoNCE in nats, mean over both directions and this rank's samples; ln G when nothing is learned."""

    reconstruction_optical: Tensor
    """Mean squared error of hidden optical patches; about 1 when nothing is learned."""

    reconstruction_radar: Tensor
    """The same for radar."""

    match_fraction: Tensor
    """Share of this rank's chips whose own partner is the nearest of all G, mean over both directions."""


class Projections(NamedTuple):
    """What the contrastive loss compares: (B, D) per sensor, row by row partners."""

    optical: Tensor
    radar: Tensor


class ContrastiveGradient(NamedTuple):
    """Gradient of a contrastive loss that was computed before, over more samples than these B.

    In units of this part's own mean: scaled up by (all samples of the rank) / B.
    """

    optical: Tensor
    """(B, D), with respect to the projections."""

    radar: Tensor
    """(B, D)."""

    logit_scale: Tensor
    """Scalar, of the whole loss."""

    def carry(self, projections: Projections, logit_scale: Tensor) -> Tensor:
        """A scalar that has this gradient; its value says nothing."""
        return (
            (projections.optical.float() * self.optical).sum()
            + (projections.radar.float() * self.radar).sum()
            + logit_scale * self.logit_scale
        )


class _Gather(torch.autograd.Function):
    """All ranks' features in rank order; each rank gets back the gradients that all ranks sent to its own."""

    @staticmethod
    def forward(ctx: Any, features: Tensor) -> Tensor:
        gathered = [torch.empty_like(features) for _ in range(distributed.get_world_size())]
        distributed.all_gather(gathered, features.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        summed = gradient.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(summed)
        return summed.chunk(distributed.get_world_size())[distributed.get_rank()]


def num_ranks() -> int:
    """Size of the default process group; 1 without one."""
    ready = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if ready else 1


def info_nce(projections: Projections, logit_scale: Tensor, *, gathered_gradient: bool = True) -> tuple[Tensor, Tensor]:
    """Contrast this rank's chips with those of all ranks.

    Each rank scores its own rows. The mean over ranks is the loss of the whole batch, and gradients averaged over
    ranks (as DistributedDataParallel does) are those of one process that holds the whole batch. Every rank brings
    equally many chips; that is not looked at here, because asking the others would make the device wait in every step.
    The feed drops what does not fill a batch, and TORCH_DISTRIBUTED_DEBUG=DETAIL makes torch compare the sizes.

    Args:
        projections: (B, D) of each sensor.
        logit_scale: Scalar, log of the inverse temperature.
        gathered_gradient: False lets no gradient through gathered features, as the reference does.

    Returns:
        The loss, and the share of chips whose partner is the nearest; scalars.
    """
    # Similarities of a large batch differ by less than bfloat16 resolves.
    with torch.autocast(logit_scale.device.type, enabled=False):
        optical, radar = (functional.normalize(each.float(), dim=-1) for each in projections)
        all_optical, all_radar = optical, radar
        first = 0
        if num_ranks() > 1:
            first = distributed.get_rank() * optical.shape[0]
            gathered: Tensor = _Gather.apply(torch.cat([optical, radar], dim=1))  # type: ignore[no-untyped-call]
            all_optical, all_radar = gathered.chunk(2, dim=1)
        if not gathered_gradient:
            all_optical, all_radar = all_optical.detach(), all_radar.detach()
        scale = logit_scale.exp()
        partner = first + torch.arange(optical.shape[0], device=optical.device)
        logits = [scale * optical @ all_radar.T, scale * radar @ all_optical.T]  # each (B, G)
        loss = torch.stack([functional.cross_entropy(each, partner) for each in logits]).mean()
        nearest = torch.stack([each.detach().argmax(dim=1) == partner for each in logits])
    return loss, nearest.float().mean()


def patch_targets(patches: Tensor) -> Tensor:
    """Patches (B, N, V) -> the same, each with mean 0 and (unbiased) variance 1 over its V values."""
    # torch.var_mean and a chain of fresh tensors take several times as long on a CPU.
    patches = patches.float()
    centred = patches - patches.mean(dim=-1, keepdim=True)
    variance = torch.linalg.vector_norm(centred, dim=-1, keepdim=True).square() / (patches.shape[-1] - 1)
    return centred.mul_((variance + 1e-6).rsqrt())


def reconstruction_loss(predicted: Tensor, target: Tensor, hidden: Tensor) -> Tensor:
    """Mean squared error over the values of hidden patches: (B, N, V), (B, N, V), hidden (B, N) bool -> scalar."""
    error = functional.mse_loss(predicted.float(), target.float(), reduction="none").mean(dim=-1)
    return (error * hidden).sum() / hidden.sum()
