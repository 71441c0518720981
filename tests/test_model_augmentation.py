"""Scale augmentation against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from model.augmentation import PAPER_SIDES_PX, Squares, draw_squares, resize_squares
from model.normalisation import SSL4EO_S12
from model.randomness import sample_keys
from model.training import StepSettings, pretraining_inputs


def keys_of(samples: int, *, seed: int = 0, epoch: int = 0) -> torch.Tensor:
    return sample_keys(torch.arange(samples), torch.zeros(samples, dtype=torch.int64), seed=seed, epoch=epoch)


def oracle(window: NDArray[np.float64], side: int, top: int, left: int, image_px: int) -> NDArray[np.float64]:
    """One window (C, W, W): each new pixel centre between the four old ones around it."""
    size = window.shape[-1]

    def weights(start: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
        at = np.clip(start + (np.arange(image_px) + 0.5) * side / image_px - 0.5, 0, size - 1)
        low = np.floor(at).astype(np.int64)
        return low, np.minimum(low + 1, size - 1), at - low

    (up, down, by_row), (west, east, by_column) = weights(top), weights(left)
    rows = window[:, up] * (1 - by_row)[:, None] + window[:, down] * by_row[:, None]
    return rows[:, :, west] * (1 - by_column) + rows[:, :, east] * by_column


@settings(max_examples=20)
@given(seed=st.integers(0, 2**31), sides=st.sampled_from([(60, 180), (5, 24), (180, 180), (120, 120)]))
def test_squares_are_resized_as_numpy_does(seed: int, sides: tuple[int, int]) -> None:
    windows = torch.rand(3, 2, 180, 180, generator=torch.Generator().manual_seed(seed))
    squares = draw_squares(keys_of(3, seed=seed), 180, sides)
    got = resize_squares(windows, squares, 120)
    assert got.shape == (3, 2, 120, 120)
    for sample, (side, top, left) in enumerate(zip(*squares, strict=True)):
        expected = oracle(windows[sample].numpy().astype(np.float64), int(side), int(top), int(left), 120)
        np.testing.assert_allclose(got[sample].numpy(), expected, atol=1e-4)


def test_a_square_of_the_size_wanted_is_copied() -> None:
    windows = torch.rand(2, 3, 180, 180)
    squares = Squares(torch.tensor([120, 120]), torch.tensor([0, 60]), torch.tensor([7, 60]))
    got = resize_squares(windows, squares, 120)
    torch.testing.assert_close(got[0], windows[0, :, :120, 7:127], atol=1e-4, rtol=0)
    torch.testing.assert_close(got[1], windows[1, :, 60:, 60:], atol=1e-4, rtol=0)


def test_squares_fill_their_range_and_stay_in_the_window() -> None:
    side, top, left = draw_squares(keys_of(20_000), 180, PAPER_SIDES_PX)
    assert (side.min(), side.max()) == (60, 180)
    assert abs(side.double().mean() - 120) < 1
    for start in (top, left):
        assert start.min() == 0
        assert ((start + side) <= 180).all()
        assert ((start + side) == 180).any()
    assert abs(np.corrcoef(top.numpy()[side < 70], left.numpy()[side < 70])[0, 1]) < 0.1


def test_a_sample_has_one_square_in_any_batch_and_another_in_every_epoch() -> None:
    whole = draw_squares(keys_of(50), 180, PAPER_SIDES_PX)
    alone = draw_squares(keys_of(50)[17:18], 180, PAPER_SIDES_PX)
    assert all(torch.equal(one[17:18], other) for one, other in zip(whole, alone, strict=True))
    later = draw_squares(keys_of(50, epoch=1), 180, PAPER_SIDES_PX)
    assert (whole.side == later.side).float().mean() < 0.1


def test_squares_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="60 to 180 px do not fit into windows of 120 px"):
        draw_squares(keys_of(1), 120, PAPER_SIDES_PX)


def test_pretraining_takes_the_same_square_of_both_sensors() -> None:
    ramp = torch.arange(180).repeat(2, 1, 180, 1)
    batch = {
        "b10": (ramp.repeat(1, 4, 1, 1) * 10 + 1000).to(torch.uint16),
        "b20": torch.full((2, 6, 90, 90), 1000, dtype=torch.uint16),
        "b60": torch.full((2, 2, 30, 30), 1000, dtype=torch.uint16),
        "radar": (ramp.repeat(1, 2, 1, 1) * 10 - 2500).to(torch.int16),
        "row": torch.arange(2),
        "k": torch.zeros(2, dtype=torch.int64),
        "epoch": torch.zeros(2, dtype=torch.int32),
    }
    step = StepSettings(seed=3, augment=False, scale_sides_px=PAPER_SIDES_PX)
    optical, radar, masks = pretraining_inputs(batch, patch_px=8, normalisation=SSL4EO_S12, settings=step)
    assert optical.shape == (2, 12, 120, 120)
    assert radar.shape == (2, 2, 120, 120)
    assert masks.optical.shape == (2, 56)
    # Both sensors saw a ramp from the window's left to its right: its slope tells the square's side.
    squares = draw_squares(sample_keys(batch["row"], batch["k"], seed=3, epoch=0), 180, PAPER_SIDES_PX)
    green, vv = optical[:, 2, 60], radar[:, 0, 60]
    for sample in range(2):
        middle = slice(20, 100)
        for row, per_px in ((green[sample], 10 / (4 * 1183.6)), (vv[sample], 0.1 / (4 * 5.257))):
            slope = row[middle].diff().mean().item()
            assert slope == pytest.approx(per_px * squares.side[sample].item() / 120, rel=1e-2)
