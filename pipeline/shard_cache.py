"""Shards on a node's own disk: fetched once from the object store, kept uncompressed, shared by its processes.

A file is a Zarr shard of uncompressed chunks, each with the checksum of Zarr's `crc32c` codec behind it. So every
chunk is verified every time it is read, whatever befell the disk since, and no process needs to know what another has
verified. Its name says which content it has: the hash of the chip table that seals the shard, array and number; a
store that is built anew at the same URL has other names.

Whoever fetches a shard holds a lock on its unfinished file, which the kernel lets go of when the process dies; others
wait for it. A finished file appears under its name at once, is never changed, and lives on for those who have it open
when it is evicted.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import time
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from pipeline.cache_counts import added, count, parsed
from pipeline.shards import ABSENT, index_bytes, read_index, write_index

log = logging.getLogger(__name__)

_CRC_BYTES: Final = 4
_UNFINISHED: Final = ".unfinished"
_LOCK: Final = "lock"
_FULL: Final = (errno.ENOSPC, errno.EDQUOT)

_STALE_S: Final = 86_400.0
_NONE: Final = "\0"
"""Begins no name."""

Encoded = bytes | memoryview

_unwritable: set[str] = set()
"""Directories in which this process keeps nothing more, and has said so."""


class DamagedError(Exception):
    """A file of the cache does not hold what was written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardCache:
    """A directory of shards, of bounded size; plain values, so that it travels to the processes that read.

    When it is full, the least recently used files of other contents go, and those of the own ones that were not used
    for a day. Shards of the own contents do not push each other out: every epoch reads each once in another order, and
    a cache of half of them would find a seventh if the least recently used went, and finds half if those there stay.
    """

    directory: str
    """Local to each node."""

    max_bytes: int
    """Of all files together."""

    contents: tuple[str, ...] = ()
    """What names of the own files begin with."""

    def open(
        self,
        name: str,
        *,
        num_chunks: int,
        chunk_bytes: int,
        fetch: Callable[[], Mapping[int, Encoded]],
        decode: Callable[[Encoded], bytes],
    ) -> CachedShard | Mapping[int, Encoded]:
        """A shard by its name; fetched if it is not there.

        Args:
            name: Says which content it is, as a file name.
            num_chunks: Places in the shard.
            chunk_bytes: Of a decoded chunk.
            fetch: Gives the chunks by place, encoded; called by one process of the node at a time.
            decode: Of a chunk.

        Returns:
            The open file; or what was fetched, where it cannot be kept.
        """
        try:
            Path(self.directory).mkdir(parents=True, exist_ok=True)
            found = self._find(name, num_chunks)
        except OSError as error:
            self._turn_off(error)
            found = None
        count(self.directory, "hits" if isinstance(found, CachedShard) else "misses")
        self._share_counts()
        if isinstance(found, CachedShard):
            return found
        if found is None:
            return fetch()
        unfinished = self._path(name + _UNFINISHED)
        try:
            chunks = fetch()
            try:
                shard = self._keep(
                    found, unfinished, chunks, num_chunks=num_chunks, chunk_bytes=chunk_bytes, decode=decode
                )
            except OSError as error:
                self._turn_off(error)
                shard = None
            return chunks if shard is None else shard
        finally:
            # Still there only if it was not finished.
            _remove(unfinished, found)
            os.close(found)

    def forget(self, shard: CachedShard) -> None:
        """Remove a damaged file, so that it is fetched again."""
        count(self.directory, "damaged")
        path = self._path(shard.name)
        log.warning("%s is damaged: it will be fetched again", path)
        _remove(path, shard.descriptor)

    def _find(self, name: str, num_chunks: int) -> CachedShard | int | None:
        """The shard; or a locked descriptor of its unfinished file, to be filled; None where nothing is kept."""
        path = self._path(name)
        while True:
            try:
                shard = CachedShard(path)
                if shard.load_index(num_chunks):
                    return shard
                self.forget(shard)
            except FileNotFoundError:
                pass
            if self.directory in _unwritable:
                return None
            if (descriptor := self._claim(path)) is not None:
                return descriptor

    def _claim(self, path: Path) -> int | None:
        """The locked descriptor of an unfinished file, for the one process that is to fill it.

        None when another has filled it meanwhile, or has cleared away what a killed one had left.
        """
        unfinished = path.with_name(path.name + _UNFINISHED)
        descriptor = os.open(unfinished, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if not path.exists() and _is_at(descriptor, unfinished):
            os.ftruncate(descriptor, 0)
            return descriptor
        _remove(unfinished, descriptor)
        os.close(descriptor)
        return None

    def _keep(
        self,
        descriptor: int,
        unfinished: Path,
        chunks: Mapping[int, Encoded],
        *,
        num_chunks: int,
        chunk_bytes: int,
        decode: Callable[[Encoded], bytes],
    ) -> CachedShard | None:
        """Fill the unfinished file and give it its name; None where there is no room."""
        stored = chunk_bytes + _CRC_BYTES
        size = len(chunks) * stored + index_bytes(num_chunks)
        if not self._make_room(size, descriptor):
            return None
        with os.fdopen(os.dup(descriptor), "wb") as file:
            for place in sorted(chunks):
                chunk = decode(chunks[place])
                assert len(chunk) == chunk_bytes, (len(chunk), chunk_bytes)
                file.write(chunk)
                file.write(_crc(chunk))
            file.write(write_index(dict.fromkeys(sorted(chunks), stored), num_chunks))
        # Opened first: once it has its name, it may be evicted.
        shard = CachedShard(unfinished)
        path = unfinished.with_name(unfinished.name.removesuffix(_UNFINISHED))
        unfinished.rename(path)
        shard.name = path.name
        count(self.directory, "written_bytes", size)
        return shard if shard.load_index(num_chunks) else None

    def _make_room(self, size: int, descriptor: int) -> bool:
        """Reserve bytes for an unfinished file, evicting others; False where not enough of them may go."""
        if size > self.max_bytes:
            raise OSError(errno.EFBIG, f"cache_bytes={self.max_bytes} are fewer than the {size} of a shard")
        with self._locked():
            found = list(self._files())
            total = sum(each.size for each in found)
            stale = time.time() - _STALE_S
            going: list[_File] = []
            for each in sorted(found, key=lambda file: file.used_s):
                if total + size <= self.max_bytes:
                    break
                if each.used_s < stale or not each.path.name.startswith(self.contents or (_NONE,)):
                    if each.path.name.endswith(_UNFINISHED) and not _clear(each.path):
                        continue
                    going.append(each)
                    total -= each.size
            if total + size > self.max_bytes:
                return False
            for each in going:
                each.path.unlink(missing_ok=True)
            count(self.directory, "evicted", len(going))
            os.posix_fallocate(descriptor, 0, size)
            return True

    def _files(self) -> Iterator[_File]:
        for entry in os.scandir(self.directory):
            if entry.name != _LOCK:
                with contextlib.suppress(FileNotFoundError):
                    facts = entry.stat()
                    yield _File(path=Path(entry.path), size=facts.st_size, used_s=facts.st_mtime)

    def shared_counts(self) -> dict[str, int]:
        """As `counts`, of all processes of this node ever; what they have read since they last opened is missing."""
        try:
            return parsed(self._path(_LOCK).read_bytes())
        except OSError:
            return {}

    def _share_counts(self) -> None:
        """Add what this process has not added yet to the counts that lie in the lock file."""
        with contextlib.suppress(OSError), self._locked() as descriptor:
            text = added(os.pread(descriptor, 4096, 0), self.directory)
            os.pwrite(descriptor, text, 0)
            os.ftruncate(descriptor, len(text))

    @contextmanager
    def _locked(self) -> Iterator[int]:
        """Alone among the node's processes, with the open lock file."""
        descriptor = os.open(self._path(_LOCK), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            os.close(descriptor)

    def _turn_off(self, error: OSError) -> None:
        if self.directory not in _unwritable:
            _unwritable.add(self.directory)
            reason = "the disk is full" if error.errno in _FULL else error.strerror or str(error)
            log.warning("cache_dir=%s: %s; this process keeps nothing more there", self.directory, reason)

    def _path(self, name: str) -> Path:
        return Path(self.directory) / name


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreCache:
    """Where the shards of one store are kept, and what they are called there."""

    cache: ShardCache
    first_shards: tuple[int, ...]
    """Of each version."""

    seals: tuple[str, ...]
    """Hash of each version's chip table, which says what its shards hold."""

    def name(self, array: str, shard: int) -> str:
        """Of a shard's object of one array."""
        return f"{self.seals[bisect_right(self.first_shards, shard) - 1]}-{array}-{shard:06d}"


@dataclass(frozen=True, slots=True, kw_only=True)
class _File:
    path: Path
    size: int
    used_s: float


class CachedShard:
    """An open file of the cache.

    Raises:
        FileNotFoundError: There is none.
    """

    def __init__(self, path: Path) -> None:
        self.directory, self.name = str(path.parent), path.name
        self.descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.descriptor)
        self.index: NDArray[np.uint64] = np.empty((0, 2), np.uint64)

    def load_index(self, num_chunks: int) -> bool:
        """Read where each chunk is, and note the use; whether it is what was written."""
        size, length = os.fstat(self.descriptor).st_size, index_bytes(num_chunks)
        try:
            self.index = read_index(os.pread(self.descriptor, length, max(0, size - length)), num_chunks)
        except (OSError, ValueError):
            return False
        with contextlib.suppress(OSError):
            os.utime(self.descriptor)
        return True

    def places(self) -> set[int]:
        """Places in the shard that have a chunk."""
        return set(np.flatnonzero(self.index[:, 0] != ABSENT).tolist())

    def read(self, place: int, out: NDArray[Any]) -> None:
        """Read one chunk into an array of its shape.

        Raises:
            DamagedError: It is not what was written.
        """
        start, length = (int(number) for number in self.index[place])
        try:
            data = os.pread(self.descriptor, length, start)
        except OSError as error:
            raise DamagedError(str(error)) from error
        chunk = data[:-_CRC_BYTES]
        if len(chunk) != out.nbytes or _crc(chunk) != data[-_CRC_BYTES:]:
            raise DamagedError(f"{self.name}: chunk {place} is not what was written")
        out.reshape(-1)[:] = np.frombuffer(chunk, out.dtype.newbyteorder("<"))
        count(self.directory, "read_bytes", length)


def _crc(chunk: bytes) -> bytes:
    """As Zarr's `crc32c` codec has it."""
    return int(google_crc32c.value(chunk)).to_bytes(_CRC_BYTES, "little")


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file has this name."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _remove(path: Path, descriptor: int) -> None:
    """Remove a file if it is the one that is open."""
    with contextlib.suppress(OSError):
        if _is_at(descriptor, path):
            path.unlink()


def _clear(unfinished: Path) -> bool:
    """Remove an unfinished file, unless a process is filling it."""
    try:
        descriptor = os.open(unfinished, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _remove(unfinished, descriptor)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True
