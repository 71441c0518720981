"""Region x period -> a sealed version of a chip store; what `build_dataset` and `embed` have in common."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import pyarrow.compute as pc
from pydantic import Field, model_validator

from jobs.support.driver_lease import is_gone, kept_alive, owner
from jobs.support.job import JobError, connect, progress
from jobs.support.run_record import RunRecord
from jobs.support.settings import Group, JobSettings
from pipeline.archives import Archive, archive_named
from pipeline.catalog import require_account, search, search_labels
from pipeline.chip_table import ledger
from pipeline.chips import Recipe
from pipeline.grid import PIXEL_M, Cell, cells_covering
from pipeline.ingest import build
from pipeline.labels import LABEL_CLASSES
from pipeline.manifest import items_table, plan_rows, rejections_table
from pipeline.objects import Objects
from pipeline.pairing import Pair, PairRules, Rejection, acquisitions, pair_cells
from pipeline.regions import parse_period, parse_region
from pipeline.screening import ScreenRules
from pipeline.splits import SplitRules
from pipeline.store import Layout, Store
from pipeline.versions import Version, begin

log = logging.getLogger(__name__)

# Measured on full-size scenes at blocks of 8x8 cells; see infra/README.md for what is a plan and what is not.
_DOWNLOAD_MB_PER_CHIP = 1.9
_STORE_MB_PER_CHIP = 0.72
_REQUESTS_PER_CHIP = 2.3


class Pairing(Group):
    """Which radar look goes with which optical one."""

    max_dt_days: float = Field(default=3.0, gt=0, le=60)
    """Largest time between the two acquisitions, days."""

    max_cloud_percent: float = Field(default=60.0, ge=0, le=100)
    """Optical scenes with more cloud than this over the whole scene are not considered, percent."""

    min_overlap: float = Field(default=0.999, gt=0, le=1)
    """Smallest fraction of a cell that each footprint must cover."""


class Screening(Group):
    """What the pixels of a chip must be like to be kept."""

    max_cloud_fraction: float = Field(default=0.2, ge=0, le=1)
    """Largest fraction of cloud and cloud shadow among the chip's valid pixels."""

    min_valid_fraction: float = Field(default=0.99, ge=0, le=1)
    """Smallest fraction of pixels with data in both sensors."""


class Splits(Group):
    """Train, val and test by blocks of cells."""

    block_cells: int = Field(default=16, ge=1)
    """Side of a split block, cells."""

    val_fraction: float = Field(default=0.1, ge=0, lt=1)
    """Fraction of split blocks for choosing hyper-parameters."""

    test_fraction: float = Field(default=0.1, ge=0, lt=1)
    """Fraction of split blocks for the reported numbers."""

    buffer_cells: int = Field(default=1, ge=0, le=8)
    """Train gives up cells this near to a val or test block, cells."""


class RegionBuild(JobSettings):
    """What decides the chips of a region and period."""

    archive: str = "planetary-computer"
    """planetary-computer, earth-search, or the URL of a STAC API with Planetary Computer's collections."""

    region: str
    """GeoJSON file, or west,south,east,north in degrees."""

    period: str
    """2023, 2023-06, 2023-06-01 or two of these joined by a slash; the end is included."""

    side_px: int = Field(default=264, ge=12, multiple_of=6)
    """Side of a chip, pixels of 10 m."""

    block_cells: int = Field(default=8, ge=1, le=16)
    """Side of the blocks of cells that are read together, cells."""

    shard_chips: int = Field(default=256, ge=1)
    """Chips in a shard: the unit of writing and of parallel work."""

    codec: Literal["lz4", "zstd", "none"] = "lz4"
    """Compression of the chips; none for a local NVMe cache."""

    pairing: Pairing = Pairing()
    """Which radar look goes with which optical one."""

    screening: Screening = Screening()
    """What the pixels of a chip must be like to be kept."""

    seed: int = 0
    """Decides the order of units in the store and the splits."""

    max_failed_fraction: float = Field(default=0.01, ge=0, le=1)
    """The job fails if more than this fraction of the candidate chips could not be read."""

    @model_validator(mode="after")
    def _blocks_fit_shards(self) -> Self:
        if self.block_cells**2 > self.shard_chips:
            chips = self.block_cells**2
            raise ValueError(f"block_cells={self.block_cells}: {chips} chips do not fit shard_chips={self.shard_chips}")
        return self


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """What the catalog offers for a region and period."""

    archive: Archive
    cells: list[Cell]
    pairs: list[Pair]
    rejections: list[Rejection]
    refused_items: list[tuple[str, str]]
    labels: dict[str, list[tuple[str, bytes]]]


def find_candidates(
    settings: RegionBuild, *, per_cell: Literal["all", "one"], owners_only: bool, labels: Sequence[str]
) -> Candidates:
    """Search and pair; no pixel is read.

    Raises:
        JobError: Nothing was found, or no pair could be made.
        SearchError: The archive cannot be asked, or needs an account.
    """
    archive = archive_named(settings.archive)
    region, period = parse_region(settings.region), parse_period(settings.period)
    require_account(archive)
    cells = cells_covering(region, side_m=settings.side_px * PIXEL_M, owners_only=owners_only)
    log.info("%d cells of %d m in the region", len(cells), settings.side_px * PIXEL_M)
    found, refused = {}, []
    for sensor in ("optical", "radar"):
        found[sensor], unusable = search(archive, sensor, region, period)
        refused += unusable
        log.info("%d %s items", len(found[sensor]), sensor)
        for name, reason in unusable:
            log.warning("item %s is not used: %s", name, reason)
        if not found[sensor]:
            collection = archive.optical_collection if sensor == "optical" else archive.radar_collection
            raise JobError(
                f"{archive.name} has no {collection} item over region={settings.region} in period={settings.period}; "
                "check both against the archive's coverage"
            )
    rules = PairRules(**settings.pairing.model_dump(), per_cell=per_cell)
    pairs, rejections = pair_cells(cells, acquisitions(found["optical"]), acquisitions(found["radar"]), rules)
    log.info("%d pairs; not taken: %s", len(pairs), dict(Counter(r.reason for r in rejections)) or "none")
    if not pairs:
        reasons = dict(Counter(r.reason for r in rejections))
        raise JobError(f"no pair of acquisitions can be made: {reasons}; see pairing.* in --help for the limits")
    maps = {name: [(h, box.wkb) for _, h, box in search_labels(archive, name, region)] for name in labels}
    return Candidates(
        archive=archive, cells=cells, pairs=pairs, rejections=rejections, refused_items=refused, labels=maps
    )


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
