"""Region x period -> a sealed version of a chip store; what `build_dataset` and `embed` have in common."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

import pyarrow.compute as pc

from jobs.support.candidates import Candidates, find_candidates
from jobs.support.driver_lease import is_gone, kept_alive, owner
from jobs.support.job import JobError, connect, progress
from jobs.support.region_settings import RegionBuild
from jobs.support.run_record import RunRecord
from pipeline.chip_table import ledger
from pipeline.chips import Recipe
from pipeline.grid import PIXEL_M
from pipeline.ingest import build
from pipeline.labels import LABEL_CLASSES
from pipeline.manifest import items_table, plan_rows, rejections_table
from pipeline.objects import Objects
from pipeline.screening import ScreenRules
from pipeline.splits import SplitRules
from pipeline.store import Layout, Store
from pipeline.versions import Version, begin

log = logging.getLogger(__name__)

# Measured on full-size scenes at blocks of 8x8 cells; see infra/README.md for what is a plan and what is not.
_DOWNLOAD_MB_PER_CHIP = 1.9
_STORE_MB_PER_CHIP = 0.72
_REQUESTS_PER_CHIP = 2.3


def say_plan(candidates: Candidates, settings: RegionBuild) -> None:
    """What building would cost, on the log."""
    chips = len(candidates.pairs)
    area_fraction = (settings.side_px / 264) ** 2
    log.info("would build %d candidate chips of %d cells", chips, len({p.cell for p in candidates.pairs}))
    log.info(
        "would read about %.1f GB in about %d requests and store at most %.1f GB",
        chips * _DOWNLOAD_MB_PER_CHIP * area_fraction / 1e3,
        chips * _REQUESTS_PER_CHIP * area_fraction,
        chips * _STORE_MB_PER_CHIP * area_fraction / 1e3,
    )


def build_store(
    settings: RegionBuild,
    url: str,
    request: dict[str, Any],
    splits: SplitRules,
    record: RunRecord,
    **how: Any,
) -> Version:
    """Plan what is not planned, build what is not built, seal; a sealed version of the same request is left alone.

    Args:
        settings: What decides the chips.
        url: Store to create or to complete.
        request: Settings that decide the content; another request for the same store is refused.
        splits: How cells are shared out.
        record: Where stages and counts go.
        how: `per_cell`, `owners_only` and `labels` of `find_candidates`.

    Raises:
        JobError: Too many chips failed; what was written is kept, and a rerun redoes their shard groups.
        StoreError: The store holds another layout or another request, or somebody else is building it.
    """
    label_classes = {name: LABEL_CLASSES[name] for name in how["labels"]}
    layout = Layout(
        side_px=settings.side_px, shard_chips=settings.shard_chips, codec=settings.codec, labels=label_classes
    )
    candidates = None
    if not Objects.at(url).exists("zarr.json"):
        # A search that finds nothing leaves nothing behind.
        with record.stage("search and pair"):
            candidates = find_candidates(settings, **how)
    store = Store.create(url, layout)
    version = begin(url, request)
    if version.state == "sealed":
        log.info("%s version %d is complete already: nothing to do", url, version.number)
        record.results.update(reused=True, **summary(version))
        return version
    with version.lease(owner(), is_gone=is_gone) as lease, kept_alive(lease):
        if version.state == "planning":
            with record.stage("search and pair"):
                candidates = candidates or find_candidates(settings, **how)
            with record.stage("plan"):
                _plan(version, candidates, settings, splits, store)
        connect(settings)
        with record.stage("build"):
            _build(version, settings)
        _check_failures(version, settings)
        with record.stage("seal"):
            version.seal()
    record.results.update(reused=False, **summary(version))
    return version


def _plan(version: Version, candidates: Candidates, settings: RegionBuild, splits: SplitRules, store: Store) -> None:
    manifest = plan_rows(
        candidates.pairs,
        block_cells=settings.block_cells,
        shard_chips=settings.shard_chips,
        first_row=version.first_shard() * settings.shard_chips,
        splits=splits,
    )
    store.resize(int(manifest["row"][-1].as_py()) + 1)
    version.write_plan(
        items_table(candidates.pairs),
        rejections_table(candidates.rejections),
        [manifest],
        {
            "signing": candidates.archive.signing,
            "labels": {n: [[h, w.hex()] for h, w in maps] for n, maps in candidates.labels.items()},
        },
    )
    log.info("planned %d chips in %d shards", manifest.num_rows, len(version.shards()))


def _build(version: Version, settings: RegionBuild) -> None:
    plan = version.plan
    assert plan is not None
    recipe = Recipe(
        screen=ScreenRules(**settings.screening.model_dump()),
        signing=plan["signing"],
        side_m=settings.side_px * PIXEL_M,
        labels={n: [(h, bytes.fromhex(w)) for h, w in maps] for n, maps in plan["labels"].items()},
    )
    done = len(version.finished_shards())
    if done:
        log.info("%d of %d shards are there from an earlier run", done, len(version.shards()))
    left = len(version.shards()) - done
    for receipt in progress(build(version, recipe), total=left, what="shards"):
        log.info(
            "shard %d: %d written, %d rejected, %d failed, %.1f s",
            receipt.shard, receipt.written, receipt.rejected, receipt.failed, receipt.seconds,
        )  # fmt: skip


def _check_failures(version: Version, settings: RegionBuild) -> None:
    table = version.chips()
    failed = table.filter(pc.equal(table["status"], "failed"))
    for row in failed.slice(0, 10).to_pylist():
        log.warning("failed: %s", row["error"])
    fraction = failed.num_rows / table.num_rows
    if fraction > settings.max_failed_fraction:
        raise JobError(
            f"{failed.num_rows} of {table.num_rows} chips could not be read ({fraction:.1%}, more than "
            f"max_failed_fraction={settings.max_failed_fraction}); what was written is kept, running again tries only "
            f"their shards. First: {failed['error'][0].as_py()}"
        )


def summary(version: Version) -> dict[str, Any]:
    """Requested, written, rejected by reason, failed."""
    not_taken = Counter(version.rejections()["reason"].to_pylist())
    return {**ledger(version.chips()), "pairs_not_taken": dict(not_taken)}
