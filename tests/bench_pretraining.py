"""Pretraining through `jobs/pretrain.py` from a store on local disk, as fast as this machine's GPU takes it.

Each way is a run of the job of its own, with a cluster of its own; steps that start an epoch, and the first ones, which
compile, are told apart. The store's chips are made up, compress as real ones do, and lie in memory after the first
epoch: what is measured is the way from there to the device, and the step.

Example:
    python -m tests.bench_pretraining                         # all ways, on a GPU
    python -m tests.bench_pretraining in-process ray          # some
    BENCH_SIZE=tiny BENCH_BATCH=32 BENCH_ROWS=512 python -m tests.bench_pretraining   # whether it runs, anywhere
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from jobs.support.pretraining import read_losses
from jobs.support.waiting import waited_share
from pipeline.layout import Layout
from pipeline.objects import Objects
from tests.feed_data import make_chips, write_long_store

ROOT: Final = Path(__file__).resolve().parent.parent
SIZE = os.environ.get("BENCH_SIZE", "base")
BATCH = int(os.environ.get("BENCH_BATCH", "1024"))
ROWS = int(os.environ.get("BENCH_ROWS", "32768"))
NUM_CHIPS: Final = 256
WARM_STEPS: Final = 8
"""Compiling, and filling what is read ahead."""

COMMON: Final = (
    "epochs=3", "report_every_epochs=3", "normalisation=ssl4eo-s12", "feed_threads=8", "compile=inductor",
)  # fmt: skip
K4: Final = ("crops_per_chip=4", "epochs=1", "report_every_epochs=1")
WINDOWS: Final = ("scale_augmentation=true",)
WAYS: Final[Mapping[str, Sequence[str]]] = {
    "in-process": ("feed=in_process",),
    "in-process-180": ("feed=in_process", *WINDOWS),
    "in-process-K4-180": ("feed=in_process", *WINDOWS, *K4),
    "ray": (),
    "ray-180": WINDOWS,
    "ray-K4-180": (*WINDOWS, *K4),
    "paper-batch": ("feed=in_process", *WINDOWS, "global_batch=7200", "micro_batch=900", "crops_per_chip=4"),
    "large": ("feed=in_process", "size=large", "global_batch=512"),
}


def run(name: str, store: Path, folder: Path) -> str:
    """One run to its end, and what it was like."""
    out = folder / name
    command = [
        sys.executable, str(ROOT / "jobs/pretrain.py"), f"store={store}", f"out={out}", f"size={SIZE}",
        f"global_batch={BATCH}", *COMMON, *WAYS[name],
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    begun = time.monotonic()
    ran = subprocess.run(once(command), env=environment, capture_output=True, text=True)
    took_s = time.monotonic() - begun
    if ran.returncode:
        return f"{name}: failed\n{ran.stdout[-2000:]}\n{ran.stderr[-4000:]}"
    return line(name, read_losses(Objects.at(str(out))), took_s)


def line(name: str, steps: Sequence[Mapping[str, float]], took_s: float) -> str:
    """What a run was like."""
    warm = steps[WARM_STEPS:]
    starts = [at for at, step in enumerate(steps) if at >= WARM_STEPS and step["epoch"] != steps[at - 1]["epoch"]]
    within = [step for at, step in enumerate(steps) if at >= WARM_STEPS and at not in starts]
    batch = steps[1]["samples"] - steps[0]["samples"]
    rate = batch * len(warm) / sum(step["waited_s"] + step["step_s"] for step in warm)
    in_steps = batch / statistics.median(step["step_s"] for step in within)
    peak = statistics.median(step.get("peak_share", float("nan")) for step in within)
    first = statistics.median([steps[at]["waited_s"] for at in starts] or [float("nan")])
    return (
        f"{name:18} {rate:9.0f} {in_steps:9.0f} {peak:8.1%} {waited_share(within):8.1%} {first:9.2f} "
        f"{statistics.median(step['step_s'] for step in within):8.3f} {len(steps):6} {took_s:8.0f}"
    )


def once(command: Sequence[str]) -> list[str]:
    """A command whose settings are given once, as they were given last."""
    return list({each.partition("=")[0] if "=" in each else each: each for each in command}.values())


def main() -> None:
    names = sys.argv[1:] or list(WAYS)
    layout = Layout(has_classes=False)
    with tempfile.TemporaryDirectory() as folder:
        store = Path(os.environ.get("BENCH_STORE", f"{folder}/chips.zarr"))
        if not store.exists():
            write_long_store(str(store), layout, make_chips(NUM_CHIPS, layout), ROWS)
        sys.stdout.write(
            f"{SIZE}, batch {BATCH}, {os.cpu_count()} cores\n"
            f"{'':18} {'samples/s':>9} {'in steps':>9} {'of peak':>8} {'waited':>8} {'1st, s':>9} {'step, s':>8} "
            f"{'steps':>6} {'job, s':>8}\n"
        )
        for name in names:
            sys.stdout.write(f"{run(name, store, Path(folder))}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
