"""Probe scores of a run's checkpoints: as curves over samples seen, and the newest beside the first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from jobs.support.checkpoint_scores import SHOWN
from jobs.support.encoder import KINDS
from jobs.support.pictures import ACCENT, INK, SECOND, STYLE, THIRD, as_png
from jobs.support.probing import PROBES, STATISTICS, TRAINED, UNTRAINED

Scores = Sequence[Mapping[str, Any]]
"""Files of `jobs.support.checkpoint_scores`, in order of samples seen."""

_COLOURS: Final = dict(zip(KINDS, (SECOND, THIRD, ACCENT), strict=True))
_TITLES: Final = {"knn": "nearest neighbours", "linear": "linear probe"}


def score_curves(scores: Scores) -> bytes | None:
    """Balanced accuracy of every embedding over samples seen, a panel per probe, as PNG; None where there is none."""
    good = [each for each in scores if "error" not in each]
    if not good:
        return None
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10.4, 3.0), layout="constrained")
        for axes, probe in zip(figure.subplots(1, 2, sharey=True), PROBES, strict=True):
            for kind, colour in _COLOURS.items():
                points = points_of(good, kind=kind, probe=probe)
                samples, values, low, high = ([point[at] for point in points] for at in range(4))
                axes.fill_between(samples, low, high, color=colour, alpha=0.12, linewidth=0)
                axes.plot(samples, values, color=colour, linewidth=1.2, marker="o", markersize=3, label=kind)
                if samples and samples[0] == 0:
                    axes.axhline(values[0], color=colour, linewidth=0.8, linestyle="--")
            if statistics := _row(good[0], source=STATISTICS, kind="both", probe=probe):
                axes.axhline(statistics[SHOWN]["value"], color=INK, linewidth=0.8, linestyle=":")
            axes.set_title(f"{_TITLES[probe]}, {SHOWN.replace('_', ' ')}", fontsize=9, loc="left")
            axes.set_xlabel("samples seen")
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
            axes.legend(frameon=False, loc="lower right")
        return as_png(figure)


def points_of(scores: Scores, *, kind: str, probe: str) -> list[tuple[int, float, float, float]]:
    """Samples seen, value, and the ends of its interval (the value itself where there is none)."""
    points = []
    for each in scores:
        row = _row(each, source=TRAINED if each["samples"] else UNTRAINED, kind=kind, probe=probe)
        if row is None:
            continue
        value, low, high = (row[SHOWN][name] for name in ("value", "low", "high"))
        points.append((int(each["samples"]), value, value if low is None else low, value if high is None else high))
    return points


def newest_scores(scores: Scores) -> dict[str, Any] | None:
    """Of the newest checkpoint: samples, and rows (probe, kind, scores, and what it was at 0 samples)."""
    good = [each for each in scores if "error" not in each]
    if not good:
        return None
    newest, first = good[-1], good[0]
    rows = []
    for probe in PROBES:
        for kind in KINDS:
            row = _row(newest, source=TRAINED if newest["samples"] else UNTRAINED, kind=kind, probe=probe)
            before = _row(first, source=UNTRAINED, kind=kind, probe=probe)
            assert row is not None, (newest["samples"], probe, kind)
            rows.append({**row, "before": before and before[SHOWN]})
    return {"samples": newest["samples"], "rows": rows}


def _row(scores: Mapping[str, Any], *, source: str, kind: str, probe: str) -> Mapping[str, Any] | None:
    named = (source, kind, probe)
    rows: list[Mapping[str, Any]] = scores["scores"]
    return next((row for row in rows if (row["source"], row["kind"], row["probe"]) == named), None)
