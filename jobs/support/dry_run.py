"""What building would do and cost, said before anything is built."""

from __future__ import annotations

import logging

from jobs.support.candidates import access_of
from jobs.support.cell_choice import Wanted
from jobs.support.estimate import Estimate, estimate, estimate_lines, workload_of
from jobs.support.job import connect
from jobs.support.region_build import candidates_of, layout_of
from jobs.support.region_settings import RegionBuild
from pipeline.objects import Objects

log = logging.getLogger(__name__)


def say_plan(settings: RegionBuild, wanted: Wanted) -> Estimate:
    """Search and pair as the job would, and say on the log what that comes to; nothing but a given cache is written."""
    connect(settings)
    cache = Objects.at(settings.search_cache) if settings.search_cache else None
    with candidates_of(settings, wanted, cache=cache) as (offer, candidates):
        items = [item for found in offer.items.values() for item in found]
        workload = workload_of(
            candidates.planner.parts(),
            candidates.planner.looks(),
            {item.id: item.cloud_percent for item in items},
            block_cells=settings.block_cells,
            max_cloud_fraction=settings.screening.max_cloud_fraction,
            cells=len(offer.chosen.cells),
            items=len(items),
        )
    found = estimate(
        workload,
        layout_of(settings, wanted),
        reader=settings.reading.reader,
        limits=access_of(settings).storage,
        signed=offer.archive.signing != "none",
    )
    for line in estimate_lines(found):
        log.info("%s", line)
    return found
