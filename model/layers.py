"""The parts CROMA is made of: patches, attention with a bias, feed-forward, the two kinds of encoder (paper section 3).

Every block normalises its input itself (pre-norm) and returns what its caller adds to the tokens.
"""

# B samples, C channels, P patch side in px, N patches (or tokens), K kept patches, M context tokens, D width, H heads

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

INPUT_MEAN: Final = 0.5
INPUT_STD: Final = 0.25
"""Mean and deviation of what `model.normalisation` makes of a band, by construction."""


def patchify(image: Tensor, patch_px: int, kept: Tensor | None = None) -> Tensor:
    """Cut images into patches: (B, C, rows * P, columns * P) -> (B, N, C * P * P).

    Patches run row by row; within a patch the channel is slowest, then the row, then the column.
    With `kept` (B, K), only those patches are copied out: (B, K, C * P * P).
    """
    num_images, channels, height, width = image.shape
    rows, columns = height // patch_px, width // patch_px
    cut = image.reshape(num_images, channels, rows, patch_px, columns, patch_px).permute(0, 2, 4, 1, 3, 5)
    if kept is None:
        return cut.reshape(num_images, rows * columns, -1)
    image_of = torch.arange(num_images, device=image.device)[:, None]
    return cut[image_of, kept // columns, kept % columns].flatten(2)


def attend(queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, heads: int) -> Tensor:
    """softmax(q k^T / sqrt(D/H) + bias) v per head.

    Args:
        queries: (B, N, D).
        keys: (B, M, D).
        values: (B, M, D).
        bias: (B or 1, H, N, M), added after the scaling; None for plain attention.
        heads: H.

    Returns:
        (B, N, D), heads side by side.
    """
    # Fused wherever the device has a kernel for it: (B, H, N, M) scores never lie in memory.
    queries, keys, values = (x.view(*x.shape[:2], heads, -1).transpose(1, 2) for x in (queries, keys, values))
    if bias is not None:
        bias = bias.to(queries.dtype)
    attended = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=bias)
    return attended.transpose(1, 2).flatten(2)


def in_matmul_dtype(bias: Tensor, weight: Tensor) -> Tensor:
    """Round a bias once to what is multiplied in, by autocast or with `weight`, rather than again in every layer.

    The bias is computed in float32. Where it is large, and bfloat16 coarse, its softmax weight is close to nothing.
    """
    kind = bias.device.type
    return bias.to(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype)


def run_layer(layer: nn.Module, *inputs: Tensor | None, recompute: bool) -> Tensor:
    """Apply a layer; with `recompute`, keep only its inputs and run it again in the backward pass."""
    if recompute and torch.is_grad_enabled():
        output = checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False)
    else:
        output = layer(*inputs)
    assert isinstance(output, Tensor)
    return output


def to_map(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """Tokens (B, N, D) of a rows x columns grid -> feature map (B, D, rows, columns), a view."""
    return tokens.transpose(1, 2).reshape(tokens.shape[0], tokens.shape[2], rows, columns)


class SelfAttention(nn.Module):
    """Tokens attend to each other."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.to_qkv = nn.Linear(width, 3 * width, bias=False)
        self.to_out = nn.Linear(width, width)

    def forward(self, tokens: Tensor, bias: Tensor | None) -> Tensor:
        """Tokens (B, N, D), bias (B or 1, H, N, N) -> (B, N, D)."""
        queries, keys, values = self.to_qkv(self.norm(tokens)).chunk(3, dim=-1)
        out: Tensor = self.to_out(attend(queries, keys, values, bias, self.heads))
        return out


class CrossAttention(nn.Module):
    """Tokens attend to a context; one LayerNorm serves both."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(width, width, bias=False)
        self.to_v = nn.Linear(width, width, bias=False)
        self.to_out = nn.Linear(width, width)

    def forward(self, tokens: Tensor, context: Tensor, bias: Tensor | None) -> Tensor:
        """Tokens (B, N, D), context (B, M, D), bias (B or 1, H, N, M) -> (B, N, D)."""
        queries, context = self.to_q(self.norm(tokens)), self.norm(context)
        out: Tensor = self.to_out(attend(queries, self.to_k(context), self.to_v(context), bias, self.heads))
        return out


class FeedForward(nn.Module):
    """Two linear layers, four times as wide between them; also the head on a pooled encoding (paper's FFN)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        out: Tensor = self.contract(functional.gelu(self.expand(self.norm(tokens))))
        return out


class EncoderLayer(nn.Module):
    """Self-attention, then feed-forward."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = SelfAttention(width, heads)
        self.feed_forward = FeedForward(width)

    def forward(self, tokens: Tensor, bias: Tensor | None) -> Tensor:
        """Tokens (B, N, D), bias (B or 1, H, N, N) -> (B, N, D)."""
        tokens = tokens + self.attention(tokens, bias)
        out: Tensor = tokens + self.feed_forward(tokens)
        return out


class PatchEmbedding(nn.Linear):
    """Patches to tokens; a class of its own because it starts from other weights than other linear layers."""


class Encoder(nn.Module):
    """The ViT of one sensor: no class token, no position embedding; positions enter through the bias alone."""

    recompute = False
    """Activation checkpointing: see `run_layer`."""

    def __init__(self, channels: int, patch_px: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.patch_embedding = PatchEmbedding(channels * patch_px**2, width)
        self.layers = nn.ModuleList(EncoderLayer(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, patches: Tensor, bias: Tensor, tap: Collection[int] = ()) -> tuple[Tensor, dict[int, Tensor]]:
        """Patches (B, N, C * P * P), bias (B or 1, H, N, N) -> encodings (B, N, D), and what layers `tap` put out."""
        # The sum that all layers add to keeps the weights' type: float32 under autocast, whose rounding would build up.
        tokens = self.patch_embedding(patches).to(self.norm.weight.dtype)
        tapped = {}
        for index, layer in enumerate(self.layers):
            tokens = run_layer(layer, tokens, bias, recompute=self.recompute)
            if index in tap:
                tapped[index] = tokens
        return self.norm(tokens), tapped


class JointLayer(nn.Module):
    """Self-attention of the radar tokens, cross-attention to the optical ones, feed-forward."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.self_attention = SelfAttention(width, heads)
        self.cross_attention = CrossAttention(width, heads)
        self.feed_forward = FeedForward(width)

    def forward(self, tokens: Tensor, context: Tensor, self_bias: Tensor, cross_bias: Tensor) -> Tensor:
        """Shapes as in `JointEncoder`."""
        tokens = tokens + self.self_attention(tokens, self_bias)
        tokens = tokens + self.cross_attention(tokens, context, cross_bias)
        out: Tensor = tokens + self.feed_forward(tokens)
        return out


class JointEncoder(nn.Module):
    """Radar encodings look at optical encodings; the context is the same in every layer."""

    recompute = False
    """Activation checkpointing: see `run_layer`."""

    def __init__(self, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(JointLayer(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(
        self, radar: Tensor, optical: Tensor, self_bias: Tensor, cross_bias: Tensor, tap: Collection[int] = ()
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Fuse the two sensors.

        Args:
            radar: Encodings (B, N, D), the queries.
            optical: Encodings (B, M, D), the context.
            self_bias: (B or 1, H, N, N), between radar patches.
            cross_bias: (B or 1, H, N, M), from radar to optical patches.
            tap: Layers, counted from 0, whose output is wanted as well.

        Returns:
            Joint encodings (B, N, D), and by layer the tokens (B, N, D) that it put out, not normalised.
        """
        tokens, tapped = radar, {}
        for index, layer in enumerate(self.layers):
            tokens = run_layer(layer, tokens, optical, self_bias, cross_bias, recompute=self.recompute)
            if index in tap:
                tapped[index] = tokens
        return self.norm(tokens), tapped


@torch.no_grad()
def initialise(module: nn.Module) -> None:
    """Set the weights of one module, not of its children; meant for `nn.Module.apply`.

    As the reference: linear layers uniform within 1/sqrt(inputs), LayerNorms 1 and 0, the mask token normal
    with σ 0.02, the temperature 0.07. Other than in the reference, the patch embedding starts as if its inputs were
    standardised: normalised pixels have mean 0.5 and σ 0.25 by construction, and what all images share would
    otherwise outweigh what tells them apart. Any weights can still be reached, and loaded ones are not touched.
    """
    if isinstance(module, nn.Linear):
        bound = 1 / math.sqrt(module.in_features)
        for parameter in module.parameters(recurse=False):
            nn.init.uniform_(parameter, -bound, bound)
        if isinstance(module, PatchEmbedding):
            module.weight.mul_(1 / INPUT_STD)
            module.bias.copy_(-INPUT_MEAN * module.weight.sum(dim=1))
    elif isinstance(module, nn.LayerNorm):
        module.reset_parameters()
    for name, parameter in module.named_parameters(recurse=False):
        if name == "mask_token":
            nn.init.normal_(parameter, std=0.02)
        elif name == "logit_scale":
            nn.init.constant_(parameter, math.log(1 / 0.07))
