"""From a planned version to a sealed one that describes itself: the same for archives and imports."""

from __future__ import annotations

import logging
from collections import Counter
from contextlib import closing
from itertools import islice
from typing import Any, Final

import pyarrow.compute as pc

from jobs.support.dataset_report import write_dataset_report
from jobs.support.driver_lease import Held
from jobs.support.job import JobError, progress
from jobs.support.progress import watching
from jobs.support.run_record import RunRecord
from jobs.support.store_catalog import write_catalog
from pipeline.chips import Recipe
from pipeline.ingest import MakeUnit, build
from pipeline.objects import Objects
from pipeline.versions import Version

log = logging.getLogger(__name__)

REPORT: Final = "report.html"
_FAILURES_SHOWN: Final = 10


def complete(
    version: Version,
    recipe: Recipe | MakeUnit,
    record: RunRecord,
    *,
    held: Held,
    max_failed_fraction: float,
    cpus_per_task: float = 1.0,
) -> None:
    """Build what is not built, seal, describe.

    Args:
        version: Planned, and leased.
        recipe: How its chips are made.
        record: Where stages and counts go.
        held: Its lease; without it nothing is sealed.
        max_failed_fraction: Of the candidates; with more failures nothing is sealed.
        cpus_per_task: Of each shard's task.

    Raises:
        JobError: Too many chips failed; what was written is kept, and a rerun redoes their shard groups.
        StoreError: Shards could not be written, or another driver has taken over.
    """
    with record.stage("build"):
        _build(version, recipe, cpus_per_task, held)
    _refuse_failures(version, max_failed_fraction)
    with record.stage("seal"):
        held.confirm()
        version.seal(watch=watching("seal"))
    with record.stage("describe"):
        describe(version, record, again=True)


def describe(version: Version, record: RunRecord, *, again: bool) -> None:
    """For other tools, and for people; what is there already is left alone, unless the report is to be made again."""
    record.outputs["catalog"] = write_catalog(version, watch=watching("describe"))
    place = Objects.at(record.directory)
    if again or not place.exists(REPORT):
        write_dataset_report(version, place, name=REPORT, watch=watching("report"))
    record.outputs["report"] = f"{place.url}/{REPORT}"
    log.info("described in %(catalog)s and shown in %(report)s", record.outputs)


def summary(version: Version) -> dict[str, Any]:
    """Requested, written, rejected by reason, failed; and what was not taken into the plan, by reason."""
    not_taken: Counter[str] = Counter()
    for table in version.rejection_batches():
        counted = pc.value_counts(table["reason"])
        not_taken.update({entry["values"]: entry["counts"] for entry in counted.to_pylist()})
    return {**version.counts(), "not_taken": dict(not_taken)}


def _build(version: Version, recipe: Recipe | MakeUnit, cpus_per_task: float, held: Held) -> None:
    done = len(version.finished_shards())
    if done:
        log.info("%d of %d shards are there from an earlier run", done, len(version.shards()))
    with closing(build(version, recipe, cpus_per_task=cpus_per_task)) as built:
        receipts = progress(
            built,
            total=len(version.shards()) - done,
            what="shards",
            stage="build",
            outcomes=lambda receipt: receipt.outcomes,
        )
        for receipt in receipts:
            held.check()
            log.debug("shard %d: %s, %.1f s", receipt.shard, receipt.outcomes, receipt.seconds)


def _refuse_failures(version: Version, max_failed_fraction: float) -> None:
    counts = version.counts()
    if not counts["failed"]:
        return
    rows = (row for table in version.failures() for row in table.select(["error"]).to_pylist())
    errors = [row["error"] for row in islice(rows, _FAILURES_SHOWN)]
    for error in errors:
        log.warning("failed: %s", error)
    fraction = counts["failed"] / counts["requested"]
    if fraction > max_failed_fraction:
        raise JobError(
            f"{counts['failed']} of {counts['requested']} chips could not be read ({fraction:.1%}, more than "
            f"max_failed_fraction={max_failed_fraction}); what was written is kept, running again tries only their "
            f"shards. First: {errors[0]}"
        )
