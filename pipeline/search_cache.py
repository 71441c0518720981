"""What a catalog said of each piece, kept so that nobody asks twice: STAC-GeoParquet with a note on the search.

```
<collection>/<month>/<key>.json              when it was asked and what came; written last, it says "whole"
<collection>/<month>/<key>-<time>.parquet    STAC-GeoParquet of the items that are as they should be
```

Items that have to be repaired or refused lie in the note as they came, because a table of geometries in degrees is no
place for them. Hrefs are unsigned.
"""

from __future__ import annotations

import json
import logging
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import shapely
from stac_geoparquet.arrow import parse_stac_items_to_arrow, stac_table_to_items, to_parquet

from pipeline.archives import Archive
from pipeline.catalog_footprints import ItemError
from pipeline.catalog_items import parse
from pipeline.objects import Objects
from pipeline.search_pieces import Piece
from pipeline.types import Sensor

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Freshness:
    """How long an answer counts.

    Archives go on adding items for weeks after they were sensed: an answer about last week is not the last word.
    """

    settled: timedelta = timedelta(days=60)
    """An answer that was given so long after the end of its piece counts for good."""

    fresh: timedelta = timedelta(hours=12)
    """Any other counts for so long: enough for a run that was killed to go on where it was."""

    def counts(self, piece: Piece, searched_at: datetime, now: datetime) -> bool:
        """Whether an answer of a time still says what the catalog would say now."""
        # The clocks of two machines differ, so that an answer may seem to come from the future.
        return searched_at >= piece.end + self.settled or abs(now - searched_at) < self.fresh


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a catalog said of one piece."""

    searched_at: datetime
    features: list[dict[str, Any]]
    """Slimmed items; the same, in any order, whether they come from the catalog or from the cache."""


def keep(cache: Objects, key: str, piece: Piece, answer: Answer, archive: Archive, sensor: Sensor) -> None:
    """Write an answer; readers see an older one or this one."""
    clean, unclean = _sorted_out(answer.features, archive, sensor)
    older = _note(cache, key)
    table = f"{key}-{answer.searched_at:%Y%m%dT%H%M%S%f}.parquet" if clean else None
    if table:
        cache.put(table, _geoparquet(clean))
    note = {
        "archive": archive.name,
        "stac_url": archive.stac_url,
        "bounds": list(piece.bounds),
        "start": piece.start.isoformat(),
        "end": piece.end.isoformat(),
        "searched_at": answer.searched_at.isoformat(),
        "items": len(answer.features),
        "table": table,
        "unclean": unclean,
    }
    cache.put(f"{key}.json", json.dumps(note, indent=1).encode())
    if older and older["table"] not in (None, table):
        cache.delete(older["table"])


def recall(cache: Objects, key: str, piece: Piece, freshness: Freshness, now: datetime) -> Answer | None:
    """An answer that still counts; None where there is none, or where it cannot be read."""
    note = _note(cache, key)
    if note is None:
        return None
    try:
        searched_at = datetime.fromisoformat(note["searched_at"])
        if not freshness.counts(piece, searched_at, now):
            return None
        clean = list(stac_table_to_items(cache.get_table(note["table"]))) if note["table"] else []
        features = [*clean, *note["unclean"]]
        if len(features) != note["items"]:
            raise ValueError(f"holds {len(features)} of {note['items']} items")
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        log.warning("%s/%s cannot be read and is asked for again: %s", cache.url, key, error)
        return None
    return Answer(searched_at=searched_at, features=features)


def _note(cache: Objects, key: str) -> dict[str, Any] | None:
    try:
        return cache.get_json(f"{key}.json")
    except FileNotFoundError:
        return None
    except ValueError as error:
        log.warning("%s/%s cannot be read and is asked for again: %s", cache.url, key, error)
        return None


def _sorted_out(
    features: list[dict[str, Any]], archive: Archive, sensor: Sensor
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Those that are as they should be, and those that are not."""
    clean: list[dict[str, Any]] = []
    unclean: list[dict[str, Any]] = []
    for feature in features:
        try:
            good = not parse(feature, archive, sensor).notes
        except ItemError:
            good = False
        (clean if good else unclean).append(feature)
    return clean, unclean


def _geoparquet(features: list[dict[str, Any]]) -> bytes:
    with_boxes = [{**f, "bbox": list(shapely.geometry.shape(f["geometry"]).bounds)} for f in features]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "items.parquet"
        to_parquet(parse_stac_items_to_arrow(with_boxes), path, compression="zstd")
        return path.read_bytes()


def utc_now() -> datetime:
    """The time that answers are dated with."""
    return datetime.now(UTC)
