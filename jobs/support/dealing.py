"""How training samples are dealt out to the workers of a group, however many those are this time."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Final

import ray
import ray.data
from ray.data import DataIterator, Dataset, ExecutionOptions
from ray.train import DataConfig

from pipeline.fed_chips import Feed
from pipeline.feed import training_samples
from pipeline.positions import even_parts
from pipeline.quiet import quiet_data

TRAINING: Final = "train"
"""Name of the dataset that workers ask for."""

_START_TIMEOUT: Final = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"

RANKS_EACH: Final = 8
"""That a process of Ray Data's deals out to, at the most that keep it half idle: a task and its block take it 10 ms of
CPU, an H100 with `base` takes 2 to 5 blocks a second."""

_LEAST_USED: Final = 0.8
"""Of the CPUs that are there to read."""


class Dealing(DataConfig):
    """Deals blocks out to the ranks in turn: in the plan's order, everyone gets its part of every global batch.

    Of many ranks, some have a dataset and with it a process of its own that plans their lanes and deals them out.
    """

    def __init__(self, feed: Feed, samples_seen: Callable[[], int], *, cpus_per_worker: float) -> None:
        """`samples_seen`: by the newest checkpoint."""
        super().__init__()
        self.feed, self.samples_seen, self.cpus_per_worker = feed, samples_seen, cpus_per_worker

    def configure(
        self,
        datasets: dict[str, Dataset],
        world_size: int,
        worker_handles: Any = None,
        worker_node_ids: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> list[dict[str, DataIterator]]:
        """Called at every start of the workers; only here it is known how many they are, and where."""
        if not datasets:
            return [{} for _ in range(world_size)]
        quiet_data()
        feed, seen = replace(self.feed, ranks=world_size), self.samples_seen()
        workers = Counter(worker_node_ids or ())
        spare = [
            node["Resources"].get("CPU", 0.0) - workers[node["NodeID"]] * self.cpus_per_worker
            for node in ray.nodes()
            if node["Alive"]
        ]
        dealt: list[DataIterator] = []
        for members in dealt_together(world_size, spare):
            samples = training_samples(feed, seen=seen, members=members)
            samples.set_name(f"{TRAINING}-{members[0]}")
            samples.context.execution_options = ExecutionOptions(preserve_order=True)
            dealt += samples.streaming_split(len(members), equal=True)
        return [{TRAINING: part} for part in dealt]


def dealt_together(num_ranks: int, spare_cpus: Sequence[float]) -> list[range]:
    """The ranks that share a dataset; few where more datasets could not use all CPUs.

    Ray gives each dataset the same whole number of every node's CPUs, and one task at a time where that is none: seven
    CPUs are of no use to eight.

    Args:
        num_ranks: In all.
        spare_cpus: Of each node, that no rank has.
    """
    number = -(-num_ranks // RANKS_EACH)
    while number > 1 and sum(cpus // number * number for cpus in spare_cpus) < _LEAST_USED * sum(spare_cpus):
        number -= 1
    return even_parts(range(num_ranks), number)


def nothing_yet() -> Dataset:
    """What Ray Train is given so that it asks `Dealing`, which makes the datasets that count."""
    quiet_data()
    return ray.data.range(1)


@contextmanager
def worker_start_timeout(seconds: float) -> Iterator[None]:
    """Have Ray Train wait so long for workers to start; it hears of that by the driver's environment alone."""
    before = os.environ.get(_START_TIMEOUT)
    os.environ[_START_TIMEOUT] = str(seconds)
    try:
        yield
    finally:
        os.environ.pop(_START_TIMEOUT)
        if before is not None:
            os.environ[_START_TIMEOUT] = before
