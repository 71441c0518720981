"""Pictures of chips, plans and runs, as PNG bytes; drawn without a display."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from numpy.typing import NDArray

from pipeline.bands import NATIVE_GROUPS, RADAR_NODATA
from pipeline.grid import Cell
from pipeline.types import ChipArrays

INK, ACCENT, SECOND, THIRD, FAINT = "#1d2b33", "#0b7a75", "#d1495b", "#edae49", "#c9d3d6"

_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.facecolor": "white",
}

WORLDCOVER_COLOURS: Mapping[int, str] = {
    10: "#006400", 20: "#ffbb22", 30: "#ffff4c", 40: "#f096ff", 50: "#fa0000", 60: "#b4b4b4",
    70: "#f0f0f0", 80: "#0064c8", 90: "#0096a0", 95: "#00cf75", 100: "#fae6a0",
}  # fmt: skip
"""ESA WorldCover's own colours (product user manual, table 3)."""


def coverage(counts: Mapping[Cell, int], empty: Sequence[Cell]) -> bytes:
    """Map of the cells: shaded by how many chips each has, outlined where it has none."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(5.2, 4.4), layout="constrained")
        axes = figure.add_subplot()
        if empty:
            axes.add_collection(PolyCollection(_outlines(empty), facecolors="none", edgecolors=FAINT, linewidths=0.6))
        cells = list(counts)
        shaded = PolyCollection(_outlines(cells), cmap="YlGnBu", edgecolors="white", linewidths=0.4)
        shaded.set_array(np.array([counts[cell] for cell in cells]))
        axes.add_collection(shaded)
        axes.autoscale_view()
        axes.set_aspect(1 / np.cos(np.radians(np.mean([cell.centre_lonlat[1] for cell in cells]))))
        axes.set_xlabel("longitude, °")
        axes.set_ylabel("latitude, °")
        figure.colorbar(shaded, label="chips per cell", shrink=0.8)
        return _png(figure)


def histogram_days(dt_s: Sequence[int]) -> bytes:
    """How far apart the two looks are; radar after optical is positive."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(5.2, 2.6), layout="constrained")
        axes = figure.add_subplot()
        days = np.asarray(dt_s) / 86400
        reach = max(1.0, float(np.ceil(np.abs(days).max())))
        axes.hist(days, bins=np.linspace(-reach, reach, 25).tolist(), color=ACCENT)
        axes.set_xlabel("radar after optical, days")
        axes.set_ylabel("chips")
        return _png(figure)


def loss_curves(steps: Sequence[Mapping[str, float]]) -> bytes:
    """Both objectives against samples seen, with the learning rate's shape behind them."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(8.4, 2.8), layout="constrained")
        seen = [step["samples"] for step in steps]
        left, right = figure.subplots(1, 2)
        left.plot(seen, [step["contrastive"] for step in steps], color=ACCENT, linewidth=1)
        left.set_ylabel("contrastive loss, nats")
        match = left.twinx()
        match.plot(seen, [step["match_fraction"] for step in steps], color=THIRD, linewidth=1)
        match.set_ylabel("partner found first, fraction", color=THIRD)
        match.set_ylim(0, 1)
        for name, colour in (("optical", SECOND), ("radar", INK)):
            right.plot(seen, [step[f"reconstruction_{name}"] for step in steps], color=colour, linewidth=1, label=name)
        right.set_ylabel("reconstruction loss")
        right.legend(frameon=False)
        for axes in (left, right):
            axes.set_xlabel("samples seen")
        return _png(figure)


def chip_gallery(chips: Sequence[tuple[str, ChipArrays]], *, label: str | None = None) -> bytes:
    """Chips in columns: optical above radar, and the label below where there is one."""
    rows = 3 if label else 2
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(1.75 * len(chips), 1.85 * rows), layout="constrained")
        grid = figure.subplots(rows, len(chips), squeeze=False)
        for column, (title, chip) in enumerate(chips):
            grid[0][column].imshow(true_colour(chip))
            grid[0][column].set_title(title, fontsize=7)
            grid[1][column].imshow(radar_colour(chip))
            if label:
                grid[2][column].imshow(label_colour(chip[label]), interpolation="nearest")
        for axes in grid.flat:
            axes.set_axis_off()
        return _png(figure)


def true_colour(chip: ChipArrays) -> NDArray[np.uint8]:
    """(y, x, RGB) of B04, B03, B02: reflectance 0 to 0.3, brightened."""
    bands = NATIVE_GROUPS["b10"]
    rgb = np.stack([chip["b10"][bands.index(name)] for name in ("B04", "B03", "B02")], axis=-1)
    return _bytes((rgb / 3000.0).clip(0, 1) ** 0.7)


def radar_colour(chip: ChipArrays) -> NDArray[np.uint8]:
    """(y, x, RGB) of VV (-20 to 0 dB), VH (-27 to -7 dB) and their ratio (2 to 14 dB)."""
    vv, vh = (chip["radar"][index].astype(np.float32) / 100.0 for index in (0, 1))
    rgb = np.stack([(vv + 20) / 20, (vh + 27) / 20, (vv - vh - 2) / 12], axis=-1)
    rgb[(chip["radar"] == RADAR_NODATA).any(axis=0)] = 0
    return _bytes(rgb.clip(0, 1))


def label_colour(classes: NDArray[np.generic]) -> NDArray[np.uint8]:
    """(y, x, RGB) in WorldCover's colours; white where there is no label."""
    table = np.full((256, 3), 255, np.uint8)
    for code, colour in WORLDCOVER_COLOURS.items():
        table[code] = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    coloured: NDArray[np.uint8] = table[classes.astype(np.uint8)]
    return coloured


def _outlines(cells: Sequence[Cell]) -> list[NDArray[np.float64]]:
    return [np.asarray(cell.footprint.exterior.coords) for cell in cells]


def _bytes(unit: NDArray[np.floating]) -> NDArray[np.uint8]:
    return (unit * 255).round().astype(np.uint8)


def _png(figure: Figure) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150)
    return content.getvalue()
