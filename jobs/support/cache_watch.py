"""How much of what is read comes from a node's own disk."""

from __future__ import annotations

import logging
import socket

from jobs.support import words
from pipeline.shard_cache import ShardCache

log = logging.getLogger(__name__)

_SAID = ("hits", "misses", "read_bytes", "written_bytes", "evicted", "damaged")


class CacheWatch:
    """What the cache of this node has given since it was asked last; nothing where there is none."""

    def __init__(self, cache: ShardCache | None) -> None:
        self._cache = cache
        self._before = {} if cache is None else cache.shared_counts()

    def since_last(self, *, say: bool) -> dict[str, float]:
        """cache_hits, cache_misses, cache_evicted and cache_damaged, files; cache_read_bytes and cache_written_bytes.

        Args:
            say: Put it on the log too; for one process of a node.
        """
        if self._cache is None:
            return {}
        now = self._cache.shared_counts()
        found = {name: now.get(name, 0) - self._before.get(name, 0) for name in _SAID}
        self._before = now
        if say and found["hits"] + found["misses"]:
            log.info(
                "%s: %.0f %% of %d shards' arrays from cache_dir, %s read there, %s written, %d pushed out, %d damaged",
                socket.gethostname(), 100 * found["hits"] / (found["hits"] + found["misses"]),
                found["hits"] + found["misses"], words.size(found["read_bytes"]), words.size(found["written_bytes"]),
                found["evicted"], found["damaged"],
            )  # fmt: skip
        return {f"cache_{name}": float(number) for name, number in found.items()}
