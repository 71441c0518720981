"""Zarr v3 shards as bytes: chunks one after another, then an index of where each lies.

Written here and not through an array, because a shard must come out whole, in one piece of work, from chips that
arrive one by one, with the same bytes every time; any reader of Zarr v3 opens the result.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Final

import google_crc32c
import numpy as np
from numcodecs.blosc import BITSHUFFLE, Blosc  # type: ignore[import-untyped]
from numpy.typing import NDArray
from zarr.codecs import BloscCodec

ABSENT: Final = np.uint64(2**64 - 1)
"""Offset and length of a chunk that is not there."""

_LEVEL: Final = 5
_CRC_BYTES: Final = 4


def zarr_compressors(codec: str, dtype: np.dtype[Any]) -> tuple[BloscCodec, ...]:
    """What `encode_chunk` does, in the words of Zarr's metadata."""
    if codec == "none":
        return ()
    return (BloscCodec(cname=codec, clevel=_LEVEL, shuffle="bitshuffle", typesize=dtype.itemsize),)  # type: ignore[arg-type]


def encode_chunk(pixels: NDArray[Any], *, codec: str) -> bytes:
    """One chip of one array as a chunk; little-endian."""
    plain = np.ascontiguousarray(pixels, dtype=pixels.dtype.newbyteorder("<"))
    # Blosc splits its work by the number of threads, and so does its output; importing zarr set it to one thread.
    return bytes(_blosc(codec, plain.dtype).encode(plain)) if codec != "none" else plain.tobytes()


def decode_chunk(data: bytes | memoryview, *, codec: str, dtype: np.dtype[Any], out: NDArray[Any]) -> None:
    """Undo `encode_chunk`, into an array of the chunk's shape."""
    if codec != "none":
        _blosc(codec, dtype).decode(data, out)
    else:
        out.reshape(-1)[:] = np.frombuffer(data, dtype.newbyteorder("<"))


def join_chunks(chunks: Mapping[int, bytes], num_chunks: int) -> bytes:
    """A shard object.

    Args:
        chunks: Place in the shard -> encoded chunk; what is not given is a hole and costs nothing but its index.
        num_chunks: Places in the shard.
    """
    lengths = {place: len(chunks[place]) for place in sorted(chunks)}
    return b"".join([*(chunks[place] for place in lengths), write_index(lengths, num_chunks)])


def write_index(lengths: Mapping[int, int], num_chunks: int) -> bytes:
    """The end of a shard whose chunks lie one after another.

    Args:
        lengths: Place in the shard -> bytes of its chunk, in the order in which they lie; holes are not given.
        num_chunks: Places in the shard.
    """
    index = np.full((num_chunks, 2), ABSENT, dtype="<u8")
    end = 0
    for place, length in lengths.items():
        index[place] = end, length
        end += length
    encoded = index.tobytes()
    return b"".join([encoded, google_crc32c.value(encoded).to_bytes(_CRC_BYTES, "little")])


def index_bytes(num_chunks: int) -> int:
    """Length of the index at a shard's end, with its checksum."""
    return num_chunks * 16 + _CRC_BYTES


def read_index(shard: bytes | memoryview, num_chunks: int) -> NDArray[np.uint64]:
    """(place, 2): offset and length in bytes of every chunk, `ABSENT` for holes.

    Args:
        shard: The object, or its last `index_bytes`.
        num_chunks: Places in the shard.

    Raises:
        ValueError: The bytes are not a shard of so many chunks, or were damaged.
    """
    encoded = bytes(shard[-index_bytes(num_chunks) : -_CRC_BYTES])
    crc = int.from_bytes(shard[-_CRC_BYTES:], "little")
    if len(encoded) + _CRC_BYTES != index_bytes(num_chunks) or google_crc32c.value(encoded) != crc:
        raise ValueError(f"shard of {len(shard)} bytes: its index is damaged")
    return np.frombuffer(encoded, dtype="<u8").reshape(num_chunks, 2)


class ShardFile:
    """A shard on a local disk: its index is read once, a chunk when it is asked for, by any thread.

    Read in parts and not mapped into memory: a disk that fails is an error then and not the end of the process, and
    the memory that is held is what was asked for.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no shard of so many chunks, or was damaged.
    """

    def __init__(self, path: Path, num_chunks: int) -> None:
        self._path = path
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        length = index_bytes(num_chunks)
        tail = os.pread(self._file, length, max(0, os.fstat(self._file).st_size - length))
        self.index = read_index(tail, num_chunks)
        self._places: list[tuple[int, int]] = self.index.tolist()

    def read(self, place: int, out: NDArray[Any], *, codec: str) -> None:
        """Decode a chunk into an array of its shape.

        Whole also where a few of its lines are wanted: every call lets another thread have the interpreter, and a read
        of each band's lines took longer than one of everything.
        """
        start, length = self._places[place]
        if start == ABSENT:
            raise ValueError(f"{self._path} has no chunk at place {place}")
        if codec != "none":
            encoded = _scratch(length)
            self._fill(encoded, start)
            decode_chunk(encoded, codec=codec, dtype=out.dtype, out=out)
        else:
            self._fill(out.data, start)

    def _fill(self, out: memoryview, start: int) -> None:
        if os.preadv(self._file, [out], start) != out.nbytes:
            raise ValueError(f"{self._path} ends before a chunk at byte {start} does")

    def __del__(self) -> None:
        # Of a file that could not be opened there is none.
        if (file := self.__dict__.pop("_file", None)) is not None:
            os.close(file)


_of_thread = threading.local()


def _scratch(length: int) -> memoryview:
    """So many bytes that this thread uses again and again: memory that is touched for the first time is slow."""
    held: bytearray = getattr(_of_thread, "encoded", bytearray())
    if len(held) < length:
        held = _of_thread.encoded = bytearray(length)
    return memoryview(held)[:length]


@cache
def _blosc(codec: str, dtype: np.dtype[Any]) -> Blosc:
    return Blosc(cname=codec, clevel=_LEVEL, shuffle=BITSHUFFLE, typesize=dtype.itemsize)
