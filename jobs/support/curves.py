"""A run's steps as curves: many steps put together to few points, so that a week is drawn as fast as an hour."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from numpy.typing import NDArray

from jobs.support.pictures import ACCENT, INK, SECOND, STYLE, THIRD, as_png

Steps = Sequence[Mapping[str, float]]

_POINTS = 240


@dataclass(frozen=True, slots=True, kw_only=True)
class Curves:
    """Steps in bins of equally many, in order."""

    samples: NDArray[np.float64]
    """(bin,) seen at the end of each."""

    hours: NDArray[np.float64]
    """(bin,) of steps and of waiting until then, over all epochs; what lies between epochs is not in it."""

    mean: Mapping[str, NDArray[np.float64]]
    """(bin,) of every value that all steps have."""

    least: Mapping[str, NDArray[np.float64]]
    most: Mapping[str, NDArray[np.float64]]

    samples_per_s: NDArray[np.float64]
    waited_share: NDArray[np.float64]


def curves_of(steps: Steps, *, points: int = _POINTS) -> Curves:
    """Bin steps; those that a resumed run did again count once, as they were done last.

    Args:
        steps: With samples, waited_s, step_s and anything else; what not all of them have is left aside.
        points: How many bins at the most.
    """
    by_samples = {step["samples"]: step for step in steps}
    ordered = [by_samples[samples] for samples in sorted(by_samples)]
    names = [name for name in ordered[0] if all(name in step for step in ordered)]
    values = {name: np.array([step[name] for step in ordered], np.float64) for name in names}
    starts = np.unique(np.linspace(0, len(ordered), min(points, len(ordered)) + 1).astype(int))[:-1]
    counts = np.diff(np.append(starts, len(ordered)))
    ends = starts + counts - 1
    seen = np.diff(values["samples"], prepend=0.0)
    if len(seen) > 1:
        # Steps before the first may be missing; it is taken to be as large as the next.
        seen[0] = seen[1]
    took = values["waited_s"] + values["step_s"]
    in_bin = np.maximum(np.add.reduceat(took, starts), 1e-9)
    return Curves(
        samples=values["samples"][ends],
        hours=np.cumsum(in_bin) / 3600,
        mean={name: np.add.reduceat(each, starts) / counts for name, each in values.items()},
        least={name: np.minimum.reduceat(each, starts) for name, each in values.items()},
        most={name: np.maximum.reduceat(each, starts) for name, each in values.items()},
        samples_per_s=np.add.reduceat(seen, starts) / in_bin,
        waited_share=np.add.reduceat(values["waited_s"], starts) / in_bin,
    )


_PANELS: Sequence[tuple[str, Sequence[tuple[str, str, str]]]] = (
    ("total loss", [("loss", "", ACCENT)]),
    ("contrastive loss, nats", [("contrastive", "", ACCENT)]),
    (
        "reconstruction loss",
        [("reconstruction_optical", "optical", SECOND), ("reconstruction_radar", "radar", INK)],
    ),
    ("partner found first, fraction", [("match_fraction", "", THIRD)]),
    ("temperature", [("temperature", "", ACCENT)]),
    ("gradient norm, before it is cut", [("gradient_norm", "", ACCENT)]),
    ("learning rate", [("learning_rate", "", INK)]),
    ("shards and blocks of cells in a global batch", [("shards", "shards", INK), ("blocks", "blocks", SECOND)]),
    ("share of the GPUs' peak", [("peak_share", "", ACCENT)]),
)
"""Title -> (value of a step, label, colour)."""

_HEALTH: Sequence[tuple[str, Sequence[tuple[str, str, str]]]] = (
    (
        "directions used (effective rank)",
        [("rank_optical", "optical", SECOND), ("rank_radar", "radar", INK)],
    ),
    (
        "spread of directions, 0 to 1",
        [("spread_optical", "optical", SECOND), ("spread_radar", "radar", INK)],
    ),
    ("alignment: squared distance of partners", [("alignment", "", ACCENT)]),
    (
        "uniformity: less is more even",
        [("uniformity_optical", "optical", SECOND), ("uniformity_radar", "radar", INK)],
    ),
)
"""The same of what is measured at reports alone."""


def training_curves(curves: Curves) -> bytes:
    """Losses and what goes with them over samples seen, as PNG; bands reach from the least to the most of a bin."""
    return _panels(curves, _PANELS)


def health_curves(steps: Steps) -> bytes | None:
    """What `model.health` says of representations over samples seen, as PNG; None where no step has any of it."""
    measured = [step for step in steps if "rank_optical" in step]
    return _panels(curves_of(measured), _HEALTH) if measured else None


def _panels(curves: Curves, panels: Sequence[tuple[str, Sequence[tuple[str, str, str]]]]) -> bytes:
    shown = [(title, lines) for title, lines in panels if lines[0][0] in curves.mean]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10.4, 2.2 * ((len(shown) + 2) // 3)), layout="constrained")
        grid = figure.subplots((len(shown) + 2) // 3, 3, squeeze=False).ravel()
        for axes, (title, lines) in zip(grid, shown, strict=False):
            for name, label, colour in lines:
                axes.fill_between(
                    curves.samples, curves.least[name], curves.most[name], color=colour, alpha=0.18, linewidth=0
                )
                axes.plot(curves.samples, curves.mean[name], color=colour, linewidth=1.2, label=label)
            axes.set_title(title, fontsize=9, loc="left")
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
            if len(lines) > 1:
                axes.legend(frameon=False)
            if title.startswith("gradient"):
                axes.set_yscale("log")
            if title.startswith("partner"):
                axes.set_ylim(0, 1)
        for axes in grid[: len(shown)][-3:]:
            axes.set_xlabel("samples seen")
        for axes in grid[len(shown) :]:
            axes.set_axis_off()
        return as_png(figure)


def speed_curves(curves: Curves) -> bytes:
    """Samples per second and share of time waited for the feed over time, as PNG."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10.4, 2.3), layout="constrained")
        left, right = figure.subplots(1, 2)
        left.step(curves.hours, curves.samples_per_s, where="pre", color=ACCENT, linewidth=1.2)
        left.set_title("samples per second, all workers", fontsize=9, loc="left")
        left.set_ylim(bottom=0)
        right.step(curves.hours, 100 * curves.waited_share, where="pre", color=SECOND, linewidth=1.2)
        right.axhline(5, color=INK, linewidth=0.6, linestyle=":")
        right.set_title("waited for the feed, % of the time", fontsize=9, loc="left")
        right.set_ylim(0, max(10.0, 105 * float(curves.waited_share.max())))
        for axes in (left, right):
            axes.set_xlabel("hours of training")
        return as_png(figure)
