"""Building the store on Ray Data: one task per shard group; pixels stay in the task, receipts come back."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray
from ray.data import DataContext

from pipeline.chip_table import CHIP_SCHEMA, ledger
from pipeline.chips import LedgerRow, Recipe, build_unit
from pipeline.manifest import items_from_table
from pipeline.store import Store
from pipeline.types import ChipArrays
from pipeline.versions import Version


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What a task says when its shard group is written."""

    shard: int
    written: int
    rejected: int
    failed: int
    seconds: float


def build_shard(version: Version, shard: int, recipe: Recipe) -> Receipt:
    """Read the units of one shard group, write its shard objects, then its part of the chip table.

    The part is written last and says "done": a task killed before leaves nothing that a reader looks at, and the
    next run writes the same bytes again.
    """
    start = time.monotonic()
    manifest = version.manifest_of(shard)
    items = items_from_table(version.items())
    chips: dict[int, ChipArrays] = {}
    rows: list[LedgerRow] = []
    for unit in _units(manifest):
        unit_chips, unit_rows = build_unit(unit, items, recipe)
        chips.update(unit_chips)
        rows += unit_rows
    Store.open(version.url).write_shard(shard, chips)
    part = pa.Table.from_pylist(sorted(rows, key=lambda row: row["row"]), schema=CHIP_SCHEMA)
    version.write_part(shard, part)
    counts = ledger(part)["status"]
    return Receipt(
        shard=shard,
        written=counts.get("written", 0),
        rejected=counts.get("rejected", 0),
        failed=counts.get("failed", 0),
        seconds=round(time.monotonic() - start, 3),
    )


def build(version: Version, recipe: Recipe, *, cpus_per_task: float = 1.0) -> Iterator[Receipt]:
    """Build what is missing of a version on the Ray cluster; yields receipts as they come.

    Shard groups that are finished without failures are left alone; those with failed chips are redone whole.
    """
    finished = version.finished_shards()
    missing = [shard for shard in version.shards() if shard not in finished]
    if not missing:
        return
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False

    def work(row: dict[str, Any]) -> dict[str, Any]:
        receipt = build_shard(version, int(row["shard"]), recipe)
        return {name: getattr(receipt, name) for name in Receipt.__slots__}

    tasks = ray.data.from_items([{"shard": shard} for shard in missing], override_num_blocks=len(missing))
    for row in tasks.map(work, num_cpus=cpus_per_task).iter_rows():
        yield Receipt(**row)


def _units(manifest: pa.Table) -> list[list[Mapping[str, Any]]]:
    """The rows of each unit, in order of rows."""
    units: dict[str, list[Mapping[str, Any]]] = {}
    for row in manifest.sort_by("row").to_pylist():
        units.setdefault(row["unit"], []).append(row)
    return list(units.values())
