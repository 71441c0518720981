"""The plan of a version at rest: the manifest as Parquet parts, counted and checked while they are written."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.objects import Objects, concurrently
from pipeline.store import StoreError

_FOLDER = "manifest"


def write_manifest(
    objects: Objects, parts: Iterable[pa.Table], *, first_shard: int, shard_chips: int
) -> dict[str, int]:
    """Write a manifest part by part, as they come.

    Args:
        objects: Folder of the version.
        parts: Tables with `row`, ascending over all parts, and `shard`.
        first_shard: The version's first shard.
        shard_chips: Rows per shard.

    Returns:
        num_chips, first_row, end_row, first_shard, end_shard, num_parts, shard_chips.

    Raises:
        StoreError: No rows at all, or rows that are not ascending, not in their shard or below the first shard.
    """
    first_row = first_shard * shard_chips
    num_chips, num_parts, last_row = 0, 0, first_row - 1
    for part in parts:
        last_row = _last_row(part, after=last_row, shard_chips=shard_chips)
        objects.put_table(_path(num_parts), part)
        num_chips, num_parts = num_chips + part.num_rows, num_parts + 1
    if not num_chips:
        raise StoreError(f"{objects.url}: the manifest has no rows")
    for path in objects.list(_FOLDER):
        # Left by a planning that was killed and had more parts.
        if path >= _path(num_parts):
            objects.delete(path)
    return {
        "num_chips": num_chips,
        "first_row": first_row,
        "end_row": last_row + 1,
        "first_shard": first_shard,
        "end_shard": last_row // shard_chips + 1,
        "num_parts": num_parts,
        "shard_chips": shard_chips,
    }


def read_manifest(objects: Objects, num_parts: int, *, columns: Sequence[str] | None = None) -> pa.Table:
    """The whole manifest of a version, or some of its columns."""
    paths = [_path(number) for number in range(num_parts)]
    return pa.concat_tables(concurrently(lambda path: objects.get_table(path, columns=columns), paths))


def _last_row(part: pa.Table, *, after: int, shard_chips: int) -> int:
    rows: NDArray[np.int64] = part["row"].to_numpy()
    if np.any(np.diff(rows, prepend=after) <= 0):
        raise StoreError(f"manifest rows must ascend from {after + 1} on, each once")
    if np.any(part["shard"].to_numpy() != rows // shard_chips):
        raise StoreError(f"manifest rows must be in the shards of {shard_chips} rows they name")
    return int(rows[-1]) if rows.size else after


def _path(number: int) -> str:
    return f"{_FOLDER}/part-{number:05d}.parquet"
