"""litdata's feed of the chips in .npy files, for measurements; in an environment of its own, where nothing of ours is.

`python tests/litdata_feed.py FOLDER NUM_CROPS` writes the chips as litdata has them, then answers as `tests.feed_ways`.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from litdata import StreamingDataLoader, StreamingDataset, optimize

NAMES = ("b10", "b20", "b60", "radar")
STEPS = {"b10": 1, "b20": 2, "b60": 6, "radar": 1}
BATCH, WORKERS = 64, 2


def chip(index: int) -> dict[str, Any]:
    return {name: np.load(Path(sys.argv[1], f"{name}.npy"), mmap_mode="r")[index].copy() for name in NAMES}


class Crops(StreamingDataset):
    """A random crop of every chip."""

    crop_px = 120

    def __getitem__(self, index: Any) -> Any:
        sample = super().__getitem__(index)
        y_px, x_px = np.random.randint(0, (264 - self.crop_px) // 6 + 1, 2) * 6  # noqa: NPY002
        crops = {}
        for name, step in STEPS.items():
            y, x, side = y_px // step, x_px // step, self.crop_px // step
            crops[name] = np.ascontiguousarray(sample[name][..., y : y + side, x : x + side])
        return crops


def main() -> None:
    folder, num_crops = Path(sys.argv[1]), int(sys.argv[2])
    count = len(np.load(folder / "b10.npy", mmap_mode="r"))
    optimize(chip, list(range(count)), str(folder / "litdata"), chunk_bytes="64MB", num_workers=1)
    repeat(folder / "litdata", num_crops // count)
    loaders = {}
    for crop_px in (120, 180):
        dataset = Crops(str(folder / "litdata"), shuffle=True)
        dataset.crop_px = crop_px
        loaders[crop_px] = StreamingDataLoader(dataset, batch_size=BATCH, num_workers=WORKERS, persistent_workers=True)
    print("ready", flush=True)  # noqa: T201
    me = psutil.Process()
    for line in sys.stdin:
        loader = loaders[int(line)]
        # Its workers live on from here, and what they used before does not count.
        start, busy = time.perf_counter(), used(me)
        crops = 0
        while crops < num_crops:
            for batch in loader:
                crops += len(batch["b10"])
        seconds = time.perf_counter() - start
        print(json.dumps({"crops": crops, "s": seconds, "cpu_s": used(me) - busy}), flush=True)  # noqa: T201


def repeat(folder: Path, times: int) -> None:
    """Make the chunks be there several times, as links: an epoch is long, and all of it lies in memory."""
    index = json.loads((folder / "index.json").read_text())
    first = list(index["chunks"])
    for number in range(1, times):
        for chunk in first:
            link = chunk | {"filename": f"again-{number}-{chunk['filename']}"}
            (folder / link["filename"]).hardlink_to(folder / chunk["filename"])
            index["chunks"].append(link)
    (folder / "index.json").write_text(json.dumps(index))


def used(me: Any) -> float:
    """CPU seconds of this process and all that it started."""
    times = [each.cpu_times() for each in (me, *me.children(recursive=True))]
    return float(sum(time.user + time.system + time.children_user + time.children_system for time in times))


if __name__ == "__main__":
    main()
