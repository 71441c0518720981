"""torchgeo's CROMA out of its wheel: one file, because installing torchgeo would bring dozens of packages."""

from __future__ import annotations

import enum
import sys
import types
import zipfile
from typing import Any

import torch


def rearrange(tensor: torch.Tensor, pattern: str, **sizes: int) -> torch.Tensor:
    """The three patterns that the file uses of einops."""
    if pattern == "b n (h d) -> b h n d":
        return tensor.unflatten(-1, (sizes["h"], -1)).transpose(1, 2)
    if pattern == "b h n d -> b n (h d)":
        return tensor.transpose(1, 2).flatten(2)
    assert pattern == "b c (h i) (w j) -> b (h w) (c i j)", pattern
    cut = tensor.unflatten(3, (-1, sizes["j"])).unflatten(2, (-1, sizes["i"]))
    return cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def load_torchgeo(wheel: str) -> types.ModuleType:
    """Run the one file of the wheel, with stand-ins for what it imports while it is run."""
    source = zipfile.ZipFile(wheel).read("torchgeo/models/croma.py")
    stand_ins: dict[str, dict[str, Any]] = {
        "einops": {"rearrange": rearrange},
        "torchvision": {},
        "torchvision.models": {},
        "torchvision.models._api": {"Weights": lambda **_values: object(), "WeightsEnum": enum.Enum},
    }
    absent = [name for name in stand_ins if name not in sys.modules]
    for name in absent:
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(stand_ins[name])
    try:
        module = types.ModuleType("torchgeo_croma")
        exec(compile(source, "torchgeo/models/croma.py", "exec"), vars(module))
    finally:
        for name in absent:
            del sys.modules[name]
    return module
