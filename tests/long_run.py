"""Some thousand steps of a small CROMA through the job itself, killed on the way: does its probe improve all the same?

Trains `tiny` on the simulated archive and all real pixels there are, mixed by weight, while checkpoints are evaluated
on blocks of the simulated archive that are held out. Twice the whole job is killed, driver and workers; once a worker.
Every stage is kept in the folder: the same command goes on where it stopped.

Example:
    nice -n 19 python -m tests.long_run runs/long ../shared/data
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil
import ray

from jobs.build_dataset import BuildDataset
from jobs.build_dataset import main as build
from jobs.support.checkpoint_scores import flat_scores, read_scores
from jobs.support.pretraining import read_losses
from jobs.support.settings import parse
from pipeline.objects import Objects
from pipeline.simulation.archive import write_archive
from pipeline.simulation.profiles import PROFILES
from pipeline.simulation.server import StacServer
from pipeline.versions import latest_sealed
from tests.real_scenes import CELL_M, write_real_archive
from tests.training_runs import samples_kept

DEMO = PROFILES["demo"]
SIDE_PX = CELL_M // 10
REAL_WEIGHT = 0.1
"""Of the samples, from some ten chips of four places."""

SAMPLES = 128_000
BATCH = 32
EVERY = 16_000
"""Samples between evaluations."""

KILLED_AFTER = (24_000, 56_000, 88_000)
WORKER_KILLED_AFTER = 56_000
"""Samples. After these only the worker is killed, after the others the whole job."""

TRAINING = {
    "size": "tiny", "crop_px": 48, "global_batch": BATCH, "learning_rate": 5e-4, "warmup_fraction": 0.05,
    "checkpoint_every_samples": 4_000, "feed": "in_process", "feed_threads": 1, "cpus_per_worker": 0.5,
    "num_workers": 1, "evaluate.every_samples": EVERY, "evaluate.window_px": 48, "evaluate.max_windows": 600,
    "evaluate.num_cpus": 0.5, "max_failures": 3, "keep_checkpoints": 2,
}  # fmt: skip


def stores_in(folder: Path, shared_data: Path) -> list[dict[str, object]]:
    """The stores and their weights, built if they are not there."""
    simulated = folder / "simulated.zarr"
    splits = {
        "splits.block_cells": 4,
        "splits.buffer_cells": 0,
        "splits.val_fraction": 0.1,
        "splits.test_fraction": 0.3,
    }
    with running_ray(), tempfile.TemporaryDirectory(dir=folder) as scratch:
        archive = Path(scratch)
        write_archive(archive / "simulated", DEMO, seed=0, processes=2)
        with StacServer(archive / "simulated") as server:
            region = ",".join(map(str, DEMO.region))
            make(simulated, server.url, region, DEMO.period, labels="worldcover", **splits)
        real = write_real_archive(shared_data, archive / "real")
        with StacServer(real.directory) as server:
            everything = {"splits.val_fraction": 0, "splits.test_fraction": 0, "pairing.min_overlap": 0.99}
            for place, box in real.regions.items():
                make(folder / f"{place}.zarr", server.url, ",".join(map(str, box)), real.periods[place], **everything)
    share = REAL_WEIGHT / len(real.regions)
    places = [{"store": str(folder / f"{place}.zarr"), "weight": share} for place in real.regions]
    return [{"store": str(simulated), "weight": 1 - REAL_WEIGHT}, *places]


def make(store: Path, archive: str, region: str, period: str, **more: object) -> None:
    """A store of a region."""
    words = {
        "archive": archive, "region": region, "period": period, "store": store, "side_px": SIDE_PX, "shard_chips": 64,
        "block_cells": 4, "screening.min_valid_fraction": 0.95, **more,
    }  # fmt: skip
    build(parse(BuildDataset, [f"{key}={value}" for key, value in words.items()]))


@contextmanager
def running_ray() -> Iterator[None]:
    """Ray on this machine alone."""
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()


def train(folder: Path, stores: list[dict[str, object]]) -> None:
    """Run the job to its end, again after every kill."""
    out, done = Objects.at(str(folder / "run")), folder / "killed"
    num_chips = sum(chips_of(str(each["store"])) for each in stores)
    words = {
        **TRAINING, "stores": json.dumps(stores), "out": out.url, "run_dir": out.url,
        "epochs": -(-SAMPLES // num_chips), "evaluate.store": stores[0]["store"],
    }  # fmt: skip
    command = [sys.executable, "-m", "jobs.pretrain", *(f"{key}={value}" for key, value in words.items())]
    kills = [after for after in KILLED_AFTER if not (done / str(after)).exists()]
    while True:
        with subprocess.Popen(command, start_new_session=True) as job:
            while kills and job.poll() is None:
                if samples_kept(out.url) < kills[0]:
                    time.sleep(1.0)
                    continue
                done.mkdir(exist_ok=True)
                (done / str(kills[0])).touch()
                if kills.pop(0) == WORKER_KILLED_AFTER:
                    kill_worker(job.pid)
                else:
                    os.killpg(job.pid, signal.SIGKILL)
                    job.wait()
        if job.returncode != -signal.SIGKILL:
            break
    assert not kills, f"the job ended by itself before {kills[0]} samples"
    assert job.returncode == 0, job.returncode


def kill_worker(pid: int) -> None:
    """Kill the process in which the job trains."""
    for process in psutil.Process(pid).children(recursive=True):
        if "TrainWorker" in " ".join(process.cmdline()):
            process.kill()
            return
    raise LookupError(f"no worker of process {pid}")


def chips_of(store: str) -> int:
    """Training chips of a store."""
    return len(latest_sealed(store).written_rows(split="train"))


def table(out: Objects) -> Iterator[str]:
    """Scores of every evaluated checkpoint, a Markdown row each."""
    rows: list[Mapping[str, float]] = []
    samples: list[int] = []
    for found in read_scores(out):
        if "scores" in found:
            rows.append(flat_scores(found) or flat_scores(found, source="untrained"))
            samples.append(found["samples"])
    names = sorted(name for name in rows[-1] if name.endswith("/accuracy"))
    yield f"| samples | {' | '.join(name.removesuffix('/accuracy') for name in names)} |"
    yield f"|---|{'---|' * len(names)}"
    for seen, row in zip(samples, rows, strict=True):
        yield f"| {seen} | {' | '.join(f'{100 * row[name]:.1f}' if name in row else '' for name in names)} |"


def main() -> None:
    """Build, train, print."""
    os.environ["RAY_AUTH_MODE"] = "disabled"
    folder, shared_data = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    plan = folder / "stores.json"
    if not plan.exists():
        stores = stores_in(folder, shared_data)
        plan.write_text(json.dumps(stores))
    train(folder, json.loads(plan.read_text()))
    out = Objects.at(str(folder / "run"))
    steps = read_losses(out)
    sys.stdout.write(f"{len(steps)} steps, {steps[-1]['samples']:.0f} samples, loss {steps[0]['loss']:.2f} to ")
    sys.stdout.write(f"{steps[-1]['loss']:.2f}; killed after {', '.join(map(str, KILLED_AFTER))} samples\n")
    sys.stdout.write("\n".join(table(out)) + "\n")


if __name__ == "__main__":
    main()
