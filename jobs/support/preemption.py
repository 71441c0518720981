"""Word that nodes are about to be taken away, asked for rarely: all ranks wait for each other to hear it."""

from __future__ import annotations

import logging
import time
from typing import Final

import ray.train
import ray.train.collective

from jobs.support.job import log_to_stderr

log = logging.getLogger(__name__)

_EVERY_S: Final = 10.0
"""Notices come half a minute (Azure, Google) or two (AWS) before the end. Asking took some milliseconds."""


class Notice:
    """Asked by every rank after every step, for ranks must agree when to look."""

    def __init__(self) -> None:
        self._steps_left = self._steps = 1
        self._asked_s = time.monotonic()
        self._known: set[str] = set()

    def is_new(self) -> bool:
        """Whether nodes of this run are to go that were not known to before: the time for a checkpoint."""
        self._steps_left -= 1
        if self._steps_left:
            return False
        told = ray.train.get_preemption_info()
        # Rank 0's clock decides for all.
        elapsed_s = time.monotonic() - self._asked_s
        self._steps = ray.train.collective.broadcast_from_rank_zero(steps_between(self._steps, elapsed_s))
        self._steps_left, self._asked_s = self._steps, time.monotonic()
        nodes = set(told.preempted_node_ids) if told else set()
        new = nodes - self._known
        self._known |= nodes
        if new and ray.train.get_context().get_world_rank() == 0:
            log_to_stderr()
            log.warning("nodes are about to be taken away (%s): a checkpoint is taken now", ", ".join(sorted(new)))
        return bool(new)


def steps_between(steps: int, elapsed_s: float, *, every_s: float = _EVERY_S) -> int:
    """How many steps to take before asking again, when so many took so long.

    No more than twice as many at once: the first steps after a start say little.
    """
    return max(1, min(2 * steps, int(steps * every_s / max(elapsed_s, 1e-9))))
