"""The chip table: one row per candidate of the manifest, saying what became of it. It is the ledger.

A table comes in parts, one per shard; a part is written last by the task of its shard, so its presence says that
the shard's pixels are all there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

WRITTEN: Final = "written"
REJECTED: Final = "rejected"
FAILED: Final = "failed"
STATUSES: Final = (WRITTEN, REJECTED, FAILED)

SCHEMA: Final = pa.schema(
    [
        ("row", pa.int64()),  # in the arrays
        ("cell", pa.string()),
        ("pair", pa.string()),
        ("unit", pa.string()),
        ("split", pa.string()),  # train, val, test or buffer
        ("status", pa.string()),
        ("reason", pa.string()),  # why rejected; empty otherwise
        ("error", pa.string()),  # why failed; empty otherwise
        ("sha256", pa.string()),  # of the pixels; empty unless written
        # What screening saw, of rejected chips too, as far as it looked; NaN where it did not.
        ("valid_fraction", pa.float32()),
        ("cloud_fraction", pa.float32()),
        ("shadow_fraction", pa.float32()),
        ("snow_fraction", pa.float32()),
        ("clear_fraction", pa.float32()),
        ("radar_valid_fraction", pa.float32()),
        ("border_noise_fraction", pa.float32()),
        ("flags", pa.string()),  # what to beware of, joined by spaces, such as "offset_suspect"
        ("mean", pa.list_(pa.float32())),  # per band: optical in reflectance x 10 000, then radar in dB
        ("std", pa.list_(pa.float32())),  # NaN where a band is absent
    ]
)
"""Columns of every chip table; a store with labels per chip adds `label_<name>` columns."""

FROM_MANIFEST: Final = ("row", "cell", "pair", "unit", "split")
"""Columns that are the manifest's: by them a ledger is compared with its request."""

_LABEL_PREFIX: Final = "label_"
_DEFAULTS: Final[dict[str, Any]] = {
    "reason": "",
    "error": "",
    "sha256": "",
    **{field.name: np.nan for field in SCHEMA if field.name.endswith("_fraction")},
    "flags": "",
    "mean": [],
    "std": [],
}


def chip_table(rows: Iterable[Mapping[str, Any]]) -> pa.Table:
    """A chip table from one mapping per candidate, in any order; fractions and statistics may be left out.

    Raises:
        ValueError: A row is doubled or its status does not go with its hash, reason and error.
    """
    filled = sorted(({**_DEFAULTS, **row} for row in rows), key=lambda row: row["row"])
    extra = sorted({name for row in filled for name in row} - set(SCHEMA.names))
    columns = {field.name: pa.array([row[field.name] for row in filled], field.type) for field in SCHEMA}
    labels = {name: pa.array([row.get(name) for row in filled]) for name in extra}
    table = pa.table({**columns, **labels})
    check(table)
    return table


def check(table: pa.Table) -> None:
    """Refuse what is not a chip table.

    Raises:
        ValueError: A column is missing, unknown or of another type; rows are not ascending; or a status does not
            go with its hash, reason and error.
    """
    for field in SCHEMA:
        if field.name not in table.column_names or table.schema.field(field.name).type != field.type:
            raise ValueError(f"chip table: column {field.name} must be there as {field.type}")
    unknown = [n for n in table.column_names if n not in SCHEMA.names and not n.startswith(_LABEL_PREFIX)]
    if unknown:
        raise ValueError(f"chip table: unknown columns {unknown}")
    rows = table["row"].to_numpy()
    if np.any(np.diff(rows) <= 0):
        raise ValueError("chip table: rows must ascend, each once")
    expected = {"sha256": WRITTEN, "reason": REJECTED, "error": FAILED}
    for column, only_with in expected.items():
        given = pc.fill_null(pc.greater(pc.utf8_length(table[column]), 0), fill_value=False)
        wrong = np.flatnonzero(pc.not_equal(given, pc.equal(table["status"], only_with)).to_numpy())
        if wrong.size:
            first = int(wrong[0])
            status, value = (table[name][first].as_py() for name in ("status", column))
            raise ValueError(f"chip table: row {rows[first]} is {status!r} with {column}={value!r}")
    strange = sorted(set(table["status"].unique().to_pylist()) - set(STATUSES))
    if strange:
        raise ValueError(f"chip table: status must be one of {', '.join(STATUSES)}, got {strange}")


def concatenate(parts: Iterable[pa.Table]) -> pa.Table:
    """One table of several, ascending by row; columns that a part lacks are null in its rows."""
    tables = [part for part in parts if part.num_rows]
    if not tables:
        return SCHEMA.empty_table()
    table = pa.concat_tables(tables, promote_options="default")
    rows = table["row"].to_numpy() if "row" in table.column_names else np.empty(0)
    return table if np.all(np.diff(rows) > 0) else table.sort_by("row")


def ledger(table: pa.Table) -> dict[str, Any]:
    """How many candidates there were, how many came to each status, and how many were rejected for each reason."""
    statuses, reasons = _counts(table["status"]), _counts(table["reason"])
    return {
        "requested": table.num_rows,
        **{status: statuses.get(status, 0) for status in STATUSES},
        "reasons": {reason: reasons[reason] for reason in sorted(reasons) if reason},
    }


def add_ledgers(ledgers: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """One ledger of several that have no row in common."""
    totals: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for each in ledgers:
        totals.update({name: each[name] for name in ("requested", *STATUSES)})
        reasons.update(each["reasons"])
    return {
        **{name: totals[name] for name in ("requested", *STATUSES)},
        "reasons": dict(sorted(reasons.items())),
    }


def mismatch(manifest: pa.Table, chips: pa.Table) -> str:
    """Why a ledger is not that of a manifest, by the columns they share; empty if it is. Both ascend by row."""
    odd = np.setxor1d(manifest["row"].to_numpy(), chips["row"].to_numpy()).tolist()
    if odd:
        return f"rows {some(odd)} are not in both manifest and ledger"
    for column in FROM_MANIFEST:
        if not manifest[column].combine_chunks().equals(chips[column].combine_chunks()):
            return f"{column} differs between manifest and ledger"
    return ""


def equal(first: pa.Table, second: pa.Table) -> bool:
    """Whether two chip tables say the same; unlike `pyarrow.Table.equals`, what was not looked at equals itself."""
    return bool(_nan_as_null(first).equals(_nan_as_null(second)))


def some(numbers: Sequence[int]) -> str:
    """The first few of many numbers, for messages."""
    shown = ", ".join(str(number) for number in numbers[:5])
    return f"{shown} and {len(numbers) - 5} more" if len(numbers) > 5 else shown


def written_rows(table: pa.Table, *, split: str | None = None) -> NDArray[np.int64]:
    """Rows that hold a chip, ascending; of one split if asked."""
    keep = pc.equal(table["status"], WRITTEN)
    if split is not None:
        keep = pc.and_(keep, pc.equal(table["split"], split))
    rows: NDArray[np.int64] = np.sort(table["row"].filter(keep).to_numpy())
    return rows


def _counts(column: pa.ChunkedArray) -> dict[str, int]:
    counted = pc.value_counts(column.combine_chunks()).to_pylist()
    return {pair["values"]: pair["counts"] for pair in counted}


def _nan_as_null(table: pa.Table) -> pa.Table:
    for place, field in enumerate(table.schema):
        if pa.types.is_floating(field.type):
            values = table[field.name]
            table = table.set_column(place, field, pc.if_else(pc.is_nan(values), None, values))
        elif pa.types.is_list(field.type):
            table = table.set_column(place, field.name, pa.array([str(value) for value in table[field.name]]))
    return table
