"""What workers were lost to is told apart by the errors that Ray and torch raise, and each kind has its advice."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayActorError
from ray.train import ControllerError, PreemptionError, TrainingFailedError, WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2.api.preemption import PreemptionInfo

from jobs.pretrain import Pretrain
from jobs.support.device_peaks import peak_flops
from jobs.support.failures import FailureLog, explain, failures, kind_of
from jobs.support.preemption import steps_between
from jobs.support.settings import parse
from pipeline.objects import Objects


def unwell(error: Exception) -> Exception:
    return WorkerHealthCheckFailedError("a worker health check failed", failure=error)


COLLATERAL = RuntimeError("Connection closed by peer [127.0.0.1]:4711")
ERRORS: dict[str, Exception] = {
    "preempted": unwell(RayActorError(preempted=True)),
    "device_memory": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "node_memory": unwell(OutOfMemoryError("Task was killed due to the node running low on memory")),
    "died": unwell(ActorDiedError()),
    "raised": ValueError("the checkpoint is of another order of samples"),
}


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("turned", [False, True])
def test_the_cause_is_found_among_what_it_did_to_other_ranks(kind: str, turned: bool) -> None:
    errors = [ERRORS[kind], COLLATERAL]
    assert kind_of(errors[::-1] if turned else errors) == kind


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (PreemptionError(PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={"a": [1]})), "max_preemptions"),
        (WorkerGroupError("out of memory", {0: ERRORS["device_memory"]}), "lower micro_batch (now 16)"),
        (WorkerGroupError("low on memory", {0: COLLATERAL, 1: ERRORS["node_memory"]}), "give nodes more memory"),
        (WorkerGroupError("died", {1: ERRORS["died"]}), "max_failures says how often"),
        (WorkerGroupError("another order", {1: ERRORS["raised"]}), "what the worker said is above"),
        (ControllerError(RuntimeError("storage is away")), "storage is away"),
    ],
)
def test_the_last_message_says_what_it_was_and_what_to_do(
    error: TrainingFailedError, advice: str, tmp_path: Path
) -> None:
    settings = parse(Pretrain, ["store=s", "out=o", "micro_batch=16"]).model_dump()
    assert advice in explain(error, Objects.at(tmp_path), settings)


def test_a_loss_is_written_down_once_however_often_it_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = Objects.at(tmp_path / "run")
    record = FailureLog(out)
    record.after_exception(None, {1: ERRORS["died"]})
    for _ in range(3):
        # The same loss, of which more is known by now.
        record.after_exception(None, {1: ERRORS["died"], 0: COLLATERAL})
    record.after_exception(None, {0: COLLATERAL})
    record.after_exception(None, {0: ERRORS["node_memory"]})
    assert [(each["kind"], each["ranks"]) for each in failures(out)] == [("died", [0, 1]), ("node_memory", [0])]
    assert "Connection closed" not in failures(out)[0]["error"]
    assert sum(record.levelno == logging.WARNING for record in caplog.records) == 3
    settings = parse(Pretrain, ["store=s", "out=o"]).model_dump()
    said = explain(WorkerGroupError("gone", {0: ERRORS["died"]}), out, settings)
    assert "Losses so far: a node ran out of memory, and Ray ended a worker 1, a worker or its node died 1." in said


@given(steps=st.integers(1, 10_000), step_s=st.floats(1e-4, 1e4))
def test_asking_for_notices_is_rare_but_not_too_rare(steps: int, step_s: float) -> None:
    following = steps_between(steps, steps * step_s, every_s=10.0)
    assert 1 <= following <= 2 * steps
    assert following == 1 or following * step_s <= 10.0 * (1 + 1e-9)
    assert following >= min(2 * steps, int(10.0 / step_s) - 1)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA A1000 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peaks_are_known_by_whole_words_of_a_name(name: str, tflops: float | None) -> None:
    assert peak_flops(name) == (None if tflops is None else tflops * 1e12)
