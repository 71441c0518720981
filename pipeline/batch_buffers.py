"""Batches that several threads fill and one takes in order, in a bounded number of buffers used again and again."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


class Allocate(Protocol):
    """Makes an array, uninitialised."""

    def __call__(self, shape: tuple[int, ...], dtype: np.dtype[Any], /) -> NDArray[Any]:
        """Of this shape and type."""
        ...


class BatchBuffers:
    """Batches by number, each with room for so many samples.

    Args:
        make: Makes the arrays of one.
        size: Samples of a batch.
        first: Number of the batch that is taken first.
        lead: How many batches beyond the one that is taken next may be begun; those that open with one of these are
            finished as well.
    """

    def __init__(self, make: Callable[[], dict[str, NDArray[Any]]], *, size: int, first: int, lead: int) -> None:
        self._make, self._size, self._lead = make, size, lead
        self._next = first
        self._batches: dict[int, dict[str, NDArray[Any]]] = {}
        self._missing: dict[int, int] = {}
        self._free: list[dict[str, NDArray[Any]]] = []
        self._handed_over: dict[str, NDArray[Any]] | None = None
        self._error: BaseException | None = None
        self._closed = False
        self._changed = threading.Condition()

    def wait_for_room(self, number: int) -> bool:
        """Wait until a batch may be begun; False where nothing is wanted any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or number < self._next + self._lead)
            return not self._closed

    def at(self, number: int) -> Mapping[str, NDArray[Any]]:
        """The arrays of a batch that is being filled."""
        with self._changed:
            if number not in self._batches:
                self._batches[number] = self._free.pop() if self._free else self._make()
                self._missing[number] = self._size
            return self._batches[number]

    def filled(self, number: int) -> None:
        """One more sample of a batch is there."""
        with self._changed:
            self._missing[number] -= 1
            if not self._missing[number]:
                self._changed.notify_all()

    def take(self) -> dict[str, NDArray[Any]]:
        """The next batch, when it is full; the one before is used again from now on.

        Raises:
            BaseException: Whatever ended the filling.
        """
        with self._changed:
            if self._handed_over is not None:
                self._free.append(self._handed_over)
                self._handed_over = None
            self._changed.wait_for(lambda: self._error is not None or self._missing.get(self._next) == 0)
            if self._error is not None:
                raise self._error
            self._handed_over = self._batches.pop(self._next)
            del self._missing[self._next]
            self._next += 1
            self._changed.notify_all()
            return self._handed_over

    def fail(self, error: BaseException) -> None:
        """Nothing more will come: whoever takes is told why."""
        with self._changed:
            self._error = self._error or error
            self._closed = True
            self._changed.notify_all()

    def close(self) -> None:
        """Nothing more is wanted."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
