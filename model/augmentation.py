"""Scale augmentation (paper appendix): a random square of each window, brought to the size the model is trained at.

Which square depends on the sample's key alone, and is the same for both sensors.
"""

# B samples, C channels, W side of a window in px

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from model.randomness import uniform

SCALE_STREAM: Final = 301

PAPER_SIDES_PX: Final = (60, 180)
"""Smallest and largest square, of windows of 180 px, brought to 120 px."""


class Squares(NamedTuple):
    """One square per window: (B,) int64, in px."""

    side: Tensor
    top: Tensor
    left: Tensor


def draw_squares(keys: Tensor, window_px: int, sides_px: tuple[int, int]) -> Squares:
    """Squares of any side in `sides_px` (both ends included), anywhere in the window, all equally likely.

    Raises:
        ValueError: When the largest does not fit.
    """
    smallest, largest = sides_px
    if not 1 <= smallest <= largest <= window_px:
        raise ValueError(f"squares of {smallest} to {largest} px do not fit into windows of {window_px} px")
    drawn = uniform(keys, 3, stream=SCALE_STREAM)
    side = smallest + (drawn[:, 0] * (largest - smallest + 1)).long()
    top, left = ((drawn[:, index] * (window_px - side + 1)).long() for index in (1, 2))
    return Squares(side, top, left)


def resize_squares(image: Tensor, squares: Squares, image_px: int) -> Tensor:
    """Windows (B, C, W, W) -> their squares, bilinearly on a grid of image_px x image_px: (B, C, image_px, image_px).

    Pixel areas line up (as with align_corners=False), so a square of `image_px` is copied. Beside a square's edge the
    window's own pixels are interpolated with; beyond the window's edge its outermost pixels go on.
    """
    window_px = image.shape[-1]
    step = squares.side.double() / image_px
    centres = (torch.arange(image_px, device=image.device) + 0.5)[None] * step[
        :, None
    ]  # (B, image_px), px in the square
    # grid_sample counts from -1 to 1 over the window's area.
    rows, columns = (2 * (start[:, None] + centres) / window_px - 1 for start in (squares.top, squares.left))
    size = (-1, image_px, image_px)
    grid = torch.stack([columns[:, None, :].expand(size), rows[:, :, None].expand(size)], dim=-1).to(image.dtype)
    return functional.grid_sample(image, grid, mode="bilinear", padding_mode="border", align_corners=False)
