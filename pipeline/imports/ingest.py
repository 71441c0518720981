"""Importing on Ray Data: one task per shard group, as in building from an archive."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from numpy.typing import NDArray
from ray.data import DataContext

from pipeline.bands import NATIVE_GROUPS, OPTICAL_NODATA, RADAR_BANDS, RADAR_NODATA
from pipeline.chip_table import FAILED, FROM_MANIFEST, REJECTED, WRITTEN, chip_table, ledger
from pipeline.imports.plan import LABEL_PREFIX, sample_from_row
from pipeline.imports.samples import Reading, Unfit
from pipeline.imports.sources import SOURCES
from pipeline.ingest import Receipt
from pipeline.layout import Layout
from pipeline.screening import band_statistics
from pipeline.store import Store, chip_hash
from pipeline.types import ChipArrays
from pipeline.versions import Version

_NO_PIXELS = {
    **{name: np.full((len(bands), 1, 1), OPTICAL_NODATA, np.uint16) for name, bands in NATIVE_GROUPS.items()},
    "radar": np.full((len(RADAR_BANDS), 1, 1), RADAR_NODATA, np.int16),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportTask:
    """What every task of an import knows."""

    source: str
    folder: str
    """Of the dataset; every node must see it."""

    min_valid_fraction: float = 0.0
    """Smallest share of 10 m pixels with data in all bands."""


def import_shard(version: Version, shard: int, task: ImportTask) -> Receipt:
    """Read the units of one shard group, write its shard objects, then its part of the chip table, which says "done".

    Args:
        version: Being built.
        shard: Number of the shard.
        task: Where pixels come from, and which are kept.
    """
    start = time.monotonic()
    store, rows = Store.open(version.url), list[dict[str, Any]]()
    manifest = version.manifest_of(shard)
    version.withdraw_part(shard)
    store.write_shard(shard, _chips(manifest, store.layout, task, rows))
    part = _typed(chip_table(rows), manifest.schema)
    version.write_part(shard, part)
    counts = ledger(part)
    statuses = {status: counts[status] for status in (WRITTEN, REJECTED, FAILED)}
    return Receipt(shard=shard, **statuses, seconds=round(time.monotonic() - start, 3))


def import_missing(version: Version, task: ImportTask, *, cpus_per_task: float = 1.0) -> Iterator[Receipt]:
    """Import what is missing of a version on the Ray cluster; yields receipts as they come.

    Shard groups that are finished without failures are left alone; those with failed chips are redone whole.
    """
    missing = sorted(set(version.shards()) - version.finished_shards())
    if not missing:
        return
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False

    def work(row: dict[str, Any]) -> dict[str, Any]:
        return asdict(import_shard(version, int(row["shard"]), task))

    tasks = ray.data.from_items([{"shard": shard} for shard in missing], override_num_blocks=len(missing))
    for row in tasks.map(work, num_cpus=cpus_per_task).iter_rows():
        yield Receipt(**row)


def judge(chip: ChipArrays, layout: Layout, task: ImportTask) -> dict[str, Any]:
    """What the ledger says of a chip that could be read: its fractions, and the reason if it is not kept."""
    specs = layout.arrays()
    side = (layout.side_px, layout.side_px)
    valid: dict[str, NDArray[np.bool_]] = {"optical": np.ones(side, np.bool_), "radar": np.ones(side, np.bool_)}
    for name in specs.keys() & _NO_PIXELS.keys():
        of_array = (chip[name] != specs[name].nodata).all(axis=0)
        step = specs[name].step_px
        valid["radar" if name == "radar" else "optical"] &= of_array.repeat(step, axis=0).repeat(step, axis=1)
    fraction = float((valid["optical"] & valid["radar"]).mean())
    reason = ""
    for sensor, pixels in valid.items():
        if not pixels.any():
            reason = reason or f"no_{sensor}_data"
    if fraction < task.min_valid_fraction:
        reason = reason or "too_little_valid"
    radar = {"radar_valid_fraction": float(valid["radar"].mean())} if layout.has_radar else {}
    return {"reason": reason, "valid_fraction": fraction, **radar}


def _chips(
    manifest: pa.Table, layout: Layout, task: ImportTask, rows: list[dict[str, Any]]
) -> Iterator[tuple[int, ChipArrays]]:
    """The chips of a shard, unit by unit; appends what became of every row to `rows`."""
    units: dict[str, list[Mapping[str, Any]]] = {}
    for row in manifest.sort_by("row").to_pylist():
        units.setdefault(row["unit"], []).append(row)
    for unit in units.values():
        samples = [sample_from_row(row) for row in unit]
        readings = SOURCES[task.source].read(Path(task.folder), samples, layout)
        for row, reading in zip(unit, readings, strict=True):
            outcome = _outcome(reading, layout, task)
            rows.append({**_planned(row), **outcome})
            if outcome["status"] == WRITTEN:
                assert isinstance(reading, dict)
                yield row["row"], reading


def _outcome(reading: Reading, layout: Layout, task: ImportTask) -> dict[str, Any]:
    if isinstance(reading, Unfit):
        return {"status": REJECTED, "reason": str(reading)}
    if isinstance(reading, Exception):
        return {"status": FAILED, "error": str(reading)}
    seen = judge(reading, layout, task)
    if seen["reason"]:
        return {"status": REJECTED, **seen}
    means, deviations = band_statistics({**_NO_PIXELS, **reading})
    return {"status": WRITTEN, "sha256": chip_hash(reading), "mean": means, "std": deviations, **seen}


def _planned(row: Mapping[str, Any]) -> dict[str, Any]:
    """What the ledger takes over from the manifest."""
    return {name: value for name, value in row.items() if name in FROM_MANIFEST or name.startswith(LABEL_PREFIX)}


def _typed(part: pa.Table, schema: pa.Schema) -> pa.Table:
    """Labels have the manifest's types, also in a shard where no chip has any."""
    fields = [schema.field(field.name) if field.name.startswith(LABEL_PREFIX) else field for field in part.schema]
    return part.cast(pa.schema(fields))
