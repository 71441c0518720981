"""What a long stage says while it runs: on a terminal and in a log."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator

import pytest

from jobs.support import job
from jobs.support.progress import progress


class Clock:
    """Says what time it was made to be."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def ticking(clock: Clock, seconds: list[float]) -> Iterator[int]:
    for number, pause in enumerate(seconds):
        clock.now += pause
        yield number


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "jobs.support.progress"]


def test_a_log_gets_a_line_every_ten_seconds_and_one_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    clock = Clock()
    receipts = progress(
        ticking(clock, [4.0] * 6), total=600, what="chips", amount=lambda _: 100, stage="build", clock=clock,
        outcomes=lambda number: {"written": 90, "rejected": 10, "failed": number},
    )  # fmt: skip
    assert list(receipts) == list(range(6))
    assert said(caplog) == [
        "build: 300 of 600 chips, 25.0/s, 12 s left; 270 written, 30 rejected, 3 failed",
        "build: 600 chips in 24 s, 25.0/s; 540 written, 60 rejected, 15 failed",
    ]


def test_the_time_left_follows_the_last_minutes(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    clock = Clock()
    # A slow start, then one each second: what is left will take as long as of late.
    list(progress(ticking(clock, [1000.0] + [1.0] * 400), total=1000, what="shards", clock=clock))
    assert said(caplog)[-2].endswith("shards, 1.0/s, 10 min left")
    assert said(caplog)[-1] == "401 of 1000 shards in 23 min, 17.2/min"


def test_a_stage_that_is_brief_is_not_spoken_of(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    clock = Clock()
    for seconds in (0.1, 5.0):
        list(progress(ticking(clock, [seconds] * 3), total=3, what="shards", stage="seal", brief_s=10.0, clock=clock))
    assert said(caplog) == ["seal: 2 of 3 shards, 12.0/min, 5 s left", "seal: 3 shards in 15 s, 12.0/min"]


def test_where_nobody_knows_the_total_nothing_is_promised(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    clock = Clock()
    list(progress(ticking(clock, [6.0, 6.0, 6.0]), total=None, what="pieces", stage="search", clock=clock))
    assert said(caplog) == ["search: 2 pieces, 10.0/min", "search: 3 pieces in 18 s, 10.0/min"]


def test_nothing_to_do_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert list(progress([], total=0, what="shards")) == []
    assert said(caplog) == []


def test_an_error_passes_and_no_end_is_claimed(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    def broken() -> Iterator[int]:
        yield 1
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        list(progress(broken(), total=2, what="shards"))
    assert said(caplog) == []


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    caplog.set_level(logging.INFO)
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    list(progress([1, 2], total=2, what="shards", stage="build", outcomes=lambda _: {"written": 3}))
    last = screen.getvalue().split("\r")[-1]
    assert "build: 100%" in last
    assert "2/2" in last
    assert "6 written" in last
    assert said(caplog) == []


def test_jobs_find_it_where_it_was() -> None:
    assert job.progress is progress
