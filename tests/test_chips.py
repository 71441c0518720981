"""From scenes to the store without a cluster: what is written is what the scenes hold, and the ledger adds up."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import rasterio
from hypothesis import given
from hypothesis import strategies as st
from rasterio.windows import from_bounds

from pipeline.bands import NATIVE_GROUPS, RADAR_BANDS, RESOLUTION_M
from pipeline.chips import Recipe, build_unit, reading_groups
from pipeline.grid import Cell, cells_bounds
from pipeline.ingest import build_shard
from pipeline.manifest import items_table, plan_rows, rejections_table
from pipeline.pairing import PairRules, acquisitions, pair_cells
from pipeline.reader import ReaderName
from pipeline.screening import ScreenRules
from pipeline.splits import SplitRules
from pipeline.store import Layout, Store
from pipeline.types import Item
from pipeline.versions import Version, begin
from tests.distinct_scenes import optical_item, placed_optical_item, placed_radar_item, radar_item, write_tif

SIDE_PX = 12
SIDE_M = 120
RULES = PairRules(max_dt_days=3, max_cloud_percent=60, min_overlap=0.999, per_cell="all")
SPLITS = SplitRules(block_cells=4, val_fraction=0, test_fraction=0, buffer_cells=0, seed=0)
RECIPE = Recipe(screen=ScreenRules(max_cloud_fraction=0.2, min_valid_fraction=0.99), signing="none", side_m=SIDE_M)
NORTH = {"epsg": 32633, "left": 300_000, "top": 5_400_000}
SOUTH = {"epsg": 32733, "left": 300_000, "top": 7_299_880}  # 10 000 000 m less a multiple of 120 m
CELLS_PER_SIDE = 4


def scene(folder: Path, place: dict[str, int], offset_dn: int = 0) -> tuple[Item, Item]:
    around = {**place, "left": place["left"] - 60, "top": place["top"] + 60}
    side = CELLS_PER_SIDE * SIDE_PX + 12
    radar_place = {**place, "left": place["left"] - 30, "top": place["top"] + 50}
    return (
        optical_item(folder, **around, side_px=side, offset_dn=offset_dn),
        radar_item(folder, **radar_place, side_px=side),
    )


def cells(place: dict[str, int]) -> list[Cell]:
    origin = 0 if place["epsg"] < 32700 else 10_000_000
    column, row = place["left"] // SIDE_M, (place["top"] - origin) // SIDE_M - 1
    assert place["left"] % SIDE_M == 0
    assert (place["top"] - origin) % SIDE_M == 0
    return [
        Cell(epsg=place["epsg"], column=column + c, row=row - r, side_m=SIDE_M)
        for r in range(CELLS_PER_SIDE)
        for c in range(CELLS_PER_SIDE)
    ]


def built(url: Path, place: dict[str, int], items: tuple[Item, Item], recipe: Recipe = RECIPE) -> Version:
    labels = {name: {1: "one"} for name in recipe.labels}
    store = Store.create(str(url), Layout(side_px=SIDE_PX, shard_chips=8, labels=labels))
    version = begin(str(url), {"test": 1})
    pairs, rejections = pair_cells(cells(place), acquisitions(items[:1]), acquisitions(items[1:]), RULES)
    assert len(pairs) == CELLS_PER_SIDE**2
    manifest = plan_rows(pairs, block_cells=2, shard_chips=8, first_row=0, splits=SPLITS)
    store.resize(manifest["row"][-1].as_py() + 1)
    version.write_plan(items_table(pairs), rejections_table(rejections), [manifest])
    for shard in version.shards():
        rows = manifest.filter(np.asarray(manifest["shard"]) == shard)
        build_shard(version, shard, rows, version.items(), recipe)
    return version


@pytest.mark.parametrize("place", [NORTH, SOUTH], ids=["north", "south"])
@pytest.mark.parametrize("offset", [0, 1000])
@pytest.mark.parametrize("reader", ["window", "stackstac"])
def test_the_store_holds_the_scenes_own_pixels(
    place: dict[str, int], offset: int, reader: ReaderName, tmp_path: Path
) -> None:
    items = scene(tmp_path / "scenes", place, offset)
    version = built(tmp_path / "store.zarr", place, items, replace(RECIPE, reader=reader))
    store = Store.open(version.url)
    table = version.chips().to_pylist()
    assert [row["status"] for row in table] == ["written"] * 16
    for row in table:
        cell = Cell.from_id(row["cell"], side_m=SIDE_M)
        chip = store.read_chip(row["row"])
        for group, bands in NATIVE_GROUPS.items():
            for pixels, band in zip(chip[group], bands, strict=True):
                assert (pixels == np.maximum(window_of(items[0].assets[band], cell).astype(int) - offset, 1)).all(), (
                    band
                )
        for pixels, band in zip(chip["radar"], RADAR_BANDS, strict=True):
            gamma0 = window_of(items[1].assets[band], cell).astype(np.float64)
            assert (pixels == np.maximum(np.round(1000 * np.log10(gamma0)), -5000)).all(), band
        assert (chip["scl"] == 4).all()
    assert version.seal()["written"] == 16


def test_a_second_build_writes_the_same_bytes(tmp_path: Path) -> None:
    items = scene(tmp_path / "scenes", NORTH)
    first, second = (built(tmp_path / name, NORTH, items) for name in ("a.zarr", "b.zarr"))
    assert first.chips().equals(second.chips())

    def files(folder: Path) -> dict[str, bytes]:
        kept = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "request.json")
        return {str(path.relative_to(folder)): path.read_bytes() for path in kept}

    assert files(tmp_path / "a.zarr") == files(tmp_path / "b.zarr")


def test_cloudy_cells_are_rejected_and_the_rest_is_kept(tmp_path: Path) -> None:
    items = scene(tmp_path / "scenes", NORTH)
    classes = np.full((30, 30), 4, np.uint8)
    classes[:9, :9] = 9  # 60 m of margin, then exactly the first cell
    write_tif(Path(items[0].assets["SCL"]), classes, epsg=32633, left=299_940, top=5_400_060, pixel_m=20, nodata=0)
    table = built(tmp_path / "store.zarr", NORTH, items).chips().to_pylist()
    rejected = [row for row in table if row["status"] == "rejected"]
    assert [row["cell"] for row in rejected] == [cells(NORTH)[0].id]
    assert rejected[0]["reason"] == "cloudy"
    assert rejected[0]["cloud_fraction"] == 1.0
    assert sum(row["status"] == "written" for row in table) == 15


def test_a_corrupt_file_costs_only_the_cells_that_it_touches(tmp_path: Path) -> None:
    items = scene(tmp_path / "scenes", NORTH)
    path = Path(items[0].assets["B08"])
    with rasterio.open(path) as file:
        assert file.block_shapes == [(64, 64)]
    write_corrupt_corner(path)
    version = built(tmp_path / "store.zarr", NORTH, items)
    table = version.chips().to_pylist()
    failed = {row["cell"] for row in table if row["status"] == "failed"}
    assert failed
    assert len(failed) < 16
    assert all("B08" in row["error"] and row["cell"] in row["error"] for row in table if row["status"] == "failed")
    assert version.seal()["requested"] == 16


def test_a_missing_file_fails_its_chips_and_not_the_build(tmp_path: Path) -> None:
    items = scene(tmp_path / "scenes", NORTH)
    Path(items[1].assets["VV"]).unlink()
    table = built(tmp_path / "store.zarr", NORTH, items).chips().to_pylist()
    assert {row["status"] for row in table} == {"failed"}
    assert all("VV" in row["error"] for row in table)


def test_labels_are_stored_beside_the_chips(tmp_path: Path) -> None:
    items = scene(tmp_path / "scenes", NORTH)
    classes = np.arange(3600, dtype=np.int64).reshape(60, 60) % 90 + 1
    path = tmp_path / "map.tif"
    write_tif(path, classes.astype(np.uint8), epsg=32633, left=299_940, top=5_400_060, pixel_m=10, nodata=0)
    recipe = replace(RECIPE, labels={"cover": [(str(path), items[0].footprint.wkb)]})
    version = built(tmp_path / "store.zarr", NORTH, items, recipe)
    store = Store.open(version.url)
    for row in version.chips().to_pylist():
        cell = Cell.from_id(row["cell"], side_m=SIDE_M)
        assert (store.read_chip(row["row"])["label_cover"] == window_of(str(path), cell)).all()


def window_of(path: str, cell: Cell) -> np.ndarray:
    with rasterio.open(path) as file:
        pixels: np.ndarray = file.read(1, window=from_bounds(*cell.bounds, transform=file.transform))
        return pixels


def write_corrupt_corner(path: Path) -> None:
    """Overwrite the file's last block of pixels, which is not its only one, with what no inflater accepts."""
    with rasterio.open(path) as file:
        values, profile = file.read(1), file.profile
    profile.update(blockxsize=16, blockysize=16)
    with rasterio.open(path, "w", **profile) as file:
        file.write(values, 1)
    content = path.read_bytes()
    path.write_bytes(content[:-200] + b"\xff" * 200)


def block(side: int) -> dict[int, Cell]:
    """The cells of a whole block at full size, numbered from north-west."""
    return {
        r * side + c: Cell(epsg=32633, column=120 + c, row=2007 - r, side_m=2640)
        for r in range(side)
        for c in range(side)
    }


def test_a_full_block_is_read_together_and_a_sparse_one_in_parts() -> None:
    cells = block(8)
    assert reading_groups(cells) == [list(cells)]
    corners = {number: cells[number] for number in (0, 63)}
    assert reading_groups(corners) == [[0], [63]]
    half = {number: cell for number, cell in cells.items() if number % 8 < 4}
    assert sorted(number for group in reading_groups(half) for number in group) == sorted(half)


@given(st.sets(st.integers(0, 63), min_size=1))
def test_groups_hold_every_cell_once_and_never_cost_more_than_the_block(numbers: set[int]) -> None:
    cells = {number: cell for number, cell in block(8).items() if number in numbers}
    groups = reading_groups(cells)
    assert sorted(number for group in groups for number in group) == sorted(numbers)
    assert len(groups) <= 4

    def area(group: Iterable[int]) -> float:
        left, bottom, right, top = cells_bounds(cells[number] for number in group)
        return (right - left + 5120) * (top - bottom + 5120)

    assert sum(map(area, groups)) <= area(cells)


@pytest.mark.parametrize("reader", ["window", "stackstac"])
def test_a_sparse_block_gives_the_same_chips_as_a_full_one(reader: ReaderName, tmp_path: Path) -> None:
    place = {"epsg": 32633, "left": 300_000, "top": 5_400_000}
    side_m, side = 600, 8
    items = {
        item.id: item
        for item in (
            optical_item(tmp_path, **place, side_px=side * side_m // 10),
            radar_item(tmp_path, **place, side_px=side * side_m // 10),
        )
    }
    rows = [
        {
            "row": number,
            "cell": Cell(epsg=32633, column=500 + number % 8, row=8999 - number // 8, side_m=side_m).id,
            "pair": "pair",
            "unit": "unit",
            "split": "train",
            "optical_items": ["S2"],
            "radar_items": ["S1"],
        }
        for number in range(64)
    ]
    recipe = replace(RECIPE, side_m=side_m, reader=reader)
    full, _ = build_unit(rows, items, recipe)
    sparse, ledger = build_unit([rows[0], rows[9], rows[63]], items, recipe)
    assert [row["status"] for row in ledger] == ["written"] * 3
    assert sorted(full) == list(range(64))
    for number, chip in sparse.items():
        assert all((chip[name] == full[number][name]).all() for name in chip)


@pytest.mark.slow
def test_memory_for_a_block_of_full_chips_is_bounded(tmp_path: Path) -> None:
    place = {"epsg": 32633, "left": 300_960, "top": 5_401_440}
    optical_item(tmp_path, **place, side_px=2124)
    radar_item(tmp_path, **place, side_px=2124)
    script = f"""
from pathlib import Path
from tests.test_chips import peak_of_a_block
print(peak_of_a_block(Path({str(tmp_path)!r})))
"""
    ran = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    before, after = (float(number) for number in ran.stdout.split())
    chips_mb = 64 * 1.09  # of stored pixels
    assert after - before < 5 * chips_mb


def peak_of_a_block(folder: Path) -> str:
    """Highest resident memory before and after making 8 x 8 chips of 264 px, in MB."""
    place = {"epsg": 32633, "left": 300_960, "top": 5_401_440, "side_px": 2124}
    items = {"S2": placed_optical_item(folder, **place), "S1": placed_radar_item(folder, **place)}
    rows = [
        {
            "row": number,
            "cell": Cell(epsg=32633, column=114 + number % 8, row=2045 - number // 8, side_m=2640).id,
            "pair": "pair",
            "unit": "unit",
            "split": "train",
            "optical_items": ["S2"],
            "radar_items": ["S1"],
        }
        for number in range(64)
    ]
    before = highest_rss_mb()
    chips, _ = build_unit(rows, items, replace(RECIPE, side_m=2640))
    assert len(chips) == 64
    return f"{before} {highest_rss_mb()}"


def highest_rss_mb() -> float:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e6


@pytest.mark.parametrize(
    ("added", "said", "flags"),
    [(0, 0, ""), (1000, 1000, ""), (1000, 0, "offset_suspect"), (0, 1000, "double_offset_suspect")],
)
def test_an_offset_that_is_not_as_said_is_flagged_and_recorded(
    added: int, said: int, flags: str, tmp_path: Path
) -> None:
    optical, radar = scene(tmp_path / "scenes", NORTH, said)
    dark = np.random.default_rng(0)
    for group, bands in NATIVE_GROUPS.items():
        pixel = RESOLUTION_M[group]
        for band in bands:
            values = dark.integers(50, 700, (600 // pixel, 600 // pixel)).astype(np.uint16) + np.uint16(added)
            place = {"epsg": 32633, "left": 299_940, "top": 5_400_060}
            write_tif(Path(optical.assets[band]), values, **place, pixel_m=pixel, nodata=0)
    table = built(tmp_path / "store.zarr", NORTH, (optical, radar)).chips().to_pylist()
    assert {row["status"] for row in table} == {"written"}
    # What a unit's pixels say goes for all its chips; here four units of four cells, each with few pixels.
    assert {row["flags"] for row in table} <= {flags, ""}
    recipe = replace(RECIPE, screen=replace(RECIPE.screen, on_suspect="reject"))
    whole = [
        {
            "row": number,
            "cell": cell.id,
            "pair": "pair",
            "unit": "unit",
            "split": "train",
            "optical_items": ["S2"],
            "radar_items": ["S1"],
        }
        for number, cell in enumerate(cells(NORTH))
    ]
    chips, ledger = build_unit(whole, {"S2": optical, "S1": radar}, recipe)
    assert {row["flags"] for row in ledger} == {flags}
    assert {row["reason"] for row in ledger} == ({"suspect"} if flags else {""})
    assert len(chips) == (0 if flags else 16)
