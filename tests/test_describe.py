"""The job that explains a store, a cell of it or a chip; and what it answers where there is nothing to explain."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pyarrow as pa
import pytest

from jobs import describe
from jobs.support.description import cell_lines, describe_cell, describe_row, open_version, row_lines, row_picture
from jobs.support.job import run_job
from jobs.support.settings import parse
from pipeline.chip_table import FROM_MANIFEST, chip_table
from pipeline.grid import Cell, cell_at
from pipeline.layout import Layout
from pipeline.manifest import ITEMS_SCHEMA, MANIFEST_SCHEMA, REJECTIONS_SCHEMA
from pipeline.store import Store, StoreError
from pipeline.versions import Version, begin
from tests.conftest import ROOT
from tests.sample_chips import LAYOUT, make_chip
from tests.small_stores import Candidate, write_store

SIDE_M = LAYOUT.side_px * 10
HERE = cell_at(13.41, 52.52, side_m=SIDE_M)
EAST, NORTH, FAR_EAST, LONELY = (
    Cell(epsg=HERE.epsg, column=HERE.column + east, row=HERE.row + north, side_m=SIDE_M)
    for east, north in ((1, 0), (0, 1), (2, 0), (0, 2))
)
REQUEST = {"period": "2023-07", "pairing": {"max_dt_days": 3.0}, "screening": {"max_cloud_fraction": 0.2}}


@pytest.fixture
def version(tmp_path: Path) -> Version:
    """Rows 0 to 4: a chip, a cloudy one and a broken one of three cells, then two looks at the first."""
    candidates = [
        Candidate(cell=HERE),
        Candidate(cell=EAST, status="rejected"),
        Candidate(cell=NORTH, status="failed", split="val"),
        Candidate(cell=HERE, status="rejected"),
        Candidate(cell=HERE),
    ]
    rejections = [
        {"cell": HERE.id, "optical": "S2A_1", "reason": "cloudy_scene", "detail": "86.3 %"},
        {"cell": FAR_EAST.id, "optical": "S2A_2", "reason": "no_radar_in_time", "detail": "nearest is 4.50 days away"},
        {"cell": LONELY.id, "optical": "", "reason": "excluded", "detail": "within 1000 m of area 0"},
    ]
    url = str(tmp_path / "chips.zarr")
    return write_store(url, LAYOUT, candidates, make_chip, request=REQUEST, rejections=rejections, statistics=True)


def run(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    describe.main(parse(describe.Describe, list(words)))
    return capsys.readouterr().out


def test_it_says_what_is_in_a_store(version: Version, capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, f"store={version.url}")
    for said in (
        "version 1, sealed",
        "candidates: 5; written 2, rejected 2, failed 1",
        "cells: 1 of 3 have a chip",
        "split val: 0 written, 0 rejected, 1 failed",
        "looks not paired: 1 x no_radar_in_time (no radar acquisition near enough in time)",
        "chips rejected: 2 x cloudy (too much cloud or cloud shadow among its pixels)",
        "could not be read: 1 x decode error; first row 2: item S2 band B02: decode error",
        "band VH: mean",
        "pairing.max_dt_days=3.0",
    ):
        assert said in text
    content = json.loads(run(capsys, f"store={version.url}", "format=json"))
    assert content["ledger"] == {"requested": 5, "written": 2, "rejected": 2, "failed": 1, "reasons": {"cloudy": 2}}
    assert content["request"] == REQUEST
    assert content["histograms"]["cloud_fraction"]["series"]["rejected"][35] == 2


@pytest.mark.parametrize(
    ("cell", "verdict", "detail"),
    [
        (HERE, "it has 2 chips", "S2A_1: the optical scene is too cloudy (cloudy_scene: 86.3 %)"),
        (EAST, "it has no chip: of 1 candidates 1 rejected by their pixels", "cloud 90.0 %"),
        (NORTH, "it has no chip: of 1 candidates 1 could not be read", "item S2 band B02: decode error"),
        (FAR_EAST, "it has no chip: none of 1 looks made a pair", "nearest is 4.50 days away"),
        (LONELY, "it has no chip: it was excluded", "within 1000 m of area 0"),
    ],
)
def test_it_says_why_a_cell_is_there_or_missing(
    version: Version, capsys: pytest.CaptureFixture[str], cell: Cell, verdict: str, detail: str
) -> None:
    text = run(capsys, f"store={version.url}", f"cell={cell.id}")
    assert verdict in text
    assert detail in text
    assert "limits: " in text
    assert "max_dt_days=3.0" in text


def test_a_point_stands_for_its_cell(version: Version) -> None:
    found = describe_cell(version, "13.41, 52.52")
    assert found == describe_cell(version, HERE.id)
    assert found["rows"] == [0, 4]
    assert [row["status"] for row in found["candidates"]] == ["written", "rejected", "written"]
    assert found["not_paired"] == [
        {"version": 1, "cell": HERE.id, "optical": "S2A_1", "reason": "cloudy_scene", "detail": "86.3 %"}
    ]
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_a_row_tells_what_it_was_made_from(version: Version) -> None:
    found = describe_row(version, 0)
    text = "\n".join(row_lines(found))
    for said in ("row 0", HERE.id, "written", "valid 100.0 %", "S2_0", "S1_0, S1_0b", "6.0 h later", "sha256 "):
        assert said in text
    assert found["transform"] == [10, 0, HERE.bounds[0], 0, -10, HERE.bounds[3]]
    assert found["centre"] == [pytest.approx(value, abs=1e-5) for value in HERE.centre_lonlat]
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_a_picture_shows_every_view_of_the_chip(
    version: Version, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "pictures" / "chip.png"
    run(capsys, f"store={version.url}", "row=4", f"picture={out}")
    picture = matplotlib.image.imread(out)
    # Four views side by side: true colour, radar, scene classes and the label.
    assert picture.shape[1] > 1500
    assert picture.shape[0] < picture.shape[1]
    assert len(np.unique(picture[::7, ::7].reshape(-1, picture.shape[2]), axis=0)) > 100
    with pytest.raises(StoreError, match=r"row 1 has no pixels to show: .*rejected: too much cloud"):
        row_picture(version, describe_row(version, 1))


@pytest.mark.parametrize(("report", "name"), [("pages", "report.html"), ("pages/mine.html", "mine.html")])
def test_the_page_is_written_again(
    version: Version, tmp_path: Path, capsys: pytest.CaptureFixture[str], report: str, name: str
) -> None:
    run(capsys, f"store={version.url}", f"report={tmp_path / report}", "chips=2")
    page = (tmp_path / "pages" / name).read_text()
    assert page.count('<img alt="radar"') == 2


def test_a_build_that_is_not_done_is_described_as_far_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    version = unfinished(tmp_path)
    text = run(capsys, f"store={version.url}")
    assert "version 1, building" in text
    assert "candidates known so far: 4" in text
    found = describe_cell(version, cell_of(5).id)
    assert found["verdict"] == "it has no chip: of 1 candidates 1 not built yet"
    assert "not built yet" in "\n".join(cell_lines(found))
    assert describe_row(version, 5)["status"] == "not built yet"


def test_rows_and_cells_of_all_versions_are_known(version: Version) -> None:
    later = begin(version.url, {**REQUEST, "period": "2024-07"}, number=2)
    first = later.first_shard() * LAYOUT.shard_chips
    plan(later, [row_of(first, EAST)])
    build(later, first // LAYOUT.shard_chips)
    later.seal()
    found = describe_cell(open_version(version.url, None), EAST.id)
    assert [(row["version"], row["row"], row["status"]) for row in found["candidates"]] == [
        (1, 1, "rejected"), (2, first, "written"),
    ]  # fmt: skip
    assert describe_row(later, first)["version"] == 2
    assert describe_row(later, 0)["version"] == 1
    assert describe_cell(open_version(version.url, 1), EAST.id)["rows"] == []
    with pytest.raises(StoreError, match=r"row 6 was left empty"):
        describe_row(later, 6)


def test_what_was_not_asked_for_is_told_from_what_is_missing(version: Version) -> None:
    beside = Cell(epsg=HERE.epsg, column=HERE.column - 1, row=HERE.row, side_m=SIDE_M)
    with pytest.raises(StoreError, match=rf"nothing of cell {beside.id}: .* lies beside the region: .*{HERE.id}"):
        describe_cell(version, beside.id)
    with pytest.raises(StoreError, match="of 5 candidates 0 are in its zone"):
        describe_cell(version, cell_at(-70.0, -33.0, side_m=SIDE_M).id)
    strayed = Cell(epsg=HERE.epsg, column=HERE.column + 2000, row=HERE.row, side_m=SIDE_M)
    with pytest.raises(StoreError, match="owned by another zone: ask for "):
        describe_cell(version, strayed.id)
    with pytest.raises(ValueError, match=r"33N_0108_2013, got 'Berlin'; or give longitude,latitude"):
        describe_cell(version, "Berlin")
    with pytest.raises(ValueError, match="-84 to 84 north"):
        describe_cell(version, "13,95")
    with pytest.raises(StoreError, match="no row 99: its rows end at 4"):
        describe_row(version, 99)


def test_stores_that_are_none_and_versions_that_are_not_there_are_named(version: Version, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=f"no store at {tmp_path}/elsewhere"):
        open_version(str(tmp_path / "elsewhere"), None)
    with pytest.raises(StoreError, match="no version 2: its newest is 1"):
        open_version(version.url, 2)
    begin(version.url, {**REQUEST, "period": "2024"}, number=2)
    with pytest.raises(StoreError, match=r"version 2 is not planned yet.*version=1 is the last that is complete"):
        open_version(version.url, None)
    assert open_version(version.url, 1).number == 1
    empty = Store.create(str(tmp_path / "empty.zarr"), LAYOUT)
    with pytest.raises(StoreError, match="no version yet"):
        open_version(empty.url, None)


def test_a_store_off_the_grid_has_rows_but_no_cells(tmp_path: Path) -> None:
    layout = Layout(side_px=64, shard_chips=4, grid=None, has_optical=False)
    store = Store.create(str(tmp_path / "chips.zarr"), layout)
    version = begin(store.url, {})
    schema = pa.schema([*MANIFEST_SCHEMA, ("crs", pa.string()), ("transform", pa.list_(pa.float64()))])
    manifest = pa.Table.from_pylist([{"row": 0, "shard": 0, "pair": "a", "unit": "u", "split": "train"}], schema=schema)
    version.write_plan(ITEMS_SCHEMA.empty_table(), REJECTIONS_SCHEMA.empty_table(), [manifest])
    with pytest.raises(ValueError, match="on no grid: ask for a row"):
        describe_cell(version, "13,52")
    found = describe_row(version, 0)
    assert found["centre"] is None
    assert "row 0: a" in "\n".join(row_lines(found))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["cell=33N_0001_0001", "row=3"], "ask for one of them at a time"),
        (["picture=x.png"], "picture needs a row"),
        (["format=xml"], "format='xml'"),
    ],
)
def test_wrong_questions_are_refused(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(describe.Describe, ["store=x", *words])
    assert said in capsys.readouterr().err


def test_from_the_command_line(version: Version) -> None:
    command = [sys.executable, "-m", "jobs.describe", f"store={version.url}", "row=0", "format=json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["cell"] == HERE.id


def test_what_goes_wrong_is_one_line(
    version: Version, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["describe", f"store={version.url}", "row=77"])
    with pytest.raises(SystemExit) as ended:
        run_job(describe.Describe, describe.main)
    assert ended.value.code == 1
    out, error = capsys.readouterr()
    assert out == ""
    assert error.splitlines()[-1].startswith("error: ")


def cell_of(number: int) -> Cell:
    return Cell(epsg=HERE.epsg, column=HERE.column + number, row=HERE.row + 9, side_m=SIDE_M)


def row_of(row: int, cell: Cell) -> dict[str, Any]:
    return {
        "row": row, "shard": row // LAYOUT.shard_chips, "unit": "u", "block": "b", "cell": cell.id, "epsg": cell.epsg,
        "column": cell.column, "cell_row": cell.row, "pair": "p", "optical_items": ["S2"], "radar_items": ["S1"],
        "dt_s": -3600, "orbit_state": "descending", "relative_orbit": 7, "split": "train", "overlap": 1.0,
    }  # fmt: skip


def plan(version: Version, rows: list[dict[str, Any]]) -> None:
    manifest = pa.Table.from_pylist(rows, schema=MANIFEST_SCHEMA)
    version.write_plan(ITEMS_SCHEMA.empty_table(), REJECTIONS_SCHEMA.empty_table(), [manifest])


def build(version: Version, shard: int) -> None:
    rows = version.manifest_of(shard, columns=FROM_MANIFEST).to_pylist()
    hashes = Store.open(version.url).write_shard(shard, [(row["row"], make_chip(row["row"])) for row in rows])
    fates = [{**row, "status": "written", "sha256": hashes[row["row"]]} for row in rows]
    version.write_part(shard, chip_table(fates))


def unfinished(folder: Path) -> Version:
    """Two shards planned, the first of them built."""
    store = Store.create(str(folder / "chips.zarr"), LAYOUT)
    version = begin(store.url, REQUEST)
    plan(version, [row_of(row, cell_of(row)) for row in range(7)])
    build(version, 0)
    return version
