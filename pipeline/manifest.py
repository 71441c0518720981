"""The plan: every candidate chip with its row in the store, before any pixel is read."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import shapely

from pipeline.grid import block_key
from pipeline.pairing import Pair, Rejection
from pipeline.splits import SplitRules, split_of
from pipeline.types import Item

MANIFEST_SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("shard", pa.int32()),
        ("unit", pa.string()),
        ("block", pa.string()),
        ("cell", pa.string()),
        ("epsg", pa.int32()),
        ("column", pa.int32()),
        ("cell_row", pa.int32()),
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
        ("split", pa.string()),
        ("overlap", pa.float32()),
    ]
)

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
        ("tile", pa.string()),
        ("cloud_percent", pa.float32()),
        ("baseline", pa.string()),
        ("offset_dn", pa.int32()),
    ]
)

REJECTIONS_SCHEMA = pa.schema([(name, pa.string()) for name in ("cell", "optical", "reason", "detail")])


def plan_rows(
    pairs: Sequence[Pair], *, block_cells: int, shard_chips: int, first_row: int, splits: SplitRules
) -> pa.Table:
    """Give every pair its row, whole units together, units in an order that mixes places and dates in a shard.

    Args:
        pairs: What to build.
        block_cells: Side of the blocks of cells that are read together, in cells.
        shard_chips: Rows of a shard; a unit (one block of one pair of acquisitions) never straddles two shards.
        first_row: First free row of the store, at the start of a shard.
        splits: How cells are shared out.

    Returns:
        The manifest in order of rows. Rows that no unit fits into are left out.

    Raises:
        ValueError: A whole block is larger than a shard.
    """
    if block_cells**2 > shard_chips:
        raise ValueError(f"block_cells={block_cells}: {block_cells**2} chips do not fit a shard of {shard_chips}")
    assert first_row % shard_chips == 0, (first_row, shard_chips)
    units: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        units[f"{_block_id(pair, block_cells)}/{pair.id}"].append(pair)
    rows: list[dict[str, Any]] = []
    row = first_row
    for unit in sorted(units, key=lambda name: hashlib.sha256(f"{splits.seed}/{name}".encode()).digest()):
        members = sorted(units[unit], key=lambda p: (-p.cell.row, p.cell.column))
        if row % shard_chips + len(members) > shard_chips:
            row = (row // shard_chips + 1) * shard_chips
        for pair in members:
            rows.append(_row(pair, row=row, unit=unit, shard_chips=shard_chips, splits=splits))
            row += 1
    return pa.Table.from_pylist(rows, schema=MANIFEST_SCHEMA)


def items_table(pairs: Sequence[Pair]) -> pa.Table:
    """The items that pairs use, once each, sorted by id; hrefs are unsigned."""
    items = {item.id: item for pair in pairs for look in (pair.optical, pair.radar) for item in look.items}
    rows = [
        {
            **{name: getattr(item, name) for name in ITEMS_SCHEMA.names if name not in ("footprint", "assets")},
            "footprint": item.footprint.wkb,
            "assets": sorted(item.assets.items()),
        }
        for item in (items[name] for name in sorted(items))
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


def _block_id(pair: Pair, block_cells: int) -> str:
    epsg, column, row = block_key(pair.cell, cells_per_side=block_cells)
    return f"{epsg}_{column}_{row}"


def _row(pair: Pair, *, row: int, unit: str, shard_chips: int, splits: SplitRules) -> dict[str, Any]:
    optical, radar, cell = pair.optical, pair.radar, pair.cell
    return {
        "row": row,
        "shard": row // shard_chips,
        "unit": unit,
        "block": unit.partition("/")[0],
        "cell": cell.id,
        "epsg": cell.epsg,
        "column": cell.column,
        "cell_row": cell.row,
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
        "split": split_of(cell, splits),
        "overlap": pair.overlap,
    }
