"""What both readers share of GDAL: how it is to behave, what a file's header says, and how its pixels are copied."""

from __future__ import annotations

import itertools
import logging
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from rasterio._err import CPLE_BaseError
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.io import DatasetReader

from pipeline.reader_types import Header, Patience, ReadError, Source, Window
from pipeline.redaction import Redacting

READ_ERRORS: Final = (RasterioError, CPLE_BaseError, OSError, ReadError, NotGeoreferencedWarning)
"""What opening, warping and reading raise; a failed request in between shows as almost any of GDAL's own errors."""

_FETCH: Final = itertools.count()
_REDACTING: Final = Redacting()
_RAW_BLOCKS_BYTES: Final = 64 << 20
"""Of compressed blocks that a read of one file may ask for at once: all rows of blocks of a window, each by a request.
With GDAL's 10 MB, the radar of 8 x 8 cells comes in pieces one after another, by 12 requests instead of 5 and in 2.5
times the time."""
_BLOCK_CACHE_BYTES: Final = 256 << 20
"""In bytes: rasterio hands the number to GDAL as it is, which elsewhere takes small numbers for megabytes."""
_TRANSFER_CACHE_BYTES: Final = 128 << 20


def keep_signatures_out_of_logs() -> None:
    """Have rasterio's own loggers, which repeat what GDAL says of a URL, go through `Redacting`."""
    for name in ("rasterio._env", "rasterio._err", "rasterio._io", "rasterio._base", "rasterio._vsiopener"):
        logging.getLogger(name).addFilter(_REDACTING)


def gdal_options(patience: Patience) -> dict[str, Any]:
    """Configuration that must hold in every thread that opens or reads."""
    return {
        # Without it every file is asked for a dozen neighbours that it does not have, one after the other.
        "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",
        # One blip costs nothing; what lasts longer is for the reader to wait for, who knows what the server asked for.
        "GDAL_HTTP_MAX_RETRY": 1,
        "GDAL_HTTP_RETRY_DELAY": min(0.5, patience.backoff_s),
        "GDAL_HTTP_TIMEOUT": patience.timeout_s,
        "GDAL_HTTP_CONNECTTIMEOUT": min(5.0, patience.timeout_s),
        # With more, GDAL 3.10 fetches blocks ahead and asks less, but takes requests that failed for zeros: unnoticed
        # in files without compression, and not to be told from damage in others.
        "GDAL_NUM_THREADS": 1,
        # Both are of the process, and bound what it holds beside the pixels themselves.
        "GDAL_CACHEMAX": _BLOCK_CACHE_BYTES,
        "GDAL_MAX_RAW_BLOCK_CACHE_SIZE": _RAW_BLOCKS_BYTES,
        "CPL_VSIL_CURL_CACHE_SIZE": _TRANSFER_CACHE_BYTES,
        "VSI_CACHE": False,
    }


def gdal_path(href: str) -> str:
    """How GDAL is to open a signed href: as if it had never seen it.

    GDAL remembers by URL that a file was missing or broken; the fragment, which no server is sent, makes it forget.
    """
    if href.startswith(("http://", "https://")):
        return f"/vsicurl/{href}#{next(_FETCH)}"
    return href


def header_of(dataset: DatasetReader) -> Header:
    """The header's georeference.

    Raises:
        ReadError: It has none, as a file that was cut off early, or one in slant geometry.
    """
    if dataset.crs is None or dataset.transform.is_identity:
        raise ReadError("the file's header has no georeference", kind="unreadable")
    if dataset.count != 1:
        raise ReadError(f"the file has {dataset.count} bands, expected one", kind="unreadable")
    return Header(
        epsg=dataset.crs.to_epsg(),
        transform=dataset.transform,
        width=dataset.width,
        height=dataset.height,
        nodata=dataset.nodata,
    )


def is_aligned(header: Header, window: Window, resolution_m: int) -> bool:
    """Whether the window's pixels are pixels of the file, as its header says."""
    left, _, _, top = window.bounds
    t = header.transform
    if header.epsg != window.epsg or (t.a, t.b, t.d, t.e) != (resolution_m, 0.0, 0.0, -resolution_m):
        return False
    return all(abs(steps - round(steps)) < 1e-6 for steps in ((left - t.c) / resolution_m, (t.f - top) / resolution_m))


def copy_pixels(dataset: DatasetReader, header: Header, source: Source, window: Window) -> NDArray[Any]:
    """(y, x) of a window that is aligned with the file; the fill outside the file."""
    rows, columns = window.shape(source.resolution_m)
    top = round((header.transform.f - window.bounds[3]) / source.resolution_m)
    left = round((window.bounds[0] - header.transform.c) / source.resolution_m)
    row0, row1 = max(top, 0), min(top + rows, header.height)
    column0, column1 = max(left, 0), min(left + columns, header.width)
    pixels = np.full((rows, columns), source.fill, source.fill.dtype)
    if row0 < row1 and column0 < column1:
        inner = pixels[row0 - top : row1 - top, column0 - left : column1 - left]
        if inner.shape == pixels.shape and np.dtype(dataset.dtypes[0]) == pixels.dtype:
            dataset.read(1, window=((row0, row1), (column0, column1)), out=pixels)
        else:
            inner[...] = dataset.read(1, window=((row0, row1), (column0, column1)))
    return pixels


def fill_nodata(pixels: NDArray[Any], header: Header, source: Source) -> NDArray[Any]:
    """The pixels with the fill for whatever the file holds where it has no data; changes them in place."""
    for value in {source.nodata, header.nodata} - {None, source.fill.item()}:
        if value == value:  # NaN is found by no comparison, and is the fill where it occurs
            pixels[pixels == value] = source.fill
    return pixels


def last_byte(dataset: DatasetReader) -> int:
    """Where a TIFF's blocks end, as its header says: bytes that the file must have."""
    height, width = dataset.block_shapes[0]
    ends = [0]
    for row in range(-(-dataset.height // height)):
        for column in range(-(-dataset.width // width)):
            offset, size = (
                dataset.get_tag_item(f"BLOCK_{what}_{column}_{row}", "TIFF", bidx=1) for what in ("OFFSET", "SIZE")
            )
            if offset is not None and size is not None:
                ends.append(int(offset) + int(size))
    return max(ends)
