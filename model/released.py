"""The layouts of others' CROMA weights, mapped to our names and back.

- released: the five state dicts of the published checkpoints, encoders and heads only;
- torchgeo: the same five in one state dict, joined with a dot; versions from 0.8 on add a buffer with the bias;
- reference pretraining: what the reference's training code saves, with other names for the same encoders.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor

from model.alibi import grid_bias
from model.croma import Croma, CromaConfig, CromaPretraining, Objective
from model.decoder import sine_cosine_positions
from model.normalisation import SSL4EO_S12, Normalisation
from model.pretrained import checked, load_weights, restore, without_weights

NORMALISATION: Final = replace(SSL4EO_S12, level=None)
"""None is published with the weights: that of their dataset. Whether they saw its Level-2A or Level-1C is disputed, so
either is taken."""

HEADS: Final = 16
"""Of both released sizes; weights do not tell."""

DECODER_HEADS: Final = 8
"""Of the reference's decoder; weights do not tell."""

REFERENCE_GRID: Final = 15
"""Patches on a side of what the reference's decoder is made for, 120 px."""

_TORCHGEO_BIAS: Final = "attn_bias"
_REFERENCE_POSITIONS: Final = "decoder.decoder_pos_embed"
_REFERENCE_MASK: Final = "decoder.mask_token"

# Our name of a part -> theirs.
_RELEASED_PARTS: Final = {
    "radar_encoder": "s1_encoder",
    "radar_head": "s1_GAP_FFN",
    "optical_encoder": "s2_encoder",
    "optical_head": "s2_GAP_FFN",
    "joint_encoder": "joint_encoder",
}
_REFERENCE_PARTS: Final = {
    "radar_encoder": "radar_encoder",
    "radar_head": "GAP_FFN_radar",
    "optical_encoder": "optical_encoder",
    "optical_head": "GAP_FFN_optical",
    "joint_encoder": "cross_encoder",
}

# Within an encoder: the blocks of a layer, and what lies in a block where names differ.
_IN_ENCODER: Final = {"attention": "0", "feed_forward": "1"}
_IN_JOINT: Final = {"self_attention": "0", "cross_attention": "1", "feed_forward": "2"}
_IN_HEAD: Final = {"norm": "0", "expand": "1", "contract": "3"}
_RELEASED_LEAVES: Final = {"norm": "input_norm", "expand": "net.0", "contract": "net.3"}
_REFERENCE_LEAVES: Final = {
    "norm": "input_norm",
    "expand": "net.0",
    "contract": "net.2",
    "to_qkv": "create_qkv",
    "to_q": "create_q",
    "to_k": "create_k",
    "to_v": "create_v",
}


def released_name(name: str) -> tuple[str, str]:
    """Our parameter's name -> the state dict and the key it has in a released checkpoint."""
    part, _, rest = name.partition(".")
    return _RELEASED_PARTS[part], _inner_key(part, rest.split("."), _RELEASED_LEAVES)


def reference_name(name: str) -> str:
    """Our name of a `CromaPretraining` parameter -> its name in the reference's training code."""
    part, _, rest = name.partition(".")
    if part == "croma":
        part, _, rest = rest.partition(".")
        return f"{_REFERENCE_PARTS[part]}.{_inner_key(part, rest.split('.'), _REFERENCE_LEAVES)}"
    if part == "decoder":
        path = rest.split(".")
        outer = {"embedding": "encoder_to_decoder", "prediction": "linear_output", "mask_token": "mask_token"}
        if path[0] in outer:
            return ".".join(["decoder", outer[path[0]], *path[1:]])
        return "decoder." + _inner_key(part, path, _REFERENCE_LEAVES)
    sensor = name.partition("_projection.")
    return f"global_contrast_loss.{sensor[0]}_proj.{sensor[2]}" if sensor[1] else f"global_contrast_loss.{name}"


def to_released(croma: Croma) -> dict[str, dict[str, Tensor]]:
    """The five state dicts of a model, as released checkpoints hold them."""
    released: dict[str, dict[str, Tensor]] = {part: {} for part in _RELEASED_PARTS.values()}
    for name, tensor in croma.state_dict().items():
        part, key = released_name(name)
        released[part][key] = tensor
    return released


def from_any(content: Any, *, heads: int = HEADS) -> tuple[Croma, Normalisation]:
    """The encoders and their normalisation out of a file of ours, of a released one, or of torchgeo's.

    Args:
        content: From `model.pretrained.read`.
        heads: Of weights that are not ours.

    Raises:
        ValueError: When it is none of them, or something does not fit.
    """
    theirs = set(_RELEASED_PARTS.values())
    keys = set(content) if isinstance(content, Mapping) else set()
    if theirs & keys:
        return from_released(content, heads=heads)
    if theirs & {str(key).partition(".")[0] for key in keys}:
        return from_torchgeo(content, heads=heads)
    return restore(checked(content))


def from_released(released: Mapping[str, Mapping[str, Tensor]], *, heads: int = HEADS) -> tuple[Croma, Normalisation]:
    """The model of five released state dicts, in evaluation mode; sizes are read off the weights.

    Raises:
        ValueError: Naming what is missing, not expected, or of another shape.
    """
    missing = [part for part in _RELEASED_PARTS.values() if part not in released]
    if missing:
        expected = ", ".join(_RELEASED_PARTS.values())
        hint = "; weights of one sensor alone are not taken" if len(missing) < len(_RELEASED_PARTS) else ""
        raise ValueError(f"a released checkpoint holds {expected}: {', '.join(missing)} is missing{hint}")
    flat = {f"{part}.{key}": tensor for part in _RELEASED_PARTS.values() for key, tensor in released[part].items()}
    sizes = _sizes(flat, _RELEASED_PARTS)
    croma = without_weights(lambda: Croma(CromaConfig(**sizes, heads=heads)))
    ours = {".".join(released_name(name)): name for name in croma.state_dict()}
    load_weights(croma, {ours.get(key, key): tensor for key, tensor in flat.items()})
    return croma.eval(), NORMALISATION


def to_torchgeo(croma: Croma, *, image_px: int | None = None) -> dict[str, Tensor]:
    """The state dict of torchgeo's CROMA.

    Args:
        croma: To take the weights of.
        image_px: Side of the images of torchgeo's model, if it is of a version (0.8 and later) that keeps its bias as
            a buffer; None leaves the buffer out, for earlier versions or ``strict=False``.
    """
    flat = {f"{part}.{key}": tensor for part, state in to_released(croma).items() for key, tensor in state.items()}
    if image_px is not None:
        side = image_px // croma.config.patch_px
        device = next(croma.parameters()).device
        flat[_TORCHGEO_BIAS] = grid_bias(side, side, croma.config.heads, device).clone()
    return flat


def from_torchgeo(state: Mapping[str, Tensor], *, heads: int = HEADS) -> tuple[Croma, Normalisation]:
    """The model of a torchgeo state dict, with or without its buffer; raises as `from_released` does."""
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        # The bias follows from the grid; with it, torchgeo's weights of one image size do not load at another.
        if key != _TORCHGEO_BIAS:
            part, _, rest = key.partition(".")
            parts.setdefault(part, {})[rest] = tensor
    return from_released(parts, heads=heads)


def to_reference_pretraining(model: CromaPretraining) -> dict[str, Tensor]:
    """The state dict of the reference's training code, with its position table for 120 px."""
    state = {reference_name(name): tensor for name, tensor in model.state_dict().items()}
    token = state[_REFERENCE_MASK]
    state[_REFERENCE_MASK] = token[None, None]
    table = sine_cosine_positions(REFERENCE_GRID, REFERENCE_GRID, token.shape[-1], token.device)
    return state | {_REFERENCE_POSITIONS: table[None].clone()}


def from_reference_pretraining(
    state: Mapping[str, Tensor],
    *,
    heads: int = HEADS,
    decoder_heads: int = DECODER_HEADS,
    objective: Objective | None = None,
) -> tuple[CromaPretraining, Normalisation]:
    """The pretraining model of a state dict of the reference's training code, in DistributedDataParallel or not.

    Its names do not load into the reference's own inference classes; through this they do, by `to_released`.

    Raises:
        ValueError: Naming what is missing, not expected, or of another shape.
    """
    state = {key.removeprefix("module."): tensor for key, tensor in state.items()}
    sizes = _sizes(state, _REFERENCE_PARTS)
    token = state.get(_REFERENCE_MASK, torch.empty(0)).flatten()
    if not token.numel():
        raise ValueError(f"{_REFERENCE_MASK} is missing: this is no checkpoint of the reference's training code")
    config = CromaConfig(
        **sizes,
        heads=heads,
        decoder_width=token.numel(),
        decoder_depth=_depth(state, "decoder."),
        decoder_heads=decoder_heads,
    )
    model = without_weights(lambda: CromaPretraining(config, objective))
    ours = {reference_name(name): name for name in model.state_dict()}
    # Its table is fixed, and computed here for any grid.
    weights = {ours.get(key, key): tensor for key, tensor in state.items() if key != _REFERENCE_POSITIONS}
    load_weights(model, weights | {ours[_REFERENCE_MASK]: token})
    return model, NORMALISATION


def _sizes(flat: Mapping[str, Tensor], parts: Mapping[str, str]) -> dict[str, int]:
    """Width and depths of the encoders in a flat state dict."""
    optical = parts["optical_encoder"]
    embedding = flat.get(f"{optical}.linear_input.weight")
    if embedding is None:
        raise ValueError(f"{optical} holds no linear_input.weight: this is no CROMA checkpoint of that layout")
    depths = {f"{each}_depth": _depth(flat, f"{parts[f'{each}_encoder']}.") for each in ("optical", "radar", "joint")}
    return {"width": embedding.shape[0], **depths}


def _depth(keys: Iterable[str], prefix: str) -> int:
    layers = (key.partition("layers.")[2] for key in keys if key.startswith(prefix))
    return len({layer.split(".")[0] for layer in layers if layer})


def _inner_key(part: str, path: list[str], leaves: Mapping[str, str]) -> str:
    """The rest of our name within a part, split at dots -> the key within that part."""
    if part.endswith("head"):
        return ".".join([_IN_HEAD[path[0]], *path[1:]])
    prefix = {"joint_encoder": "", "decoder": "decoder."}.get(part, "transformer.")
    if path[0] == "patch_embedding":
        return ".".join(["linear_input", *path[1:]])
    if path[0] == "norm":
        return ".".join([f"{prefix}norm_out", *path[1:]])
    layers, index, block, inner, *leaf = path
    inner = leaves.get(inner, inner)
    # The reference's training code names the output of self-attention otherwise than that of cross-attention.
    if leaves is _REFERENCE_LEAVES and inner == "to_out" and block != "cross_attention":
        inner = "out"
    blocks = _IN_JOINT if part == "joint_encoder" else _IN_ENCODER
    return prefix + ".".join([layers, index, blocks[block], inner, *leaf])
