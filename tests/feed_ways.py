"""Ways to bring shuffled crops into a training process, each in a process of its own, for measurements.

`python -m tests.feed_ways WAY FOLDER NUM_CROPS` answers every line it reads, the side of the crops in pixels, with what
it took to bring so many: crops, seconds, CPU seconds of all its processes, MiB of memory held at most.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from pipeline.epochs import usual_window
from pipeline.fed_chips import Feed
from pipeline.feed import training_samples
from pipeline.layout import MODEL_ARRAYS, Layout
from pipeline.local_feed import rank_batches
from pipeline.store import Store
from tests.bench_growth import cpu_seconds

BATCH = int(os.environ.get("BENCH_BATCH", "64"))
WORKERS = 2
SPECS = Layout(has_classes=False).arrays()

Way = Callable[[Path, int, int], int]
"""Folder, crops wanted, side of a crop in pixels -> crops that came."""


def cut(chip: dict[str, NDArray[Any]], rng: np.random.Generator, crop_px: int) -> dict[str, NDArray[Any]]:
    """Views of a random crop of a chip."""
    y_px, x_px = rng.integers(0, (264 - crop_px) // 6 + 1, 2) * 6
    return {name: spec.window(chip[name], y_px, x_px, crop_px) for name, spec in SPECS.items()}


class Mapped(Dataset[dict[str, NDArray[Any]]]):
    """Crops of memory-mapped arrays."""

    def __init__(self, folder: Path, num_crops: int, crop_px: int) -> None:
        self.arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in MODEL_ARRAYS}
        self.num_crops, self.crop_px = num_crops, crop_px

    def __len__(self) -> int:
        return self.num_crops

    def __getitem__(self, index: int) -> dict[str, NDArray[Any]]:
        number = index % len(self.arrays["b10"])
        chip = {name: array[number] for name, array in self.arrays.items()}
        return {
            name: np.ascontiguousarray(crop)
            for name, crop in cut(chip, np.random.default_rng(index), self.crop_px).items()
        }


@cache
def mapped_loader(folder: Path, num_crops: int, crop_px: int) -> DataLoader[Any]:
    """PyTorch's, with processes that live on."""
    dataset = Mapped(folder, num_crops, crop_px)
    return DataLoader(dataset, BATCH, shuffle=True, num_workers=WORKERS, persistent_workers=True)


def memmap(folder: Path, num_crops: int, crop_px: int) -> int:
    """Mapped arrays in PyTorch's loader."""
    return sum(len(batch["b10"]) for batch in mapped_loader(folder, num_crops, crop_px))


def memmap_threads(folder: Path, num_crops: int, crop_px: int) -> int:
    """Mapped arrays cropped by threads into buffers that are used again: what is left when nothing is in the way."""
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in MODEL_ARRAYS}
    order = np.random.default_rng(0).permutation(num_crops)

    def work(part: NDArray[np.int64]) -> None:
        rng = np.random.default_rng(0)
        sides = {name: crop_px // spec.step_px for name, spec in SPECS.items()}
        batch = {n: np.empty((BATCH, spec.shape[0], sides[n], sides[n]), spec.dtype) for n, spec in SPECS.items()}
        for place, number in enumerate((part % len(arrays["b10"])).tolist()):
            crops = cut({name: array[number] for name, array in arrays.items()}, rng, crop_px)
            for name, crop in crops.items():
                batch[name][place % BATCH] = crop

    threads = [threading.Thread(target=work, args=(part,)) for part in np.array_split(order, WORKERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return num_crops


def feed_of(folder: Path, codec: str, crop_px: int, crops_per_chip: int) -> Feed:
    """Of the store with this codec."""
    url = str(folder / f"{codec}.zarr")
    window = usual_window(crops_per_chip)
    how = {"crop_px": crop_px, "crops_per_chip": crops_per_chip, "global_batch": BATCH, "window_chips": window}
    return Feed(url=url, version=1, **how)


def in_process(codec: str, crops_per_chip: int, folder: Path, num_crops: int, crop_px: int) -> int:
    """The feed within the process."""
    feed = feed_of(folder, codec, crop_px, crops_per_chip)
    batches = rank_batches(feed, rank=0, epochs=1, threads=WORKERS)
    return sum(len(batch["row"]) for batch in batches)


@cache
def ray_data(codec: str, crops_per_chip: int, folder: Path, crop_px: int) -> Any:
    """A dataset, which gives an epoch each time."""
    if not ray.is_initialized():
        os.environ["RAY_AUTH_MODE"] = "disabled"
        ray.init(address="local", num_cpus=WORKERS, include_dashboard=False, log_to_driver=False,
                 object_store_memory=2_000_000_000)  # fmt: skip
        ray.data.DataContext.get_current().enable_progress_bars = False
        ray.data.DataContext.get_current().execution_options.preserve_order = True
    return training_samples(feed_of(folder, codec, crop_px, crops_per_chip))


def through_ray(codec: str, crops_per_chip: int, folder: Path, num_crops: int, crop_px: int) -> int:
    """The feed through Ray Data, as workers take it on CPUs."""
    dataset = ray_data(codec, crops_per_chip, folder, crop_px)
    return sum(len(batch["row"]) for batch in dataset.iter_batches(batch_size=BATCH, batch_format="numpy"))


def by_zarr(folder: Path, num_crops: int, crop_px: int) -> int:
    """Chip by chip with zarr-python; a few say enough."""
    store, rng = Store.open(str(folder / "lz4.zarr")), np.random.default_rng(0)
    rows = rng.permutation(num_crops)[:64].tolist()
    for row in rows:
        cut(store.read_chip(row), rng, crop_px)
    return len(rows)


WAYS: dict[str, Way] = {
    "memmap": memmap,
    "memmap-threads": memmap_threads,
    "zarr-python": by_zarr,
    "none": partial(in_process, "none", 1),
    "lz4": partial(in_process, "lz4", 1),
    "lz4-K4": partial(in_process, "lz4", 4),
    "ray-none": partial(through_ray, "none", 1),
    "ray-lz4": partial(through_ray, "lz4", 1),
    "ray-lz4-K4": partial(through_ray, "lz4", 4),
}


def held_mib() -> Iterator[float]:
    """The most memory that this process has held since the last time, MiB."""
    while True:
        (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        # Counts anew from here.
        Path("/proc/self/clear_refs").write_text("5")
        yield int(line.split()[1]) / 1024


def main() -> None:
    name, folder, num_crops = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    way, held = WAYS[name], held_mib()
    at_start = psutil.Process().memory_info().rss / 2**20
    torch.set_num_threads(1)
    print("ready", flush=True)  # noqa: T201
    for line in sys.stdin:
        next(held)
        start, busy = time.perf_counter(), cpu_seconds()
        crops = way(folder, num_crops, int(line))
        seconds, busy = time.perf_counter() - start, cpu_seconds() - busy
        answer = {"crops": crops, "s": seconds, "cpu_s": busy, "mib": next(held) - at_start}
        print(json.dumps(answer), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
