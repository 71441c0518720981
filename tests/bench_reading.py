"""Reading from an archive: chips per second, requests, bytes and processor time per chip, ways interleaved.

A server of its own process on loopback answers by HTTP/1.1 with Range, 40 ms late; scenes are of full size. Every read
goes to URLs that were never read before. All ways of reading blocks give the same pixels, on the sensors' own grids.

Example:
    python -m tests.bench_reading
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import dask
import numpy as np
import odc.stac
import pystac
import rasterio
import stackstac
from numpy.typing import NDArray
from odc.geo.geobox import GeoBox
from rasterio.enums import Resampling

from pipeline.access import DirectAccess
from pipeline.bands import NATIVE_GROUPS, RADAR_BANDS, RESOLUTION_M, SCENE_CLASSIFICATION
from pipeline.chips import Recipe, build_unit
from pipeline.grid import Cell, cells_bounds
from pipeline.layout import Layout
from pipeline.radiometry import harmonise, to_centi_db
from pipeline.reader import ReaderName, View, Window, reader_named
from pipeline.screening import ScreenRules, screen_chip, screen_classes
from pipeline.statistics import BandStatistics
from pipeline.store import Store
from pipeline.types import Acquisition
from tests.full_size_scenes import EPSG, LEFT, TOP, items, write_scenes

SIDE_M = 2640
LATENCY_MS = 40
ROUNDS = {8: 5, 4: 4}
THREADS = 16
GROUPS: tuple[tuple[int, str, tuple[str, ...]], ...] = (
    (10, "uint16", NATIVE_GROUPS["b10"]),
    (20, "uint16", NATIVE_GROUPS["b20"]),
    (60, "uint16", NATIVE_GROUPS["b60"]),
    (20, "uint8", (SCENE_CLASSIFICATION,)),
    (10, "float32", RADAR_BANDS),
)
GDAL = {
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",
    "GDAL_HTTP_MAX_RETRY": "4",
    "GDAL_HTTP_RETRY_DELAY": "0.5",
    "GDAL_HTTP_TIMEOUT": "30",
    "CPL_VSIL_CURL_CACHE_SIZE": "134217728",
}

Bounds = tuple[float, float, float, float]
_RUN = itertools.count()


@dataclass
class Server:
    """The archive's server and its counters."""

    process: subprocess.Popen[str]
    port: int

    def asked(self) -> dict[str, int]:
        """Requests and bytes since the last question."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        answer: dict[str, int] = json.loads(self.process.stdout.readline())
        return answer

    def fresh(self) -> str:
        """A base URL that nobody has read from."""
        return f"http://127.0.0.1:{self.port}/@{next(_RUN)}"


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    """A server of its own process over a folder."""
    command = [sys.executable, "-m", "tests.faulty_server", str(folder), str(LATENCY_MS)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield Server(process, int(process.stdout.readline()))
    finally:
        process.kill()
        process.wait()


def cells_at(column: int, row: int, side: int) -> list[Cell]:
    """A block of side x side cells, its north-western one so many cells into the scene."""
    first_column, first_row = LEFT // SIDE_M + 1 + column, TOP // SIDE_M - 2 - row
    return [
        Cell(epsg=EPSG, column=first_column + c, row=first_row - r, side_m=SIDE_M)
        for r in range(side)
        for c in range(side)
    ]


def by_stackstac(base: str, bounds: Bounds, resolutions: tuple[int, ...] | None = None) -> list[NDArray[Any]]:
    """Everything over the bounds, one chunk per band, on the sensors' own grids or all on one."""
    lazy = []
    west, south, east, north = items(base)["S2"].footprint.bounds
    for native, dtype, bands in GROUPS:
        resolution = resolutions[0] if resolutions else native
        lazy.append(
            stackstac.stack(
                [
                    {
                        "id": "scene",
                        "type": "Feature",
                        "geometry": None,
                        "bbox": [west, south, east, north],
                        "properties": {"datetime": "2023-06-01T00:00:00Z"},
                        "assets": {band: {"href": f"{base}/{band}.tif"} for band in bands},
                    }
                ],
                assets=list(bands),
                epsg=EPSG,
                resolution=resolution,
                bounds=bounds,
                snap_bounds=False,
                xy_coords="center",
                chunksize=(1, 1, -1, -1),
                dtype=np.dtype(dtype),
                fill_value=np.dtype(dtype).type(0),
                resampling=Resampling.nearest,
                rescale=False,
                properties=False,
                band_coords=False,
                errors_as_nodata=(),
            ).data
        )
    with dask.config.set(scheduler="threads", num_workers=THREADS):
        return [array[0] for array in dask.compute(*lazy)]


def by_odc(base: str, bounds: Bounds) -> list[NDArray[Any]]:
    """Everything over the bounds with odc-stac."""
    item = pystac.Item(
        id="scene",
        geometry=items(base)["S2"].footprint.__geo_interface__,
        bbox=list(items(base)["S2"].footprint.bounds),
        datetime=datetime(2023, 6, 1, tzinfo=UTC),
        properties={},
    )
    for _, dtype, bands in GROUPS:
        for band in bands:
            extra = {"raster:bands": [{"data_type": dtype, "nodata": 0}]}
            item.add_asset(band, pystac.Asset(href=f"{base}/{band}.tif", roles=["data"], extra_fields=extra))
    read = []
    for resolution, dtype, bands in GROUPS:
        shape = (round((bounds[3] - bounds[1]) / resolution), round((bounds[2] - bounds[0]) / resolution))
        box = GeoBox(shape, rasterio.transform.from_origin(bounds[0], bounds[3], resolution, resolution), EPSG)
        loaded = odc.stac.load([item], bands=list(bands), geobox=box, dtype=dtype, pool=THREADS)
        read.append(np.stack([loaded[band].values[0] for band in bands]))
    return read


def by_us(base: str, cells: Sequence[Cell], reader: ReaderName) -> tuple[dict[int, Any], list[dict[str, Any]]]:
    """Chips as the build makes them, and their ledger: read, harmonised, screened, cut."""
    rows = [
        {
            "row": number,
            "cell": cell.id,
            "pair": "pair",
            "unit": "unit",
            "split": "train",
            "optical_items": ["S2"],
            "radar_items": ["S1"],
        }
        for number, cell in enumerate(cells)
    ]
    return build_unit(rows, items(base), recipe(reader))


def recipe(reader: ReaderName) -> Recipe:
    """That keeps every chip."""
    return Recipe(screen=ScreenRules(max_cloud_fraction=1.0, min_valid_fraction=0.0), side_m=SIDE_M, reader=reader)


def pixels_only(base: str, cells: Sequence[Cell], reader: ReaderName) -> None:
    """The reading stage: classification first, then everything else, harmonised and in centi-dB."""
    own = items(base)
    optical, radar = (Acquisition(sensor=item.sensor, items=(item,)) for item in (own["S2"], own["S1"]))
    window = Window(epsg=EPSG, bounds=cells_bounds(cells), square_m=SIDE_M)
    asked = reader_named(reader, DirectAccess())
    view = View(window=window, looks=(optical, radar))
    classes = asked.classes([View(window=window, looks=(optical,))])
    asked.pixels([view], classes=classes)


def whole_job(base: str, cells: Sequence[Cell], reader: ReaderName, folder: Path) -> None:
    """Read, screened, counted, encoded and written."""
    chips, _ = by_us(base, cells, reader)
    assert len(chips) == len(cells)
    write(chips, folder)


def whole_job_of_peers(base: str, cells: Sequence[Cell], folder: Path) -> None:
    """The same store, but everything read by plain stackstac, block by block."""
    own, bounds = items(base), cells_bounds(cells)
    b10, b20, b60, scl, gamma0 = by_stackstac(base, bounds)
    offset_dn = own["S2"].offset_dn
    optical = {n: harmonise(a, offset_dn=offset_dn) for n, a in (("b10", b10), ("b20", b20), ("b60", b60))}
    arrays = {**optical, "scl": scl[0], "radar": to_centi_db(gamma0)}
    rules = recipe("stackstac").screen
    chips: dict[int, Any] = {}
    for number, cell in enumerate(cells):
        chip = {name: np.ascontiguousarray(cut(array, name, bounds, cell)) for name, array in arrays.items()}
        if not screen_chip(chip, screen_classes(chip["scl"], rules), rules).reason:
            chips[number] = chip
    assert len(chips) == len(cells)
    write(chips, folder)


def cut(array: NDArray[Any], name: str, bounds: Bounds, cell: Cell) -> NDArray[Any]:
    """The cell's part of an array over bounds."""
    resolution_m = RESOLUTION_M[name]
    left, _, right, top = cell.bounds
    row, column = round((bounds[3] - top) / resolution_m), round((left - bounds[0]) / resolution_m)
    side = round((right - left) / resolution_m)
    return array[..., row : row + side, column : column + side]


def write(chips: Mapping[int, Any], folder: Path) -> None:
    """Into a store of its own."""
    store = Store.create(str(folder / f"{next(_RUN)}.zarr"), Layout(shard_chips=64))
    store.resize(64)
    statistics = BandStatistics()
    store.write_shard(0, counted(chips, statistics))


def counted(chips: Mapping[int, Any], statistics: BandStatistics) -> Iterator[tuple[int, Any]]:
    """The chips, counted on their way."""
    for number, chip in chips.items():
        statistics.merge(BandStatistics.of(chip))
        yield number, chip


def ways_of(server: Server, folder: Path) -> dict[str, Callable[[Sequence[Cell]], object]]:
    """Name -> reading of a block of cells, from URLs never read before."""
    return {
        "stackstac, block": lambda cells: by_stackstac(server.fresh(), cells_bounds(cells)),
        "stackstac, block, all at 10 m": lambda cells: by_stackstac(server.fresh(), cells_bounds(cells), (10,)),
        "odc-stac, block": lambda cells: by_odc(server.fresh(), cells_bounds(cells)),
        "twinlook, stackstac": lambda cells: pixels_only(server.fresh(), cells, "stackstac"),
        "twinlook, window": lambda cells: pixels_only(server.fresh(), cells, "window"),
        "whole job, plain stackstac": lambda cells: whole_job_of_peers(server.fresh(), cells, folder),
        "whole job, stackstac": lambda cells: whole_job(server.fresh(), cells, "stackstac", folder),
        "whole job, window": lambda cells: whole_job(server.fresh(), cells, "window", folder),
    }


def measure(server: Server, way: Callable[[Sequence[Cell]], object], cells: Sequence[Cell]) -> dict[str, float]:
    """Per chip."""
    server.asked()
    start, busy = time.perf_counter(), time.process_time()
    way(cells)
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    asked = server.asked()
    return {
        "ms": 1000 * seconds / len(cells),
        "CPU ms": 1000 * busy / len(cells),
        "requests": asked["requests"] / len(cells),
        "MB": asked["bytes"] / 1e6 / len(cells),
    }


def table(server: Server, folder: Path, side: int, rounds: int) -> dict[str, dict[str, float]]:
    """Medians by way; the ways take turns, each round at another place, in another order."""
    seen: dict[str, list[dict[str, float]]] = defaultdict(list)
    rng = np.random.default_rng(0)
    ways = ways_of(server, folder)
    for number in range(rounds):
        cells = cells_at(3 * number, 5 * number, side)
        for name in rng.permutation(list(ways)):
            seen[name].append(measure(server, ways[name], cells))
    if side == max(ROUNDS):
        # One chip at a time, as is plain: a few say enough.
        for cell in cells_at(1, 1, 2):
            one = measure(server, lambda cells: by_stackstac(server.fresh(), cells_bounds(cells)), [cell])
            seen["stackstac, chip by chip"].append(one)
    return {name: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for name, runs in seen.items()}


def show(side: int, rows: dict[str, dict[str, float]]) -> None:
    """A table in Markdown."""
    base, job = rows["twinlook, window"]["ms"], rows["whole job, window"]["ms"]
    sys.stdout.write(f"\n| blocks of {side} x {side} | chips/s | CPU ms | requests | MB | time against window |\n")
    sys.stdout.write("|---|---|---|---|---|---|\n")
    for name, row in rows.items():
        ratio = row["ms"] / (job if name.startswith("whole job") else base)
        sys.stdout.write(
            f"| {name} | {1000 / row['ms']:.1f} | {row['CPU ms']:.1f} | {row['requests']:.2f} | {row['MB']:.2f} "
            f"| {ratio:.2f} |\n"
        )


def highest_rss_mib() -> float:
    """Of this program; getrusage would count what its parent held before it."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def peak(base: str, reader: ReaderName, folder: Path) -> None:
    """Make the chips of one block of 8 x 8, then a whole shard of four; print the most memory held after each."""
    before = highest_rss_mib()
    by_us(base, cells_at(0, 0, 8), reader)
    block = highest_rss_mib()
    store = Store.create(str(folder / "peak.zarr"), Layout())
    store.resize(256)
    statistics = BandStatistics()

    def shard() -> Iterator[tuple[int, Any]]:
        for place in range(4):
            chips = by_us(base, cells_at(8 * place, 0, 8), reader)[0]
            for number, chip in counted(chips, statistics):
                yield 64 * place + number, chip
            chips.clear()
            del chip

    store.write_shard(0, shard())
    sys.stdout.write(f"{before:.0f} {block:.0f} {highest_rss_mib():.0f}\n")


def main() -> None:
    """Measure and print tables."""
    scenes = Path(tempfile.gettempdir()) / "twinlook-bench-reading"
    write_scenes(scenes)
    os.environ.update(GDAL)
    odc.stac.configure_rio(cloud_defaults=True, GDAL_HTTP_MAX_RETRY="4", GDAL_HTTP_RETRY_DELAY="0.5")
    with serving(scenes) as server, tempfile.TemporaryDirectory() as folder:
        for side, rounds in ROUNDS.items():
            show(side, table(server, Path(folder), side, rounds))
        sys.stdout.write(f"\nload {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores\n")
        for reader in ("window", "stackstac"):
            command = [sys.executable, "-m", "tests.bench_reading", "peak", server.fresh(), reader, folder]
            ran = subprocess.run(command, check=True, capture_output=True, text=True)
            before, block, shard = ran.stdout.split()
            sys.stdout.write(f"peak MiB, {reader}: {before} before reading, {block} a block, {shard} a shard of 256\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["peak"]:
        peak(sys.argv[2], "stackstac" if sys.argv[3] == "stackstac" else "window", Path(sys.argv[4]))
    else:
        main()
