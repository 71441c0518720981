"""What is random about a sample follows from the sample alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.masking import draw_masks, removed
from model.preprocessing import turn
from model.randomness import _mix, draw, sample_keys, uniform

INT64 = st.integers(-(2**63), 2**63 - 1)


def splitmix64(state: int) -> int:
    """As published, on Python's integers."""
    wrap = 2**64 - 1
    state = (state + 0x9E3779B97F4A7C15) & wrap
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & wrap
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & wrap
    return state ^ (state >> 31)


def keys_of(rows: list[int], *, seed: int = 3, epoch: int = 0, k: int = 0) -> torch.Tensor:
    row = torch.tensor(rows)
    return sample_keys(row, torch.full_like(row, k), seed=seed, epoch=epoch)


@given(st.lists(INT64, min_size=1, max_size=5))
def test_the_hash_is_splitmix64(states: list[int]) -> None:
    ours = _mix(torch.tensor(states)).numpy().view(np.uint64).tolist()
    assert ours == [splitmix64(state % 2**64) for state in states]


def test_the_first_published_splitmix64_number_comes_out() -> None:
    assert _mix(torch.tensor([0])).numpy().view(np.uint64).item() == 0xE220A8397B1DCDAF


@pytest.mark.parametrize("change", [{"seed": 4}, {"epoch": 1}, {"k": 1}])
def test_every_part_of_the_key_changes_what_is_drawn(change: dict[str, int]) -> None:
    assert (keys_of([5, 6]) != keys_of([5, 6], **change)).all()


def test_uniform_draws_are_uniform_and_streams_are_independent() -> None:
    keys = keys_of(list(range(2000)))
    first, second = uniform(keys, 50, stream=1), uniform(keys, 50, stream=2)
    assert first.min() >= 0
    assert first.max() < 1
    histogram = torch.histc(first, bins=20, min=0, max=1)
    assert (histogram / 5000 - 1).abs().max() < 0.08
    correlation = torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1]
    assert correlation.abs() < 0.02
    neighbours = torch.corrcoef(torch.stack([first[:, 0], first[:, 1]]))[0, 1]
    assert neighbours.abs() < 0.08


def test_no_two_samples_of_a_large_set_share_a_key() -> None:
    row, k = torch.meshgrid(torch.arange(50_000), torch.arange(4), indexing="ij")
    keys = sample_keys(row.flatten(), k.flatten(), seed=0, epoch=0)
    assert len(keys.unique()) == len(keys)


@given(st.permutations(range(6)), st.integers(1, 6))
def test_a_sample_is_masked_and_turned_alike_in_any_batch(order: list[int], size: int) -> None:
    batch = order[:size]
    image = torch.arange(6 * 16.0).view(6, 1, 4, 4)
    alone = [draw_masks(keys_of([row]), 25) for row in batch]
    together = draw_masks(keys_of(batch), 25)
    assert torch.equal(together.optical, torch.cat([each.optical for each in alone]))
    assert torch.equal(together.radar, torch.cat([each.radar for each in alone]))
    turned = turn(image[batch], keys_of(batch))
    assert torch.equal(turned, torch.cat([turn(image[row : row + 1], keys_of([row])) for row in batch]))


@given(st.integers(1, 300), st.floats(0, 0.99), st.booleans())
def test_masks_keep_the_stated_share_of_distinct_patches(num_patches: int, fraction: float, shared: bool) -> None:
    num_kept = int(num_patches * (1 - fraction))
    if num_kept == 0:
        with pytest.raises(ValueError, match=f"keeps 0 of {num_patches}"):
            draw_masks(keys_of([1]), num_patches, mask_fraction=fraction)
        return
    masks = draw_masks(keys_of([1, 2, 3]), num_patches, mask_fraction=fraction, shared=shared)
    for kept in masks:
        assert kept.shape == (3, num_kept)
        assert (kept.diff(dim=1) > 0).all()
        assert kept.min() >= 0
        assert kept.max() < num_patches
        assert removed(kept, num_patches).sum(dim=1).tolist() == [num_patches - num_kept] * 3
        assert not removed(kept, num_patches).gather(1, kept).any()
    assert not shared or torch.equal(masks.optical, masks.radar)


def test_the_paper_grid_keeps_56_of_225_patches_and_hides_each_equally_often() -> None:
    masks = draw_masks(keys_of(list(range(4000))), 225)
    assert masks.optical.shape == (4000, 56)
    for kept in masks:
        share = removed(kept, 225).float().mean(dim=0)
        assert (share - 169 / 225).abs().max() < 0.04
    assert not torch.equal(masks.optical, masks.radar)
    both = (~removed(masks.optical, 225) & ~removed(masks.radar, 225)).float().mean()
    assert abs(both - (56 / 225) ** 2) < 0.003


def test_all_eight_symmetries_are_shown_equally_often() -> None:
    image = torch.arange(9.0).view(1, 1, 3, 3).expand(4000, -1, -1, -1)
    shown, counts = turn(image, keys_of(list(range(4000)))).flatten(1).unique(dim=0, return_counts=True)
    assert len(shown) == 8
    assert (counts - 500).abs().max() < 100


def test_only_square_images_are_turned() -> None:
    with pytest.raises(ValueError, match="8 x 16"):
        turn(torch.zeros(1, 2, 8, 16), draw(torch.tensor([1]), 1, stream=0)[:, 0])
