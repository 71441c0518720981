"""A misbehaving server and broken files: every cell ends in the ledger, and after mending the chips are the same."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from affine import Affine

from pipeline.access import HostUnavailable
from pipeline.chip_table import chip_table
from pipeline.chips import Recipe, build_unit
from pipeline.grid import Cell, utm_box_lonlat
from pipeline.reader import Patience, ReaderName
from pipeline.reader_gdal import gdal_path
from pipeline.reader_stackstac import StackstacEngine
from pipeline.reader_types import Pixels, Source, Window
from pipeline.reader_window import WindowEngine
from pipeline.screening import ScreenRules
from pipeline.store import chip_hash
from pipeline.types import Item
from tests.distinct_scenes import optical_item, radar_item, write_tif
from tests.faulty_server import Fault, FaultyServer

SIDE_M = 600
LEFT, TOP = 300_000, 5_400_000
CELLS = [
    Cell(epsg=32633, column=LEFT // SIDE_M + c, row=TOP // SIDE_M - 1 - r, side_m=SIDE_M)
    for r in range(4)
    for c in range(4)
]
ROWS = [
    {
        "row": number,
        "cell": cell.id,
        "pair": "pair",
        "unit": "unit",
        "split": "train",
        "optical_items": ["S2"],
        "radar_items": ["S1"],
    }
    for number, cell in enumerate(CELLS)
]


@dataclass
class Tokens:
    """An access that signs with a new token after each refusal, and remembers what it was told."""

    number: int = 1
    told: list[tuple[str, int | None, float | None]] = field(default_factory=list)
    turns: list[int] = field(default_factory=list)

    def sign(self, href: str) -> str:
        return f"{href}?sig=TOKEN{self.number}"

    def turn(self, url: str, *, requests: int = 1) -> AbstractContextManager[None]:
        assert "?" not in url
        self.turns.append(requests)
        return nullcontext()

    def failed(self, url: str, *, status: int | None = None, retry_after_s: float | None = None) -> None:
        assert "?" not in url
        self.told.append((url.rpartition("/")[2], status, retry_after_s))
        if status == 403:
            self.number += 1


@dataclass
class Site:
    """A pair of scenes behind a server, and chips made of it."""

    server: FaultyServer
    folder: Path
    items: dict[str, Item]
    recipe: Recipe
    access: Tokens = field(default_factory=Tokens)

    def build(self) -> tuple[dict[int, Any], list[dict[str, Any]]]:
        """Chips, and rows of a chip table that is consistent with the request."""
        chips, rows = build_unit(ROWS, self.items, self.recipe, self.access)
        hashes = {number: chip_hash(chip) for number, chip in chips.items()}
        table = chip_table({**row, "sha256": hashes.get(row["row"], "")} for row in rows).to_pylist()
        assert [row["row"] for row in table] == [row["row"] for row in ROWS]
        assert sorted(chips) == [row["row"] for row in table if row["status"] == "written"]
        assert all("TOKEN" not in str(row) for row in table)
        return chips, table

    def file(self, band: str) -> Path:
        """Where the asset lies."""
        return self.folder / f"{'S1' if band in ('VV', 'VH') else 'S2'}_{band}.tif"


@pytest.fixture(params=["window", "stackstac"])
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Site]:
    name: ReaderName = request.param
    place = {"epsg": 32633, "left": LEFT - 60, "top": TOP + 60, "side_px": 252}
    items = {"S2": optical_item(tmp_path, **place, offset_dn=1000), "S1": radar_item(tmp_path, **place)}
    for path in tmp_path.glob("*.tif"):
        rewrite(path)  # in blocks that are smaller than cells
    recipe = Recipe(
        screen=ScreenRules(max_cloud_fraction=0.2, min_valid_fraction=0.99),
        side_m=SIDE_M,
        reader=name,
        patience=Patience(attempts=3, backoff_s=0.05, timeout_s=5, longest_wait_s=5),
    )
    with FaultyServer(tmp_path) as server:
        served = {
            name: replace(item, assets={band: f"{server.url}/{Path(path).name}" for band, path in item.assets.items()})
            for name, item in items.items()
        }
        yield Site(server, tmp_path, served, recipe)


def rewrite(path: Path, values: np.ndarray | None = None, **changed: Any) -> None:
    with rasterio.open(path) as file:
        profile, old = file.profile, file.read(1)
    profile.update(blockxsize=32, blockysize=32, **changed)
    with rasterio.open(path, "w", **profile) as file:
        file.write(old if values is None else values, 1)


Built = tuple[dict[int, Any], list[dict[str, Any]]]
"""Chips, and their chip table."""


def assert_same(built: Built, other: Built, *, rows: Collection[int] | None = None, but: Collection[str] = ()) -> None:
    """The same pixels and the same rows of the chip table, their hashes too.

    Args:
        built: One.
        other: The other.
        rows: Only these are compared; all unless given.
        but: Columns of the table that may differ.
    """
    wanted = {row["row"] for row in ROWS} if rows is None else set(rows)
    (chips, table), (others, other_table) = (
        (
            {row: chip for row, chip in chips.items() if row in wanted},
            [{k: v for k, v in row.items() if k not in but} for row in table if row["row"] in wanted],
        )
        for chips, table in (built, other)
    )
    assert table == other_table
    assert len(table) == len(wanted)
    assert sorted(chips) == sorted(others)
    for row, chip in chips.items():
        assert sorted(chip) == sorted(others[row])
        assert all((chip[name] == others[row][name]).all() for name in chip)


def statuses(table: list[dict[str, Any]]) -> set[str]:
    return {row["status"] for row in table}


def test_what_passes_is_waited_for(site: Site) -> None:
    undisturbed = site.build()
    assert statuses(undisturbed[1]) == {"written"}
    assert site.access.told == []
    site.server.mend()
    site.server.faults = {"S1_VV": Fault(status=503, times=4), "S2_B08": Fault(status=500, times=3, after=2)}
    assert_same(site.build(), undisturbed)


def test_a_pause_that_the_server_asks_for_is_kept(site: Site) -> None:
    undisturbed = site.build()
    site.server.mend()
    site.server.faults = {"S1_VV": Fault(status=429, times=3, retry_after_s=1)}
    assert_same(site.build(), undisturbed)
    assert statuses(undisturbed[1]) == {"written"}
    assert ("S1_VV.tif", 429, 1.0) in site.access.told
    asked = [one for one in site.server.asked if "S1_VV" in one.path]
    last_refusal = max(one.at_s for one in asked if one.status == 429)
    assert min(one.at_s for one in asked if one.status == 206 and one.at_s > last_refusal) >= last_refusal + 1


@pytest.mark.parametrize("status", [403, 503])
def test_a_request_that_fails_while_a_file_is_opened_is_no_broken_file(site: Site, status: int) -> None:
    # The first request finds the file; the second, for its header, is refused.
    undisturbed = site.build()
    site.server.mend()
    site.server.faults = {"S2_B08": Fault(status=status, after=1, times=2)}
    assert_same(site.build(), undisturbed)
    assert {row["error"] for row in undisturbed[1]} == {""}


def test_what_is_no_picture_is_tried_once(site: Site) -> None:
    site.server.faults = {"S2_B08": Fault(edit=lambda content: b"<html>not here</html>" * 9999)}
    _, table = site.build()
    assert all("item S2, band B08" in row["error"] and "not recognized" in row["error"] for row in table)
    assert len([one for one in site.server.asked if "B08" in one.path]) <= 5


def test_a_server_without_time_is_asked_once_how_long_to_wait(site: Site) -> None:
    site.server.faults = {"S2_B": Fault(status=503, retry_after_s=60)}
    _, table = site.build()
    assert statuses(table) == {"failed"}
    refused = [one for one in site.server.asked if one.status == 503]
    # At least once for each asset, at most again by GDAL, and once for the pause; not once more for each.
    assert 12 + 1 <= len(refused) <= 12 * 2 + 1


def test_a_pause_that_is_too_long_is_not_waited_for(site: Site) -> None:
    site.server.faults = {"S1_VV": Fault(status=503, retry_after_s=3600)}
    _, table = site.build()
    assert statuses(table) == {"failed"}
    assert all("item S1, band VV: HTTP 503" in row["error"] for row in table)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (Fault(status=503), "HTTP 503"),
        (Fault(status=503, after=2), "HTTP 503"),  # opens, and then no more
        (Fault(status=429), "HTTP 429"),
        (Fault(hang_s=5), "timed out"),
        (Fault(hang_s=5, after=2), "timed out"),
        (Fault(status=403), "HTTP 403"),
        (Fault(status=503, beyond=20_000), "Read failed"),
        (Fault(status=404), "HTTP 404"),
        (Fault(status=404, after=2), "HTTP 404"),
    ],
    ids=[
        "503",
        "503 mid-read",
        "429",
        "hangs",
        "hangs mid-read",
        "403",
        "503 but for the header",
        "404",
        "404 mid-read",
    ],
)
def test_what_lasts_fails_every_cell_and_is_made_up_for_later(site: Site, fault: Fault, said: str) -> None:
    timeout_s = 0.5 if fault.hang_s else 5.0
    site.recipe = replace(site.recipe, patience=replace(site.recipe.patience, attempts=2, timeout_s=timeout_s))
    site.server.faults = {"S2_B08": replace(fault)}
    chips, table = site.build()
    assert chips == {}
    assert statuses(table) == {"failed"}
    assert all(f"cell {row['cell']}: item S2, band B08" in row["error"] and said in row["error"] for row in table)
    # What was seen of the cells before is written down, and the server was not asked for each of them.
    assert {row["clear_fraction"] for row in table} == {1.0}
    assert len([one for one in site.server.asked if "B08" in one.path]) < 200
    site.server.mend()
    site.recipe = replace(site.recipe, patience=replace(site.recipe.patience, timeout_s=5.0))
    mended = site.build()
    assert statuses(mended[1]) == {"written"}
    fresh = Site(site.server, site.folder, site.items, site.recipe)
    assert_same(mended, fresh.build())


def test_bytes_that_do_not_come_are_not_zeros(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GDAL_NUM_THREADS", "2")
    rewrite(site.file("VV"), compress="none")
    site.server.faults = {"S1_VV": Fault(status=503, beyond=50_000)}
    chips, table = site.build()
    assert chips == {}
    assert all("item S1, band VV" in row["error"] for row in table)


def test_a_token_that_expires_while_reading_is_replaced(site: Site) -> None:
    undisturbed = site.build()
    site.server.mend()
    site.access = Tokens()
    site.server.faults = {"S2_B0": Fault(status=403, after=12, token="TOKEN1")}
    built = site.build()
    assert {row["error"] for row in built[1]} == {""}
    assert_same(built, undisturbed)
    assert {status for _, status, _ in site.access.told} == {403}
    assert site.access.number == 2


def test_a_file_that_is_cut_off_costs_the_cells_beyond(site: Site) -> None:
    undisturbed = site.build()
    site.server.mend()
    site.server.faults = {"S2_B08": Fault(edit=lambda content: content[: len(content) * 3 // 4])}
    chips, table = site.build()
    failed = {row["row"] for row in table if row["status"] == "failed"}
    assert failed >= {12, 13, 14, 15}
    assert len(failed) <= 8
    assert all("band B08: the file is cut off" in row["error"] for row in table if row["row"] in failed)
    # What is odd about an item is seen from what was read of it at once, and that was less.
    assert_same((chips, table), undisturbed, rows=set(range(len(ROWS))) - failed, but=["flags"])
    site.server.mend()
    assert_same(site.build(), undisturbed)


def test_a_file_that_is_cut_off_early_is_no_picture_of_nothing(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    undisturbed = site.build()
    site.server.mend()
    site.server.faults = {"S2_B08": Fault(edit=lambda content: content[:300])}
    chips, table = site.build()
    assert chips == {}
    assert all("item S2, band B08" in row["error"] for row in table)
    assert "S2_B08.tif" in caplog.text  # GDAL complains of it by its URL
    assert "TOKEN" not in caplog.text
    site.server.mend()
    assert_same(site.build(), undisturbed)


def test_a_corrupt_block_costs_the_cells_that_it_touches(site: Site) -> None:
    undisturbed = site.build()
    site.server.mend()
    with rasterio.open(site.file("VH")) as file:
        start, size = (int(file.get_tag_item(f"BLOCK_{what}_3_3", "TIFF", bidx=1)) for what in ("OFFSET", "SIZE"))
    site.server.faults = {
        "S1_VH": Fault(edit=lambda content: content[:start] + b"\xff" * size + content[start + size :])
    }
    chips, table = site.build()
    # Pixels 96 to 128 of the file are pixels 90 to 122 of the cells, which are 60 wide: columns and rows 1 and 2.
    failed = {row["row"] for row in table if row["status"] == "failed"}
    assert failed == {5, 6, 9, 10}
    assert all("item S1, band VH" in row["error"] for row in table if row["status"] == "failed")
    assert site.access.told == []
    assert_same((chips, table), undisturbed, rows=set(range(len(ROWS))) - failed)
    site.server.mend()
    assert_same(site.build(), undisturbed)


def test_an_asset_that_an_item_lacks_fails_its_cells(site: Site) -> None:
    undisturbed = site.build()
    optical = site.items["S2"]
    site.items["S2"] = replace(optical, assets={b: href for b, href in optical.assets.items() if b != "B11"})
    chips, table = site.build()
    assert chips == {}
    assert all("item S2, band B11: the item has no such asset" in row["error"] for row in table)
    # The catalog's next answer names it.
    site.items["S2"] = optical
    assert_same(site.build(), undisturbed)


def test_an_asset_without_a_value_is_a_failed_read(site: Site) -> None:
    undisturbed = site.build()
    with rasterio.open(site.file("VV")) as file:
        kept = file.read(1)
    rewrite(site.file("VV"), np.full((252, 252), -32768, np.float32))
    chips, table = site.build()
    assert chips == {}
    assert all("item S1, band VV: no data at all" in row["error"] for row in table)
    rewrite(site.file("VV"), kept)
    assert_same(site.build(), undisturbed)


def test_the_header_says_where_a_file_lies_and_the_item_is_flagged(site: Site) -> None:
    undisturbed = site.build()
    place = utm_box_lonlat(32633, (LEFT + 60_000, TOP - 1500, LEFT + 62_000, TOP + 60))
    site.items["S1"] = replace(site.items["S1"], footprint=place)
    site.items["S2"] = replace(site.items["S2"], epsg=32634)
    chips, table = site.build()
    assert_same((chips, table), undisturbed, but=["flags"])
    assert all("georeference_suspect" in row["flags"].split() for row in table)
    site.recipe = replace(site.recipe, screen=replace(site.recipe.screen, on_suspect="reject"))
    chips, table = site.build()
    assert chips == {}
    assert {(row["status"], row["reason"]) for row in table} == {("rejected", "suspect")}


def test_a_file_that_lies_elsewhere_than_its_item_is_a_failed_read(site: Site) -> None:
    undisturbed = site.build()
    with rasterio.open(site.file("VV")) as file:
        place = file.transform
    rewrite(site.file("VV"), transform=Affine(10, 0, LEFT + 90_000, 0, -10, TOP))
    chips, table = site.build()
    assert chips == {}
    assert all("by its header, the file lies elsewhere" in row["error"] for row in table)
    rewrite(site.file("VV"), transform=place)
    assert_same(site.build(), undisturbed)


def test_a_file_with_its_rows_from_south_to_north_is_read_right(site: Site) -> None:
    undisturbed = site.build()
    for band in ("VV", "VH", "B03", "SCL"):
        with rasterio.open(site.file(band)) as file:
            pixels, t = file.read(1), file.transform
        upside_down = Affine(t.a, 0, t.c, 0, -t.e, t.f + t.e * pixels.shape[0])
        rewrite(site.file(band), pixels[::-1], transform=upside_down)
    chips, table = site.build()
    assert statuses(table) == {"written"}
    assert_same((chips, table), undisturbed)
    assert all(row["flags"] == "" or "georeference" not in row["flags"] for row in table)


def test_a_host_that_is_given_up_fails_the_cells(site: Site) -> None:
    @dataclass
    class Away(Tokens):
        def turn(self, url: str, *, requests: int = 1) -> AbstractContextManager[None]:
            raise HostUnavailable("127.0.0.1 has not answered for 600 s")

    undisturbed = site.build()
    site.server.mend()
    site.access = Away()
    chips, table = site.build()
    assert chips == {}
    assert all("127.0.0.1 has not answered" in row["error"] for row in table)
    assert site.server.asked == []
    site.access = Tokens()
    assert_same(site.build(), undisturbed)


def test_turns_are_asked_for_with_about_the_number_of_requests(site: Site) -> None:
    site.build()
    assert len(site.access.turns) == 2  # the classification, then everything else
    assert len(site.server.asked) <= 2 * sum(site.access.turns)


@pytest.mark.parametrize("engine", [WindowEngine, StackstacEngine])
def test_the_rows_of_blocks_of_a_large_window_are_asked_for_together(
    tmp_path: Path, engine: type[WindowEngine | StackstacEngine]
) -> None:
    side_px = 2048
    values = np.random.default_rng(0).random((side_px, side_px + 512), np.float32)
    place = {"epsg": 32633, "left": LEFT, "top": TOP, "pixel_m": 10.0}
    write_tif(tmp_path / "VV.tif", values, **place, nodata=-32768.0, block_px=512)
    window = Window(epsg=32633, bounds=(LEFT, TOP - 10 * side_px, LEFT + 10 * side_px, TOP), square_m=10 * side_px)
    with FaultyServer(tmp_path, latency_s=0.4) as server:
        source = Source(
            item="S1",
            band="VV",
            href=f"{server.url}/VV.tif",
            resolution_m=10,
            fill=np.float32("nan"),
            nodata=-32768.0,
            smooth=True,
            windows=(window,),
        )
        (read,) = engine(Patience()).read([source], [gdal_path(source.href)], lambda _, pixels: pixels)
        assert isinstance(read, Pixels)
        np.testing.assert_array_equal(read.arrays[0], values[:, :side_px])
        *before, first, _, _, last = [one for one in server.asked if one.method == "GET"]
    # One request for each row of blocks, all under way before the first is answered.
    assert last.at_s - first.at_s < 0.4
    assert len(before) <= 2


def test_cells_that_the_classification_rules_out_cost_no_further_request(site: Site) -> None:
    cloudy = np.full((126, 126), 9, np.uint8)
    write_tif(site.file("SCL"), cloudy, epsg=32633, left=LEFT - 60, top=TOP + 60, pixel_m=20, nodata=0)
    _, table = site.build()
    assert {row["reason"] for row in table} == {"cloudy"}
    assert {one.path for one in site.server.asked} == {"/S2_SCL.tif"}
