"""How training samples are dealt out to the workers of a group, however many those are this time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Final

from ray.data import DataIterator, Dataset
from ray.train import DataConfig

from pipeline.feed import Feed, training_samples
from pipeline.quiet import quiet_data

TRAINING: Final = "train"
"""Name of the dataset that workers ask for."""

_START_TIMEOUT: Final = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"


class Dealing(DataConfig):
    """Deals blocks out to the ranks in turn: in the plan's order, everyone gets its part of every global batch."""

    def __init__(self, feed: Feed, samples_seen: Callable[[], int]) -> None:
        """`samples_seen`: by the newest checkpoint."""
        execution = DataConfig.default_ingest_options()
        execution.preserve_order = True
        super().__init__(execution_options=execution)
        self.feed, self.samples_seen = feed, samples_seen

    def configure(
        self, datasets: dict[str, Dataset], world_size: int, *args: Any, **kwargs: Any
    ) -> list[dict[str, DataIterator]]:
        """Called at every start of the workers; only here it is known how many they are, and so how long blocks are."""
        if datasets and world_size != self.feed.ranks:
            quiet_data()
            feed = replace(self.feed, ranks=world_size)
            datasets = {TRAINING: training_samples(feed, seen=self.samples_seen())}
        dealt: list[dict[str, DataIterator]] = super().configure(datasets, world_size, *args, **kwargs)
        return dealt


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
