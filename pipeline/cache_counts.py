"""What a cache of shards has done: counts of this process, and their sum over the processes of a node.

hits, misses, evicted and damaged are files; written_bytes and read_bytes are the cache's own, of its disk.
"""

from __future__ import annotations

import json
import threading
from collections import Counter, defaultdict

_counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
"""Of this process, by directory."""

_shared: defaultdict[str, Counter[str]] = defaultdict(Counter)
"""What of it the other processes have been told."""

_counting = threading.Lock()


def count(directory: str, what: str, number: int = 1) -> None:
    """Add to this process's counts."""
    with _counting:
        _counts[directory][what] += number


def counts() -> dict[str, int]:
    """Of this process so far."""
    with _counting:
        return dict(sum(_counts.values(), Counter()))


def added(text: bytes, directory: str) -> bytes:
    """Counts that several processes have written down, with what this one has not added yet."""
    total = Counter(parsed(text))
    with _counting:
        own, before = _counts[directory], _shared[directory]
        total.update({name: number - before[name] for name, number in own.items()})
        _shared[directory] = own.copy()
    return json.dumps(total).encode()


def parsed(text: bytes) -> dict[str, int]:
    """Counts as they were written; none where a process was killed over it."""
    try:
        return {str(name): int(number) for name, number in json.loads(text).items()}
    except (ValueError, AttributeError):
        return {}
