"""Runs of pretrain in which ranks note what they learn from, and deaths come at a given step."""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, Literal

import ray.train
import torch
from ray.train.v2._internal.execution.context import get_train_context

from jobs.pretrain import Pretrain, main
from jobs.support import preemption, pretraining, training_loop
from jobs.support.pretraining import samples_seen
from jobs.support.settings import parse
from pipeline.grid import Cell
from pipeline.objects import Objects
from tests.sample_chips import LAYOUT, make_chip
from tests.small_stores import SMALL, Candidate, write_store

NUM_CHIPS, CROPS_PER_CHIP, GLOBAL_BATCH, EPOCHS = 25, 2, 6, 2
"""50 samples are 8 steps and 2 samples; two epochs are 16 steps and 4 samples."""

EVERY = 12
"""Samples between checkpoints."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """What happens once, when a rank is about to take a step."""

    rank: int
    at: int
    """Samples seen before the step; the checkpoint before that is waited for."""

    what: Literal["die", "stand", "await_notice"] = "die"
    """Die, stand still to be killed with the driver or the node, or wait for word that a node is to be taken away."""


def run(store: str, out: str, log: str, events: Sequence[Event], **more: object) -> None:
    """The job as it is, but with a small model, and every rank writes down which samples it learnt from."""
    train_worker = pretraining.train_worker
    pretraining.train_worker = tapped(Path(log), out, events)
    values = {
        "store": store,
        "out": out,
        "run_dir": out,
        "size": "tiny",
        "epochs": EPOCHS,
        "crops_per_chip": CROPS_PER_CHIP,
        "crop_px": 24,
        "global_batch": GLOBAL_BATCH,
        "checkpoint_every_samples": EVERY,
        "cpus_per_worker": 0.3,
        **more,
    }
    try:
        main(parse(Pretrain, [f"{key}={value}" for key, value in values.items()]))
    finally:
        pretraining.train_worker = train_worker


def tapped(log: Path, out: str, events: Sequence[Event]) -> Callable[[dict[str, Any]], dict[str, int] | None]:
    # Workers do not know a test's module by the name that pytest gives it: nothing of its own may travel.
    plain = [astuple(event) for event in events]

    def worker(plan: dict[str, Any]) -> dict[str, int] | None:
        training_loop.CONFIGS["tiny"] = SMALL
        preemption.steps_between = lambda steps, elapsed_s: 1
        context = ray.train.get_context()
        rank, world = context.get_world_rank(), context.get_world_size()
        lines = log / f"{time.time_ns()}-{rank}.jsonl"
        learn = training_loop.train_step

        def noted(model: object, batch: dict[str, torch.Tensor], *args: object, **how: object) -> object:
            seen = int(batch["position"][0]) - rank * len(batch["position"])
            for who, at, what in plain:
                flag = log / f"{what}-{at}"
                if (who, at) == (rank, seen) and not flag.exists():
                    while samples_kept(out) < at // EVERY * EVERY:
                        time.sleep(0.1)
                    flag.touch()
                    while what == "await_notice" and not get_train_context().preemption_context.preemption_info:
                        time.sleep(0.1)
                    if what == "stand":
                        time.sleep(600)
                    if what == "die":
                        os.kill(os.getpid(), signal.SIGKILL)
            values = learn(model, batch, *args, **how)
            samples = torch.stack([batch[name].long() for name in ("epoch", "row", "k")], dim=1).tolist()
            with lines.open("a") as file:
                file.write(json.dumps({"world": world, "seen": seen, "samples": samples}) + "\n")
            return values

        training_loop.train_step = noted
        return training_loop.train_worker(plan)

    return worker


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """What a group of workers did from its start to its end."""

    start: int
    world: int
    steps: dict[int, list[tuple[int, int, int]]]
    """By the samples seen before: epoch, row and k of what was learnt from, over all ranks."""


def attempts(log: Path) -> list[Attempt]:
    """In order of their starts."""
    found: dict[tuple[int, int], Attempt] = {}
    for path in sorted(log.glob("*.jsonl")):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        start, world = lines[0]["seen"], lines[0]["world"]
        attempt = found.setdefault((start, world), Attempt(start=start, world=world, steps={}))
        for line in lines:
            attempt.steps.setdefault(line["seen"], []).extend(map(tuple, line["samples"]))
    return list(found.values())


def all_learnt_once(tried: Sequence[Attempt]) -> None:
    """Of all attempts together, up to where the next one began: every sample of the run once.

    What one has learnt in vain, another learns in the same global batches.
    """
    batches: dict[int, list[tuple[int, int, int]]] = {}
    for attempt in tried:
        for seen, samples in attempt.steps.items():
            assert sorted(samples) == batches.setdefault(seen, sorted(samples))
    num_samples = NUM_CHIPS * CROPS_PER_CHIP * EPOCHS // GLOBAL_BATCH * GLOBAL_BATCH
    ends = [*(attempt.start for attempt in tried[1:]), num_samples]
    learnt: Counter[tuple[int, int, int]] = Counter()
    for attempt, end in zip(tried, ends, strict=True):
        for seen in range(attempt.start, end, GLOBAL_BATCH):
            learnt.update(attempt.steps[seen])
    everything = {(epoch, row, k) for epoch in range(EPOCHS) for row in range(NUM_CHIPS) for k in range(CROPS_PER_CHIP)}
    assert set(learnt.values()) == {1}
    assert len(learnt) == num_samples
    assert learnt.keys() < everything
    # What is left over is of the last epoch.
    assert {sample for sample in everything if sample[0] < EPOCHS - 1} < learnt.keys()


def samples_kept(out: str) -> int:
    """Samples seen at the newest checkpoint, for who asks again and again: Ray rewrites the list while it is read."""
    try:
        return samples_seen(Objects.at(out))
    except (OSError, ValueError):
        return 0


def wait_for(path: Path, *, at_most_s: float = 240) -> None:
    """Until a file is there; fails where it does not come."""
    end = time.monotonic() + at_most_s
    while not path.exists():
        assert time.monotonic() < end, f"{path.name} did not come"
        time.sleep(0.1)


def write_chips(url: str) -> str:
    """A store of chips to train on."""
    cells = [Cell(epsg=32633, column=100 + n, row=2000, side_m=240) for n in range(NUM_CHIPS)]
    write_store(url, LAYOUT, [Candidate(cell=cell) for cell in cells], make_chip, request={}, statistics=True)
    return url
