"""What the tests of the cache of shards do in this process and in others, which start fast: little is imported."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Mapping

import numpy as np
from numpy.testing import assert_array_equal

from pipeline.cache_counts import counts
from pipeline.shard_cache import CachedShard, ShardCache
from pipeline.shard_reader import ShardReader
from pipeline.sources import Source, Sources
from pipeline.types import ChipArrays
from tests.sample_chips import make_chip

NUM_CHIPS = 11
HOLE = 2
ARRAYS = ("b10", "b20", "b60", "radar")
ROOMY = 100_000_000


def read_all(source: Source, cache: ShardCache | None) -> dict[int, ChipArrays]:
    sources = Sources([source], cache=cache)
    found = {}
    for shard in range(3):
        rows = [row for row in range(4 * shard, min(4 * shard + 4, NUM_CHIPS)) if row != HOLE]
        reader = ShardReader(sources, shard, ARRAYS, rows)
        for row in rows:
            found[row] = reader.scratch()
            reader.read(row, found[row])
    return found


def assert_right(found: Mapping[int, ChipArrays], first: int = 0) -> None:
    assert found.keys() == {row for row in range(NUM_CHIPS) if row != HOLE}
    for row, chip in found.items():
        for name in ARRAYS:
            assert_array_equal(chip[name], make_chip(first + row)[name])


def chunks_of(name: str) -> dict[int, bytes]:
    """What the shard of a name holds: chunks of 100 bytes at some of four places."""
    rng = np.random.default_rng(int(name.rpartition("-")[2]))
    return {place: rng.bytes(100) for place in (0, 1, 3)}


def open_made(cache: ShardCache, name: str) -> CachedShard | Mapping[int, bytes | memoryview]:
    return cache.open(name, num_chunks=4, chunk_bytes=100, fetch=lambda: chunks_of(name), decode=bytes)


def chunk_of(shard: CachedShard | Mapping[int, bytes | memoryview], place: int) -> bytes:
    if not isinstance(shard, CachedShard):
        return bytes(shard[place])
    out = np.empty(100, np.uint8)
    shard.read(place, out)
    return out.tobytes()


def main(verb: str, *words: str) -> None:
    """Read a store over and over, or fill one file of a cache and stop on the way.

    Args:
        verb: read, wait, or where to stop: fetching or writing.
        words: Of read: URL, directory, largest size in bytes and the first chip; else the directory.
    """
    if verb == "read":
        url, directory, max_bytes, *first = words
        logging.basicConfig()
        cache = ShardCache(directory=directory, max_bytes=int(max_bytes))
        for _ in range(5):
            assert_right(read_all(Source(url=url, version=1), cache), *map(int, first))
        sys.stdout.write(json.dumps(counts()))
        return
    cache = ShardCache(directory=words[0], max_bytes=ROOMY)
    decoded = []

    def say(text: str) -> None:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()

    def fetch() -> dict[int, bytes]:
        if verb == "fetching":
            say("at it")
            time.sleep(600)
        return chunks_of("a-1")

    def decode(chunk: bytes | memoryview) -> bytes:
        decoded.append(chunk)
        if verb == "writing" and len(decoded) == 2:
            say("at it")
            time.sleep(600)
        return bytes(chunk)

    if verb == "wait":
        say("waiting")
    shard = cache.open("a-1", num_chunks=4, chunk_bytes=100, fetch=fetch, decode=decode)
    assert isinstance(shard, CachedShard)
    assert all(chunk_of(shard, place) == chunk for place, chunk in chunks_of("a-1").items())
    say("right")


if __name__ == "__main__":
    main(*sys.argv[1:])
