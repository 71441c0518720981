"""What an archive offers for a region and period: searched and paired, before any pixel is read."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from jobs.support.job import JobError
from jobs.support.region_settings import RegionBuild
from pipeline.archives import Archive, archive_named
from pipeline.catalog import require_account, search, search_labels
from pipeline.grid import PIXEL_M, Cell, cells_covering
from pipeline.pairing import Pair, PairRules, Rejection, acquisitions, pair_cells
from pipeline.regions import parse_period, parse_region

log = logging.getLogger(__name__)


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
