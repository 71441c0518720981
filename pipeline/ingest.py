"""Building the store on Ray Data: one task per shard group; pixels stay in the task, receipts come back."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray.data import DataContext

from pipeline.chip_table import chip_table, ledger
from pipeline.chips import LedgerRow, Recipe, build_unit
from pipeline.manifest import items_from_table
from pipeline.store import Store
from pipeline.types import ChipArrays, Item
from pipeline.versions import Version


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What a task says when its shard group is written."""

    shard: int
    written: int
    rejected: int
    failed: int
    seconds: float


def build_shard(version: Version, shard: int, manifest: pa.Table, items: pa.Table, recipe: Recipe) -> Receipt:
    """Read the units of one shard group, write its shard objects, then its part of the chip table.

    The part is written last and says "done": a task killed before leaves nothing that a reader looks at, and the
    next run writes the same bytes again. One unit's pixels are in memory at a time.

    Args:
        version: Being built.
        shard: Number of the shard.
        manifest: Its rows.
        items: At least those that the rows name.
        recipe: How chips are made.
    """
    start = time.monotonic()
    rows: list[LedgerRow] = []
    Store.open(version.url).write_shard(shard, _chips(manifest, items_from_table(items), recipe, rows))
    part = chip_table(rows)
    version.write_part(shard, part)
    counts = ledger(part)
    statuses = {status: counts[status] for status in ("written", "rejected", "failed")}
    return Receipt(shard=shard, **statuses, seconds=round(time.monotonic() - start, 3))


def build(version: Version, recipe: Recipe, *, cpus_per_task: float = 1.0) -> Iterator[Receipt]:
    """Build what is missing of a version on the Ray cluster; yields receipts as they come.

    Shard groups that are finished without failures are left alone; those with failed chips are redone whole.
    """
    missing = sorted(set(version.shards()) - version.finished_shards())
    if not missing:
        return
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False

    def work(row: dict[str, Any]) -> dict[str, Any]:
        manifest, items = (pa.ipc.open_stream(row[name]).read_all() for name in ("manifest", "items"))
        return asdict(build_shard(version, int(row["shard"]), manifest, items, recipe))

    tasks = ray.data.from_items(_tasks(version, missing), override_num_blocks=len(missing))
    for row in tasks.map(work, num_cpus=cpus_per_task).iter_rows():
        yield Receipt(**row)


def _chips(
    manifest: pa.Table, items: Mapping[str, Item], recipe: Recipe, rows: list[LedgerRow]
) -> Iterator[tuple[int, ChipArrays]]:
    """The chips of a shard, unit by unit; appends what became of every row to `rows`."""
    units: dict[str, list[Mapping[str, Any]]] = {}
    for row in manifest.sort_by("row").to_pylist():
        units.setdefault(row["unit"], []).append(row)
    for unit in units.values():
        chips, unit_rows = build_unit(unit, items, recipe)
        rows += unit_rows
        yield from chips.items()


def _tasks(version: Version, shards: Sequence[int]) -> list[dict[str, Any]]:
    """What each task needs of the plan: the rows of its shard and the items that they name."""
    manifest, items = version.manifest(), version.items()
    tasks = []
    for shard in shards:
        rows = manifest.filter(pc.equal(manifest["shard"], shard))
        named = pa.concat_arrays([pc.list_flatten(rows[c]).combine_chunks() for c in ("optical_items", "radar_items")])
        needed = items.filter(pc.is_in(items["id"], value_set=named))
        tasks.append({"shard": shard, "manifest": _bytes(rows), "items": _bytes(needed)})
    return tasks


def _bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return bytes(sink.getvalue())
