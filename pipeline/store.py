"""The chip store: a Zarr v3 group that one driver describes and many tasks fill, whole shards at a time.

Nothing here knows which rows hold chips: that is the chip table's, see `pipeline.versions`.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import zarr

from pipeline.canonical import differences
from pipeline.layout import LAYOUT_VERSION, Layout
from pipeline.objects import Objects, concurrently
from pipeline.shard_cache import StoreCache
from pipeline.shards import (
    ABSENT,
    encode_chunk,
    index_bytes,
    join_chunks,
    read_index,
    zarr_compressors,
)
from pipeline.types import ChipArrays

__all__ = ["LAYOUT_VERSION", "Layout", "Store", "StoreError", "chip_hash", "persistently"]

T = TypeVar("T")

_METADATA = "zarr.json"
_KEY = "twinlook"

WAITS_S = (1.0, 5.0, 20.0)
"""Between attempts to write an object, seconds."""

_FULL = ("os error 28", "os error 122")
"""No space left, quota exceeded."""


class StoreError(ValueError):
    """A store is missing, is another one than was asked for, or may not be written now."""


class Store:
    """The arrays of one store; opened by URL wherever it is needed."""

    def __init__(self, objects: Objects, layout: Layout) -> None:
        self.url = objects.url
        self.layout = layout
        self.objects = objects
        self.cache: StoreCache | None = None

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
        """See `pipeline.shard_reader.ChipShards`."""
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
