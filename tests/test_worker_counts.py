"""How many workers train: what may be written, and which global batches every number of them can share."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.pretrain import Pretrain
from jobs.support.job import JobError
from jobs.support.pretrain_request import claim, with_lanes
from jobs.support.settings import parse
from jobs.support.worker_counts import WorkerCounts, check_divides, worker_counts
from pipeline.objects import Objects
from pipeline.sources import Source


@pytest.mark.parametrize(
    ("words", "expected"), [("4", WorkerCounts(4, 4)), (1, WorkerCounts(1, 1)), ("2..8", WorkerCounts(2, 8))]
)
def test_a_number_or_a_range(words: int | str, expected: WorkerCounts) -> None:
    assert worker_counts(words) == expected


@pytest.mark.parametrize("words", ["0", "8..2", "0..4", "2-8", "many", "2..", "-1"])
def test_anything_else_is_refused(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(Pretrain, ["store=s", "out=o", f"num_workers={words}"])
    assert "a number from 1, or a range such as 2..8" in capsys.readouterr().err


def test_settings_keep_numbers_as_numbers_and_ranges_in_one_spelling() -> None:
    for words, kept in (("4", 4), ("2..2", 2), ("2..8", "2..8")):
        assert parse(Pretrain, ["store=s", "out=o", f"num_workers={words}"]).num_workers == kept


@given(least=st.integers(1, 9), more=st.integers(0, 6), global_batch=st.integers(1, 5000))
def test_a_batch_that_some_number_cannot_share_is_refused_with_ones_that_all_can(
    least: int, more: int, global_batch: int
) -> None:
    workers = WorkerCounts(least, least + more)
    if all(global_batch % count == 0 for count in range(least, least + more + 1)):
        check_divides(workers, global_batch)
        return
    with pytest.raises(ValueError, match=re.escape(f"num_workers={workers}")) as raised:
        check_divides(workers, global_batch)
    if workers.elastic:
        said = str(raised.value).partition("give global_batch=")[2].partition(",")[0]
        for better in map(int, said.split(" or ")):
            check_divides(workers, better)


def test_lanes_are_as_many_as_workers_and_stay_as_a_run_began_with(tmp_path: Path) -> None:
    def lanes(**more: object) -> int | None:
        values = {"store": "s", "out": tmp_path, "global_batch": 24, **more}
        return with_lanes(parse(Pretrain, [f"{name}={value}" for name, value in values.items()])).lanes

    assert lanes() == 1
    assert lanes(num_workers="2..4") == 4
    assert lanes(num_workers=2, lanes=8) == 8
    with pytest.raises(ValueError, match="global_batch=24 is no multiple of lanes=5"):
        lanes(lanes=5)
    begun = parse(Pretrain, ["store=s", f"out={tmp_path}", "global_batch=24", "num_workers=3"])
    sources = [Source(url="s", version=1)]
    claim(Objects.at(tmp_path), with_lanes(begun), sources)
    assert lanes(num_workers=2) == 3
    again = parse(Pretrain, ["store=s", f"out={tmp_path}", "global_batch=24", "num_workers=3", "lanes=4"])
    with pytest.raises(JobError, match="lanes: 3 -> 4"):
        claim(Objects.at(tmp_path), with_lanes(again), sources)
