"""Region x period -> a sealed version of a chip store; what `build_dataset` and `embed` have in common."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from jobs.support.candidates import Candidates, Offer, access_of, ask_archive, pair_offer
from jobs.support.cell_choice import Wanted
from jobs.support.driver_lease import Held, is_gone, kept_alive, owner
from jobs.support.job import connect
from jobs.support.progress import watching
from jobs.support.region_settings import RegionBuild
from jobs.support.run_record import RunRecord
from jobs.support.targets import Mode, target_of
from jobs.support.version_stages import complete, describe, summary
from pipeline.appends import leave_out_earlier, plan_retry
from pipeline.chips import Recipe
from pipeline.grid import PIXEL_M
from pipeline.labels import LABEL_CLASSES
from pipeline.objects import Objects
from pipeline.pairing import PairRules
from pipeline.planning import Planner, splits_by
from pipeline.regions import parse_period
from pipeline.screening import ScreenRules
from pipeline.store import Layout, Store, StoreError
from pipeline.versions import Version, begin

log = logging.getLogger(__name__)


def build_store(
    settings: RegionBuild, url: str, request: dict[str, Any], wanted: Wanted, record: RunRecord, mode: Mode = "build"
) -> Version:
    """Plan what is not planned, build what is not built, seal; a sealed version of the same request is left alone.

    Args:
        settings: What decides the chips.
        url: Store to create or to complete.
        request: Settings that decide the content.
        wanted: What the job wants of the cells.
        record: Where stages and counts go.
        mode: Whether another request, or what failed in sealed versions, becomes a new version.

    Raises:
        JobError: Too many chips failed; what was written is kept, and a rerun redoes their shard groups.
        StoreError: The store holds another layout or another request, or somebody else is building it.
    """
    layout = layout_of(settings, wanted)
    target = target_of(url, layout, request, mode)
    if target.version is not None and target.version.state == "sealed":
        log.info("%s version %d is complete already: nothing to do", url, target.number)
        # A run that was killed after sealing may have left it undescribed.
        describe(target.version, record, again=False)
        record.results.update(reused=True, **summary(target.version))
        return target.version
    with ExitStack() as stack:
        prepared = None
        if target.needs_search:
            cache = search_cache(settings, record.directory)
            with record.stage("search and pair"):
                prepared = stack.enter_context(prepared_of(settings, url, target.number, wanted, cache=cache))
        Store.create(url, layout)
        version = begin(url, target.request, number=target.number)
        with version.lease(owner(), is_gone=is_gone) as lease, kept_alive(lease) as held:
            if version.state == "planning":
                with record.stage("plan"):
                    _write_plan(version, prepared, held)
            connect(settings)
            complete(
                version,
                _recipe(version, settings),
                record,
                held=held,
                max_failed_fraction=settings.max_failed_fraction,
                cpus_per_task=settings.cpus_per_task,
            )
    record.results.update(reused=False, **summary(version))
    return version


def layout_of(settings: RegionBuild, wanted: Wanted) -> Layout:
    """Of the store that is built."""
    return Layout(
        side_px=settings.side_px,
        shard_chips=settings.shard_chips,
        codec=settings.codec,
        labels={name: LABEL_CLASSES[name] for name in wanted.labels},
    )


def rules_of(settings: RegionBuild, wanted: Wanted) -> PairRules:
    """What makes a pair."""
    return PairRules(
        **settings.pairing.model_dump(),
        per_cell=wanted.per_cell,
        per_season=wanted.per_season,
        period=parse_period(settings.period),
    )


def search_cache(settings: RegionBuild, directory: str) -> Objects:
    """Where the catalog's answers are kept: where the settings say, else beside run.json."""
    return Objects.at(settings.search_cache or f"{directory}/search")


@contextmanager
def prepared_of(
    settings: RegionBuild, url: str, number: int, wanted: Wanted, *, cache: Objects
) -> Iterator[tuple[Offer, Candidates]]:
    """What a version that is not planned yet is planned from, without what earlier versions have.

    Nothing is written but the cache.

    Raises:
        JobError: Nothing was found, or no pair could be made.
        SearchError: The archive cannot be asked, or needs an account.
        StoreError: Earlier versions have all of it.
    """
    version = Version(url, number)
    first_row = version.first_shard() * settings.shard_chips if number > 1 else 0
    connect(settings)
    with candidates_of(settings, wanted, first_row=first_row, cache=cache) as (offer, candidates):
        if number > 1:
            _leave_out_earlier(candidates.planner, version)
        yield offer, candidates


@contextmanager
def candidates_of(
    settings: RegionBuild, wanted: Wanted, *, first_row: int = 0, cache: Objects | None = None
) -> Iterator[tuple[Offer, Candidates]]:
    """Search and pair; nothing is written but the cache.

    Raises:
        JobError: Nothing was found, or no pair could be made.
        SearchError: The archive cannot be asked, or needs an account.
    """
    planner = Planner(
        block_cells=settings.block_cells,
        shard_chips=settings.shard_chips,
        first_row=first_row,
        seed=settings.seed,
        splits_of=splits_by(wanted.splits, side_m=settings.side_px * PIXEL_M),
    )
    candidates = Candidates(planner)
    try:
        offer = ask_archive(settings, wanted, cache=cache)
        pair_offer(offer, settings, rules_of(settings, wanted), candidates)
        yield offer, candidates
    finally:
        candidates.rejections.close()


def _leave_out_earlier(planner: Planner, version: Version) -> None:
    """What is known already is found out before the version is begun, so that nothing of it is left behind."""
    candidates = planner.num_rows
    leave_out_earlier(planner, version, watch=watching("compare with earlier versions"))
    if next(planner.parts(), None) is None:
        raise StoreError(f"{version.url}: earlier versions have all {candidates} candidates; nothing is new")


def _write_plan(version: Version, prepared: tuple[Offer, Candidates] | None, held: Held) -> None:
    if prepared is None:
        plan = plan_retry(version, _facts_of_last(version), confirm=held.confirm)
    else:
        offer, candidates = prepared
        version.objects.put_table("item_notes.parquet", offer.notes)
        facts = {"labels": {n: [[h, w.hex()] for h, w in maps] for n, maps in offer.labels.items()}}
        plan = version.write_planned(
            candidates.planner,
            candidates.items(offer),
            candidates.rejections.tables(),
            facts,
            watch=watching("plan"),
            confirm=held.confirm,
        )
    log.info("planned %d chips in %d shards", plan["num_chips"], len(version.shards()))


def _facts_of_last(version: Version) -> dict[str, Any]:
    """A retry's label maps are those of the version before."""
    plan = Version(version.url, version.number - 1).plan
    assert plan is not None, version
    return {"labels": plan["labels"]}


def _recipe(version: Version, settings: RegionBuild) -> Recipe:
    plan = version.plan
    assert plan is not None, version
    return Recipe(
        screen=ScreenRules(**settings.screening.model_dump()),
        access=access_of(settings),
        side_m=settings.side_px * PIXEL_M,
        labels={n: [(h, bytes.fromhex(w)) for h, w in maps] for n, maps in plan["labels"].items()},
        reader=settings.reading.reader,
        patience=settings.reading.patience(),
    )
