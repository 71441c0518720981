"""Named points, boxes and polygons from a file: areas to keep out, cities to sample around, land."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import shapely
from numpy.typing import NDArray

_BOX: Final = ("west", "south", "east", "north")
_POINT: Final = ("lon", "lat")
_NAMES: Final = ("name", "id", "cell")


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """What a file of places holds, in its order."""

    names: list[str]
    """From the column or property `name` or `id`; else the number of the row, from 1."""

    shapes: NDArray[Any]
    """(n,) geometries in longitude/latitude; what crosses the antimeridian goes on beyond 180."""

    population: NDArray[np.float64]
    """(n,) from the column or property `population`; 0 where there is none."""


def read_places(path: str) -> Places:
    """Read a GeoJSON, GeoParquet, Parquet or CSV file.

    Parquet and CSV files have columns `lon` and `lat`, or `west`, `south`, `east` and `north`, all in degrees, or in
    GeoParquet a geometry. A box whose west is greater than its east crosses the antimeridian. So does a polygon that is
    wider than half the world, unless it reaches all the way from -180 to 180.

    Raises:
        ValueError: Not such a file, nothing in it, or a place that is not on the globe.
    """
    reader = _from_geojson if path.endswith(("json", "geojson")) else _from_table
    places = reader(path)
    if not places.names:
        raise ValueError(f"{path}: holds no place")
    bounds = shapely.bounds(places.shapes)
    with np.errstate(invalid="ignore"):
        on_globe = (bounds >= (-180, -90, -180, -90)).all(axis=1) & (bounds <= (360, 90, 360, 90)).all(axis=1)
    if not on_globe.all():
        first = int(np.argmin(on_globe))
        where = bounds[first].tolist()
        raise ValueError(f"{path}: {places.names[first]} is not in degrees of longitude and latitude (bounds {where})")
    return places


def read_table(path: str) -> pa.Table:
    """A Parquet or CSV file with a header.

    Raises:
        ValueError: Not such a file.
    """
    try:
        return pa.parquet.read_table(path) if path.endswith("parquet") else pa.csv.read_csv(path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error})") from error
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path}: is neither Parquet nor CSV with a header ({error})") from error


def _from_geojson(path: str) -> Places:
    try:
        content = json.loads(Path(path).read_text())
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ValueError(f"{path}: is not JSON ({error})") from error
    try:
        kind = content["type"]
        features = content["features"] if kind == "FeatureCollection" else [content]
        features = [f if f["type"] == "Feature" else {"properties": {}, "geometry": f} for f in features]
        shapes = [shapely.geometry.shape(feature["geometry"]) for feature in features]
        properties = [{"id": feature.get("id"), **(feature.get("properties") or {})} for feature in features]
    except (KeyError, TypeError, AttributeError, shapely.errors.ShapelyError) as error:
        raise ValueError(f"{path}: is not GeoJSON ({error!r})") from error
    return Places(
        names=[_name(row, number) for number, row in enumerate(properties, 1)],
        shapes=_unwrapped(np.array(shapes, dtype=object)),
        population=np.array([row.get("population") or 0 for row in properties], np.float64),
    )


def _from_table(path: str) -> Places:
    table = read_table(path)
    geo = (table.schema.metadata or {}).get(b"geo")
    if geo:
        shapes = _unwrapped(_wkb_column(path, table, json.loads(geo)))
    elif all(name in table.column_names for name in _BOX):
        west, south, east, north = (_numbers(table, name) for name in _BOX)
        shapes = shapely.box(west, south, np.where(east < west, east + 360.0, east), north)
    elif all(name in table.column_names for name in _POINT):
        shapes = shapely.points(*(_numbers(table, name) for name in _POINT))
    else:
        raise ValueError(f"{path}: has neither lon and lat nor west, south, east and north, but {table.column_names}")
    named = table.select([name for name in _NAMES if name in table.column_names]).to_pylist()
    population = _numbers(table, "population") if "population" in table.column_names else np.zeros(len(shapes))
    return Places(
        names=[_name(row, number) for number, row in enumerate(named or [{}] * len(shapes), 1)],
        shapes=_valid(shapes),
        population=np.nan_to_num(population),
    )


def _wkb_column(path: str, table: pa.Table, geo: dict[str, Any]) -> NDArray[Any]:
    column = geo["columns"][geo["primary_column"]]
    crs = column.get("crs")
    if column["encoding"] != "WKB" or (crs and crs.get("id", {}).get("code") not in ("CRS84", 4326)):
        raise ValueError(f"{path}: its geometry is not WKB in longitude/latitude; convert it to EPSG:4326")
    shapes: NDArray[Any] = shapely.from_wkb(table[geo["primary_column"]].to_numpy(zero_copy_only=False))
    return shapes


def _numbers(table: pa.Table, name: str) -> NDArray[np.float64]:
    """(n,) of a column, NaN where it is empty."""
    return np.asarray(table[name].cast(pa.float64()).to_numpy(zero_copy_only=False), np.float64)


def _name(row: dict[str, Any], number: int) -> str:
    return next((str(row[key]) for key in _NAMES if row.get(key) not in (None, "")), str(number))


def _unwrapped(shapes: NDArray[Any]) -> NDArray[Any]:
    """Valid shapes whose longitudes run on beyond 180 instead of around the world."""
    west, _, east, _ = shapely.bounds(shapes).T
    with np.errstate(invalid="ignore"):
        wide = (east - west > 180.0) & ((west > -180.0) | (east < 180.0))
    for place in np.flatnonzero(wide):
        shapes[place] = shapely.transform(shapes[place], lambda c: c + np.where(c[:, :1] < 0.0, (360.0, 0.0), 0.0))
    return _valid(shapes)


def _valid(shapes: NDArray[Any]) -> NDArray[Any]:
    # What has no coordinates is refused later, with its name.
    broken = ~shapely.is_valid(shapes) & np.isfinite(shapely.bounds(shapes)).all(axis=1)
    shapes[broken] = shapely.make_valid(shapes[broken])
    return shapes
