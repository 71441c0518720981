"""Archives as data: those that are known, and how one more comes to be."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import pipeline.archives
from pipeline.archives import archive_named, known_archives
from pipeline.bands import OPTICAL_BANDS, RADAR_BANDS

_ONE_MORE = '''
"""Another one."""
from dataclasses import replace
from pipeline.archives.planetary_computer import PLANETARY_COMPUTER
ARCHIVES = (replace(PLANETARY_COMPUTER, name="another", stac_url="https://stac.example"),)
'''


@pytest.fixture
def one_more_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "another_archive.py").write_text(_ONE_MORE)
    monkeypatch.setattr(pipeline.archives, "__path__", [*pipeline.archives.__path__, str(tmp_path)])
    known_archives.cache_clear()
    yield
    known_archives.cache_clear()


@pytest.mark.usefixtures("one_more_file")
def test_one_more_file_is_one_more_archive() -> None:
    assert archive_named("another").stac_url == "https://stac.example"
    assert archive_named("planetary-computer").signing == "planetary-computer"


def test_the_known_archives_are_these() -> None:
    assert sorted(known_archives()) == ["earth-search", "earth-search/sentinel-2-c1-l2a", "planetary-computer"]


@pytest.mark.parametrize("name", sorted(known_archives()))
def test_an_archive_says_where_each_band_is_or_why_it_is_not_used(name: str) -> None:
    archive = archive_named(name)
    assert archive.name == name
    assert archive.stac_url.startswith("https://")
    assert {*OPTICAL_BANDS, "SCL"} <= set(archive.asset_keys)
    assert (archive.radar_collection is None) == bool(archive.radar_refusal)
    assert archive.radar_collection is None or set(RADAR_BANDS) <= set(archive.asset_keys)
    # A catalog is asked far less than the storage behind it.
    assert archive.api_limits.rate_per_s < archive.storage_limits.rate_per_s
    assert archive.api_limits.turns < archive.storage_limits.turns


def test_earth_searchs_two_collections_differ_in_what_is_left_in_their_pixels(shared_data: Path) -> None:
    level_2a, collection_1 = archive_named("earth-search"), archive_named("earth-search/sentinel-2-c1-l2a")
    assert (level_2a.optical_collection, level_2a.offset_rule) == ("sentinel-2-l2a", "baseline_unless_flagged")
    assert (collection_1.optical_collection, collection_1.offset_rule) == ("sentinel-2-c1-l2a", "baseline")
    published = json.loads((shared_data / "stac/earth-search/collection-sentinel-2-c1-l2a.json").read_text())
    assert set(collection_1.asset_keys.values()) <= set(published["item_assets"])


def test_planetary_computers_keys_are_those_that_its_collections_name(shared_data: Path) -> None:
    archive = archive_named("planetary-computer")
    for collection, bands in (("sentinel-2-l2a", (*OPTICAL_BANDS, "SCL")), ("sentinel-1-rtc", RADAR_BANDS)):
        published = json.loads((shared_data / f"stac/planetary-computer/collection-{collection}.json").read_text())
        assert {archive.asset_keys[band] for band in bands} <= set(published["item_assets"])


def test_an_url_is_an_archive_with_planetary_computers_collections() -> None:
    local = archive_named("http://127.0.0.1:8000/stac/")
    assert (local.name, local.stac_url, local.signing) == ("local", "http://127.0.0.1:8000/stac", "none")
    assert local.radar_collection == archive_named("planetary-computer").radar_collection


def test_an_unknown_archive_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"archive='planetary'.*earth-search, .*planetary-computer nor the URL"):
        archive_named("planetary")
