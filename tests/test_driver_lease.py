"""Who drives a build: a killed driver is followed at once, a living one is not, and one that lost its lease stops."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from jobs.support.driver_lease import is_gone, kept_alive, owner
from jobs.support.run_record import RunRecord
from jobs.support.version_stages import complete
from pipeline.ingest import build_planned_shard
from pipeline.leases import hold
from pipeline.manifest import items_table, plan_rows, rejections_table
from pipeline.objects import Objects
from pipeline.store import Store, StoreError
from pipeline.versions import begin
from tests.made_units import LAYOUT, SPLITS, Maker, grid, planned

PAIRS = grid(range(4), range(4))

pytestmark = [
    # Ray's own settings object warns about its own fields when it is copied.
    pytest.mark.filterwarnings("ignore:.* is deprecated:Warning:ray.data.context"),
    pytest.mark.filterwarnings("ignore:.* is deprecated:Warning:ray.data._internal"),
]


def owner_of_another_process(*, kill: bool) -> tuple[str, subprocess.Popen[str]]:
    code = "from jobs.support.driver_lease import owner; print(owner(), flush=True); input()"
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    name = other.stdout.readline().strip()
    if kill:
        other.kill()
        other.wait()
    return name, other


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def test_a_killed_driver_of_this_machine_is_followed_at_once(tmp_path: Path) -> None:
    name, other = owner_of_another_process(kill=True)
    leases = Objects.at(tmp_path)
    leases.put_json("00000001.json", {"owner": name, "expires": "2999-01-01T00:00:00+00:00"})
    with hold(leases, what="it", owner=owner(), ttl_s=60, is_gone=is_gone) as lease:
        assert lease.number == 2
    end(other)


def test_a_living_driver_is_not_followed(tmp_path: Path) -> None:
    name, other = owner_of_another_process(kill=False)
    leases = Objects.at(tmp_path)
    leases.put_json("00000001.json", {"owner": name, "expires": "2999-01-01T00:00:00+00:00"})
    with (
        pytest.raises(StoreError, match="is being built by"),
        hold(leases, what="it", owner=owner(), ttl_s=60, is_gone=is_gone),
    ):
        pass
    end(other)


def test_a_later_process_with_the_same_number_is_another_driver() -> None:
    host, pid, start = owner().split("/")
    assert not is_gone(owner())
    assert is_gone(f"{host}/{pid}/{int(start) - 1}")
    assert not is_gone(f"elsewhere/{pid}/1")
    assert int(pid) == os.getpid()


def test_a_lease_is_renewed_while_its_driver_works(tmp_path: Path) -> None:
    leases = Objects.at(tmp_path)
    with hold(leases, what="it", owner=owner(), ttl_s=4.0) as lease, kept_alive(lease):
        first = leases.get_json("00000001.json")["expires"]
        # Bounded by pytest's timeout; nothing else changes the file.
        while leases.get_json("00000001.json")["expires"] == first:
            pass


def test_a_store_that_is_away_costs_no_lease(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "leases", tmp_path / "elsewhere"
    leases = Objects.at(folder)
    with hold(leases, what="it", owner=owner(), ttl_s=0.4) as lease, kept_alive(lease) as held:
        folder.rename(elsewhere)
        # Longer than the lease lasts.
        time.sleep(0.6)
        held.check()
        elsewhere.rename(folder)
        back = time.time_ns()
        # Bounded by pytest's timeout; nothing else changes the file.
        while (folder / "00000001.json").stat().st_mtime_ns < back:
            pass
        held.confirm()


def test_a_driver_that_does_not_know_yet_that_its_lease_is_lost_seals_nothing(tmp_path: Path) -> None:
    version = planned(str(tmp_path / "store"), grid(range(4), range(2)))
    for shard in version.shards():
        build_planned_shard(version, shard, Maker())
    record = RunRecord(directory=str(tmp_path / "run"))
    another = {"owner": "another", "expires": "2999-01-01T00:00:00+00:00"}
    with version.lease(owner()) as lease, kept_alive(lease) as held:
        version.objects.put_json("leases/00000002.json", another)
        with pytest.raises(StoreError, match="the lease was lost to another"):
            complete(version, Maker(), record, held=held, max_failed_fraction=0.0)
    assert version.state == "building"


def test_a_driver_that_lost_its_lease_while_it_planned_stops_and_leaves_no_plan(tmp_path: Path) -> None:
    version = begin(Store.create(str(tmp_path / "store"), LAYOUT).url, {})
    rows = plan_rows(PAIRS, block_cells=2, shard_chips=LAYOUT.shard_chips, first_row=0, splits=SPLITS)
    another = {"owner": "another", "expires": "2999-01-01T00:00:00+00:00"}
    handed_over = []

    def parts() -> Iterator[pa.Table]:
        for start in range(0, rows.num_rows, LAYOUT.shard_chips):
            handed_over.append(start)
            if start:
                version.objects.put_json("leases/00000002.json", another)
            yield rows.slice(start, LAYOUT.shard_chips)

    lost = pytest.raises(StoreError, match="the lease was lost to another")
    with version.lease(owner()) as lease, kept_alive(lease) as held, lost:
        version.write_plan(items_table(PAIRS), rejections_table([]), parts(), confirm=held.confirm)
    assert handed_over == [0, LAYOUT.shard_chips]
    assert version.state == "planning"


def test_of_two_plans_the_first_counts(tmp_path: Path) -> None:
    version = begin(Store.create(str(tmp_path / "store"), LAYOUT).url, {})
    rows = plan_rows(PAIRS, block_cells=2, shard_chips=LAYOUT.shard_chips, first_row=0, splits=SPLITS)

    def overtaken() -> None:
        version.objects.put_json("plan.json", {"by": "another"})

    with pytest.raises(StoreError, match="planned by another driver meanwhile"):
        version.write_plan(items_table(PAIRS), rejections_table([]), [rows], confirm=overtaken)
    assert version.plan == {"by": "another"}


def test_a_store_that_is_away_at_the_end_hides_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    leases = Objects.at(str(tmp_path / "leases"))

    def away(*args: object, **how: object) -> None:
        raise OSError("the store is away")

    wrong = pytest.raises(ValueError, match="what went wrong")
    with pytest.MonkeyPatch.context() as patch, wrong, hold(leases, what="this", owner="me", ttl_s=60):
        patch.setattr(Objects, "put_json", away)
        raise ValueError("what went wrong")
    assert "this: the lease could not be given back and runs out in 60 s: the store is away" in caplog.text
