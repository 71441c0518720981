"""Pixels on another grid: bilinear by the book, the same whatever is read with them, on both sides of every border."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import rasterio
import shapely
from numpy.typing import NDArray
from pyproj import Transformer

from pipeline.access import DirectAccess
from pipeline.bands import RADAR_BANDS
from pipeline.chips import Recipe, build_unit
from pipeline.grid import Cell, cell_at
from pipeline.reader import Reader, ReaderName, ReadError, View, Window, reader_named
from pipeline.screening import ScreenRules
from pipeline.types import Acquisition, ChipArrays, Item, Sensor
from tests.distinct_scenes import optical_item, radar_item, write_tif

SIDE_M = 600
EAST = {"epsg": 32633, "left": 279_600, "top": 5_412_000}
"""In zone 33, just east of its border with zone 32."""


ROW = {"pair": "pair", "unit": "unit", "split": "train", "radar_items": ["S1"]}


@pytest.fixture(params=["window", "stackstac"])
def name(request: pytest.FixtureRequest) -> ReaderName:
    found: ReaderName = request.param
    return found


@pytest.fixture
def reader(name: ReaderName) -> Reader:
    return reader_named(name, DirectAccess())


def look(*items: Item) -> Acquisition:
    return Acquisition(sensor=items[0].sensor, items=items)


def block(side: int, epsg: int = 32632, *, inside: dict[str, int] = EAST) -> list[Cell]:
    """side x side cells of a zone around the middle of a scene of 3 km."""
    moved = Transformer.from_crs(inside["epsg"], epsg, always_xy=True)
    x, y = moved.transform(inside["left"] + 1500, inside["top"] - 1500)
    column, row = int(x // SIDE_M) - side // 2, int(y // SIDE_M) + side // 2
    return [Cell(epsg=epsg, column=column + c, row=row - r, side_m=SIDE_M) for r in range(side) for c in range(side)]


def window_of(cells: list[Cell]) -> Window:
    bounds = np.array([cell.bounds for cell in cells])
    left, bottom, right, top = *bounds[:, :2].min(axis=0), *bounds[:, 2:].max(axis=0)
    return Window(epsg=cells[0].epsg, bounds=(left, bottom, right, top), square_m=SIDE_M)


def bilinear(path: str, window: Window) -> NDArray[np.float64]:
    """(y, x) at 10 m, worked out pixel by pixel in double precision."""
    left, _, _, top = window.bounds
    rows, columns = window.shape(10)
    y, x = np.mgrid[0:rows, 0:columns] * 10.0 + 5.0
    with rasterio.open(path) as file:
        pixels = file.read(1).astype(np.float64)
        to_file = Transformer.from_crs(window.epsg, file.crs, always_xy=True)
        column, row = (axis - 0.5 for axis in ~file.transform * to_file.transform(left + x, top - y))
    r, c = np.floor(row).astype(int), np.floor(column).astype(int)
    down, right = row - r, column - c
    upper = pixels[r, c] * (1 - right) + pixels[r, c + 1] * right
    lower = pixels[r + 1, c] * (1 - right) + pixels[r + 1, c + 1] * right
    return upper * (1 - down) + lower * down


def noise(item: Item, place: dict[str, int], side_px: int) -> None:
    """Rough radar pixels, in which a kernel that is too wide, or a shift, shows."""
    rng = np.random.default_rng(0)
    for band in RADAR_BANDS:
        gamma0 = rng.gamma(1.0, 0.1, (side_px, side_px)).astype(np.float32) + np.float32(1e-3)
        write_tif(Path(item.assets[band]), gamma0, **place, pixel_m=10, nodata=-32768)


@pytest.mark.parametrize("shift_m", [0, 3])
def test_radar_of_another_zone_is_bilinear_in_linear_power(shift_m: int, reader: Reader, tmp_path: Path) -> None:
    place = {**EAST, "left": EAST["left"] + shift_m}
    item = radar_item(tmp_path, **place, side_px=300)
    noise(item, place, 300)
    window = window_of(block(3))
    (read,) = reader.pixels([View(window=window, looks=(look(item),))]).arrays
    for pixels, band in zip(read["radar"], RADAR_BANDS, strict=True):
        expected = 1000 * np.log10(bilinear(item.assets[band], window))
        assert np.abs(pixels - expected).max() <= 3
        assert (pixels == np.round(expected)).mean() > 0.99


@pytest.mark.parametrize("sensor", ["radar", "optical"])
def test_a_cell_has_the_same_pixels_alone_as_in_a_block(sensor: Sensor, reader: Reader, tmp_path: Path) -> None:
    item = (radar_item if sensor == "radar" else optical_item)(tmp_path, **EAST, side_px=300)
    if sensor == "radar":
        noise(item, EAST, 300)
    cells = block(3)
    views = [View(window=window_of(own), looks=(look(item),)) for own in (cells, *([cell] for cell in cells))]
    together, *alone = reader.pixels(views).arrays
    for number, own in enumerate(alone):
        for group, pixels in own.items():
            side = pixels.shape[-1]
            row, column = side * (number // 3), side * (number % 3)
            assert (together[group][:, row : row + side, column : column + side] == pixels).all(), (number, group)


def test_the_squares_of_a_window_cover_it_once() -> None:
    window = Window(epsg=32633, bounds=(0, 0, 1500, 1320), square_m=600)
    squares = window.squares()
    assert shapely.union_all([shapely.box(*each.bounds) for each in squares]).equals(shapely.box(*window.bounds))
    assert sum(shapely.box(*each.bounds).area for each in squares) == 1500 * 1320
    assert squares[0].bounds == (0, 720, 600, 1320)
    assert Window(epsg=32633, bounds=(0, 0, 60, 60)).squares() == [Window(epsg=32633, bounds=(0, 0, 60, 60))]


def unit_at_a_border(folder: Path) -> tuple[list[Cell], dict[str, Item], list[dict[str, object]]]:
    """Two cells of zone 33: one in its own zone's tile, one that only the neighbour's covers; and their rows."""
    side_px = 300
    items = {
        # The neighbour's comes first by name and holds other values.
        "S2-32": optical_item(folder, **neighbour(), side_px=side_px + 60, name="S2-32"),
        "S2-33": optical_item(folder, **EAST, side_px=side_px, name="S2-33"),
        "S1": radar_item(folder, **{**EAST, "left": EAST["left"] - 1200}, side_px=side_px + 120, name="S1"),
    }
    cells = [Cell(epsg=32633, column=EAST["left"] // SIDE_M + c, row=9018, side_m=SIDE_M) for c in (0, -1)]
    rows = [
        {
            "row": n,
            "cell": cell.id,
            "pair": "p",
            "unit": "u",
            "split": "train",
            "optical_items": own,
            "radar_items": ["S1"],
        }
        for n, (cell, own) in enumerate(zip(cells, (["S2-33"], ["S2-32"]), strict=True))
    ]
    return cells, items, rows


def neighbour() -> dict[str, int]:
    x, y = Transformer.from_crs(32633, 32632, always_xy=True).transform(EAST["left"], EAST["top"])
    return {"epsg": 32632, "left": round(x / 60) * 60 - 1800, "top": round(y / 60) * 60 + 600}


def recipe(name: ReaderName) -> Recipe:
    return Recipe(screen=ScreenRules(max_cloud_fraction=1.0, min_valid_fraction=0.0), side_m=SIDE_M, reader=name)


def equal(chip: ChipArrays, other: ChipArrays) -> bool:
    return chip.keys() == other.keys() and all((chip[name] == other[name]).all() for name in chip)


def test_a_chip_is_made_of_its_own_items_whatever_its_neighbours_need(name: ReaderName, tmp_path: Path) -> None:
    cells, items, rows = unit_at_a_border(tmp_path)
    together, ledger = build_unit(rows, items, recipe(name))
    assert [row["status"] for row in ledger] == ["written"] * 2
    for row in rows:
        alone, _ = build_unit([row], items, recipe(name))
        assert equal(alone[row["row"]], together[row["row"]]), row
    with rasterio.open(items["S2-33"].assets["B02"]) as file:
        copied = file.read(1, window=file.window(*cells[0].bounds))
    assert (together[0]["b10"][0] == copied).all()
    assert (together[1]["b10"] > 0).all()


def test_an_item_that_is_missing_costs_only_the_cells_that_need_it(name: ReaderName, tmp_path: Path) -> None:
    _, items, rows = unit_at_a_border(tmp_path)
    undisturbed, _ = build_unit(rows, items, recipe(name))
    gone = replace(items["S2-32"], assets={**items["S2-32"].assets, "B08": str(tmp_path / "nowhere.tif")})
    chips, ledger = build_unit(rows, {**items, "S2-32": gone}, recipe(name))
    assert [row["status"] for row in ledger] == ["written", "failed"]
    assert "item S2-32, band B08" in ledger[1]["error"]
    assert equal(chips[0], undisturbed[0])


def test_an_empty_file_across_the_antimeridian_is_a_failed_read(reader: Reader, tmp_path: Path) -> None:
    cell = cell_at(179.999, -17.0, side_m=2640)
    left, _, _, top = cell.bounds
    assert cell.footprint.bounds[0] < 180 < cell.footprint.bounds[2]
    item = radar_item(tmp_path, epsg=cell.epsg, left=left - 60, top=top + 60, side_px=276)
    halves = [
        shapely.transform(part, lambda xy: xy - [360.0 * (xy[:, 0].mean() > 180), 0.0])
        for world in ((-180, 180), (180, 540))
        for part in [item.footprint.intersection(shapely.box(world[0], -90, world[1], 90))]
    ]
    item = replace(item, footprint=shapely.union_all(halves))
    empty = np.full((276, 276), -32768, np.float32)
    write_tif(Path(item.assets["VH"]), empty, epsg=cell.epsg, left=left - 60, top=top + 60, pixel_m=10, nodata=-32768)
    with pytest.raises(ReadError, match="band VH: no data at all"):
        reader.pixels([View(window=Window(epsg=cell.epsg, bounds=cell.bounds), looks=(look(item),))])


def test_labels_on_both_sides_of_the_antimeridian_are_found(name: ReaderName, tmp_path: Path) -> None:
    cell = cell_at(179.999, -17.0, side_m=2640)
    left, _, _, top = cell.bounds
    place = {"epsg": cell.epsg, "left": left - 60, "top": top + 60, "side_px": 276}
    items = {"S2": optical_item(tmp_path, **place), "S1": radar_item(tmp_path, **place)}
    maps = []
    for west, code in ((179.5, 1), (-180.0, 2)):
        path = tmp_path / f"{code}.tif"
        with rasterio.open(
            path, "w", driver="GTiff", width=500, height=2000, count=1, dtype="uint8", crs="EPSG:4326",
            transform=rasterio.transform.from_origin(west, -16.0, 0.001, 0.001), nodata=0,
        ) as file:  # fmt: skip
            file.write(np.full((2000, 500), code, np.uint8), 1)
        maps.append((str(path), shapely.box(west, -18.0, west + 0.5, -16.0).wkb))
    rows = [{**ROW, "row": 0, "cell": cell.id, "optical_items": ["S2"]}]
    chips, ledger = build_unit(rows, items, replace(recipe(name), side_m=2640, labels={"cover": maps}))
    assert ledger[0]["error"] == ""
    classes, counts = np.unique(chips[0]["label_cover"], return_counts=True)
    shares = dict(zip(classes.tolist(), (counts / counts.sum()).tolist(), strict=True))
    west, _, east, _ = cell.footprint.bounds
    assert shares[1] == pytest.approx((180 - west) / (east - west), abs=0.03)
    assert shares[1] + shares[2] > 0.99
