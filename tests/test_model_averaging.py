"""The average of the weights: as torch averages them, measured in samples, and the same after a resume."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.averaging import DECAY_SAMPLES, RAMP, WeightAverage, kept_over, restore_averaged
from model.croma import CromaPretraining
from model.normalisation import SSL4EO_S12
from model.pretrained import to_checkpoint
from tests.small_stores import SMALL


@given(decay=st.floats(0.01, 0.99999), first=st.integers(1, 5000), second=st.integers(1, 5000))
def test_steps_of_any_size_keep_as_much_over_as_many_samples(decay: float, first: int, second: int) -> None:
    long_after = 10**9
    parts = kept_over(first, decay=decay, seen=long_after) * kept_over(second, decay=decay, seen=long_after)
    assert kept_over(first + second, decay=decay, seen=long_after) == pytest.approx(parts)
    assert kept_over(DECAY_SAMPLES, decay=decay, seen=long_after) == pytest.approx(decay)


@given(decay=st.floats(0.01, 0.99999), step=st.integers(1, 10_000), before=st.integers(0, 10**7))
def test_early_in_a_run_the_average_reaches_back_over_a_share_of_it_alone(decay: float, step: int, before: int) -> None:
    kept = kept_over(step, decay=decay, seen=before + step)
    assert 0 <= kept <= math.exp(-step / (RAMP * (before + step))) * (1 + 1e-12)


def walk(model: CromaPretraining, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))


def test_the_average_is_the_sum_of_past_weights_with_fading_shares() -> None:
    model, num_samples = CromaPretraining(SMALL), 512
    average, expected = WeightAverage(model, decay=0.5), None
    for step in range(1, 9):
        walk(model, step)
        average.update(model, num_samples=num_samples, seen=step * num_samples)
        now = model.croma.optical_head.expand.weight.detach().clone()
        kept = kept_over(num_samples, decay=0.5, seen=step * num_samples)
        expected = now if expected is None else kept * expected + (1 - kept) * now
    torch.testing.assert_close(average.model.croma.optical_head.expand.weight.detach(), expected)
    for state, weights in (({"average": average.state_dict()}, average.model), ({}, model)):
        restored, _ = restore_averaged(to_checkpoint(model, SSL4EO_S12, training=state))
        torch.testing.assert_close(restored.state_dict(), weights.state_dict(), rtol=0, atol=0)


def test_an_average_goes_on_from_its_state_as_if_nothing_had_been() -> None:
    model = CromaPretraining(SMALL)
    whole = WeightAverage(model, decay=0.9)
    for step in (1, 2):
        walk(model, step)
        whole.update(model, num_samples=64, seen=64 * step)
    resumed = WeightAverage(CromaPretraining(SMALL), decay=0.9)
    resumed.load_state_dict({key: value.clone() for key, value in whole.state_dict().items()})
    walk(model, 3)
    for each in (whole, resumed):
        each.update(model, num_samples=64, seen=192)
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)
