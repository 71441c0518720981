"""Tables that are collected now and written later, and would fill the memory meanwhile."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator

import pyarrow as pa


class Spool:
    """Keeps tables of one schema in a file that goes with the process, in the order they came."""

    def __init__(self, schema: pa.Schema) -> None:
        self._schema = schema
        self._file = tempfile.TemporaryFile(prefix="spool-")  # noqa: SIM115  # lives as long as this
        self._stream = pa.ipc.new_stream(self._file, schema)
        self.num_rows = 0

    def add(self, table: pa.Table) -> None:
        """Keep a table; not any more once `tables` was asked for."""
        self._stream.write_table(table.cast(self._schema))
        self.num_rows += table.num_rows

    def tables(self) -> Iterator[pa.Table]:
        """What was kept, in pieces."""
        self._stream.close()
        self._file.seek(0)
        for batch in pa.ipc.open_stream(self._file):
            yield pa.Table.from_batches([batch])

    def close(self) -> None:
        """Give the disk's space back."""
        self._file.close()
