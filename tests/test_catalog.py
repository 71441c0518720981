"""The catalog: recorded answers of real archives, and what cannot be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.archives import EARTH_SEARCH, PLANETARY_COMPUTER, archive_named
from pipeline.bands import OPTICAL_BANDS, RADAR_BANDS
from pipeline.catalog import ItemError, SearchError, offset_dn, parse_item, require_account, search
from pipeline.regions import parse_period, parse_region


def features(path: Path) -> list[dict[str, Any]]:
    content = json.loads(path.read_text())
    if "response" in content:
        content = content["response"]["body"]
    if isinstance(content, list):
        return content
    return list(content.get("features", [content]))


@pytest.mark.parametrize(
    "name",
    [
        "items-sentinel-2-l2a.json",
        "items-sentinel-2-l2a-35MNM-2020-06-07.json",
        "search-sentinel-2-l2a-33-items.json",
        "page-sentinel-2-l2a-limit1.json",
    ],
)
def test_planetary_computers_optical_items_are_understood(shared_data: Path, name: str) -> None:
    for feature in features(shared_data / "stac/planetary-computer" / name):
        item = parse_item(feature, PLANETARY_COMPUTER, "optical")
        assert set(item.assets) == {*OPTICAL_BANDS, "SCL"}
        assert item.tile == feature["properties"]["s2:mgrs_tile"]
        assert item.offset_dn == (1000 if item.baseline >= "04.00" else 0)
        assert 32601 <= item.epsg <= 32760
        assert not any("?" in href for href in item.assets.values())


def test_planetary_computers_radar_items_are_understood(shared_data: Path) -> None:
    found = features(shared_data / "stac/planetary-computer/items-sentinel-1-rtc.json")
    both = [f for f in found if {"vv", "vh"} <= set(f["assets"])]
    assert both
    for feature in both:
        item = parse_item(feature, PLANETARY_COMPUTER, "radar")
        assert set(item.assets) == set(RADAR_BANDS)
        assert item.orbit_state in ("ascending", "descending")
        assert item.relative_orbit == feature["properties"]["sat:relative_orbit"]


def test_a_radar_item_without_both_polarisations_is_refused(shared_data: Path) -> None:
    feature = features(shared_data / "stac/planetary-computer/item-sentinel-1-grd-EW-HH.json")[0]
    with pytest.raises(ItemError, match="has no asset vv, vh"):
        parse_item(feature, PLANETARY_COMPUTER, "radar")


def test_an_item_with_a_geometry_in_metres_is_refused(shared_data: Path) -> None:
    for path in (shared_data / "stac/planetary-computer/rtc-ingest-utm-geometry").glob("*SDV*.json"):
        feature = features(path)[0]
        feature["assets"] = {key.removesuffix("-rtc"): asset for key, asset in feature["assets"].items()}
        with pytest.raises(ItemError, match="not in degrees"):
            parse_item(feature, PLANETARY_COMPUTER, "radar")


def test_earth_searchs_items_are_understood_with_the_offset_that_is_left_in_them(shared_data: Path) -> None:
    shifted = parse_item(
        features(shared_data / "stac/earth-search/item-sentinel-2-l2a-32TPS.json")[0], EARTH_SEARCH, "optical"
    )
    assert (shifted.baseline, shifted.offset_dn, shifted.epsg, shifted.relative_orbit) == ("05.09", 0, 32632, 22)
    assert shifted.assets["B8A"].endswith("B8A.tif")
    for feature in features(shared_data / "stac/earth-search/items-sentinel-2-c1-l2a-13TDE.json"):
        assert parse_item(feature, EARTH_SEARCH, "optical").offset_dn == 1000


@pytest.mark.parametrize(
    ("baseline", "offset"), [("02.14", 0), ("03.01", 0), ("04.00", 1000), ("05.11", 1000), ("99.99", 1000)]
)
def test_the_offset_follows_the_baseline(baseline: str, offset: int) -> None:
    assert offset_dn({}, baseline, PLANETARY_COMPUTER) == offset


def test_an_item_that_hides_its_baseline_is_refused() -> None:
    with pytest.raises(ItemError, match="processing_baseline"):
        offset_dn({}, "", PLANETARY_COMPUTER)


def test_an_archive_with_grd_only_says_why_it_is_not_used() -> None:
    with pytest.raises(SearchError, match="slant geometry"):
        search(EARTH_SEARCH, "radar", parse_region("0,0,1,1"), parse_period("2023"))


def test_an_archive_that_needs_an_account_says_so_before_the_search(
    monkeypatch: pytest.MonkeyPatch, shared_data: Path
) -> None:
    collection = json.loads((shared_data / "stac/planetary-computer/collection-sentinel-1-rtc.json").read_text())
    assert collection["msft:requires_account"]
    monkeypatch.delenv("PC_SDK_SUBSCRIPTION_KEY", raising=False)
    with pytest.raises(SearchError, match="PC_SDK_SUBSCRIPTION_KEY"):
        require_account(PLANETARY_COMPUTER)
    monkeypatch.setenv("PC_SDK_SUBSCRIPTION_KEY", "a key")
    require_account(PLANETARY_COMPUTER)


def test_a_server_that_is_not_there_is_named() -> None:
    nobody = archive_named("http://127.0.0.1:9")
    with pytest.raises(SearchError, match=r"http://127\.0\.0\.1:9"):
        search(nobody, "optical", parse_region("0,0,1,1"), parse_period("2023"))


def test_an_unknown_archive_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"archive='planetary'.*planetary-computer, earth-search"):
        archive_named("planetary")
