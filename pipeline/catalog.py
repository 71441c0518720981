"""Searching an archive: STAC in, items without their archive's quirks out."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import shapely
from pystac_client import Client
from pystac_client.exceptions import APIError
from pystac_client.stac_api_io import StacApiIO
from shapely.geometry.base import BaseGeometry
from urllib3.util.retry import Retry

from pipeline.archives import Archive
from pipeline.bands import OPTICAL_BANDS, RADAR_BANDS, SCENE_CLASSIFICATION
from pipeline.types import Item, Sensor

log = logging.getLogger(__name__)

_FIRST_OFFSET_BASELINE = (4, 0)
_OFFSET_DN = 1000
_PAGE_SIZE = 100


class SearchError(Exception):
    """The catalog could not be asked, or its answer could not be understood."""


class ItemError(ValueError):
    """An item that cannot be used; the message says which and why."""


def require_account(archive: Archive) -> None:
    """Refuse early where the radar collection needs an account and no key is set.

    Raises:
        SearchError: The archive's subscription key is not in the environment.
    """
    if archive.account_variable and not os.environ.get(archive.account_variable):
        raise SearchError(
            f"{archive.radar_collection} on {archive.name} needs an account (msft:requires_account): set "
            f"{archive.account_variable} in the environment of the job and of its workers (a Kubernetes secret, not "
            "runtime_env)"
        )


def search(
    archive: Archive, sensor: Sensor, region: BaseGeometry, period: tuple[datetime, datetime]
) -> tuple[list[Item], list[tuple[str, str]]]:
    """Every item of one sensor that meets a region in a period.

    Only core item-search is used, which every STAC API has; nothing is filtered by the server but place and time.

    Args:
        archive: Whom to ask.
        sensor: optical or radar.
        region: Longitude/latitude.
        period: Half-open, UTC.

    Returns:
        Items sorted by time and id, without duplicates; and (item id, reason) of those that cannot be used.

    Raises:
        SearchError: No such collection, or the server does not answer.
    """
    collection = archive.optical_collection if sensor == "optical" else archive.radar_collection
    if collection is None:
        raise SearchError(f"{archive.name} has no Sentinel-1 that can be used: {archive.radar_refusal}")
    items: dict[str, Item] = {}
    refused: list[tuple[str, str]] = []
    for feature in _features(archive, collection, region, period):
        try:
            item = parse_item(feature, archive, sensor)
        except ItemError as error:
            refused.append((str(feature.get("id")), str(error)))
            continue
        if period[0] <= item.datetime < period[1] and item.footprint.intersects(region):
            items[item.id] = item
    return sorted(_newest_processing(items.values()), key=lambda i: (i.datetime, i.id)), refused


def search_labels(archive: Archive, label: str, region: BaseGeometry) -> list[tuple[str, str, BaseGeometry]]:
    """(item id, href of its map, footprint) of a label collection over a region.

    Raises:
        SearchError: The archive has no such label, or none here.
    """
    if label not in archive.label_collections:
        raise SearchError(
            f"{archive.name} has no label {label!r}; known: {', '.join(archive.label_collections) or 'none'}"
        )
    collection = archive.label_collections[label]
    found = [
        (feature["id"], feature["assets"]["map"]["href"], shapely.geometry.shape(feature["geometry"]))
        for feature in _features(archive, collection, region, None)
    ]
    if not found:
        raise SearchError(f"{collection} on {archive.name} has no item over the region")
    newest: dict[bytes, tuple[str, str, BaseGeometry]] = {}
    for entry in sorted(found, key=lambda e: e[0]):
        newest[shapely.normalize(entry[2]).wkb] = entry
    return sorted(newest.values(), key=lambda e: e[0])


def parse_item(feature: dict[str, Any], archive: Archive, sensor: Sensor) -> Item:
    """One STAC item (1.0 or 1.1, projection extension 1 or 2) as an `Item`.

    Raises:
        ItemError: A missing asset or field, or a geometry that is not in degrees.
    """
    properties = feature["properties"]
    if sensor == "optical":
        bands: tuple[str, ...] = (*OPTICAL_BANDS, SCENE_CLASSIFICATION)
        baseline = str(properties.get("s2:processing_baseline", ""))
        offset = offset_dn(properties, baseline, archive)
    else:
        bands, baseline, offset = RADAR_BANDS, "", 0
    assets = _hrefs(feature, bands, archive)
    return Item(
        id=feature["id"],
        collection=str(feature.get("collection", "")),
        sensor=sensor,
        datetime=_datetime(properties),
        epsg=_epsg(feature),
        footprint=_footprint(feature),
        assets=assets,
        platform=str(properties.get("platform", "")).lower(),
        tile=str(properties.get("s2:mgrs_tile") or properties.get("grid:code", "")).removeprefix("MGRS-"),
        relative_orbit=_relative_orbit(feature),
        orbit_state=str(properties.get("sat:orbit_state", "")),
        cloud_percent=float(properties.get("eo:cloud_cover") or 0.0),
        baseline=baseline,
        offset_dn=offset,
    )


def offset_dn(properties: dict[str, Any], baseline: str, archive: Archive) -> int:
    """What was added to the digital numbers of an optical item; decided by its baseline, never by its date.

    Raises:
        ItemError: The item does not say its baseline.
    """
    if archive.offset_rule == "baseline_unless_flagged" and properties.get("earthsearch:boa_offset_applied"):
        return 0
    try:
        major, minor = (int(part) for part in baseline.split("."))
    except ValueError:
        raise ItemError(f"s2:processing_baseline is {baseline!r}: cannot tell whether 1000 was added") from None
    return _OFFSET_DN if (major, minor) >= _FIRST_OFFSET_BASELINE else 0


def _features(
    archive: Archive, collection: str, region: BaseGeometry, period: tuple[datetime, datetime] | None
) -> Iterator[dict[str, Any]]:
    retry = Retry(
        total=5, connect=1, backoff_factor=1.0, status_forcelist=[429, 500, 502, 503, 504], allowed_methods=None
    )
    # The server's end is inclusive; ours is not: a search up to the last microsecond before it.
    interval = (period[0], period[1] - timedelta(microseconds=1)) if period else None
    try:
        client = Client.open(archive.stac_url, stac_io=StacApiIO(max_retries=retry, timeout=60))
        found = client.search(
            collections=[collection],
            intersects=shapely.geometry.mapping(region),
            datetime=interval,
            limit=_PAGE_SIZE,
            method="POST",
        )
        yield from found.items_as_dicts()
    except (APIError, OSError) as error:
        raise SearchError(f"searching {collection} at {archive.stac_url}: {error}") from error


def _newest_processing(items: Iterable[Item]) -> list[Item]:
    """One item per tile and overpass: the same granule processed again replaces the older one."""
    newest: dict[tuple[object, ...], Item] = {}
    for item in items:
        key = (item.platform, item.datetime, item.tile) if item.tile else (item.id,)
        if key not in newest or (item.baseline, item.id) > (newest[key].baseline, newest[key].id):
            newest[key] = item
    return list(newest.values())


def _datetime(properties: dict[str, Any]) -> datetime:
    text = properties.get("datetime") or properties.get("start_datetime")
    if not text:
        raise ItemError("has no datetime")
    parsed = datetime.fromisoformat(text)
    return parsed.replace(tzinfo=UTC) if parsed.tzinfo is None else parsed.astimezone(UTC)


def _epsg(feature: dict[str, Any]) -> int:
    places = [feature["properties"], *feature["assets"].values()]
    for fields in places:
        if fields.get("proj:code"):
            return int(str(fields["proj:code"]).removeprefix("EPSG:"))
        if fields.get("proj:epsg"):
            return int(fields["proj:epsg"])
    raise ItemError("has neither proj:code nor proj:epsg")


def _footprint(feature: dict[str, Any]) -> BaseGeometry:
    if not feature.get("geometry"):
        raise ItemError("has no geometry")
    footprint = shapely.geometry.shape(feature["geometry"])
    west, south, east, north = footprint.bounds
    if west < -360 or east > 360 or south < -90 or north > 90:
        raise ItemError(f"has a geometry that is not in degrees (bounds {footprint.bounds})")
    return footprint if footprint.is_valid else shapely.make_valid(footprint)


def _hrefs(feature: dict[str, Any], bands: Iterable[str], archive: Archive) -> dict[str, str]:
    keys = {band: archive.asset_keys[band] for band in bands}
    missing = [key for key in keys.values() if key not in feature["assets"]]
    if missing:
        raise ItemError(f"has no asset {', '.join(missing)}")
    # A query part would be somebody's signature: hrefs are kept without it and signed when they are read.
    return {band: str(feature["assets"][key]["href"]).partition("?")[0] for band, key in keys.items()}


def _relative_orbit(feature: dict[str, Any]) -> int:
    properties = feature["properties"]
    if "sat:relative_orbit" in properties:
        return int(properties["sat:relative_orbit"])
    # Earth Search leaves it out; the product's name has it as _R022_.
    for part in str(properties.get("s2:product_uri", feature["id"])).split("_"):
        if len(part) == 4 and part[0] == "R" and part[1:].isdigit():
            return int(part[1:])
    raise ItemError("has no sat:relative_orbit")
