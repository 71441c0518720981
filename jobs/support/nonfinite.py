"""Steps whose loss or gradient is not a number: which chips were in them, and whether the run goes on without them.

Every rank learns of such a step before the weights change. Ranks that caused it write down what they had; nothing is
sent between ranks for that.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from jobs.support.job import log_to_stderr
from model.training import NonFiniteError
from pipeline.objects import Objects
from pipeline.redaction import redact
from pipeline.sources import Source, Sources
from pipeline.store import Store
from pipeline.versions import Version

log = logging.getLogger(__name__)

FOLDER: Final = "nonfinite"
"""In the directory of a run: a file per such step and rank at fault, by the samples seen when it was over."""

_NAMED: Final = 8
"""Chips that a message names; the file has all."""

_ADVICE: Final = (
    "pixels are always finite by then, so the weights have most probably run away: start again with a lower "
    "learning_rate, a longer warmup_fraction, max_logit_scale=4.6 or precision=float32, from_weights of an earlier run "
    "if you like; or skip such steps with on_nonfinite=skip and run the same command again"
)


class Chip(NamedTuple):
    """A sample of a step, and where its chip is."""

    store: str
    row: int
    """Of the store."""

    k: int
    epoch: int
    cell: str | None
    pair: str | None


class RunEndedError(Exception):
    """A step without finite losses is where the run ends."""

    def __init__(self, samples: int, skipped: int) -> None:
        super().__init__(f"not finite in the step to {samples} samples")
        self.samples, self.skipped = samples, skipped


class SkippedSteps:
    """Decides about steps without finite losses, and counts those that were skipped; one on every rank."""

    def __init__(self, plan: Mapping[str, Any], *, rank: int, count: int = 0) -> None:
        """`plan`: out (of the run), sources, on_nonfinite, max_skipped_steps; `count`: skipped before."""
        self.plan, self.rank, self.count = plan, rank, count

    def step(self, error: NonFiniteError, batch: Mapping[str, Tensor], samples: int) -> None:
        """Write down the chips where this rank is at fault, and count the step.

        Args:
            error: What the step ended with, on every rank.
            batch: This rank's samples.
            samples: Seen when the step is over.

        Raises:
            RunEndedError: With this step, on every rank.
        """
        if error.here:
            self._write_down(error, batch, samples)
        self.count += 1
        if self.plan["on_nonfinite"] == "end" or self.count > self.plan["max_skipped_steps"]:
            raise RunEndedError(samples, self.count) from error

    def _write_down(self, error: NonFiniteError, batch: Mapping[str, Tensor], samples: int) -> None:
        columns = {name: batch[name].cpu().numpy() for name in ("row", "k", "epoch")}
        chips = chips_of(self.plan["sources"], columns)
        log_to_stderr()
        log.error("step to %d samples is not finite on rank %d: %s; %s", samples, self.rank, error, some(chips))
        Objects.at(self.plan["out"]).put_json(
            f"{FOLDER}/{samples:012d}-{self.rank:05d}.json",
            # JSON has no word for what is not a number.
            {
                "samples": samples,
                "rank": self.rank,
                "values": {name: str(value) for name, value in error.values.items()},
                "chips": [chip._asdict() for chip in chips],
            },
        )


def chips_of(sources: Sequence[Source], columns: Mapping[str, NDArray[Any]]) -> list[Chip]:
    """Samples of a feed and where their chips are.

    Args:
        sources: That are fed.
        columns: (sample,) row, as it is counted over all sources, k and epoch.
    """
    opened = Sources(sources)
    origins = [opened.origin(row) for row in columns["row"].tolist()]
    places = {
        each: places_of(Version(each.url, each.version), np.array([row for source, row in origins if source == each]))
        for each in sources
    }
    return [
        Chip(redact(source.url), row, k, epoch, *places[source].get(row, (None, None)))
        for (source, row), k, epoch in zip(origins, columns["k"].tolist(), columns["epoch"].tolist(), strict=True)
    ]


def places_of(version: Version, rows: NDArray[np.int64]) -> dict[int, tuple[str | None, str | None]]:
    """Row -> ids of its cell and of its pair, as far as a version and those before it have the rows."""
    shard_chips = Store.open(version.url).layout.shard_chips
    found: dict[int, tuple[str | None, str | None]] = {}
    for each in version.versions():
        plan = each.plan
        if plan is None:
            continue
        inside = np.unique(rows[(rows >= plan["first_row"]) & (rows < plan["end_row"])])
        for shard in np.unique(inside // shard_chips).tolist():
            table = each.chips_of(shard, columns=["row", "cell", "pair"])
            found.update({row["row"]: (row["cell"], row["pair"]) for row in table.to_pylist()})
    return found


def forget_after(out: Objects, seen: int) -> None:
    """Remove what was written of steps that are taken again."""
    for path in out.list(FOLDER):
        if int(Path(path).stem.split("-")[0]) > seen:
            out.delete(path)


def explain(out: Objects, *, samples: int, skipped: int) -> str:
    """Why a run ended at a step: the chips of the ranks at fault, and what to do.

    Args:
        out: Directory of the run.
        samples: Seen when the step was over.
        skipped: Steps without finite losses so far, this one included.
    """
    paths = [path for path in out.list(FOLDER) if Path(path).stem.startswith(f"{samples:012d}-")]
    records = [out.get_json(path) for path in paths]
    chips = [Chip(**chip) for record in records for chip in record["chips"]]
    ranks = ", ".join(str(record["rank"]) for record in records)
    so_far = f", after {skipped - 1} that were skipped" if skipped > 1 else ""
    return (
        f"the loss or its gradient is not finite on rank {ranks} in the step to {samples} samples{so_far}; the weights "
        f"were left as they were. {some(chips)}; all of them in {out.url}/{FOLDER}. What to do: {_ADVICE}"
    )


def some(chips: Sequence[Chip]) -> str:
    """A few chips in words."""
    named = ", ".join(f"row {chip.row} (cell {chip.cell})" for chip in chips[:_NAMED])
    return f"{len(chips)} chips: {named}{', …' if len(chips) > _NAMED else ''}"
