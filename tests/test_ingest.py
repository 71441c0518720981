"""Building shard by shard, without a cluster and on one: whatever goes wrong on the way, the end is the same."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import obstore
import pytest
import ray

from jobs.support.driver_lease import kept_alive
from jobs.support.run_record import RunRecord
from jobs.support.version_stages import complete
from pipeline import ingest, store
from pipeline.ingest import Receipt, build, build_planned_shard, check_shards_on_cluster
from pipeline.objects import Objects
from pipeline.statistics import BandStatistics
from pipeline.store import Store, StoreError
from pipeline.verification import verify
from pipeline.versions import Version
from tests.conftest import require_server
from tests.made_units import Maker, chip_of, chips_only, grid, objects_of, planned

_CAP_SYS_ADMIN = 21
"""Bit of the right to mount, see capabilities(7)."""

PAIRS = grid(range(8), range(3), days=(0, 5))


def build_here(version: Version, make: Maker) -> list[Receipt]:
    return [build_planned_shard(version, shard, make) for shard in version.shards()]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What every disturbed build must come to, byte for byte."""
    version = planned(str(tmp_path_factory.mktemp("undisturbed") / "store"), PAIRS)
    build_here(version, Maker())
    version.seal()
    return objects_of(version.url)


def test_a_task_needs_the_version_and_the_number_of_its_shard(tmp_path: Path) -> None:
    version = planned(str(tmp_path / "store"), PAIRS)
    receipts = build_here(version, Maker(rejected=frozenset({2})))
    assert sum(receipt.written for receipt in receipts) == 7 * 6
    assert sum(receipt.rejected for receipt in receipts) == 6
    counts = version.seal()
    assert (counts["requested"], counts["written"], counts["reasons"]) == (48, 42, {"cloudy": 6})
    stored = Store.open(version.url)
    for row in version.chips().to_pylist():
        if row["status"] == "written":
            expected = chip_of(row["cell"], row["pair"])
            assert all((stored.read_chip(row["row"])[name] == expected[name]).all() for name in expected)
    assert verify(version, pixels=True).ok


def test_statistics_of_shards_add_up_to_those_of_all_chips(tmp_path: Path) -> None:
    version = planned(str(tmp_path / "store"), PAIRS)
    build_here(version, Maker(rejected=frozenset({2})))
    assert version.statistics() is None
    version.seal()
    of_all = BandStatistics()
    for row in version.chips().to_pylist():
        if row["status"] == "written":
            of_all.add(chip_of(row["cell"], row["pair"]))
    assert version.statistics() == of_all
    assert version.all_statistics() == of_all


def test_a_finished_shard_is_not_made_again_and_one_with_failures_is_made_whole(tmp_path: Path) -> None:
    version = planned(str(tmp_path / "store"), PAIRS)
    build_here(version, Maker(failing=frozenset({0})))
    failed = version.failed_shards()
    assert failed
    assert failed | version.finished_shards() == set(version.shards())
    assert sum(table.num_rows for table in version.failures()) == 6
    assert version.counts()["failed"] == 6
    log = tmp_path / "log"
    again = build_here(version, Maker(log=log))
    assert sum(receipt.written for receipt in again) == 48
    made = set(log.read_text().splitlines())
    of_failed = {unit for shard in failed for unit in version.manifest_of(shard)["unit"].to_pylist()}
    assert made == of_failed
    assert version.failed_shards() == set()
    assert not any("failed" in path for path in version.objects.list("chips"))


@pytest.mark.parametrize("calls", range(8))
def test_a_task_killed_between_any_two_writes_leaves_its_shard_undone(
    calls: int, tmp_path: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    version = planned(str(tmp_path / "store"), PAIRS)
    build_planned_shard(version, 0, Maker(failing=frozenset(range(8))))
    build_planned_shard(version, 1, Maker())
    done = 0
    plain = Objects.put, Objects.delete

    def dying(plain_write: Any) -> Any:
        def write(self: Objects, *arguments: Any, **more: Any) -> None:
            nonlocal done
            if done == calls:
                raise KeyboardInterrupt
            done += 1
            plain_write(self, *arguments, **more)

        return write

    monkeypatch.setattr(store, "concurrently", lambda function, arguments: [function(each) for each in arguments])
    monkeypatch.setattr(Objects, "put", dying(plain[0]))
    monkeypatch.setattr(Objects, "delete", dying(plain[1]))
    with pytest.raises(KeyboardInterrupt):
        build_planned_shard(version, 0, Maker())
    monkeypatch.undo()
    # In this order: the old part goes, five arrays, the new part, the old part again.
    assert (0 in version.finished_shards()) == (calls == 7)
    if 0 < calls < 7:
        assert version.part(0) is None, "a part tells of pixels that are being replaced"
    build_here(version, Maker())
    version.seal()
    assert objects_of(version.url) == expected


@pytest.mark.parametrize("failing", [frozenset({0, 1}), frozenset()], ids=["with failures", "sealed with failures"])
def test_a_task_that_lives_on_beside_its_successor_changes_nothing_that_is_done(
    tmp_path: Path, failing: frozenset[int]
) -> None:
    version = planned(str(tmp_path / "store"), PAIRS)
    after_successor: list[dict[str, bytes]] = []

    def cut_off(rows: Any, items: Any) -> Any:
        # While this task still reads, another does its shard; what this one asks for does not come.
        if not after_successor:
            build_here(version, Maker() if failing else Maker(failing=frozenset({7})))
            if not failing:
                version.seal()
            after_successor.append(objects_of(version.url))
        return Maker(failing=frozenset(range(8)))(rows, items)

    receipt = build_planned_shard(version, 0, cut_off)
    assert objects_of(version.url) == after_successor[0]
    assert receipt.failed == (0 if failing else version.chips_of(0)["status"].to_pylist().count("failed"))


class Flaky:
    """Writes that fail so many times, at the lowest level."""

    def __init__(self, failures: int, text: str, only: str = "") -> None:
        self.failures, self.text, self.only, self.plain = failures, text, only, obstore.put
        self.calls = 0

    def __call__(self, where: Any, path: str, *arguments: Any, **more: Any) -> Any:
        if self.only in path and self.failures:
            self.failures -= 1
            self.calls += 1
            raise obstore.exceptions.GenericError(self.text)
        return self.plain(where, path, *arguments, **more)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    found: list[float] = []
    monkeypatch.setattr(store.time, "sleep", found.append)
    return found


def test_a_store_that_is_away_for_a_while_is_written_when_it_is_back(
    tmp_path: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, waits: list[float]
) -> None:
    version = planned(str(tmp_path / "store"), PAIRS)
    monkeypatch.setattr(obstore, "put", Flaky(3, "connection refused", only="b10"))
    assert all(not receipt.error for receipt in build_here(version, Maker()))
    assert waits == [1.0, 5.0, 20.0]
    version.seal()
    assert objects_of(version.url) == expected


@pytest.mark.parametrize("only", ["radar/c/2/", "chips/shard-000002"])
def test_a_store_that_stays_away_costs_the_shard_and_a_rerun_writes_it(
    only: str, tmp_path: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, waits: list[float]
) -> None:
    version = planned(str(tmp_path / "store"), PAIRS)
    monkeypatch.setattr(obstore, "put", Flaky(4, "connection refused", only=only))
    errors = {receipt.shard: receipt.error for receipt in build_here(version, Maker()) if receipt.error}
    assert list(errors) == [2]
    assert "could not write" in errors[2]
    assert "connection refused" in errors[2]
    assert version.finished_shards() == set(version.shards()) - {2}
    with pytest.raises(StoreError, match="cannot be sealed: shards 2 are not done"):
        version.seal()
    build_here(version, Maker())
    version.seal()
    assert objects_of(version.url) == expected


def mounting() -> list[str] | None:
    """Words before a command that mounts; None where that is not allowed."""
    status = Path("/proc/self/status").read_text()
    if int(status.partition("CapEff:")[2].split()[0], 16) >> _CAP_SYS_ADMIN & 1:
        return []
    # Nobody's password is asked for, and without being told to nothing is done as root.
    if "TWINLOOK_REQUIRE_SERVERS" in os.environ and shutil.which("sudo"):
        allowed = subprocess.run(["sudo", "-n", "true"], capture_output=True).returncode == 0
        return ["sudo", "-n"] if allowed else None
    return None


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system that is soon full."""
    folder = tmp_path / "disk"
    folder.mkdir()
    before = mounting()
    if before is None:
        pytest.skip("needs the right to mount a small file system")
    options = f"size=600k,mode=700,uid={os.getuid()},gid={os.getgid()}"
    mounted = subprocess.run([*before, "mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True)
    require_server(mounted.returncode == 0, f"could not mount a small file system: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run([*before, "umount", folder], check=True)


def test_a_full_disk_ends_the_build_with_a_message_and_a_rerun_with_room_ends_it_well(
    small_disk: Path, tmp_path: Path, expected: dict[str, bytes], waits: list[float]
) -> None:
    version = planned(str(small_disk / "store"), PAIRS)
    errors = [receipt.error for receipt in build_here(version, Maker()) if receipt.error]
    assert errors
    assert all("No space left on device" in error for error in errors)
    assert waits == [], "waited for a disk to become larger"
    left = Version(version.url, 1)
    assert left.finished_shards() < set(left.shards())
    # The same content on a larger disk, as after making room.
    moved = tmp_path / "larger"
    shutil.copytree(small_disk / "store", moved)
    again = Version(str(moved), 1)
    build_here(again, Maker())
    again.seal()
    assert objects_of(again.url) == expected
    assert verify(again, pixels=True).ok


def test_the_driver_reads_no_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = planned(str(tmp_path / "store"), PAIRS)
    read: list[str] = []
    plain = Objects.size

    def noting(self: Objects, path: str) -> int:
        read.append(path)
        return plain(self, path)

    monkeypatch.setattr(Objects, "size", noting)
    monkeypatch.setattr(ingest, "on_cluster", lambda work, numbers, **_: (row for row in ()))
    assert list(build(version, Maker())) == []
    assert [path for path in read if "manifest" in path or "looks" in path or "items" in path] == []


@pytest.fixture(scope="module")
def own_cluster() -> Iterator[None]:
    """Two CPUs, whatever other clusters this machine has."""
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=150_000_000)
    yield
    ray.shutdown()


@pytest.mark.usefixtures("own_cluster")
class TestOnACluster:
    """Real Ray."""

    pytestmark: ClassVar = [
        # Ray's own settings object warns about its own fields when it is copied.
        pytest.mark.filterwarnings("ignore:.* is deprecated:Warning:ray.data.context"),
        pytest.mark.filterwarnings("ignore:.* is deprecated:Warning:ray.data._internal"),
    ]

    def test_waves_build_the_same_store(self, tmp_path: Path, expected: dict[str, bytes]) -> None:
        version = planned(str(tmp_path / "store"), PAIRS)
        num_shards = len(version.shards())
        assert num_shards > 10
        receipts = list(build(version, Maker(), shards_per_wave=5))
        assert sorted(receipt.shard for receipt in receipts) == list(version.shards())
        version.seal()
        assert objects_of(version.url) == expected
        report = verify(version, pixels=True, check=check_shards_on_cluster)
        assert (report.ok, report.shards, report.chips) == (True, num_shards, 48)
        Objects.at(version.url).delete("radar/c/1/0/0/0")
        report = verify(version, pixels=True, check=check_shards_on_cluster)
        assert report.num_problems == 1
        assert "shard 1: radar/c/1/0/0/0 lacks the chips of rows" in report.problems[0]

    def test_a_killed_worker_is_followed_and_nothing_is_made_twice_that_was_done(
        self, tmp_path: Path, expected: dict[str, bytes]
    ) -> None:
        version = planned(str(tmp_path / "store"), PAIRS)
        died = tmp_path / "died"

        def make(rows: Any, items: Any) -> Any:
            if not died.exists() and rows[0]["column"] >= 4:
                died.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return Maker()(rows, items)

        receipts = list(build(version, make))
        assert died.exists()
        assert sorted(receipt.shard for receipt in receipts) == list(version.shards())
        version.seal()
        assert objects_of(version.url) == expected

    def test_a_shard_that_cannot_be_written_is_named_and_the_others_are_built(
        self, tmp_path: Path, expected: dict[str, bytes]
    ) -> None:
        version = planned(str(tmp_path / "store"), PAIRS)
        # What stands where a shard's object should be cannot be replaced.
        blocked = Path(version.url, "b20/c/3/0/0/0")
        blocked.mkdir(parents=True)
        (blocked / "in the way").touch()

        def make(rows: Any, items: Any) -> Any:
            # Not a second of waiting in the task's process.
            store.persistently.__kwdefaults__["waits_s"] = ()
            return Maker()(rows, items)

        with pytest.raises(StoreError, match=r"version 1: shards 3 could not be written.*running again.*b20/c/3"):
            list(build(version, make))
        assert version.finished_shards() == set(version.shards()) - {3}
        shutil.rmtree(blocked)
        assert [receipt.shard for receipt in build(version, Maker())] == [3]
        version.seal()
        assert chips_only(objects_of(version.url)) == chips_only(expected)

    def test_a_build_stops_where_its_lease_is_lost(self, tmp_path: Path) -> None:
        version = planned(str(tmp_path / "store"), grid(range(40), range(2)))
        another = {"owner": "another", "expires": "2999-01-01T00:00:00+00:00"}

        def make(rows: Any, items: Any) -> Any:
            version.objects.put_json("leases/00000002.json", another)
            return Maker(waiting_s=0.5)(rows, items)

        record = RunRecord(directory=str(tmp_path / "run"))
        with (
            pytest.raises(StoreError, match="the lease was lost to another"),
            version.lease("one", ttl_s=0.4) as lease,
            kept_alive(lease) as held,
        ):
            complete(version, make, record, held=held, max_failed_fraction=0.0)
        assert version.state == "building"
        assert 0 < len(version.finished_shards()) < len(version.shards())

    def test_ray_says_nothing_of_its_own(self, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        version = planned(str(tmp_path / "store"), PAIRS[:8])
        assert ray.is_initialized()
        list(build(version, Maker()))
        said = capfd.readouterr()
        assert said.out + said.err == ""
