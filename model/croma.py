"""CROMA: contrastive radar-optical masked autoencoders (Fuller, Millard and Green, NeurIPS 2023).

`Croma` encodes what is given: optical, radar, or both. `CromaPretraining` adds what only pretraining needs.
"""

# B samples, H x W pixels, P patch side in px, N = (H / P) * (W / P) patches, K kept patches, D width

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

import torch
from torch import Tensor, nn

from model.alibi import distance_bias, grid_bias, patch_positions
from model.decoder import Decoder
from model.layers import (
    Encoder,
    EncoderLayer,
    FeedForward,
    JointEncoder,
    JointLayer,
    in_matmul_dtype,
    initialise,
    patchify,
    to_map,
)
from model.losses import (
    ContrastiveGradient,
    Losses,
    Projections,
    info_nce,
    patch_targets,
    reconstruction_loss,
)
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

    def forward(
        self,
        optical: Tensor | None,
        radar: Tensor | None,
        *,
        layers: Mapping[str, Collection[int]] | None = None,
        maps: bool = False,
    ) -> dict[str, Tensor]:
        """Encode whole images of one or both sensors.

        Args:
            optical: (B, 12, H, W), normalised to [0, 1]; None where there is none.
            radar: (B, 2, H, W), normalised to [0, 1]; None where there is none.
            layers: Which layers' tokens are wanted as well, counted from 0, by encoder: ``{"optical": (3, 7)}``. The
                encoders differ in depth.
            maps: Whether encodings and layers are wanted as feature maps too.

        Returns:
            For each of radar, optical and, when both are given, joint: `…_encodings` (B, N, D), patches row by row,
            and `…_embedding` (B, D). On request `…_layer_3` (B, N, D), before the final norm, and `…_map` and
            `…_layer_3_map` (B, D, H / P, W / P), which are views.

        Raises:
            ValueError: When neither is given, channels are wrong, sizes differ or are no multiple of the patch, or
                there is no such layer.
        """
        rows, columns, device = self.grid(optical, radar)
        taps = self._taps(layers or {})
        bias = self._rounded(grid_bias(rows, columns, self.config.heads, device))
        outputs: dict[str, Tensor] = {}

        def put(name: str, encodings: Tensor, tapped: dict[int, Tensor], embedding: Tensor) -> None:
            tokens = {f"{name}_layer_{index}": layer for index, layer in tapped.items()}
            outputs.update({f"{name}_encodings": encodings, f"{name}_embedding": embedding, **tokens})
            if maps:
                for key, value in {name: encodings, **tokens}.items():
                    outputs[f"{key}_map"] = to_map(value, rows, columns)

        if radar is not None:
            encodings, tapped = self.radar_encoder(patchify(radar, self.config.patch_px), bias, taps["radar"])
            put("radar", encodings, tapped, self.radar_head(encodings.mean(dim=1)))
        if optical is not None:
            encodings, tapped = self.optical_encoder(patchify(optical, self.config.patch_px), bias, taps["optical"])
            put("optical", encodings, tapped, self.optical_head(encodings.mean(dim=1)))
        if radar is not None and optical is not None:
            encodings, tapped = self.joint_encoder(
                outputs["radar_encodings"], outputs["optical_encodings"], bias, bias, taps["joint"]
            )
            put("joint", encodings, tapped, encodings.mean(dim=1))
        return outputs

    def recompute_activations(self, recompute: bool = True) -> None:
        """Activation checkpointing: keep each layer's input only, and compute the rest again in the backward pass."""
        for encoder in (self.radar_encoder, self.optical_encoder, self.joint_encoder):
            encoder.recompute = recompute

    def _taps(self, layers: Mapping[str, Collection[int]]) -> dict[str, Collection[int]]:
        depths = {
            "radar": self.config.radar_depth,
            "optical": self.config.optical_depth,
            "joint": self.config.joint_depth,
        }
        for name, wanted in layers.items():
            if name not in depths:
                raise ValueError(f"layers of {name!r}: the encoders are {', '.join(depths)}")
            if any(not 0 <= index < depths[name] for index in wanted):
                raise ValueError(f"layers {list(wanted)} of {name}: it has {depths[name]}, counted from 0")
        return {name: layers.get(name, ()) for name in depths}

    def distance_bias(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Of patch positions (B, Q, 2) and (B, K, 2): (B, H, Q, K), in what attention is computed in."""
        return self._rounded(distance_bias(queries, keys, self.config.heads))

    def _rounded(self, bias: Tensor) -> Tensor:
        return in_matmul_dtype(bias, self.joint_encoder.norm.weight)

    def grid(self, optical: Tensor | None, radar: Tensor | None) -> tuple[int, int, torch.device]:
        """Rows and columns of patches, and the device; raises ValueError where the images do not fit."""
        found: list[tuple[int, int, int, torch.device]] = []
        for name, image, channels in (("optical", optical, OPTICAL_CHANNELS), ("radar", radar, RADAR_CHANNELS)):
            if image is None:
                continue
            if image.dim() != 4 or image.shape[1] != channels:
                raise ValueError(f"{name} must be (B, {channels}, H, W), got {tuple(image.shape)}")
            found.append((image.shape[0], image.shape[2], image.shape[3], image.device))
        if not found or found[0] != found[-1]:
            said = " and ".join(f"{num} of {height} x {width} px on {place}" for num, height, width, place in found)
            raise ValueError(f"optical and radar must be as many, of one size, on one device: got {said or 'neither'}")
        _, height, width, device = found[0]
        if height % self.config.patch_px or width % self.config.patch_px:
            raise ValueError(f"{height} x {width} px is not a multiple of the patch, {self.config.patch_px} px")
        return height // self.config.patch_px, width // self.config.patch_px, device


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """What pretraining minimises; the defaults are the paper's, with the reference's two slips put right."""

    contrastive_weight: float = 1.0
    """0 leaves the loss out: neither computed nor trained for."""

    reconstruction_weight: float = 1.0
    """0 leaves out the joint encoder and the decoder."""

    target_statistics: Literal["shared", "per_sensor"] = "shared"
    """Reconstruction targets have mean 0 and variance 1 in each patch: over the values of both sensors together (as
    the reference has it), or of each sensor alone."""

    joint_self_bias: Literal["radar", "cross"] = "radar"
    """Distances in the joint encoder's self-attention: between radar patches, or (as the reference does under masks)
    from radar to optical ones."""

    gathered_gradient: bool = True
    """Whether gathered features pass gradients on; the reference lets none through."""

    def __post_init__(self) -> None:
        weights = (self.contrastive_weight, self.reconstruction_weight)
        if min(weights) < 0 or max(weights) == 0:
            raise ValueError(f"weights must be 0 or more, and not both 0: got {weights[0]} and {weights[1]}")


REFERENCE_OBJECTIVE: Final = Objective(joint_self_bias="cross", gathered_gradient=False)
"""What the released code computes, its two slips included."""


class Visible(NamedTuple):
    """What masked encoding saw: encodings (B, K, D) and patch positions (B, K, 2) of each sensor."""

    optical: Tensor
    radar: Tensor
    optical_at: Tensor
    radar_at: Tensor

    radar_bias: Tensor
    """(B, H, K, K), between radar patches; the joint encoder takes it too."""


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
        # What no objective reaches would make DistributedDataParallel wait for its gradient.
        idle: list[nn.Module] = []
        if not self.objective.contrastive_weight:
            self.logit_scale.requires_grad_(False)
            idle += [self.croma.optical_head, self.croma.radar_head, self.optical_projection, self.radar_projection]
        if not self.objective.reconstruction_weight:
            idle += [self.croma.joint_encoder, self.decoder]
        for unused in idle:
            unused.requires_grad_(False)

    def compile_layers(self, backend: str) -> None:
        """Compile each layer in place, one program for all of a kind; to be done before any forward pass.

        The whole model in one graph (`torch.compile`) takes several times as long to compile, and lets gradients go to
        other ranks only when its whole backward pass is over.
        """
        for layer in self.modules():
            if isinstance(layer, EncoderLayer | JointLayer):
                layer.compile(backend=backend)

    def forward(
        self, optical: Tensor, radar: Tensor, masks: Masks, gradient: ContrastiveGradient | None = None
    ) -> Losses:
        """Encode what is visible, contrast the sensors, and reconstruct what is hidden.

        Args:
            optical: (B, 12, H, W), normalised to [0, 1].
            radar: (B, 2, H, W), normalised to [0, 1], of the same places.
            masks: Patches that stay visible, (B, K) per sensor; B is the same on every rank.
            gradient: Of a contrastive loss over more samples than these, which then stands in for that of these:
                `contrastive` gets its gradient, and a value that says nothing.
        """
        visible = self.encode(optical, radar, masks)
        weights = self.objective
        contrastive = match_fraction = from_optical = from_radar = visible.radar.new_zeros((), dtype=torch.float32)
        if weights.contrastive_weight:
            projections = self.project(visible)
            if gradient is None:
                contrastive, match_fraction = self.contrast(projections)
            else:
                contrastive = gradient.carry(projections, self.logit_scale)
        if weights.reconstruction_weight:
            from_optical, from_radar = self.reconstruct(visible, optical, radar, masks)
        total = weights.contrastive_weight * contrastive + weights.reconstruction_weight * (from_optical + from_radar)
        return Losses(total, contrastive, from_optical, from_radar, match_fraction)

    def encode(self, optical: Tensor, radar: Tensor, masks: Masks) -> Visible:
        """Each sensor's encoder over its own visible patches, attending by their distances."""
        croma, patch_px = self.croma, self.config.patch_px
        rows, columns, device = croma.grid(optical, radar)
        positions = patch_positions(rows, columns, device)
        optical_at, radar_at = positions[masks.optical], positions[masks.radar]
        radar_bias, optical_bias = (croma.distance_bias(at, at) for at in (radar_at, optical_at))
        radar_encodings, _ = croma.radar_encoder(patchify(radar, patch_px, masks.radar), radar_bias)
        optical_encodings, _ = croma.optical_encoder(patchify(optical, patch_px, masks.optical), optical_bias)
        return Visible(optical_encodings, radar_encodings, optical_at, radar_at, radar_bias)

    def project(self, visible: Visible) -> Projections:
        """Pooled encodings, through the heads, to what the contrastive loss compares."""
        return Projections(
            self.optical_projection(self.croma.optical_head(visible.optical.mean(dim=1))),
            self.radar_projection(self.croma.radar_head(visible.radar.mean(dim=1))),
        )

    def contrast(self, projections: Projections) -> tuple[Tensor, Tensor]:
        """The contrastive loss over all ranks, and the share of chips whose partner is the nearest."""
        return info_nce(projections, self.logit_scale, gathered_gradient=self.objective.gathered_gradient)

    def reconstruct(self, visible: Visible, optical: Tensor, radar: Tensor, masks: Masks) -> tuple[Tensor, Tensor]:
        """Mean squared errors of the hidden optical and of the hidden radar patches."""
        patch_px = self.config.patch_px
        rows, columns = optical.shape[-2] // patch_px, optical.shape[-1] // patch_px
        predicted = self.predict(visible, masks, rows, columns)

        split = OPTICAL_CHANNELS * patch_px**2
        if self.objective.target_statistics == "shared":
            both = patch_targets(patchify(torch.cat([optical, radar], dim=1), patch_px))
            targets = both[..., :split], both[..., split:]
        else:
            targets = patch_targets(patchify(optical, patch_px)), patch_targets(patchify(radar, patch_px))
        num_patches = rows * columns
        return (
            reconstruction_loss(predicted[..., :split], targets[0], removed(masks.optical, num_patches)),
            reconstruction_loss(predicted[..., split:], targets[1], removed(masks.radar, num_patches)),
        )

    def predict(self, visible: Visible, masks: Masks, rows: int, columns: int) -> Tensor:
        """Every patch from what is visible: (B, N, V), optical values before radar, each patch standardised."""
        cross_bias = self.croma.distance_bias(visible.radar_at, visible.optical_at)
        self_bias = visible.radar_bias if self.objective.joint_self_bias == "radar" else cross_bias
        joint, _ = self.croma.joint_encoder(visible.radar, visible.optical, self_bias, cross_bias)
        # The joint tokens are radar tokens: they go back to where the radar mask took them from.
        predicted: Tensor = self.decoder(joint, masks.radar, rows, columns)
        return predicted
