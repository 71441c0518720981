"""Build a dataset of aligned Sentinel-1/2 chips from a STAC archive.

Example:
    ray job submit --working-dir . -- python jobs/build_dataset.py \
        region=region.geojson period=2023-06/2023-08 store=s3://bucket/chips.zarr
"""

from __future__ import annotations

import logging
from typing import Literal

from jobs.support.candidates import find_candidates
from jobs.support.job import run_job
from jobs.support.region_build import build_store, say_plan
from jobs.support.region_settings import RegionBuild, Splits, content_request
from jobs.support.run_record import recorded
from pipeline.splits import SplitRules

log = logging.getLogger("build_dataset")


class BuildDataset(RegionBuild):
    """Build a dataset of aligned Sentinel-1/2 chips from a STAC archive."""

    store: str
    """Zarr group to create, or to complete if it exists: a path or s3://, az://, gs://."""

    per_cell: Literal["all", "one"] = "all"
    """All pairs of a cell, or the least cloudy one."""

    labels: Literal["none", "worldcover"] = "none"
    """Label collection to store beside the chips, per pixel."""

    splits: Splits = Splits()
    """Train, val and test by blocks of cells."""


def main(settings: BuildDataset) -> None:
    """Search, pair, plan, read, screen, write, seal."""
    splits = SplitRules(**settings.splits.model_dump(), seed=settings.seed)
    labels = [] if settings.labels == "none" else [settings.labels]
    if settings.dry_run:
        say_plan(find_candidates(settings, per_cell=settings.per_cell, owners_only=True, labels=labels), settings)
        return
    with recorded(settings, job="build_dataset", output=settings.store) as record:
        version = build_store(
            settings,
            settings.store,
            content_request(settings, **settings.model_dump(mode="json", include={"per_cell", "labels", "splits"})),
            splits,
            record,
            per_cell=settings.per_cell,
            owners_only=True,
            labels=labels,
        )
        record.outputs["store"] = {"url": settings.store, "version": version.number}
        for name, value in record.results.items():
            log.info("%s: %s", name.replace("_", " "), value)


if __name__ == "__main__":
    run_job(BuildDataset, main)
