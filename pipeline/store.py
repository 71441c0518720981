"""The chip store: a Zarr v3 group that one driver describes and many tasks fill, whole shards at a time.

Nothing here knows which rows hold chips: that is the chip table's, see `pipeline.versions`.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol, TypeVar

import numpy as np
import zarr
from numpy.typing import NDArray

from pipeline.canonical import differences
from pipeline.layout import LAYOUT_VERSION, Layout
from pipeline.objects import Objects, concurrently
from pipeline.shards import (
    ABSENT,
    ShardFile,
    decode_chunk,
    encode_chunk,
    index_bytes,
    join_chunks,
    read_index,
    zarr_compressors,
)
from pipeline.types import ChipArrays

__all__ = [
    "LAYOUT_VERSION",
    "ChipShards",
    "Cut",
    "Layout",
    "ShardReader",
    "Store",
    "StoreError",
    "chip_hash",
    "persistently",
]

T = TypeVar("T")

_METADATA = "zarr.json"
_KEY = "twinlook"

WAITS_S = (1.0, 5.0, 20.0)
"""Between attempts to write an object, seconds."""

_FULL = ("os error 28", "os error 122")
"""No space left, quota exceeded."""

_FEW_CHIPS = 1 / 8
"""Up to this share of a shard its chunks are read one by one, above it the whole object at once."""


class StoreError(ValueError):
    """A store is missing, is another one than was asked for, or may not be written now."""


class Store:
    """The arrays of one store; opened by URL wherever it is needed."""

    def __init__(self, objects: Objects, layout: Layout) -> None:
        self.url = objects.url
        self.layout = layout
        self.objects = objects

    @staticmethod
    def create(url: str, layout: Layout) -> Store:
        """A store of this layout without any rows; one that is there already is opened.

        Raises:
            StoreError: There is a store of another layout.
        """
        objects = Objects.at(url)
        if objects.exists(_METADATA):
            return _same_layout(Store.open(url), layout)
        metadata = _metadata(layout)
        # The group last: where there is one, all its arrays are there, also if this process was killed on the way.
        for path in sorted(metadata.list(), key=lambda path: path == _METADATA):
            objects.put(path, metadata.get(path))
        return Store(objects, layout)

    @staticmethod
    def open(url: str) -> Store:
        """The store at a URL.

        Raises:
            StoreError: There is none, or something else, or one of another layout version.
        """
        objects = Objects.at(url)
        try:
            attributes = objects.get_json(_METADATA).get("attributes", {}).get(_KEY)
        except FileNotFoundError as error:
            raise StoreError(f"no store at {objects.url}") from error
        if attributes is None:
            raise StoreError(f"{objects.url} is a Zarr hierarchy, but not a chip store")
        if attributes["layout_version"] != LAYOUT_VERSION:
            raise StoreError(
                f"{objects.url} has layout version {attributes['layout_version']}; this twinlook reads {LAYOUT_VERSION}"
            )
        return Store(objects, Layout.from_attributes(attributes))

    @cached_property
    def group(self) -> zarr.Group:
        """The group as zarr-python reads it."""
        return zarr.open_group(self.objects.zarr_store(read_only=True), mode="r", zarr_format=3)

    @property
    def num_rows(self) -> int:
        """Length of the arrays' first axis, holes included."""
        return int(self._array(next(iter(self.layout.arrays()))).shape[0])

    def resize(self, end_row: int) -> None:
        """Make room for rows up to `end_row`; never takes any away. For the driver alone, before tasks write."""
        group = zarr.open_group(self.objects.zarr_store(read_only=False), mode="r+", zarr_format=3)
        for name, spec in self.layout.arrays().items():
            array = group[name]
            assert isinstance(array, zarr.Array)
            if array.shape[0] < end_row:
                array.resize((end_row, *spec.shape))
        self.__dict__.pop("group", None)

    @property
    def is_local(self) -> bool:
        """Whether its shards are files, to be read in parts."""
        return self.objects.file("") is not None

    def holder(self, shard: int) -> tuple[Store, int]:
        """See `ChipShards`."""
        return self, shard

    def rows_of(self, shard: int) -> range:
        """The rows a shard has room for."""
        return range(shard * self.layout.shard_chips, (shard + 1) * self.layout.shard_chips)

    def write_shard(self, shard: int, chips: Iterable[tuple[int, ChipArrays]]) -> dict[int, str]:
        """Write one shard of every array whole, in place of what a killed task may have left there.

        Args:
            shard: Number of the shard; no other task may write it.
            chips: (row, arrays) in any order; they are encoded as they come. Rows that do not come are holes.

        Returns:
            Row -> `chip_hash` of what was written.

        Raises:
            StoreError: A chip does not fit the layout or its row is not in the shard; nothing was written.
        """
        rows, num_rows = self.rows_of(shard), self.num_rows
        chunks: dict[str, dict[int, bytes]] = {name: {} for name in self.layout.arrays()}
        hashes: dict[int, str] = {}
        for row, chip in chips:
            if row not in rows or row >= num_rows:
                last = min(rows.stop, num_rows) - 1
                raise StoreError(f"row {row} is not in shard {shard}, which holds rows {rows.start} to {last}")
            if row in hashes:
                raise StoreError(f"row {row} was given twice")
            try:
                self.layout.check(row, chip)
            except ValueError as error:
                raise StoreError(str(error)) from error
            hashes[row] = chip_hash(chip)
            for name, pixels in chip.items():
                chunks[name][row - rows.start] = encode_chunk(pixels, codec=self.layout.codec)
        concurrently(lambda name: self._put_shard(name, shard, chunks[name]), chunks)
        return dict(sorted(hashes.items()))

    def read_chip(self, row: int) -> ChipArrays:
        """All arrays of one row, as zarr-python reads them; a hole reads as no data."""
        return {name: np.asarray(self._array(name)[row]) for name in self.layout.arrays()}

    def read_window(self, row: int, y_px: int, x_px: int, size_px: int) -> ChipArrays:
        """A square window of one row: offsets and side in 10 m pixels, multiples of 6."""
        self.layout.check_window(y_px, x_px, size_px)
        chip = self.read_chip(row)
        return {name: spec.window(chip[name], y_px, x_px, size_px) for name, spec in self.layout.arrays().items()}

    def shard_key(self, name: str, shard: int) -> str:
        """Path of a shard's object of one array."""
        return "/".join([name, "c", str(shard), *["0"] * len(self.layout.arrays()[name].shape)])

    def rows_there(self, name: str, shard: int) -> set[int]:
        """Rows of which a shard's object of one array has a chunk; none where there is no object.

        Raises:
            ValueError: The object's index is damaged.
        """
        key, num_chunks = self.shard_key(name, shard), self.layout.shard_chips
        try:
            size = self.objects.size(key)
        except FileNotFoundError:
            return set()
        tail = self.objects.get_ranges(key, [(max(0, size - index_bytes(num_chunks)), size)])[0]
        places = np.flatnonzero(read_index(tail, num_chunks)[:, 0] != ABSENT)
        return {self.rows_of(shard).start + place for place in places.tolist()}

    def shards_there(self, name: str) -> set[int]:
        """Numbers of the shards of which there is an object of one array."""
        return {int(path.split("/")[2]) for path in self.objects.list(f"{name}/c")}

    def _put_shard(self, name: str, shard: int, chunks: dict[int, bytes]) -> None:
        key = self.shard_key(name, shard)
        if chunks:
            data = join_chunks(chunks, self.layout.shard_chips)
            persistently(lambda: self.objects.put(key, data))
        else:
            persistently(lambda: self.objects.delete(key))

    def _array(self, name: str) -> zarr.Array[Any]:
        array = self.group[name]
        assert isinstance(array, zarr.Array), name
        return array

    def __reduce__(self) -> tuple[Callable[[str], Store], tuple[str]]:
        return Store.open, (self.url,)


class ChipShards(Protocol):
    """Chips in shards: a store, or several as one."""

    @property
    def layout(self) -> Layout:
        """Of the chips; `shard_chips` is the room for rows that each shard has."""

    def holder(self, shard: int) -> tuple[Store, int]:
        """The store that has a shard, and the shard's number there."""


Cut = tuple[Mapping[str, NDArray[Any]], int, int, int]
"""Where a crop goes and what it is: arrays (place, band, y, x), the place, y and x of its corner in 10 m pixels."""


class ShardReader:
    """Chips of one shard: its indices are read once, its chunks decoded when they are asked for, by any thread.

    Of a local store chunks are read when they are decoded; of an object store all that will be asked for are fetched at
    the start, as whole objects or, where few are wanted, as ranges of them.

    Args:
        chips: Where the shard is.
        shard: Its number.
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


def persistently(write: Callable[[], T], *, waits_s: Sequence[float] = WAITS_S) -> T:
    """Write, and write again where the store could not be written, after a while; but not to a disk that is full.

    Object stores are asked again by their client, for minutes; this is for what it gives up on, and for disks.

    Raises:
        OSError: Of the last attempt.
    """
    for wait_s in waits_s:
        try:
            return write()
        except (FileExistsError, FileNotFoundError, PermissionError):
            raise
        except OSError as error:
            if any(text in str(error) for text in _FULL):
                raise
            time.sleep(wait_s)
    return write()


def chip_hash(chip: ChipArrays) -> str:
    """SHA-256 of a chip's pixels, with the names, dtypes and shapes of its arrays, in the order of names."""
    digest = hashlib.sha256()
    for name in sorted(chip):
        pixels = np.ascontiguousarray(chip[name])
        digest.update(f"{name} {pixels.dtype.newbyteorder('<').str} {pixels.shape}\n".encode())
        digest.update(pixels.astype(pixels.dtype.newbyteorder("<"), copy=False).data)
    return digest.hexdigest()


def _same_layout(store: Store, layout: Layout) -> Store:
    changed = list(differences(store.layout.attributes(), layout.attributes()))
    if changed:
        raise StoreError(f"{store.url} has another layout: {'; '.join(changed)}")
    return store


def _metadata(layout: Layout) -> Objects:
    """Zarr's description of a store without rows."""
    objects = Objects.in_memory()
    zarr_store = objects.zarr_store(read_only=False)
    zarr.create_group(zarr_store, attributes={_KEY: layout.attributes()})
    # Zarr readers that look through the store meet a group here, not a folder they cannot name.
    zarr.create_group(zarr_store, path="versions")
    for spec in layout.arrays().values():
        zarr.create_array(
            zarr_store,
            name=spec.name,
            shape=(0, *spec.shape),
            dtype=spec.dtype,
            chunks=(1, *spec.shape),
            shards=(layout.shard_chips, *spec.shape),
            compressors=zarr_compressors(layout.codec, spec.dtype) or None,
            fill_value=spec.nodata,
            dimension_names=spec.dimension_names,
            attributes=spec.attributes(),
        )
    return objects
