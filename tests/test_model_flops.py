"""Operations per sample, against torch's own counter."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model.croma import BASE, LARGE, TINY, Croma, CromaConfig, CromaPretraining, Objective
from model.flops import TRAINING_FACTOR, inference_flops, pretraining_flops
from model.masking import draw_masks

CONFIGS = [TINY, CromaConfig(width=48, optical_depth=3, radar_depth=1, joint_depth=2, heads=4, decoder_width=32)]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("sensors", [("optical",), ("radar",), ("optical", "radar")])
def test_inference_is_counted_exactly(config: CromaConfig, sensors: tuple[str, ...]) -> None:
    images = {"optical": torch.rand(3, 12, 48, 64), "radar": torch.rand(3, 2, 48, 64)}
    given = {name: image if name in sensors else None for name, image in images.items()}
    # The counter does not know the CPU's fused attention.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        Croma(config)(**given)
    assert counter.get_total_flops() == 3 * inference_flops(config, 48, sensors=sensors)


@pytest.mark.parametrize("config", CONFIGS[1:])
@pytest.mark.parametrize(
    "objective", [Objective(), Objective(contrastive_weight=0.0), Objective(reconstruction_weight=0.0)]
)
def test_pretraining_is_counted_exactly_and_its_backward_pass_as_twice_that(
    config: CromaConfig, objective: Objective
) -> None:
    model = CromaPretraining(config, objective)
    masks = draw_masks(torch.arange(4), 64)
    images = torch.rand(4, 12, 64, 64), torch.rand(4, 2, 64, 64)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        losses = model(*images, masks)
        forward = counter.get_total_flops()
        losses.total.backward()
    expected = 4 * pretraining_flops(config, 64, num_contrasted=4, objective=objective)
    assert forward == expected
    # Pixels need no gradient.
    embedding = 4 * 2 * 16 * 14 * 64 * config.width
    assert counter.get_total_flops() == TRAINING_FACTOR * expected - embedding


def test_the_sizes_of_the_paper() -> None:
    """Base at 120 px: two operations per parameter of the encoders and patch, and attention on top."""
    attention = 4 * 225**2 * 768 * (12 + 6 + 2 * 6)
    assert inference_flops(BASE, 225) == pytest.approx(2 * 225 * 184.9e6 + attention, rel=0.005)
    assert inference_flops(LARGE, 225) > 3 * inference_flops(BASE, 225)
    assert inference_flops(BASE, 63 * 63) > 17.6 * inference_flops(BASE, 225)
    assert pretraining_flops(BASE, 225) < 0.3 * inference_flops(BASE, 225)
