"""Tensors that follow from sizes alone, made on the device that needs them and kept for the next call."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import lru_cache, wraps

import torch
from torch import Tensor


def kept(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Keep the last four tensors that `make` made of its arguments.

    A compiled or exported program makes them again each time: it cannot look into a cache.
    """

    @lru_cache(maxsize=4)
    def remembered(*arguments: Hashable) -> Tensor:
        # A tensor made in inference mode could never again take part in training.
        with torch.inference_mode(False), torch.no_grad():
            return make(*arguments)

    @wraps(make)
    def made(*arguments: Hashable) -> Tensor:
        return make(*arguments) if torch.compiler.is_compiling() else remembered(*arguments)

    return made
