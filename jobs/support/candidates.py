"""What an archive offers for a region and period: searched and paired, before any pixel is read."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import pyarrow as pa
from shapely.geometry.base import BaseGeometry

from jobs.support.cell_choice import Choice, Wanted, choose_cells
from jobs.support.job import JobError, progress
from jobs.support.region_settings import RegionBuild
from jobs.support.spool import Spool
from pipeline.archives import Archive, archive_named
from pipeline.broker import AccessSpec, access_for
from pipeline.catalog import collection_of, require_account, search_labels
from pipeline.grid import PIXEL_M
from pipeline.manifest import CANDIDATES_SCHEMA, REJECTIONS_SCHEMA, table_of_items
from pipeline.matching import Matched, match_areas
from pipeline.objects import Objects
from pipeline.pairing import PairRules, acquisitions, periods_to_search
from pipeline.planning import Planner
from pipeline.regions import parse_period, parse_region
from pipeline.search import SearchResult, access_spec_of, search_region
from pipeline.types import Item, Sensor

log = logging.getLogger(__name__)

NOTES_SCHEMA = pa.schema([("item", pa.string()), ("used", pa.bool_()), ("note", pa.string())])
"""What was wrong with an item of the catalog, and whether it is used all the same."""

_NOTES_SHOWN = 5

_SENSORS: tuple[Sensor, Sensor] = ("optical", "radar")


@dataclass(frozen=True, kw_only=True)
class Offer:
    """What the archive has over the cells that are wanted."""

    archive: Archive
    chosen: Choice
    items: dict[Sensor, list[Item]]

    notes: pa.Table
    """`NOTES_SCHEMA`: items that are not used, or were mended."""

    labels: dict[str, list[tuple[str, bytes]]]
    """Label name -> (unsigned href of a map, footprint as WKB)."""


class Candidates:
    """Every pair of the cells, in a planner; and every candidate that is none, on the side.

    Args:
        planner: Takes the pairs.
    """

    def __init__(self, planner: Planner) -> None:
        self.planner = planner
        self.rejections = Spool(REJECTIONS_SCHEMA)
        self.reasons: Counter[str] = Counter()
        self._used: set[str] = set()

    def add(self, matched: Matched) -> None:
        """Take what came of pairing an area."""
        columns = (matched.candidates[name].to_numpy() for name in CANDIDATES_SCHEMA.names)
        self.planner.add(*columns, looks=matched.looks)
        self.reject(matched.rejections)
        for name in ("optical_items", "radar_items"):
            self._used.update(matched.looks[name].combine_chunks().flatten().unique().to_pylist())

    def reject(self, rejections: pa.Table) -> None:
        """Take cells and candidates that are not paired."""
        self.rejections.add(rejections)
        self.reasons.update(rejections["reason"].to_pylist())

    def items(self, offer: Offer) -> pa.Table:
        """The items that pairs use."""
        return table_of_items(item for items in offer.items.values() for item in items if item.id in self._used)


def access_of(settings: RegionBuild) -> AccessSpec:
    """How the archive may be reached: by what its descriptor says, and as politely as the settings want it."""
    return settings.politeness.applied_to(access_spec_of(archive_named(settings.archive)))


def ask_archive(settings: RegionBuild, wanted: Wanted, *, cache: Objects | None) -> Offer:
    """Choose the cells, and search what there is of them; no pixel of an acquisition is read.

    Args:
        settings: Whom to ask, for where and when.
        wanted: Of the cells there.
        cache: Where the catalog's answers are kept.

    Raises:
        JobError: Nothing was found.
        SearchError: The archive cannot be asked, or needs an account.
    """
    archive = archive_named(settings.archive)
    region, period = parse_region(settings.region), parse_period(settings.period)
    for sensor in _SENSORS:
        collection_of(archive, sensor)
    require_account(archive)
    chosen = choose_cells(
        region,
        wanted,
        side_m=settings.side_px * PIXEL_M,
        seed=settings.seed,
        archive=archive,
        spec=access_of(settings),
    )
    periods = periods_to_search(period, max_dt_days=settings.pairing.max_dt_days)
    found = {sensor: _search(settings, archive, sensor, chosen.region, periods[sensor], cache) for sensor in _SENSORS}
    access = access_for(access_of(settings))
    maps = {
        name: [(href, outline.wkb) for _, href, outline in search_labels(archive, name, chosen.region, access)]
        for name in wanted.labels
    }
    items = {sensor: result.items for sensor, result in found.items()}
    return Offer(archive=archive, chosen=chosen, items=items, notes=_notes(found.values()), labels=maps)


def pair_offer(offer: Offer, settings: RegionBuild, rules: PairRules, candidates: Candidates) -> None:
    """Pair what the archive offers, area by area.

    Raises:
        JobError: No pair could be made.
    """
    optical, radar = (acquisitions(offer.items[sensor]) for sensor in _SENSORS)
    candidates.reject(offer.chosen.rejections)
    areas = progress(
        match_areas(offer.chosen.cells, optical, radar, rules),
        total=len(offer.chosen.cells),
        what="cells",
        stage="pair",
        amount=lambda matched: matched.num_cells,
    )
    for matched in areas:
        candidates.add(matched)
    pairs, reasons = candidates.planner.num_rows, dict(candidates.reasons)
    log.info("%d pairs; not taken: %s", pairs, reasons or "none")
    if not pairs:
        raise JobError(f"no pair of acquisitions can be made: {reasons}; see pairing.* in --help for the limits")


def _search(
    settings: RegionBuild,
    archive: Archive,
    sensor: Sensor,
    region: BaseGeometry,
    period: tuple[datetime, datetime],
    cache: Objects | None,
) -> SearchResult:
    def watch(coming: Any, *, total: int, what: str) -> Any:
        return progress(coming, total=total, what=what, stage=f"search {sensor}") if total > 1 else coming

    found = search_region(archive, sensor, region, period, access_spec=access_of(settings), cache=cache, watch=watch)
    log.info("%d %s items; %d of %d pieces from the cache", len(found.items), sensor, found.from_cache, found.pieces)
    _say_notes("are not used", [(entry.item, entry.reason) for entry in found.refused])
    _say_notes("were mended", [(entry.item, entry.what) for entry in found.noted])
    if not found.items:
        collection = archive.optical_collection if sensor == "optical" else archive.radar_collection
        raise JobError(
            f"{archive.name} has no {collection} item over region={settings.region} in period={settings.period}; "
            "check both against the archive's coverage"
        )
    return found


def _say_notes(what: str, notes: Sequence[tuple[str, str]]) -> None:
    if notes:
        log.warning("%d items %s; all of them are in the version's item_notes.parquet", len(notes), what)
    for item, note in notes[:_NOTES_SHOWN]:
        log.warning("item %s: %s", item, note)


def _notes(found: Iterable[SearchResult]) -> pa.Table:
    rows = [
        row
        for result in found
        for row in (
            *({"item": r.item, "used": False, "note": r.reason} for r in result.refused),
            *({"item": n.item, "used": True, "note": n.what} for n in result.noted),
        )
    ]
    return pa.Table.from_pylist(rows, schema=NOTES_SCHEMA)
