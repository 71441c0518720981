"""Reading pixels: the assets of one unit, on the native grids of a block of cells.

Which engine reads is a choice; what is signed, tried again, mosaicked and refused is the same for both.
Georeferencing comes from the file headers.
"""

from __future__ import annotations

import logging
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.access import Access, HostUnavailable, SigningRefused, host_of
from pipeline.bands import (
    NATIVE_GROUPS,
    OPTICAL_NODATA,
    RADAR_BANDS,
    RADAR_NODATA,
    RESOLUTION_M,
    SCENE_CLASSIFICATION,
    SCL_NODATA,
)
from pipeline.grid import utm_box_lonlat
from pipeline.radiometry import harmonise, looks_like_decibel, offset_flags, radar_flags, to_centi_db
from pipeline.reader_faults import Answer, diagnose
from pipeline.reader_gdal import gdal_path, keep_signatures_out_of_logs
from pipeline.reader_stackstac import StackstacEngine
from pipeline.reader_types import Engine, Finish, Header, Patience, Pixels, ReadError, Source, Window
from pipeline.reader_window import WindowEngine
from pipeline.types import Acquisition, ChipArrays, Item, Sensor

__all__ = ["Patience", "Read", "ReadError", "Reader", "ReaderName", "Window", "reader_named"]

log = logging.getLogger(__name__)

ReaderName = Literal["window", "stackstac"]

_ENGINES: Final[Mapping[ReaderName, Callable[[Patience], Engine]]] = {
    "window": WindowEngine,
    "stackstac": StackstacEngine,
}

_OPTICAL_GROUP: Final = {band: group for group, bands in NATIVE_GROUPS.items() for band in bands}
_RADAR_FILE_NODATA: Final = -32768.0
_FOOTPRINT_SLACK_DEG: Final = 0.05
_DECIBEL_SAMPLE_PX: Final = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """One acquisition's pixels, or those of a pair, over some windows."""

    arrays: tuple[ChipArrays, ...]
    """For each window."""

    flags: Mapping[str, frozenset[str]]
    """Item id -> what is odd about it: `georeference_suspect` (the catalog says that it lies elsewhere than its files'
    headers do), `offset_suspect`, `double_offset_suspect`, `radar_scale_suspect`."""


def reader_named(name: ReaderName, access: Access, patience: Patience | None = None) -> Reader:
    """A reader with an engine by its name."""
    keep_signatures_out_of_logs()
    patience = patience or Patience()
    return Reader(_ENGINES[name](patience), access, patience)


class Reader:
    """Reads acquisitions over windows of a zone."""

    def __init__(self, engine: Engine, access: Access, patience: Patience) -> None:
        self.engine = engine
        self.access = access
        self.patience = patience

    def classes(self, look: Acquisition, window: Window) -> NDArray[np.uint8]:
        """(y, x) at 20 m: the scene classification, 0 where no item has data.

        Raises:
            ReadError: An item could not be read.
        """
        sources = [_source(item, SCENE_CLASSIFICATION) for item in look.items]
        read = self._read(sources, (window,), finish=_as_it_is)
        for item, pixels in zip(look.items, read, strict=True):
            _refuse_silence(item, SCENE_CLASSIFICATION, pixels, SCL_NODATA, (window,))
        classes: NDArray[np.uint8] = _mosaic([pixels.arrays[0] for pixels in read], SCL_NODATA)
        return classes

    def pixels(
        self,
        looks: Sequence[Acquisition],
        windows: Sequence[Window],
        *,
        classes: Sequence[NDArray[np.uint8]] | None = None,
    ) -> Read:
        """The arrays of acquisitions over each of some windows, all their assets read at once.

        Optical ones give `b10`, `b20` and `b60`, reflectance x 10 000 without offset and 0 for no data; each item's
        offset is taken off before the items are mosaicked. Radar gives `radar`, VV VH in centi-dB, from linear power.

        Args:
            looks: One acquisition of a sensor each.
            windows: Of one zone.
            classes: The scene classification over each window, (y, x) at 20 m, by which offsets are checked.

        Raises:
            ReadError: An item could not be read, or is in decibel where it should be linear.
        """
        items = {item.id: item for look in looks for item in look.items}
        sources = [_source(item, band) for look in looks for item in look.items for band in _bands(look)]
        sources.sort(key=lambda source: (source.resolution_m, -source.fill.itemsize))  # what takes longest goes first
        results = self._read(sources, windows, finish=lambda source, raw: _finish(items[source.item], source, raw))
        read = {(source.item, source.band): pixels for source, pixels in zip(sources, results, strict=True)}
        results.clear()
        for (name, band), pixels in read.items():
            fill = RADAR_NODATA if items[name].sensor == "radar" else OPTICAL_NODATA
            _refuse_silence(items[name], band, pixels, fill, windows)
        odd = {name: _misplaced(items[name], (read[key].header for key in read if key[0] == name)) for name in items}
        arrays: list[ChipArrays] = [{} for _ in windows]
        for look in looks:
            # Bands that are stacked are let go, so that the pixels are not held twice.
            layers = {item.id: _layers(item, read, len(windows)) for item in look.items}
            for item in look.items:
                odd[item.id] |= _flags(item, layers[item.id], classes)
            for number, array in enumerate(arrays):
                for group, fill in _groups_of(look.sensor):
                    array[group] = _mosaic([layers[item.id][number].pop(group) for item in look.items], fill)
        return Read(arrays=tuple(arrays), flags=odd)

    def labels(
        self, hrefs: Sequence[str], window: Window, *, missing: int, resolution_m: int = 10
    ) -> NDArray[np.uint8]:
        """(y, x) at 10 m or coarser: classes of a label collection, nearest neighbour; `missing` where there is none.

        Raises:
            ReadError: A map could not be read.
        """
        sources = [
            Source(
                item="label", band="map", href=href, resolution_m=resolution_m, fill=np.uint8(0), nodata=0, smooth=False
            )
            for href in hrefs
        ]
        read = self._read(sources, (window,), finish=_as_it_is)
        first = _mosaic([pixels.arrays[0] for pixels in read], 0)
        return np.where(first == 0, np.uint8(missing), first).astype(np.uint8)

    def _read(self, sources: Sequence[Source], windows: Sequence[Window], *, finish: Finish) -> list[Pixels]:
        """Pixels of every source; tries again what may pass, with fresh signatures.

        Raises:
            ReadError: Of the first source that could not be read.
        """
        done: dict[int, Pixels] = {}
        for attempt in range(1, self.patience.attempts + 1):
            missing = [number for number in range(len(sources)) if number not in done]
            todo = [sources[number] for number in missing]
            hrefs, results = self._attempt(todo, windows, finish)
            faults: list[tuple[Source, ReadError]] = []
            told: dict[str, Answer] = {}
            for number, href, result in zip(missing, hrefs, results, strict=True):
                if isinstance(result, Pixels):
                    done[number] = result
                else:
                    faults.append((sources[number], diagnose(result, href, self.patience, told)))
            if not faults:
                return [done[number] for number in range(len(sources))]
            self._report(faults)
            lasting = [fault for fault in faults if not fault[1].transient]
            source, error = (lasting or faults)[0]
            wait = max((fault.retry_after_s or 0.0) for _, fault in faults)
            if lasting or attempt == self.patience.attempts or wait > self.patience.longest_wait_s:
                raise _named(source, error)
            self._pause(attempt, wait, faults)
        raise AssertionError("unreachable")

    def _attempt(
        self, sources: Sequence[Source], windows: Sequence[Window], finish: Finish
    ) -> tuple[list[str], list[Pixels | Exception]]:
        """Signed hrefs and results, one of each for every source."""
        by_host: dict[str, list[Source]] = defaultdict(list)
        for source in sources:
            by_host[host_of(source.href) or ""].append(source)
        with ExitStack() as turns:
            try:
                # In one order for everybody, so that no two wait for each other.
                for host in sorted(by_host):
                    if host:
                        asked = sum(_requests(source, windows) for source in by_host[host])
                        turns.enter_context(self.access.turn(by_host[host][0].href, requests=asked))
                hrefs = [self.access.sign(source.href) for source in sources]
            except (HostUnavailable, SigningRefused) as error:
                kind: Literal["busy", "forbidden"] = "busy" if isinstance(error, HostUnavailable) else "forbidden"
                raise _named(sources[0], ReadError(str(error), kind=kind)) from None
            paths = [gdal_path(href) for href in hrefs]
            return hrefs, self.engine.read(sources, paths, windows, finish)

    def _report(self, faults: Iterable[tuple[Source, ReadError]]) -> None:
        """Tell whoever keeps count of hosts and signatures; once for what went wrong in one place for one reason."""
        told = set()
        for source, fault in faults:
            place = source.href.rpartition("/")[0]
            key = (fault.kind, place if fault.kind == "forbidden" else host_of(source.href))
            if host_of(source.href) and fault.transient and key not in told:
                told.add(key)
                self.access.failed(source.href, status=fault.status, retry_after_s=fault.retry_after_s)

    def _pause(self, attempt: int, wait_s: float, faults: Sequence[tuple[Source, ReadError]]) -> None:
        """Wait before the next attempt; a first refused signature is simply replaced."""
        source, error = faults[0]
        if attempt == 1 and all(fault.kind == "forbidden" for _, fault in faults):
            pause = 0.0
        else:
            jitter = random.uniform(1.0, 1.5)  # noqa: S311  # keeps workers apart, hides nothing
            pause = max(wait_s, self.patience.backoff_s * 2 ** (attempt - 1) * jitter)
        log.warning("reading %s of %d assets again in %.1f s: %s", source.band, len(faults), pause, error)
        time.sleep(pause)


def lies_elsewhere(item: Item, header: Header) -> bool:
    """Whether a catalog's word on where an item lies contradicts a file's header."""
    if header.epsg != item.epsg:
        return True
    t = header.transform
    x0, x1 = sorted((t.c, t.c + t.a * header.width))
    y0, y1 = sorted((t.f, t.f + t.e * header.height))
    box = utm_box_lonlat(header.epsg, (x0, y0, x1, y1)).buffer(_FOOTPRINT_SLACK_DEG)
    west, _, east, _ = box.bounds
    if west < -179.0 or east > 179.0:
        return False  # longitudes may be counted in either way there
    outside = item.footprint.difference(box).area
    return bool(outside > 0.02 * item.footprint.area)


def _source(item: Item, band: str) -> Source:
    group = "radar" if item.sensor == "radar" else "scl" if band == SCENE_CLASSIFICATION else _OPTICAL_GROUP[band]
    fills: dict[str, np.generic] = {"radar": np.float32("nan"), "scl": np.uint8(SCL_NODATA)}
    if band not in item.assets:
        raise ReadError(f"item {item.id}, band {band}: the item has no such asset", kind="missing")
    return Source(
        item=item.id,
        band=band,
        href=item.assets[band],
        resolution_m=RESOLUTION_M[group],
        fill=fills.get(group, np.uint16(OPTICAL_NODATA)),
        nodata=_RADAR_FILE_NODATA if group == "radar" else 0.0,
        smooth=group != "scl",
    )


def _bands(look: Acquisition) -> tuple[str, ...]:
    return tuple(_OPTICAL_GROUP) if look.sensor == "optical" else RADAR_BANDS


def _as_it_is(source: Source, pixels: NDArray[Any]) -> NDArray[Any]:
    return pixels


def _finish(item: Item, source: Source, raw: NDArray[Any]) -> NDArray[Any]:
    """From a file's numbers to the store's."""
    if item.sensor == "optical":
        return harmonise(raw, offset_dn=item.offset_dn)
    step = 4 if raw.size > _DECIBEL_SAMPLE_PX else 1
    if looks_like_decibel(raw[::step, ::step]):
        raise ReadError("radar is in decibel, expected linear gamma0", kind="wrong")
    return to_centi_db(raw)


def _groups_of(sensor: Sensor) -> tuple[tuple[str, int], ...]:
    """Store arrays of a sensor, and what fills them where there is no data."""
    return (
        (("radar", RADAR_NODATA),) if sensor == "radar" else tuple((group, OPTICAL_NODATA) for group in NATIVE_GROUPS)
    )


def _layers(item: Item, read: dict[tuple[str, str], Pixels], windows: int) -> list[dict[str, NDArray[Any]]]:
    """An item's own store arrays, `(band, y, x)`, for each window; takes its bands out of what was read."""
    layers: list[dict[str, NDArray[Any]]] = [{} for _ in range(windows)]
    for group, _ in _groups_of(item.sensor):
        bands = [read.pop((item.id, band)) for band in NATIVE_GROUPS.get(group, RADAR_BANDS)]
        for number, layer in enumerate(layers):
            layer[group] = np.stack([pixels.arrays[number] for pixels in bands])
    return layers


def _misplaced(item: Item, headers: Iterable[Header]) -> frozenset[str]:
    distinct = set(headers)
    return frozenset(["georeference_suspect"] if any(lies_elsewhere(item, header) for header in distinct) else [])


def _flags(
    item: Item, layers: Sequence[Mapping[str, NDArray[Any]]], classes: Sequence[NDArray[np.uint8]] | None
) -> frozenset[str]:
    """What is odd about an item's pixels, over all windows together."""
    if item.sensor == "radar":
        return radar_flags([layer["radar"] for layer in layers])
    if classes is None:
        return frozenset()
    return offset_flags([layer["b10"] for layer in layers], [layer["b20"] for layer in layers], classes)


def _refuse_silence(item: Item, band: str, pixels: Pixels, fill: int, windows: Sequence[Window]) -> None:
    """An asset without a single value, well inside its item's footprint, was not read: it is no nodata."""
    if any((array != fill).any() for array in pixels.arrays):
        return
    boxes = [utm_box_lonlat(window.epsg, window.bounds) for window in windows]
    inside = sum(item.footprint.intersection(box).area for box in boxes)
    if inside >= 0.5 * sum(box.area for box in boxes):
        where = "; by its header, the file lies elsewhere" if lies_elsewhere(item, pixels.header) else ""
        raise ReadError(f"item {item.id}, band {band}: no data at all inside the item's footprint{where}", kind="empty")


def _mosaic(layers: Sequence[NDArray[Any]], fill: int) -> NDArray[Any]:
    """First value that is not the fill, in the order given."""
    result = layers[0]
    for layer in layers[1:]:
        result = np.where(result == fill, layer, result)
    return result


def _requests(source: Source, windows: Sequence[Window]) -> int:
    """About how many requests a source takes: its header, then one for each row of blocks of 512 pixels."""
    return 2 + sum(window.shape(source.resolution_m)[0] // 512 + 1 for window in windows)


def _named(source: Source, error: ReadError) -> ReadError:
    """The error with what it is about."""
    return ReadError(
        f"item {source.item}, band {source.band}: {error}",
        kind=error.kind,
        status=error.status,
        retry_after_s=error.retry_after_s,
    )
