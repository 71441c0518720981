"""Tables too large for memory: Parquet files of bounded size, written as their rows come, read where they are needed.

A folder holds ``part-00000.parquet`` and so on, ascending by a column that says where a row belongs. Which rows go
into which file and row group depends on that column alone, so equal rows give equal files however they came.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.objects import Objects, concurrently

_TAIL_BYTES = 1 << 16
"""Read with the first request: the footer of most files, and all of small ones."""

_PLAIN_COLUMNS = ("row", "sha256", "mean", "std", "footprint")
"""Columns with no two values alike, which a dictionary would make larger."""


def encode(groups: Iterable[pa.Table], *, metadata: Mapping[str, str] | None = None) -> bytes:
    """A Parquet file with one row group per table; equal rows give equal bytes, however chunked.

    Args:
        groups: At least one table, all of one schema.
        metadata: To keep in the file's footer, as text.
    """
    sink, writer = io.BytesIO(), None
    for group in groups:
        if writer is None:
            names = _leaves(group.schema)
            writer = pq.ParquetWriter(
                sink,
                group.schema,
                compression="zstd",
                use_dictionary=[name for name in names if name.partition(".")[0] not in _PLAIN_COLUMNS],
                column_encoding={name: "DELTA_BINARY_PACKED" for name in names if name == "row"},
            )
        writer.write_table(group.combine_chunks(), row_group_size=max(1, group.num_rows))
    assert writer is not None, "a file of no tables has no schema"
    if metadata:
        writer.add_key_value_metadata(metadata)
    writer.close()
    return sink.getvalue()


def slices(table: pa.Table, num_rows: int) -> Iterator[pa.Table]:
    """A table in pieces of at most so many rows; at least one piece, if need be without rows."""
    for start in range(0, max(1, table.num_rows), num_rows):
        yield table.slice(start, num_rows)


def grouped(tables: Iterable[pa.Table], *, column: str, first: int, step: int) -> Iterator[tuple[int, pa.Table]]:
    """Cut tables anew, by what an ascending column says.

    Args:
        tables: Ascending by the column over all tables.
        column: Integers from `first` on.
        first: Where group 0 begins.
        step: Values of one group.

    Yields:
        Number of a group that has rows, and its rows.
    """
    pending: list[pa.Table] = []
    current = -1
    for table in tables:
        numbers = (table[column].to_numpy() - first) // step
        starts = np.flatnonzero(np.diff(numbers, prepend=-1))
        for start, end in zip(starts, [*starts[1:], len(numbers)], strict=True):
            if pending and numbers[start] != current:
                yield current, pa.concat_tables(pending)
                pending = []
            current = int(numbers[start])
            pending.append(table.slice(start, end - start))
    if pending:
        yield current, pa.concat_tables(pending)


def write_parts(
    objects: Objects, folder: str, groups: Iterable[tuple[int, pa.Table]], *, groups_per_part: int
) -> Iterator[tuple[pa.Table, bytes]]:
    """Write groups as the row groups of parts; files are encoded and sent beside what makes the groups.

    Yields:
        For every part that is written, in order: the part's first group, and its bytes.
    """
    writing: list[tuple[pa.Table, Future[bytes]]] = []

    def write(number: int, part: list[pa.Table]) -> bytes:
        data = encode(part)
        objects.put(part_path(folder, number), data)
        return data

    with ThreadPoolExecutor(1) as pool:
        for number, part in enumerate(_parts(groups, groups_per_part)):
            writing.append((part[0], pool.submit(write, number, part)))
            del part
            if len(writing) > 1:
                first, future = writing.pop(0)
                yield first, future.result()
        for first, future in writing:
            yield first, future.result()


def delete_parts_from(objects: Objects, folder: str, number: int) -> None:
    """Remove the parts from a number on, left by a writing that was killed and had more of them."""
    concurrently(objects.delete, [path for path in objects.list(folder) if path >= part_path(folder, number)])


def part_path(folder: str, number: int) -> str:
    """Where a part lies."""
    return f"{folder}/part-{number:05d}.parquet"


def batches(objects: Objects, path: str, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """The row groups of a file, one after another; columns that it lacks are left out."""
    file = open_parquet(objects, path)
    names = _present(file, columns)
    for number in range(file.num_row_groups):
        yield file.read_row_group(number, columns=names)


def matching(
    objects: Objects, path: str, column: str, values: NDArray[Any] | Sequence[Any], columns: Sequence[str] | None = None
) -> pa.Table:
    """The rows of a file whose value in a column is one of some; only row groups that may hold one are read.

    Args:
        objects: Where the file lies.
        path: Of the file, ascending by the column.
        column: Integers or texts.
        values: In any order.
        columns: To return, beside the column itself; all if unset; those that the file lacks are left out.
    """
    file = open_parquet(objects, path)
    names = _present(file, columns)
    if names is not None:
        names = list(dict.fromkeys([column, *names]))
    wanted = np.sort(np.asarray(values))
    leaf = [file.schema.column(i).path for i in range(len(file.schema))].index(column)
    numbers = [
        number
        for number in range(file.num_row_groups)
        if _may_hold(file.metadata.row_group(number).column(leaf).statistics, wanted)
    ]
    found = file.read_row_groups(numbers, columns=names)
    value_set = pa.array(wanted.tolist(), file.schema_arrow.field(column).type)
    return found.filter(pc.is_in(found[column], value_set=value_set))


def read_with_metadata(objects: Objects, path: str) -> tuple[pa.Table, dict[str, str]]:
    """A whole file, and what `encode` was given to keep in its footer."""
    file = pq.ParquetFile(pa.BufferReader(objects.get(path)))
    metadata = file.metadata.metadata or {}
    return file.read(), {key.decode(): text.decode() for key, text in metadata.items()}


def open_parquet(objects: Objects, path: str) -> pq.ParquetFile:
    """A file of which only the parts that are asked for are fetched.

    Raises:
        FileNotFoundError: There is none.
    """
    size = objects.size(path)
    tail_start = max(0, size - _TAIL_BYTES)
    tail = objects.get_ranges(path, [(tail_start, size)])[0]
    source = pa.BufferReader(tail) if tail_start == 0 else pa.PythonFile(_Ranges(objects, path, size, tail), mode="r")
    return pq.ParquetFile(source, pre_buffer=True)


class _Ranges(io.RawIOBase):
    """A remote file to read from; its end is there already."""

    def __init__(self, objects: Objects, path: str, size: int, tail: bytes) -> None:
        super().__init__()
        self._objects, self._path, self._size, self._tail = objects, path, size, tail
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = start + offset
        return self._position

    def read(self, size: int = -1) -> bytes:
        start = self._position
        end = self._size if size < 0 else min(self._size, start + size)
        if end <= start:
            return b""
        self._position = end
        tail_start = self._size - len(self._tail)
        if start >= tail_start:
            return self._tail[start - tail_start : end - tail_start]
        return self._objects.get_ranges(self._path, [(start, end)])[0]


def _parts(groups: Iterable[tuple[int, pa.Table]], groups_per_part: int) -> Iterator[list[pa.Table]]:
    part: list[pa.Table] = []
    current = -1
    for number, group in groups:
        if part and number // groups_per_part != current:
            yield part
            part = []
        current = number // groups_per_part
        part.append(group)
    if part:
        yield part


def _present(file: pq.ParquetFile, columns: Sequence[str] | None) -> list[str] | None:
    if columns is None:
        return None
    there = set(file.schema_arrow.names)
    return [name for name in columns if name in there]


def _may_hold(statistics: Any, wanted: NDArray[Any]) -> bool:
    if statistics is None or not statistics.has_min_max:
        return True
    low = np.searchsorted(wanted, statistics.min, side="left")
    return bool(low < np.searchsorted(wanted, statistics.max, side="right"))


def _leaves(schema: pa.Schema) -> list[str]:
    """Parquet's names of the columns, lists by their elements."""
    parquet = pq.ParquetFile(_empty_file(schema)).schema
    return [parquet.column(i).path for i in range(len(parquet))]


def _empty_file(schema: pa.Schema) -> io.BytesIO:
    sink = io.BytesIO()
    pq.write_table(schema.empty_table(), sink)
    sink.seek(0)
    return sink
