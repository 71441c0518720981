"""The plan: every candidate chip with its row in the store, before any pixel is read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import shapely

from pipeline.pairing import Pair, Rejection
from pipeline.planning import Planner, block_ids, cell_ids, splits_by
from pipeline.splits import SplitRules
from pipeline.types import Item

LOOKS_SCHEMA = pa.schema(
    [
        ("look", pa.int32()),
        ("pair", pa.string()),
        ("optical_items", pa.list_(pa.string())),
        ("radar_items", pa.list_(pa.string())),
        ("optical_datetime", pa.timestamp("us", tz="UTC")),
        ("radar_datetime", pa.timestamp("us", tz="UTC")),
        ("dt_s", pa.int32()),
        ("orbit_state", pa.string()),
        ("relative_orbit", pa.int32()),
        ("baseline", pa.string()),
        ("offset_dn", pa.int32()),
    ]
)
"""What a cell's candidate was seen by: one row for each set of optical and radar items, numbered from 0."""

ROWS_SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("shard", pa.int32()),
        ("epsg", pa.int32()),
        ("column", pa.int32()),
        ("cell_row", pa.int32()),
        ("look", pa.int32()),
        ("split", pa.dictionary(pa.int8(), pa.string())),
        ("overlap", pa.float32()),
    ]
)
"""The manifest at rest: one row per candidate chip, in numbers alone."""

_CELL = ("epsg", "column", "cell_row")

MANIFEST_SCHEMA = pa.schema(
    [
        *(ROWS_SCHEMA.field(name) for name in ("row", "shard")),
        *((name, pa.string()) for name in ("unit", "block", "cell")),
        *(ROWS_SCHEMA.field(name) for name in _CELL),
        *(field for field in LOOKS_SCHEMA if field.name != "look"),
        ("split", pa.string()),
        ("overlap", pa.float32()),
    ]
)
"""The manifest as it is read: rows with what their looks say, see `joined`."""

ITEMS_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("collection", pa.string()),
        ("sensor", pa.string()),
        ("datetime", pa.timestamp("us", tz="UTC")),
        ("epsg", pa.int32()),
        ("footprint", pa.binary()),
        ("assets", pa.map_(pa.string(), pa.string())),
        ("platform", pa.string()),
        ("relative_orbit", pa.int32()),
        ("orbit_state", pa.string()),
        ("absolute_orbit", pa.int32()),
        ("datatake", pa.string()),
        ("tile", pa.string()),
        ("cloud_percent", pa.float32()),
        ("baseline", pa.string()),
        ("offset_dn", pa.int32()),
    ]
)

CANDIDATES_SCHEMA = pa.schema(
    [
        ("epsg", pa.int32()),
        ("column", pa.int32()),
        ("cell_row", pa.int32()),
        ("look", pa.int32()),
        ("overlap", pa.float32()),
    ]
)
"""Pairs in the order of the arguments of `Planner.add`."""

REJECTIONS_SCHEMA = pa.schema([(name, pa.string()) for name in ("cell", "optical", "reason", "detail")])


def plan_rows(
    pairs: Sequence[Pair], *, block_cells: int, shard_chips: int, first_row: int, splits: SplitRules
) -> pa.Table:
    """The whole manifest of a few pairs, with all its columns; for more of them, see `plan_pairs`.

    Raises:
        ValueError: A whole block is larger than a shard.
    """
    planner = plan_pairs(pairs, block_cells=block_cells, shard_chips=shard_chips, first_row=first_row, splits=splits)
    return joined(pa.concat_tables(planner.parts()), planner.looks(), block_cells=block_cells)


def plan_pairs(
    pairs: Sequence[Pair], *, block_cells: int, shard_chips: int, first_row: int, splits: SplitRules
) -> Planner:
    """A planner with pairs as its candidates, see `pipeline.planning.Planner`.

    Raises:
        ValueError: A whole block is larger than a shard.
    """
    side_m = pairs[0].cell.side_m
    planner = Planner(
        block_cells=block_cells,
        shard_chips=shard_chips,
        first_row=first_row,
        seed=splits.seed,
        splits_of=splits_by(splits, side_m=side_m),
    )
    add_pairs(planner, pairs)
    return planner


def add_pairs(planner: Planner, pairs: Sequence[Pair]) -> None:
    """Give a planner the pairs of an area."""
    candidates, looks = candidates_of(pairs)
    planner.add(*(candidates[name].to_numpy() for name in CANDIDATES_SCHEMA.names), looks=looks)


def candidates_of(pairs: Sequence[Pair]) -> tuple[pa.Table, pa.Table]:
    """Pairs as tables, quick to send: `CANDIDATES_SCHEMA`, and the looks that its `look` counts in."""
    numbers: dict[tuple[Any, ...], int] = {}
    firsts: list[Pair] = []
    look = np.empty(len(pairs), np.int32)
    for place, pair in enumerate(pairs):
        key = (pair.id, *(tuple(item.id for item in side.items) for side in (pair.optical, pair.radar)))
        number = look[place] = numbers.setdefault(key, len(numbers))
        if number == len(firsts):
            firsts.append(pair)
    cells = np.array([(pair.cell.epsg, pair.cell.column, pair.cell.row) for pair in pairs], np.int32).reshape(-1, 3)
    overlap = np.array([pair.overlap for pair in pairs], np.float32)
    candidates = pa.table([*cells.T, look, overlap], schema=CANDIDATES_SCHEMA)
    return candidates, pa.Table.from_pylist([_look(pair) for pair in firsts], schema=LOOKS_SCHEMA.remove(0))


def joined(rows: pa.Table, looks: pa.Table, *, block_cells: int, columns: Sequence[str] | None = None) -> pa.Table:
    """Rows of a plan with what their looks say, and their cells, blocks and units by name.

    Args:
        rows: Columns of `ROWS_SCHEMA`.
        looks: At least those that the rows name, ascending by number.
        block_cells: Side of the blocks that the rows were planned in, cells.
        columns: Names of `MANIFEST_SCHEMA`, or `look`, to return, in this order; all of the former if unset.
    """
    columns = MANIFEST_SCHEMA.names if columns is None else columns
    epsg, column, cell_row = (rows[name].to_numpy() for name in _CELL)
    at = pa.array(np.searchsorted(looks["look"].to_numpy(), rows["look"].to_numpy()))
    found: dict[str, Any] = {}
    for name in columns:
        if name == "cell":
            found[name] = cell_ids(epsg, column, cell_row)
        elif name in ("block", "unit"):
            block = block_ids(epsg, column, cell_row, block_cells=block_cells)
            pair = looks["pair"].combine_chunks().take(at)
            found[name] = block if name == "block" else pc.binary_join_element_wise(block, pair, "/")
        else:
            found[name] = rows[name] if name in rows.column_names else looks[name].combine_chunks().take(at)
    fields = (MANIFEST_SCHEMA if name in MANIFEST_SCHEMA.names else ROWS_SCHEMA for name in columns)
    return pa.table(found).cast(pa.schema([schema.field(name) for schema, name in zip(fields, columns, strict=True)]))


def items_table(pairs: Sequence[Pair]) -> pa.Table:
    """The items that pairs use, once each, sorted by id; hrefs are unsigned."""
    return table_of_items(item for pair in pairs for look in (pair.optical, pair.radar) for item in look.items)


def table_of_items(items: Iterable[Item]) -> pa.Table:
    """Items, once each, sorted by id; hrefs are unsigned."""
    by_id = {item.id: item for item in items}
    rows = [
        {
            **{name: getattr(item, name) for name in ITEMS_SCHEMA.names if name not in ("footprint", "assets")},
            "footprint": item.footprint.wkb,
            "assets": sorted(item.assets.items()),
        }
        for item in (by_id[name] for name in sorted(by_id))
    ]
    return pa.Table.from_pylist(rows, schema=ITEMS_SCHEMA)


def items_from_table(table: pa.Table) -> dict[str, Item]:
    """Item id -> item; the inverse of `items_table`."""
    return {
        row["id"]: Item(**{**row, "footprint": shapely.from_wkb(row["footprint"]), "assets": dict(row["assets"])})
        for row in table.to_pylist()
    }


def rejections_table(rejections: Sequence[Rejection]) -> pa.Table:
    """Candidates that were not taken, one row each."""
    return pa.Table.from_pylist([asdict(rejection) for rejection in rejections], schema=REJECTIONS_SCHEMA)


def _look(pair: Pair) -> dict[str, Any]:
    optical, radar = pair.optical, pair.radar
    return {
        "pair": pair.id,
        "optical_items": [item.id for item in optical.items],
        "radar_items": [item.id for item in radar.items],
        "optical_datetime": optical.datetime,
        "radar_datetime": radar.datetime,
        "dt_s": pair.dt_s,
        "orbit_state": radar.items[0].orbit_state,
        "relative_orbit": radar.items[0].relative_orbit,
        "baseline": optical.items[0].baseline,
        "offset_dn": optical.items[0].offset_dn,
    }
