"""Chips as pictures: each look in colours that a person knows, without a display."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, Final

import matplotlib as mpl
import matplotlib.image
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from pipeline.bands import RADAR_NODATA
from pipeline.layout import Layout
from pipeline.types import ChipArrays

Picture = NDArray[np.uint8]
"""(y, x, RGB)."""

WORLDCOVER_COLOURS: Final[Mapping[int, str]] = {
    10: "#006400", 20: "#ffbb22", 30: "#ffff4c", 40: "#f096ff", 50: "#fa0000", 60: "#b4b4b4",
    70: "#f0f0f0", 80: "#0064c8", 90: "#0096a0", 95: "#00cf75", 100: "#fae6a0",
}  # fmt: skip
"""ESA WorldCover's own colours (product user manual, table 3)."""

SCL_COLOURS: Final[Mapping[int, str]] = {
    0: "#000000", 1: "#ff0000", 2: "#2f2f2f", 3: "#643200", 4: "#00a000", 5: "#ffe65a", 6: "#0000ff",
    7: "#808080", 8: "#c0c0c0", 9: "#ffffff", 10: "#64c8ff", 11: "#ff96ff",
}  # fmt: skip
"""Colours in which Sen2Cor's scene classification is usually shown."""

SCL_CLASSES: Final[Mapping[int, str]] = {
    0: "no data", 1: "saturated", 2: "dark", 3: "cloud shadow", 4: "vegetation", 5: "not vegetated", 6: "water",
    7: "unclassified", 8: "cloud, medium", 9: "cloud, high", 10: "thin cirrus", 11: "snow, ice",
}  # fmt: skip

_INK: Final = "#1d2b33"
_PANEL: Final = 3.2
"""Side of one view on a sheet, inches."""

_LETTERS_PER_INCH: Final = 14


def views(layout: Layout, chip: ChipArrays) -> dict[str, Picture]:
    """What of a chip can be looked at, by title: true colour, radar, scene classes, each label.

    Args:
        layout: Of the store; says which arrays there are.
        chip: All arrays of one row.
    """
    found: dict[str, Picture] = {}
    if layout.has_optical:
        found["true colour"] = true_colour(chip, layout)
    if layout.has_radar:
        found["radar"] = radar_colour(chip)
    if "scl" in chip:
        found["scene classes"] = coloured(chip["scl"], SCL_COLOURS)
    for name in layout.labels:
        found[name] = label_colour(chip[f"label_{name}"])
    return found


def true_colour(chip: ChipArrays, layout: Layout | None = None) -> Picture:
    """B04, B03, B02: reflectance 0 to 0.3, brightened; black where there is no data."""
    specs = (layout or Layout()).arrays()
    bands = {band: chip[name][i] for name in ("b10",) for i, band in enumerate(specs[name].bands)}
    rgb = np.stack([bands[name] for name in ("B04", "B03", "B02")], axis=-1)
    return _bytes((rgb / 3000.0).clip(0, 1) ** 0.7)


def radar_colour(chip: ChipArrays) -> Picture:
    """VV (-20 to 0 dB), VH (-27 to -7 dB) and their ratio (2 to 14 dB); black where there is no data."""
    vv, vh = (chip["radar"][index].astype(np.float32) / 100.0 for index in (0, 1))
    rgb = np.stack([(vv + 20) / 20, (vh + 27) / 20, (vv - vh - 2) / 12], axis=-1)
    rgb[(chip["radar"] == RADAR_NODATA).any(axis=0)] = 0
    return _bytes(rgb.clip(0, 1))


def label_colour(classes: NDArray[np.generic]) -> Picture:
    """WorldCover's colours; other codes as they come in a table of twenty; white where there is no label."""
    others = mpl.colormaps["tab20"](np.arange(256) % 20)
    table = {code: mpl.colors.to_hex(others[code]) for code in range(255)}
    return coloured(classes, {**table, **WORLDCOVER_COLOURS, 255: "#ffffff"})


def coloured(classes: NDArray[np.generic], colours: Mapping[int, str]) -> Picture:
    """(y, x) codes in their colours, white where a code has none."""
    table = np.full((256, 3), 255, np.uint8)
    for code, colour in colours.items():
        table[code] = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    picture: Picture = table[classes.astype(np.uint8)]
    return picture


def chip_sheet(pictures: Mapping[str, Picture], *, title: str, lines: Sequence[str]) -> bytes:
    """One chip on one sheet: its views side by side under a title, what is known of it below; PNG.

    Args:
        pictures: From `views`.
        title: Which chip it is.
        lines: What is known of it.
    """
    width = max(2, len(pictures)) * _PANEL
    lines = [part for line in lines for part in textwrap.wrap(line, round(width * _LETTERS_PER_INCH))]
    height = _PANEL + 0.6 + 0.2 * (len(lines) + 1)
    with mpl.rc_context({"font.family": "sans-serif", "font.size": 9, "text.color": _INK}):
        figure = Figure(figsize=(width, height))
        figure.text(0.08 / width, 1 - 0.08 / height, title, va="top", fontsize=12, fontweight="bold")
        bottom = 1 - (_PANEL + 0.5) / height
        for column, (name, picture) in enumerate(pictures.items()):
            side = _PANEL - 0.12
            axes = figure.add_axes(((column * _PANEL + 0.06) / width, bottom, side / width, side / height))
            axes.imshow(picture, interpolation="nearest")
            axes.set_title(name, fontsize=9, pad=3)
            axes.set_axis_off()
        figure.text(0.08 / width, bottom - 0.1 / height, "\n".join(lines), va="top", linespacing=1.4)
        content = io.BytesIO()
        figure.savefig(content, format="png", dpi=130, facecolor="white")
        return content.getvalue()


def png(picture: Picture) -> bytes:
    """The pixels as they are; for classes."""
    return _encoded(picture, "png", {})


def jpeg(picture: Picture) -> bytes:
    """A tenth of a PNG's bytes; for looks."""
    return _encoded(picture, "jpeg", {"quality": 88})


def _encoded(picture: Picture, how: str, options: dict[str, Any]) -> bytes:
    content = io.BytesIO()
    matplotlib.image.imsave(content, picture, format=how, pil_kwargs=options)
    return content.getvalue()


def _bytes(unit: NDArray[np.floating[Any]]) -> Picture:
    return (unit * 255).round().astype(np.uint8)
