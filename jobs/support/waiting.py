"""How much of its time a run waits for the feed, and what that most probably comes of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

MOST: Final = 0.05
"""More waiting than this share of the time is worth a warning."""

_FEW: Final = 0.1
"""Waiting of which half falls on no more than this share of the steps comes in bursts."""


def waited_share(steps: Sequence[Mapping[str, float]]) -> float:
    """Of the time of some steps, from 0 to 1."""
    waited = sum(step["waited_s"] for step in steps)
    return waited / max(1e-9, waited + sum(step["step_s"] for step in steps))


def probable_cause(steps: Sequence[Mapping[str, float]]) -> str | None:
    """Why a run waits for its feed and what helps, judged by when it waits; None where it waits little.

    Args:
        steps: With epoch, waited_s and step_s, in order.
    """
    share = waited_share(steps)
    if share <= MOST:
        return None
    said = f"{share:.0%} of the time went into waiting for the feed"
    # The first batch of an epoch comes only when tasks have started, opened the store and filled a window.
    first = [at == 0 or step["epoch"] != steps[at - 1]["epoch"] for at, step in enumerate(steps)]
    later = [step for step, starts in zip(steps, first, strict=True) if not starts]
    if not later or waited_share(later) <= MOST:
        return (
            f"{said}, most of it for the first batch of an epoch: reading starts anew with each. Longer epochs make "
            "that rarer: raise crops_per_chip, and lower epochs as much"
        )
    waits = sorted((step["waited_s"] for step in later), reverse=True)
    longest = sum(waits[: max(1, int(_FEW * len(waits)))])
    if len(waits) >= 1 / _FEW and longest > sum(waits) / 2:
        return (
            f"{said}, in bursts: half of it for a tenth of the batches. Whole windows come late: storage that stalls, "
            "or too little object store memory for the windows in flight"
        )
    return (
        f"{said}, evenly over the batches: reading is slower than training. More CPUs to read (CPU nodes, or a lower "
        "cpus_per_worker), more crops_per_chip, a store that is nearer or not compressed; --dry-run says how many "
        "samples a CPU reads"
    )
