"""Pictures of datasets and runs, as PNG bytes; drawn without a display."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PolyCollection
from matplotlib.colors import LinearSegmentedColormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from jobs.support.chip_pictures import label_colour, radar_colour, true_colour
from pipeline.chip_places import centres, unrolled
from pipeline.grid import Cell
from pipeline.types import ChipArrays

INK, ACCENT, SECOND, THIRD, FAINT = "#1d2b33", "#0b7a75", "#d1495b", "#edae49", "#c9d3d6"

_MAP_COLOURS = LinearSegmentedColormap.from_list("chips", ["#cfe8e6", "#54b0a8", "#0b7a75", "#063f4a"])

STYLE: dict[Any, Any] = {
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


def coverage(counts: Mapping[Cell, int], empty: Sequence[Cell]) -> bytes:
    """Map of the cells: shaded by how many chips each has, outlined where it has none."""
    with mpl.rc_context(STYLE):
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
        return as_png(figure)


def coverage_map(
    corners: NDArray[np.float64], chips: NDArray[np.integer[Any]], *, outlines_up_to: int = 20_000
) -> bytes:
    """Map of very many cells: shaded by chips per cell, or binned where cells are too many to draw each.

    Args:
        corners: (cell, 4, 2) longitude/latitude of every cell that was asked for.
        chips: (cell,) how many chips each has; cells without one are grey.
        outlines_up_to: More cells than this are binned: time and bytes then no longer grow with their number.
    """
    corners = corners.copy()
    middle = unrolled(centres(corners)[:, 0])
    corners[:, :, 0] += (middle - corners[:, :, 0].mean(axis=1))[:, None]
    with mpl.rc_context(STYLE):
        west, east = float(corners[:, :, 0].min()), float(corners[:, :, 0].max())
        south, north = float(corners[:, :, 1].min()), float(corners[:, :, 1].max())
        stretch = 1 / np.cos(np.radians((south + north) / 2))
        shape = (north - south) * stretch / max(east - west, 1e-9)
        figure = Figure(figsize=(5.2, float(np.clip(4.1 * shape, 1.8, 4.6)) + 0.7), layout="constrained")
        axes = figure.add_subplot()
        if len(corners) <= outlines_up_to:
            shaded, what = _outlined(axes, corners, chips), "chips per cell"
        else:
            shaded, what = _binned(axes, corners, chips, (west, east, south, north)), "chips per square of the map"
        axes.set_xlim(west - 0.02 * (east - west), east + 0.02 * (east - west))
        axes.set_ylim(south - 0.02 * (north - south), north + 0.02 * (north - south))
        axes.set_aspect(stretch)
        axes.xaxis.set_major_formatter(lambda lon, _: f"{(lon + 180) % 360 - 180:g}")
        axes.set_xlabel("longitude, °")
        axes.set_ylabel("latitude, °")
        if shaded is not None:
            figure.colorbar(shaded, label=what, shrink=0.85, pad=0.02, ticks=MaxNLocator(integer=True))
        return as_png(figure)


def _outlined(axes: Axes, corners: NDArray[np.float64], chips: NDArray[np.integer[Any]]) -> ScalarMappable | None:
    with_chips = chips > 0
    line = 0.5 if len(corners) < 600 else 0.0
    axes.add_collection(
        PolyCollection(list(corners[~with_chips]), facecolors="#edf1f2", edgecolors="#b5c1c6", linewidths=line)
    )
    if not with_chips.any():
        return None
    shaded = PolyCollection(list(corners[with_chips]), cmap=_MAP_COLOURS, edgecolors="white", linewidths=line)
    shaded.set_array(chips[with_chips])
    shaded.set_clim(0, max(2, int(chips.max())))
    axes.add_collection(shaded)
    return shaded


def _binned(
    axes: Axes,
    corners: NDArray[np.float64],
    chips: NDArray[np.integer[Any]],
    box: tuple[float, float, float, float],
) -> ScalarMappable | None:
    west, east, south, north = box
    middle = corners.mean(axis=1)
    # Bins of a few cells, or some hold two cells by chance and their neighbours none.
    side = max(4 * float(np.median(np.ptp(corners[:1000, :, 1], axis=1))), (north - south) / 160)
    lon_side = max(side / np.cos(np.radians((south + north) / 2)), (east - west) / 240)
    bins = [max(1, round((east - west) / lon_side)), max(1, round((north - south) / side))]
    reach = ((west, east), (south, north))
    asked, lon_edges, lat_edges = np.histogram2d(middle[:, 0], middle[:, 1], bins=bins, range=reach)
    found, _, _ = np.histogram2d(middle[:, 0], middle[:, 1], bins=bins, range=reach, weights=chips)
    empty = np.ma.masked_where((asked == 0) | (found > 0), np.ones_like(asked))
    axes.pcolormesh(lon_edges, lat_edges, empty.T, cmap=ListedColormap(["#e3e9eb"]))
    if not found.any():
        return None
    return axes.pcolormesh(
        lon_edges, lat_edges, np.ma.masked_equal(found, 0).T, cmap=_MAP_COLOURS, vmin=0, vmax=float(found.max())
    )


def histogram_days(dt_s: Sequence[int]) -> bytes:
    """How far apart the two looks are; radar after optical is positive."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 2.6), layout="constrained")
        axes = figure.add_subplot()
        days = np.asarray(dt_s) / 86400
        reach = max(1.0, float(np.ceil(np.abs(days).max())))
        axes.hist(days, bins=np.linspace(-reach, reach, 25).tolist(), color=ACCENT)
        axes.set_xlabel("radar after optical, days")
        axes.set_ylabel("chips")
        return as_png(figure)


def loss_curves(steps: Sequence[Mapping[str, float]]) -> bytes:
    """Both objectives against samples seen, with the learning rate's shape behind them."""
    with mpl.rc_context(STYLE):
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
        return as_png(figure)


def chip_gallery(chips: Sequence[tuple[str, ChipArrays]], *, label: str | None = None) -> bytes:
    """Chips in columns: optical above radar, and the label below where there is one."""
    rows = 3 if label else 2
    with mpl.rc_context(STYLE):
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
        return as_png(figure)


def _outlines(cells: Sequence[Cell]) -> list[NDArray[np.float64]]:
    return [np.asarray(cell.footprint.exterior.coords) for cell in cells]


def as_png(figure: Figure) -> bytes:
    """A figure as it goes into a page."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150)
    return content.getvalue()
