"""Images as the model completes them, to be looked at: training never makes them."""

# B samples, C channels, P patch side in px, N = rows x columns patches, V values per patch

from __future__ import annotations

import torch
from torch import Tensor

from model.croma import OPTICAL_CHANNELS, CromaPretraining
from model.layers import patchify
from model.masking import Masks, removed


@torch.no_grad()
def completed(model: CromaPretraining, optical: Tensor, radar: Tensor, masks: Masks) -> tuple[Tensor, Tensor]:
    """Images whose hidden patches are the model's, and whose visible ones are as they were given.

    The model predicts patches of mean 0 and variance 1. Each gets the mean and the deviation back that it has in truth,
    which nobody asked the model for: what is shown of it is the pattern, not the brightness.

    Args:
        model: As trained; its objective says over what values a patch was standardised.
        optical: (B, 12, H, W), normalised to [0, 1].
        radar: (B, 2, H, W), normalised to [0, 1].
        masks: Patches that stay visible, (B, K) per sensor.

    Returns:
        Optical (B, 12, H, W) and radar (B, 2, H, W), of the same scale, not clipped.
    """
    patch_px = model.config.patch_px
    rows, columns = optical.shape[-2] // patch_px, optical.shape[-1] // patch_px
    predicted = model.predict(model.encode(optical, radar, masks), masks, rows, columns).float()
    split = OPTICAL_CHANNELS * patch_px**2
    truth = patchify(torch.cat([optical, radar], dim=1), patch_px)
    per_sensor = model.objective.target_statistics == "per_sensor"
    images = []
    for part, kept, image in (
        (slice(None, split), masks.optical, optical),
        (slice(split, None), masks.radar, radar),
    ):
        standard = truth[..., part] if per_sensor else truth
        deviation = (standard.var(dim=-1, keepdim=True) + 1e-6).sqrt()
        restored = predicted[..., part] * deviation + standard.mean(dim=-1, keepdim=True)
        hidden = removed(kept, rows * columns)[..., None]
        values = torch.where(hidden, restored, truth[..., part])
        images.append(unpatchify(values, patch_px, rows, columns).to(image.dtype))
    return images[0], images[1]


def unpatchify(patches: Tensor, patch_px: int, rows: int, columns: int) -> Tensor:
    """The inverse of `model.layers.patchify`: (B, N, C * P * P) -> (B, C, rows * P, columns * P)."""
    cut = patches.reshape(patches.shape[0], rows, columns, -1, patch_px, patch_px)
    return cut.permute(0, 3, 1, 4, 2, 5).reshape(patches.shape[0], -1, rows * patch_px, columns * patch_px)


def hidden_pixels(kept: Tensor, patch_px: int, rows: int, columns: int) -> Tensor:
    """Kept (B, K) -> (B, rows * P, columns * P) bool, True where the encoder saw nothing."""
    hidden = removed(kept, rows * columns).view(-1, rows, columns)
    return hidden.repeat_interleave(patch_px, dim=1).repeat_interleave(patch_px, dim=2)
