"""The reference's pretraining step as it reads: an oracle for ours, and what ours is timed against.

Scores, biases and masks are tensors of their own; the whole bias is repeated per sample and gathered; all patches are
embedded and most thrown away; the joint encoder's self-attention gets the cross bias; the other sensor's features carry
no gradient. Only the weights are those of our modules.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from model.alibi import grid_bias
from model.croma import OPTICAL_CHANNELS, CromaPretraining
from model.decoder import sine_cosine_positions
from model.masking import Masks


def losses(
    model: CromaPretraining, optical: torch.Tensor, radar: torch.Tensor, masks: Masks
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Contrastive loss, then those of optical and radar reconstruction."""
    croma, heads = model.croma, model.config.heads
    side, num_patches = optical.shape[-1] // 8, (optical.shape[-1] // 8) ** 2
    bias = grid_bias(side, side, heads, optical.device)

    def encode(encoder: nn.Module, image: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        tokens = encoder.patch_embedding(patches_of(image))
        tokens = tokens.gather(1, kept[:, :, None].expand(-1, -1, tokens.shape[2]))
        return layers(encoder, tokens, masked(bias, kept, kept), heads)

    radar_encodings = encode(croma.radar_encoder, radar, masks.radar)
    optical_encodings = encode(croma.optical_encoder, optical, masks.optical)

    features = []
    for encodings, head, projection in (
        (optical_encodings, croma.optical_head, model.optical_projection),
        (radar_encodings, croma.radar_head, model.radar_projection),
    ):
        feature = projection(feed_forward(head, encodings.mean(dim=1)))
        features.append(feature / feature.norm(dim=1, keepdim=True))
    partner = torch.arange(len(optical))
    scores = [
        model.logit_scale.exp() * a @ b.detach().T for a, b in ((features[0], features[1]), (features[1], features[0]))
    ]
    contrastive = sum(functional.cross_entropy(each, partner) for each in scores) / 2

    cross = masked(bias, masks.radar, masks.optical)
    tokens = radar_encodings
    for layer in croma.joint_encoder.layers:
        tokens = self_attention(layer.self_attention, tokens, cross, heads) + tokens
        tokens = cross_attention(layer.cross_attention, tokens, optical_encodings, cross, heads) + tokens
        tokens = feed_forward(layer.feed_forward, tokens) + tokens
    tokens = model.decoder.embedding(croma.joint_encoder.norm(tokens))

    # Mask tokens at the end, then everything back to its place.
    hidden = torch.ones(len(optical), num_patches).scatter(1, masks.radar, 0.0)
    order = torch.cat([masks.radar, hidden.argsort(dim=1, descending=True)[:, : num_patches - tokens.shape[1]]], dim=1)
    mask_tokens = model.decoder.mask_token.repeat(len(optical), num_patches - tokens.shape[1], 1)
    back = order.argsort(dim=1)[:, :, None].repeat(1, 1, tokens.shape[2])
    tokens = torch.cat([tokens, mask_tokens], dim=1).gather(1, back)
    tokens = tokens + sine_cosine_positions(side, side, tokens.shape[2], tokens.device)
    predicted = model.decoder.prediction(layers(model.decoder, tokens, None, model.config.decoder_heads))

    target = patches_of(torch.cat([optical, radar], dim=1))
    target = (target - target.mean(dim=-1, keepdim=True)) / (target.var(dim=-1, keepdim=True) + 1e-6) ** 0.5
    split = OPTICAL_CHANNELS * 64
    parts = []
    for part, kept in ((slice(split), masks.optical), (slice(split, None), masks.radar)):
        error = ((predicted[..., part] - target[..., part]) ** 2).mean(dim=-1)
        hidden = torch.ones(len(optical), num_patches).scatter(1, kept, 0.0)
        parts.append((error * hidden).sum() / hidden.sum())
    return contrastive, parts[0], parts[1]


def patches_of(image: torch.Tensor) -> torch.Tensor:
    cut = image.unflatten(3, (-1, 8)).unflatten(2, (-1, 8))
    return cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def masked(bias: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """The whole bias, once per sample, and of each what its masks keep: (B, H, K, K)."""
    heads, num_patches = bias.shape[1], bias.shape[-1]
    flat = bias.repeat(len(queries), 1, 1, 1).flatten(2).transpose(1, 2)  # (B, N * N, H)
    at = (queries[:, :, None] * num_patches + keys[:, None]).flatten(1)
    gathered = flat.gather(1, at[:, :, None].repeat(1, 1, heads))
    return gathered.transpose(1, 2).unflatten(2, (queries.shape[1], keys.shape[1]))


def layers(encoder: nn.Module, tokens: torch.Tensor, bias: torch.Tensor | None, heads: int) -> torch.Tensor:
    for layer in encoder.layers:
        tokens = self_attention(layer.attention, tokens, bias, heads) + tokens
        tokens = feed_forward(layer.feed_forward, tokens) + tokens
    return encoder.norm(tokens)


def self_attention(block: nn.Module, tokens: torch.Tensor, bias: torch.Tensor | None, heads: int) -> torch.Tensor:
    return block.to_out(attention(*block.to_qkv(block.norm(tokens)).chunk(3, dim=-1), bias, heads))


def cross_attention(
    block: nn.Module, tokens: torch.Tensor, context: torch.Tensor, bias: torch.Tensor, heads: int
) -> torch.Tensor:
    tokens, context = block.norm(tokens), block.norm(context)
    return block.to_out(attention(block.to_q(tokens), block.to_k(context), block.to_v(context), bias, heads))


def attention(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, bias: torch.Tensor | None, heads: int
) -> torch.Tensor:
    queries, keys, values = (each.unflatten(2, (heads, -1)).transpose(1, 2) for each in (queries, keys, values))
    scores = torch.einsum("bhid,bhjd->bhij", queries, keys) * queries.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + bias
    attended = torch.einsum("bhij,bhjd->bhid", scores.softmax(dim=-1), values)
    return attended.transpose(1, 2).flatten(2)


def feed_forward(block: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return block.contract(functional.gelu(block.expand(block.norm(tokens))))
