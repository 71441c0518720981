"""What a search came to: each granule once, in its newest processing, and what became of the other items."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import pairwise

import shapely
from shapely.geometry.base import BaseGeometry

from pipeline.archives import Archive
from pipeline.catalog_footprints import Feature, ItemError, share_within
from pipeline.catalog_items import Parsed, parse
from pipeline.types import Item, Sensor

_GAP = timedelta(minutes=10)
"""Granules of one tile that were sensed further apart are of different overpasses."""

_SAME_GROUND = 0.9
"""A granule of which this share is seen in newer ones of the same overpass was processed again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """An item that is not used."""

    item: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Noted:
    """An item that is used although something was wrong with it."""

    item: str
    what: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a search came to."""

    items: list[Item]
    """Sorted by time and id."""

    refused: list[Refused]
    noted: list[Noted]


Judged = dict[str, Parsed | Refused | None]
"""Id -> what became of an item; None where nobody asked for it."""


def judge(
    features: Iterable[Feature],
    archive: Archive,
    sensor: Sensor,
    region: BaseGeometry,
    period: tuple[datetime, datetime],
) -> Judged:
    """What a server answered, without what lies elsewhere, whatever it filtered itself.

    Args:
        features: In any order; of an item that comes twice the later one counts.
        archive: Who answered.
        sensor: optical or radar.
        region: Longitude/latitude.
        period: Half-open, UTC.
    """
    shapely.prepare(region)
    judged: Judged = {}
    for feature in features:
        name = str(feature.get("id") or "")
        try:
            one = parse(feature, archive, sensor)
        except ItemError as error:
            judged[name] = Refused(item=name, reason=str(error))
            continue
        asked_for = period[0] <= one.item.datetime < period[1] and region.intersects(one.item.footprint)
        judged[name] = one if asked_for else None
    return judged


def settle(judged: Judged) -> Found:
    """What is used in the end of all that was answered."""
    kept, replaced = newest_processing(entry for _, entry in sorted(judged.items()) if isinstance(entry, Parsed))
    refused = [entry for entry in judged.values() if isinstance(entry, Refused)]
    kept.sort(key=lambda one: (one.item.datetime, one.item.id))
    return Found(
        items=[one.item for one in kept],
        refused=sorted([*refused, *replaced], key=lambda entry: entry.item),
        noted=[Noted(item=one.item.id, what=what) for one in kept for what in one.notes],
    )


def newest_processing(parsed: Iterable[Parsed]) -> tuple[list[Parsed], list[Refused]]:
    """Without the granules whose ground is in newer ones of the same tile and overpass.

    Not every second granule of a tile is a repetition: where two datastrips meet, each holds a part of the tile.
    """
    kept: list[Parsed] = []
    replaced: list[Refused] = []
    for granules in _overpasses_of_a_tile(parsed):
        # Newest first: what is kept can only be replaced by what was looked at before.
        own: list[Parsed] = []
        for one in sorted(granules, key=lambda p: (p.processed, p.generated, p.item.id), reverse=True):
            if own and share_within(one.item.footprint, [p.item.footprint for p in own]) >= _SAME_GROUND:
                replaced.append(Refused(item=one.item.id, reason=f"processed again as {own[0].item.id}"))
            else:
                own.append(one)
        kept += own
    return kept, replaced


def _overpasses_of_a_tile(parsed: Iterable[Parsed]) -> Iterator[list[Parsed]]:
    """Granules of one tile, platform and orbit that are minutes apart; items without a tile each for themselves."""
    places: dict[tuple[str, int, str], list[Parsed]] = {}
    for one in parsed:
        if one.item.tile:
            places.setdefault((one.item.platform, one.item.relative_orbit, one.item.tile), []).append(one)
        else:
            yield [one]
    for granules in places.values():
        granules.sort(key=lambda p: p.item.datetime)
        starts = [i for i, (a, b) in enumerate(pairwise(granules), 1) if b.item.datetime - a.item.datetime > _GAP]
        yield from (granules[i:j] for i, j in pairwise([0, *starts, len(granules)]))
