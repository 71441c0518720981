"""What a store holds, in numbers: counts and histograms that stay small however many chips there are."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from jobs.support.chip_places import bounds_of, centres, corners_lonlat
from pipeline.bands import OPTICAL_BANDS, RADAR_BANDS
from pipeline.chip_table import FAILED, REJECTED, STATUSES, WRITTEN
from pipeline.grid import PIXEL_M
from pipeline.layout import Layout
from pipeline.store import Store
from pipeline.versions import Version

BANDS: Final = (*OPTICAL_BANDS, *RADAR_BANDS)
FRACTIONS: Final = (
    "valid_fraction",
    "clear_fraction",
    "cloud_fraction",
    "shadow_fraction",
    "snow_fraction",
    "radar_valid_fraction",
    "border_noise_fraction",
)
"""Of the chip table, in the order in which they are shown."""

SPLITS: Final = ("train", "val", "test", "buffer")

_FRACTION_EDGES: Final = np.linspace(0, 1, 41)
_MEAN_BINS: Final = 40
_EXAMPLES: Final = 12
"""Kinds of failure, and relative orbits, that are listed; the rest is counted together."""

_MANIFEST_COLUMNS: Final = (
    "row", "epsg", "column", "cell_row", "dt_s", "orbit_state", "relative_orbit", "optical_datetime",
)  # fmt: skip
_CHIP_COLUMNS: Final = ("row", "status", "reason", "error", "split", "flags", "mean", "std", *FRACTIONS)


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """Counts per bin of one or several series."""

    edges: NDArray[np.float64]
    series: Mapping[str, NDArray[np.int64]]

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "edges": [float(f"{edge:.6g}") for edge in self.edges],
            "series": {name: counts.tolist() for name, counts in self.series.items()},
        }


@dataclass(frozen=True, kw_only=True)
class DatasetFacts:
    """A store up to one version, in numbers."""

    counts: Mapping[str, Any]
    """As JSON values: what `describe` prints and `report.html` lists."""

    histograms: Mapping[str, Histogram]
    """days_between and every fraction; empty ones are left out."""

    cell_corners: NDArray[np.float64]
    """(cell, 4, 2) longitude/latitude of every cell that was asked for."""

    cell_chips: NDArray[np.int64]
    """(cell,) how many chips each has."""

    rows: Mapping[str, NDArray[np.int64]]
    """Split -> rows that hold a chip."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, without what there is per cell or row."""
        return {**self.counts, "histograms": {name: each.to_dict() for name, each in self.histograms.items()}}


def dataset_facts(version: Version) -> DatasetFacts:
    """Count what a version and those before it hold; one still building counts what is done.

    Raises:
        StoreError: There is no store, or the version is not planned yet.
    """
    layout = Store.open(version.url).layout
    versions = [Version(version.url, number + 1) for number in range(version.number)]
    table = _joined(versions)
    written = _equal(table, "status", WRITTEN)
    corners, chips_per_cell = _cells(table, written, layout)
    histograms = {
        "days_between": _days_between(table, written),
        **{name: _fraction(table, name) for name in FRACTIONS},
    }
    counts = {
        "store": version.url,
        "version": version.number,
        "state": version.state,
        "versions": [_version_counts(each) for each in versions],
        "layout": layout.attributes(),
        "request": version.request,
        "ledger": _ledger(table),
        "pairs_not_taken": _pairs_not_taken(versions),
        "failures": _failures(table),
        "flags": _flags(table),
        "cells": {"asked": len(corners), "with_chips": int((chips_per_cell > 0).sum())},
        "place": _place(table, corners),
        "splits": _splits(table),
        "time": _time(table, written),
        "days_between": _quantiles(_column(table, "dt_s", written) / 86400),
        "fractions": {name: _quantiles(table[name].to_numpy()) for name in FRACTIONS},
        "orbits": _orbits(table, written),
        "bands": _bands(table, written, layout),
    }
    rows = table["row"].to_numpy()
    return DatasetFacts(
        counts=counts,
        histograms={name: each for name, each in histograms.items() if each.series},
        cell_corners=corners,
        cell_chips=chips_per_cell,
        rows={split: rows[written & _equal(table, "split", split)] for split in SPLITS},
    )


def _joined(versions: Iterable[Version]) -> pa.Table:
    """One row per candidate whose fate is known: the ledger beside the plan."""
    tables = []
    for version in versions:
        manifest, chips = version.manifest(columns=_MANIFEST_COLUMNS), version.chips(columns=_CHIP_COLUMNS)
        planned, known = manifest["row"].to_numpy(), chips["row"].to_numpy()
        # Sealed, they are the same rows; while building, the ledger has only those of finished shards.
        there = manifest if len(planned) == len(known) else manifest.take(np.searchsorted(planned, known))
        for name in _MANIFEST_COLUMNS[1:]:
            chips = chips.append_column(name, there[name])
        tables.append(chips)
    return pa.concat_tables(tables, promote_options="default")


def _equal(table: pa.Table, column: str, value: str) -> NDArray[np.bool_]:
    mask: NDArray[np.bool_] = pc.equal(table[column], value).to_numpy(zero_copy_only=False).astype(bool)
    return mask


def _column(table: pa.Table, name: str, chosen: NDArray[np.bool_]) -> NDArray[Any]:
    values: NDArray[Any] = table[name].to_numpy()[chosen]
    return values


def _counted(column: pa.ChunkedArray) -> dict[str, int]:
    """Value -> how often, most frequent first; empty and null values are left out."""
    counted = {row["values"]: row["counts"] for row in pc.value_counts(column).to_pylist()}
    return dict(sorted(((k, v) for k, v in counted.items() if k not in ("", None)), key=lambda kv: (-kv[1], kv[0])))


def _ledger(table: pa.Table) -> dict[str, Any]:
    statuses = _counted(table["status"])
    return {
        "known": table.num_rows,
        **{status: statuses.get(status, 0) for status in STATUSES},
        "reasons": _counted(table["reason"]),
    }


def _version_counts(version: Version) -> dict[str, Any]:
    plan = version.plan or {}
    return {
        "version": version.number,
        "state": version.state,
        "requested": plan.get("num_chips", 0),
        "shards": len(version.shards()) if plan else 0,
    }


def _pairs_not_taken(versions: Iterable[Version]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for version in versions:
        counts.update(_counted(version.rejections()["reason"]))
    return dict(counts.most_common())


def _failures(table: pa.Table) -> list[dict[str, Any]]:
    """Failures of one kind together: the same message but for what it names."""
    failed = table.filter(pc.equal(table["status"], FAILED)).select(["row", "error"])
    kinds: dict[str, dict[str, Any]] = {}
    for row, error in zip(failed["row"].to_pylist(), failed["error"].to_pylist(), strict=True):
        kind = re.sub(r"\d+", "#", error.rpartition(": ")[2])[:160]
        found = kinds.setdefault(kind, {"kind": kind, "count": 0, "first_row": row, "example": error})
        found["count"] += 1
    return sorted(kinds.values(), key=lambda found: -found["count"])[:_EXAMPLES]


def _flags(table: pa.Table) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for flags, count in _counted(table["flags"]).items():
        counts.update(dict.fromkeys(flags.split(), count))
    return dict(counts.most_common())


def _cells(
    table: pa.Table, written: NDArray[np.bool_], layout: Layout
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Every cell once: its corners, and how many chips it has."""
    crs, bounds = bounds_of(table, side_m=layout.side_px * PIXEL_M)
    keys = np.column_stack([crs, bounds[:, 0], bounds[:, 1]]).astype(np.int64)
    _, first, which = np.unique(
        np.ascontiguousarray(keys).view([("", np.int64)] * 3).ravel(), return_index=True, return_inverse=True
    )
    return corners_lonlat(crs[first], bounds[first]), np.bincount(which[written], minlength=len(first))


def _place(table: pa.Table, corners: NDArray[np.float64]) -> dict[str, Any]:
    if not len(corners):
        return {"bbox": None, "zones": {}}
    middle = centres(corners)
    codes, counts = np.unique(table["epsg"].to_numpy(), return_counts=True)
    zones = {f"EPSG:{code}": int(count) for code, count in zip(codes, counts, strict=True)}
    low, high = middle.min(axis=0), middle.max(axis=0)
    return {"bbox": [round(float(x), 4) for x in (*low, *high)], "zones": zones}


def _splits(table: pa.Table) -> dict[str, dict[str, int]]:
    counted: dict[str, dict[str, int]] = {}
    for row in table.group_by(["split", "status"]).aggregate([("row", "count")]).to_pylist():
        counted.setdefault(row["split"], dict.fromkeys(STATUSES, 0))[row["status"]] = row["row_count"]
    order = [*SPLITS, *sorted(set(counted) - set(SPLITS))]
    return {split: counted[split] for split in order if split in counted}


def _time(table: pa.Table, written: NDArray[np.bool_]) -> dict[str, Any]:
    """First and last look, chips per month, chips per month of the year."""
    moments = _column(table, "optical_datetime", written)
    moments = moments[~np.isnat(moments)]
    if not len(moments):
        return {"first": None, "last": None, "months": {}, "months_of_year": [0] * 12}
    months, counts = np.unique(moments.astype("datetime64[M]"), return_counts=True)
    of_year = np.bincount(months.astype(int) % 12, weights=counts, minlength=12).astype(int)
    return {
        "first": f"{moments.min().astype('datetime64[s]')}Z",
        "last": f"{moments.max().astype('datetime64[s]')}Z",
        "months": {str(month): int(count) for month, count in zip(months, counts, strict=True)},
        "months_of_year": of_year.tolist(),
    }


def _quantiles(values: NDArray[Any]) -> dict[str, float]:
    values = values[np.isfinite(values)]
    if not len(values):
        return {}
    names = ("min", "p25", "median", "p75", "max")
    return {n: round(float(v), 4) for n, v in zip(names, np.quantile(values, (0, 0.25, 0.5, 0.75, 1)), strict=True)}


def _days_between(table: pa.Table, written: NDArray[np.bool_]) -> Histogram:
    """Radar after optical, days, by the radar's direction."""
    days = table["dt_s"].to_numpy() / 86400
    known = written & np.isfinite(days)
    if not known.any():
        return Histogram(edges=np.zeros(0), series={})
    reach = max(1.0, float(np.ceil(np.abs(days[known]).max())))
    edges = np.linspace(-reach, reach, 49)
    states = list(_counted(table["orbit_state"])) or [""]
    series = {
        state or "chips": np.histogram(days[known & (_equal(table, "orbit_state", state))], edges)[0]
        for state in sorted(states)
    }
    return Histogram(edges=edges, series=series)


def _orbits(table: pa.Table, written: NDArray[np.bool_]) -> dict[str, Any]:
    there = table.select(["orbit_state", "relative_orbit"]).filter(pa.array(written))
    counted = there.group_by(["relative_orbit", "orbit_state"]).aggregate([("orbit_state", "count")]).to_pylist()
    tracks = Counter(
        {
            f"{row['relative_orbit']} {row['orbit_state']}": row["orbit_state_count"]
            for row in counted
            if row["relative_orbit"] is not None
        }
    )
    shown = dict(tracks.most_common(_EXAMPLES))
    return {
        "states": _counted(there["orbit_state"]),
        "relative_orbits": shown,
        "other_relative_orbits": {"number": len(tracks) - len(shown), "chips": tracks.total() - sum(shown.values())},
    }


def _fraction(table: pa.Table, name: str) -> Histogram:
    """Of chips kept and rejected; those that nobody looked at are in neither."""
    values = table[name].to_numpy()
    known = np.isfinite(values)
    series = {
        status: np.histogram(values[known & _equal(table, "status", status)].clip(0, 1), _FRACTION_EDGES)[0]
        for status in (WRITTEN, REJECTED)
    }
    return Histogram(edges=_FRACTION_EDGES, series={name: n for name, n in series.items() if n.any()})


def _bands(table: pa.Table, written: NDArray[np.bool_], layout: Layout) -> list[dict[str, Any]]:
    """Mean and deviation over all pixels of the kept chips, and how the chips' means are spread."""
    chips = table.select(["mean", "std"]).filter(pa.array(written))
    means, deviations = (_per_band(chips[name]) for name in ("mean", "std"))
    if means is None or deviations is None:
        return []
    units = {band: spec.units for spec in layout.arrays().values() for band in spec.bands}
    found = []
    for index, band in enumerate(BANDS):
        mean, deviation = means[:, index].astype(np.float64), deviations[:, index].astype(np.float64)
        there = np.isfinite(mean)
        if band not in units or not there.any():
            continue
        mean, deviation = mean[there], deviation[there]
        total = float(np.sqrt((deviation**2).mean() + mean.var()))
        low, high = float(mean.min()), float(mean.max())
        edges = np.linspace(low, high if high > low else low + 1, _MEAN_BINS + 1)
        found.append(
            {
                "band": band,
                "units": "reflectance x 10000" if units[band] == "reflectance" else units[band],
                "mean": round(float(mean.mean()), 3),
                "std": round(total, 3),
                "chip_means": Histogram(edges=edges, series={"chips": np.histogram(mean, edges)[0]}).to_dict(),
            }
        )
    return found


def _per_band(column: pa.ChunkedArray) -> NDArray[np.float32] | None:
    """(chip, band) of a column of lists; None where chips have no statistics."""
    lengths = pc.list_value_length(column)
    full = column.filter(pc.equal(lengths, len(BANDS)))
    if not len(full):
        return None
    values: NDArray[np.float32] = full.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return values.reshape(-1, len(BANDS))


def even_rows(rows: Mapping[str, NDArray[np.int64]], number: int, *, seed: int) -> list[tuple[str, int]]:
    """Rows drawn evenly over splits: each split has its share, what one lacks goes to the others.

    Args:
        rows: Split -> rows that hold a chip.
        number: How many to draw.
        seed: The same rows for the same seed.

    Returns:
        (split, row), in the order of splits and rows.
    """
    rng = np.random.default_rng(seed)
    shuffled = {split: rng.permutation(each) for split, each in rows.items()}
    drawn: list[tuple[str, int]] = []
    for place in range(max((len(each) for each in shuffled.values()), default=0)):
        for split, each in shuffled.items():
            if place < len(each) and len(drawn) < number:
                drawn.append((split, int(each[place])))
        if len(drawn) == number:
            break
    order: Sequence[str] = list(rows)
    return sorted(drawn, key=lambda pair: (order.index(pair[0]), pair[1]))
