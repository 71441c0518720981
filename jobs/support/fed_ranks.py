"""What each rank was fed since the last report: how fast, how long it waited, what came from its node's disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from jobs.support.ranks import of_all_ranks
from jobs.support.waiting import waited_share

_CACHE = ("cache_hits", "cache_misses")


def fed_ranks(
    steps: Sequence[Mapping[str, float]], cached: Mapping[str, float], *, samples: int
) -> list[dict[str, float]]:
    """In the order of ranks, the same on each; all take part.

    Args:
        steps: This rank's since the last report, with waited_s, step_s and fed_bytes.
        cached: Of `jobs.support.cache_watch`; empty without a cache. Of its node, whose ranks share it.
        samples: Of this rank in each step.

    Returns:
        Of each rank samples_per_s, bytes_per_s, waited_share and, with a cache, cache_hits and cache_misses.
    """
    took = sum(step["waited_s"] + step["step_s"] for step in steps)
    own = [
        samples * len(steps) / max(took, 1e-9),
        sum(step["fed_bytes"] for step in steps) / max(took, 1e-9),
        waited_share(steps),
        *(cached[name] for name in _CACHE if name in cached),
    ]
    names = ("samples_per_s", "bytes_per_s", "waited_share", *(name for name in _CACHE if name in cached))
    ranks = of_all_ranks(torch.tensor([own], dtype=torch.float64)).tolist()
    return [dict(zip(names, each, strict=True)) for each in ranks]


def fed_in_total(ranks: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of all ranks: bytes_per_s, and the share of the time waited as a mean and at the most."""
    waited = [each["waited_share"] for each in ranks]
    return {
        "bytes_per_s": sum(each["bytes_per_s"] for each in ranks),
        "waited_share": sum(waited) / len(waited),
        "waited_share_most": max(waited),
    }


def said_waiting(ranks: Sequence[Mapping[str, float]]) -> str:
    """In words for the log: of all, and the rank that waited longest where there are several."""
    total = fed_in_total(ranks)
    said = f"waited {100 * total['waited_share']:.0f} %"
    if len(ranks) == 1:
        return said
    longest = max(range(len(ranks)), key=lambda rank: ranks[rank]["waited_share"])
    return f"{said} (rank {longest}: {100 * total['waited_share_most']:.0f} %)"
