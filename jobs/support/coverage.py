"""What became of every cell that was asked for: embedded, or why not."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Final

import pyarrow as pa

from pipeline.chip_table import WRITTEN
from pipeline.grid import Cell
from pipeline.versions import Version

EMBEDDED: Final = "embedded"
NO_PAIR: Final = "no_pair"
"""Beside the chip table's rejected and failed."""

_NEAREST_FIRST: Final = (
    *("another_pair_taken", "other_orbit", "no_radar_in_time", "no_radar"),
    *("too_little_overlap", "cloudy_scene", "no_optical", "excluded"),
)
"""Of several acquisitions that came to nothing, the one that came furthest gives the reason."""

SCHEMA: Final = pa.schema(
    [("cell", pa.string()), ("status", pa.string()), ("reason", pa.string()), ("detail", pa.string())]
)


def coverage(cells: Sequence[Cell], version: Version) -> pa.Table:
    """One row per cell that was asked for, in their order.

    Returns:
        cell; status: embedded, rejected (by its pixels), failed (could not be read) or no_pair; reason, empty where
        embedded; detail: all that was tried.
    """
    chips = {row["cell"]: row for row in version.chips().to_pylist()}
    refused: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in version.rejections().to_pylist():
        refused[row["cell"]].append(row)
    rows = [{"cell": cell.id, **_fate(chips.get(cell.id), refused[cell.id])} for cell in cells]
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def _fate(chip: dict[str, Any] | None, refused: Sequence[dict[str, Any]]) -> dict[str, str]:
    tried = "; ".join(f"{row['optical'] or 'no acquisition'}: {row['reason']} ({row['detail']})" for row in refused)
    if chip is None:
        reasons = {row["reason"] for row in refused}
        known = [reason for reason in _NEAREST_FIRST if reason in reasons]
        return {"status": NO_PAIR, "reason": next(iter([*known, *sorted(reasons)]), "unknown"), "detail": tried}
    if chip["status"] == WRITTEN:
        return {"status": EMBEDDED, "reason": "", "detail": tried}
    detail = "; ".join(part for part in (chip["error"] or f"pair {chip['pair']}", tried) if part)
    return {"status": chip["status"], "reason": chip["reason"] or "unreadable", "detail": detail}
