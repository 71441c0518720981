"""How many workers train: a number, or from so many to so many as nodes come and go."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, NamedTuple

from pydantic import AfterValidator

_RANGE = re.compile(r"(\d+)\.\.(\d+)")


class WorkerCounts(NamedTuple):
    """From `least` to `most`, both included."""

    least: int
    most: int

    @property
    def counts(self) -> range:
        """Every number that a run may come to."""
        return range(self.least, self.most + 1)

    @property
    def elastic(self) -> bool:
        """Whether the number may change while a run goes on."""
        return self.least < self.most

    def __str__(self) -> str:
        return f"{self.least}..{self.most}" if self.elastic else str(self.most)


def worker_counts(setting: int | str) -> WorkerCounts:
    """The setting of a job, such as 4 or "2..8".

    Raises:
        ValueError: Neither a number nor a range, or none above 0.
    """
    found = _RANGE.fullmatch(str(setting).strip())
    least, most = (int(each) for each in found.groups()) if found else (_number(setting), _number(setting))
    if not 1 <= least <= most:
        raise ValueError(f"must be a number from 1, or a range such as 2..8, got {setting!r}")
    return WorkerCounts(least, most)


def check_divides(workers: WorkerCounts, global_batch: int) -> None:
    """Refuse a global batch that some number of workers cannot share evenly.

    Ray Train alone decides which number of a range it comes to: by how many there is room for.

    Raises:
        ValueError: Naming what would do instead.
    """
    uneven = [count for count in workers.counts if global_batch % count]
    if not uneven:
        return
    if not workers.elastic:
        raise ValueError(f"global_batch={global_batch} is no multiple of num_workers={workers}")
    even = [count for count in workers.counts if count not in uneven]
    step = math.lcm(*workers.counts)
    below, above = global_batch // step * step, -(-global_batch // step) * step
    batches = " or ".join(str(each) for each in (below, above) if each)
    alone = f", or one number of workers: {', '.join(map(str, even))}" if even else ""
    raise ValueError(
        f"num_workers={workers} can come to {', '.join(map(str, uneven))}, of which global_batch={global_batch} is no "
        f"multiple; give global_batch={batches}{alone}"
    )


def _number(setting: Any) -> int:
    try:
        return int(setting)
    except ValueError:
        return 0


def _checked(setting: int | str) -> int | str:
    workers = worker_counts(setting)
    return str(workers) if workers.elastic else workers.most


WorkerSetting = Annotated[int | str, AfterValidator(_checked)]
"""For a field of a job's settings."""
