"""Comparing a store with itself."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from jobs.support.job import JobError, connect, progress
from jobs.support.settings import JobSettings
from pipeline.ingest import check_shards_on_cluster
from pipeline.store import Store, StoreError
from pipeline.verification import ShardReport, verify
from pipeline.versions import Version, latest

log = logging.getLogger(__name__)


def verify_store(settings: JobSettings, url: str) -> None:
    """Read every chip of every version and compare: pixels with hashes, ledgers with manifests, objects with ledgers.

    Raises:
        JobError: Something is wrong; the first problems are on the log.
        StoreError: There is no store, or nothing of it is planned.
    """
    newest = latest(Store.open(url).url)
    planned = [version for version in (newest.versions() if newest else []) if version.plan is not None]
    if not planned:
        raise StoreError(f"{url} has no version that is planned: there is nothing to verify")
    connect(settings)
    wrong = 0
    for version in planned:
        report = verify(version, pixels=True, check=_shown)
        for problem in report.problems:
            log.error("%s: %s", version.name, problem)
        log.info(
            "%s (%s): %d chips in %d shards, %d problems",
            version.name, version.state, report.chips, report.shards, report.num_problems,
        )  # fmt: skip
        wrong += report.num_problems
    if wrong:
        raise JobError(f"{url} is not what it says: {wrong} problems; the first of each version are above")


def _shown(version: Version, pixels: bool) -> Iterator[ShardReport]:
    yield from progress(check_shards_on_cluster(version, pixels), total=len(version.shards()), what="shards")
