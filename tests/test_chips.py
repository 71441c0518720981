"""From scenes to the store without a cluster: what is written is what the scenes hold, and the ledger adds up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import rasterio
from rasterio.windows import from_bounds

from pipeline.bands import NATIVE_GROUPS, RADAR_BANDS
from pipeline.chips import Recipe
from pipeline.grid import Cell
from pipeline.ingest import build_shard
from pipeline.manifest import items_table, plan_rows, rejections_table
from pipeline.pairing import PairRules, acquisitions, pair_cells
from pipeline.screening import ScreenRules
from pipeline.splits import SplitRules
from pipeline.store import Layout, Store
from pipeline.types import Item
from pipeline.versions import Version, begin
from tests.distinct_scenes import optical_item, radar_item, write_tif

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
def test_the_store_holds_the_scenes_own_pixels(place: dict[str, int], offset: int, tmp_path: Path) -> None:
    items = scene(tmp_path / "scenes", place, offset)
    version = built(tmp_path / "store.zarr", place, items)
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
