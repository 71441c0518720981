"""Completed images: visible patches as they were, hidden ones where and as the loss has them."""

from __future__ import annotations

import pytest
import torch

from model.croma import CromaConfig, CromaPretraining, Objective
from model.layers import patchify
from model.masking import draw_masks, removed
from model.reconstruction import completed, hidden_pixels, unpatchify

SMALL = CromaConfig(width=32, optical_depth=1, radar_depth=1, joint_depth=1, heads=2, decoder_width=16, decoder_heads=2)


def test_patches_put_together_are_the_image_they_were_cut_from() -> None:
    image = torch.rand(2, 3, 24, 40)
    assert torch.equal(unpatchify(patchify(image, 8), 8, 3, 5), image)


@pytest.mark.parametrize("statistics", ["shared", "per_sensor"])
def test_hidden_patches_are_what_the_loss_is_taken_of_and_visible_ones_are_untouched(statistics: str) -> None:
    torch.manual_seed(0)
    model = CromaPretraining(SMALL, Objective(target_statistics=statistics))  # type: ignore[arg-type]
    optical, radar = torch.rand(3, 12, 32, 32), torch.rand(3, 2, 32, 32)
    masks = draw_masks(torch.arange(3), 16)
    made = completed(model, optical, radar, masks)
    for image, after, kept in zip((optical, radar), made, masks, strict=True):
        hidden = hidden_pixels(kept, 8, 4, 4)
        assert hidden.float().mean() == 0.75
        assert torch.equal(after.movedim(1, -1)[~hidden], image.movedim(1, -1)[~hidden])

    # Standardised again, they are as far from the truth as the loss says.
    expected = model.reconstruct(model.encode(optical, radar, masks), optical, radar, masks)
    both, of_made = torch.cat([optical, radar], dim=1), torch.cat(made, dim=1)
    parts = {"optical": slice(0, 12), "radar": slice(12, 14)}
    for (name, part), loss, kept in zip(parts.items(), expected, masks, strict=True):
        over = both if statistics == "shared" else both[:, part]
        deviation = (patchify(over, 8).var(dim=-1) + 1e-6).sqrt()
        error = (patchify(of_made[:, part], 8) - patchify(both[:, part], 8)).square().mean(dim=-1) / deviation**2
        assert error[removed(kept, 16)].mean() == pytest.approx(loss.item(), rel=1e-4), name
