"""From the store's integers to model input, in batch on the device.

Optical bands arrive on their own grids and are brought to 10 m by bilinear interpolation (align_corners=False, so that
pixel areas line up). Nearest would be cheaper, but paints 60 m squares whose edges fall differently in each 8 px
patch: a pattern of the grid, not of the ground. No data becomes 0.5, the mean of its band: the value that says least.
"""

# B samples, C bands, h x w pixels of 10 m

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from model.normalisation import OPTICAL_BANDS, BandScaling, Normalisation
from model.randomness import draw

NATIVE_GROUPS: Final[dict[str, tuple[str, ...]]] = {
    "b10": ("B02", "B03", "B04", "B08"),
    "b20": ("B05", "B06", "B07", "B8A", "B11", "B12"),
    "b60": ("B01", "B09"),
}
"""Batch key -> the bands it holds, each on the sensor's own grid."""

OPTICAL_NODATA: Final = 0
RADAR_NODATA: Final = -32768
CENTI_DB: Final = 0.01
"""The store's radar integers are hundredths of a decibel."""

SYMMETRY_STREAM: Final = 201


def prepare(
    batch: Mapping[str, Tensor], normalisation: Normalisation, *, keys: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """Turn a batch of the feed into what the model takes.

    Args:
        batch: b10 (B, 4, h, w), b20 (B, 6, h/2, w/2), b60 (B, 2, h/6, w/6) of reflectance x 10000, 0 where there is no
            data; radar (B, 2, h, w) in centi-dB, -32768 where there is no data. A sensor may be absent. Optical
            groups may also all be on 10 m: those pixels are taken as they are.
        normalisation: Means and σ per band.
        keys: (B,) int64 per sample, from which flips and quarter turns follow, the same for both sensors; None for
            none.

    Returns:
        optical (B, 12, h, w) and radar (B, 2, h, w), float32 in [0, 1], None where absent.
    """
    optical = prepare_optical(batch, normalisation.optical) if "b10" in batch else None
    radar = prepare_radar(batch["radar"], normalisation.radar) if "radar" in batch else None
    if keys is None:
        return optical, radar
    return (
        None if optical is None else turn(optical, keys),
        None if radar is None else turn(radar, keys),
    )


def prepare_optical(batch: Mapping[str, Tensor], scaling: BandScaling) -> Tensor:
    """b10, b20 and b60 of `batch` -> (B, 12, h, w) float32 in [0, 1], in the model's order."""
    size = batch["b10"].shape[-2:]
    factor, offset = scaling.affine(batch["b10"].device)
    optical = batch["b10"].new_empty((batch["b10"].shape[0], len(OPTICAL_BANDS), *size), dtype=torch.float32)
    for name, bands in NATIVE_GROUPS.items():
        at = [OPTICAL_BANDS.index(band) for band in bands]
        pixels = batch[name].float()
        # Scaling commutes with interpolation, whose weights sum to 1; clipping does not, and comes last.
        scaled = (pixels * factor[at] + offset[at]).masked_fill_(pixels == OPTICAL_NODATA, 0.5)
        if scaled.shape[-2:] != size:
            scaled = functional.interpolate(scaled, size, mode="bilinear", align_corners=False)
        optical[:, at] = scaled
    return optical.clamp_(0, 1)


def prepare_radar(centi_db: Tensor, scaling: BandScaling) -> Tensor:
    """(B, 2, h, w) int16 -> (B, 2, h, w) float32 in [0, 1]."""
    factor, offset = scaling.affine(centi_db.device)
    pixels = centi_db.float()
    return (pixels * (factor * CENTI_DB) + offset).masked_fill_(pixels == RADAR_NODATA, 0.5).clamp_(0, 1)


def turn(image: Tensor, keys: Tensor) -> Tensor:
    """Show each image in one of the eight symmetries of the square, as its key decides: (B, C, h, h) -> (B, C, h, h).

    Raises:
        ValueError: When the images are not square.
    """
    if image.shape[-1] != image.shape[-2]:
        raise ValueError(f"only square images can be turned, got {image.shape[-2]} x {image.shape[-1]} px")
    bits = draw(keys, 1, stream=SYMMETRY_STREAM)[:, :, None, None]  # (B, 1, 1, 1)
    image = torch.where((bits & 1).bool(), image.transpose(-1, -2), image)
    image = torch.where((bits & 2).bool(), image.flip(-1), image)
    return torch.where((bits & 4).bool(), image.flip(-2), image)
