"""The encoders as a program of their own, which runs without this code: `torch.export`, any batch and image size."""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from model.croma import OPTICAL_CHANNELS, RADAR_CHANNELS, Croma

SENSORS: Final = ("optical", "radar")
SMALLEST_PATCHES: Final = 2
"""On a side: tracing takes a side of 1 for a constant."""


def export_encoders(croma: Croma, *, sensors: Collection[str] = SENSORS, largest_patches: int = 256) -> ExportedProgram:
    """Trace `Croma.forward`.

    Args:
        croma: In evaluation mode.
        sensors: What the program is to be given, optical, radar or both; it takes None for what is absent.
        largest_patches: On a side of the images; from 2 to this many are taken, also not square.

    Returns:
        A program of (optical, radar), each (B, C, H, W) normalised to [0, 1], with the outputs of `Croma.forward`.
        `torch.export.save` writes it.
    """
    if not sensors or not set(sensors) <= set(SENSORS):
        raise ValueError(f"sensors must be one or both of {', '.join(SENSORS)}: got {', '.join(sensors) or 'none'}")
    batch = Dim("batch", min=1)
    rows, columns = (Dim(name, min=SMALLEST_PATCHES, max=largest_patches) for name in ("rows", "columns"))
    patch_px, parameter = croma.config.patch_px, next(croma.parameters())
    images: list[Tensor | None] = []
    sizes: list[dict[int, Dim] | None] = []
    for sensor, channels in zip(SENSORS, (OPTICAL_CHANNELS, RADAR_CHANNELS), strict=True):
        if sensor in sensors:
            # Sides that differ, and are none of the sizes within, so that no two are taken for the same.
            images.append(parameter.new_zeros(3, channels, 5 * patch_px, 7 * patch_px))
            sizes.append({0: batch, 2: patch_px * rows, 3: patch_px * columns})
        else:
            images.append(None)
            sizes.append(None)
    with torch.no_grad():
        return torch.export.export(croma, tuple(images), dynamic_shapes=tuple(sizes))
