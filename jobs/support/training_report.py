"""A pretraining run on one self-contained page, from what lies in its directory; also while it runs."""

from __future__ import annotations

import base64
import json
import logging
import time
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any, Final

import jinja2
from ray.train import Checkpoint, UserCallback

from jobs.support import words
from jobs.support.checkpoint_scores import read_scores
from jobs.support.curves import Curves, Steps, curves_of, health_curves, speed_curves, training_curves
from jobs.support.evaluation_report import score_text
from jobs.support.failures import failures
from jobs.support.fed_ranks import fed_in_total
from jobs.support.score_curves import newest_scores, score_curves
from jobs.support.training_looks import LOOKS_FILE
from jobs.support.waiting import probable_cause
from pipeline.objects import Objects, concurrently
from pipeline.redaction import redact, redact_values

log = logging.getLogger(__name__)

REPORT_FILE: Final = "report.html"
REQUEST_FILE: Final = "request.json"

_EVERY_S: Final = 60.0
_SHARE: Final = 50
"""At most a fiftieth of the controller's time goes into the page."""

_RECENT: Final = 200
"""Steps that say how fast it goes now."""


class ReportWriter(UserCallback):
    """Writes the page anew when workers have reported; runs in Ray Train's controller, beside the training."""

    def __init__(self, out: Objects) -> None:
        self.out = out
        self._next_s = 0.0

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None) -> None:
        """Write it, unless that was done a moment ago; a run goes on without its page where that cannot be written."""
        start = time.monotonic()
        if start < self._next_s:
            return
        try:
            write_training_report(self.out)
        except OSError as error:
            log.warning("the report was not written: %s", error)
        end = time.monotonic()
        self._next_s = end + max(_EVERY_S, _SHARE * (end - start))


def write_training_report(out: Objects) -> str:
    """Write the page of the run in a directory from its losses, its request and what it saw last.

    Returns:
        Where the page is.

    Raises:
        FileNotFoundError: No run, or one that has not reported yet.
    """
    out.put(REPORT_FILE, training_page(out).encode())
    return f"{out.url}/{REPORT_FILE}"


def training_page(out: Objects) -> str:
    """The page itself, see `write_training_report`."""
    request = redact_values(out.get_json(REQUEST_FILE))
    losses = concurrently(out.get_json, sorted(out.list("losses")))
    everything = _steps(losses)
    steps = [step for step in everything if not step.get("skipped")]
    if not steps:
        raise FileNotFoundError(f"{out.url}: no losses yet")
    curves = curves_of(steps)
    looks = out.get_json(LOOKS_FILE) if out.exists(LOOKS_FILE) else None
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("jobs.support"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        n=words.count, size=words.size, percent=lambda share: f"{100 * share:.0f} %", score=score_text
    )
    return environment.get_template("training.html.j2").render(
        where=redact(out.url),
        request=request,
        request_text=json.dumps(request, indent=1, sort_keys=True, ensure_ascii=False),
        **_state(request, steps, curves),
        curves=_inline(training_curves(curves)),
        speed=_inline(speed_curves(curves)),
        probes=_probes(out),
        health=_inline(health) if (health := health_curves(steps)) else None,
        skipped=len(everything) - len(steps),
        lost=[each["kind"] for each in failures(out)],
        ranks=_ranks(losses[-1]),
        looks=looks,
        written=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    )


def _state(request: dict[str, Any], steps: Steps, curves: Curves) -> dict[str, Any]:
    """Where the run is, and whether something is amiss."""
    recent = list(steps[-_RECENT:])
    took = sum(step["waited_s"] + step["step_s"] for step in recent)
    last = recent[-1]
    return {
        "last": last,
        "num_steps": len(steps),
        "epochs": request["epochs"],
        "epoch": int(last["epoch"]) + 1,
        "samples_per_s": len(recent) * request["global_batch"] / max(took, 1e-9),
        "waited": sum(step["waited_s"] for step in recent) / max(took, 1e-9),
        "trained": words.duration(float(curves.hours[-1]) * 3600),
        "cause": probable_cause(recent),
    }


def _probes(out: Objects) -> dict[str, Any]:
    """What checkpoints scored: a picture, the newest beside the first, and what failed."""
    scores = read_scores(out)
    failed = [each for each in scores if "error" in each]
    picture = score_curves(scores)
    return {"failed": failed, "picture": picture and _inline(picture), "newest": newest_scores(scores)}


def _steps(losses: Iterable[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Every step so far, in order of samples seen; one that was done again after a loss counts once."""
    found: dict[float, dict[str, float]] = {}
    for content in losses:
        found.update({step["samples"]: step for step in content["steps"]})
    return [found[samples] for samples in sorted(found)]


def _ranks(newest: Mapping[str, Any]) -> dict[str, Any] | None:
    """What each rank was fed before the newest report, and all of them; nothing where that was not written yet."""
    each = newest.get("ranks")
    if not each:
        return None
    total = {"samples_per_s": sum(rank["samples_per_s"] for rank in each), **fed_in_total(each)}
    return {"each": each, "total": total, "cached": "cache_hits" in each[0]}


def _inline(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
