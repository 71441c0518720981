"""The steps of an evaluation: find its windows, run the models over them, probe, and put the numbers together."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Final, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
from numpy.typing import NDArray

from jobs.support.encoder import KINDS, Inference, ModelSource, chips_of, encoded
from jobs.support.job import JobError, progress
from jobs.support.probing import (
    SPLITS,
    STATISTICS,
    TRAINED,
    UNTRAINED,
    Features,
    Result,
    Samples,
    Scoreboard,
    majority_result,
    run_probes,
)
from jobs.support.windows import KEPT, NOT_DRAWN, RARE_CLASS, cut_windows, judge_windows, label_windows, window_corners
from pipeline.chip_table import WRITTEN
from pipeline.grid import PIXEL_M, Cell, block_key
from pipeline.layout import MODEL_ARRAYS
from pipeline.store import Store
from pipeline.versions import Version

log = logging.getLogger(__name__)

OUTPUTS: Final = tuple(f"{kind}_embedding" for kind in KINDS)
"""Of a model, that are probed."""

CHIPS_PER_BLOCK: Final = 16
"""Of which windows are cut at a time."""

_GROUP_CELLS: Final = 4
"""About 10 km, where a store does not say how its splits were made."""


def check_labelled(store: Store, label: str) -> None:
    """Refuse a store without the label or without one of the sensors; raises JobError."""
    if label not in store.layout.labels:
        there = ", ".join(store.layout.labels) or "none"
        raise JobError(f"{store.url} has no label={label!r} (it has: {there}); build it with labels")
    if not (store.layout.has_optical and store.layout.has_radar):
        raise JobError(f"{store.url} lacks a sensor; evaluation compares both")


def find_windows(store: Store, version: Version, *, label: str, window_px: int, min_majority: float) -> pa.Table:
    """All windows of the train, val and test chips, in the order of the store.

    Returns:
        window (number), row, y_px, x_px, code, share, status (see `jobs.support.windows`), cell, split.

    Raises:
        JobError: No chip is in any of the splits.
    """
    chips = version.all_chips(columns=["row", "cell", "split", "status"])
    in_split = pc.is_in(chips["split"], value_set=pa.array(SPLITS))
    chips = chips.filter(pc.and_(pc.equal(chips["status"], WRITTEN), in_split)).select(["row", "cell", "split"])
    if not chips.num_rows:
        raise JobError(f"{version.name} has no chips in train, val or test")
    array, known = f"label_{label}", sorted(store.layout.labels[label])
    corners = window_corners(store.layout.side_px, window_px, step_px=store.layout.window_step_px)
    labelled = chips_of(store.url, chips["row"].to_numpy(), arrays=[array], batch_size=CHIPS_PER_BLOCK).map_batches(
        partial(label_windows, label=array, known=known, corners=corners, window_px=window_px),
        batch_format="numpy",
        num_cpus=0.25,
    )
    batches = labelled.iter_batches(batch_size=None, batch_format="pyarrow")
    total = chips.num_rows * len(corners)
    found = pa.concat_tables(progress(batches, total=total, what="windows", amount=len))
    windows = judge_windows(found.combine_chunks(), min_majority=min_majority)
    # A join keeps no order.
    return windows.join(chips, "row").sort_by("window")


def choose_windows(
    store: Store,
    version: Version,
    *,
    label: str,
    window_px: int,
    min_majority: float,
    max_windows: int | None,
    rare_classes: str,
    seed: int,
) -> pa.Table:
    """All windows, with those marked that are left out; what is asked is said by the settings of `evaluate`."""
    windows = find_windows(store, version, label=label, window_px=window_px, min_majority=min_majority)
    if max_windows:
        windows = draw_windows(windows, at_most=max_windows, seed=seed)
    return leave_out_rare(windows) if rare_classes == "leave-out" else windows


def leave_out_rare(windows: pa.Table) -> pa.Table:
    """Mark the windows of classes that no train window shows."""
    rare = _rare_classes(windows)
    status = [
        RARE_CLASS if before == KEPT and code in rare else before
        for before, code in zip(windows["status"].to_pylist(), windows["code"].to_pylist(), strict=True)
    ]
    return windows.set_column(windows.column_names.index("status"), "status", pa.array(status))


def draw_windows(windows: pa.Table, *, at_most: int, seed: int) -> pa.Table:
    """Mark all but so many of the kept windows of each split, drawn at random, as not drawn."""
    rng = np.random.default_rng(seed)
    status = np.array(windows["status"].to_pylist(), dtype=object)
    split = np.array(windows["split"].to_pylist())
    for each in SPLITS:
        kept = np.flatnonzero((status == KEPT) & (split == each))
        status[rng.permutation(kept)[at_most:]] = NOT_DRAWN
    return windows.set_column(windows.column_names.index("status"), "status", pa.array(status.tolist()))


def _rare_classes(windows: pa.Table) -> set[int]:
    """Codes that kept val or test windows show, but no kept train window."""
    kept = windows.filter(pc.equal(windows["status"], KEPT))
    in_train = kept.filter(pc.equal(kept["split"], "train"))
    return set(kept["code"].to_pylist()) - set(in_train["code"].to_pylist())


def check_windows(windows: pa.Table, version: Version, classes: Mapping[int, str]) -> None:
    """Refuse windows that cannot be probed.

    Raises:
        JobError: A split is empty, train has one class only, or lacks one that others have; says what to do.
    """
    kept = windows.filter(pc.equal(windows["status"], KEPT))
    counts = Counter(kept["split"].to_pylist())
    empty = [split for split in SPLITS if not counts[split]]
    if empty:
        raise JobError(
            f"{version.name} has no {' and no '.join(empty)} windows to evaluate on (windows by status: "
            f"{dict(Counter(windows['status'].to_pylist()))}); build it with smaller split blocks "
            "(splits.block_cells), a larger splits.val_fraction and splits.test_fraction, or over a larger region"
        )
    if rare := _rare_classes(windows):
        names = ", ".join(classes[code] for code in sorted(rare))
        raise JobError(
            f"val or test windows of {version.name} show classes that no train window shows: {names}; build over a "
            "larger region or with smaller split blocks, or leave them out with rare_classes=leave-out"
        )
    if len(set(kept["code"].to_pylist())) < 2:
        raise JobError(f"all windows of {version.name} are of one class: there is nothing to tell apart")


def count_windows(windows: pa.Table, classes: Mapping[int, str]) -> list[dict[str, Any]]:
    """Kept windows of each class that occurs, by split: code, name, train, val, test."""
    kept = windows.filter(pc.equal(windows["status"], KEPT))
    counts = Counter(zip(kept["code"].to_pylist(), kept["split"].to_pylist(), strict=True))
    codes = sorted({code for code, _ in counts})
    return [{"code": code, "name": classes[code], **{s: counts[code, s] for s in SPLITS}} for code in codes]


def group_side(version: Version) -> int:
    """Side of the squares of cells that are resampled as one: of the blocks that the version's splits are made of."""
    side: int = version.request.get("splits", {}).get("block_cells") or _GROUP_CELLS
    return side


def samples_of(kept: pa.Table, *, side_px: int, group_cells: int) -> Samples:
    """The kept windows as samples; windows of cells in one square of `group_cells` cells are drawn together."""
    codes, labels = np.unique(kept["code"].to_numpy(), return_inverse=True)
    split = np.array(kept["split"].to_pylist())
    cells = [
        Cell.from_id(cell, side_m=side_px * PIXEL_M) for cell in np.array(kept["cell"].to_pylist())[split == "test"]
    ]
    squares = [block_key(cell, cells_per_side=group_cells) for cell in cells]
    groups = np.unique(np.array(squares), axis=0, return_inverse=True)[1]
    return Samples(labels=labels, num_classes=len(codes), split=split, groups=groups.reshape(-1))


def encode_windows(
    store: Store, kept: pa.Table, sources: Mapping[str, ModelSource], inference: Inference, *, window_px: int
) -> list[Features]:
    """Embeddings of the kept windows by every model, and their band statistics, in the order of `kept`."""
    places = {name: kept[name].to_numpy() for name in ("row", "y_px", "x_px", "window")}
    specs = [*store.layout.arrays_of(MODEL_ARRAYS).values()]
    images = chips_of(store.url, np.unique(places["row"]), arrays=MODEL_ARRAYS, batch_size=CHIPS_PER_BLOCK).map_batches(
        partial(cut_windows, windows=places, specs=specs, window_px=window_px),
        batch_size=CHIPS_PER_BLOCK,
        batch_format="numpy",
        num_cpus=0.25,
    )
    batches = encoded(images, sources, inference, outputs=OUTPUTS, num_images=kept.num_rows)
    shown = progress(batches, total=kept.num_rows, what="windows", amount=lambda b: len(b["window"]))
    return collect_features(shown, kept, sources=list(sources))


def collect_features(
    batches: Iterable[Mapping[str, NDArray[Any]]], kept: pa.Table, *, sources: Sequence[str]
) -> list[Features]:
    """Features of all kept windows, in their order.

    Args:
        batches: In any order: window, band_statistics, and `source/output` of OUTPUTS for every source.
        kept: The windows.
        sources: Names of the models.
    """
    numbers = kept["window"].to_numpy()
    vectors: dict[str, NDArray[np.float32]] = {}
    for batch in batches:
        at = np.searchsorted(numbers, batch["window"])
        for name, values in batch.items():
            if name not in ("window", "row"):
                vectors.setdefault(name, np.empty((kept.num_rows, values.shape[1]), np.float32))[at] = values
    embeddings = [
        Features(source=source, kind=kind, vectors=vectors[f"{source}/{output}"])
        for source in sources
        for kind, output in zip(KINDS, OUTPUTS, strict=True)
    ]
    return [*embeddings, Features(source=STATISTICS, kind="both", vectors=vectors["band_statistics"])]


def probe_all(features: Iterable[Features], samples: Samples, *, k: int) -> list[Result]:
    """Probe every kind of features in a task of its own: the fits are small, and fastest on one thread each."""
    task = ray.remote(cast("Any", run_probes))
    shared = ray.put(samples)
    results = [result for part in ray.get([task.remote(each, shared, k=k) for each in features]) for result in part]
    for result in results:
        if not result.details.get("converged", True):
            log.warning("the linear probe of %s did not converge", result.name)
    return results


def score(results: list[Result], samples: Samples, *, num_resamples: int, seed: int) -> dict[str, Any]:
    """The results side by side: scores, differences, test_groups and confusion, as metrics.json has them."""
    board = Scoreboard(samples, num_resamples=num_resamples, seed=seed)
    if board.num_groups < 10:
        log.warning("intervals rest on %d groups of test cells: take them as a hint", board.num_groups)
    return {
        "scores": [board.row(result) for result in [*results, majority_result(samples)]],
        "differences": [board.difference(mine, other) for mine, other in _comparisons(results)],
        "test_groups": board.num_groups,
        "confusion": {result.name: board.confusion(result).tolist() for result in results},
    }


def _comparisons(results: list[Result]) -> list[tuple[Result, Result]]:
    """Each trained result beside the untrained one of its kind and the band statistics, under the same probe."""
    return [
        (mine, other)
        for mine in results
        for other in results
        if mine.source == TRAINED
        and other.probe == mine.probe
        and ((other.source == UNTRAINED and other.kind == mine.kind) or other.source == STATISTICS)
    ]
