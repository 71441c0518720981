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
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import dask
import numpy as np
import odc.stac
import psutil
import pyarrow as pa
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
from pipeline.ingest import by_recipe, made_chips
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
ROUNDS = {8: 8, 4: 4}
"""After one that does not count."""

BLOCKS = 2
"""Read one after another by each process in a round."""

CPUS = os.cpu_count() or 1
_SCRATCH = Path(tempfile.gettempdir()) / "twinlook-bench-stores"

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

    def cpu_seconds(self) -> float:
        """Used by the server so far."""
        used = psutil.Process(self.process.pid).cpu_times()
        return used.user + used.system

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


def rows_of(blocks: Sequence[Sequence[Cell]]) -> list[dict[str, Any]]:
    """Rows of a manifest: a unit for each block."""
    places = [(block, cell) for block, cells in enumerate(blocks) for cell in cells]
    return [
        {
            "row": number,
            "cell": cell.id,
            "pair": "pair",
            "unit": f"unit-{block}",
            "split": "train",
            "optical_items": ["S2"],
            "radar_items": ["S1"],
        }
        for number, (block, cell) in enumerate(places)
    ]


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


def whole_job(base: str, blocks: Sequence[Sequence[Cell]], reader: ReaderName, folder: Path) -> None:
    """A shard as a task builds it: read, screened, counted, encoded and written."""
    rows, made = rows_of(blocks), by_recipe(recipe(reader))
    ledger = list[dict[str, Any]]()
    store = Store.create(str(folder / f"{next(_RUN)}.zarr"), Layout(shard_chips=len(rows)))
    store.resize(len(rows))
    store.write_shard(0, made_chips(pa.Table.from_pylist(rows), items(base), made, ledger, BandStatistics()))
    assert [row["status"] for row in ledger] == ["written"] * len(rows)


def whole_job_of_peers(base: str, blocks: Sequence[Sequence[Cell]], folder: Path) -> None:
    """The same shard, but everything read by plain stackstac, block after block."""
    num_chips = sum(map(len, blocks))
    store = Store.create(str(folder / f"{next(_RUN)}.zarr"), Layout(shard_chips=num_chips))
    store.resize(num_chips)
    store.write_shard(0, enumerate(chip for cells in blocks for chip in chips_of_peers(base, cells)))


def chips_of_peers(base: str, cells: Sequence[Cell]) -> Iterator[dict[str, Any]]:
    """Read, screened and counted."""
    offset_dn, bounds, rules = items(base)["S2"].offset_dn, cells_bounds(cells), recipe("stackstac").screen
    b10, b20, b60, scl, gamma0 = by_stackstac(base, bounds)
    optical = {n: harmonise(a, offset_dn=offset_dn) for n, a in (("b10", b10), ("b20", b20), ("b60", b60))}
    arrays = {**optical, "scl": scl[0], "radar": to_centi_db(gamma0)}
    statistics = BandStatistics()
    for cell in cells:
        chip = {name: np.ascontiguousarray(cut(array, name, bounds, cell)) for name, array in arrays.items()}
        assert not screen_chip(chip, screen_classes(chip["scl"], rules), rules).reason
        own = BandStatistics.of(chip)
        statistics.merge(own)
        own.moments()
        yield chip


def cut(array: NDArray[Any], name: str, bounds: Bounds, cell: Cell) -> NDArray[Any]:
    """The cell's part of an array over bounds."""
    resolution_m = RESOLUTION_M[name]
    left, _, right, top = cell.bounds
    row, column = round((bounds[3] - top) / resolution_m), round((left - bounds[0]) / resolution_m)
    side = round((right - left) / resolution_m)
    return array[..., row : row + side, column : column + side]


Blocks = Sequence[Sequence[Cell]]


def ways_of(bases: Iterator[str], folder: Path) -> dict[str, Callable[[Blocks], object]]:
    """Name -> reading of blocks of cells, one after another, from URLs never read before."""

    def each(read: Callable[[str, Sequence[Cell]], object]) -> Callable[[Blocks], object]:
        return lambda blocks: [read(next(bases), cells) for cells in blocks]

    return {
        "stackstac, block": each(lambda base, cells: by_stackstac(base, cells_bounds(cells))),
        "stackstac, block, all at 10 m": each(lambda base, cells: by_stackstac(base, cells_bounds(cells), (10,))),
        "odc-stac, block": each(lambda base, cells: by_odc(base, cells_bounds(cells))),
        "twinlook, stackstac": each(lambda base, cells: pixels_only(base, cells, "stackstac")),
        "twinlook, window": each(lambda base, cells: pixels_only(base, cells, "window")),
        "whole job, plain stackstac": lambda blocks: whole_job_of_peers(next(bases), blocks, folder),
        "whole job, stackstac": lambda blocks: whole_job(next(bases), blocks, "stackstac", folder),
        "whole job, window": lambda blocks: whole_job(next(bases), blocks, "window", folder),
    }


def run(name: str, bases: Sequence[str], blocks: Blocks, folder: Path) -> float:
    """Read blocks in one way, in a process of the pool; processor seconds that it took."""
    busy = time.process_time()
    ways_of(iter(bases), folder)[name](blocks)
    return time.process_time() - busy


def measure(server: Server, pool: ProcessPoolExecutor, name: str, lots: Sequence[Blocks]) -> dict[str, float]:
    """Per chip, of as many processes at a time as there are CPUs, which is how a node builds; and of the server."""
    num_chips = sum(len(cells) for blocks in lots for cells in blocks)
    folder = Path(tempfile.mkdtemp(dir=_SCRATCH))
    tasks = [(name, [server.fresh() for _ in blocks], blocks, folder / str(lot)) for lot, blocks in enumerate(lots)]
    server.asked()
    of_server = server.cpu_seconds()
    start = time.perf_counter()
    busy = sum(pool.map(run, *zip(*tasks, strict=True)))
    seconds = time.perf_counter() - start
    of_server = server.cpu_seconds() - of_server
    asked = server.asked()
    shutil.rmtree(folder)
    return {
        "ms": 1000 * seconds / num_chips,
        "CPU ms": 1000 * busy / num_chips,
        "server CPU ms": 1000 * of_server / num_chips,
        "requests": asked["requests"] / num_chips,
        "MB": asked["bytes"] / 1e6 / num_chips,
    }


def table(server: Server, pool: ProcessPoolExecutor, side: int, rounds: int) -> dict[str, dict[str, float]]:
    """Medians by way; the ways take turns, each round at other places, in another order."""
    seen: dict[str, list[dict[str, float]]] = defaultdict(list)
    rng = np.random.default_rng(0)
    names = list(ways_of(iter(()), _SCRATCH))
    for number in range(rounds + 1):
        lots = [
            [cells_at(2 * number + side * place, 3 * number + side * lot, side) for place in range(BLOCKS)]
            for lot in range(CPUS)
        ]
        for name in rng.permutation(names):
            measured = measure(server, pool, str(name), lots)
            if number:
                seen[name].append(measured)
    if side == max(ROUNDS):
        # One chip at a time, as is plain: a few say enough.
        for cell in cells_at(1, 1, 2):
            seen["stackstac, chip by chip"].append(measure(server, pool, "stackstac, block", [[[cell]]]))
    return {name: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for name, runs in seen.items()}


def show(side: int, rows: dict[str, dict[str, float]]) -> None:
    """A table in Markdown."""
    sys.stdout.write(f"\n| {side} x {side} cells | chips/s | CPU ms | of the server | requests | MB | time | CPU |\n")
    sys.stdout.write("|---|---|---|---|---|---|---|---|\n")
    for name, row in rows.items():
        base = rows["whole job, window" if name.startswith("whole job") else "twinlook, window"]
        sys.stdout.write(
            f"| {name} | {1000 / row['ms']:.1f} | {row['CPU ms']:.1f} | {row['server CPU ms']:.1f} "
            f"| {row['requests']:.2f} | {row['MB']:.2f} | {row['ms'] / base['ms']:.2f} "
            f"| {row['CPU ms'] / base['CPU ms']:.2f} |\n"
        )


def highest_rss_mib() -> float:
    """Of this program; getrusage would count what its parent held before it."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def peak(base: str, reader: ReaderName, folder: Path) -> None:
    """Make the chips of one block of 8 x 8, then a whole shard of four; print the most memory held after each."""
    before = highest_rss_mib()
    build_unit(rows_of([cells_at(0, 0, 8)]), items(base), recipe(reader))
    block = highest_rss_mib()
    whole_job(base, [cells_at(8 * place, 0, 8) for place in range(4)], reader, folder)
    sys.stdout.write(f"{before:.0f} {block:.0f} {highest_rss_mib():.0f}\n")


def settle() -> None:
    """What a process needs before it reads."""
    os.environ.update(GDAL)
    odc.stac.configure_rio(cloud_defaults=True, GDAL_HTTP_MAX_RETRY="4", GDAL_HTTP_RETRY_DELAY="0.5")


def main() -> None:
    """Measure and print tables."""
    scenes = Path(tempfile.gettempdir()) / "twinlook-bench-reading"
    write_scenes(scenes)
    _SCRATCH.mkdir(exist_ok=True)
    with serving(scenes) as server, ProcessPoolExecutor(CPUS, get_context("spawn"), initializer=settle) as pool:
        for side, rounds in ROUNDS.items():
            show(side, table(server, pool, side, rounds))
        sys.stdout.write(f"\nload {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores\n")
        for reader in ("window", "stackstac"):
            alone = [sys.executable, "-m", "tests.bench_reading", "peak"]
            command = [*alone, server.fresh(), reader, str(_SCRATCH / reader)]
            ran = subprocess.run(command, check=True, capture_output=True, text=True)
            before, block, shard = ran.stdout.split()
            sys.stdout.write(f"peak MiB, {reader}: {before} before reading, {block} a block, {shard} a shard of 256\n")
    shutil.rmtree(_SCRATCH)


if __name__ == "__main__":
    if sys.argv[1:2] == ["peak"]:
        peak(sys.argv[2], "stackstac" if sys.argv[3] == "stackstac" else "window", Path(sys.argv[4]))
    else:
        main()
