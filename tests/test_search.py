"""Searching in pieces: what they cover, what is kept, what is asked for again, and servers that fail."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import shapely
from hypothesis import given
from hypothesis import strategies as st
from stac_geoparquet.arrow import stac_table_to_items

from pipeline.access import DirectAccess, HostUnavailable
from pipeline.archives import archive_named
from pipeline.catalog import Catalog, Patience, SearchError, search, search_piece
from pipeline.catalog_items import parse, slim
from pipeline.catalog_results import judge, settle
from pipeline.limits import HostLimits
from pipeline.objects import Objects
from pipeline.regions import parse_period, parse_region
from pipeline.search import FEW_PIECES, SearchResult, access_spec_of, search_region
from pipeline.search_cache import Answer, Freshness, keep, recall
from pipeline.search_pieces import Piece, pieces_of
from pipeline.simulation.server import StacServer
from tests.catalog_items import DAYS, START, many_items, optical_item, write_items
from tests.stac_proxy import Asked, Reply, StacProxy

pytestmark = [
    pytest.mark.filterwarnings("ignore:.* is deprecated:Warning:ray.data.context"),
    pytest.mark.filterwarnings("ignore:.* is deprecated:Warning:ray.data._internal"),
]

PC = archive_named("planetary-computer")
REGION, PERIOD = "1,41,19,49", "2023-01/2023-04"
HASTY = Patience(tries=3, first_pause_s=0.01, timeout_s=(10.0, 20.0))
HASTIER = Patience(tries=3, first_pause_s=0.01, timeout_s=(10.0, 1.0))


@pytest.fixture(scope="module")
def items() -> list[dict[str, Any]]:
    return many_items(300, seed=1)


@pytest.fixture(scope="module")
def upstream(items: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with StacServer(write_items(tmp_path_factory.mktemp("catalog") / "many", items)) as server:
        yield server.url


@pytest.fixture
def proxy(upstream: str) -> Iterator[StacProxy]:
    with StacProxy(upstream) as proxy:
        yield proxy


def found_by(proxy: StacProxy, *, region: str = REGION, period: str = PERIOD, **how: Any) -> SearchResult:
    archive = archive_named(proxy.url)
    # Without the breaker, whose pauses are tested elsewhere.
    spec = replace(access_spec_of(archive, shared=False), api=HostLimits(turns=4, failures=10_000))
    how = {"access_spec": spec, "patience": HASTY, **how}
    return search_region(archive, "optical", parse_region(region), parse_period(period), **how)


def expected_ids(items: list[dict[str, Any]], region: str = REGION, period: str = PERIOD) -> list[str]:
    start, end = parse_period(period)
    return sorted(
        item["id"]
        for item in items
        if start <= datetime.fromisoformat(item["properties"]["datetime"]) < end
        and shapely.geometry.shape(item["geometry"]).intersects(parse_region(region))
    )


def ids(result: SearchResult) -> list[str]:
    return sorted(item.id for item in result.items)


# Pieces

degrees = st.integers(-1799, 1799).map(lambda tenth: tenth / 10)
latitudes = st.integers(-799, 839).map(lambda tenth: tenth / 10)


@st.composite
def regions(draw: st.DrawFn) -> shapely.Geometry:
    """Boxes and triangles, one or two, anywhere."""
    parts = []
    for _ in range(draw(st.integers(1, 2))):
        west, south = draw(degrees), draw(latitudes)
        east, north = min(west + draw(st.floats(0.01, 25)), 180.0), min(south + draw(st.floats(0.01, 20)), 84.0)
        box = shapely.box(west, south, east, north)
        parts.append(box if draw(st.booleans()) else shapely.Polygon([(west, south), (east, south), (west, north)]))
    return shapely.union_all(parts)


moments = st.datetimes(datetime(2014, 1, 1), datetime(2027, 1, 1)).map(lambda moment: moment.replace(tzinfo=UTC))


@given(region=regions(), side_deg=st.integers(1, 12))
def test_the_pieces_areas_hold_the_region_and_lie_apart(region: shapely.Geometry, side_deg: int) -> None:
    boxes = [shapely.box(*piece.bounds) for piece in pieces_of(region, parse_period("2023-06"), side_deg=side_deg)]
    assert region.difference(shapely.union_all(boxes)).area < 1e-12
    assert sum(box.area for box in boxes) == pytest.approx(shapely.union_all(boxes).area)
    for box in boxes:
        west, south, east, north = box.bounds
        assert west < east <= west + side_deg
        assert south < north <= south + side_deg
        assert west // side_deg == (east - 1) // side_deg, "over an edge of the grid"
        assert box.distance(region) == 0


@given(start=moments, length=st.timedeltas(timedelta(microseconds=1), timedelta(days=800)))
def test_the_pieces_periods_follow_each_other_from_start_to_end(start: datetime, length: timedelta) -> None:
    pieces = pieces_of(shapely.box(10.2, 50.2, 10.4, 50.4), (start, start + length))
    assert (pieces[0].start, pieces[-1].end) == (start, start + length)
    assert all(one.end == other.start for one, other in pairwise(pieces))
    assert all(p.start < p.end and (p.start.year, p.start.month) == last_month(p) for p in pieces)


def last_month(piece: Piece) -> tuple[int, int]:
    last = piece.end - timedelta(microseconds=1)
    return last.year, last.month


@given(region=regions())
def test_a_piece_is_the_same_for_whoever_needs_it(region: shapely.Geometry) -> None:
    for piece in pieces_of(region, parse_period("2023-06")):
        again = pieces_of(shapely.box(*piece.bounds), parse_period("2023-06"))
        assert again == [piece]
        assert again[0].key("https://a", "b") == piece.key("https://a", "b")


def test_pieces_of_other_archives_collections_places_and_times_have_other_keys() -> None:
    pieces = pieces_of(parse_region("0,0,12,12"), parse_period("2023-01/2023-03"))
    keys = [p.key(url, collection) for p in pieces for url in ("https://a", "https://b") for collection in ("c", "d")]
    assert len(set(keys)) == len(keys) == 9 * 3 * 4


# What is kept


def test_a_small_search_needs_neither_ray_nor_a_cache(proxy: StacProxy, items: list[dict[str, Any]]) -> None:
    result = found_by(proxy, region="4.2,44.2,4.8,44.8", period="2023-02")
    assert ids(result) == expected_ids(items, "4.2,44.2,4.8,44.8", "2023-02")
    assert (result.pieces, result.from_cache, len(proxy.searches)) == (1, 0, 1)
    assert "ray" not in sys.modules or not sys.modules["ray"].is_initialized()


def test_what_was_asked_once_is_not_asked_again(proxy: StacProxy, items: list[dict[str, Any]], tmp_path: Path) -> None:
    cache = Objects.at(tmp_path / "cache")
    first = found_by(proxy, cache=cache)
    asked = len(proxy.searches)
    assert ids(first) == expected_ids(items)
    assert (first.pieces, first.from_cache, asked) == (32, 0, 32)
    second = found_by(proxy, cache=cache)
    assert (second.items, second.from_cache, len(proxy.searches)) == (first.items, 32, asked)
    # Another region and period ask for what they need besides; not even the landing page otherwise.
    before = len(proxy.asked)
    third = found_by(proxy, cache=cache, region="6,41,14,49", period="2023-02/2023-03")
    assert (third.from_cache, third.pieces, len(proxy.asked)) == (8, 8, before)
    assert ids(third) == expected_ids(items, "6,41,14,49", "2023-02/2023-03")


def test_a_search_that_broke_asks_only_for_what_is_missing(
    proxy: StacProxy, items: list[dict[str, Any]], tmp_path: Path
) -> None:
    cache = Objects.at(tmp_path / "cache")
    proxy.fault = lambda asked: Reply(status=500) if asked.number >= 10 else None
    one_at_a_time = replace(archive_named(proxy.url), api_limits=HostLimits(turns=1, failures=10_000))
    how: Any = {"access_spec": access_spec_of(one_at_a_time, shared=False), "cache": cache, "patience": HASTY}
    with pytest.raises(SearchError, match=r"; 10 of 32 pieces were answered and are kept in .*cache: run again"):
        search_region(one_at_a_time, "optical", parse_region(REGION), parse_period(PERIOD), **how)
    assert len([path for path in cache.list() if path.endswith(".json")]) == 10
    proxy.fault = lambda asked: None
    before = len(proxy.searches)
    result = found_by(proxy, cache=cache)
    assert (ids(result), result.from_cache) == (expected_ids(items), 10)
    assert len(proxy.searches) - before == 22


def test_a_search_that_was_killed_asks_only_for_what_is_missing(
    proxy: StacProxy, items: list[dict[str, Any]], tmp_path: Path
) -> None:
    reached = threading.Event()

    def slow_from_the_twelfth_on(asked: Asked) -> Reply | None:
        if asked.number < 12:
            return None
        reached.set()
        return Reply(status=503, hang_s=30.0)

    proxy.fault = slow_from_the_twelfth_on
    script = f"""
        from pipeline.archives import archive_named
        from pipeline.objects import Objects
        from pipeline.regions import parse_period, parse_region
        from pipeline.search import search_region
        archive, cache = archive_named({proxy.url!r}), Objects.at({str(tmp_path / "cache")!r})
        search_region(archive, "optical", parse_region({REGION!r}), parse_period({PERIOD!r}), cache=cache)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], env={**os.environ, "PYTHONPATH": "."})
    try:
        assert reached.wait(60)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    cache = Objects.at(tmp_path / "cache")
    kept = len([path for path in cache.list() if path.endswith(".json")])
    assert 0 < kept <= 12
    proxy.fault = lambda asked: None
    before = len(proxy.searches)
    result = found_by(proxy, cache=cache)
    assert (ids(result), result.from_cache) == (expected_ids(items), kept)
    assert len(proxy.searches) - before == 32 - kept


def test_what_is_kept_reads_as_stac_and_is_the_same(shared_data: Path, tmp_path: Path) -> None:
    """Recorded items of both sensors, a repaired and a refused one among them."""
    folder = shared_data / "stac/planetary-computer"
    bow = optical_item("bow", START, 10, 50, **{"eo:cloud_cover": None})
    recorded = json.loads((folder / "search-sentinel-2-l2a-33-items.json").read_text())["response"]["body"]["features"]
    optical = [slim(f, PC, "optical") for f in [*recorded, bow, {"id": "odd", "geometry": None}]]
    radar = [slim(f, PC, "radar") for f in json.loads((folder / "items-sentinel-1-rtc.json").read_text())]
    cache, piece, now = Objects.at(tmp_path), pieces_of(shapely.box(0, 0, 1, 1), parse_period("2023-01"))[0], START
    for sensor, features, clean in (("optical", optical, 33), ("radar", radar, 4)):
        assert sensor in ("optical", "radar")
        key = piece.key("https://a", sensor)
        keep(cache, key, piece, Answer(searched_at=now, features=features), PC, sensor)
        answer = recall(cache, key, piece, Freshness(), now)
        assert answer is not None
        everywhere, always = shapely.box(-180, -90, 180, 90), parse_period("2000/2100")
        one, other = (settle(judge(f, PC, sensor, everywhere, always)) for f in (features, answer.features))
        assert one == other
        assert len(one.items) + len(one.refused) == len(features)
        names = {(item.absolute_orbit is None, bool(item.datatake)) for item in one.items}
        assert names == {(False, sensor == "optical")}, "what names the overpasses was not kept"
        table = next(path for path in cache.list() if path.startswith(key) and path.endswith(".parquet"))
        as_stac = list(stac_table_to_items(cache.get_table(table)))
        assert [parse(f, PC, sensor) for f in as_stac] == [parse(f, PC, sensor) for f in features[:clean]]


def test_no_signature_is_kept(tmp_path: Path) -> None:
    feature = optical_item("signed", START, 10, 50)
    odd = optical_item("odd", START, 10, 50, **{"s2:processing_baseline": None})
    for asset in (*feature["assets"].values(), *odd["assets"].values()):
        asset["href"] += "?sv=2021&sig=SECRET"
    piece, cache = pieces_of(shapely.box(10, 50, 11, 51), parse_period("2023-01"))[0], Objects.at(tmp_path)
    slimmed = [slim(f, PC, "optical") for f in (feature, odd)]
    keep(cache, "a/b", piece, Answer(searched_at=START, features=slimmed), PC, "optical")
    assert len(cache.list()) == 2
    for path in cache.list():
        assert b"SECRET" not in cache.get(path)
    table = cache.get_table(next(path for path in cache.list() if path.endswith(".parquet")))
    assert "SECRET" not in str(table.to_pylist())


def test_an_answer_counts_for_good_only_if_it_was_given_long_after_its_piece() -> None:
    piece = pieces_of(shapely.box(10, 50, 11, 51), parse_period("2023-01"))[0]
    rule, end, day = Freshness(), piece.end, timedelta(days=1)
    assert rule.counts(piece, end + 60 * day, end + 5000 * day)
    assert not rule.counts(piece, end + 59 * day, end + 5000 * day)
    assert rule.counts(piece, end - 5 * day, end - 5 * day + timedelta(hours=11))
    assert not rule.counts(piece, end - 5 * day, end - 5 * day + timedelta(hours=13))
    assert rule.counts(piece, end + timedelta(minutes=5), end), "clocks differ"


def test_an_old_answer_on_recent_months_is_asked_for_again_and_replaced(
    proxy: StacProxy, upstream: str, tmp_path: Path
) -> None:
    cache, now = Objects.at(tmp_path / "cache"), datetime.now(UTC)
    month = f"{now:%Y-%m}"
    found_by(proxy, cache=cache, region="4,44,5,45", period=month)
    found_by(proxy, cache=cache, region="4,44,5,45", period=month)
    assert len(proxy.searches) == 1
    note = next(path for path in cache.list() if path.endswith(".json"))
    old = {**cache.get_json(note), "searched_at": (now - timedelta(days=2)).isoformat()}
    cache.put(note, json.dumps(old).encode())
    found_by(proxy, cache=cache, region="4,44,5,45", period=month)
    assert len(proxy.searches) == 2
    assert datetime.fromisoformat(cache.get_json(note)["searched_at"]) >= now


def test_an_answer_that_cannot_be_read_is_asked_for_again(
    proxy: StacProxy, items: list[dict[str, Any]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = Objects.at(tmp_path / "cache")
    found_by(proxy, cache=cache)
    tables, notes = ([p for p in cache.list() if p.endswith(end)] for end in (".parquet", ".json"))
    cache.put(tables[0], b"PAR1 no more")
    cache.delete(tables[1])
    cache.put(notes[-1], b"{")
    result = found_by(proxy, cache=cache)
    assert (ids(result), result.from_cache) == (expected_ids(items), 29)
    assert caplog.text.count("cannot be read and is asked for again") >= 3


# Servers that fail


def small(proxy: StacProxy, **how: Any) -> SearchResult:
    return found_by(proxy, region="0,40,20,50", period="2023-01", side_deg=20, **how)


def small_ids(items: list[dict[str, Any]]) -> list[str]:
    return expected_ids(items, "0,40,20,50", "2023-01")


def test_a_server_that_wants_to_be_left_alone_is_not_asked_before(
    proxy: StacProxy, items: list[dict[str, Any]]
) -> None:
    refusals = {0: "1", 2: format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True)}

    def fault(asked: Asked) -> Reply | None:
        seconds = refusals.get(asked.number)
        return Reply(status=429, headers={"Retry-After": seconds}) if seconds else None

    proxy.fault = fault
    with small_pages():
        assert ids(small(proxy)) == small_ids(items)
    waits = [b.at - a.at for a, b in pairwise(proxy.searches)]
    assert waits[0] >= 1.0
    assert waits[0] < 3.0, "as long as it was asked for, and not much longer"
    # The date is written in whole seconds.
    assert waits[2] > 0.5 or proxy.searches[3].at - proxy.searches[0].at >= 1.0


def test_a_server_that_wants_to_be_left_alone_for_long_ends_the_search(proxy: StacProxy) -> None:
    proxy.fault = lambda asked: Reply(status=429, headers={"Retry-After": "86400"}) if asked.number >= 0 else None
    with pytest.raises(SearchError, match="left alone for 86400 s; run again after that"):
        small(proxy)
    assert len(proxy.searches) == 1


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_storm_that_passes_is_waited_out(proxy: StacProxy, items: list[dict[str, Any]], status: int) -> None:
    storm = Reply(status=status, body=b"<html>busy</html>")
    proxy.fault = lambda asked: storm if asked.number % 3 != 2 and asked.number >= 0 else None
    with small_pages():
        assert ids(small(proxy)) == small_ids(items)
    assert len(proxy.searches) >= 9


def test_a_storm_that_stays_is_an_error_that_names_the_piece_and_the_server(proxy: StacProxy) -> None:
    proxy.fault = lambda asked: Reply(status=503, body=b"<html>busy</html>") if asked.number >= 0 else None
    named = r"searching sentinel-2-l2a at http://127.*\(bbox 0.0,40.0,20.0,60.0, 2023-01-01/2023-02-01\): status 503"
    with pytest.raises(SearchError, match=named):
        small(proxy)
    assert len(proxy.searches) == HASTY.tries


def test_what_is_refused_outright_is_not_asked_for_again(proxy: StacProxy) -> None:
    proxy.fault = lambda asked: Reply(status=400, body=b"bbox?") if asked.number >= 0 else None
    with pytest.raises(SearchError, match="status 400: bbox"):
        small(proxy)
    assert len(proxy.searches) == 1


def test_a_server_that_hangs_is_given_up_and_asked_again(proxy: StacProxy, items: list[dict[str, Any]]) -> None:
    proxy.fault = lambda asked: Reply(hang_s=30.0) if asked.number == 0 else None
    assert ids(small(proxy, patience=replace(HASTIER, timeout_s=(10.0, 3.0)))) == small_ids(items)
    proxy.fault = lambda asked: Reply(hang_s=30.0) if asked.number >= 0 else None
    with pytest.raises(SearchError, match="timed out"):
        small(proxy, patience=HASTIER)


def test_an_answer_that_is_cut_short_is_asked_for_again(proxy: StacProxy, items: list[dict[str, Any]]) -> None:
    proxy.fault = lambda asked: Reply(body=b'{"type": "FeatureColl', cut=True) if asked.number == 0 else None
    assert ids(small(proxy)) == small_ids(items)
    proxy.fault = lambda asked: Reply(body=b'{"type": "FeatureColl') if asked.number == 2 else None
    assert ids(small(proxy)) == small_ids(items)


@pytest.mark.parametrize("status", [400, 403, 404, 410])
def test_a_search_whose_pages_expire_begins_again(proxy: StacProxy, items: list[dict[str, Any]], status: int) -> None:
    proxy.fault = lambda asked: Reply(status=status, body=b"token expired") if asked.number == 3 else None
    with small_pages():
        assert ids(small(proxy)) == small_ids(items)
    proxy.fault = lambda asked: Reply(status=status, body=b"token expired") if is_later_page(asked) else None
    with small_pages(), pytest.raises(SearchError, match=f"the next page was refused: status {status}: token expired"):
        small(proxy)


def is_later_page(asked: Asked) -> bool:
    return "skip" in asked.body or "token" in asked.body


def test_pages_that_lead_in_a_circle_are_an_error(proxy: StacProxy) -> None:
    first: dict[str, Any] = {}

    def circle(asked: Asked, answer: dict[str, Any]) -> dict[str, Any]:
        if asked.number >= 0:
            first.setdefault("links", answer["links"])
            return {**answer, "links": first["links"]}
        return answer

    proxy.change = circle
    with small_pages(), pytest.raises(SearchError, match="leads back to one that was read"):
        small(proxy)
    assert len(proxy.searches) <= 9


def test_a_next_link_to_another_host_is_an_error_and_is_not_followed(proxy: StacProxy) -> None:
    def elsewhere(asked: Asked, answer: dict[str, Any]) -> dict[str, Any]:
        links = [{**k, "href": "https://elsewhere.example/search"} for k in answer["links"] if k["rel"] == "next"]
        return {**answer, "links": links} if asked.number >= 0 else answer

    proxy.change = elsewhere
    with small_pages(), pytest.raises(SearchError, match=r"leads to another host: elsewhere\.example"):
        small(proxy)


def test_a_next_link_as_seen_behind_a_proxy_is_followed(proxy: StacProxy, items: list[dict[str, Any]]) -> None:
    def inner(asked: Asked, answer: dict[str, Any]) -> dict[str, Any]:
        for link in answer["links"]:
            if link["rel"] == "next":
                link["href"] = "https://127.0.0.1:8443/search"
        return answer

    proxy.change = inner
    with small_pages():
        assert ids(small(proxy)) == small_ids(items)


def test_pages_that_end_too_early_are_not_taken_for_all(proxy: StacProxy, items: list[dict[str, Any]]) -> None:
    nothing: dict[str, Any] = {"type": "FeatureCollection", "features": [], "links": []}

    def ends(asked: Asked, answer: dict[str, Any]) -> dict[str, Any]:
        if asked.number < 0:
            return answer
        return nothing if is_later_page(asked) else {**answer, "numberMatched": len(small_ids(items))}

    proxy.change = ends
    with small_pages(), pytest.raises(SearchError, match=rf"the pages ended after 5 of {len(small_ids(items))} items"):
        small(proxy)


def test_an_empty_page_in_between_does_not_end_the_search(proxy: StacProxy, items: list[dict[str, Any]]) -> None:
    def hollow(asked: Asked, answer: dict[str, Any]) -> dict[str, Any]:
        if asked.number != 0:
            return answer
        again = {"rel": "next", "method": "POST", "href": f"{proxy.url}/search", "body": {**asked.body, "limit": 5}}
        return {"type": "FeatureCollection", "features": [], "links": [again]}

    proxy.change = hollow
    with small_pages(6):
        assert ids(small(proxy)) == small_ids(items)


@pytest.mark.parametrize(
    "page", [b'{"code": "NotFound", "description": "no such thing"}', b"[]", b'{"features": null}']
)
def test_an_answer_without_items_is_an_error_and_not_an_empty_search(proxy: StacProxy, page: bytes) -> None:
    proxy.fault = lambda asked: Reply(body=page) if asked.number >= 0 else None
    with pytest.raises(SearchError, match="expected a page of items"):
        small(proxy)


@pytest.mark.parametrize("conforms_to", [None, [], ["https://example.com/unheard-of", "item-search#fields"]])
def test_a_server_of_unknown_conformance_is_asked_for_nothing_special(
    proxy: StacProxy, items: list[dict[str, Any]], conforms_to: list[str] | None
) -> None:
    def landing(asked: Asked, answer: dict[str, Any]) -> dict[str, Any]:
        if asked.number >= 0:
            return answer
        rest = {key: value for key, value in answer.items() if key != "conformsTo"}
        return rest if conforms_to is None else {**rest, "conformsTo": conforms_to}

    proxy.change = landing
    assert ids(small(proxy)) == small_ids(items)
    assert {key for asked in proxy.searches for key in asked.body} <= {"collections", "bbox", "datetime", "limit"}


def test_a_page_that_is_no_stac_api_is_named(proxy: StacProxy) -> None:
    for page in (b"{}", b"[]", b'{"links": []}'):
        proxy.fault = lambda asked, page=page: Reply(body=page)  # type: ignore[misc]
        with pytest.raises(SearchError, match="is no STAC API that can be searched"):
            small(proxy)
    proxy.fault = lambda asked: Reply(body=b"<html>Welcome</html>")
    with pytest.raises(SearchError, match=f"opening {proxy.url}"):
        small(proxy)


def test_a_server_that_is_not_there_is_named() -> None:
    nobody = archive_named("http://127.0.0.1:9")
    with pytest.raises(SearchError, match=r"http://127\.0\.0\.1:9"):
        search_region(nobody, "optical", parse_region("0,0,1,1"), parse_period("2023-01"), patience=HASTY)


def test_every_request_has_its_turn_and_every_failure_is_told(proxy: StacProxy) -> None:
    class Listening(DirectAccess):
        __slots__ = ()

        @contextmanager
        def turn(self, url: str, *, requests: int = 1) -> Iterator[None]:
            turns.append((url, requests))
            if len(turns) > 8:
                raise HostUnavailable("127.0.0.1 has been away for too long")
            yield

        def failed(self, url: str, *, status: int | None = None, retry_after_s: float | None = None) -> None:
            failures.append((status, retry_after_s))

    turns: list[tuple[str, int]] = []
    failures: list[tuple[int | None, float | None]] = []
    replies = {0: Reply(status=429, headers={"Retry-After": "0"}), 1: Reply(hang_s=30.0)}
    proxy.fault = lambda asked: replies.get(asked.number)
    piece = pieces_of(parse_region("0,40,20,50"), parse_period("2023-01"), side_deg=20)[0]
    patience = replace(HASTIER, timeout_s=(10.0, 3.0))
    catalog = Catalog.open(proxy.url, Listening(), patience)
    with small_pages(20):
        search_piece(catalog, archive_named(proxy.url), "optical", piece, Listening(), patience)
    assert len(turns) == len(proxy.asked)
    assert all(url.startswith(proxy.url) and requests == 1 for url, requests in turns)
    assert failures == [(429, 0.0), (None, None)]
    with small_pages(5), pytest.raises(SearchError, match="away for too long"):
        search_piece(catalog, archive_named(proxy.url), "optical", piece, Listening(), patience)


def test_no_signature_is_in_an_error(proxy: StacProxy, caplog: pytest.LogCaptureFixture) -> None:
    answer = b'{"detail": "cannot read https://files.example/a.tif?sv=2021&sig=SECRET"}'
    proxy.fault = lambda asked: Reply(status=500, body=answer) if asked.number >= 0 else None
    with caplog.at_level(logging.DEBUG, logger="pipeline"), pytest.raises(SearchError, match="cannot read") as raised:
        small(proxy)
    assert "SECRET" not in str(raised.value)
    assert "SECRET" not in caplog.text


@contextmanager
def small_pages(size: int = 5) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.catalog_client._PAGE_SIZE", size)
        yield


# On Ray


@pytest.mark.slow
@pytest.mark.usefixtures("small_cluster")
def test_many_pieces_are_searched_as_a_ray_data_job_and_go_on_where_they_broke(
    proxy: StacProxy, items: list[dict[str, Any]], tmp_path: Path
) -> None:
    cache, region = Objects.at(tmp_path / "cache"), "0,40,20,50"
    spec = replace(access_spec_of(archive_named(proxy.url)), api=HostLimits(turns=2, failures=10_000))
    how: Any = {"region": region, "cache": cache, "side_deg": 4, "access_spec": spec}
    count = len(pieces_of(parse_region(region), parse_period(PERIOD), side_deg=4))
    assert count > FEW_PIECES
    proxy.fault = lambda asked: Reply(status=500) if asked.number >= 20 else None
    with pytest.raises(SearchError, match=f"of {count} pieces were answered and are kept"):
        found_by(proxy, **how)
    proxy.fault = lambda asked: None
    before = len(proxy.searches)
    result = found_by(proxy, **how)
    assert ids(result) == expected_ids(items, region, PERIOD)
    assert result.pieces == count
    assert 1 <= result.from_cache < count
    # The other of two tasks may just have begun its last try when the first search ended.
    assert 0 <= len(proxy.searches) - before - (count - result.from_cache) <= 1


@pytest.mark.slow
@pytest.mark.usefixtures("small_cluster")
def test_the_tasks_of_a_cluster_keep_the_archives_rate_together(proxy: StacProxy, tmp_path: Path) -> None:
    limits = HostLimits(rate_per_s=8.0, burst=4, turns=2)
    archive = replace(archive_named(proxy.url), api_limits=limits)
    before = len(proxy.asked)
    search_region(
        archive, "optical", parse_region("0,40,20,50"), parse_period("2023-01/2023-03"),
        cache=Objects.at(tmp_path / "cache"), side_deg=4, patience=HASTY,
    )  # fmt: skip
    asked = [entry.at for entry in proxy.asked[before:]]
    assert len(asked) > 40
    # In any stretch of time no more than the burst and what the rate allows, give or take the way to the server.
    for first in range(0, len(asked), 5):
        for last in range(first + 1, len(asked), 5):
            assert last - first <= 4 + 8.0 * (asked[last] - asked[first]) + 4


def test_the_small_search_of_old_is_the_same(proxy: StacProxy, items: list[dict[str, Any]]) -> None:
    found, refused = search(archive_named(proxy.url), "optical", parse_region(REGION), parse_period(PERIOD))
    assert (sorted(item.id for item in found), refused) == (expected_ids(items), [])


def test_the_items_of_these_tests_are_not_all_in_one_place() -> None:
    made = many_items(300, seed=1)
    whole = (START, START + timedelta(days=DAYS))
    assert len(expected_ids(made)) > 200
    assert all(whole[0] <= datetime.fromisoformat(i["properties"]["datetime"]) < whole[1] for i in made)
    assert time.monotonic() > 0
