"""Batches on a worker's device, read by threads of the worker itself: see `pipeline.local_feed`."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.crops import Batch
from pipeline.fed_chips import Feed
from pipeline.local_feed import rank_batches


def device_batches(
    feed: Feed, *, rank: int, seen: int, epochs: int, threads: int, device: torch.device
) -> Iterator[tuple[dict[str, Tensor], float]]:
    """A rank's batches from where the run stands to its end, each with the seconds it was waited for.

    A batch is good until the next one is asked for.
    """
    if device.type == "cuda":
        batches = rank_batches(feed, rank=rank, epochs=epochs, seen=seen, threads=threads, allocate=pinned_array)
        return _copied_ahead(batches, device)
    return _waited_for(rank_batches(feed, rank=rank, epochs=epochs, seen=seen, threads=threads))


def _waited_for(batches: Iterator[Batch]) -> Iterator[tuple[dict[str, Tensor], float]]:
    """The batches as they lie in the buffers."""
    while True:
        start = time.monotonic()
        batch = next(batches, None)
        if batch is None:
            return
        yield as_tensors(batch), time.monotonic() - start


def as_tensors(batch: Batch) -> dict[str, Tensor]:
    """The same memory; what lies in Ray's object store can only be read."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
        return {name: torch.from_numpy(array) for name, array in batch.items()}


def _copied_ahead(batches: Iterator[Batch], device: torch.device) -> Iterator[tuple[dict[str, Tensor], float]]:
    """The batches on a GPU: one is copied, on a stream of its own, while the step of the one before runs."""
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def copied() -> dict[str, Tensor] | None:
        if (batch := next(batches, None)) is None:
            return None
        with torch.cuda.stream(stream):
            moved = {name: torch.from_numpy(array).to(device, non_blocking=True) for name, array in batch.items()}
        # The buffers are written to again as soon as the next batch is asked for.
        stream.synchronize()
        return moved

    with ThreadPoolExecutor(1, thread_name_prefix="copy") as thread:
        coming = thread.submit(copied)
        while True:
            start = time.monotonic()
            moved = coming.result()
            if moved is None:
                return
            for tensor in moved.values():
                tensor.record_stream(torch.cuda.current_stream(device))
            coming = thread.submit(copied)
            yield moved, time.monotonic() - start


def pinned_array(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """An array that a GPU can copy from while the CPU goes on."""
    of_torch = torch.from_numpy(np.empty(0, dtype)).dtype
    array: NDArray[Any] = torch.empty(shape, dtype=of_torch, pin_memory=True).numpy()
    return array
