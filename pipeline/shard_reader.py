"""Chips out of shards, whole or cropped, whether a shard is a file on this machine or an object far away.

Beside zarr-python, which reads the same stores, because a chip of a shard is to cost what its bytes cost: an index is
read once and not for every chip, pixels go from the decoder's memory straight to where they are used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.layout import Layout
from pipeline.objects import concurrently
from pipeline.shard_cache import CachedShard, DamagedError, Encoded
from pipeline.shards import ABSENT, ShardFile, decode_chunk, index_bytes, read_index
from pipeline.store import Store, StoreError
from pipeline.types import ChipArrays

_FEW_CHIPS = 1 / 8
"""Up to this share of a shard its chunks are read one by one, above it the whole object at once."""

Cut = tuple[Mapping[str, NDArray[Any]], int, int, int]
"""Where a crop goes and what it is: arrays (place, band, y, x), the place, y and x of its corner in 10 m pixels."""

_Chunks = ShardFile | CachedShard | Mapping[int, Encoded]
"""Of one array of a shard: by place, in one way or another."""


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
    the start, as whole objects or, where few are wanted, as ranges of them. Where the store has a cache, whole shards
    are fetched once and then read from there.

    Args:
        chips: Where the shard is.
        shard: Its number there.
        arrays: Names of those that are wanted.
        rows: Of the chips that will be asked for.

    Raises:
        StoreError: There is no such shard, or no such chip in it.
    """

    def __init__(self, chips: ChipShards, shard: int, arrays: Iterable[str], rows: Sequence[int]) -> None:
        self._store, self._shard = chips.holder(shard)
        self._specs = {name: self._store.layout.arrays()[name] for name in arrays}
        self._first_row = shard * chips.layout.shard_chips
        self._places = [row - self._first_row for row in rows]
        found: Callable[[str], _Chunks] = self._fetched
        if self._store.cache:
            found = self._cached
        elif self._store.is_local:
            found = self._opened
        self._chunks = dict(zip(self._specs, concurrently(found, self._specs), strict=True))

    def read(self, row: int, out: ChipArrays) -> None:
        """Decode one chip into arrays of its shapes, see `scratch`."""
        for name in self._specs:
            self._read(name, row - self._first_row, out[name])

    def cut(self, row: int, cuts: Sequence[Cut], size_px: int, scratch: ChipArrays) -> None:
        """Decode one chip once and put its crops of a side, in 10 m pixels, where they go."""
        self.read(row, scratch)
        for name, spec in self._specs.items():
            pixels = scratch[name]
            for into, place, y_px, x_px in cuts:
                into[name][place] = spec.window(pixels, y_px, x_px, size_px)

    def scratch(self) -> ChipArrays:
        """Arrays to decode into, to be used again and again."""
        return {name: np.empty(spec.shape, spec.dtype) for name, spec in self._specs.items()}

    def _read(self, name: str, place: int, out: NDArray[Any]) -> None:
        chunks = self._chunks[name]
        if isinstance(chunks, CachedShard):
            try:
                chunks.read(place, out)
                return
            except DamagedError:
                assert self._store.cache is not None
                self._store.cache.cache.forget(chunks)
                chunks = self._chunks[name] = self._fetched(name, whole=True)
        if isinstance(chunks, ShardFile):
            chunks.read(place, out, codec=self._store.layout.codec)
        else:
            self._decode(name, chunks[place], out)

    def _decode(self, name: str, chunk: Encoded, out: NDArray[Any]) -> None:
        decode_chunk(chunk, codec=self._store.layout.codec, dtype=self._specs[name].dtype, out=out)

    def _opened(self, name: str) -> ShardFile:
        """One array's shard of a local store."""
        path = self._store.objects.file(self._key(name))
        assert path is not None, name
        try:
            file = ShardFile(path, self._store.layout.shard_chips)
        except FileNotFoundError as error:
            raise self._missing(name) from error
        self._ranges(name, file.index, self._places)
        return file

    def _cached(self, name: str) -> CachedShard | Mapping[int, Encoded]:
        """One array's shard from the cache; all of its chunks come into it, also those that are not asked for."""
        assert self._store.cache is not None
        plain = np.empty(self._specs[name].shape, self._specs[name].dtype)

        def decode(chunk: Encoded) -> bytes:
            self._decode(name, chunk, plain)
            return plain.astype(plain.dtype.newbyteorder("<"), copy=False).tobytes()

        chunks = self._store.cache.cache.open(
            self._store.cache.name(name, self._shard),
            num_chunks=self._store.layout.shard_chips,
            chunk_bytes=plain.nbytes,
            fetch=lambda: self._fetched(name, whole=True),
            decode=decode,
        )
        there = chunks.places() if isinstance(chunks, CachedShard) else chunks.keys()
        self._refuse_holes(name, [place for place in self._places if place not in there])
        return chunks

    def _fetched(self, name: str, *, whole: bool = False) -> Mapping[int, Encoded]:
        """The encoded chunks of one array, by place: of the rows asked for, or all there are."""
        objects, num_chunks, key = self._store.objects, self._store.layout.shard_chips, self._key(name)
        try:
            if whole or len(self._places) > num_chunks * _FEW_CHIPS:
                shard = objects.view(key)
                index = read_index(shard, num_chunks)
                places = np.flatnonzero(index[:, 0] != ABSENT).tolist() if whole else self._places
                ranges = self._ranges(name, index, places)
                return {place: shard[start:end] for place, (start, end) in zip(places, ranges, strict=True)}
            size = objects.size(key)
            tail = objects.get_ranges(key, [(size - index_bytes(num_chunks), size)])[0]
            ranges = self._ranges(name, read_index(tail, num_chunks), self._places)
            return dict(zip(self._places, objects.get_ranges(key, ranges), strict=True))
        except FileNotFoundError as error:
            raise self._missing(name) from error

    def _ranges(self, name: str, index: NDArray[np.uint64], places: list[int]) -> list[tuple[int, int]]:
        self._refuse_holes(name, [place for place in places if index[place, 0] == ABSENT])
        return [(int(start), int(start + length)) for start, length in index[places]]

    def _refuse_holes(self, name: str, holes: list[int]) -> None:
        if holes:
            raise StoreError(f"{self._store.url}: {self._key(name)} has no chip at places {holes}")

    def _missing(self, name: str) -> StoreError:
        return StoreError(f"{self._store.url}: {self._key(name)} is missing, but the chip table has chips in it")

    def _key(self, name: str) -> str:
        return self._store.shard_key(name, self._shard)
