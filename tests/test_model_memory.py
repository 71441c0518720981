"""Memory of a step: what autograd keeps is counted, and what is held at the fullest is near the sum."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from model.croma import BASE, LARGE, CromaConfig, CromaPretraining, Objective
from model.masking import draw_masks
from model.memory import activation_bytes, training_memory
from model.normalisation import SSL4EO_S12
from model.training import StepSettings, build_optimizer, train_step
from tests.bench_device import batch_of

CONFIG = CromaConfig(
    width=128, optical_depth=3, radar_depth=2, joint_depth=2, heads=4, decoder_width=64, decoder_heads=4
)
SAMPLES, IMAGE_PX, PATCHES = 4, 120, 225


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("objective", [Objective(), Objective(reconstruction_weight=0.0)])
def test_what_is_kept_for_the_backward_pass_is_counted(bfloat16: bool, objective: Objective) -> None:
    model = CromaPretraining(CONFIG, objective)
    shapes = {shape for each in model.parameters() for shape in (tuple(each.shape), tuple(reversed(each.shape)))}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        # Weights and their copies in bfloat16 are no activations.
        if tuple(tensor.shape) not in shapes:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    images = torch.rand(SAMPLES, 12, IMAGE_PX, IMAGE_PX), torch.rand(SAMPLES, 2, IMAGE_PX, IMAGE_PX)
    masks = draw_masks(torch.arange(SAMPLES), PATCHES)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            losses = model(*images, masks)
        del losses
    expected = SAMPLES * activation_bytes(CONFIG, PATCHES, objective=objective, bfloat16=bfloat16)
    assert sum(kept.values()) == pytest.approx(expected, rel=0.04)


@pytest.mark.parametrize("how", [{}, {"recompute": True}, {"bfloat16": True, "micro_batch": 2}])
def test_a_step_takes_what_was_counted_within_a_factor_of_one_and_a_half(how: dict[str, int]) -> None:
    model = CromaPretraining(CONFIG).train()
    model.croma.recompute_activations(bool(how.get("recompute")))
    optimizer, batch = build_optimizer(model), batch_of(SAMPLES, IMAGE_PX, torch.device("cpu"))
    settings = StepSettings(seed=0, bfloat16=bool(how.get("bfloat16")), micro_batch=how.get("micro_batch"))

    def step() -> None:
        train_step(model, batch, optimizer, normalisation=SSL4EO_S12, settings=settings, learning_rate=1e-4)

    step()
    counted = training_memory(CONFIG, image_px=IMAGE_PX, batch=SAMPLES, **{"bfloat16": False, **how})
    held_before = optimizer_and_weights(model, optimizer)
    assert 1 / 1.5 < (held_before + most_allocated(step)) / counted.total < 1.5


def optimizer_and_weights(model: CromaPretraining, optimizer: torch.optim.Optimizer) -> int:
    states = [value for state in optimizer.state.values() for value in state.values()]
    return sum(tensor.numel() * tensor.element_size() for tensor in [*model.parameters(), *states])


def most_allocated(run: object) -> int:
    """Most bytes that a call has allocated at a time, from the allocator's own books."""
    assert callable(run)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most


def test_what_trades_memory_for_time_is_seen_in_the_count() -> None:
    whole = training_memory(BASE, image_px=120, batch=128)
    assert training_memory(BASE, image_px=120, batch=128, recompute=True).activations < whole.activations / 3
    assert training_memory(BASE, image_px=120, batch=128, micro_batch=32).activations == whole.activations / 4
    assert training_memory(BASE, image_px=120, batch=128, bfloat16=False).activations > 1.5 * whole.activations
    assert training_memory(LARGE, image_px=120, batch=128).total > 2 * whole.total
    # Weights, gradients and moments in float32, and weights in bfloat16: 18 bytes a parameter.
    assert whole.parameters + whole.gradients + whole.optimizer == 18 * 199_552_385
