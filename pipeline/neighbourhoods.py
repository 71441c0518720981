"""Which block of neighbouring cells each chip is of, in a form that every worker of a run can hold.

Rows of a block lie side by side in a shard, so the map is kept as runs of rows: some 55 MB for a hundred million chips.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.sources import Source, Sources
from pipeline.versions import Version


@dataclass(frozen=True, slots=True, kw_only=True)
class Neighbourhoods:
    """Runs of rows of one block each; rows are counted as `pipeline.sources` does."""

    starts: NDArray[np.int64]
    """(run,) ascending: the first row of each; a run goes on to the next one's first."""

    blocks: NDArray[np.int64]
    """(run,) numbers of the blocks, equal for the same block of one store and for no two others. What was imported has
    no blocks: each of its chips has a number of its own."""

    def of(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """(chip,) numbers of the blocks of candidates' rows."""
        found: NDArray[np.int64] = self.blocks[np.searchsorted(self.starts, rows, side="right") - 1]
        return found

    def to_bytes(self) -> bytes:
        """For `from_bytes`."""
        content = io.BytesIO()
        np.savez(content, starts=self.starts, blocks=self.blocks)
        return content.getvalue()

    @staticmethod
    def from_bytes(content: bytes) -> Neighbourhoods:
        """What `to_bytes` made."""
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            return Neighbourhoods(starts=arrays["starts"], blocks=arrays["blocks"])


def neighbourhoods(sources: Sequence[Source]) -> Neighbourhoods:
    """Of all candidates of some versions and those before them, by the blocks that their manifests name."""
    together = Sources(sources)
    numbers: dict[tuple[int, str], int] = {}
    starts: list[NDArray[np.int64]] = []
    blocks: list[NDArray[np.int64]] = []
    for place, source in enumerate(sources):
        for version in Version(source.url, source.version).versions():
            for batch in version.manifest_batches(columns=["row", "block"]):
                rows = together.rows_of(place, batch["row"].to_numpy())
                encoded = pc.dictionary_encode(batch["block"].combine_chunks())
                names = [(place, name) for name in encoded.dictionary.to_pylist()]
                known = np.array([numbers.setdefault(name, len(numbers)) for name in names], np.int64)
                named = pc.is_valid(encoded).to_numpy(zero_copy_only=False)
                of_rows = -1 - rows
                of_rows[named] = known[encoded.indices.drop_null().to_numpy()]
                first = np.flatnonzero(np.concatenate([[True], of_rows[1:] != of_rows[:-1]]))
                starts.append(rows[first])
                blocks.append(of_rows[first])
    return Neighbourhoods(starts=np.concatenate(starts), blocks=np.concatenate(blocks))
