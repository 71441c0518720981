"""pretrain, killed within epochs: every sample is seen once all the same, and one worker's losses are the same bits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import ray
import torch

from jobs.support import training_loop
from jobs.support.job import JobError
from jobs.support.pretraining import read_losses, samples_seen
from jobs.support.training_loop import CHECKPOINT_FILE, PositionError, checkpoint_due, checkpoint_name, samples_in
from model.pretrained import load, restore_pretraining
from pipeline.objects import Objects
from pipeline.positions import Course
from tests.conftest import ROOT
from tests.training_runs import (
    CROPS_PER_CHIP,
    GLOBAL_BATCH,
    NUM_CHIPS,
    Attempt,
    Event,
    all_learnt_once,
    attempts,
    run,
    write_chips,
)

pytestmark = [
    # Ray's own settings object warns about its own fields when it is copied.
    pytest.mark.filterwarnings("ignore:.* is deprecated:Warning:ray.data.context"),
    pytest.mark.filterwarnings("ignore:.* is deprecated:Warning:ray.data._internal"),
]

CLOCKS = {"waited_s", "step_s", "samples_per_s"}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_chips(str(tmp_path_factory.mktemp("stores") / "chips.zarr"))


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Its address."""
    found = ray.init(
        address="local", num_cpus=3, include_dashboard=False, log_to_driver=False, object_store_memory=200_000_000
    )
    yield found.address_info["gcs_address"]
    ray.shutdown()


@pytest.fixture(scope="module")
def undisturbed(store: str, cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run of one worker that nothing happened to, in the order of a run begun with three."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "log").mkdir()
    run(store, str(folder / "run"), str(folder / "log"), [], ema_decay=0.5, lanes=3)
    return folder


@pytest.mark.slow
def test_the_losses_and_weights_of_one_worker_after_a_resume_are_the_same_bits(
    store: str, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with pytest.raises(JobError, match=r"a worker or its node died.*the same command goes on"):
        run(store, str(out), str(tmp_path), [Event(rank=0, at=42)], max_failures=0, ema_decay=0.5, lanes=3)
    assert not (out / "model.safetensors").exists()
    # What Ray Data has read before, the worker reads itself.
    run(store, str(out), str(tmp_path), [], ema_decay=0.5, feed="in_process", feed_threads=2)
    assert [(attempt.start, attempt.world) for attempt in attempts(tmp_path)] == [(0, 1), (36, 1)]
    runs = [Objects.at(folder) for folder in (undisturbed / "run", out)]
    curves = [
        [{name: value for name, value in step.items() if name not in CLOCKS} for step in read_losses(each)]
        for each in runs
    ]
    assert [step["samples"] for step in curves[0]] == list(range(6, 97, 6))
    assert [step["samples"] for step in curves[0] if "alignment" in step] == list(range(12, 97, 12))
    assert curves[0] == curves[1]
    records = [each.get_json("run.json") for each in runs]
    assert records[0]["outputs"]["model"]["sha256"] == records[1]["outputs"]["model"]["sha256"]
    assert [each["kind"] for each in records[1]["results"]["failures"]] == ["died"]


@pytest.mark.slow
def test_every_sample_is_seen_once_through_deaths_of_driver_and_rank_on_changing_numbers_of_workers(
    store: str, cluster: str, undisturbed: Path, tmp_path: Path
) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    log.mkdir()

    begin_and_lose_the_driver(store, cluster, out, log)

    # Two go on; one of them dies, and its run with it. Three take it to the end.
    with pytest.raises(JobError, match="a worker or its node died"):
        run(store, str(out), str(log), [Event(rank=1, at=66)], num_workers=2, max_failures=0, ema_decay=0.5)
    run(store, str(out), str(log), [], num_workers=3, ema_decay=0.5)
    assert json.loads((out / "run.json").read_text())["results"]["samples_left_over"] == 4
    tried = attempts(log)
    assert [(attempt.start, attempt.world) for attempt in tried] == [(0, 3), (36, 2), (60, 3)]
    seen_once(tried, out, undisturbed)


def seen_once(tried: Sequence[Attempt], out: Path, undisturbed: Path) -> None:
    """Of all attempts together, up to where the next one began: every sample once, as in the undisturbed run."""
    (whole,) = attempts(undisturbed / "log")
    for attempt in tried:
        for seen, samples in attempt.steps.items():
            # Every global batch is the undisturbed run's, also those whose checkpoint came to nothing.
            assert sorted(samples) == sorted(whole.steps[seen])
    all_learnt_once(tried)
    # The two samples of the first epoch that were no batch began the second one.
    assert sorted({sample[0] for sample in whole.steps[48]}) == [0, 1]

    losses, expected = (read_losses(Objects.at(folder)) for folder in (out, undisturbed / "run"))
    assert [step["samples"] for step in losses] == [step["samples"] for step in expected]
    for name in ("loss", "gradient_norm"):
        assert [step[name] for step in losses] == pytest.approx([step[name] for step in expected], rel=1e-3)


def begin_and_lose_the_driver(store: str, cluster: str, out: Path, log: Path) -> None:
    """Three workers, until the driver dies."""
    events = [Event(rank=0, at=42, what="stand")]
    arguments = f"{store!r}, {str(out)!r}, {str(log)!r}, {events!r}, num_workers=3, ray_address={cluster!r}"
    code = f"from tests.training_runs import Event, run; run({arguments}, ema_decay=0.5)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment) as driver:
        while driver.poll() is None and not (log / "stand-42").exists():
            time.sleep(0.1)
        assert driver.poll() is None, "the run ended before its driver could be killed"
        driver.kill()


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
        "lanes": 3,
        "parts": (),
        "window_chips": 1024,
        "num_samples": NUM_CHIPS * CROPS_PER_CHIP,
        "order_version": 0,
    }
    assert state["origin"]["version"] == 1
    assert state["origin"].keys() == {"store", "version", "commit"}
    assert state["optimizer"].keys() == {"state", "param_groups"}
    assert saved["objective"]["contrastive_weight"] == 1.0
    assert saved["normalisation"]["source"].startswith("training chips of")

    # What is exported is the average, and says so.
    with (undisturbed / "run" / "model.safetensors").open("rb") as file:
        exported = restore_pretraining(load(file))[0].state_dict()
    assert all(torch.equal(value, state["average"][f"module.{name}"]) for name, value in exported.items())
    assert not torch.equal(exported["logit_scale"], saved["pretraining"]["logit_scale"])
    assert out.get_json("model.stac.json")["properties"]["twinlook:ema_decay"] == 0.5


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
