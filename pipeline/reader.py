"""Reading pixels: the assets of one unit, on the native grids of a block of cells.

stackstac does the reading, with everything that it would otherwise guess said explicitly; georeferencing comes
from the file headers.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import dask
import numpy as np
import shapely
import stackstac
from dask.array import Array
from numpy.typing import NDArray
from rasterio.enums import Resampling
from rasterio.errors import RasterioError
from stackstac.rio_env import LayeredEnv

from pipeline.archives import Signing
from pipeline.bands import (
    NATIVE_GROUPS,
    OPTICAL_NODATA,
    RADAR_BANDS,
    RESOLUTION_M,
    SCENE_CLASSIFICATION,
    SCL_NODATA,
)
from pipeline.grid import utm_box_lonlat
from pipeline.radiometry import harmonise, looks_like_decibel, to_centi_db
from pipeline.signing import redact, sign
from pipeline.types import Acquisition, ChipArrays, ChipError, Item

log = logging.getLogger(__name__)

Bounds = tuple[float, float, float, float]

READ_THREADS = 8
_ATTEMPTS = 4
_TRANSIENT = (
    "HTTP response code: 403",
    "HTTP response code: 429",
    "HTTP response code: 5",
    "timed out",
    "Timeout",
    "reset",
)

# Entered by stackstac in every thread that reads, which an environment around the computation is not.
_GDAL_ENV = LayeredEnv(
    always={
        "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",
        "CPL_VSIL_CURL_CACHE_SIZE": 134217728,
        "GDAL_HTTP_MAX_RETRY": 4,
        "GDAL_HTTP_RETRY_DELAY": 0.5,
        "GDAL_HTTP_TIMEOUT": 30,
        "GDAL_HTTP_CONNECTTIMEOUT": 5,
        "VSI_CACHE": False,
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """A rectangle of one zone's plane."""

    epsg: int

    bounds: Bounds
    """(left, bottom, right, top) in metres, multiples of 60 from the zone's anchor."""

    def shape(self, resolution_m: int) -> tuple[int, int]:
        """(rows, columns) at a resolution."""
        left, bottom, right, top = self.bounds
        return round((top - bottom) / resolution_m), round((right - left) / resolution_m)


def read_classes(look: Acquisition, window: Window, signing: Signing) -> NDArray[np.uint8]:
    """(y, x) at 20 m: the scene classification, 0 where no item has data.

    Raises:
        ChipError: An item could not be read.
    """
    scl = _read(look.items, (SCENE_CLASSIFICATION,), window, RESOLUTION_M["scl"], np.uint8(SCL_NODATA), signing)
    classes: NDArray[np.uint8] = scl[0].astype(np.uint8)
    return classes


def read_optical(look: Acquisition, window: Window, signing: Signing) -> ChipArrays:
    """`b10`, `b20` and `b60` as `(band, y, x)` on their own grids, reflectance x 10 000 without offset, 0 = no data.

    Each item's offset is taken off before the items are mosaicked.

    Raises:
        ChipError: An item could not be read.
    """
    arrays: ChipArrays = {}
    for group, bands in NATIVE_GROUPS.items():
        layers = [
            harmonise(
                _read((item,), bands, window, RESOLUTION_M[group], np.uint16(OPTICAL_NODATA), signing),
                offset_dn=item.offset_dn,
            )
            for item in look.items
        ]
        arrays[group] = _mosaic(layers, OPTICAL_NODATA)
    return arrays


def read_radar(look: Acquisition, window: Window, signing: Signing) -> NDArray[np.int16]:
    """(VV VH, y, x) at 10 m in centi-dB; resampled bilinearly, in linear power, where the grids differ.

    Raises:
        ChipError: An item could not be read, or is in decibel where it should be linear.
    """
    gamma0 = _read(look.items, RADAR_BANDS, window, RESOLUTION_M["radar"], np.float32("nan"), signing)
    if looks_like_decibel(gamma0):
        raise ChipError(f"item {look.items[0].id}: radar is in decibel, expected linear gamma0")
    return to_centi_db(gamma0.astype(np.float32))


def read_labels(hrefs: Sequence[str], window: Window, signing: Signing, *, missing: int) -> NDArray[np.uint8]:
    """(y, x) at 10 m: the classes of a label collection, nearest neighbour; `missing` where there is none.

    Raises:
        ChipError: A map could not be read.
    """
    box = utm_box_lonlat(window.epsg, window.bounds)
    layers = [{"id": "label", "hrefs": {"map": href}, "footprint": box} for href in hrefs]
    classes = _attempt(layers, ("map",), window, 10, np.uint8(0), Resampling.nearest, signing)
    first = _mosaic(list(classes), 0)[0]
    return np.where(first == 0, np.uint8(missing), first).astype(np.uint8)


def _read(
    items: Sequence[Item],
    bands: Sequence[str],
    window: Window,
    resolution_m: int,
    fill: np.generic,
    signing: Signing,
) -> NDArray[Any]:
    """(band, y, x) from the first item that has data, pixel by pixel."""
    box = utm_box_lonlat(window.epsg, window.bounds)
    layers = [
        {"id": item.id, "hrefs": {b: item.assets[b] for b in bands}, "footprint": item.footprint} for item in items
    ]
    resampling = Resampling.bilinear if np.issubdtype(fill.dtype, np.floating) else Resampling.nearest
    stacked = _attempt(layers, bands, window, resolution_m, fill, resampling, signing)
    for layer, values in zip(layers, stacked, strict=True):
        _refuse_silence(layer, bands, values, fill, box)
    return _mosaic(list(stacked), fill)


def _attempt(
    layers: Sequence[dict[str, Any]],
    bands: Sequence[str],
    window: Window,
    resolution_m: int,
    fill: np.generic,
    resampling: Resampling,
    signing: Signing,
) -> NDArray[Any]:
    """(item, band, y, x); tries again what may pass, with fresh signatures."""
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            lazy = _lazy_stack(layers, bands, window, resolution_m, fill, resampling, signing)
            with dask.config.set(scheduler="threads", num_workers=READ_THREADS):
                return np.asarray(lazy.compute())
        except (RasterioError, RuntimeError, OSError) as error:
            message = redact(_chain(error))
            transient = any(mark in message for mark in _TRANSIENT)
            if attempt == _ATTEMPTS or not transient:
                names = ", ".join(layer["id"] for layer in layers)
                raise ChipError(f"item {names}, band {' '.join(bands)}: {message}", transient=transient) from None
            log.warning("reading again in %s s: %s", 2**attempt, message)
            time.sleep(2**attempt)
    raise AssertionError("unreachable")


def _lazy_stack(
    layers: Sequence[dict[str, Any]],
    bands: Sequence[str],
    window: Window,
    resolution_m: int,
    fill: np.generic,
    resampling: Resampling,
    signing: Signing,
) -> Array:
    rows, columns = window.shape(resolution_m)
    stacked = stackstac.stack(
        [_as_stac(layer, signing) for layer in layers],
        assets=list(bands),
        epsg=window.epsg,
        resolution=resolution_m,
        bounds=window.bounds,
        snap_bounds=False,
        xy_coords="center",
        chunksize=(1, 1, rows, columns),
        dtype=fill.dtype,
        fill_value=fill,
        resampling=resampling,
        rescale=False,
        sortby_date=False,
        properties=False,
        band_coords=False,
        errors_as_nodata=(),
        gdal_env=_GDAL_ENV,
    )
    assert stacked.shape == (len(layers), len(bands), rows, columns), (stacked.shape, window)
    lazy: Array = stacked.data
    return lazy


def _as_stac(layer: dict[str, Any], signing: Signing) -> dict[str, Any]:
    """The least of an item that stackstac needs; its box is wide, because what lies where is for the header to say."""
    west, south, east, north = layer["footprint"].bounds
    return {
        "id": layer["id"],
        "type": "Feature",
        "geometry": shapely.geometry.mapping(layer["footprint"]),
        "bbox": [west - 0.5, max(south - 0.5, -89.0), east + 0.5, min(north + 0.5, 89.0)],
        "properties": {"datetime": "2000-01-01T00:00:00Z"},
        "assets": {band: {"href": sign(href, signing)} for band, href in layer["hrefs"].items()},
    }


def _refuse_silence(
    layer: dict[str, Any], bands: Sequence[str], values: NDArray[Any], fill: np.generic, box: shapely.Geometry
) -> None:
    """An asset without a single value, well inside its item's footprint, was not read: it is no nodata."""
    if layer["footprint"].intersection(box).area < 0.5 * box.area:
        return
    for band, pixels in zip(bands, values, strict=True):
        empty = np.isnan(pixels).all() if np.issubdtype(pixels.dtype, np.floating) else (pixels == fill).all()
        if empty:
            raise ChipError(f"item {layer['id']}, band {band}: no data at all inside the item's footprint")


def _mosaic(layers: Sequence[NDArray[Any]], fill: Any) -> NDArray[Any]:
    """First value that is not the fill, in the order given."""
    result = layers[0]
    for layer in layers[1:]:
        missing = np.isnan(result) if np.issubdtype(result.dtype, np.floating) else result == fill
        result = np.where(missing, layer, result)
    return result


def _chain(error: BaseException) -> str:
    """The message with its causes': rasterio says what failed only there."""
    parts = [f"{type(error).__name__}: {error}"]
    while error.__cause__ is not None:
        error = error.__cause__
        parts.append(str(error))
    return "; ".join(parts)
