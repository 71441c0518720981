"""Versions: planned, built by tasks that may die, sealed once, followed by others that leave them as they are."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.canonical import canonical_hash, differences
from pipeline.chip_table import chip_table
from pipeline.store import Store, StoreError
from pipeline.versions import Version, begin, latest, latest_sealed
from tests.sample_chips import LAYOUT, make_chip

REQUEST = {"region": [1.0, 2.0], "limits": {"cloud": 0.1, "days": 3}}
NOTHING = pa.table({"id": pa.array([], pa.string())})


def manifest(rows: Sequence[int]) -> pa.Table:
    return pa.table(
        {
            "row": pa.array(rows, pa.int64()),
            "shard": pa.array([row // LAYOUT.shard_chips for row in rows], pa.int32()),
            **{name: [f"{name}{row}" for row in rows] for name in ("cell", "pair", "unit", "split")},
        }
    )


def build_shard(version: Version, shard: int, status: Callable[[int], str] = lambda row: "written") -> None:
    """What a task does: pixels first, then its part."""
    store = Store.open(version.url)
    table = version.manifest()
    rows = [row for row in table.to_pylist() if row.pop("shard") == shard]
    hashes = store.write_shard(
        shard, [(row["row"], make_chip(row["row"])) for row in rows if status(row["row"]) == "written"]
    )
    for row in rows:
        row["status"] = status(row["row"])
        row.update(
            {"written": {"sha256": hashes.get(row["row"])}, "rejected": {"reason": "cloudy"}, "failed": {"error": "x"}}[
                row["status"]
            ]
        )
    version.write_part(shard, chip_table(rows))


def plan(version: Version, rows: Sequence[int]) -> None:
    half = len(rows) // 2
    version.write_plan(NOTHING, NOTHING, [manifest(rows[:half]), manifest(rows[half:])])
    Store.open(version.url).resize(rows[-1] + 1)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return Store.create(str(tmp_path / "store"), LAYOUT).url


def test_a_version_goes_from_planning_to_sealed(url: str) -> None:
    version = begin(url, REQUEST)
    assert (version.number, version.state, version.plan) == (1, "planning", None)
    plan(version, [0, 1, 2, 4, 5, 8])
    assert version.state == "building"
    assert version.plan == {
        "num_chips": 6,
        "first_row": 0,
        "end_row": 9,
        "first_shard": 0,
        "end_shard": 3,
        "part_rows": [0],
        "num_rejections": 0,
        "shard_chips": 4,
    }
    assert version.manifest()["row"].to_pylist() == [0, 1, 2, 4, 5, 8]
    assert (version.items().num_rows, version.rejections().num_rows) == (0, 0)
    for shard in version.shards():
        assert version.part(shard) is None
        build_shard(version, shard, lambda row: "rejected" if row == 4 else "written")
    counts = version.seal()
    assert version.state == "sealed"
    assert counts == version.sealed == version.seal()
    assert (counts["requested"], counts["written"], counts["rejected"], counts["failed"]) == (6, 5, 1, 0)
    assert counts["sha256"] == hashlib.sha256(version.objects.get("chip_table/part-00000.parquet")).hexdigest()
    assert version.chips()["row"].to_pylist() == [0, 1, 2, 4, 5, 8]
    assert latest_sealed(url).number == 1


def test_the_same_request_finds_its_version_and_another_names_what_differs(url: str) -> None:
    first = begin(url, REQUEST)
    again = begin(url, {"limits": {"days": 3, "cloud": 0.1}, "region": (1.0, 2.0)})
    assert again.number == first.number
    assert again.request == REQUEST
    with pytest.raises(StoreError, match=r"version 1 was begun with another request: limits\.cloud: 0\.1 -> 0\.2"):
        begin(url, {**REQUEST, "limits": {"cloud": 0.2, "days": 3}})


def test_without_a_store_there_is_nothing_to_version(tmp_path: Path) -> None:
    for ask in (latest_sealed, lambda url: begin(url, REQUEST)):
        with pytest.raises(StoreError, match="no store at"):
            ask(str(tmp_path / "nowhere"))
    assert latest(str(tmp_path / "nowhere")) is None


def test_an_unsealed_version_is_the_latest_but_not_to_be_relied_on(url: str) -> None:
    assert latest(url) is None
    begin(url, REQUEST)
    newest = latest(url)
    assert newest is not None
    assert newest.number == 1
    with pytest.raises(StoreError, match="has no sealed version"):
        latest_sealed(url)


def test_a_finished_shard_has_its_part_and_no_failures(url: str) -> None:
    version = begin(url, REQUEST)
    plan(version, list(range(10)))
    build_shard(version, 2)
    build_shard(version, 1, lambda row: "failed" if row == 6 else "written")
    assert version.finished_shards() == {2}
    assert version.chips()["row"].to_pylist() == [4, 5, 6, 7, 8, 9]
    build_shard(version, 1)
    assert version.finished_shards() == {1, 2}


def test_sealing_is_refused_until_the_ledger_is_the_request(url: str) -> None:
    version = begin(url, REQUEST)
    plan(version, list(range(10)))
    build_shard(version, 0)
    with pytest.raises(StoreError, match="shards 1, 2 are not done"):
        version.seal()
    build_shard(version, 1)
    build_shard(version, 2)
    part = version.part(2)
    assert part is not None
    version.write_part(2, part.slice(0, 1))
    with pytest.raises(StoreError, match="rows 9 are not in both manifest and ledger"):
        version.seal()
    version.write_part(2, part.set_column(1, "cell", pa.array(["other", "other"])))
    with pytest.raises(StoreError, match="cell differs between manifest and ledger"):
        version.seal()
    assert version.state == "building"
    version.write_part(2, part)
    assert version.seal()["requested"] == 10


def test_sealing_shows_how_far_it_is(url: str) -> None:
    version = begin(url, REQUEST)
    plan(version, list(range(10)))
    for shard in version.shards():
        build_shard(version, shard)
    seen: list[tuple[int, int]] = []

    def watch(coming: Iterable[Any], *, total: int, what: str, amount: Callable[[Any], int]) -> Iterator[Any]:
        assert what == "shards"
        for one in coming:
            seen.append((amount(one), total))
            yield one

    watched = version.seal(watch=watch)
    assert sum(amount for amount, _ in seen) == len(version.shards())
    assert {total for _, total in seen} == {len(version.shards())}
    assert watched == version.sealed


def test_failed_chips_do_not_keep_a_version_from_being_sealed(url: str) -> None:
    version = begin(url, REQUEST)
    plan(version, [0, 1])
    build_shard(version, 0, lambda row: "failed" if row else "written")
    assert version.seal()["failed"] == 1


def test_a_sealed_version_is_never_written_again(url: str) -> None:
    version = begin(url, REQUEST)
    plan(version, [0, 1])
    build_shard(version, 0)
    part = version.part(0)
    assert part is not None
    version.seal()
    with pytest.raises(StoreError, match="version 1 is sealed"):
        version.write_part(0, part)
    with pytest.raises(StoreError, match="version 1 is sealed"):
        version.lease("me")
    with pytest.raises(StoreError, match="is planned already"):
        plan(version, [0, 1])


def test_an_append_starts_at_a_new_shard_and_leaves_earlier_versions_as_they_are(url: str) -> None:
    first = begin(url, REQUEST)
    plan(first, list(range(6)))
    with pytest.raises(StoreError, match="cannot begin before version 1 is sealed"):
        begin(url, {"region": "more"}, number=2)
    for shard in first.shards():
        build_shard(first, shard)
    first.seal()
    before = {path: first.objects.get(path) for path in first.objects.list()}
    pixels = Store.open(url).read_chip(5)
    with pytest.raises(StoreError, match="was begun with another request"):
        begin(url, {"region": "more"})
    second = begin(url, {"region": "more"}, number=2)
    assert second.first_shard() == 2
    with pytest.raises(StoreError, match="rows must ascend from 8 on"):
        plan(second, [6, 7])
    plan(second, [8, 9, 10])
    assert list(second.shards()) == [2]
    assert latest_sealed(url).number == 1
    build_shard(second, 2)
    second.seal()
    assert latest_sealed(url).number == 2
    assert second.chips()["row"].to_pylist() == [8, 9, 10]
    assert second.all_chips()["row"].to_pylist() == [0, 1, 2, 3, 4, 5, 8, 9, 10]
    assert first.all_chips()["row"].to_pylist() == [0, 1, 2, 3, 4, 5]
    assert {path: first.objects.get(path) for path in first.objects.list()} == before
    assert all((Store.open(url).read_chip(5)[name] == pixels[name]).all() for name in pixels)


def test_a_killed_planning_is_done_again_and_leaves_no_parts_behind(url: str) -> None:
    version = begin(url, REQUEST)

    def die_after_two_parts() -> Any:
        yield manifest([0, 1])
        yield manifest([2, 3])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        version.write_plan(NOTHING, NOTHING, die_after_two_parts())
    assert version.state == "planning"
    version.write_plan(NOTHING, NOTHING, [manifest([0, 1, 2])], {"num_chips": 3, "note": "by block"})
    assert version.objects.list("manifest") == ["manifest/part-00000.parquet"]
    assert version.manifest()["row"].to_pylist() == [0, 1, 2]
    assert version.plan is not None
    assert version.plan["note"] == "by block"


@pytest.mark.parametrize(
    ("parts", "facts", "message"),
    [
        ([manifest([0, 2, 1])], {}, "rows must ascend from 0 on"),
        ([manifest([0, 1]), manifest([1])], {}, "rows must ascend from 2 on"),
        ([manifest([0]).set_column(1, "shard", pa.array([1], pa.int32()))], {}, "in the shards of 4 rows they name"),
        ([manifest([])], {}, "the manifest has no rows"),
        ([manifest([0, 1])], {"num_chips": 3}, "the plan is not its manifest's: num_chips: 3 -> 2"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(url: str, parts: list[pa.Table], facts: dict[str, Any], message: str) -> None:
    version = begin(url, REQUEST)
    with pytest.raises(StoreError, match=message):
        version.write_plan(NOTHING, NOTHING, parts, facts)
    assert version.state == "planning"
    with pytest.raises(StoreError, match="is not planned yet"):
        version.shards()


def test_a_part_holds_rows_of_its_own_shard(url: str) -> None:
    version = begin(url, REQUEST)
    plan(version, list(range(6)))
    build_shard(version, 0)
    part = version.part(0)
    assert part is not None
    for shard in (1, 7):
        with pytest.raises(StoreError, match=f"shard {shard}: the part has rows of other shards"):
            version.write_part(shard, part)
    with pytest.raises(StoreError, match="shard 0: chip table: column row must be there"):
        version.write_part(0, part.drop_columns(["row"]))


def test_work_done_twice_gives_the_same_bytes(url: str, tmp_path: Path) -> None:
    other = Store.create(str(tmp_path / "other"), LAYOUT).url

    def build(where: str, order: Sequence[int]) -> dict[str, bytes]:
        version = begin(where, REQUEST)
        plan(version, list(range(10)))
        for shard in order:
            build_shard(version, shard, lambda row: "rejected" if row % 4 == 1 else "written")
        version.seal()
        objects = Store.open(where).objects
        return {path: objects.get(path) for path in objects.list()}

    assert build(url, [0, 1, 2]) == build(other, [2, 2, 0, 1, 0])


def test_a_version_travels_to_tasks_by_url_and_number(url: str) -> None:
    version = begin(url, REQUEST)
    copy = pickle.loads(pickle.dumps(version))
    assert (copy.url, copy.number, copy.request) == (version.url, version.number, REQUEST)


class Clock:
    def __init__(self) -> None:
        self.now = datetime(2024, 5, 1, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


def test_only_one_driver_at_a_time(url: str) -> None:
    version, clock = begin(url, REQUEST), Clock()
    with version.lease("anna", ttl_s=60, clock=clock) as lease:
        clock.wait(50)
        with pytest.raises(
            StoreError, match=r"version 1 is being built by anna, whose lease runs until 2024-05-01T00:01"
        ):
            version.lease("bert", ttl_s=60, clock=clock).__enter__()
        lease.renew()
        clock.wait(50)
        with pytest.raises(StoreError, match="is being built by anna"):
            version.lease("bert", ttl_s=60, clock=clock).__enter__()
    with version.lease("bert", ttl_s=60, clock=clock) as lease:
        assert lease.number == 2


def test_a_killed_driver_is_followed_when_its_lease_has_expired(url: str) -> None:
    version, clock = begin(url, REQUEST), Clock()
    killed = version.lease("anna", ttl_s=60, clock=clock).__enter__()
    clock.wait(61)
    with version.lease("bert", ttl_s=60, clock=clock) as lease:
        assert lease.number == 2
        with pytest.raises(StoreError, match="the lease was lost to bert"):
            killed.renew()
        lease.renew()


def test_the_same_owner_takes_over_from_itself_at_once(url: str) -> None:
    version, clock = begin(url, REQUEST), Clock()
    killed = version.lease("anna", clock=clock).__enter__()
    with version.lease("anna", clock=clock) as lease:
        assert (killed.number, lease.number) == (1, 2)


def test_of_two_that_find_an_expired_lease_one_gets_it(url: str) -> None:
    version, clock = begin(url, REQUEST), Clock()
    version.lease("anna", ttl_s=1, clock=clock).__enter__()
    clock.wait(2)
    fast = version.lease("bert", clock=clock)

    taken: list[object] = []

    def while_carl_looks() -> datetime:
        if not taken:
            taken.append(fast.__enter__())
        return clock.now

    with pytest.raises(StoreError, match="is being built by bert, who was faster"):
        version.lease("carl", clock=while_carl_looks).__enter__()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
requests = st.dictionaries(st.text(max_size=3), json_values, max_size=4)


@given(request=requests)
def test_a_request_equals_itself_in_any_order(request: dict[str, Any]) -> None:
    shuffled = dict(reversed(request.items()))
    assert canonical_hash(request) == canonical_hash(shuffled)
    assert list(differences(request, shuffled)) == []


@given(request=requests, key=st.text(max_size=3))
def test_a_changed_setting_is_named(request: dict[str, Any], key: str) -> None:
    changed = {**request, key: "another value"}
    assert canonical_hash(request) != canonical_hash(changed)
    assert any(line.startswith(f"{key}:") for line in differences(request, changed))
