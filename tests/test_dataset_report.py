"""The page about a dataset: its numbers are those of a plain count, and it stays small for a million chips."""

from __future__ import annotations

import re
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from jobs.support.chip_pictures import coloured, true_colour, views
from jobs.support.dataset_facts import BANDS, dataset_facts, even_rows
from jobs.support.dataset_report import dataset_page, write_dataset_report
from jobs.support.pictures import coverage_map
from pipeline.chip_places import centres, footprints, georeferences, unrolled
from pipeline.chip_table import FROM_MANIFEST, SCHEMA, chip_table
from pipeline.grid import Cell, cell_at
from pipeline.layout import Layout
from pipeline.manifest import ITEMS_SCHEMA, LOOKS_SCHEMA, MANIFEST_SCHEMA, REJECTIONS_SCHEMA, ROWS_SCHEMA
from pipeline.objects import Objects
from pipeline.statistics import BandStatistics
from pipeline.store import Store
from pipeline.types import ChipArrays
from pipeline.versions import Version, begin
from tests.sample_chips import LAYOUT, make_chip
from tests.small_stores import MOMENT, Candidate, write_store

SIDE_M = LAYOUT.side_px * 10
FIRST = cell_at(11.5, 48.2, side_m=SIDE_M)
REJECTIONS = [
    {"cell": FIRST.id, "optical": "S2A", "reason": "cloudy_scene", "detail": "90 %"},
    {"cell": FIRST.id, "optical": "S2B", "reason": "cloudy_scene", "detail": "91 %"},
    {"cell": FIRST.id, "optical": "", "reason": "no_optical", "detail": "none"},
]


def neighbour(number: int) -> Cell:
    """Cells in rows of four."""
    return Cell(epsg=FIRST.epsg, column=FIRST.column + number % 4, row=FIRST.row + number // 4, side_m=SIDE_M)


def small_store(folder: Path, *, statuses: str = "wwwrwfwwrwwwww") -> Version:
    names = {"w": "written", "r": "rejected", "f": "failed"}
    splits = ("train", "val", "test", "buffer")
    # The first cell twice: two looks at one place.
    cells = [neighbour(max(0, number - 1)) for number in range(len(statuses))]
    candidates = [
        Candidate(cell=cell, split=splits[number % 4], status=names[status])
        for number, (cell, status) in enumerate(zip(cells, statuses, strict=True))
    ]
    return write_store(
        str(folder / "chips.zarr"), LAYOUT, candidates, make_chip,
        request={"region": "somewhere", "period": "2023-07"}, rejections=REJECTIONS, statistics=True,
    )  # fmt: skip


def test_the_facts_are_those_of_a_plain_count(tmp_path: Path) -> None:
    version = small_store(tmp_path)
    facts = dataset_facts(version)
    chips, manifest = version.chips().to_pylist(), version.manifest().to_pylist()
    written = [row for row in chips if row["status"] == "written"]
    counts = facts.counts
    assert counts["ledger"]["requested"] == len(chips)
    assert counts["ledger"]["written"] == len(written)
    assert counts["ledger"]["reasons"] == {"cloudy": 2}
    assert counts["pairs_not_taken"] == {"cloudy_scene": 2, "no_optical": 1}
    assert counts["failures"] == [
        {"kind": "decode error", "count": 1, "first_row": 5, "example": "item S2 band B02: decode error"}
    ]
    for split, found in counts["splits"].items():
        assert found == {
            status: sum(row["split"] == split and row["status"] == status for row in chips)
            for status in ("written", "rejected", "failed")
        }
    assert list(counts["splits"]) == ["train", "val", "test", "buffer"]
    assert counts["places"]["asked"] == len({row["cell"] for row in chips})
    assert counts["places"]["with_chips"] == len({row["cell"] for row in written})
    assert facts.place_chips.sum() == len(written)
    assert facts.place_chips.max() == max(Counter(row["cell"] for row in written).values()) == 2
    assert counts["time"]["months"] == {"2023-07": len(written)}
    assert counts["time"]["months_of_year"][6] == len(written)
    assert counts["time"]["first"] == "2023-07-01T10:00:00Z"
    assert counts["orbits"]["relative_orbits"] == {"44 ascending": len(written)}
    days = [row["dt_s"] / 86400 for row in manifest if row["row"] in {each["row"] for each in written}]
    assert counts["days_between"]["min"] == pytest.approx(min(days), abs=1e-4)
    assert counts["days_between"]["max"] == pytest.approx(max(days), abs=1e-4)
    assert facts.histograms["days_between"].total.sum() == len(written)
    cloud = facts.histograms["cloud_fraction"]
    assert {name: int(n.sum()) for name, n in cloud.series.items()} == {"written": len(written), "rejected": 2}
    assert counts["fractions"]["cloud_fraction"]["max"] == pytest.approx(0.9)
    assert "snow_fraction" not in facts.histograms, "nobody looked"


def test_means_and_deviations_are_those_of_all_pixels(tmp_path: Path) -> None:
    version = small_store(tmp_path)
    chips = [make_chip(row["row"]) for row in version.chips().to_pylist() if row["status"] == "written"]
    found = {band["band"]: band for band in dataset_facts(version).counts["bands"]}
    assert list(found) == list(BANDS)
    for band, array, index, nodata, scale in (
        ("B03", "b10", 1, 0, 1),
        ("B11", "b20", 4, 0, 1),
        ("VH", "radar", 1, -32768, 100),
    ):
        pixels = np.concatenate([chip[array][index].ravel() for chip in chips]).astype(float)
        pixels = pixels[pixels != nodata] / scale
        assert found[band]["mean"] == pytest.approx(pixels.mean(), rel=2e-3)
        assert found[band]["std"] == pytest.approx(pixels.std(), rel=2e-3)
        assert sum(found[band]["histogram"]["series"]["chips"]) == len(chips)


def test_where_pixels_were_counted_their_histograms_are_shown(tmp_path: Path) -> None:
    store = Store.create(str(tmp_path / "chips.zarr"), LAYOUT)
    version = begin(store.url, {})
    manifest = pa.Table.from_pylist([manifest_row(row) for row in range(6)], schema=MANIFEST_SCHEMA)
    version.write_plan(ITEMS_SCHEMA.empty_table(), REJECTIONS_SCHEMA.empty_table(), [manifest])
    for shard in version.shards():
        rows = version.manifest_of(shard, columns=FROM_MANIFEST).to_pylist()
        hashes = store.write_shard(shard, [(row["row"], make_chip(row["row"])) for row in rows])
        counted = BandStatistics()
        for row in rows:
            counted.add(make_chip(row["row"]))
        fates = [{**row, "status": "written", "sha256": hashes[row["row"]]} for row in rows]
        version.write_part(shard, chip_table(fates), statistics=counted)
    version.seal()
    found = {band["band"]: band for band in dataset_facts(version).counts["bands"]}
    pixels = np.concatenate([make_chip(row)["b20"][4].ravel() for row in range(6)]).astype(float)
    pixels = pixels[pixels > 0]
    assert found["B11"]["mean"] == pytest.approx(pixels.mean(), abs=1e-3)
    assert found["B11"]["std"] == pytest.approx(pixels.std(), abs=1e-3)
    for name, value in found["B11"]["percentiles"].items():
        assert value == pytest.approx(np.percentile(pixels, float(name)), abs=17)
    histogram = found["B11"]["histogram"]
    assert found["B11"]["histogram_of"] == "pixels"
    assert sum(histogram["series"]["pixels"]) > 0.97 * len(pixels)
    assert len(histogram["edges"]) <= 42
    page = dataset_page(version, gallery=0)
    assert '<th class="n">98 %</th>' in page
    assert '<th class="n">2 %</th>' in page


def test_the_page_says_it_all_and_fetches_nothing(tmp_path: Path) -> None:
    version = small_store(tmp_path)
    url = write_dataset_report(version, Objects.at(tmp_path / "out"), gallery=6)
    page = (tmp_path / "out/report.html").read_text()
    assert url.endswith("out/report.html")
    assert "http://" not in page
    assert "https://" not in page
    for said in (
        "the optical scene is too cloudy",
        "decode error",
        "44 ascending",
        "2023-07",
        "somewhere",
        "worldcover",
    ):
        assert said in page
    # Each of six chips: true colour, radar, scene classes and a label.
    assert len(re.findall(r'<img alt="(?:true colour|radar|scene classes|worldcover)"', page)) == 24
    assert [page.count(f"</b> row {row} ") for row in (3, 5, 8)] == [0, 0, 0], "a chip that is not there is shown"
    assert page == dataset_page(version, gallery=6), "the same store gives the same page"
    assert page != dataset_page(version, gallery=6, seed=1)


def test_what_an_archive_says_is_text_on_the_page(tmp_path: Path) -> None:
    store = Store.create(str(tmp_path / "chips.zarr"), LAYOUT)
    version = begin(store.url, {"note": "</pre><script>request</script>"})
    manifest = pa.Table.from_pylist([manifest_row(0)], schema=MANIFEST_SCHEMA)
    version.write_plan(ITEMS_SCHEMA.empty_table(), REJECTIONS_SCHEMA.empty_table(), [manifest])
    named = {name: manifest[name][0].as_py() for name in ("row", "cell", "pair", "unit", "split")}
    failed = chip_table([{**named, "status": "failed", "error": "item x: <script>alert(1)</script>"}])
    version.write_part(0, failed)
    page = dataset_page(version)
    assert "<script>" not in page
    assert "building" in page
    assert "No chip is there." in page


def test_a_build_that_has_just_begun_has_a_page_too(tmp_path: Path) -> None:
    store = Store.create(str(tmp_path / "chips.zarr"), LAYOUT)
    version = begin(store.url, {})
    manifest = pa.Table.from_pylist([manifest_row(0), manifest_row(1)], schema=MANIFEST_SCHEMA)
    version.write_plan(ITEMS_SCHEMA.empty_table(), REJECTIONS_SCHEMA.empty_table(), [manifest])
    assert "0 written" in dataset_page(version).replace("\n", " ")


def test_chips_without_a_grid_are_placed_by_their_transform(tmp_path: Path) -> None:
    layout = Layout(side_px=64, shard_chips=4, grid=None, has_radar=False, optical_level="l1c", optical_grid="10m")
    store = Store.create(str(tmp_path / "chips.zarr"), layout)
    version = begin(store.url, {})
    schema = pa.schema([*MANIFEST_SCHEMA, ("crs", pa.string()), ("transform", pa.list_(pa.float64()))])
    named = {"shard": 0, "unit": "u", "split": "train"}
    placed = {"crs": "EPSG:32633", "transform": [10, 0, 5e5, 0, -10, 5.5e6]}
    rows = [{"row": 0, "pair": "a", **named, **placed}, {"row": 1, "pair": "b", **named}]
    manifest = pa.Table.from_pylist(rows, schema=schema)
    version.write_plan(ITEMS_SCHEMA.empty_table(), REJECTIONS_SCHEMA.empty_table(), [manifest])
    hashes = store.write_shard(0, [(row, make_chip(row, layout)) for row in (0, 1)])
    fates = [
        {**{name: row.get(name) for name in FROM_MANIFEST}, "status": "written", "sha256": hashes[number]}
        for number, row in enumerate(rows)
    ]
    version.write_part(0, chip_table(fates))
    version.seal()
    facts = dataset_facts(version)
    assert facts.counts["places"]["with_chips"] == 1
    assert facts.counts["crs"] == {"EPSG:32633": 1, "": 1}
    west, south, east, north = facts.counts["places"]["bbox"]
    # 500 km east is the zone's meridian, 15 degrees; the chip's middle is 320 m off it.
    assert west == east == pytest.approx(15.0045, abs=2e-4)
    assert south == north == pytest.approx(49.65, abs=0.01)
    page = dataset_page(version)
    assert page.count('<img alt="true colour"') == 2
    assert '<img alt="radar"' not in page


@pytest.mark.slow
def test_a_million_chips_fit_on_one_page(tmp_path: Path) -> None:
    version = million(tmp_path)
    start = time.monotonic()
    page = dataset_page(version, gallery=2)
    seconds = time.monotonic() - start
    assert len(page) < 1_500_000
    assert seconds < 60
    assert "1\u202f000\u202f000 candidate chips" in page


@pytest.mark.parametrize("number", [100, 30_000])
def test_maps_stay_small(number: int) -> None:
    rng = np.random.default_rng(0)
    epsg, column, row = (
        32600 + rng.integers(31, 36, number),
        rng.integers(60, 250, number),
        rng.integers(1800, 2400, number),
    )
    table = pa.table({"epsg": epsg, "column": column, "cell_row": row})
    corners = footprints(*georeferences(table, Layout()), side_px=264)
    assert len(coverage_map(corners, rng.integers(0, 5, number))) < 300_000


def test_a_map_without_chips_is_drawn() -> None:
    corners = np.array([[[0, 0], [1, 0], [1, 1], [0, 1]]], float)
    assert coverage_map(corners, np.zeros(1, np.int64)).startswith(b"\x89PNG")


@pytest.mark.parametrize("lonlat", [(11.5, 48.2), (-70.3, -54.0), (179.99, -16.5), (5.1, 82.9)])
def test_footprints_are_those_of_the_cells(lonlat: tuple[float, float]) -> None:
    cell = cell_at(*lonlat, side_m=2640)
    table = pa.table({"epsg": [cell.epsg], "column": [cell.column], "cell_row": [cell.row]})
    corners = footprints(*georeferences(table, Layout()), side_px=264)[0]
    exact = np.asarray(cell.footprint.exterior.coords)
    for corner in corners:
        assert np.abs(exact - corner).max(axis=1).min() < 1e-7
    middle = centres(corners[None])[0]
    assert np.abs((middle - cell.centre_lonlat + 180) % 360 - 180).max() < 1e-3


def test_a_region_across_the_antimeridian_stays_together() -> None:
    lon = np.array([179.0, -179.0, 178.0])
    assert np.array_equal(unrolled(lon), [179, 181, 178])
    assert np.array_equal(unrolled(np.array([10.0, -5.0, 20.0])), [10, -5, 20])


def test_rows_are_shown_evenly_over_splits() -> None:
    samples = {"train": [5, 9, 1, 7], "val": [2], "test": [3, 4, 8]}
    assert even_rows(samples, 6) == [("train", 1), ("train", 5), ("train", 9), ("val", 2), ("test", 3), ("test", 4)]
    assert len(even_rows(samples, 100)) == 8


def test_colours_are_as_said() -> None:
    layout = Layout(side_px=12, shard_chips=4)
    chip = make_chip(0, layout)
    chip["b10"][:] = 0
    chip["b10"][2] = 3000
    assert true_colour(chip, layout)[0, 0].tolist() == [255, 0, 0], "B04 is red"
    chip["scl"][:] = 6
    assert coloured(chip["scl"], {6: "#0000ff"})[0, 0].tolist() == [0, 0, 255]
    assert list(views(layout, chip)) == ["true colour", "radar", "scene classes"]


def manifest_row(row: int) -> dict[str, object]:
    cell = neighbour(row)
    return {
        "row": row, "shard": row // LAYOUT.shard_chips, "unit": "u", "block": "b", "cell": cell.id, "epsg": cell.epsg,
        "column": cell.column, "cell_row": cell.row, "pair": "p", "optical_items": ["a"], "radar_items": ["b"],
        "optical_datetime": MOMENT, "radar_datetime": MOMENT, "dt_s": 0, "orbit_state": "ascending",
        "relative_orbit": 44, "baseline": "05.09", "offset_dn": 1000, "split": "train", "overlap": 1.0,
    }  # fmt: skip


def million(folder: Path, *, number: int = 1_000_000) -> Version:
    """A sealed version whose plan and ledger are there, but no pixels: every chip reads as no data."""
    layout = Layout(side_px=24, shard_chips=1 << 16, labels=LAYOUT.labels)
    store = Store.create(str(folder / "million.zarr"), layout)
    version = begin(store.url, {"region": "large"})
    rng = np.random.default_rng(0)
    rows = np.arange(number)
    looks = pa.table(
        {
            "look": pa.array(range(1000), pa.int32()),
            "pair": [f"S2A_{look}+S1A_{look}" for look in range(1000)],
            "optical_items": [[f"S2_{look}"] for look in range(1000)],
            "radar_items": [[f"S1_{look}"] for look in range(1000)],
            "optical_datetime": pa.array(
                (np.datetime64("2021-01-01", "us") + rng.integers(0, 900, 1000) * np.timedelta64(1, "D")),
                pa.timestamp("us", tz="UTC"),
            ),
            "radar_datetime": pa.nulls(1000, pa.timestamp("us", tz="UTC")),
            "dt_s": pa.array(rng.integers(-259200, 259200, 1000), pa.int32()),
            "orbit_state": np.where(rng.random(1000) < 0.5, "ascending", "descending"),
            "relative_orbit": pa.array(rng.integers(1, 176, 1000), pa.int32()),
            "baseline": ["05.09"] * 1000,
            "offset_dn": pa.array([1000] * 1000, pa.int32()),
        },
        schema=LOOKS_SCHEMA,
    )
    splits = pa.DictionaryArray.from_arrays(
        pa.array(rng.integers(0, 4, number).astype(np.int8)), pa.array(["train", "val", "test", "buffer"])
    )
    manifest = pa.table(
        {
            "row": rows,
            "shard": rows // layout.shard_chips,
            "epsg": 32631 + rows // 333_334,
            "column": 700 + rows % 2000,
            "cell_row": 20000 + rows // 2000 % 500,
            "look": rng.integers(0, 1000, number),
            "split": splits,
            "overlap": np.ones(number, np.float32),
        },
    ).cast(ROWS_SCHEMA)
    version.write_plan(
        ITEMS_SCHEMA.empty_table(), pa.Table.from_pylist(REJECTIONS, schema=REJECTIONS_SCHEMA),
        [manifest], {"block_cells": 8}, looks=looks,
    )  # fmt: skip
    for shard in version.shards():
        version.write_part(shard, ledger_part(version.manifest_of(shard), rng))
    version.seal()
    return version


def ledger_part(manifest: pa.Table, rng: np.random.Generator) -> pa.Table:
    number = manifest.num_rows
    status = rng.choice(["written", "rejected", "failed"], number, p=[0.8, 0.19, 0.01])
    lists = pa.ListArray.from_arrays(
        np.arange(number + 1, dtype=np.int32) * len(BANDS), rng.random(number * len(BANDS), np.float32) * 3000
    )
    fractions: dict[str, NDArray[np.float32]] = {
        field.name: rng.random(number, np.float32) for field in SCHEMA if field.name.endswith("_fraction")
    }
    return pa.table(
        {
            **{name: manifest[name] for name in ("row", "cell", "pair", "unit", "split")},
            "status": status,
            "reason": np.where(status == "rejected", "cloudy", ""),
            "error": np.where(status == "failed", "item S2_17: connection reset", ""),
            "sha256": np.where(status == "written", "ab" * 32, ""),
            **fractions,
            "flags": np.full(number, ""),
            "mean": lists,
            "std": lists,
        },
        schema=SCHEMA,
    )


def test_the_first_chip_of_a_hole_is_black() -> None:
    chip: ChipArrays = {name: np.full(s.shape, s.nodata, s.dtype) for name, s in LAYOUT.arrays().items()}
    assert not views(LAYOUT, chip)["radar"].any()
    assert not views(LAYOUT, chip)["true colour"].any()
