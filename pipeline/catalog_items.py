"""What an archive answers as `Item`s, without the archive's quirks: understood, repaired, or refused with a reason."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import shapely

from pipeline.archives import Archive
from pipeline.bands import OPTICAL_BANDS, RADAR_BANDS, SCENE_CLASSIFICATION
from pipeline.catalog_footprints import Feature, ItemError, footprint_of
from pipeline.redaction import redact
from pipeline.types import Item, Sensor

PROPERTIES = (
    "datetime", "start_datetime", "end_datetime", "created", "updated", "platform", "constellation",
    "eo:cloud_cover", "grid:code", "s2:mgrs_tile", "s2:processing_baseline", "s2:product_uri", "s2:datatake_id",
    "s2:datastrip_id", "s2:generation_time", "s2:nodata_pixel_percentage", "earthsearch:boa_offset_applied",
    "sat:orbit_state", "sat:relative_orbit", "sat:absolute_orbit", "sar:instrument_mode", "sar:polarizations",
    "sar:product_type", "proj:epsg", "proj:code", "proj:bbox", "proj:shape", "proj:transform",
)  # fmt: skip
"""What of an item's properties is asked for and kept."""

ASSET_FIELDS = ("href", "type", "proj:epsg", "proj:code", "raster:bands", "raster:offset", "bands")
"""What of an asset is asked for and kept; of others than the reference band only what locates it."""

OFFSET_BAND = "B02"
"""The band whose published offset is compared with what the baseline says; an archive shifts all or none."""

_PRODUCT_IN_TIME = re.compile(r"S2[A-Z]_MSIL\w{2}_(\d{8}T\d{6})_")
_DATATAKE_IN = (re.compile(r"GS2[A-Z]_(\d{8}T\d{6})_"), _PRODUCT_IN_TIME, _PRODUCT_IN_TIME)
_ORBIT_IN: dict[Sensor, re.Pattern[str]] = {
    "optical": re.compile(r"GS2[A-Z]_\d{8}T\d{6}_(\d{6})(?!\d)"),
    "radar": re.compile(r"S1[A-Z]_\w+_\d{8}T\d{6}_\d{8}T\d{6}_(\d{6})_[0-9A-F]{6}(?![0-9A-F])"),
}

_FIRST_OFFSET_BASELINE = (4, 0)
_OFFSET_DN = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Parsed:
    """An item that was understood."""

    item: Item
    notes: tuple[str, ...]

    processed: tuple[int, ...]
    """Processing baseline; empty for radar."""

    generated: str
    """When the granule was made, as the archive writes it; the item's id where it does not say."""


def parse_item(feature: Feature, archive: Archive, sensor: Sensor) -> Item:
    """One STAC item (1.0 or 1.1, projection extension 1 or 2) as an `Item`.

    Raises:
        ItemError: See `parse`.
    """
    return parse(feature, archive, sensor).item


def parse(feature: Feature, archive: Archive, sensor: Sensor) -> Parsed:
    """One STAC item (1.0 or 1.1, projection extension 1 or 2), with what was repaired.

    Raises:
        ItemError: A missing asset or field, or a geometry that is neither in degrees nor can be brought there.
    """
    try:
        return _parse(slim(feature, archive, sensor), archive, sensor)
    except ItemError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, shapely.errors.ShapelyError) as error:
        raise ItemError(f"cannot be understood: {redact(repr(error))}") from error


def slim(feature: Feature, archive: Archive, sensor: Sensor) -> dict[str, Any]:
    """The item with what `parse` looks at, and with hrefs that nobody signed; equal whatever else a server sent."""
    keys = {archive.asset_keys[band]: band for band in _bands(sensor)}
    found = (feature.get("properties"), feature.get("assets"))
    properties, assets = (part if isinstance(part, Mapping) else {} for part in found)
    return {
        "type": "Feature",
        "stac_version": str(feature.get("stac_version", "1.0.0")),
        "id": str(feature.get("id") or ""),
        "collection": feature.get("collection"),
        "geometry": feature.get("geometry"),
        "properties": {k: properties[k] for k in PROPERTIES if properties.get(k) is not None},
        "assets": {
            key: _slim_asset(assets[key], reference=keys[key] == OFFSET_BAND)
            for key in sorted(keys)
            if isinstance(assets.get(key), Mapping)
        },
        "links": [],
    }


def wanted_fields(archive: Archive, sensor: Sensor) -> list[str]:
    """What `slim` keeps, as a server with the fields extension is asked for it."""
    places = ("href", "type", "proj:epsg", "proj:code")
    keys = [archive.asset_keys[band] for band in _bands(sensor)]
    offsets = archive.asset_keys[OFFSET_BAND]
    assets = [f"assets.{key}.{place}" for key in keys for place in (ASSET_FIELDS if key == offsets else places)]
    return ["type", "stac_version", "id", "collection", "geometry", *(f"properties.{p}" for p in PROPERTIES), *assets]


def offset_dn(properties: Mapping[str, Any], baseline: str, archive: Archive) -> int:
    """What was added to the digital numbers of an optical item; decided by its baseline, never by its date.

    Raises:
        ItemError: The item does not say its baseline.
    """
    processed = _version(baseline)
    if archive.offset_rule == "baseline_unless_flagged" and properties.get("earthsearch:boa_offset_applied"):
        return 0
    return _OFFSET_DN if processed >= _FIRST_OFFSET_BASELINE else 0


def _parse(feature: Feature, archive: Archive, sensor: Sensor) -> Parsed:
    properties = feature["properties"]
    notes: list[str] = []
    if not feature["id"]:
        raise ItemError("has no id")
    baseline, offset, cloud_percent = "", 0, 0.0
    processed: tuple[int, ...] = ()
    assets = _hrefs(feature, _bands(sensor), archive)
    epsg = _epsg(feature)
    if sensor == "optical":
        baseline = str(properties.get("s2:processing_baseline", ""))
        processed = _version(baseline)
        offset = offset_dn(properties, baseline, archive)
        notes += _doubts_on_offset(feature, offset, archive)
        cloud_percent = _cloud_percent(properties, notes)
    item = Item(
        id=str(feature["id"]),
        collection=str(feature.get("collection") or ""),
        sensor=sensor,
        datetime=_datetime(properties),
        epsg=epsg,
        footprint=footprint_of(feature, epsg, notes),
        assets=assets,
        platform=str(properties.get("platform", "")).lower(),
        tile=str(properties.get("s2:mgrs_tile") or properties.get("grid:code") or "").removeprefix("MGRS-"),
        relative_orbit=_relative_orbit(feature),
        absolute_orbit=_absolute_orbit(feature, sensor),
        datatake=_datatake(feature) if sensor == "optical" else "",
        orbit_state=str(properties.get("sat:orbit_state") or ""),
        cloud_percent=cloud_percent,
        baseline=baseline,
        offset_dn=offset,
    )
    generated = str(properties.get("s2:generation_time") or item.id)
    return Parsed(item=item, notes=tuple(notes), processed=processed, generated=generated)


def _bands(sensor: Sensor) -> tuple[str, ...]:
    return (*OPTICAL_BANDS, SCENE_CLASSIFICATION) if sensor == "optical" else RADAR_BANDS


def _slim_asset(asset: Mapping[str, Any], *, reference: bool) -> dict[str, Any]:
    names = ASSET_FIELDS if reference else ("href", "type", "proj:epsg", "proj:code")
    kept = {name: asset[name] for name in names if asset.get(name) is not None}
    # A query part would be somebody's signature: hrefs are kept without it and signed when they are read.
    return {**kept, "href": str(asset.get("href") or "").partition("?")[0]}


def _version(baseline: str) -> tuple[int, ...]:
    try:
        major, minor = (int(part) for part in baseline.split("."))
    except ValueError:
        raise ItemError(f"s2:processing_baseline is {baseline!r}: cannot tell whether 1000 was added") from None
    return (major, minor)


def _doubts_on_offset(feature: Feature, offset: int, archive: Archive) -> list[str]:
    """Where an offset is published and means something, whether it agrees with the baseline."""
    published = _published_offset(feature["assets"][archive.asset_keys[OFFSET_BAND]])
    if archive.offset_rule != "baseline" or published is None or round(published * -10_000) == offset:
        return []
    return [f"publishes an offset of {published:g}, but its processing baseline says {-offset / 10_000:g}: taken"]


def _published_offset(asset: Mapping[str, Any]) -> float | None:
    """Of the raster extension: in `raster:bands` (STAC 1.0), in `bands` or in the asset itself (1.1)."""
    first = (asset.get("bands") or [{}])[0]
    older = (asset.get("raster:bands") or [{}])[0]
    found = (older.get("offset"), first.get("raster:offset"), asset.get("raster:offset"))
    return next((float(value) for value in found if value is not None), None)


def _cloud_percent(properties: Mapping[str, Any], notes: list[str]) -> float:
    if properties.get("eo:cloud_cover") is None:
        notes.append("has no eo:cloud_cover: taken as free of cloud until its pixels are read")
        return 0.0
    return float(properties["eo:cloud_cover"])


def _datetime(properties: Mapping[str, Any]) -> datetime:
    text = properties.get("datetime") or properties.get("start_datetime")
    if not text:
        raise ItemError("has no datetime")
    parsed = datetime.fromisoformat(text)
    return parsed.replace(tzinfo=UTC) if parsed.tzinfo is None else parsed.astimezone(UTC)


def _epsg(feature: Feature) -> int:
    for fields in (feature["properties"], *feature["assets"].values()):
        if fields.get("proj:code"):
            return int(str(fields["proj:code"]).removeprefix("EPSG:"))
        if fields.get("proj:epsg"):
            return int(fields["proj:epsg"])
    raise ItemError("has neither proj:code nor proj:epsg")


def _hrefs(feature: Feature, bands: Iterable[str], archive: Archive) -> dict[str, str]:
    keys = {band: archive.asset_keys[band] for band in bands}
    missing = [key for key in keys.values() if key not in feature["assets"]]
    if missing:
        raise ItemError(f"has no asset {', '.join(missing)}")
    hrefs = {band: str(feature["assets"][key]["href"]) for band, key in keys.items()}
    if not all(hrefs.values()):
        raise ItemError(f"has no href for {', '.join(band for band, href in hrefs.items() if not href)}")
    return hrefs


def _datatake(feature: Feature) -> str:
    """Start of the datatake, from its id as in ``GS2A_20230602T100601_041489_N05.09`` or from the product's name.

    The id without what processing adds to it; else an item that was processed again would be of another overpass.
    """
    properties = feature["properties"]
    named = (properties.get("s2:datatake_id"), properties.get("s2:product_uri"), feature["id"])
    found = (pattern.match(str(name or "")) for pattern, name in zip(_DATATAKE_IN, named, strict=True))
    return next((match[1] for match in found if match), "")


def _absolute_orbit(feature: Feature, sensor: Sensor) -> int | None:
    """As the item says, or as its datatake's id or its product's name has it."""
    properties = feature["properties"]
    if properties.get("sat:absolute_orbit") is not None:
        return int(properties["sat:absolute_orbit"])
    named = properties.get("s2:datatake_id") if sensor == "optical" else feature["id"]
    match = _ORBIT_IN[sensor].match(str(named or ""))
    return int(match[1]) if match else None


def _relative_orbit(feature: Feature) -> int:
    properties = feature["properties"]
    if properties.get("sat:relative_orbit") is not None:
        return int(properties["sat:relative_orbit"])
    # Earth Search leaves it out; the product's name has it as _R022_.
    for part in str(properties.get("s2:product_uri") or feature["id"]).split("_"):
        if len(part) == 4 and part[0] == "R" and part[1:].isdigit():
            return int(part[1:])
    raise ItemError("has no sat:relative_orbit")
