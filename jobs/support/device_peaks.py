"""What GPUs could do at best, to hold against what training reaches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch

_PEAK_TFLOPS: Final[Mapping[str, float]] = {
    "B200": 2250.0,
    "H200": 989.0,
    "GH200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "A10": 125.0,
}
"""Part of a name -> dense bfloat16, 10^12 operations per second, from the makers' data sheets."""


def peak_flops(device_name: str) -> float | None:
    """Dense bfloat16 operations per second of a GPU, by the name that torch has for it; None where it is not known."""
    words = device_name.replace("-", " ").split()
    for part, tflops in _PEAK_TFLOPS.items():
        wanted = part.split()
        if any(words[at : at + len(wanted)] == wanted for at in range(len(words))):
            return tflops * 1e12
    return None


def peak_of(device: torch.device) -> float | None:
    """The same of a device; None for CPUs."""
    return peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
