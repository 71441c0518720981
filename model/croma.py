"""CROMA: contrastive radar-optical masked autoencoders (Fuller, Millard and Green, NeurIPS 2023).

`Croma` encodes what is given: optical, radar, or both. `CromaPretraining` adds what only pretraining needs.
"""

# B samples, H x W pixels, P patch side in px, N = (H / P) * (W / P) patches, K kept patches, D width

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor, nn

from model.alibi import distance_bias, grid_bias, patch_positions
from model.decoder import Decoder
from model.layers import Encoder, FeedForward, JointEncoder, initialise, patchify
from model.losses import Losses, info_nce, patch_targets, reconstruction_loss
from model.masking import Masks, removed

OPTICAL_CHANNELS: Final = 12
RADAR_CHANNELS: Final = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class CromaConfig:
    """The sizes of a CROMA."""

    width: int
    """Of encodings and embeddings."""

    optical_depth: int
    radar_depth: int
    joint_depth: int

    heads: int
    """Of all three encoders."""

    patch_px: int = 8
    """Side of a patch."""

    decoder_width: int = 512
    decoder_depth: int = 1
    decoder_heads: int = 8

    def __post_init__(self) -> None:
        for name in ("width", "optical_depth", "radar_depth", "joint_depth", "heads", "patch_px", "decoder_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.width % self.heads:
            raise ValueError(f"width={self.width} is not a multiple of heads={self.heads}")
        if self.decoder_width % self.decoder_heads or self.decoder_width % 4:
            raise ValueError(
                f"decoder_width={self.decoder_width} is not a multiple of 4 and of {self.decoder_heads} heads"
            )


TINY: Final = CromaConfig(
    width=192, optical_depth=4, radar_depth=2, joint_depth=2, heads=8, decoder_width=128, decoder_heads=4
)
BASE: Final = CromaConfig(width=768, optical_depth=12, radar_depth=6, joint_depth=6, heads=16)
LARGE: Final = CromaConfig(width=1024, optical_depth=24, radar_depth=12, joint_depth=12, heads=16)
CONFIGS: Final = {"tiny": TINY, "base": BASE, "large": LARGE}


class Croma(nn.Module):
    """The three encoders (paper section 3): what stays after pretraining."""

    def __init__(self, config: CromaConfig) -> None:
        super().__init__()
        self.config = config
        width, heads, patch_px = config.width, config.heads, config.patch_px
        self.radar_encoder = Encoder(RADAR_CHANNELS, patch_px, width, config.radar_depth, heads)
        self.radar_head = FeedForward(width)
        self.optical_encoder = Encoder(OPTICAL_CHANNELS, patch_px, width, config.optical_depth, heads)
        self.optical_head = FeedForward(width)
        self.joint_encoder = JointEncoder(width, config.joint_depth, heads)
        self.apply(initialise)

    def forward(self, optical: Tensor | None, radar: Tensor | None) -> dict[str, Tensor]:
        """Encode whole images of one or both sensors.

        Args:
            optical: (B, 12, H, W), normalised to [0, 1]; None where there is none.
            radar: (B, 2, H, W), normalised to [0, 1]; None where there is none.

        Returns:
            For each of optical, radar and, when both are given, joint: `…_encodings` (B, N, D), patches row by row,
            and `…_embedding` (B, D).

        Raises:
            ValueError: When neither is given, channels are wrong, sizes differ or are no multiple of the patch.
        """
        rows, columns, device = self.grid(optical, radar)
        bias = grid_bias(rows, columns, self.config.heads, device)
        outputs: dict[str, Tensor] = {}
        if radar is not None:
            encodings = self.radar_encoder(patchify(radar, self.config.patch_px), bias)
            outputs |= {"radar_encodings": encodings, "radar_embedding": self.radar_head(encodings.mean(dim=1))}
        if optical is not None:
            encodings = self.optical_encoder(patchify(optical, self.config.patch_px), bias)
            outputs |= {"optical_encodings": encodings, "optical_embedding": self.optical_head(encodings.mean(dim=1))}
        if radar is not None and optical is not None:
            encodings = self.joint_encoder(outputs["radar_encodings"], outputs["optical_encodings"], bias, bias)
            outputs |= {"joint_encodings": encodings, "joint_embedding": encodings.mean(dim=1)}
        return outputs

    def grid(self, optical: Tensor | None, radar: Tensor | None) -> tuple[int, int, torch.device]:
        """Rows and columns of patches, and the device; raises ValueError where the images do not fit."""
        sizes = set()
        for name, image, channels in (("optical", optical, OPTICAL_CHANNELS), ("radar", radar, RADAR_CHANNELS)):
            if image is None:
                continue
            if image.dim() != 4 or image.shape[1] != channels:
                raise ValueError(f"{name} must be (B, {channels}, H, W), got {tuple(image.shape)}")
            sizes.add((image.shape[2], image.shape[3], image.device))
        if len(sizes) != 1:
            raise ValueError(f"optical and radar must be of one size, on one device: got {sizes or 'neither'}")
        height, width, device = sizes.pop()
        if height % self.config.patch_px or width % self.config.patch_px:
            raise ValueError(f"{height} x {width} px is not a multiple of the patch, {self.config.patch_px} px")
        return height // self.config.patch_px, width // self.config.patch_px, device


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """What pretraining minimises; the defaults are the paper's, with the reference's two slips put right."""

    contrastive_weight: float = 1.0
    reconstruction_weight: float = 1.0

    joint_self_bias: Literal["radar", "cross"] = "radar"
    """Distances in the joint encoder's self-attention: between radar patches, or (as the reference does under masks)
    from radar to optical ones."""

    gathered_gradient: bool = True
    """Whether gathered features pass gradients on; the reference lets none through."""


class CromaPretraining(nn.Module):
    """CROMA with its decoder and contrastive projections (paper section 3.1)."""

    def __init__(self, config: CromaConfig, objective: Objective | None = None) -> None:
        super().__init__()
        self.config, self.objective = config, objective or Objective()
        self.croma = Croma(config)
        values = (OPTICAL_CHANNELS + RADAR_CHANNELS) * config.patch_px**2
        self.decoder = Decoder(config.width, config.decoder_width, config.decoder_depth, config.decoder_heads, values)
        self.optical_projection = nn.Linear(config.width, config.width)
        self.radar_projection = nn.Linear(config.width, config.width)
        self.logit_scale = nn.Parameter(torch.empty(()))
        for part in (self.decoder, self.optical_projection, self.radar_projection):
            part.apply(initialise)
        initialise(self)

    def forward(self, optical: Tensor, radar: Tensor, masks: Masks) -> Losses:
        """Encode what is visible, contrast the sensors, and reconstruct what is hidden.

        Args:
            optical: (B, 12, H, W), normalised to [0, 1].
            radar: (B, 2, H, W), normalised to [0, 1], of the same places.
            masks: Patches that stay visible, (B, K) per sensor; B is the same on every rank.
        """
        croma, heads, patch_px = self.croma, self.config.heads, self.config.patch_px
        rows, columns, device = croma.grid(optical, radar)
        positions = patch_positions(rows, columns, device)
        optical_at, radar_at = positions[masks.optical], positions[masks.radar]  # (B, K, 2)
        radar_bias = distance_bias(radar_at, radar_at, heads)
        cross_bias = distance_bias(radar_at, optical_at, heads)

        radar_encodings = croma.radar_encoder(patchify(radar, patch_px, masks.radar), radar_bias)
        optical_encodings = croma.optical_encoder(
            patchify(optical, patch_px, masks.optical), distance_bias(optical_at, optical_at, heads)
        )
        contrastive, match_fraction = info_nce(
            self.optical_projection(croma.optical_head(optical_encodings.mean(dim=1))),
            self.radar_projection(croma.radar_head(radar_encodings.mean(dim=1))),
            self.logit_scale,
            gathered_gradient=self.objective.gathered_gradient,
        )
        self_bias = radar_bias if self.objective.joint_self_bias == "radar" else cross_bias
        joint_encodings = croma.joint_encoder(radar_encodings, optical_encodings, self_bias, cross_bias)

        # The joint tokens are radar tokens: they go back to where the radar mask took them from.
        predicted = self.decoder(joint_encodings, masks.radar, rows, columns)
        target = patch_targets(patchify(torch.cat([optical, radar], dim=1), patch_px))
        split = OPTICAL_CHANNELS * patch_px**2
        num_patches = rows * columns
        from_optical = reconstruction_loss(
            predicted[..., :split], target[..., :split], removed(masks.optical, num_patches)
        )
        from_radar = reconstruction_loss(predicted[..., split:], target[..., split:], removed(masks.radar, num_patches))
        total = self.objective.contrastive_weight * contrastive + self.objective.reconstruction_weight * (
            from_optical + from_radar
        )
        return Losses(total, contrastive, from_optical, from_radar, match_fraction)
