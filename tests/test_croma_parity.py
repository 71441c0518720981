"""Outputs equal those of torchgeo's CROMA, which equals the reference bit for bit.

Only the one file is taken from torchgeo's wheel, named by the variable TORCHGEO_WHEEL.
"""

from __future__ import annotations

import os
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

import model.alibi
from model.croma import Croma
from model.released import from_torchgeo, to_torchgeo
from tests.conftest import require_server
from tests.torchgeo_croma import load_torchgeo

TOLERANCE = 1e-5  # ten times the float32 noise seen, a fifth of what the smallest fault below makes
NAMES = {
    "sar_encodings": "radar_encodings",
    "sar_GAP": "radar_embedding",
    "optical_encodings": "optical_encodings",
    "optical_GAP": "optical_embedding",
    "joint_encodings": "joint_encodings",
    "joint_GAP": "joint_embedding",
}


@pytest.fixture(scope="module")
def torchgeo_croma() -> types.ModuleType:
    """torchgeo.models.croma of the wheel."""
    wheel = os.environ.get("TORCHGEO_WHEEL", "")
    require_server(
        Path(wheel).is_file(),
        "no torchgeo wheel: pip download --no-deps torchgeo==0.8.1, and name the file in TORCHGEO_WHEEL",
    )
    return load_torchgeo(wheel)


def theirs_and_ours(torchgeo: types.ModuleType, size_px: int, **sizes: int) -> tuple[nn.Module, Croma]:
    """The same weights in both; LayerNorms and biases are away from 1 and 0."""
    generator = torch.Generator().manual_seed(0)
    theirs = torchgeo.CROMA(image_size=size_px, num_heads=16, **sizes).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return theirs, from_torchgeo(theirs.state_dict())[0]


def images(size_px: int, samples: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.rand(samples, 12, size_px, size_px, generator=generator),
        torch.rand(samples, 2, size_px, size_px, generator=generator),
    )


@torch.no_grad()
def largest_difference(theirs: nn.Module, ours: Croma, size_px: int, samples: int = 2) -> float:
    """Over all outputs, with both sensors."""
    optical, radar = images(size_px, samples)
    expected, got = theirs(radar, optical), ours(optical, radar)
    assert {NAMES[name] for name in expected} == set(got)
    return max((got[NAMES[name]] - value).abs().max().item() for name, value in expected.items())


SMALL = {"encoder_dim": 128, "encoder_depth": 4}


@pytest.mark.parametrize("size_px", [120, 168])
def test_a_small_model_agrees_with_torchgeo(torchgeo_croma: types.ModuleType, size_px: int) -> None:
    theirs, ours = theirs_and_ours(torchgeo_croma, size_px, **SMALL)
    assert largest_difference(theirs, ours, size_px) <= TOLERANCE


def alone_and_ours(theirs: nn.Module, ours: Croma, sensor: str, size_px: int, samples: int = 2) -> float:
    """The largest difference over all outputs where one sensor alone is given."""
    optical, radar = images(size_px, samples)
    theirs.modalities = [sensor]
    given = {"sar": (radar, None), "optical": (None, optical)}[sensor]
    with torch.no_grad():
        expected, got = theirs(*given), ours(*reversed(given))
    assert {NAMES[name] for name in expected} == set(got)
    return max((got[NAMES[name]] - value).abs().max().item() for name, value in expected.items())


@pytest.mark.slow
def test_base_agrees_with_torchgeo(torchgeo_croma: types.ModuleType) -> None:
    theirs, ours = theirs_and_ours(torchgeo_croma, 120, encoder_dim=768, encoder_depth=12)
    assert sum(parameter.numel() for parameter in ours.parameters()) == 194_365_440
    assert largest_difference(theirs, ours, 120, samples=1) <= TOLERANCE
    # Building a second one takes half a minute; sizes differ in nothing but the bias.
    theirs.attn_bias = torchgeo_croma.get_2dalibi(16, (168 // 8) ** 2)
    assert largest_difference(theirs, ours, 168, samples=1) <= TOLERANCE
    for sensor in ("sar", "optical"):
        assert alone_and_ours(theirs, ours, sensor, 168, samples=1) <= TOLERANCE


@pytest.mark.parametrize("size_px", [120, 168])
def test_one_sensor_alone_agrees_with_torchgeo(torchgeo_croma: types.ModuleType, size_px: int) -> None:
    theirs, ours = theirs_and_ours(torchgeo_croma, size_px, **SMALL)
    for sensor in ("sar", "optical"):
        assert alone_and_ours(theirs, ours, sensor, size_px) <= TOLERANCE


@pytest.mark.parametrize("sensor", ["sar", "optical"])
def test_torchgeos_weights_of_one_sensor_are_refused_with_a_reason(
    torchgeo_croma: types.ModuleType, sensor: str
) -> None:
    alone = torchgeo_croma.CROMA(modalities=[sensor], image_size=16, num_heads=16, **SMALL)
    with pytest.raises(ValueError, match="is missing; weights of one sensor alone are not taken"):
        from_torchgeo(alone.state_dict())


def test_our_weights_load_into_torchgeo(torchgeo_croma: types.ModuleType) -> None:
    theirs, ours = theirs_and_ours(torchgeo_croma, 120, **SMALL)
    expected = theirs.state_dict()["attn_bias"].clone()
    exported = to_torchgeo(ours, image_px=120)
    torch.testing.assert_close(exported["attn_bias"], expected, atol=1e-5, rtol=1e-6)
    theirs.load_state_dict(exported)
    missing, unexpected = theirs.load_state_dict(to_torchgeo(ours), strict=False)
    assert (missing, unexpected) == (["attn_bias"], [])


def tanh_gelu(_ours: Croma, patch: pytest.MonkeyPatch) -> None:
    exact = functional.gelu
    patch.setattr(functional, "gelu", lambda tokens: exact(tokens, approximate="tanh"))


def other_epsilon(ours: Croma, _patch: pytest.MonkeyPatch) -> None:
    for module in ours.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-6


def manhattan(_ours: Croma, patch: pytest.MonkeyPatch) -> None:
    def bias(rows: int, columns: int, heads: int, device: torch.device) -> torch.Tensor:
        at = model.alibi.patch_positions(rows, columns, device)
        distance = (at[:, None] - at).abs().sum(-1)
        return -torch.tensor(model.alibi.slopes(heads))[:, None, None] * distance[None, None]

    patch.setattr("model.croma.grid_bias", bias)


def swapped(ours: Croma, patch: pytest.MonkeyPatch) -> None:
    right = ours.joint_encoder.forward
    patch.setattr(ours.joint_encoder, "forward", lambda radar, optical, *bias: right(optical, radar, *bias))


@pytest.mark.parametrize("fault", [tanh_gelu, other_epsilon, manhattan, swapped])
def test_a_deliberate_fault_is_seen(
    torchgeo_croma: types.ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[[Croma, pytest.MonkeyPatch], None],
) -> None:
    theirs, ours = theirs_and_ours(torchgeo_croma, 64, **SMALL)
    assert largest_difference(theirs, ours, 64) <= TOLERANCE
    expected = theirs(*reversed(images(64)))
    fault(ours, monkeypatch)
    got = ours(*images(64))
    assert max((got[NAMES[name]] - value).abs().max().item() for name, value in expected.items()) > TOLERANCE
