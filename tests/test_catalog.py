"""The catalog's items: recorded answers of real archives, what is repaired, and what cannot be used."""

from __future__ import annotations

import copy
import json
from datetime import UTC, datetime, timedelta
from itertools import permutations
from pathlib import Path
from typing import Any

import pyproj
import pytest
import shapely
from hypothesis import given
from hypothesis import strategies as st

from pipeline.archives import archive_named
from pipeline.bands import OPTICAL_BANDS, RADAR_BANDS
from pipeline.catalog import ItemError, SearchError, offset_dn, parse_item, require_account, search
from pipeline.catalog_footprints import Feature
from pipeline.catalog_items import parse, slim
from pipeline.catalog_results import Found, judge, settle
from pipeline.regions import parse_period, parse_region
from pipeline.types import Acquisition, Item, Sensor
from tests.catalog_items import optical_item

PLANETARY_COMPUTER = archive_named("planetary-computer")
EARTH_SEARCH = archive_named("earth-search")
EARTH_SEARCH_C1 = archive_named("earth-search/sentinel-2-c1-l2a")

EVERYWHERE = shapely.box(-180, -90, 180, 90)
ALWAYS = (datetime(2000, 1, 1, tzinfo=UTC), datetime(2100, 1, 1, tzinfo=UTC))

PC, ES = "planetary-computer", "earth-search"

# Recorded answer, as what it is read -> items that are understood, and why the others are not.
RECORDED: dict[tuple[str, str, Sensor], tuple[int, dict[str, int]]] = {
    (f"{PC}/items-sentinel-2-l2a.json", PC, "optical"): (4, {}),
    (f"{PC}/items-sentinel-2-l2a-35MNM-2020-06-07.json", PC, "optical"): (13, {}),
    (f"{PC}/search-sentinel-2-l2a-33-items.json", PC, "optical"): (33, {}),
    (f"{PC}/page-sentinel-2-l2a-limit1.json", PC, "optical"): (1, {}),
    (f"{PC}/items-page-1.json", PC, "optical"): (1, {}),
    (f"{PC}/items-page-2.json", PC, "optical"): (1, {}),
    (f"{PC}/search-page-1.json", PC, "optical"): (1, {}),
    (f"{PC}/search-page-2.json", PC, "optical"): (1, {}),
    (f"{PC}/items-sentinel-1-rtc.json", PC, "radar"): (4, {}),
    (f"{PC}/page-sentinel-1-grd-limit1.json", PC, "radar"): (0, {"has neither proj:code nor proj:epsg": 1}),
    (f"{PC}/items-sentinel-1-grd-washington-2020-05.json", PC, "radar"): (0, {"has neither proj:code": 3}),
    (f"{PC}/item-sentinel-1-grd-EW-HH.json", PC, "radar"): (0, {"has no asset vv, vh": 1}),
    (f"{ES}/item-sentinel-2-l2a-32TPS.json", ES, "optical"): (1, {}),
    (f"{ES}/items-sentinel-2-c1-l2a-13TDE.json", f"{ES}/sentinel-2-c1-l2a", "optical"): (10, {}),
    (f"{ES}/search-fields-sentinel-2-c1-l2a.json", f"{ES}/sentinel-2-c1-l2a", "optical"): (0, {"has no asset": 10}),
    (f"{ES}/search-multiple-collections.json", ES, "optical"): (1, {"has no asset": 1}),
    (f"{ES}/search-empty.json", ES, "optical"): (0, {}),
    (f"{ES}/v0-item-sentinel-s2-l2a-cogs-28QCH.json", ES, "optical"): (0, {"has no asset coastal": 1}),
}


def features(path: Path) -> list[dict[str, Any]]:
    content = json.loads(path.read_text())
    if "response" in content:
        content = content["response"]["body"]
    if isinstance(content, list):
        return content
    return list(content.get("features", [content]))


def in_degrees_elsewhere(feature: Feature) -> dict[str, Any]:
    """The ingest-time item with the asset keys that its collection publishes."""
    return {**feature, "assets": {key.removesuffix("-rtc"): asset for key, asset in feature["assets"].items()}}


def resolved(found: list[dict[str, Any]], region: shapely.Geometry = EVERYWHERE) -> Found:
    return settle(judge(found, PLANETARY_COMPUTER, "optical", region, ALWAYS))


def test_every_recorded_answer_with_items_is_in_the_table(shared_data: Path) -> None:
    with_items = {
        path.relative_to(shared_data / "stac").as_posix()
        for path in (shared_data / "stac").glob("*/*.json")
        if not path.name.startswith(("landing", "collection-", "error-"))
    }
    # These two are of all collections of an archive, each of which is read below.
    mixed = {f"{ES}/search-filter-page-1.json", f"{ES}/search-filter-page-2.json"}
    assert with_items == {name for name, _, _ in RECORDED} | mixed


@pytest.mark.parametrize(("name", "archive", "sensor"), RECORDED)
def test_recorded_answers_are_understood_or_refused_with_the_reason(
    shared_data: Path, name: str, archive: str, sensor: Sensor
) -> None:
    understood, refused = RECORDED[name, archive, sensor]
    answer = features(shared_data / "stac" / name)
    found = settle(judge(answer, archive_named(archive), sensor, EVERYWHERE, ALWAYS))
    assert (len(found.items), len(found.refused), found.noted) == (understood, sum(refused.values()), [])
    for reason, count in refused.items():
        assert sum(reason in entry.reason for entry in found.refused) == count, found.refused


@pytest.mark.parametrize("page", [1, 2])
def test_a_page_of_all_of_earth_searchs_collections_is_told_apart(shared_data: Path, page: int) -> None:
    for feature in features(shared_data / f"stac/{ES}/search-filter-page-{page}.json"):
        archive = {a.optical_collection: a for a in (EARTH_SEARCH, EARTH_SEARCH_C1)}.get(feature["collection"])
        if archive is not None:
            item = parse_item(feature, archive, "optical")
            flagged = feature["properties"].get("earthsearch:boa_offset_applied", False)
            assert item.offset_dn == (0 if flagged else 1000), item.id
            assert not any("jp2" in href for href in item.assets.values())


@pytest.mark.parametrize(("name", "archive", "sensor"), RECORDED)
def test_what_is_kept_of_an_item_says_the_same_as_the_whole(
    shared_data: Path, name: str, archive: str, sensor: Sensor
) -> None:
    def judged(feature: Feature) -> object:
        try:
            return parse(feature, archive_named(archive), sensor)
        except ItemError as error:
            return str(error)

    for feature in features(shared_data / "stac" / name):
        kept = slim(feature, archive_named(archive), sensor)
        assert judged(kept) == judged(feature)
        assert slim(kept, archive_named(archive), sensor) == kept


def test_planetary_computers_optical_items_say_what_is_in_them(shared_data: Path) -> None:
    for feature in features(shared_data / "stac/planetary-computer/search-sentinel-2-l2a-33-items.json"):
        item = parse_item(feature, PLANETARY_COMPUTER, "optical")
        assert set(item.assets) == {*OPTICAL_BANDS, "SCL"}
        assert item.tile == feature["properties"]["s2:mgrs_tile"]
        assert item.offset_dn == (1000 if item.baseline >= "04.00" else 0)
        assert 32601 <= item.epsg <= 32760
        assert item.footprint.equals(shapely.geometry.shape(feature["geometry"]))


@pytest.mark.parametrize(("name", "archive", "sensor"), [key for key, (count, _) in RECORDED.items() if count])
def test_items_name_their_overpass_by_what_is_flown_and_not_by_what_was_made_of_it(
    shared_data: Path, name: str, archive: str, sensor: Sensor
) -> None:
    for feature in features(shared_data / "stac" / name):
        if feature["collection"] not in ("sentinel-2-l2a", "sentinel-2-c1-l2a", "sentinel-1-rtc"):
            continue
        item, properties = parse_item(feature, archive_named(archive), sensor), feature["properties"]
        assert item.platform.startswith("sentinel-")
        if sensor == "radar":
            # Its number is also in the product's name.
            assert (item.absolute_orbit, item.datatake) == (int(item.id.split("_")[6]), "")
            del properties["sat:absolute_orbit"]
            assert parse_item(feature, archive_named(archive), sensor).absolute_orbit == item.absolute_orbit
            continue
        # GS2A_20230602T100601_041489_N05.09: the last part is the processing's.
        _, start, orbit, _ = properties["s2:datatake_id"].split("_")
        assert (item.absolute_orbit, item.datatake) == (int(orbit), start)
        again = {**properties, "s2:datatake_id": f"{properties['s2:datatake_id'][:-5]}99.99"}
        assert known_as(parse_item({**feature, "properties": again}, archive_named(archive), sensor)) == known_as(item)
        del properties["s2:datatake_id"]
        assert known_as(parse_item(feature, archive_named(archive), sensor)) == known_as(item)


def known_as(item: Item) -> str:
    return Acquisition(sensor=item.sensor, items=(item,)).id


def test_planetary_computers_radar_items_say_what_is_in_them(shared_data: Path) -> None:
    for feature in features(shared_data / "stac/planetary-computer/items-sentinel-1-rtc.json"):
        item = parse_item(feature, PLANETARY_COMPUTER, "radar")
        assert set(item.assets) == set(RADAR_BANDS)
        assert item.orbit_state in ("ascending", "descending")
        assert item.relative_orbit == feature["properties"]["sat:relative_orbit"]


def test_a_radar_item_without_both_polarisations_is_refused(shared_data: Path) -> None:
    for path in (shared_data / "stac/planetary-computer/rtc-ingest-utm-geometry").glob("*SDH*.json"):
        with pytest.raises(ItemError, match="has no asset vv, vh"):
            parse_item(in_degrees_elsewhere(features(path)[0]), PLANETARY_COMPUTER, "radar")


def test_a_geometry_in_metres_is_brought_to_degrees_and_that_is_noted(shared_data: Path) -> None:
    for path in (shared_data / "stac/planetary-computer/rtc-ingest-utm-geometry").glob("*SDV*.json"):
        feature = in_degrees_elsewhere(features(path)[0])
        parsed = parse(feature, PLANETARY_COMPUTER, "radar")
        assert "in metres of EPSG:32614" in parsed.notes[0]
        # Back in metres it is where it was, a corner cut by a straight line of degrees apart.
        to_metres = pyproj.Transformer.from_crs(4326, 32614, always_xy=True)
        back = shapely.transform(parsed.item.footprint, to_metres.transform, interleaved=False)
        assert back.hausdorff_distance(shapely.geometry.shape(feature["geometry"])) < 1.0


def test_a_geometry_in_metres_that_lies_elsewhere_is_refused(shared_data: Path) -> None:
    for path in (shared_data / "stac/planetary-computer/rtc-ingest-utm-geometry").glob("*SDV*.json"):
        feature = in_degrees_elsewhere(features(path)[0])
        left, bottom, right, top = feature["properties"]["proj:bbox"]
        moved = [left + 200_000, bottom, right + 200_000, top]
        feature["properties"] = {**feature["properties"], "proj:bbox": moved}
        with pytest.raises(ItemError, match=r"not in degrees .* and does not lie where proj:bbox"):
            parse_item(feature, PLANETARY_COMPUTER, "radar")
        for name in ("proj:bbox", "proj:transform"):
            feature["properties"] = {k: v for k, v in feature["properties"].items() if k != name}
        with pytest.raises(ItemError, match="not in degrees"):
            parse_item(feature, PLANETARY_COMPUTER, "radar")


def test_a_geometry_in_metres_of_no_projection_is_refused(shared_data: Path) -> None:
    for path in (shared_data / "stac/planetary-computer/rtc-ingest-utm-geometry").glob("*SDV*.json"):
        feature = in_degrees_elsewhere(features(path)[0])
        feature["properties"] = {**feature["properties"], "proj:epsg": 99999}
        with pytest.raises(ItemError, match="EPSG:99999, from which there is no way"):
            parse_item(feature, PLANETARY_COMPUTER, "radar")


def test_an_invalid_geometry_is_repaired_and_that_is_noted() -> None:
    feature = optical_item("bow", datetime(2023, 1, 1, tzinfo=UTC), 10, 50)
    feature["geometry"] = {"type": "Polygon", "coordinates": [[[10, 50], [11, 51], [11, 50], [10, 51], [10, 50]]]}
    found = resolved([feature])
    assert found.items[0].footprint.is_valid
    assert found.items[0].footprint.area == pytest.approx(0.5)
    assert [(note.item, "repaired" in note.what) for note in found.noted] == [("bow", True)]


@given(west=st.floats(170, 179.9), width=st.floats(0.2, 9), south=st.floats(-80, 70))
def test_a_footprint_over_the_antimeridian_is_the_same_however_it_is_written(
    west: float, width: float, south: float
) -> None:
    def footprint(geometry: shapely.Geometry) -> shapely.Geometry:
        feature = optical_item("a", datetime(2023, 1, 1, tzinfo=UTC), 0, 0)
        return parse_item(
            {**feature, "geometry": shapely.geometry.mapping(geometry)}, PLANETARY_COMPUTER, "optical"
        ).footprint

    east, north = west + width, south + 5
    beyond = shapely.box(west, south, east, north)
    before = shapely.box(west - 360, south, east - 360, north)
    expected = shapely.box(west, south, min(east, 180), north)
    if east > 180:
        expected = shapely.union_all([expected, shapely.box(-180, south, east - 360, north)])
        long_way = shapely.Polygon([(west, south), (east - 360, south), (east - 360, north), (west, north)])
        assert footprint(long_way).symmetric_difference(expected).area < 1e-9
        assert footprint(expected).symmetric_difference(expected).area < 1e-9
    assert footprint(beyond).symmetric_difference(expected).area < 1e-9
    assert footprint(before).symmetric_difference(expected).area < 1e-9


@given(data=st.data())
def test_whatever_is_wrong_with_an_item_it_is_understood_or_refused(data: st.DataObject) -> None:
    feature: Any = optical_item("odd", datetime(2023, 1, 1, tzinfo=UTC), 10, 50)
    junk = st.sampled_from([None, [], {}, "", "nonsense", -1, 1e300, float("nan"), [[1, 2]], {"type": "Polygon"}])
    for _ in range(data.draw(st.integers(1, 3))):
        place: Any = feature
        for key in data.draw(st.sampled_from([(), ("properties",), ("assets",), ("assets", "B02"), ("geometry",)])):
            place = place.get(key) if isinstance(place, dict) else None
        if isinstance(place, dict) and place:
            key = data.draw(st.sampled_from(sorted(place)))
            if data.draw(st.booleans()):
                del place[key]
            else:
                place[key] = data.draw(junk)
    for version in (feature, slim(feature, PLANETARY_COMPUTER, "optical")):
        found = resolved([version])
        assert len(found.items) + len(found.refused) <= 1
        assert not any("nan" in str(item.footprint.bounds) for item in found.items)


def test_items_of_stac_1_1_say_the_same_as_those_of_1_0(shared_data: Path) -> None:
    for feature in features(shared_data / "stac/earth-search/items-sentinel-2-c1-l2a-13TDE.json"):
        newer = copy.deepcopy(feature)
        newer["stac_version"] = "1.1.0"
        newer["properties"]["proj:code"] = f"EPSG:{newer['properties'].pop('proj:epsg')}"
        for asset in newer["assets"].values():
            eo, raster = asset.pop("eo:bands", [{}]), asset.pop("raster:bands", [{}])
            asset["bands"] = [
                {"name": b.get("name"), **{f"raster:{key}": r[key] for key in ("scale", "offset") if key in r}}
                for b, r in zip(eo, raster, strict=False)
            ]
        assert parse(newer, EARTH_SEARCH_C1, "optical") == parse(feature, EARTH_SEARCH_C1, "optical")
        # What is published in either form is seen, or the note on it would be missing here.
        newer["properties"]["s2:processing_baseline"] = feature["properties"]["s2:processing_baseline"] = "03.01"
        for doubtful in (newer, feature):
            assert "publishes an offset of -0.1" in parse(doubtful, EARTH_SEARCH_C1, "optical").notes[0]


def test_earth_searchs_items_are_understood_with_the_offset_that_is_left_in_them(shared_data: Path) -> None:
    shifted = parse_item(
        features(shared_data / "stac/earth-search/item-sentinel-2-l2a-32TPS.json")[0], EARTH_SEARCH, "optical"
    )
    assert (shifted.baseline, shifted.offset_dn, shifted.epsg, shifted.relative_orbit) == ("05.09", 0, 32632, 22)
    assert shifted.assets["B8A"].endswith("B8A.tif")
    for feature in features(shared_data / "stac/earth-search/items-sentinel-2-c1-l2a-13TDE.json"):
        assert parse_item(feature, EARTH_SEARCH_C1, "optical").offset_dn == 1000


@pytest.mark.parametrize(
    ("baseline", "offset"), [("02.14", 0), ("03.01", 0), ("04.00", 1000), ("05.11", 1000), ("99.99", 1000)]
)
def test_the_offset_follows_the_baseline(baseline: str, offset: int) -> None:
    assert offset_dn({}, baseline, PLANETARY_COMPUTER) == offset


def test_an_item_that_hides_its_baseline_is_refused() -> None:
    with pytest.raises(ItemError, match="processing_baseline"):
        offset_dn({}, "", PLANETARY_COMPUTER)


def test_an_item_that_hides_its_cloud_cover_is_used_and_that_is_noted() -> None:
    found = resolved([optical_item("dim", datetime(2023, 1, 1, tzinfo=UTC), 10, 50, **{"eo:cloud_cover": None})])
    assert (len(found.items), len(found.noted)) == (1, 1)
    assert "eo:cloud_cover" in found.noted[0].what


def test_a_granule_that_was_processed_again_replaces_the_older_one_in_any_order() -> None:
    when = datetime(2023, 1, 1, 10, tzinfo=UTC)

    def granule(name: str, baseline: str, made_day: int, **place: float) -> dict[str, Any]:
        fields = {"s2:processing_baseline": baseline, "s2:generation_time": f"2023-02-{made_day:02d}T00:00:00Z"}
        return optical_item(name, when + timedelta(seconds=made_day), place["west"], 50, tile="32UNA", **fields)

    old, again, newest = (
        granule(n, b, d, west=10) for n, b, d in (("a", "03.01", 9), ("c", "05.00", 1), ("b", "05.00", 2))
    )
    other_half = granule("d", "03.01", 3, west=10.95)
    next_overpass = granule("e", "02.00", 1, west=10)
    next_overpass["properties"]["datetime"] = "2023-01-06T10:00:00Z"
    for order in permutations([old, again, newest, other_half, next_overpass]):
        found = resolved(list(order))
        assert [item.id for item in found.items] == ["b", "d", "e"]
        assert {(r.item, r.reason) for r in found.refused} == {
            ("a", "processed again as b"), ("c", "processed again as b"),
        }  # fmt: skip


def test_of_an_item_that_comes_twice_the_later_answer_counts() -> None:
    earlier = optical_item("a", datetime(2023, 1, 1, tzinfo=UTC), 10, 50, **{"eo:cloud_cover": 1.0})
    later = optical_item("a", datetime(2023, 1, 1, tzinfo=UTC), 10, 50, **{"eo:cloud_cover": 2.0})
    assert [item.cloud_percent for item in resolved([earlier, later]).items] == [2.0]


def test_what_lies_outside_the_region_or_the_period_is_not_taken() -> None:
    inside = optical_item("in", datetime(2023, 1, 31, 23, 59, 59, tzinfo=UTC), 10, 50)
    late = optical_item("late", datetime(2023, 2, 1, tzinfo=UTC), 10, 50)
    away = optical_item("away", datetime(2023, 1, 5, tzinfo=UTC), 12, 50)
    period = parse_period("2023-01")
    region = parse_region("10.2,50.2,10.4,50.4")
    found = settle(judge([inside, late, away], PLANETARY_COMPUTER, "optical", region, period))
    assert ([item.id for item in found.items], found.refused) == (["in"], [])


def test_no_signature_is_kept() -> None:
    feature = optical_item("signed", datetime(2023, 1, 1, tzinfo=UTC), 10, 50)
    for asset in feature["assets"].values():
        asset["href"] += "?sv=2021&sig=SECRET"
    assert "SECRET" not in json.dumps(slim(feature, PLANETARY_COMPUTER, "optical"))
    assert "SECRET" not in str(parse(feature, PLANETARY_COMPUTER, "optical"))


def test_an_archive_with_grd_only_says_why_it_is_not_used() -> None:
    for archive in (EARTH_SEARCH, EARTH_SEARCH_C1):
        with pytest.raises(SearchError, match="slant geometry"):
            search(archive, "radar", parse_region("0,0,1,1"), parse_period("2023"))


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
