"""Searching an archive: STAC in, items without their archive's quirks out."""

from __future__ import annotations

import os
from datetime import datetime
from typing import Any

import shapely
from shapely.geometry.base import BaseGeometry

from pipeline.access import Access, DirectAccess
from pipeline.archives import Archive
from pipeline.catalog_client import Catalog, Patience, SearchError
from pipeline.catalog_footprints import ItemError
from pipeline.catalog_items import offset_dn, parse_item, slim, wanted_fields
from pipeline.catalog_results import Found, Noted, Refused, judge, settle
from pipeline.search_pieces import Piece, boxes_of, pieces_of
from pipeline.types import Item, Sensor

__all__ = [
    "Catalog", "Found", "ItemError", "Noted", "Patience", "Refused", "SearchError", "collection_of", "offset_dn",
    "parse_item", "require_account", "require_collection", "search", "search_labels", "search_piece",
]  # fmt: skip


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


def collection_of(archive: Archive, sensor: Sensor) -> str:
    """The collection of a sensor.

    Raises:
        SearchError: The archive has none that can be used.
    """
    collection = archive.optical_collection if sensor == "optical" else archive.radar_collection
    if collection is None:
        raise SearchError(f"{archive.name} has no Sentinel-1 that can be used: {archive.radar_refusal}")
    return collection


def search(
    archive: Archive, sensor: Sensor, region: BaseGeometry, period: tuple[datetime, datetime]
) -> tuple[list[Item], list[tuple[str, str]]]:
    """Every item of one sensor that meets a region in a period, asked for one piece after the other and not kept.

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
    collection = collection_of(archive, sensor)
    access = DirectAccess()
    catalog = Catalog.open(archive.stac_url, access)
    features = [
        feature
        for piece in pieces_of(region, period)
        for feature in search_piece(catalog, archive, sensor, piece, access)
    ]
    if not features:
        require_collection(catalog, collection, access)
    found = settle(judge(features, archive, sensor, region, period))
    return found.items, [(entry.item, entry.reason) for entry in found.refused]


def search_piece(
    catalog: Catalog,
    archive: Archive,
    sensor: Sensor,
    piece: Piece,
    access: Access,
    patience: Patience | None = None,
) -> list[dict[str, Any]]:
    """What a server says of one piece, slimmed and not yet judged; at least what lies in it, perhaps more.

    Raises:
        SearchError: The message names the piece.
    """
    found = catalog.features(
        collection_of(archive, sensor),
        piece.bounds,
        (piece.start, piece.end),
        access,
        fields=wanted_fields(archive, sensor),
        patience=patience,
    )
    return [slim(feature, archive, sensor) for feature in found]


def require_collection(catalog: Catalog, collection: str, access: Access, patience: Patience | None = None) -> None:
    """Tell a search that found nothing from one in a collection that is not there.

    Raises:
        SearchError: It is not there.
    """
    if not catalog.has_collection(collection, access, patience):
        raise SearchError(f"{catalog.url} has no collection {collection}")


def search_labels(
    archive: Archive, label: str, region: BaseGeometry, access: Access | None = None
) -> list[tuple[str, str, BaseGeometry]]:
    """(item id, href of its map, footprint) of a label collection over a region.

    Args:
        archive: Whom to ask.
        label: Name of one of its label collections.
        region: Longitude/latitude.
        access: How the archive may be reached; directly unless given.

    Raises:
        SearchError: The archive has no such label, or none here.
    """
    if label not in archive.label_collections:
        raise SearchError(
            f"{archive.name} has no label {label!r}; known: {', '.join(archive.label_collections) or 'none'}"
        )
    collection = archive.label_collections[label]
    access = access or DirectAccess()
    catalog = Catalog.open(archive.stac_url, access)
    newest: dict[bytes, tuple[str, str, BaseGeometry]] = {}
    for box in boxes_of(region):
        for feature in sorted(catalog.features(collection, box, None, access), key=lambda f: str(f["id"])):
            footprint = shapely.geometry.shape(feature["geometry"])
            if footprint.intersects(region):
                href = str(feature["assets"]["map"]["href"]).partition("?")[0]
                newest[shapely.normalize(footprint).wkb] = (str(feature["id"]), href, footprint)
    if not newest:
        raise SearchError(f"{collection} on {archive.name} has no item over the region")
    return sorted(newest.values(), key=lambda entry: entry[0])
