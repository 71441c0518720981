"""Memory for blocks that a process makes one after the other: given out again when nobody holds it any more.

Fresh memory costs more than what is written to it: the kernel hands it over page by page, zeroed. That took four times
as long as the writing on the machine where it was measured.
"""

from __future__ import annotations

import sys
import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

_MOST_KEPT = 64
"""Pieces of memory; a block has one per array, and a task a few blocks."""


class BlockBuffers:
    """Arrays whose memory is used again once they, and all that was made of them without a copy, are gone."""

    def __init__(self) -> None:
        self._kept: list[NDArray[np.uint8]] = []
        self._turn = threading.Lock()

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """An array, uninitialised."""
        num_bytes = int(np.prod(shape)) * dtype.itemsize
        with self._turn:
            return self._memory(num_bytes)[:num_bytes].view(dtype).reshape(shape)

    def _memory(self, num_bytes: int) -> NDArray[np.uint8]:
        """So many bytes that nobody else has."""
        free = [number for number in range(len(self._kept)) if _holders(self._kept, number) <= _NOBODY]
        fitting = [number for number in free if num_bytes <= self._kept[number].size <= 2 * num_bytes]
        if fitting:
            return self._kept[min(fitting, key=lambda number: self._kept[number].size)]
        if len(self._kept) >= _MOST_KEPT and free:
            del self._kept[free[0]]
        memory = np.empty(num_bytes, np.uint8)
        if len(self._kept) < _MOST_KEPT:
            self._kept.append(memory)
        return memory


def _holders(kept: list[NDArray[np.uint8]], number: int) -> int:
    """Who holds an array, the list and this call among them: views do, and buffers that Arrow made of views."""
    return sys.getrefcount(kept[number])


_NOBODY = _holders([np.empty(1, np.uint8)], 0)
"""But the list and the call."""
