"""Where and when: what a user writes for a region and a period."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from pathlib import Path

import shapely
from shapely.geometry.base import BaseGeometry

_DATE = re.compile(r"(\d{4})(?:-(\d{2}))?(?:-(\d{2}))?")


def parse_region(text: str) -> BaseGeometry:
    """A region from ``west,south,east,north`` in degrees or from a GeoJSON file.

    A box whose west is greater than its east crosses the antimeridian and becomes two parts.

    Raises:
        ValueError: Not four numbers and not a readable GeoJSON polygon, or outside longitude/latitude.
    """
    numbers = text.split(",")
    region = _box(text, numbers) if len(numbers) == 4 else _geojson(text)
    west, south, east, north = region.bounds
    if west < -180 or east > 180 or south < -90 or north > 90:
        raise ValueError(f"region={text}: not in degrees of longitude and latitude (bounds {region.bounds})")
    if region.area == 0:
        raise ValueError(f"region={text}: has no area")
    if south < -80 or north > 84:
        raise ValueError(f"region={text}: reaches beyond the UTM zones (80 S to 84 N)")
    return region


def parse_period(text: str) -> tuple[datetime, datetime]:
    """A half-open UTC period from ``2023``, ``2023-06``, ``2023-06-01`` or two of these joined by ``/``.

    Returns:
        Start of the first day, and start of the day after the last one.

    Raises:
        ValueError: Not a date, or the end before the start.
    """
    first, _, last = text.partition("/")
    start, end = _start(first, text), _end(last or first, text)
    if end <= start:
        raise ValueError(f"period={text}: ends before it starts")
    return start, end


def _box(text: str, numbers: list[str]) -> BaseGeometry:
    try:
        west, south, east, north = (float(number) for number in numbers)
    except ValueError as error:
        raise ValueError(f"region={text}: expected west,south,east,north in degrees") from error
    if south >= north:
        raise ValueError(f"region={text}: south must be below north")
    if west <= east:
        return shapely.box(west, south, east, north)
    return shapely.MultiPolygon([shapely.box(west, south, 180, north), shapely.box(-180, south, east, north)])


def _geojson(text: str) -> BaseGeometry:
    try:
        content = json.loads(Path(text).read_text())
    except OSError as error:
        raise ValueError(f"region={text}: neither four numbers nor a readable file ({error.strerror})") from error
    except ValueError as error:
        raise ValueError(f"region={text}: is not JSON ({error})") from error
    try:
        geometry = shapely.union_all(_geometries(content))
    except (KeyError, TypeError, AttributeError, shapely.errors.ShapelyError) as error:
        raise ValueError(f"region={text}: is not GeoJSON ({error!r})") from error
    if not shapely.is_valid(geometry):
        raise ValueError(f"region={text}: {shapely.is_valid_reason(geometry)}")
    return geometry


def _geometries(content: dict[str, object]) -> list[BaseGeometry]:
    if content["type"] == "FeatureCollection":
        features = content["features"]
        assert isinstance(features, list)
        return [geometry for feature in features for geometry in _geometries(feature)]
    geometry = content["geometry"] if content["type"] == "Feature" else content
    return [shapely.geometry.shape(geometry)]


def _start(date: str, text: str) -> datetime:
    match = _DATE.fullmatch(date)
    if not match:
        raise ValueError(f"period={text}: expected dates such as 2023, 2023-06 or 2023-06-01")
    year, month, day = match.groups()
    try:
        return datetime(int(year), int(month or 1), int(day or 1), tzinfo=UTC)
    except ValueError as error:
        raise ValueError(f"period={text}: {error}") from error


def _end(date: str, text: str) -> datetime:
    start = _start(date, text)
    match date.count("-"):
        case 0:
            return start.replace(year=start.year + 1)
        case 1:
            return start.replace(year=start.year + start.month // 12, month=start.month % 12 + 1)
        case _:
            return datetime.fromtimestamp(start.timestamp() + 86400, tz=UTC)
