"""Who drives a build: a killed driver is followed at once, a living one is not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.support.driver_lease import is_gone, kept_alive, owner
from pipeline.leases import hold
from pipeline.objects import Objects
from pipeline.store import StoreError


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
