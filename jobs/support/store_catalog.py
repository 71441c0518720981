"""A store as other tools find it: a STAC Collection, and its chips as STAC items in GeoParquet.

Both lie in the version they describe, below the group `versions` that Zarr readers see as empty: a sealed version and
its description stay as they are, and move with the store, since every link is relative.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from itertools import chain
from typing import Any, Final

import geopandas
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import shapely
from numpy.typing import NDArray
from pyproj import CRS

from jobs.support.ledger_rows import ledger_rows
from pipeline.antimeridian import within_180
from pipeline.archives import Archive, known_archives
from pipeline.chip_places import footprints, georeferences, place_columns
from pipeline.chip_table import WRITTEN
from pipeline.grid import PIXEL_M
from pipeline.layout import ArraySpec, Layout
from pipeline.objects import Objects
from pipeline.store import Store, StoreError
from pipeline.types import Watch, unwatched
from pipeline.versions import Version

COLLECTION: Final = "collection.json"
FOLDER: Final = "stac"
STAC_VERSION: Final = "1.1.0"

_ROWS_PER_FILE: Final = 1 << 17
_ROWS_PER_GROUP: Final = 10_000
"""Few enough that a box around a town skips most of a file."""

_STORE_FROM_HERE: Final = "../../.."
"""From versions/NNNN/stac to the Zarr group."""

_EXTENSION: Final = "https://stac-extensions.github.io"
PROJECTION: Final = f"{_EXTENSION}/projection/v2.0.0/schema.json"
SAT: Final = f"{_EXTENSION}/sat/v1.2.0/schema.json"
RASTER: Final = f"{_EXTENSION}/raster/v2.0.0/schema.json"
VERSION: Final = f"{_EXTENSION}/version/v1.2.0/schema.json"

_ZARR_TYPE: Final = "application/vnd.zarr; version=3"
_PARQUET_TYPE: Final = "application/vnd.apache.parquet"

_FRACTIONS: Final = (
    "valid_fraction", "clear_fraction", "cloud_fraction", "shadow_fraction", "snow_fraction", "radar_valid_fraction",
    "border_noise_fraction",
)  # fmt: skip
_MANIFEST: Final = (
    "pair", "unit", "optical_items", "radar_items", "optical_datetime", "radar_datetime", "dt_s", "orbit_state",
    "relative_orbit", "baseline", "offset_dn", "overlap",
)  # fmt: skip
_CHIPS: Final = ("row", "cell", "split", "sha256", "flags", *_FRACTIONS)
_OWN: Final = ("row", "cell", "split", "pair", "unit", "sha256", "flags", "dt_s", "baseline", "offset_dn", "overlap")
"""Columns that items carry as `twinlook:<name>`, beside the fractions and the items that a chip was made from."""

_DATA_TERMS: Final = "https://sentinels.copernicus.eu/documents/247904/690755/Sentinel_Data_Legal_Notice"

Summary = dict[str, Any]


def write_catalog(version: Version, *, rows_per_file: int = _ROWS_PER_FILE, watch: Watch = unwatched) -> str:
    """Describe a sealed version, unless its description is there already.

    The items of this version's chips go into files of bounded size, one after another; the collection, written last,
    names them and those of the versions before it. Equal stores give equal files.

    Args:
        version: Sealed; of those before it, what lacks a description gets one.
        rows_per_file: So many chips are in memory at a time.
        watch: Shows how many candidates have been gone through.

    Returns:
        Where the collection is.

    Raises:
        StoreError: The version is not sealed.
    """
    collection: Summary | None = None
    for each in version.versions():
        if each.state != "sealed":
            raise StoreError(f"{each.name} is not sealed: it has no description yet")
        folder = each.objects.child(FOLDER)
        if folder.exists(COLLECTION):
            collection = folder.get_json(COLLECTION)
            continue
        files = _write_items(each, folder, rows_per_file, watch)
        collection = _collection(each, collection, files)
        folder.put_json(COLLECTION, collection)
    return f"{version.objects.url}/{FOLDER}/{COLLECTION}"


def collection_id(version: Version) -> str:
    """Of a store, whatever its version: its name."""
    return version.url.rpartition("/")[2].removesuffix(".zarr") or "chips"


# Items ---------------------------------------------------------------------------------------------------------------


def _write_items(version: Version, folder: Objects, rows_per_file: int, watch: Watch) -> list[Summary]:
    """Write a version's own chips as items; returns what each file holds."""
    layout = Store.open(version.url).layout
    columns = (*_MANIFEST, *place_columns(layout))
    labels = [f"label_{name}" for name in layout.chip_labels]
    batches = ledger_rows(version, manifest=columns, chips=(*_CHIPS, *labels), own=True, watch=watch)
    written = (batch.filter(pc.equal(batch["status"], WRITTEN)) for batch in batches)
    files: list[Summary] = []
    for rows in _gathered(written, rows_per_file):
        name = f"items-{len(files):05d}.parquet"
        table, summary = _items(rows, layout, collection_id(version), labels)
        if not table.num_rows:
            continue
        folder.put(name, _parquet(table, summary["geometry_types"], summary["bbox"]))
        files.append({"name": name, "version": version.number, **summary})
    return files


def _gathered(batches: Iterator[pa.Table], number: int) -> Iterator[pa.Table]:
    """The same rows in tables of so many."""
    waiting: list[pa.Table] = []
    size = 0
    for batch in batches:
        for start in range(0, batch.num_rows, number):
            waiting.append(batch.slice(start, number))
            size += waiting[-1].num_rows
            while size >= number:
                table = pa.concat_tables(waiting, promote_options="default")
                yield table.slice(0, number)
                waiting, size = [table.slice(number)], size - number
    if size:
        yield pa.concat_tables(waiting, promote_options="default")


def _items(rows: pa.Table, layout: Layout, collection: str, labels: Sequence[str]) -> tuple[pa.Table, Summary]:
    """Chips as a STAC-GeoParquet table along a Hilbert curve, and what the collection says of them."""
    crs, transform = georeferences(rows, layout)
    corners = footprints(crs, transform, side_px=layout.side_px)
    there = np.asarray(np.isfinite(corners).reshape(len(corners), -1).all(axis=1))
    # An item without a geometry has no box either; a column of boxes cannot say that.
    rows, corners, transform = rows.filter(pa.array(there)), corners[there], transform[there]
    codes = [code for code, kept in zip(crs, there.tolist(), strict=True) if kept]
    outlines = shapely.polygons(np.concatenate([corners, corners[:, :1]], axis=1))
    for place in np.flatnonzero(corners[:, :, 0].max(axis=1, initial=-np.inf) > 180):
        outlines[place] = shapely.orient_polygons(within_180(outlines[place]))
    geometry = geopandas.GeoSeries(outlines, crs="OGC:CRS84")
    order = np.argsort(geometry.hilbert_distance().to_numpy(), kind="stable") if len(rows) else np.empty(0, np.int64)
    rows, outlines, transform = rows.take(pa.array(order)), outlines[order], transform[order]
    codes = [codes[place] for place in order]
    table = _table(rows, layout, collection, labels, codes, outlines, transform)
    return table, _summary(rows, codes, outlines)


def _table(
    rows: pa.Table,
    layout: Layout,
    collection: str,
    labels: Sequence[str],
    crs: Sequence[str],
    outlines: NDArray[Any],
    transform: NDArray[np.float64],
) -> pa.Table:
    number = rows.num_rows
    first, last = _span(rows)
    looks = (rows[f"{sensor}_datetime"].combine_chunks() for sensor in ("optical", "radar"))
    codes, wkt = _projections(crs)
    extensions = [PROJECTION, *([SAT] if layout.has_radar else [])]
    names = rows["row"].to_pylist()
    fields: dict[str, Any] = {
        "type": ["Feature"] * number,
        "stac_version": [STAC_VERSION] * number,
        "stac_extensions": pa.array([extensions] * number, pa.list_(pa.string())),
        "id": [f"{collection}-{row:09d}" for row in names],
        "geometry": pa.array(shapely.to_wkb(outlines), pa.binary()),
        "bbox": _boxes(outlines),
        "links": _links(collection, number),
        "assets": _assets(number),
        "collection": [collection] * number,
        "datetime": pc.coalesce(*looks),
        "start_datetime": first,
        "end_datetime": last,
        "proj:code": codes,
        "proj:shape": pa.array([[layout.side_px] * 2] * number, pa.list_(pa.int64())),
        "proj:transform": pa.array(transform.tolist(), pa.list_(pa.float64())),
        "gsd": pa.array([float(PIXEL_M)] * number),
    }
    if wkt is not None:
        fields["proj:wkt2"] = wkt
    if layout.has_radar:
        fields["sat:orbit_state"] = _or_null(rows["orbit_state"])
        fields["sat:relative_orbit"] = rows["relative_orbit"]
    for name in (*_OWN, "optical_items", "radar_items", "optical_datetime", "radar_datetime", *_FRACTIONS, *labels):
        if not pa.types.is_null(rows[name].type):
            fields[f"twinlook:{name}"] = _known(rows[name])
    return pa.table(fields)


def _span(rows: pa.Table) -> tuple[pa.Array, pa.Array]:
    """When the earlier and the later look were taken; where nothing is known, the whole of Sentinel's time."""
    columns = [rows[f"{sensor}_datetime"].combine_chunks() for sensor in ("optical", "radar")]
    kind = columns[0].type
    # Arrow compares moments in UTC as numbers only.
    numbers = [column.cast(pa.int64()) for column in columns]
    first, last = (least(*numbers).cast(kind) for least in (pc.min_element_wise, pc.max_element_wise))
    return pc.fill_null(first, pa.scalar(_BEGAN, kind)), pc.fill_null(last, pa.scalar(_NEVER_LATER, kind))


_BEGAN: Final = datetime(2014, 4, 3, tzinfo=UTC)
"""Launch of the first Sentinel-1."""

_NEVER_LATER: Final = datetime(2099, 12, 31, tzinfo=UTC)


def _projections(crs: Sequence[str]) -> tuple[pa.Array, pa.Array | None]:
    """Codes such as EPSG:32633, and the text of systems without one; None where all have one."""
    known = {text: CRS.from_user_input(text).to_authority() for text in set(crs)}
    codes = {text: ":".join(found) if found else None for text, found in known.items()}
    column = pa.array([codes[text] for text in crs], pa.string())
    if all(codes.values()):
        return column, None
    return column, pa.array([None if codes[text] else CRS.from_user_input(text).to_wkt() for text in crs], pa.string())


def _boxes(outlines: NDArray[Any]) -> pa.StructArray:
    """(west, south, east, north) of each outline; across the antimeridian west is greater than east."""
    bounds = shapely.bounds(outlines)
    for place in np.flatnonzero(bounds[:, 2] - bounds[:, 0] > 180):
        lon = shapely.get_coordinates(outlines[place])[:, 0]
        bounds[place, 0], bounds[place, 2] = lon[lon > 0].min(), lon[lon < 0].max()
    names = ("xmin", "ymin", "xmax", "ymax")
    return pa.StructArray.from_arrays([pa.array(bounds[:, index]) for index in range(4)], names=names)


def _links(collection: str, number: int) -> pa.Array:
    link = {"rel": "collection", "href": f"./{COLLECTION}", "type": "application/json", "title": collection}
    kind = pa.list_(pa.struct([(name, pa.string()) for name in link]))
    return pa.array([[link]] * number, kind)


def _assets(number: int) -> pa.StructArray:
    asset = {
        "href": _STORE_FROM_HERE,
        "type": _ZARR_TYPE,
        "title": "Arrays of all chips; twinlook:row is this chip's place on their first axis",
    }
    columns = [pa.array([value] * number, pa.string()) for value in asset.values()]
    roles = pa.array([["data"]] * number, pa.list_(pa.string()))
    chips = pa.StructArray.from_arrays([*columns, roles], names=[*asset, "roles"])
    return pa.StructArray.from_arrays([chips], names=["chips"])


def _or_null(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.if_else(pc.equal(column, ""), pa.scalar(None, pa.string()), column)


def _known(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """NaN, which JSON has not, as null."""
    if not pa.types.is_floating(column.type):
        return column
    return pc.if_else(pc.is_nan(column), pa.scalar(None, column.type), column)


def _parquet(table: pa.Table, geometry_types: Sequence[str], bbox: Sequence[float]) -> bytes:
    geo = {
        "version": "1.1.0",
        "primary_column": "geometry",
        "columns": {
            "geometry": {
                "encoding": "WKB",
                "geometry_types": list(geometry_types),
                "crs": CRS.from_user_input("OGC:CRS84").to_json_dict(),
                "orientation": "counterclockwise",
                "edges": "planar",
                "bbox": list(bbox),
                "covering": {"bbox": {name: ["bbox", name] for name in ("xmin", "ymin", "xmax", "ymax")}},
            }
        },
    }
    metadata = {"geo": json.dumps(geo), "stac-geoparquet": json.dumps({"version": "1.0.0"})}
    sink = io.BytesIO()
    plain = {"id", "geometry", "bbox", "twinlook:row", "twinlook:sha256"}
    pq.write_table(
        table.replace_schema_metadata(metadata).combine_chunks(),
        sink,
        compression="zstd",
        row_group_size=_ROWS_PER_GROUP,
        use_dictionary=[name for name in table.column_names if name not in plain],
    )
    return sink.getvalue()


def _summary(rows: pa.Table, crs: Sequence[str], outlines: NDArray[Any]) -> Summary:
    """What the collection says of some items, such that summaries of several files add up."""
    first, last = _span(rows)
    orbits = rows["relative_orbit"]
    bounds = shapely.bounds(outlines)
    return {
        "chips": rows.num_rows,
        "bbox": [] if not len(outlines) else [*bounds[:, :2].min(axis=0).tolist(), *bounds[:, 2:].max(axis=0).tolist()],
        "interval": [_iso(pc.min(first).as_py()), _iso(pc.max(last).as_py())] if rows.num_rows else [],
        "geometry_types": sorted(set(geopandas.GeoSeries(outlines).geom_type)),
        "crs": sorted(set(crs)),
        "splits": sorted(rows["split"].drop_null().unique().to_pylist()),
        "orbit_states": sorted(set(rows["orbit_state"].drop_null().unique().to_pylist()) - {""}),
        "relative_orbits": sorted(orbits.drop_null().unique().to_pylist()),
        "baselines": sorted(set(rows["baseline"].drop_null().unique().to_pylist()) - {""}),
    }


# The collection ------------------------------------------------------------------------------------------------------


def _collection(version: Version, before: Summary | None, own_files: Sequence[Summary]) -> Summary:
    layout = Store.open(version.url).layout
    earlier = [
        {**each, "name": f"../../{each['version']:04d}/{FOLDER}/{each['name'].rpartition('/')[2]}"}
        for each in (before or {}).get("twinlook:files", [])
    ]
    files = [*earlier, *own_files]
    number = sum(each["chips"] for each in files)
    codes, _ = _projections(_union(files, "crs"))
    previous = f"../../{version.number - 1:04d}/{FOLDER}/{COLLECTION}"
    summaries: Summary = {
        "gsd": sorted({float(spec.resolution_m) for spec in layout.arrays().values()}),
        "proj:code": sorted({code for code in codes.to_pylist() if code}),
        "sat:orbit_state": _union(files, "orbit_states"),
        "sat:relative_orbit": _union(files, "relative_orbits"),
        "twinlook:split": _union(files, "splits"),
        "twinlook:baseline": _union(files, "baselines"),
        **_instruments(layout),
    }
    archive = known_archives().get(str(version.request.get("archive")))
    return {
        "type": "Collection",
        "stac_version": STAC_VERSION,
        "stac_extensions": [PROJECTION, RASTER, VERSION, *([SAT] if layout.has_radar else [])],
        "id": collection_id(version),
        "title": f"Chips of {collection_id(version)}",
        "description": _description(layout, number),
        "keywords": [
            "chips",
            "machine learning",
            *(["Sentinel-2"] * layout.has_optical),
            *(["Sentinel-1"] * layout.has_radar),
        ],
        "license": "other",
        "providers": _providers(archive),
        "version": str(version.number),
        "extent": {
            "spatial": {"bbox": [_outer([each["bbox"] for each in files if each["bbox"]])]},
            "temporal": {"interval": [_interval([each["interval"] for each in files if each["interval"]])]},
        },
        "summaries": {name: values for name, values in summaries.items() if values},
        "assets": _collection_assets(layout, files),
        "item_assets": {
            "chips": {"type": _ZARR_TYPE, "roles": ["data"], "title": "Arrays of all chips; twinlook:row is the chip's"}
        },
        "links": [
            {"rel": "root", "href": f"./{COLLECTION}", "type": "application/json"},
            *(
                {
                    "rel": "items",
                    "href": each["name"] if "/" in each["name"] else f"./{each['name']}",
                    "type": _PARQUET_TYPE,
                }
                for each in files
            ),
            *(_origins(archive) if archive else []),
            *([{"rel": "predecessor-version", "href": previous, "type": "application/json"}] if before else []),
        ],
        "twinlook:layout": layout.attributes(),
        "twinlook:request": version.request,
        "twinlook:ledger": version.counts(),
        "twinlook:files": files,
    }


def _description(layout: Layout, number: int) -> str:
    sensors = [
        *([f"Sentinel-2 {(layout.optical_level or '').upper()}"] if layout.has_optical else []),
        *([f"Sentinel-1 {(layout.radar_product or '').replace('_', ' ')}"] if layout.has_radar else []),
    ]
    return (
        f"{number} chips of {layout.side_px} x {layout.side_px} pixels of {PIXEL_M} m from {' and '.join(sensors)}, "
        "one row each on the first axis of the arrays of a Zarr v3 group. Rows without a chip are holes: go by the "
        "items."
    )


def _collection_assets(layout: Layout, files: Sequence[Summary]) -> Summary:
    arrays = {
        name: {
            "href": f"{_STORE_FROM_HERE}/{name}",
            "type": _ZARR_TYPE,
            "roles": ["data"],
            "title": f"{name}: (chip, {'band, ' if len(spec.shape) == 3 else ''}y, x) at {spec.resolution_m} m",
            "zarr:node_type": "array",
            "zarr:zarr_format": 3,
            **_array_facts(spec),
        }
        for name, spec in layout.arrays().items()
    }
    tables = {
        f"items-{place:05d}": {
            "href": each["name"] if "/" in each["name"] else f"./{each['name']}",
            "type": _PARQUET_TYPE,
            "roles": ["collection-mirror"],
            "title": f"{each['chips']} items, version {each['version']}",
        }
        for place, each in enumerate(files)
    }
    group = {
        "href": _STORE_FROM_HERE,
        "type": _ZARR_TYPE,
        "roles": ["data"],
        "title": "Zarr group with an array for each resolution and sensor",
        # The extension of these is not declared: its schema wants one of them in tables too.
        "zarr:node_type": "group",
        "zarr:zarr_format": 3,
        "zarr:consolidated": False,
    }
    return {"chips": group, **arrays, **tables}


def _array_facts(spec: ArraySpec) -> Summary:
    return {
        "data_type": spec.dtype.name,
        "nodata": spec.nodata,
        "unit": spec.units,
        "raster:scale": spec.scale,
        "raster:spatial_resolution": spec.resolution_m,
        "bands": [{"name": band} for band in spec.bands],
    }


def _instruments(layout: Layout) -> Summary:
    sensors = [("sentinel-2", "msi")] * layout.has_optical + [("sentinel-1", "c-sar")] * layout.has_radar
    return {"constellation": [name for name, _ in sensors], "instruments": [name for _, name in sensors]}


def _providers(archive: Archive | None) -> list[Summary]:
    processor = {"name": "twinlook", "roles": ["processor"]}
    if archive is None:
        return [processor]
    return [
        {"name": "European Union, Copernicus programme, by ESA", "roles": ["producer", "licensor"]},
        {"name": archive.name, "roles": ["host"], "url": archive.stac_url},
        processor,
    ]


def _origins(archive: Archive) -> list[Summary]:
    """The collections that chips were made from, and the terms of their data."""
    sources = [
        {"rel": "derived_from", "href": f"{archive.stac_url}/collections/{name}", "type": "application/json"}
        for name in (archive.optical_collection, archive.radar_collection)
        if name
    ]
    return [*sources, {"rel": "license", "href": _DATA_TERMS, "type": "application/pdf"}]


def _union(files: Sequence[Mapping[str, Any]], name: str) -> list[Any]:
    return sorted(set(chain.from_iterable(each[name] for each in files)))


def _outer(boxes: Sequence[Sequence[float]]) -> list[float]:
    """Around all boxes; the whole Earth where there is none, since a collection has an extent."""
    if not boxes:
        return [-180.0, -90.0, 180.0, 90.0]
    each = np.asarray(boxes)
    return [*each[:, :2].min(axis=0).tolist(), *each[:, 2:].max(axis=0).tolist()]


def _interval(spans: Sequence[Sequence[str]]) -> list[str | None]:
    if not spans:
        return [_iso(_BEGAN), None]
    return [min(start for start, _ in spans), max(end for _, end in spans)]


def _iso(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
