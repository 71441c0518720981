"""GeoParquet 1.1: tables of cells with their outlines, sorted along a Hilbert curve so that a box reads few rows."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from typing import Any, Final

import geopandas
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import shapely
from numpy.typing import NDArray
from pyproj import CRS
from shapely.geometry.base import BaseGeometry

from pipeline.antimeridian import within_180

_CRS: Final = "OGC:CRS84"
_ROWS_PER_GROUP: Final = 10_000
"""Few enough that a box around a town skips most of a country."""


def to_geoparquet(table: pa.Table, outlines: Sequence[BaseGeometry], *, about: dict[str, Any]) -> bytes:
    """A GeoParquet file.

    Columns of vectors (fixed-size lists of floats) are split by bytes before compression, which saves a tenth.

    Args:
        table: One row per outline; without geometry.
        outlines: Polygons in longitude/latitude; beyond 180 degrees across the antimeridian.
        about: What the file is, as JSON; kept in the footer under "twinlook".
    """
    geometry = geopandas.GeoSeries([shapely.orient_polygons(within_180(outline)) for outline in outlines], crs=_CRS)
    # The distance needs an extent that is not empty; a single cell has one.
    order = np.argsort(geometry.hilbert_distance().to_numpy(), kind="stable")
    geometry = geometry.iloc[order]
    bounds = geometry.bounds.to_numpy()
    table = table.take(pa.array(order))
    table = table.append_column("geometry", pa.array(geometry.to_wkb().tolist(), pa.binary()))
    table = table.append_column("bbox", _boxes(bounds))
    metadata = {"geo": json.dumps(_geo(geometry, bounds)), "twinlook": json.dumps(about, sort_keys=True)}
    vectors = [field.name for field in table.schema if pa.types.is_fixed_size_list(field.type)]
    sink = io.BytesIO()
    pq.write_table(
        table.replace_schema_metadata(metadata),
        sink,
        compression="zstd",
        row_group_size=_ROWS_PER_GROUP,
        use_dictionary=[name for name in table.column_names if name not in (*vectors, "geometry", "bbox")],
        use_byte_stream_split=[f"{name}.list.element" for name in vectors],
    )
    return sink.getvalue()


def vectors_column(vectors: NDArray[np.floating[Any]]) -> pa.Array:
    """(row, D) as a column of D half-precision numbers each: half the bytes, and a cosine off by less than 1e-6.

    Raises:
        ValueError: A number is not finite, or too large for half precision (65504).
    """
    half = vectors.astype(np.float32)
    if not (np.abs(half) <= np.finfo(np.float16).max).all():
        raise ValueError("an embedding is not finite or too large for half precision: the model or its input is broken")
    flat = pa.array(half.astype(np.float16).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])


def _boxes(bounds: NDArray[np.float64]) -> pa.StructArray:
    """(row, 4) bounds as the column that readers prune row groups by."""
    names = ("xmin", "ymin", "xmax", "ymax")
    return pa.StructArray.from_arrays([pa.array(bounds[:, index]) for index in range(4)], names=names)


def _geo(geometry: geopandas.GeoSeries, bounds: NDArray[np.float64]) -> dict[str, Any]:
    return {
        "version": "1.1.0",
        "primary_column": "geometry",
        "columns": {
            "geometry": {
                "encoding": "WKB",
                "geometry_types": sorted(set(geometry.geom_type)),
                "crs": CRS.from_user_input(_CRS).to_json_dict(),
                "orientation": "counterclockwise",
                "edges": "planar",
                "bbox": [*bounds[:, :2].min(axis=0).tolist(), *bounds[:, 2:].max(axis=0).tolist()],
                "covering": {"bbox": {name: ["bbox", name] for name in ("xmin", "ymin", "xmax", "ymax")}},
            }
        },
    }
