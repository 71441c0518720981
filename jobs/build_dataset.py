"""Build a dataset of aligned Sentinel-1/2 chips from a STAC archive.

Example:
    ray job submit --working-dir . -- python jobs/build_dataset.py \
        region=region.geojson period=2023-06/2023-08 store=s3://bucket/chips.zarr

The same command again completes what is missing. With --append, another region or period becomes a new version of the
store; with --retry-failed, what failed in sealed versions is tried again; with --verify and only store=, every chip is
compared with its hash.
"""

from __future__ import annotations

import logging
from typing import Final, Literal, Self

from pydantic import Field, model_validator

from jobs.support.cell_choice import Wanted
from jobs.support.dry_run import say_plan
from jobs.support.job import run_job
from jobs.support.region_build import build_store
from jobs.support.region_settings import Exclusion, RegionBuild, Sampling, Splits, content_request
from jobs.support.run_record import recorded
from jobs.support.targets import Mode
from jobs.support.verifying import verify_store
from pipeline.splits import SplitRules

log = logging.getLogger("build_dataset")

_CONTENT: Final = {"per_cell", "per_season", "sampling", "exclude", "labels", "splits"}
"""What decides the content beside the settings that other jobs share."""


class BuildDataset(RegionBuild):
    """Build a dataset of aligned Sentinel-1/2 chips from a STAC archive."""

    store: str
    """Zarr group to create, or to complete if it exists: a path or s3://, az://, gs://."""

    per_cell: Literal["all", "one", "season"] = "all"
    """All pairs of a cell, the least cloudy one, or the best of each meteorological quarter, spread over it."""

    per_season: int = Field(default=1, ge=1)
    """With per_cell=season: most pairs of a cell in a quarter."""

    sampling: Sampling = Sampling()
    """Which cells of the region are taken."""

    exclude: Exclusion = Exclusion()
    """Areas that no chip may come near."""

    labels: Literal["none", "worldcover"] = "none"
    """Label collection to store beside the chips, per pixel."""

    splits: Splits = Splits()
    """Train, val and test by blocks of cells."""

    append: bool = False
    """Add to a store that was built from another region, period or rules, as a new version of it."""

    retry_failed: bool = False
    """Try again what failed in the sealed versions of the store, as a new version of it."""

    verify: bool = False
    """Build nothing, and compare every version with itself: pixels with hashes, ledger with manifest; needs store."""

    @property
    def builds(self) -> bool:
        """Whether anything is asked of the archive."""
        return not self.verify

    @model_validator(mode="after")
    def _one_at_a_time(self) -> Self:
        asked = [name for name in ("append", "retry_failed", "verify") if getattr(self, name)]
        if len(asked) > 1:
            raise ValueError(f"{' and '.join(asked)} exclude each other")
        return self


def main(settings: BuildDataset) -> None:
    """Search, pair, plan, read, screen, write, seal."""
    wanted = Wanted(
        per_cell=settings.per_cell,
        per_season=settings.per_season,
        owners_only=True,
        splits=SplitRules(**settings.splits.model_dump(), seed=settings.seed),
        labels=() if settings.labels == "none" else (settings.labels,),
        sampling=settings.sampling,
        exclude=settings.exclude,
    )
    if settings.verify:
        verify_store(settings, settings.store)
        return
    request = content_request(settings, **settings.model_dump(mode="json", include=_CONTENT))
    mode: Mode = "append" if settings.append else "retry" if settings.retry_failed else "build"
    if settings.dry_run:
        say_plan(settings, settings.store, request, wanted, mode, directory=settings.directory_for(settings.store))
        return
    with recorded(settings, job="build_dataset", output=settings.store) as record:
        version = build_store(settings, settings.store, request, wanted, record, mode)
        record.outputs["store"] = {"url": settings.store, "version": version.number}
        for name, value in record.results.items():
            log.info("%s: %s", name.replace("_", " "), value)


if __name__ == "__main__":
    run_job(BuildDataset, main)
