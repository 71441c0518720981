"""build_dataset on the simulated archive, as a user runs it."""

from __future__ import annotations

import logging
import re
import signal
import sys
from pathlib import Path

import pytest

from jobs.build_dataset import BuildDataset, main
from jobs.support.job import run_job
from jobs.support.settings import parse
from pipeline.simulation.profiles import PROFILES
from pipeline.versions import Version, latest_sealed

PROFILE = PROFILES["test"]
ROOT = Path(__file__).resolve().parent.parent


def words(stac: str, store: Path | str, **more: object) -> list[str]:
    """The command's words for the whole of the archive, unless told otherwise."""
    values = {
        "archive": stac,
        "region": ",".join(map(str, PROFILE.region)),
        "period": PROFILE.period,
        "store": store,
        "labels": "worldcover",
        "shard_chips": 16,
        "block_cells": 2,
        "screening.max_cloud_fraction": 0.5,
        **more,
    }
    return [f"{key}={value}" for key, value in values.items()]


def built(stac: str, store: Path | str, **more: object) -> Version:
    """The newest sealed version after running the command in this process."""
    main(parse(BuildDataset, words(stac, store, **more)))
    return latest_sealed(str(store))


def candidates_of_a_dry_run(stac: str, store: Path, **more: object) -> int:
    """How many chips the command says it would try, 0 where nothing is to do; the store stays as it is."""
    before = {path: path.stat().st_mtime_ns for path in store.rglob("*")}
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("jobs.support.dry_run")
    log.addHandler(handler)
    level = log.level
    log.setLevel(logging.INFO)
    try:
        main(parse(BuildDataset, [*words(stac, store, **more), "--dry-run"]))
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
    assert {path: path.stat().st_mtime_ns for path in store.rglob("*")} == before
    if any("nothing to do" in line for line in lines):
        return 0
    (number,) = (found[1] for line in lines if (found := re.match(r"(\d+) candidate chips", line)))
    return int(number)


def exit_code(arguments: list[str]) -> int:
    """What the job's command ends with where it does not end well, run in this process."""
    before, sys.argv = sys.argv, ["build_dataset", *arguments]
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as done:
            run_job(BuildDataset, main)
        return int(str(done.value.code))
    finally:
        sys.argv = before
        signal.signal(signal.SIGTERM, handler)
