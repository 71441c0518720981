"""The stackstac reader: one dask chunk per asset and window, computed by threads inside the task.

Everything that stackstac would otherwise guess is said explicitly. Its own GDAL reader is kept, except that a file on
another grid is warped as the other reader does it, and that a failure is kept with its asset instead of ending the
whole computation.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar, Final

import dask
import dask.base
import numpy as np
import stackstac
from dask.array import Array
from numpy.typing import NDArray
from rasterio.enums import Resampling
from rasterio.vrt import WarpedVRT
from rasterio.windows import Window as PixelWindow
from stackstac.rio_env import LayeredEnv
from stackstac.rio_reader import AutoParallelRioReader, SelfCleaningDatasetReader, ThreadLocalRioDataset

from pipeline.grid import utm_box_lonlat
from pipeline.reader_gdal import READ_ERRORS, fill_nodata, gdal_options, header_of, is_aligned
from pipeline.reader_types import Finish, Header, Patience, Pixels, ReadError, Source, Window
from pipeline.reader_warp import warp_pixels
from pipeline.reader_window import READ_THREADS


@dataclass(slots=True)
class _Seen:
    """What the threads of one computation found out, by path."""

    sources: Mapping[str, Source]
    headers: dict[str, Header] = field(default_factory=dict)
    errors: dict[str, Exception] = field(default_factory=dict)


# dask copies the reader that it is given, and with it whatever that holds: what threads find out is left here.
_RUNNING: Final[dict[int, _Seen]] = {}
_COMPUTATIONS: Final = itertools.count()


class StackstacEngine:
    """See `Engine`."""

    def __init__(self, patience: Patience) -> None:
        self.patience = patience

    def read(self, sources: Sequence[Source], paths: Sequence[str], finish: Finish) -> list[Pixels | Exception]:
        """See `Engine`."""
        seen = _Seen(dict(zip(paths, sources, strict=True)))
        groups: dict[Any, list[str]] = {}
        for path, source in seen.sources.items():
            for window in source.windows:
                groups.setdefault((source.resolution_m, source.fill.dtype, source.smooth, window), []).append(path)
        computation = next(_COMPUTATIONS)
        _RUNNING[computation] = seen
        try:
            lazy = [_lazy_stack(group, kind[-1], computation, self.patience) for kind, group in groups.items()]
            with dask.config.set(scheduler="threads", num_workers=READ_THREADS):
                stacks = dask.base.compute(*lazy)
        finally:
            del _RUNNING[computation]
        arrays = {
            (path, kind[-1]): pixels
            for (kind, group), stack in zip(groups.items(), stacks, strict=True)
            for path, pixels in zip(group, stack, strict=True)
        }
        return [
            _finished(path, [arrays.pop((path, window)) for window in source.windows], seen, finish)
            for path, source in seen.sources.items()
        ]


def _finished(path: str, arrays: list[NDArray[Any]], seen: _Seen, finish: Finish) -> Pixels | Exception:
    if path in seen.errors:
        return seen.errors[path]
    source, header = seen.sources[path], seen.headers[path]
    try:
        return Pixels(
            arrays=tuple(finish(source, fill_nodata(pixels, header, source)) for pixels in arrays), header=header
        )
    except ReadError as error:
        return error


def _lazy_stack(paths: Sequence[str], window: Window, computation: int, patience: Patience) -> Array:
    """(path, y, x) of assets of one kind."""
    source = _RUNNING[computation].sources[paths[0]]
    rows, columns = window.shape(source.resolution_m)
    stacked = stackstac.stack(
        [_as_stac(paths, window)],
        assets=[str(number) for number in range(len(paths))],
        epsg=window.epsg,
        resolution=source.resolution_m,
        bounds=window.bounds,
        snap_bounds=False,
        xy_coords="center",
        chunksize=(1, 1, rows, columns),
        dtype=source.fill.dtype,
        fill_value=source.fill,
        resampling=Resampling.nearest,
        rescale=False,
        sortby_date=False,
        properties=False,
        band_coords=False,
        errors_as_nodata=(),
        gdal_env=_environment(patience),
        reader=type("_Reader", (_WindowReader,), {"computation": computation, "window": window}),
    )
    assert stacked.shape == (1, len(paths), rows, columns), (stacked.shape, window)
    lazy: Array = stacked.data[0]
    return lazy


def _as_stac(paths: Sequence[str], window: Window) -> dict[str, Any]:
    """The least of an item that stackstac needs; it has the window's place, as what lies where is the header's say."""
    west, south, east, north = utm_box_lonlat(window.epsg, window.bounds).bounds
    return {
        "id": "block",
        "type": "Feature",
        "geometry": None,
        "bbox": [west, south, east, north],
        "properties": {"datetime": "2000-01-01T00:00:00Z"},
        "assets": {str(number): {"href": path} for number, path in enumerate(paths)},
    }


class _WindowReader(AutoParallelRioReader):  # type: ignore[misc]  # stackstac has no types
    """The reader of stackstac for the sources of one window in one computation, which a subclass holds."""

    computation: ClassVar[int]
    window: ClassVar[Window]

    def _open(self) -> ThreadLocalRioDataset:
        seen = _RUNNING[self.computation]
        with self.gdal_env.open:
            dataset = SelfCleaningDatasetReader(self.url, sharing=False)
            seen.headers[self.url] = header_of(dataset)
            fill = self.fill_value.item()
            warped = WarpedVRT(dataset, sharing=False, src_nodata=fill, nodata=fill, **self.spec.vrt_params)
        return ThreadLocalRioDataset(self.gdal_env, dataset, vrt=warped)

    def read(self, window: PixelWindow, **more: Any) -> NDArray[Any]:
        seen = _RUNNING[self.computation]
        source = seen.sources[self.url]
        try:
            with self.gdal_env.read:
                dataset = self.dataset
                if not is_aligned(seen.headers[self.url], self.window, source.resolution_m):
                    with SelfCleaningDatasetReader(self.url, sharing=False) as file:
                        return warp_pixels(file, seen.headers[self.url], source, self.window)
                pixels = dataset.read(window=window, out_dtype=self.dtype, masked=False, **more)
                return np.asarray(pixels[0])
        except READ_ERRORS as error:
            seen.errors[self.url] = error
            return np.full((int(window.height), int(window.width)), self.fill_value, self.dtype)


@lru_cache(maxsize=4)
def _environment(patience: Patience) -> LayeredEnv:
    # Entered by stackstac in every thread that reads, which an environment around the computation is not.
    return LayeredEnv(always=gdal_options(patience))
