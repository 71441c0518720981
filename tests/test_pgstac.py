"""The same searches at two real servers, the Planetary Computer's own software and rustac, and by brute force."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import shapely

from pipeline.access import DirectAccess
from pipeline.archives import archive_named
from pipeline.catalog import Catalog, SearchError, search, search_labels, search_piece
from pipeline.catalog_client import Bounds
from pipeline.catalog_items import slim, wanted_fields
from pipeline.objects import Objects
from pipeline.regions import parse_period, parse_region
from pipeline.search import SearchResult, search_region
from pipeline.search_pieces import pieces_of
from pipeline.simulation.server import StacServer
from pipeline.types import Item, Sensor
from tests import pgstac
from tests.catalog_items import many_items, write_items
from tests.conftest import require_server
from tests.stac_proxy import Asked, StacProxy

pytestmark = pytest.mark.slow

ACCESS = DirectAccess()
SENSORS: tuple[Sensor, ...] = ("optical", "radar")

# Region, period: within a piece, over months, over the areas' edges, an odd shape, nothing at all, and the half-open
# end of a period at the very moment of an item.
SEARCHES: dict[str, tuple[str, str]] = {
    "one tile": ("9.2,45.2,9.8,45.8", "2023-02"),
    "three months": ("4,42,6,44", "2023-01/2023-03"),
    "over edges": ("3.5,43.5,12.5,47.5", "2023-01-20/2023-04-10"),
    "everything": ("-1,39,22,52", "2023-02/2023-03"),
    "nothing": ("-60,10,-59,11", "2023-02"),
    "simulated north": ("11.9,48.3,12.1,48.4", "2021-09/2022-07"),
    "simulated south": ("34,-3.5,34.2,-3.3", "2022-06"),
}


@dataclass(frozen=True)
class Servers:
    """Two servers over one catalog, and its items as they are in the files."""

    urls: dict[str, str]
    items: list[dict[str, Any]]


@pytest.fixture(scope="module")
def catalog(simulated_archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The simulated archive's items and some hundreds more, which have places and months to be searched in."""
    simulated = [
        item
        for path in sorted(simulated_archive.glob("items/*.json"))
        for item in json.loads(path.read_text())["features"]
    ]
    return write_items(tmp_path_factory.mktemp("catalog") / "all", [*simulated, *many_items(400)])


@pytest.fixture(scope="module")
def servers(catalog: Path) -> Iterator[Servers]:
    require_server(not pgstac.missing(), pgstac.missing())
    items = [i for path in sorted(catalog.glob("items/*.json")) for i in json.loads(path.read_text())["features"]]
    with pgstac.PgstacServer.of_archive(catalog) as one, StacServer(catalog) as other:
        yield Servers(urls={"pgstac": one.url, "rustac": other.url}, items=items)


def brute_force(items: list[dict[str, Any]], sensor: Sensor, region: shapely.Geometry, period: Any) -> list[str]:
    """Ids of the newest processing of each granule; the simulated archive has one granule twice."""
    collection = {"optical": "sentinel-2-l2a", "radar": "sentinel-1-rtc"}[sensor]
    newest: dict[object, tuple[str, str, str]] = {}
    for item in (item for item in items if item["collection"] == collection):
        properties = item["properties"]
        when = datetime.fromisoformat(properties["datetime"])
        if period[0] <= when < period[1] and shapely.geometry.shape(item["geometry"]).intersects(region):
            made = (properties.get("s2:processing_baseline", ""), properties.get("s2:generation_time", ""), item["id"])
            key = (properties.get("s2:mgrs_tile", item["id"]), properties["platform"], when)
            newest[key] = max(newest.get(key, made), made)
    return sorted(name for _, _, name in newest.values())


@pytest.mark.parametrize("sensor", SENSORS)
@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("server", ["pgstac", "rustac"])
def test_a_search_finds_what_brute_force_finds(servers: Servers, server: str, name: str, sensor: Sensor) -> None:
    region, period = parse_region(SEARCHES[name][0]), parse_period(SEARCHES[name][1])
    items, _ = search(archive_named(servers.urls[server]), sensor, region, period)
    assert sorted(item.id for item in items) == brute_force(servers.items, sensor, region, period)
    assert len({item.id for item in items}) == len(items)
    assert [item.datetime for item in items] == sorted(item.datetime for item in items)


def test_both_servers_items_are_the_same_in_every_field(servers: Servers) -> None:
    region, period = parse_region("-10,-10,40,60"), parse_period("2021-09/2023-04")
    for sensor in SENSORS:
        results = [
            search_region(archive_named(url), sensor, region, period, side_deg=90) for url in servers.urls.values()
        ]
        assert len(results[0].items) == len(brute_force(servers.items, sensor, region, period)) > 4
        for one, other in zip(results[0].items, results[1].items, strict=True):
            assert comparable(one) == comparable(other)
            assert one.footprint.symmetric_difference(other.footprint).area < 1e-9
        assert results[0].refused == results[1].refused


def comparable(item: Item) -> dict[str, Any]:
    return {name: getattr(item, name) for name in item.__slots__ if name != "footprint"}


# rustac 0.9 answers a GET that has both a bbox and a further page with "unsupported value".
@pytest.mark.parametrize(("server", "method"), [("pgstac", "POST"), ("pgstac", "GET"), ("rustac", "POST")])
def test_pages_are_followed_by_post_and_by_get(servers: Servers, server: str, method: str) -> None:
    piece = pieces_of(parse_region("0,40,20,50"), parse_period("2023-01"), side_deg=20)[0]
    archive = archive_named(servers.urls[server])
    expected = brute_force(servers.items, "optical", shapely.box(*piece.bounds), (piece.start, piece.end))

    def without_the_other(asked: Asked, answer: dict[str, Any]) -> dict[str, Any]:
        links = [k for k in answer["links"] if k["rel"] != "search" or k.get("method", "GET") == method]
        return {**answer, "links": links}

    with StacProxy(servers.urls[server]) as proxy, pytest.MonkeyPatch.context() as patch:
        proxy.change = without_the_other
        patch.setattr("pipeline.catalog_client._PAGE_SIZE", 7)
        found = search_piece(Catalog.open(proxy.url, ACCESS), archive, "optical", piece, ACCESS)
    assert {asked.method for asked in proxy.searches} == {method}
    assert len(proxy.searches) >= len(expected) / 7
    assert sorted(feature["id"] for feature in found) == expected


def test_asking_for_fields_makes_answers_smaller_and_changes_nothing(servers: Servers) -> None:
    archive = archive_named(servers.urls["pgstac"])
    opened = Catalog.open(archive.stac_url, ACCESS)
    assert opened.selects_fields
    assert not Catalog.open(servers.urls["rustac"], ACCESS).selects_fields
    asked: tuple[tuple[Sensor, str, Bounds, str], ...] = (
        ("optical", "sentinel-2-l2a", (0.0, 40.0, 20.0, 50.0), "2023-01"),
        ("radar", "sentinel-1-rtc", (11.0, 48.0, 13.0, 49.0), "2021/2022"),
    )
    for sensor, collection, box, text in asked:
        when = parse_period(text)
        whole = opened.features(collection, box, when, ACCESS)
        some = opened.features(collection, box, when, ACCESS, fields=wanted_fields(archive, sensor))
        assert whole
        assert [slim(f, archive, sensor) for f in some] == [slim(f, archive, sensor) for f in whole]
        assert len(json.dumps(some)) < 0.7 * len(json.dumps(whole))


@pytest.mark.parametrize("server", ["pgstac", "rustac"])
def test_pieces_together_are_the_whole(servers: Servers, server: str, tmp_path: Path) -> None:
    archive, cache = archive_named(servers.urls[server]), Objects.at(tmp_path / "cache")
    region, period = parse_region("1,41,19,49"), parse_period("2023-02/2023-03")

    def found(**how: Any) -> SearchResult:
        return search_region(archive, "optical", region, period, **how)

    whole, cut, kept = found(side_deg=30), found(side_deg=5, cache=cache), found(side_deg=5, cache=cache)
    assert (whole.pieces, cut.pieces, cut.from_cache, kept.from_cache) == (2, 16, 0, 16)
    assert whole.items == cut.items == kept.items
    assert sorted(i.id for i in whole.items) == brute_force(servers.items, "optical", region, period)


@pytest.mark.parametrize("server", ["pgstac", "rustac"])
def test_a_collection_that_is_not_there_is_named(servers: Servers, server: str) -> None:
    archive = archive_named(servers.urls[server])
    region, period = parse_region("0,40,1,41"), parse_period("2001-01")
    assert search(archive, "optical", region, period) == ([], [])
    with pytest.raises(SearchError, match="has no collection sentinel-7"):
        search(replace(archive, optical_collection="sentinel-7"), "optical", region, period)


@pytest.mark.parametrize("server", ["pgstac", "rustac"])
def test_labels_are_found(servers: Servers, server: str) -> None:
    maps = [item for item in servers.items if item["collection"] == "esa-worldcover"]
    for item in maps:
        region = shapely.geometry.shape(item["geometry"]).centroid.buffer(0.01)
        found = search_labels(archive_named(servers.urls[server]), "worldcover", region)
        assert item["assets"]["map"]["href"] in {href for _, href, _ in found}
    with pytest.raises(SearchError, match="no item over the region"):
        search_labels(archive_named(servers.urls[server]), "worldcover", parse_region("-60,10,-59,11"))
