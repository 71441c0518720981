"""pretrain, killed within epochs: every sample is seen once all the same, and one worker's losses are the same bits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.train
import torch

from jobs.pretrain import Pretrain, main
from jobs.support import pretraining, training_loop
from jobs.support.pretraining import read_losses, samples_seen
from jobs.support.settings import parse
from jobs.support.training_loop import CHECKPOINT_FILE, PositionError, checkpoint_due, checkpoint_name, samples_in
from model.pretrained import load
from pipeline.grid import Cell
from pipeline.objects import Objects
from pipeline.positions import Course
from tests.conftest import ROOT
from tests.sample_chips import LAYOUT, make_chip
from tests.small_stores import Candidate, write_store

pytestmark = [
    # Ray's own settings object warns about its own fields when it is copied.
    pytest.mark.filterwarnings("ignore:.* is deprecated:Warning:ray.data.context"),
    pytest.mark.filterwarnings("ignore:.* is deprecated:Warning:ray.data._internal"),
]

NUM_CHIPS, CROPS_PER_CHIP, GLOBAL_BATCH, EPOCHS = 25, 2, 6, 2
"""50 samples are 8 steps and 2 samples; two epochs are 16 steps and 4 samples."""

EVERY = 12
"""Samples between checkpoints."""

IN_PROCESS = {"feed": "in_process", "feed_threads": 2}


@dataclass(frozen=True, kw_only=True)
class Kill:
    """What happens once, when a rank is about to take a step."""

    rank: int
    at: int
    """Samples seen before the step; the checkpoint before that is waited for."""

    driver: bool = False
    """Stand still for the driver to be killed, instead of dying."""


def run(store: str, out: str, log: str, kills: Sequence[Kill], **more: object) -> None:
    """The job as it is, but that every rank writes down which samples it learnt from."""
    pretraining.train_worker = tapped(Path(log), out, kills)
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
    main(parse(Pretrain, [f"{key}={value}" for key, value in values.items()]))


def tapped(log: Path, out: str, kills: Sequence[Kill]) -> Callable[[dict[str, Any]], None]:
    # Workers do not know this module by the name that pytest gives it: nothing of its own may travel.
    plain = [(kill.rank, kill.at, kill.driver) for kill in kills]

    def worker(plan: dict[str, Any]) -> None:
        context = ray.train.get_context()
        rank, world = context.get_world_rank(), context.get_world_size()
        lines = log / f"{time.time_ns()}-{rank}.jsonl"
        learn = training_loop.train_step

        def noted(model: object, batch: dict[str, torch.Tensor], *args: object, **how: object) -> object:
            seen = int(batch["position"][0]) - rank * len(batch["position"])
            for who, at, driver in plain:
                flag = log / f"killed-{at}"
                if (who, at) == (rank, seen) and not flag.exists():
                    while samples_seen(Objects.at(out)) < at // EVERY * EVERY:
                        time.sleep(0.1)
                    flag.touch()
                    if driver:
                        time.sleep(600)
                    os.kill(os.getpid(), signal.SIGKILL)
            values = learn(model, batch, *args, **how)
            samples = torch.stack([batch[name].long() for name in ("epoch", "row", "k")], dim=1).tolist()
            with lines.open("a") as file:
                file.write(json.dumps({"world": world, "seen": seen, "samples": samples}) + "\n")
            return values

        training_loop.train_step = noted
        training_loop.train_worker(plan)

    return worker


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """What a group of workers did from its start to its end."""

    start: int
    world: int
    steps: dict[int, list[tuple[int, int, int]]]
    """By the samples seen before: epoch, row and k of what was learnt from, over all ranks."""


def attempts(log: Path) -> list[Attempt]:
    found: dict[tuple[int, int], Attempt] = {}
    for path in sorted(log.glob("*.jsonl")):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        start, world = lines[0]["seen"], lines[0]["world"]
        attempt = found.setdefault((start, world), Attempt(start=start, world=world, steps={}))
        for line in lines:
            attempt.steps.setdefault(line["seen"], []).extend(map(tuple, line["samples"]))
    return list(found.values())


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    url = str(tmp_path_factory.mktemp("stores") / "chips.zarr")
    cells = [Cell(epsg=32633, column=100 + n, row=2000, side_m=240) for n in range(NUM_CHIPS)]
    write_store(url, LAYOUT, [Candidate(cell=cell) for cell in cells], make_chip, request={}, statistics=True)
    return url


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    train_worker = pretraining.train_worker
    yield
    pretraining.train_worker = train_worker


@pytest.fixture(scope="module")
def undisturbed(store: str, small_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run of one worker that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "log").mkdir()
    run(store, str(folder / "run"), str(folder / "log"), [])
    return folder


@pytest.mark.slow
def test_the_losses_of_one_worker_after_a_resume_are_the_same_bits(
    store: str, undisturbed: Path, tmp_path: Path
) -> None:
    run(store, str(tmp_path / "run"), str(tmp_path), [Kill(rank=0, at=42)], max_failures=1)
    assert [(attempt.start, attempt.world) for attempt in attempts(tmp_path)] == [(0, 1), (36, 1)]
    clocks = {"waited_s", "step_s"}
    curves = [
        [{name: value for name, value in step.items() if name not in clocks} for step in read_losses(Objects.at(out))]
        for out in (undisturbed / "run", tmp_path / "run")
    ]
    assert [step["samples"] for step in curves[0]] == list(range(6, 97, 6))
    assert curves[0] == curves[1]
    records = [json.loads((out / "run.json").read_text()) for out in (undisturbed / "run", tmp_path / "run")]
    assert records[0]["outputs"]["model"]["sha256"] == records[1]["outputs"]["model"]["sha256"]


@pytest.mark.slow
def test_workers_that_read_the_store_themselves_learn_from_the_same_batches_also_after_a_resume(
    store: str, undisturbed: Path, tmp_path: Path
) -> None:
    # Two workers begin, one of which dies; one goes on, as from a store that Ray Data read.
    log = tmp_path / "log"
    log.mkdir()
    with pytest.raises(ray.train.TrainingFailedError):
        run(store, str(tmp_path / "two"), str(log), [Kill(rank=1, at=30)], num_workers=2, max_failures=0, **IN_PROCESS)
    run(store, str(tmp_path / "two"), str(log), [], num_workers=1, **IN_PROCESS)
    (whole,) = attempts(undisturbed / "log")
    tried = attempts(log)
    assert [(attempt.start, attempt.world) for attempt in tried] == [(0, 2), (24, 1)]
    for attempt in tried:
        for seen, samples in attempt.steps.items():
            assert sorted(samples) == sorted(whole.steps[seen])
    assert sorted(tried[1].steps) == list(range(24, 96, GLOBAL_BATCH))

    run(store, str(tmp_path / "one"), str(log), [], **IN_PROCESS)
    clocks = {"waited_s", "step_s"}
    curves = [
        [{name: value for name, value in step.items() if name not in clocks} for step in read_losses(Objects.at(out))]
        for out in (undisturbed / "run", tmp_path / "one")
    ]
    assert len(curves[0]) == 16
    assert curves[0] == curves[1], "not the same bits as what Ray Data fed"


@pytest.mark.slow
def test_every_sample_is_seen_once_through_deaths_of_ranks_and_driver_on_changing_numbers_of_workers(
    store: str, undisturbed: Path, tmp_path: Path
) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    log.mkdir()

    # Three workers: one dies, is replaced, and then the driver dies.
    address = ray.get_runtime_context().gcs_address
    kills = [Kill(rank=1, at=30), Kill(rank=0, at=42, driver=True)]
    arguments = f"{store!r}, {str(out)!r}, {str(log)!r}, {kills!r}, num_workers=3, ray_address={address!r}"
    code = f"from tests.test_pretrain_resume import Kill, run; run({arguments})"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment) as driver:
        while driver.poll() is None and not (log / "killed-42").exists():
            time.sleep(0.1)
        assert driver.poll() is None, "the run ended before its driver could be killed"
        driver.kill()

    # Two go on; one of them dies, and its run with it.
    with pytest.raises(ray.train.TrainingFailedError):
        run(store, str(out), str(log), [Kill(rank=1, at=66)], num_workers=2, max_failures=0)
    assert not (out / "model.safetensors").exists()

    # One takes it to the end.
    run(store, str(out), str(log), [], num_workers=1)
    assert json.loads((out / "run.json").read_text())["results"]["samples_left_over"] == 4

    tried = attempts(log)
    assert [(attempt.start, attempt.world) for attempt in tried] == [(0, 3), (24, 3), (36, 2), (60, 1)]
    (whole,) = attempts(undisturbed / "log")
    ends = [*(attempt.start for attempt in tried[1:]), 96]
    learnt: Counter[tuple[int, int, int]] = Counter()
    for attempt, end in zip(tried, ends, strict=True):
        for seen in range(attempt.start, end, GLOBAL_BATCH):
            learnt.update(attempt.steps[seen])
        for seen, samples in attempt.steps.items():
            # Every global batch is the undisturbed run's, also those whose checkpoint came to nothing.
            assert sorted(samples) == sorted(whole.steps[seen])
    everything = {(epoch, row, k) for epoch in range(2) for row in range(NUM_CHIPS) for k in range(CROPS_PER_CHIP)}
    assert set(learnt.values()) == {1}
    assert len(learnt) == 96
    assert learnt.keys() < everything
    # The two samples of the first epoch that were no batch began the second one.
    assert {sample for sample in everything if sample[0] == 0} < learnt.keys()
    assert sorted({sample[0] for sample in whole.steps[48]}) == [0, 1]

    losses, expected = (read_losses(Objects.at(folder)) for folder in (out, undisturbed / "run"))
    assert [step["samples"] for step in losses] == [step["samples"] for step in expected]
    assert [step["loss"] for step in losses] == pytest.approx([step["loss"] for step in expected], rel=1e-4)


@pytest.mark.slow
def test_a_checkpoint_holds_what_going_on_needs(undisturbed: Path) -> None:
    out = Objects.at(undisturbed / "run")
    assert samples_seen(out) == 96
    with (undisturbed / "run" / "train" / checkpoint_name(96) / CHECKPOINT_FILE).open("rb") as file:
        saved = load(file)
    state = saved["training"]
    assert state["samples_seen"] == 96
    assert state["order"] | {"order_version": 0} == {
        "seed": 0,
        "crops_per_chip": CROPS_PER_CHIP,
        "global_batch": GLOBAL_BATCH,
        "window_chips": 1024,
        "num_samples": NUM_CHIPS * CROPS_PER_CHIP,
        "order_version": 0,
    }
    assert state["origin"]["version"] == 1
    assert state["origin"].keys() == {"store", "version", "commit"}
    assert state["optimizer"].keys() == {"state", "param_groups"}
    assert saved["objective"]["contrastive_weight"] == 1.0
    assert saved["normalisation"]["source"].startswith("training chips of")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"checkpoint_every_samples": 12}, [12, 24, 36, 48, 60, 72, 84, 96]),
        # Whenever a step passes a multiple.
        ({"checkpoint_every_samples": 20}, [24, 42, 60, 84, 96]),
        ({"checkpoint_every_samples": 1000}, [96]),
        ({"report_every_epochs": 1}, [48, 96]),
        ({"report_every_epochs": 3}, [96]),
    ],
)
def test_checkpoints_are_due_every_so_many_samples_or_at_the_ends_of_epochs(
    settings: dict[str, int], expected: list[int]
) -> None:
    course = Course(epoch_samples=50, global_batch=6)
    plan = {"epochs": 2, "checkpoint_every_samples": None, "report_every_epochs": 1, **settings}
    assert [seen for seen in range(6, 97, 6) if checkpoint_due(seen, course, plan)] == expected


def test_a_checkpoints_name_says_how_many_samples_were_seen() -> None:
    assert samples_in(checkpoint_name(1_234_567)) == 1_234_567
    with pytest.raises(ValueError, match="epoch-00003 is of an earlier release"):
        samples_in("epoch-00003")


def test_samples_that_do_not_come_next_are_refused() -> None:
    training_loop._check_positions(torch.arange(8, 12), 8, 4)
    for positions in (torch.arange(4, 8), torch.arange(8, 11), torch.tensor([8, 10, 9, 11])):
        with pytest.raises(PositionError, match="8 to 11 come next"):
            training_loop._check_positions(positions, 8, 4)
