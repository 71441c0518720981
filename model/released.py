"""The layout of CROMA's released weights: five state dicts, whose names this maps to ours and back.

torchgeo's state dict is the same five, flattened with a dot, and a buffer with the bias that is left out here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from torch import Tensor

from model.croma import Croma, CromaConfig
from model.pretrained import load_weights

HEADS: Final = 16
"""Of both released sizes; weights do not tell."""

_PARTS: Final = {
    "radar_encoder": "s1_encoder",
    "radar_head": "s1_GAP_FFN",
    "optical_encoder": "s2_encoder",
    "optical_head": "s2_GAP_FFN",
    "joint_encoder": "joint_encoder",
}
_IN_ENCODER: Final = {"attention": "0", "feed_forward": "1"}
_IN_JOINT: Final = {"self_attention": "0", "cross_attention": "1", "feed_forward": "2"}
_IN_LAYER: Final = {"norm": "input_norm", "expand": "net.0", "contract": "net.3"}
_IN_HEAD: Final = {"norm": "0", "expand": "1", "contract": "3"}


def released_name(name: str) -> tuple[str, str]:
    """Our parameter's name -> the state dict and the key it has in a released checkpoint."""
    part, _, rest = name.partition(".")
    return _PARTS[part], _released_key(part, rest.split("."))


def to_released(croma: Croma) -> dict[str, dict[str, Tensor]]:
    """The five state dicts of a model, as released checkpoints hold them."""
    released: dict[str, dict[str, Tensor]] = {part: {} for part in _PARTS.values()}
    for name, tensor in croma.state_dict().items():
        part, key = released_name(name)
        released[part][key] = tensor
    return released


def from_released(released: Mapping[str, Mapping[str, Tensor]], *, heads: int = HEADS) -> Croma:
    """The model of five released state dicts, in evaluation mode; sizes are read off the weights.

    Raises:
        ValueError: Naming what is missing, not expected, or of another shape.
    """
    missing = [part for part in _PARTS.values() if part not in released]
    if missing:
        raise ValueError(f"a released checkpoint holds {', '.join(_PARTS.values())}: {', '.join(missing)} is missing")
    croma = Croma(_config(released, heads))
    ours = {".".join(released_name(name)): name for name in croma.state_dict()}
    flat = {f"{part}.{key}": tensor for part in _PARTS.values() for key, tensor in released[part].items()}
    load_weights(croma, {ours.get(key, key): tensor for key, tensor in flat.items()})
    return croma.eval()


def _config(released: Mapping[str, Mapping[str, Tensor]], heads: int) -> CromaConfig:
    embedding = released["s2_encoder"].get("linear_input.weight")
    if embedding is None:
        raise ValueError("s2_encoder holds no linear_input.weight: this is no released CROMA checkpoint")
    optical, radar, joint = (
        len({key.partition("layers.")[2].split(".")[0] for key in released[part] if "layers." in key})
        for part in ("s2_encoder", "s1_encoder", "joint_encoder")
    )
    return CromaConfig(
        width=embedding.shape[0], optical_depth=optical, radar_depth=radar, joint_depth=joint, heads=heads
    )


def _released_key(part: str, path: list[str]) -> str:
    """The rest of our name, split at dots -> the key within its state dict."""
    if part.endswith("head"):
        return ".".join([_IN_HEAD[path[0]], *path[1:]])
    prefix, blocks = ("", _IN_JOINT) if part == "joint_encoder" else ("transformer.", _IN_ENCODER)
    if path[0] == "patch_embedding":
        return ".".join(["linear_input", *path[1:]])
    if path[0] == "norm":
        return ".".join([f"{prefix}norm_out", *path[1:]])
    layers, index, block, inner, *leaf = path
    return prefix + ".".join([layers, index, blocks[block], _IN_LAYER.get(inner, inner), *leaf])
