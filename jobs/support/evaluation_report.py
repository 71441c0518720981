"""What a person reads of an evaluation: lines on the log, a page with tables and a confusion matrix."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from markupsafe import Markup

from jobs.support.encoder import LoadedModel, encode
from jobs.support.probing import SPLITS, Result
from pipeline.bands import NATIVE_GROUPS, RADAR_BANDS, RESOLUTION_M
from pipeline.grid import PIXEL_M

log = logging.getLogger("evaluate")

SCORES: Final = {"accuracy": "accuracy", "balanced_accuracy": "balanced accuracy", "macro_f1": "macro-F1"}
"""Name in metrics.json -> title."""


def say_counts(counts: Sequence[Mapping[str, Any]], windows: pa.Table) -> None:
    """Windows by class and split, and why others are left out."""
    log.info("%-26s %7s %7s %7s", "windows of class", *SPLITS)
    for row in counts:
        log.info("%-26s %7d %7d %7d", row["name"], *(row[split] for split in SPLITS))
    left_out = {status: n for status, n in Counter(windows["status"].to_pylist()).items() if status != "kept"}
    log.info("left out: %s", left_out or "none")


def say_estimate(model: LoadedModel, num_windows: int, window_px: int) -> None:
    """What embedding would take, from two windows embedded here and now."""
    rng = np.random.default_rng(0)
    images = {
        name: rng.integers(1, 4000, (2, len(bands), *[window_px * PIXEL_M // RESOLUTION_M[name]] * 2), dtype=np.uint16)
        for name, bands in NATIVE_GROUPS.items()
    }
    radar = rng.integers(-2500, 0, (2, len(RADAR_BANDS), window_px, window_px), dtype=np.int16)
    for _ in range(2):  # the first time is slower, and does not count
        start = time.monotonic()
        encode(model.croma, model.normalisation, {**images, "radar": radar})
    seconds = (time.monotonic() - start) / 2
    log.info(
        "would embed %d windows with two networks: about %.0f s on one CPU as busy as this one (%.0f ms per window)",
        num_windows, 2 * num_windows * seconds, 1000 * seconds,
    )  # fmt: skip


def say_scores(metrics: Mapping[str, Any]) -> None:
    """The table of scores."""
    log.info("%-34s %s", "", "  ".join(f"{title:>22}" for title in SCORES.values()))
    for row in metrics["scores"]:
        name = f"{row['source']}, {row['kind']}, {row['probe']}" if row["kind"] != "none" else row["source"]
        log.info("%-34s %s", name, "  ".join(f"{score_text(row[score]):>22}" for score in SCORES))


def predictions_table(kept: pa.Table, results: Sequence[Result], codes: Sequence[int]) -> pa.Table:
    """The test windows with their true class and what every probe said, as codes of the label."""
    test = kept.filter(pc.equal(kept["split"], "test")).select(["row", "cell", "y_px", "x_px", "share", "code"])
    said = {result.name: pa.array(np.array(codes)[result.predicted]) for result in results}
    return pa.table({**{name: test[name] for name in test.column_names}, **said})


def score_tables(metrics: Mapping[str, Any]) -> Markup:
    """The scores and differences of metrics.json as a piece of HTML."""
    return Markup(_template("scores.html.j2").render(**metrics, score_titles=SCORES))  # noqa: S704  # escaped by jinja


def render_report(metrics: Mapping[str, Any]) -> str:
    """One self-contained page of HTML."""
    shown = [name for name in ("trained/joint/linear", "untrained/joint/linear") if name in metrics["confusion"]]
    matrices = {name: _shares(metrics["confusion"][name]) for name in shown}
    template = _template("evaluation.html.j2")
    return template.render(**metrics, splits=SPLITS, matrices=matrices, tables=score_tables(metrics))


def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("jobs.support"), autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["text"] = score_text
    environment.filters["signed"] = lambda score: score_text(score, sign="+")
    return environment.get_template(name)


def _shares(confusion: list[list[int]]) -> list[list[tuple[int, float]]]:
    """Each count with its fraction of the row."""
    return [[(count, count / max(1, sum(row))) for count in row] for row in confusion]


def score_text(score: Mapping[str, float | None], *, sign: str = "") -> str:
    """A score with its interval, in percent."""
    value = f"{100 * (score['value'] or 0.0):{sign}.1f}"
    if score["low"] is None or score["high"] is None:
        return value
    return f"{value} [{100 * score['low']:{sign}.1f}, {100 * score['high']:{sign}.1f}]"
