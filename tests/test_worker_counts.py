"""How many workers train: what may be written, and which global batches every number of them can share."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.pretrain import Pretrain
from jobs.support.settings import parse
from jobs.support.worker_counts import WorkerCounts, check_divides, worker_counts


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
