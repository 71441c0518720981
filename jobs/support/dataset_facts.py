"""What a store holds, in numbers: counts and histograms that stay small however many chips there are."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from jobs.support.ledger_rows import ledger_rows
from pipeline.bands import RADAR_BANDS
from pipeline.chip_places import centres, footprints, georeferences, place_columns
from pipeline.chip_table import FAILED, REJECTED, STATUSES, WRITTEN, add_ledgers, ledger
from pipeline.grid import PIXEL_M
from pipeline.layout import Layout
from pipeline.statistics import BANDS, BandStatistics
from pipeline.store import Store
from pipeline.types import Watch, unwatched
from pipeline.versions import Version

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

_FINE_BINS: Final = 400
_COARSE_BINS: Final = 40
_DAY_BINS: Final = 48
_EXAMPLES: Final = 12
"""Kinds of failure, and relative orbits, that are listed; the rest is counted together."""

_SHOWN_PERCENTILES: Final = (0.5, 99.5)
"""What is beyond is left out of the histograms of pixels."""

_MERGE_AT: Final = 4_000_000
"""So many places are collected before those that are the same are put together."""

_MEAN_EDGES: Final = {"reflectance": np.linspace(0, 12_000, 241), "dB": np.linspace(-50, 20, 281)}
"""Bins for the means of chips; what is beyond is in the last one."""

_MANIFEST: Final = ("dt_s", "orbit_state", "relative_orbit", "optical_datetime")
_CHIPS: Final = ("row", "status", "reason", "error", "split", "flags", "mean", "std", *FRACTIONS)


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """Counts per bin of one or several series."""

    edges: NDArray[np.float64]
    series: Mapping[str, NDArray[np.int64]]

    @property
    def total(self) -> NDArray[np.int64]:
        """Counts per bin over all series."""
        return np.asarray(np.sum(list(self.series.values()), axis=0))

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "edges": [float(f"{edge:.6g}") for edge in self.edges],
            "series": {name: counts.tolist() for name, counts in self.series.items()},
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Histogram:
        """The inverse of `to_dict`."""
        series = {name: np.asarray(counts) for name, counts in content["series"].items()}
        return cls(edges=np.asarray(content["edges"], float), series=series)


@dataclass(frozen=True, kw_only=True)
class DatasetFacts:
    """A store up to one version, in numbers."""

    counts: Mapping[str, Any]
    """As JSON values: what `describe` prints and the report lists."""

    histograms: Mapping[str, Histogram]
    """days_between, and every fraction that is known of any chip."""

    place_corners: NDArray[np.float64]
    """(place, 4, 2) longitude/latitude of every place that was asked for."""

    place_chips: NDArray[np.int64]
    """(place,) how many chips each has."""

    samples: Mapping[str, list[int]]
    """Split -> some rows that hold a chip, drawn at random."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, without what there is per place or row."""
        return {**self.counts, "histograms": {name: each.to_dict() for name, each in self.histograms.items()}}


def dataset_facts(version: Version, *, samples: int = 12, seed: int = 0, watch: Watch = unwatched) -> DatasetFacts:
    """Count what a version and those before it hold; one still building counts what is done.

    Args:
        version: Planned.
        samples: How many rows of each split to draw.
        seed: Decides which.
        watch: Shows how many candidates have been counted.

    Raises:
        StoreError: There is no store, or the version is not planned yet.
    """
    layout = Store.open(version.url).layout
    tally = _Tally(layout, samples, seed)
    columns = (*_MANIFEST, *place_columns(layout))
    for batch in ledger_rows(version, manifest=columns, chips=_CHIPS, watch=watch):
        tally.add(batch)
    corners, asked, chips = tally.places.merged()
    statistics = version.all_statistics()
    counts = {
        "store": version.url,
        "version": version.number,
        "state": version.state,
        "versions": [_version_counts(each) for each in version.versions()],
        "layout": layout.attributes(),
        "request": version.request,
        "ledger": add_ledgers(tally.ledgers),
        "pairs_not_taken": _pairs_not_taken(version.versions()),
        "failures": sorted(tally.failures.values(), key=lambda kind: -kind["count"])[:_EXAMPLES],
        "flags": dict(tally.flags.most_common()),
        "places": {"asked": len(asked), "with_chips": int((chips > 0).sum()), **_extent(corners)},
        "crs": dict(tally.crs.most_common()),
        "splits": tally.splits_in_order(),
        "time": tally.time(),
        "days_between": tally.days_quantiles(),
        "fractions": {name: each.range() for name, each in tally.fractions.items() if each.known},
        "orbits": tally.orbits(),
        "bands": _chip_bands(tally, layout) if statistics is None else _pixel_bands(statistics),
    }
    days = tally.days_histogram()
    return DatasetFacts(
        counts=counts,
        histograms={
            **({"days_between": days} if days else {}),
            **{name: each.histogram() for name, each in tally.fractions.items() if each.known},
        },
        place_corners=corners,
        place_chips=chips,
        samples=tally.samples(),
    )


class _Tally:
    """Everything that is counted, batch by batch."""

    def __init__(self, layout: Layout, samples: int, seed: int) -> None:
        self._layout = layout
        self._num_samples = samples
        self._seed = seed
        self.ledgers: list[dict[str, Any]] = []
        self.failures: dict[str, dict[str, Any]] = {}
        self.flags: Counter[str] = Counter()
        self.crs: Counter[str] = Counter()
        self.splits: dict[str, Counter[str]] = defaultdict(Counter)
        self.months: Counter[int] = Counter()
        self.first: datetime | None = None
        self.last: datetime | None = None
        self.days: Counter[tuple[str, int]] = Counter()
        self.tracks: Counter[tuple[int, str]] = Counter()
        self.places = _Places(layout)
        self.fractions = {name: _Fraction() for name in FRACTIONS}
        self.means = {band: np.zeros(len(edges) - 1, np.int64) for band, edges in _mean_edges(layout).items()}
        self.moments = np.zeros((len(BANDS), 4))
        self._drawn: dict[str, list[tuple[int, int]]] = defaultdict(list)

    def add(self, batch: pa.Table) -> None:
        self.ledgers = [add_ledgers([*self.ledgers, ledger(batch)])]
        self._add_failures(batch)
        for split, status, number in _group(batch, "split", "status"):
            self.splits[split][status] += number
        written = batch.filter(pc.equal(batch["status"], WRITTEN))
        crs, transform = georeferences(batch, self._layout)
        self.crs.update(crs)
        corners = None if self._layout.grid else footprints(crs, transform, side_px=self._layout.side_px)
        self.places.add(batch, corners, pc.equal(batch["status"], WRITTEN).to_numpy().astype(bool))
        for name, fraction in self.fractions.items():
            fraction.add(_numbers(batch[name]), batch["status"])
        for flags, number in _group(written, "flags"):
            self.flags.update(dict.fromkeys((flags or "").split(), number))
        for state, dt_s, number in _group(written, "orbit_state", "dt_s"):
            if dt_s is not None:
                self.days[state or "", dt_s] += number
        for orbit, state, number in _group(written, "relative_orbit", "orbit_state"):
            if orbit is not None:
                self.tracks[orbit, state or ""] += number
        self._add_time(written)
        self._add_bands(written)
        self._draw(written)

    def _add_failures(self, batch: pa.Table) -> None:
        """Failures of one kind together: the same message but for what it names."""
        failed = batch.filter(pc.equal(batch["status"], FAILED)).select(["row", "error"])
        for row, error in zip(failed["row"].to_pylist(), failed["error"].to_pylist(), strict=True):
            kind = re.sub(r"\d+", "#", error.rpartition(": ")[2])[:160]
            found = self.failures.setdefault(kind, {"kind": kind, "count": 0, "first_row": row, "example": error})
            found["count"] += 1

    def _add_time(self, written: pa.Table) -> None:
        moments = written["optical_datetime"].drop_null().to_numpy().astype("datetime64[us]")
        if not len(moments):
            return
        months, counts = np.unique(moments.astype("datetime64[M]").astype(np.int64), return_counts=True)
        self.months.update(dict(zip(months.tolist(), counts.tolist(), strict=True)))
        low, high = (moment.astype("datetime64[s]").item() for moment in (moments.min(), moments.max()))
        self.first = low if self.first is None else min(self.first, low)
        self.last = high if self.last is None else max(self.last, high)

    def _add_bands(self, written: pa.Table) -> None:
        means, deviations = (_per_band(written[name]) for name in ("mean", "std"))
        for index, band in enumerate(BANDS):
            if means is None or deviations is None or band not in self.means:
                continue
            mean, deviation = (values[:, index].astype(np.float64) for values in (means, deviations))
            there = np.isfinite(mean)
            mean, deviation = mean[there], deviation[there]
            edges = _mean_edges(self._layout)[band]
            self.means[band] += np.histogram(mean.clip(edges[0], edges[-1]), edges)[0]
            self.moments[index] += (len(mean), mean.sum(), (mean**2).sum(), (deviation**2).sum())

    def _draw(self, written: pa.Table) -> None:
        """Of each split the rows with the smallest random numbers; a row's number depends on nothing but the seed."""
        rows = written["row"].to_numpy()
        numbers = _hashed(rows, self._seed)
        splits = np.asarray(written["split"].to_pylist(), dtype=object)
        for split in set(splits.tolist()):
            here = np.flatnonzero(splits == split)
            first = here[np.argsort(numbers[here], kind="stable")[: self._num_samples]]
            drawn = [*self._drawn[split], *zip(numbers[first].tolist(), rows[first].tolist(), strict=True)]
            self._drawn[split] = sorted(drawn)[: self._num_samples]

    def samples(self) -> dict[str, list[int]]:
        return {split: [row for _, row in self._drawn[split]] for split in _ordered(self._drawn)}

    def splits_in_order(self) -> dict[str, dict[str, int]]:
        return {split: {s: self.splits[split][s] for s in STATUSES} for split in _ordered(self.splits)}

    def time(self) -> dict[str, Any]:
        """First and last optical look; chips per month, and per month of the year."""
        of_year = [0] * 12
        for month, number in self.months.items():
            of_year[month % 12] += number
        return {
            "first": None if self.first is None else f"{self.first:%Y-%m-%dT%H:%M:%SZ}",
            "last": None if self.last is None else f"{self.last:%Y-%m-%dT%H:%M:%SZ}",
            "months": {
                f"{1970 + month // 12}-{month % 12 + 1:02d}": self.months[month] for month in sorted(self.months)
            },
            "months_of_year": of_year,
        }

    def days_quantiles(self) -> dict[str, float]:
        """Of radar time minus optical time, days."""
        counted: Counter[int] = Counter()
        for (_, dt_s), number in self.days.items():
            counted[dt_s] += number
        if not counted:
            return {}
        values = np.array(sorted(counted))
        upto = np.cumsum([counted[value] for value in values.tolist()])
        names = {"min": 0.0, "p25": 0.25, "median": 0.5, "p75": 0.75, "max": 1.0}
        places = {name: int(np.searchsorted(upto, max(1, share * upto[-1]))) for name, share in names.items()}
        return {name: round(float(values[place]) / 86400, 4) for name, place in places.items()}

    def days_histogram(self) -> Histogram | None:
        """By the radar's direction."""
        if not self.days:
            return None
        reach = max(1.0, float(np.ceil(max(abs(dt_s) for _, dt_s in self.days) / 86400)))
        edges = np.linspace(-reach, reach, _DAY_BINS + 1)
        series = {}
        for state in sorted({state for state, _ in self.days}):
            found = [(dt_s / 86400, number) for (each, dt_s), number in self.days.items() if each == state]
            days, numbers = np.array(found).T
            series[state or "chips"] = np.histogram(days, edges, weights=numbers)[0].astype(np.int64)
        return Histogram(edges=edges, series=series)

    def orbits(self) -> dict[str, Any]:
        states: Counter[str] = Counter()
        for (_, state), number in self.tracks.items():
            states[state] += number
        shown = self.tracks.most_common(_EXAMPLES)
        left = self.tracks.total() - sum(number for _, number in shown)
        return {
            "states": dict(states.most_common()),
            "relative_orbits": {f"{orbit} {state}".strip(): number for (orbit, state), number in shown},
            "other_relative_orbits": {"number": len(self.tracks) - len(shown), "chips": left},
        }


class _Places:
    """Every cell once, with how many candidates and chips it has; off the grid, every spot of about ten metres."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._pending: list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]] = []
        self._size = 0

    def add(self, batch: pa.Table, corners: NDArray[np.float64] | None, written: NDArray[np.bool_]) -> None:
        if corners is None:
            epsg, column, row = (batch[name].to_numpy().astype(np.int64) for name in place_columns(self._layout))
            keys = ((epsg - 32600) << 48) | ((column + (1 << 23)) << 24) | (row + (1 << 23))
        else:
            middle = centres(corners)
            there = np.isfinite(middle).all(axis=1)
            lon, lat = np.round((middle[there] + 360) * 1e4).astype(np.int64).T
            keys, written = (lon << 24) | lat, written[there]
        self._pending.append((keys, np.ones(len(keys), np.int64), written.astype(np.int64)))
        self._size += len(keys)
        if self._size > _MERGE_AT:
            self._merge()

    def merged(self) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
        """Corners (place, 4, 2) in longitude/latitude, candidates and chips of each place."""
        self._merge()
        keys, asked, chips = self._pending[0]
        side_m = self._layout.side_px * PIXEL_M
        if self._layout.grid:
            epsg, column, row = (
                (keys >> 48) + 32600,
                ((keys >> 24) & 0xFFFFFF) - (1 << 23),
                (keys & 0xFFFFFF) - (1 << 23),
            )
            table = pa.table({"epsg": epsg, "column": column, "cell_row": row})
            crs, transform = georeferences(table, self._layout)
            return footprints(crs, transform, side_px=self._layout.side_px), asked, chips
        middle = np.column_stack([keys >> 24, keys & 0xFFFFFF]) / 1e4 - 360
        half_lat = side_m / 2 / 111_320
        half_lon = half_lat / np.cos(np.radians(middle[:, 1]).clip(-1.5, 1.5))
        square = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])
        halves = np.column_stack([half_lon, np.full(len(keys), half_lat)])
        return middle[:, None, :] + square * halves[:, None, :], asked, chips

    def _merge(self) -> None:
        none = np.empty(0, np.int64)
        parts = self._pending or [(none, none, none)]
        keys, asked, chips = (np.concatenate(each) for each in zip(*parts, strict=True))
        unique, which = np.unique(keys, return_inverse=True)
        asked, chips = (np.bincount(which, weights=each, minlength=len(unique)) for each in (asked, chips))
        self._pending = [(unique, asked.astype(np.int64), chips.astype(np.int64))]
        self._size = len(unique)


@dataclass(kw_only=True)
class _Fraction:
    """How one fraction is spread over the chips that were looked at."""

    counts: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    low: float = np.inf
    high: float = -np.inf

    @property
    def known(self) -> bool:
        return bool(self.counts)

    def add(self, values: NDArray[np.float64], status: pa.ChunkedArray) -> None:
        known = np.isfinite(values)
        for name in (WRITTEN, REJECTED):
            chosen = values[known & pc.equal(status, name).to_numpy().astype(bool)]
            if len(chosen):
                found = np.histogram(chosen.clip(0, 1), np.linspace(0, 1, _FINE_BINS + 1))[0]
                self.counts[name] = self.counts.get(name, np.zeros(_FINE_BINS, np.int64)) + found
                self.low, self.high = min(self.low, float(chosen.min())), max(self.high, float(chosen.max()))

    def range(self) -> dict[str, float]:
        """Least, middle (to a four-hundredth) and greatest."""
        upto = np.cumsum(np.sum(list(self.counts.values()), axis=0))
        middle = int(np.searchsorted(upto, upto[-1] / 2))
        median = min(max((middle + 0.5) / _FINE_BINS, self.low), self.high)
        return {"min": round(self.low, 4), "median": round(median, 4), "max": round(self.high, 4)}

    def histogram(self) -> Histogram:
        series = {name: self.counts[name].reshape(_COARSE_BINS, -1).sum(axis=1) for name in self.counts}
        return Histogram(edges=np.linspace(0, 1, _COARSE_BINS + 1), series=series)


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
        for batch in version.rejection_batches():
            counts.update(dict(_group(batch, "reason")))
    return dict(counts.most_common())


def _group(table: pa.Table, *names: str) -> Iterable[tuple[Any, ...]]:
    """Distinct values of some columns, and how many rows have them."""
    if not table.num_rows:
        return []
    counted = table.select([*names]).append_column("n", pa.array(np.ones(table.num_rows, np.int8)))
    found = counted.group_by([*names]).aggregate([("n", "count")])
    return zip(*(found[name].to_pylist() for name in (*names, "n_count")), strict=True)


def _month(number: int) -> str:
    """Of months since 1970."""
    return f"{1970 + number // 12}-{number % 12 + 1:02d}"


def _numbers(column: pa.ChunkedArray) -> NDArray[np.float64]:
    """Of a column that may be all null."""
    values: NDArray[np.float64] = column.cast(pa.float64()).to_numpy()
    return values


def _per_band(column: pa.ChunkedArray) -> NDArray[np.float32] | None:
    """(chip, band) of a column of lists; None where chips have no statistics."""
    if pa.types.is_null(column.type):
        return None
    full = column.filter(pc.equal(pc.list_value_length(column), len(BANDS)))
    if not len(full):
        return None
    values: NDArray[np.float32] = pc.list_flatten(full).to_numpy()
    return values.reshape(-1, len(BANDS))


def _mean_edges(layout: Layout) -> dict[str, NDArray[np.float64]]:
    """Band -> bins for the means of its chips, for the bands that the layout has."""
    units = {band: spec.units for spec in layout.arrays().values() for band in spec.bands}
    return {band: _MEAN_EDGES[units[band]] for band in BANDS if band in units}


def _extent(corners: NDArray[np.float64]) -> dict[str, Any]:
    if not len(corners):
        return {"bbox": None}
    middle = centres(corners)
    low, high = middle.min(axis=0), middle.max(axis=0)
    return {"bbox": [round(float(x), 4) for x in (*low, *high)]}


def _pixel_bands(statistics: BandStatistics) -> list[dict[str, Any]]:
    """Mean, deviation, percentiles and histogram of the valid pixels of every band."""
    found = []
    for band, facts in statistics.summary().items():
        counts, edges = statistics.histogram(band)
        low, high = (statistics.percentile(band, percent) for percent in _SHOWN_PERCENTILES)
        shown = _rebinned(counts, edges, int(np.searchsorted(edges, low)) - 1, int(np.searchsorted(edges, high)))
        found.append(
            {
                "band": band,
                "units": _band_units(band),
                **{name: round(facts[name], 3) for name in ("mean", "std")},
                "percentiles": {name[1:].lstrip("0"): round(facts[name], 2) for name in ("p02", "p50", "p98")},
                "histogram_of": "pixels",
                "histogram": Histogram(edges=shown.edges, series={"pixels": shown.series["chips"]}).to_dict(),
            }
        )
    return found


def _chip_bands(tally: _Tally, layout: Layout) -> list[dict[str, Any]]:
    """Mean and deviation over all pixels of the kept chips, and how the chips' means are spread."""
    found = []
    for index, band in enumerate(BANDS):
        number, total, squares, variances = tally.moments[index]
        if band not in tally.means or not number:
            continue
        mean = total / number
        # Chips have about the same number of pixels: their variances add up with that of their means.
        deviation = np.sqrt(max(squares / number - mean**2, 0) + variances / number)
        counts, edges = tally.means[band], _mean_edges(layout)[band]
        there = np.flatnonzero(counts)
        shown = _rebinned(counts, edges, int(there[0]), int(there[-1]) + 1)
        facts = {"mean": round(float(mean), 3), "std": round(float(deviation), 3)}
        more = {"histogram_of": "means of the chips", "histogram": shown.to_dict()}
        found.append({"band": band, "units": _band_units(band), **facts, **more})
    return found


def _rebinned(counts: NDArray[np.int64], edges: NDArray[np.float64], first: int, end: int) -> Histogram:
    """The bins from `first` to `end`, put together to a few."""
    first, end = max(0, first), min(len(counts), max(end, first + 1))
    step = -(-(end - first) // _COARSE_BINS)
    bins = np.arange(first, end, step)
    return Histogram(
        edges=np.append(edges[bins], edges[min(bins[-1] + step, len(counts))]),
        series={"chips": np.add.reduceat(counts[: bins[-1] + step], bins)},
    )


def _band_units(band: str) -> str:
    return "dB" if band in RADAR_BANDS else "reflectance x 10000"


def _ordered(splits: Iterable[str]) -> list[str]:
    """The known splits first, in their order."""
    there = set(splits)
    return [*(split for split in SPLITS if split in there), *sorted(there - set(SPLITS))]


def _hashed(rows: NDArray[np.int64], seed: int) -> NDArray[np.uint64]:
    """A random number for each row (the finaliser of splitmix64)."""
    mixed = rows.astype(np.uint64) + np.uint64((seed + 1) * 0x9E3779B97F4A7C15 % 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    hashed: NDArray[np.uint64] = mixed ^ (mixed >> np.uint64(31))
    return hashed


def even_rows(samples: Mapping[str, list[int]], number: int) -> list[tuple[str, int]]:
    """Rows drawn evenly over splits; what one split lacks goes to the others.

    Args:
        samples: Split -> rows in the order of drawing.
        number: How many to take.

    Returns:
        (split, row), in the order of splits and rows.
    """
    drawn: list[tuple[int, int, str, int]] = []
    for order, (split, rows) in enumerate(samples.items()):
        drawn += [(place, order, split, row) for place, row in enumerate(rows)]
    taken = sorted(drawn)[:number]
    return [(split, row) for _, split, row in sorted((order, split, row) for _, order, split, row in taken)]
