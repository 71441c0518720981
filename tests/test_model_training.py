"""The optimizer's groups, the schedule and the step."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import distributed, multiprocessing
from torch.nn.parallel import DistributedDataParallel

from model.croma import CromaConfig, CromaPretraining, Objective
from model.losses import Losses
from model.normalisation import SSL4EO_S12
from model.training import (
    NonFiniteError,
    StepSettings,
    _without_exchange,
    accumulate_gradients,
    build_optimizer,
    learning_rate,
    train_step,
    unwrapped,
)

SMALL = CromaConfig(width=32, optical_depth=1, radar_depth=1, joint_depth=1, heads=4, decoder_width=32, decoder_heads=4)
SETTINGS = StepSettings(seed=1)


def batch_of(samples: int = 8, side_px: int = 48, seed: int = 0, epoch: int = 0) -> dict[str, torch.Tensor]:
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
        "epoch": torch.full((samples,), epoch, dtype=torch.int32),
    }


def new_model(objective: Objective | None = None) -> CromaPretraining:
    torch.manual_seed(0)
    return CromaPretraining(SMALL, objective)


def train(model: CromaPretraining, steps: int, settings: StepSettings = SETTINGS) -> list[dict[str, float]]:
    optimizer = build_optimizer(model)
    return [
        train_step(
            model,
            batch_of(epoch=epoch),
            optimizer,
            normalisation=SSL4EO_S12,
            settings=settings,
            learning_rate=2e-3,
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
    with pytest.raises(NonFiniteError) as raised:
        train(model, 1)
    assert raised.value.here
    assert math.isnan(raised.value.values["loss"])
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
            learning_rate=0.0,
        )


def test_bfloat16_steps_stay_close_to_float32() -> None:
    exact = train(new_model(), 2)[-1]
    rounded = train(new_model(), 2, StepSettings(seed=1, bfloat16=True))[-1]
    assert rounded["loss"] == pytest.approx(exact["loss"], rel=0.02)


def gradients_of(
    model: torch.nn.Module, batch: dict[str, torch.Tensor], settings: StepSettings
) -> tuple[Losses, dict[str, torch.Tensor]]:
    losses = accumulate_gradients(model, batch, normalisation=SSL4EO_S12, settings=settings)
    named = unwrapped(model).named_parameters()
    return losses, {name: each.grad for name, each in named if each.grad is not None}


def assert_alike(one: tuple[Losses, dict[str, torch.Tensor]], other: tuple[Losses, dict[str, torch.Tensor]]) -> None:
    torch.testing.assert_close(torch.stack(one[0]), torch.stack(other[0]))
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        torch.testing.assert_close(gradient, other[1][name], atol=1e-6, rtol=1e-4, msg=name)


OBJECTIVES = [
    Objective(),
    Objective(gathered_gradient=False, joint_self_bias="cross"),
    Objective(contrastive_weight=0.5, reconstruction_weight=2.0),
    Objective(contrastive_weight=0.0),
    Objective(reconstruction_weight=0.0),
]


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("micro_batch", [1, 3, 4])
def test_a_batch_in_parts_gives_the_losses_and_gradients_of_the_whole(objective: Objective, micro_batch: int) -> None:
    whole = gradients_of(new_model(objective), batch_of(), SETTINGS)
    parts = gradients_of(new_model(objective), batch_of(), StepSettings(seed=1, micro_batch=micro_batch))
    assert_alike(whole, parts)


def test_windows_of_random_scale_in_parts_give_the_gradients_of_the_whole() -> None:
    batch = batch_of(samples=6, side_px=72)
    scaled = {"seed": 1, "scale_sides_px": (24, 72), "scaled_px": 48}
    whole = gradients_of(new_model(), batch, StepSettings(**scaled))
    assert_alike(whole, gradients_of(new_model(), batch, StepSettings(**scaled, micro_batch=4)))


def test_bfloat16_in_parts_stays_close_to_the_whole() -> None:
    whole, parts = (
        gradients_of(new_model(), batch_of(), StepSettings(seed=1, bfloat16=True, micro_batch=size))
        for size in (None, 3)
    )
    torch.testing.assert_close(torch.stack(whole[0][:4]), torch.stack(parts[0][:4]), rtol=0.01, atol=0.01)
    for name, gradient in whole[1].items():
        assert gradient.dtype == torch.float32
        # Products of other shapes are summed in another order, in 8 bits.
        assert (gradient - parts[1][name]).norm() <= 0.05 * gradient.norm() + 1e-6, name


@pytest.mark.filterwarnings("ignore::DeprecationWarning", r"ignore:The \.grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("way", ["layers", "in place", "wrapped"])
def test_a_compiled_model_takes_the_same_steps_in_parts(way: str) -> None:
    torch.compiler.reset()
    settings = StepSettings(seed=1, micro_batch=4, max_logit_scale=2.0)
    model = new_model()
    compiled: torch.nn.Module = model
    if way == "layers":
        model.compile_layers("eager")
    elif way == "in place":
        compiled.compile(backend="eager")
    else:
        compiled = torch.compile(compiled, backend="eager")
    assert_alike(gradients_of(new_model(), batch_of(), settings), gradients_of(compiled, batch_of(), settings))
    report, expected = (train(each, 1, settings)[0] for each in (compiled, new_model()))
    assert report == pytest.approx(expected, rel=1e-5)
    assert unwrapped(compiled).logit_scale.item() == 2.0


@pytest.mark.parametrize("outermost", ["parallel", "compiled"])
def test_wrappers_are_looked_through_in_any_order(tmp_path: Path, outermost: str) -> None:
    model = new_model()
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        if outermost == "parallel":
            wrapped: torch.nn.Module = DistributedDataParallel(torch.compile(model, backend="eager"))
            parallel = wrapped
        else:
            parallel = DistributedDataParallel(model)
            wrapped = torch.compile(parallel, backend="eager")
        assert unwrapped(wrapped) is model
        assert parallel.require_backward_grad_sync
        with _without_exchange(wrapped):
            assert not parallel.require_backward_grad_sync
    finally:
        distributed.destroy_process_group()
    with pytest.raises(AssertionError, match="Linear"):
        unwrapped(torch.nn.Linear(1, 1))


def test_masks_cover_the_patches_of_the_model_whatever_their_side() -> None:
    torch.manual_seed(0)
    model = CromaPretraining(replace(SMALL, patch_px=4))
    seen = []
    model.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[2]))
    report = train(model, 1)[0]
    assert math.isfinite(report["loss"])
    for kept in seen[0]:
        assert kept.shape == (8, 144 // 4)
        assert kept.max() > 130


def test_a_micro_batch_as_large_as_the_batch_is_the_plain_step() -> None:
    whole = train(new_model(), 1)
    for size in (8, 100):
        assert train(new_model(), 1, StepSettings(seed=1, micro_batch=size)) == whole


def test_parts_hold_only_their_own_activations() -> None:
    def most_held(settings: StepSettings) -> int:
        """Bytes that the backward pass keeps at once, at the most."""
        held, most = 0, 0

        def keep(tensor: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
            nonlocal held, most
            held += tensor.numel() * tensor.element_size()
            most = max(most, held)
            return tensor

        def release(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal held
            held -= tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, release):
            gradients_of(new_model(), batch_of(samples=16), settings)
        return most

    assert most_held(StepSettings(seed=1, micro_batch=4)) < 0.5 * most_held(SETTINGS)


def accumulate_on_rank(rank: int, num_ranks: int, folder: str) -> None:
    """What one process of several does: a batch in parts of uneven size."""
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=num_ranks)
    batch = batch_of(samples=12)
    share = 12 // num_ranks
    own = {name: values[rank * share : (rank + 1) * share] for name, values in batch.items()}
    model = DistributedDataParallel(new_model())
    result = gradients_of(model, own, StepSettings(seed=1, micro_batch=2))
    # Once more: what the first left behind must not disturb the second.
    model.zero_grad()
    assert_alike(result, gradients_of(model, own, StepSettings(seed=1, micro_batch=2)))
    torch.save((tuple(result[0]), result[1]), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_that_take_their_batch_in_parts_learn_what_one_process_learns_at_once(
    tmp_path: Path, num_ranks: int
) -> None:
    multiprocessing.spawn(accumulate_on_rank, (num_ranks, str(tmp_path)), nprocs=num_ranks)
    losses, gradients = gradients_of(new_model(), batch_of(samples=12), SETTINGS)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(num_ranks)]
    mean = [torch.stack(each).mean() for each in zip(*(of_rank for of_rank, _ in ranks), strict=True)]
    for _, of_rank in ranks:
        assert_alike((losses, gradients), (Losses(*mean), of_rank))


def step_with_a_broken_chip(rank: int, folder: str) -> None:
    """Rank 1 alone meets something that is not a number; both must stop."""
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    model = new_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    # Not wrapped: gradients stay apart, so that only agreeing tells rank 0.
    if rank == 1:
        with torch.no_grad():
            model.decoder.mask_token[0] = float("nan")
    try:
        train(model, 1)
        outcome = "went on"
    except NonFiniteError as error:
        outcome = f"{error}; here: {error.here}"
    same = all(torch.equal(value, before[name]) for name, value in model.state_dict().items() if "mask" not in name)
    torch.save((outcome, same), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def test_all_ranks_stop_where_one_has_a_loss_that_is_not_finite(tmp_path: Path) -> None:
    multiprocessing.spawn(step_with_a_broken_chip, (str(tmp_path),), nprocs=2)
    for rank in range(2):
        outcome, same = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert outcome == f"not finite on 1 of 2 ranks; here: {rank == 1}"
        assert same
