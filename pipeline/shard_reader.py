"""Chips out of shards, whole or cropped, whether a shard is a file on this machine or an object far away.

Beside zarr-python, which reads the same stores, because a chip of a shard is to cost what its bytes cost: an index is
read once and not for every chip, pixels go from the decoder's memory straight to where they are used.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.layout import Layout
from pipeline.objects import concurrently
from pipeline.shards import ABSENT, ShardFile, decode_chunk, index_bytes, read_index
from pipeline.store import Store, StoreError
from pipeline.types import ChipArrays

_FEW_CHIPS = 1 / 8
"""Up to this share of a shard its chunks are read one by one, above it the whole object at once."""

Cut = tuple[Mapping[str, NDArray[Any]], int, int, int]
"""Where a crop goes and what it is: arrays (place, band, y, x), the place, y and x of its corner in 10 m pixels."""


class ChipShards(Protocol):
    """Chips in shards: a store, or several as one."""

    @property
    def layout(self) -> Layout:
        """Of the chips; `shard_chips` is the room for rows that each shard has."""

    def holder(self, shard: int) -> tuple[Store, int]:
        """The store that has a shard, and the shard's number there."""


class ShardReader:
    """Chips of one shard: its indices are read once, its chunks decoded when they are asked for, by any thread.

    Of a local store chunks are read when they are decoded; of an object store all that will be asked for are fetched at
    the start, as whole objects or, where few are wanted, as ranges of them.

    Args:
        chips: Where the shard is.
        shard: Its number there.
        arrays: Names of those that are wanted.
        rows: Of the chips that will be asked for.

    Raises:
        StoreError: There is no such shard, or no such chip in it.
    """

    def __init__(self, chips: ChipShards, shard: int, arrays: Iterable[str], rows: Sequence[int]) -> None:
        self._store, own = chips.holder(shard)
        self._specs = {name: self._store.layout.arrays()[name] for name in arrays}
        self._first_row = shard * chips.layout.shard_chips
        self._files: dict[str, ShardFile] = {}
        self._chunks: dict[str, dict[int, memoryview]] = {}
        places = [row - self._first_row for row in rows]
        keys = {name: self._store.shard_key(name, own) for name in self._specs}
        if self._store.is_local:
            self._files = {name: self._open(key, places) for name, key in keys.items()}
        else:
            fetched = concurrently(lambda key: self._fetch(key, places), keys.values())
            self._chunks = {
                name: dict(zip(places, chunks, strict=True)) for name, chunks in zip(keys, fetched, strict=True)
            }

    def read(self, row: int, out: ChipArrays, *, y_px: int = 0, size_px: int | None = None) -> None:
        """Decode one chip into arrays of its shapes, see `scratch`.

        Args:
            row: Of the chip.
            out: The arrays.
            y_px: First line that is needed, and how many, in 10 m pixels; others may be left as they were.
            size_px: Unset: all lines.
        """
        codec, place = self._store.layout.codec, row - self._first_row
        end_px = self._store.layout.side_px if size_px is None else y_px + size_px
        for name, spec in self._specs.items():
            if self._files:
                lines = (y_px // spec.step_px, end_px // spec.step_px)
                self._files[name].read(place, out[name], codec=codec, lines=lines)
            else:
                decode_chunk(self._chunks[name][place], codec=codec, dtype=spec.dtype, out=out[name])

    def cut(self, row: int, cuts: Sequence[Cut], size_px: int, scratch: ChipArrays) -> None:
        """Decode one chip once and put its crops of a side, in 10 m pixels, where they go."""
        top_px = min(y_px for _, _, y_px, _ in cuts)
        end_px = max(y_px for _, _, y_px, _ in cuts) + size_px
        self.read(row, scratch, y_px=top_px, size_px=end_px - top_px)
        for name, spec in self._specs.items():
            pixels = scratch[name]
            for into, place, y_px, x_px in cuts:
                into[name][place] = spec.window(pixels, y_px, x_px, size_px)

    def scratch(self) -> ChipArrays:
        """Arrays to decode into, to be used again and again."""
        return {name: np.empty(spec.shape, spec.dtype) for name, spec in self._specs.items()}

    def _open(self, key: str, places: list[int]) -> ShardFile:
        path = self._store.objects.file(key)
        assert path is not None, key
        try:
            file = ShardFile(path, self._store.layout.shard_chips)
        except FileNotFoundError as error:
            raise self._missing(key) from error
        self._ranges(key, file.index, places)
        return file

    def _fetch(self, key: str, places: list[int]) -> list[memoryview]:
        """The encoded chunks at some places of one shard object."""
        objects, num_chunks = self._store.objects, self._store.layout.shard_chips
        try:
            if len(places) > num_chunks * _FEW_CHIPS:
                shard = objects.view(key)
                return [shard[start:end] for start, end in self._ranges(key, read_index(shard, num_chunks), places)]
            size = objects.size(key)
            tail = objects.get_ranges(key, [(size - index_bytes(num_chunks), size)])[0]
            ranges = self._ranges(key, read_index(tail, num_chunks), places)
            return [memoryview(chunk) for chunk in objects.get_ranges(key, ranges)]
        except FileNotFoundError as error:
            raise self._missing(key) from error

    def _ranges(self, key: str, index: NDArray[np.uint64], places: list[int]) -> list[tuple[int, int]]:
        holes = [place for place in places if index[place, 0] == ABSENT]
        if holes:
            raise StoreError(f"{self._store.url}: {key} has no chip at places {holes}")
        return [(int(start), int(start + length)) for start, length in index[places]]

    def _missing(self, key: str) -> StoreError:
        return StoreError(f"{self._store.url}: {key} is missing, but the chip table has chips in it")
