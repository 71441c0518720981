"""What building would do and cost, said before anything is built."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from jobs.support.candidates import access_of
from jobs.support.cell_choice import Wanted
from jobs.support.estimate import Estimate, Workload, estimate, estimate_lines, workload_of
from jobs.support.region_build import layout_of, prepared_of, search_cache
from jobs.support.region_settings import RegionBuild
from jobs.support.targets import Mode, Target, target_of
from pipeline.appends import plan_of_failures
from pipeline.archives import archive_named
from pipeline.objects import Objects
from pipeline.versions import Version

log = logging.getLogger(__name__)


def say_plan(
    settings: RegionBuild,
    url: str,
    request: dict[str, Any],
    wanted: Wanted,
    mode: Mode = "build",
    *,
    directory: str,
) -> Estimate | None:
    """Find out what the same call of `build_store` would do, and say on the log what that comes to.

    A search is made as the job would make it, and is kept for the job; nothing else is written.

    Args:
        settings: What decides the chips.
        url: Store to create or to complete.
        request: Settings that decide the content.
        wanted: What the job wants of the cells.
        mode: Whether another request, or what failed in sealed versions, would become a new version.
        directory: Of the run, where the search is kept unless the settings say where.

    Returns:
        What it would cost; None if everything is there.

    Raises:
        JobError: Nothing was found, or no pair could be made.
        StoreError: As the job would.
    """
    layout = layout_of(settings, wanted)
    target = target_of(url, layout, request, mode)
    if target.version is not None and target.version.state == "sealed":
        log.info("%s is complete already: nothing to do", target.version.name)
        return None
    log.info("would %s %s version %d", "begin" if target.version is None else "complete", url, target.number)
    if target.needs_search:
        workload = _of_search(settings, url, target, wanted, search_cache(settings, directory))
    elif target.version is None or target.version.state == "planning":
        workload = _of_failures(Version(url, target.number), settings)
    else:
        workload = _of_what_is_left(target.version, settings)
    found = estimate(
        workload,
        layout,
        reader=settings.reading.reader,
        limits=access_of(settings).storage,
        signed=archive_named(settings.archive).signing != "none",
        searched=target.needs_search,
    )
    for line in estimate_lines(found):
        log.info("%s", line)
    return found


def _of_search(settings: RegionBuild, url: str, target: Target, wanted: Wanted, cache: Objects) -> Workload:
    """Of what the archive has, but for what earlier versions have."""
    with prepared_of(settings, url, target.number, wanted, cache=cache) as (offer, candidates):
        planner, items = candidates.planner, [item for found in offer.items.values() for item in found]
        clouds = {item.id: item.cloud_percent for item in items}
        workload = workload_of(
            planner.parts(),
            planner.looks(),
            clouds,
            block_cells=planner.block_cells,
            max_cloud_fraction=settings.screening.max_cloud_fraction,
            cells=len(offer.chosen.cells),
            items=len(items),
        )
        if target.number > 1:
            log.info("%d candidates are in earlier versions", sum(part.num_rows for part in planner.left_out()))
    return workload


def _of_failures(version: Version, settings: RegionBuild) -> Workload:
    """Of what failed in earlier versions."""
    planner, items = plan_of_failures(version)
    log.info("%d candidates of earlier versions failed", planner.num_rows)
    return _planned(planner.parts(), planner.looks(), items, planner.block_cells, settings)


def _of_what_is_left(version: Version, settings: RegionBuild) -> Workload:
    """Of the shards that are not done, or not without failures."""
    plan, done, looks = version.plan, version.finished_shards(), version.looks()
    assert plan is not None, version
    assert looks is not None, version
    log.info("%d of %d shards are there from an earlier run", len(done), len(version.shards()))
    return _planned(_without(version, done), looks, version.items(), plan["block_cells"], settings)


def _without(version: Version, done: set[int]) -> Iterator[pa.Table]:
    there = pa.array(sorted(done), pa.int32())
    for batch in version.manifest_batches(columns=["shard", "epsg", "column", "cell_row", "look"]):
        left = batch.filter(pc.invert(pc.is_in(batch["shard"], value_set=there)))
        if left.num_rows:
            yield left


def _planned(
    parts: Iterable[pa.Table], looks: pa.Table, items: pa.Table, block_cells: int, settings: RegionBuild
) -> Workload:
    """Of rows that are planned: of their own cells, without a search."""
    clouds = dict(zip(items["id"].to_pylist(), items["cloud_percent"].to_pylist(), strict=True))
    workload = workload_of(
        parts,
        looks,
        clouds,
        block_cells=block_cells,
        max_cloud_fraction=settings.screening.max_cloud_fraction,
        cells=0,
        items=items.num_rows,
    )
    return replace(workload, cells=workload.cells_with_pairs)
