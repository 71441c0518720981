"""Labelled windows of chips, the samples of an evaluation: where they lie, and what each one shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.layout import LABEL_NODATA, WINDOW_STEP_PX, ArraySpec
from pipeline.statistics import band_moments

Batch = Mapping[str, NDArray[Any]]
"""Whole chips: store array name -> (B, ...), and `row` (B,)."""

NO_CLASS: Final = -1
"""In place of a class's code where a window has none."""

KEPT: Final = "kept"
MISSING_LABELS: Final = "missing_labels"
NO_MAJORITY: Final = "no_majority"
RARE_CLASS: Final = "rare_class"
NOT_DRAWN: Final = "not_drawn"


def window_corners(side_px: int, window_px: int, *, step_px: int = WINDOW_STEP_PX) -> list[tuple[int, int]]:
    """Upper left corners (y, x) of the windows that fit a chip side by side, centred, at multiples of the step.

    Args:
        side_px: Of the chips, in 10 m pixels.
        window_px: Of the windows, in 10 m pixels.
        step_px: Of the layout's windows, in 10 m pixels.

    Raises:
        ValueError: The windows are larger than the chip, or not a multiple of the step.
    """
    if window_px % step_px or not 0 < window_px <= side_px:
        raise ValueError(
            f"window_px={window_px} must be a multiple of {step_px} within the store's chips of {side_px} px"
        )
    count = side_px // window_px
    margin = (side_px - count * window_px) // 2 // step_px * step_px
    starts = [margin + index * window_px for index in range(count)]
    return [(y, x) for y in starts for x in starts]


def majority_class(codes: NDArray[np.uint8], known: Sequence[int]) -> tuple[int, float]:
    """The most frequent class of a window and its share of the pixels; of equals the one with the lowest code.

    Args:
        codes: (y, x); 255, and any code that is not known, is a missing label.
        known: Codes of the classes.

    Returns:
        Code and share, or `NO_CLASS` and the share of labelled pixels where any label is missing.
    """
    counts = np.bincount(codes.ravel(), minlength=LABEL_NODATA + 1)[sorted(known)]
    if counts.sum() < codes.size:
        return NO_CLASS, float(counts.sum() / codes.size)
    best = int(counts.argmax())
    return sorted(known)[best], float(counts[best] / codes.size)


def label_windows(
    batch: Batch, *, label: str, known: Sequence[int], corners: Sequence[tuple[int, int]], window_px: int
) -> dict[str, NDArray[Any]]:
    """What every window of a batch of chips shows.

    Returns:
        row, y_px, x_px, code and share (of the majority class), one element per window.
    """
    found: list[tuple[int, int, int, int, float]] = []
    for row, codes in zip(batch["row"].tolist(), batch[label], strict=True):
        for y, x in corners:
            code, share = majority_class(codes[y : y + window_px, x : x + window_px], known)
            found.append((row, y, x, code, share))
    columns = zip(*found, strict=True)
    return {
        name: np.array(values) for name, values in zip(("row", "y_px", "x_px", "code", "share"), columns, strict=True)
    }


def judge_windows(windows: pa.Table, *, min_majority: float) -> pa.Table:
    """Say of every window whether it is kept, in column `status`, and number them in column `window`.

    Args:
        windows: In any order; with row, y_px, x_px, code and share.
        min_majority: Smallest share of a window's pixels that its class must have.
    """
    windows = windows.sort_by([("row", "ascending"), ("y_px", "ascending"), ("x_px", "ascending")])
    code, share = windows["code"].to_numpy(), windows["share"].to_numpy()
    status = np.where(code == NO_CLASS, MISSING_LABELS, np.where(share < min_majority, NO_MAJORITY, KEPT))
    numbers = pa.array(np.arange(windows.num_rows))
    return windows.append_column("status", pa.array(status.tolist())).append_column("window", numbers)


def cut_windows(
    batch: Batch, *, windows: Mapping[str, NDArray[Any]], specs: Sequence[ArraySpec], window_px: int
) -> Any:
    """Cut the windows that are asked for out of a batch of chips; all chips must have some.

    Args:
        batch: Chips; a sensor may be absent.
        windows: row (ascending), y_px, x_px and window (their numbers), one element per window.
        specs: Of the arrays in the batch.
        window_px: Side of a window.

    Returns:
        The arrays of the windows (W, ...), `window` (W,), and `band_statistics` (W, 28) of `pipeline.statistics`:
        means of the 14 bands, then their deviations; those of an absent sensor are 0.
    """
    pixels: dict[str, list[NDArray[Any]]] = {spec.name: [] for spec in specs}
    numbers: list[int] = []
    statistics: list[list[float]] = []
    for place, row in enumerate(batch["row"].tolist()):
        first, end = np.searchsorted(windows["row"], [row, row + 1])
        for index in range(first, end):
            y, x = int(windows["y_px"][index]), int(windows["x_px"][index])
            cut = {spec.name: spec.window(batch[spec.name][place], y, x, window_px) for spec in specs}
            for name, part in cut.items():
                pixels[name].append(part)
            means, deviations = band_moments(cut)
            statistics.append([*means, *deviations])
            numbers.append(int(windows["window"][index]))
    return {
        **{name: np.stack(parts) for name, parts in pixels.items()},
        "window": np.array(numbers),
        "band_statistics": np.nan_to_num(np.array(statistics, dtype=np.float32)),
    }
