"""The optimizer's groups, the schedule and the step."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.croma import CromaConfig, CromaPretraining
from model.normalisation import SSL4EO_S12
from model.training import NonFiniteError, StepSettings, build_optimizer, learning_rate, train_step

SMALL = CromaConfig(width=32, optical_depth=1, radar_depth=1, joint_depth=1, heads=4, decoder_width=32, decoder_heads=4)
SETTINGS = StepSettings(seed=1)


def batch_of(samples: int = 8, side_px: int = 48, seed: int = 0) -> dict[str, torch.Tensor]:
    """Smooth chips, each of its own brightness, so that there is something to learn."""
    generator = torch.Generator().manual_seed(seed)
    level = torch.rand(samples, 1, 1, 1, generator=generator)

    def pixels(channels: int, side: int) -> torch.Tensor:
        noise = torch.rand(samples, channels, side, side, generator=generator)
        return 500 + 3000 * level + 500 * noise

    return {
        "b10": pixels(4, side_px).to(torch.uint16),
        "b20": pixels(6, side_px // 2).to(torch.uint16),
        "b60": pixels(2, side_px // 6).to(torch.uint16),
        "radar": (pixels(2, side_px) - 3500).to(torch.int16),
        "row": torch.arange(samples),
        "k": torch.zeros(samples, dtype=torch.int32),
    }


def new_model() -> CromaPretraining:
    torch.manual_seed(0)
    return CromaPretraining(SMALL)


def train(model: CromaPretraining, steps: int, settings: StepSettings = SETTINGS) -> list[dict[str, float]]:
    optimizer = build_optimizer(model)
    return [
        train_step(
            model, batch_of(), optimizer, normalisation=SSL4EO_S12, settings=settings, epoch=epoch, learning_rate=2e-3
        )
        for epoch in range(steps)
    ]


def test_biases_norms_mask_token_and_temperature_do_not_decay() -> None:
    model = new_model()
    decayed, spared = build_optimizer(model, weight_decay=0.05).param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.05, 0.0)
    decayed_ids = {id(each) for each in decayed["params"]}
    for name, parameter in model.named_parameters():
        spare = name.endswith("bias") or "norm" in name or name in ("logit_scale", "decoder.mask_token")
        assert (id(parameter) in decayed_ids) != spare, name
    assert len(decayed["params"]) + len(spared["params"]) == len(list(model.parameters()))


def test_the_learning_rate_rises_straight_and_falls_as_half_a_cosine() -> None:
    def rate(samples: int) -> float:
        return learning_rate(samples, peak=2.0, warmup_samples=100, total_samples=1100, final_fraction=0.1)

    assert [rate(samples) for samples in (0, 50, 100)] == [0, 1, 2]
    assert rate(600) == pytest.approx(1.1)
    assert rate(1100) == rate(5000) == pytest.approx(0.2)
    assert rate(350) == pytest.approx(0.2 + 1.8 * (1 + math.cos(math.pi / 4)) / 2)


@given(st.integers(0, 2000), st.integers(0, 500), st.integers(0, 1000))
def test_the_learning_rate_never_exceeds_its_peak(samples: int, warmup: int, total: int) -> None:
    assert 0 <= learning_rate(samples, peak=1.0, warmup_samples=warmup, total_samples=total) <= 1


def test_both_losses_fall_when_the_same_chips_are_seen_again() -> None:
    reports = train(new_model(), 120)
    first, last = reports[0], reports[-1]
    assert set(first) == {
        "loss", "contrastive", "reconstruction_optical", "reconstruction_radar", "match_fraction",
        "gradient_norm", "temperature", "learning_rate",
    }  # fmt: skip
    assert last["contrastive"] < 0.5 * first["contrastive"]
    assert last["reconstruction_optical"] < 0.8 * first["reconstruction_optical"]
    assert first["temperature"] == pytest.approx(0.07)


def test_a_run_is_the_same_bit_for_bit_when_repeated() -> None:
    assert train(new_model(), 3) == train(new_model(), 3)


def test_the_seed_and_the_augmentation_change_a_run() -> None:
    plain = train(new_model(), 1)[0]["loss"]
    for settings in (
        StepSettings(seed=2),
        StepSettings(seed=1, augment=False),
        StepSettings(seed=1, shared_masks=True),
    ):
        assert train(new_model(), 1, settings)[0]["loss"] != plain


def test_a_loss_that_is_not_finite_raises_before_the_weights_change() -> None:
    model = new_model()
    with torch.no_grad():
        model.optical_projection.weight[0, 0] = float("nan")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(NonFiniteError, match=r"chips in rows \[0, 1, 2"):
        train(model, 1)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], equal_nan=True, rtol=0, atol=0)


def test_gradients_are_clipped_to_the_stated_norm() -> None:
    model = new_model()
    report = train(model, 1, StepSettings(seed=1, max_gradient_norm=0.01))[0]
    norm = torch.stack([each.grad.norm() for each in model.parameters() if each.grad is not None]).norm()
    assert report["gradient_norm"] > 0.01
    assert norm.item() == pytest.approx(0.01, rel=1e-3)


def test_the_temperature_is_clamped_where_asked() -> None:
    model = new_model()
    train(model, 1, StepSettings(seed=1, max_logit_scale=1.0))
    assert model.logit_scale.item() == 1.0


def test_a_batch_without_radar_is_refused() -> None:
    batch = batch_of()
    del batch["radar"]
    model = new_model()
    with pytest.raises(ValueError, match="both sensors"):
        train_step(
            model,
            batch,
            build_optimizer(model),
            normalisation=SSL4EO_S12,
            settings=SETTINGS,
            epoch=0,
            learning_rate=0.0,
        )


def test_bfloat16_steps_stay_close_to_float32() -> None:
    exact = train(new_model(), 2)[-1]
    rounded = train(new_model(), 2, StepSettings(seed=1, bfloat16=True))[-1]
    assert rounded["loss"] == pytest.approx(exact["loss"], rel=0.02)
