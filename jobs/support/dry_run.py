"""What building would do and cost, said before anything is built."""

from __future__ import annotations

import logging

from jobs.support.cell_choice import Wanted
from jobs.support.job import connect
from jobs.support.region_build import candidates_of
from jobs.support.region_settings import RegionBuild
from pipeline.objects import Objects

log = logging.getLogger(__name__)

# Measured on full-size scenes at blocks of 8x8 cells; see infra/README.md for what is a plan and what is not.
_DOWNLOAD_MB_PER_CHIP = 1.9
_STORE_MB_PER_CHIP = 0.72
_REQUESTS_PER_CHIP = 2.3


def say_plan(settings: RegionBuild, wanted: Wanted) -> None:
    """Search and pair as the job would, and say on the log what that comes to; nothing but a given cache is written."""
    connect(settings)
    cache = Objects.at(settings.search_cache) if settings.search_cache else None
    with candidates_of(settings, wanted, cache=cache) as (_, candidates):
        chips = candidates.planner.num_rows
    area_fraction = (settings.side_px / 264) ** 2
    log.info("would build %d candidate chips", chips)
    log.info(
        "would read about %.1f GB in about %d requests and store at most %.1f GB",
        chips * _DOWNLOAD_MB_PER_CHIP * area_fraction / 1e3,
        chips * _REQUESTS_PER_CHIP * area_fraction,
        chips * _STORE_MB_PER_CHIP * area_fraction / 1e3,
    )
