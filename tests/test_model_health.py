"""The health of representations, against what is known of clouds of points."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from model.croma import CromaPretraining, Objective
from model.health import alignment, effective_rank, health, representations, spread, uniformity
from model.losses import Projections
from model.normalisation import SSL4EO_S12
from model.training import StepSettings
from tests.small_stores import SMALL
from tests.test_model_training import batch_of


def cloud(num: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num, width, generator=torch.Generator().manual_seed(seed))


@given(directions=st.integers(1, 12), seed=st.integers(0, 50))
def test_equal_variance_in_some_directions_is_a_rank_of_so_many(directions: int, seed: int) -> None:
    # Plus and minus each of some orthogonal directions, in a turned space and away from the origin.
    turned = torch.linalg.qr(cloud(16, 16, seed))[0][:directions]
    points = torch.cat([turned, -turned]) + 5
    assert float(effective_rank(points)) == pytest.approx(directions, rel=1e-3)


def test_rank_and_spread_of_what_has_collapsed_are_the_least() -> None:
    same = torch.ones(8, 16)
    # Rounding alone is left of a cloud without extent.
    assert float(spread(same)) == pytest.approx(0, abs=1e-6)
    line = torch.linspace(1, 2, 8)[:, None] * torch.ones(16)
    assert float(effective_rank(line)) == pytest.approx(1, abs=1e-3)
    assert float(spread(line)) == pytest.approx(0, abs=1e-6)
    assert float(spread(cloud(4000, 64))) == pytest.approx(1, abs=0.01)


def test_alignment_is_a_squared_distance_on_the_sphere() -> None:
    points = cloud(64, 16)
    assert float(alignment(Projections(points, 3 * points))) == pytest.approx(0, abs=1e-6)
    assert float(alignment(Projections(points, -points))) == pytest.approx(4)
    cosines = functional.cosine_similarity(points, other := cloud(64, 16, seed=1))
    assert float(alignment(Projections(points, other))) == pytest.approx(float((2 - 2 * cosines).mean()), rel=1e-5)


def test_uniformity_falls_from_nothing_as_points_part() -> None:
    assert float(uniformity(torch.ones(8, 4))) == pytest.approx(0, abs=1e-6)
    opposite = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert float(uniformity(opposite)) == pytest.approx(-8)
    assert float(uniformity(cloud(500, 256))) == pytest.approx(-4, abs=0.1)


@pytest.mark.parametrize("objective", [Objective(), Objective(contrastive_weight=0.0)])
def test_a_batch_has_its_health_and_the_model_is_left_as_it_was(objective: Objective) -> None:
    torch.manual_seed(0)
    model = CromaPretraining(SMALL, objective).train()
    state = torch.get_rng_state()
    found = representations(model, batch_of(), normalisation=SSL4EO_S12, settings=StepSettings(seed=1))
    told = health(found)
    assert ("alignment" in told) == bool(objective.contrastive_weight)
    assert 1 <= told["rank_optical"] <= 7
    assert 0 <= told["spread_radar"] <= 1
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
