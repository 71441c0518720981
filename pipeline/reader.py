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
from functools import partial
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.access import Access, HostUnavailable, SigningRefused, host_of
from pipeline.antimeridian import within_180
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
from pipeline.reader_faults import Answer, ask_server, diagnose
from pipeline.reader_gdal import gdal_path, keep_signatures_out_of_logs
from pipeline.reader_stackstac import StackstacEngine
from pipeline.reader_types import Engine, Finish, Header, Patience, Pixels, ReadError, Source, Window
from pipeline.reader_window import WindowEngine
from pipeline.types import Acquisition, ChipArrays, Item, Sensor

__all__ = ["Patience", "Read", "ReadError", "Reader", "ReaderName", "View", "Window", "reader_named"]

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
class View:
    """What is to be seen over a window."""

    window: Window

    looks: tuple[Acquisition, ...]
    """At most one of each sensor. A pixel is that of the first of an acquisition's items which has data there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """The pixels of some views."""

    arrays: tuple[ChipArrays, ...]
    """For each view."""

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

    def classes(self, views: Sequence[View]) -> list[NDArray[np.uint8]]:
        """(y, x) at 20 m for each view: the scene classification of its looks, 0 where no item has data.

        Raises:
            ReadError: An item could not be read.
        """
        items, places = _items_of(views)
        sources = [_source(item, SCENE_CLASSIFICATION, places[item.id].values()) for item in items]
        read = dict(zip(places, self._read(sources, finish=_as_it_is), strict=True))
        for item in items:
            _refuse_silence(item, SCENE_CLASSIFICATION, read[item.id], SCL_NODATA, places[item.id].values())
        layers = {item.id: dict(zip(places[item.id], read[item.id].arrays, strict=True)) for item in items}
        return [
            _mosaic([layers[item.id][number] for look in view.looks for item in look.items], SCL_NODATA)
            for number, view in enumerate(views)
        ]

    def pixels(self, views: Sequence[View], *, classes: Sequence[NDArray[np.uint8]] | None = None) -> Read:
        """The arrays of each view's looks, the assets of all items read at once, each only where a view wants it.

        Optical ones give `b10`, `b20` and `b60`, reflectance x 10 000 without offset and 0 for no data; each item's
        offset is taken off before the items are mosaicked. Radar gives `radar`, VV VH in centi-dB, from linear power.

        Args:
            views: Of one zone.
            classes: The scene classification over each view, (y, x) at 20 m, by which offsets are checked.

        Raises:
            ReadError: An item could not be read, or is in decibel where it should be linear.
        """
        items, places = _items_of(views)
        sources = [_source(item, band, places[item.id].values()) for item in items for band in _bands(item.sensor)]
        sources.sort(key=lambda source: (source.resolution_m, -source.fill.itemsize))  # what takes longest goes first
        by_id = {item.id: item for item in items}
        results = self._read(sources, finish=lambda source, raw: _finish(by_id[source.item], source, raw))
        read = {(source.item, source.band): pixels for source, pixels in zip(sources, results, strict=True)}
        results.clear()
        for (name, band), pixels in read.items():
            fill = RADAR_NODATA if by_id[name].sensor == "radar" else OPTICAL_NODATA
            _refuse_silence(by_id[name], band, pixels, fill, places[name].values())
        flags: dict[str, frozenset[str]] = {}
        layers: dict[str, dict[int, ChipArrays]] = {}
        for item in items:
            headers = {read[item.id, band].header for band in _bands(item.sensor)}
            layers[item.id] = _layers(item, read, places[item.id])
            seen = None if classes is None else [classes[number] for number in places[item.id]]
            flags[item.id] = _misplaced(item, headers) | _flags(item, [*layers[item.id].values()], seen)
        return Read(arrays=tuple(_mosaics(view, number, layers) for number, view in enumerate(views)), flags=flags)

    def labels(
        self, hrefs: Sequence[str], window: Window, *, missing: int, resolution_m: int = 10
    ) -> NDArray[np.uint8]:
        """(y, x) at 10 m or coarser: classes of a label collection, nearest neighbour; `missing` where there is none.

        Raises:
            ReadError: A map could not be read.
        """
        sources = [
            Source(
                item="label",
                band="map",
                href=href,
                fill=np.uint8(0),
                nodata=0.0,
                smooth=False,
                resolution_m=resolution_m,
                windows=(window,),
            )
            for href in hrefs
        ]
        read = self._read(sources, finish=_as_it_is)
        first = _mosaic([pixels.arrays[0] for pixels in read], 0)
        return np.where(first == 0, np.uint8(missing), first).astype(np.uint8)

    def _read(self, sources: Sequence[Source], *, finish: Finish) -> list[Pixels]:
        """Pixels of every source; tries again what may pass, with fresh signatures.

        Raises:
            ReadError: Of the first source that could not be read.
        """
        done: dict[int, Pixels] = {}
        for attempt in range(1, self.patience.attempts + 1):
            missing = [number for number in range(len(sources)) if number not in done]
            todo = [sources[number] for number in missing]
            hrefs, results = self._attempt(todo, finish)
            faults: list[tuple[Source, ReadError]] = []
            told: dict[str, Answer] = {}
            for number, href, result in zip(missing, hrefs, results, strict=True):
                if isinstance(result, Pixels):
                    done[number] = result
                else:
                    source = sources[number]
                    ask = partial(self._ask, source.href)
                    faults.append((source, diagnose(result, href, self.patience, told, ask)))
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

    def _attempt(self, sources: Sequence[Source], finish: Finish) -> tuple[list[str], list[Pixels | Exception]]:
        """Signed hrefs and results, one of each for every source."""
        by_host: dict[str, list[Source]] = defaultdict(list)
        for source in sources:
            by_host[host_of(source.href) or ""].append(source)
        with ExitStack() as turns:
            try:
                # In one order for everybody, so that no two wait for each other.
                for host in sorted(by_host):
                    if host:
                        asked = sum(_requests(source) for source in by_host[host])
                        turns.enter_context(self.access.turn(by_host[host][0].href, requests=asked))
                hrefs = [self.access.sign(source.href) for source in sources]
            except (HostUnavailable, SigningRefused) as error:
                kind: Literal["busy", "forbidden"] = "busy" if isinstance(error, HostUnavailable) else "forbidden"
                raise _named(sources[0], ReadError(str(error), kind=kind)) from None
            paths = [gdal_path(href) for href in hrefs]
            return hrefs, self.engine.read(sources, paths, finish)

    def _ask(self, unsigned: str, href: str) -> Answer:
        """What a file's server says now; nothing, where it is not to be asked."""
        try:
            with self.access.turn(unsigned):
                return ask_server(href, self.patience)
        except HostUnavailable:
            return Answer(None)

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


Places = Mapping[str, Mapping[int, Window]]
"""Item id -> number of a view -> its window, for every view that wants the item."""


def _items_of(views: Sequence[View]) -> tuple[list[Item], Places]:
    """The items of all views, each once, and where each is wanted; in one order."""
    items: dict[str, Item] = {}
    places: dict[str, dict[int, Window]] = {}
    for number, view in enumerate(views):
        for item in (item for look in view.looks for item in look.items):
            items[item.id] = item
            places.setdefault(item.id, {})[number] = view.window
    return list(items.values()), places


def _source(item: Item, band: str, windows: Iterable[Window]) -> Source:
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
        windows=tuple(windows),
    )


def _bands(sensor: Sensor) -> tuple[str, ...]:
    return tuple(_OPTICAL_GROUP) if sensor == "optical" else RADAR_BANDS


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


def _layers(item: Item, read: dict[tuple[str, str], Pixels], places: Iterable[int]) -> dict[int, ChipArrays]:
    """View -> an item's own store arrays, `(band, y, x)`; takes its bands out of what was read.

    Bands that are stacked are let go, so that the pixels are not held twice.
    """
    layers: dict[int, ChipArrays] = {number: {} for number in places}
    for group, _ in _groups_of(item.sensor):
        bands = [read.pop((item.id, band)) for band in NATIVE_GROUPS.get(group, RADAR_BANDS)]
        for place, layer in enumerate(layers.values()):
            layer[group] = np.stack([pixels.arrays[place] for pixels in bands])
    return layers


def _mosaics(view: View, number: int, layers: Mapping[str, dict[int, ChipArrays]]) -> ChipArrays:
    """A view's arrays from those of its items, which are let go."""
    own = {item.id: layers[item.id].pop(number) for look in view.looks for item in look.items}
    return {
        group: _mosaic([own[item.id].pop(group) for item in look.items], fill)
        for look in view.looks
        for group, fill in _groups_of(look.sensor)
    }


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


def _refuse_silence(item: Item, band: str, pixels: Pixels, fill: int, windows: Iterable[Window]) -> None:
    """An asset without a single value, well inside its item's footprint, was not read: it is no nodata."""
    if any((array != fill).any() for array in pixels.arrays):
        return
    boxes = [within_180(utm_box_lonlat(window.epsg, window.bounds)) for window in windows]
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


def _requests(source: Source) -> int:
    """About how many requests a source takes: its header, then one for each row of blocks of 512 pixels."""
    return 2 + sum(window.shape(source.resolution_m)[0] // 512 + 1 for window in source.windows)


def _named(source: Source, error: ReadError) -> ReadError:
    """The error with what it is about."""
    return ReadError(
        f"item {source.item}, band {source.band}: {error}",
        kind=error.kind,
        status=error.status,
        retry_after_s=error.retry_after_s,
    )
