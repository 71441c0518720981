"""What workers were lost to: told apart while a run is retried, and in the message that it ends with."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any, Final, Literal

import torch
from ray.exceptions import OutOfMemoryError, RayActorError
from ray.train import PreemptionError, TrainingFailedError, UserCallback, WorkerGroupError

from jobs.support.job import log_to_stderr
from pipeline.objects import Objects
from pipeline.redaction import redact

log = logging.getLogger(__name__)

Kind = Literal["preempted", "device_memory", "node_memory", "died", "raised"]

FAILURES_FILE: Final = "failures.json"
"""In the directory of a run: when workers were lost, and to what; not those that were stopped in time, before their
node was taken away."""

_ORDER: Final[tuple[Kind, ...]] = ("preempted", "device_memory", "node_memory", "died", "raised")
"""What one rank dies of makes the others fail in other ways: the first of these is the cause."""

_SAID: Final[Mapping[Kind, str]] = {
    "preempted": "nodes were taken away",
    "device_memory": "a GPU ran out of memory",
    "node_memory": "a node ran out of memory, and Ray ended a worker",
    "died": "a worker or its node died",
    "raised": "a worker failed",
}

_ADVICE: Final[Mapping[Kind, str]] = {
    "preempted": "the same command goes on after the last checkpoint; max_preemptions says how often it does by itself",
    "device_memory": (
        "lower micro_batch (now {micro_batch}), or set recompute_activations=true or precision=bfloat16, or share "
        "global_batch={global_batch} among more workers: none of it changes what is learnt but by rounding. --dry-run "
        "says what a worker takes"
    ),
    "node_memory": (
        "give nodes more memory, or workers and readers fewer of a node's CPUs (cpus_per_worker); on CPUs also lower "
        "micro_batch (now {micro_batch}) or set recompute_activations=true"
    ),
    "died": (
        "the same command goes on after the last checkpoint; max_failures says how often it does by itself. If it "
        "comes again at once, the worker's log says more"
    ),
    "raised": "what the worker said is above; the same command goes on after the last checkpoint",
}


def kind_of(errors: Iterable[BaseException]) -> Kind:
    """What a group of workers was lost to, judged by the errors of its ranks."""
    kinds = {_kind(error) for error in errors}
    return next((kind for kind in _ORDER if kind in kinds), "raised")


def _kind(error: BaseException) -> Kind:
    # Ray Train wraps what it found when it asked a worker how it is.
    error = getattr(error, "health_check_failure", error)
    if isinstance(error, RayActorError):
        return "preempted" if error.preempted else "died"
    if isinstance(error, OutOfMemoryError):
        return "node_memory"
    if isinstance(error, torch.OutOfMemoryError):
        return "device_memory"
    return "raised"


class FailureLog(UserCallback):
    """Says and writes down what workers were lost to; runs in Ray Train's controller."""

    def __init__(self, out: Objects) -> None:
        self.out = out
        self._last: dict[int, str] = {}

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Once for every loss, though Ray Train tells of it as long as it waits; a run goes on where writing fails."""
        told = {rank: str(error) for rank, error in worker_exceptions.items()}
        if told.items() <= self._last.items():
            return
        # Of one loss Ray Train tells again when it has learnt of more ranks.
        told_before = bool(self._last) and self._last.items() < told.items()
        self._last = told
        kind, ranks = kind_of(worker_exceptions.values()), sorted(worker_exceptions)
        log_to_stderr()
        log.warning("%s (rank %s); going on from the last checkpoint, if tries are left", _SAID[kind], _listed(ranks))
        cause = next(str(error) for error in worker_exceptions.values() if _kind(error) == kind)
        entry = {"when": datetime.now(UTC).isoformat(), "kind": kind, "ranks": ranks, "error": _short(cause)}
        try:
            found = failures(self.out)
            self.out.put_json(FAILURES_FILE, {"failures": [*(found[:-1] if told_before else found), entry]})
        except OSError as error:
            log.warning("%s was not written: %s", FAILURES_FILE, error)


def failures(out: Objects) -> list[dict[str, Any]]:
    """Every loss of workers so far: when, kind, ranks, error."""
    try:
        found: list[dict[str, Any]] = out.get_json(FAILURES_FILE)["failures"]
    except FileNotFoundError:
        return []
    return found


def explain(error: TrainingFailedError, out: Objects, settings: Mapping[str, Any]) -> str:
    """Why a run ended, how often workers were lost before, and what to do.

    Args:
        error: What Ray Train ended with.
        out: Directory of the run.
        settings: Of the job, as plain values.
    """
    if isinstance(error, PreemptionError):
        kind: Kind = "preempted"
    elif isinstance(error, WorkerGroupError):
        kind = kind_of(error.worker_failures.values())
    else:
        return f"Ray Train could not go on: {_short(str(error))}; the same command goes on after the last checkpoint"
    named = {**settings, "micro_batch": settings["micro_batch"] or "the whole share of a worker"}
    counts = Counter(each["kind"] for each in failures(out))
    before = ", ".join(f"{_SAID[each]} {counts[each]}" for each in _ORDER if counts[each])
    so_far = f" Losses so far: {before}." if before else ""
    return f"{_SAID[kind]}: {_short(str(error))}.{so_far} What to do: {_ADVICE[kind].format(**named)}"


def _listed(ranks: Iterable[int]) -> str:
    return ", ".join(map(str, ranks))


def _short(text: str, *, length: int = 600) -> str:
    """The end of an error, where its reason is, in one line."""
    words = " ".join(redact(text).split())
    return words if len(words) <= length else f"… {words[-length:]}"
