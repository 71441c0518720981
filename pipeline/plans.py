"""The plan of a version at rest, written as it is made and read where it is needed: whole, in waves, or by shard.

The manifest lies in parts of rows, in numbers alone; looks and items, which many rows share, lie once beside it.
A manifest that is not of the grid's cells (an import) has its names in its rows and no looks.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline import tables
from pipeline.manifest import ITEMS_SCHEMA, MANIFEST_SCHEMA, ROWS_SCHEMA, joined
from pipeline.objects import Objects
from pipeline.store import StoreError

_MANIFEST: Final = "manifest"
_REJECTIONS: Final = "rejections"
_LOOKS: Final = "looks.parquet"
_ITEMS: Final = "items.parquet"

_GROUP_ROWS: Final = 1 << 14
"""About so many rows are read where one shard's are asked for."""

_PART_ROWS: Final = 1 << 18

_GROUP_LOOKS: Final = 1 << 10
_REJECTIONS_AT_ONCE: Final = 1 << 17


def rows_per_group(shard_chips: int) -> int:
    """Rows of a row group: whole shards."""
    return max(1, _GROUP_ROWS // shard_chips) * shard_chips


def groups_per_part(shard_chips: int) -> int:
    """Row groups of a part, of the manifest and of the sealed chip table alike."""
    return max(1, _PART_ROWS // rows_per_group(shard_chips))


def write_manifest(
    objects: Objects, parts: Iterable[pa.Table], *, first_shard: int, shard_chips: int
) -> dict[str, Any]:
    """Write a manifest as it comes, in parts that depend on its rows alone.

    Args:
        objects: Folder of the version.
        parts: Tables with `row`, ascending over all parts, and `shard`.
        first_shard: The version's first shard.
        shard_chips: Rows per shard.

    Returns:
        num_chips, first_row, end_row, first_shard, end_shard, shard_chips; and part_rows, the first row of each part.

    Raises:
        StoreError: No rows at all, or rows that are not ascending, not in their shard or below the first shard.
    """
    first_row = first_shard * shard_chips
    counted = {"num_chips": 0, "last_row": first_row - 1}
    groups = tables.grouped(
        _checked(parts, counted, shard_chips), column="row", first=first_row, step=rows_per_group(shard_chips)
    )
    written = tables.write_parts(objects, _MANIFEST, groups, groups_per_part=groups_per_part(shard_chips))
    part_rows = [int(first["row"][0].as_py()) for first, _ in written]
    if not counted["num_chips"]:
        raise StoreError(f"{objects.url}: the manifest has no rows")
    tables.delete_parts_from(objects, _MANIFEST, len(part_rows))
    return {
        "num_chips": counted["num_chips"],
        "first_row": first_row,
        "end_row": counted["last_row"] + 1,
        "first_shard": first_shard,
        "end_shard": counted["last_row"] // shard_chips + 1,
        "part_rows": part_rows,
        "shard_chips": shard_chips,
    }


def write_looks(objects: Objects, looks: pa.Table) -> None:
    """Looks by number."""
    objects.put(_LOOKS, tables.encode(tables.slices(looks, _GROUP_LOOKS)))


def write_items(objects: Objects, items: pa.Table) -> None:
    """Items by id."""
    objects.put(_ITEMS, tables.encode(tables.slices(items, _GROUP_LOOKS)))


def write_rejections(objects: Objects, parts: Iterable[pa.Table]) -> int:
    """Candidates that are not in the manifest, as they come; returns how many."""
    num_rows = num_parts = 0
    for part in parts:
        for piece in tables.slices(part, _REJECTIONS_AT_ONCE):
            if piece.num_rows:
                objects.put(tables.part_path(_REJECTIONS, num_parts), tables.encode([piece]))
                num_parts += 1
            num_rows += piece.num_rows
    tables.delete_parts_from(objects, _REJECTIONS, num_parts)
    return num_rows


class Plan:
    """What `write_manifest` and its sisters wrote.

    Args:
        objects: Folder of the version.
        facts: What the plan's writer returned, with `block_cells` where there are looks.
    """

    def __init__(self, objects: Objects, facts: Mapping[str, Any]) -> None:
        self._objects = objects
        self._facts = facts
        self._part_rows: Sequence[int] = facts["part_rows"]

    def manifest(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Every row; for plans that fit into memory."""
        return pa.concat_tables(self.batches(columns))

    def batches(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """Every row, some thousand at a time, ascending."""
        looks = self._objects.get_table(_LOOKS) if self._has_looks else None
        for number in range(len(self._part_rows)):
            path = tables.part_path(_MANIFEST, number)
            for rows in tables.batches(self._objects, path, self._at_rest(columns)):
                yield self._named(rows, looks, columns)

    def of_rows(self, first_row: int, end_row: int, columns: Sequence[str] | None = None) -> pa.Table:
        """Rows in a range, as of a shard; reads their part's row groups and their looks only."""
        numbers = range(first_row, end_row)
        first_part = max(0, bisect.bisect_right(self._part_rows, first_row) - 1)
        end_part = bisect.bisect_left(self._part_rows, end_row)
        names = self._at_rest(columns)
        rows = pa.concat_tables(
            tables.matching(self._objects, tables.part_path(_MANIFEST, part), "row", np.array(numbers), columns=names)
            for part in range(first_part, max(end_part, first_part + 1))
        )
        if not self._has_looks:
            return rows if columns is None else rows.select([*columns])
        return self._named(rows, self._looks_of(rows) if "look" in rows.column_names else None, columns)

    def items(self) -> pa.Table:
        """Every item."""
        return self._objects.get_table(_ITEMS)

    def items_of(self, manifest: pa.Table) -> pa.Table:
        """The items that rows of the manifest name, with a few others perhaps."""
        lists = [manifest[name] for name in ("optical_items", "radar_items") if name in manifest.column_names]
        named = {name for column in lists for name in pc.list_flatten(column).unique().to_pylist()}
        if not named:
            return ITEMS_SCHEMA.empty_table()
        return tables.matching(self._objects, _ITEMS, "id", sorted(named))

    def looks(self) -> pa.Table | None:
        """Every look; None where rows have no looks."""
        return self._objects.get_table(_LOOKS) if self._has_looks else None

    def rejections(self) -> Iterator[pa.Table]:
        """Candidates that are not in the manifest, some thousand at a time."""
        for path in self._objects.list(_REJECTIONS):
            yield from tables.batches(self._objects, path)

    @property
    def _has_looks(self) -> bool:
        return "block_cells" in self._facts

    def _at_rest(self, columns: Sequence[str] | None) -> list[str] | None:
        """The columns to read for some columns of the manifest."""
        if columns is None or not self._has_looks:
            return None if columns is None else [*columns]
        needed = {name for name in columns if name in ROWS_SCHEMA.names}
        if needed != set(columns):
            needed |= {"epsg", "column", "cell_row", "look"}
        return sorted({"row", *needed}, key=ROWS_SCHEMA.names.index)

    def _named(self, rows: pa.Table, looks: pa.Table | None, columns: Sequence[str] | None) -> pa.Table:
        if not self._has_looks:
            return rows
        if looks is None or "look" not in rows.column_names:
            # Nothing was asked for that is not in the rows themselves.
            chosen = rows.select([*(columns or rows.column_names)])
            return chosen.cast(pa.schema([MANIFEST_SCHEMA.field(name) for name in chosen.column_names]))
        return joined(rows, looks, block_cells=self._facts["block_cells"], columns=columns)

    def _looks_of(self, rows: pa.Table) -> pa.Table:
        return tables.matching(self._objects, _LOOKS, "look", np.unique(rows["look"].to_numpy()))


def _checked(parts: Iterable[pa.Table], counted: dict[str, int], shard_chips: int) -> Iterator[pa.Table]:
    """The parts as they come, counted; those without rows left out."""
    for part in parts:
        rows: NDArray[np.int64] = part["row"].to_numpy()
        after = counted["last_row"]
        if np.any(np.diff(rows, prepend=after) <= 0):
            raise StoreError(f"manifest rows must ascend from {after + 1} on, each once")
        if np.any(part["shard"].to_numpy() != rows // shard_chips):
            raise StoreError(f"manifest rows must be in the shards of {shard_chips} rows they name")
        if rows.size:
            counted["num_chips"] += rows.size
            counted["last_row"] = int(rows[-1])
            yield part
