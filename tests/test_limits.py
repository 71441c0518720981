"""What a host is asked for at most: rate, turns, pauses, breaker; under a clock of the test's own."""

from __future__ import annotations

import math
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.limits import PROBATION_S, Breaker, Gate, HostLimits, is_trouble, retry_after_s

NOW = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)
EASY = HostLimits(rate_per_s=1e6, burst=1_000_000, turns=1000, lease_s=1e9)


class Host:
    """A gate with a clock and a log of what was sent when."""

    def __init__(self, limits: HostLimits) -> None:
        self.now = 0.0
        self.gate = Gate(limits, now=0.0)
        self.sent: list[tuple[float, int]] = []
        self.asked: dict[str, int] = {}

    def ask(self, ticket: str, requests: int = 1) -> None:
        self.asked[ticket] = requests
        self.gate.queue(ticket, requests=requests, now=self.now)

    def admit(self) -> list[str]:
        admitted = self.gate.admit(now=self.now)
        self.sent += [(self.now, self.asked[ticket]) for ticket in admitted]
        return admitted

    def until_next(self) -> list[str]:
        """Let the time pass until somebody is admitted."""
        assert self.gate.ready_at() < math.inf, "nobody will ever be admitted"
        self.now = max(self.now, self.gate.ready_at())
        return self.admit()

    def pass_s(self, seconds: float) -> None:
        self.now += seconds


@given(
    rate=st.floats(0.5, 500),
    burst=st.integers(1, 50),
    turns=st.integers(1, 6),
    steps=st.lists(st.tuples(st.floats(0, 2), st.integers(0, 30), st.booleans()), max_size=60),
)
def test_no_interval_has_more_requests_than_rate_and_burst_allow_and_no_moment_more_turns(
    rate: float, burst: int, turns: int, steps: list[tuple[float, int, bool]]
) -> None:
    host = Host(HostLimits(rate_per_s=rate, burst=burst, turns=turns, lease_s=1e9))
    order: list[str] = []
    for number, (seconds, requests, leaves) in enumerate(steps):
        host.pass_s(seconds)
        host.ask(f"t{number}", min(requests, burst))
        order += host.admit()
        assert len(host.gate.held) <= turns
        if leaves and order:
            host.gate.leave(order[0] if order[0] in host.gate.held else order[-1], answered=True, now=host.now)
            order += host.admit()
    assert order == sorted(order, key=lambda t: int(t[1:])), "not first come, first served"
    for i, (start, _) in enumerate(host.sent):
        total = 0
        for end, requests in host.sent[i:]:
            total += requests
            assert total <= burst + rate * (end - start) + 1e-6


@given(rate=st.floats(0.5, 100), burst=st.integers(1, 20), sizes=st.lists(st.integers(1, 60), min_size=2, max_size=20))
def test_all_are_admitted_at_the_rate_also_those_that_ask_for_more_than_the_burst(
    rate: float, burst: int, sizes: list[int]
) -> None:
    host = Host(HostLimits(rate_per_s=rate, burst=burst, turns=10**6, lease_s=1e9))
    for number, requests in enumerate(sizes):
        host.ask(str(number), requests)
    admitted = host.admit()
    while len(admitted) < len(sizes):
        admitted += host.until_next()
    assert admitted == [str(n) for n in range(len(sizes))]
    # All but the last are paid off, less what the burst gave.
    assert host.now <= max(0, sum(sizes) - burst) / rate + 1e-6
    assert host.now >= max(0, sum(sizes[:-1]) + min(sizes[-1], burst) - burst) / rate - 1e-6


@given(
    waits=st.lists(st.tuples(st.floats(0, 5), st.floats(0, 60)), min_size=1, max_size=10),
    status=st.sampled_from([429, 503]),
)
def test_nothing_is_sent_before_any_wait_that_the_host_asked_for_is_over(
    waits: list[tuple[float, float]], status: int
) -> None:
    host = Host(replace(EASY, failures=10**6))
    until = 0.0
    for number, (seconds, wait) in enumerate(waits):
        host.pass_s(seconds)
        host.gate.failed(status=status, wait_s=wait, now=host.now)
        until = max(until, host.now + wait)
        host.ask(str(number))
        assert bool(host.admit()) == (host.now >= until)
    if host.gate.queued:
        assert host.gate.ready_at() == until, "exactly as long, and no longer"
        assert len(host.until_next()) >= 1


def open_breaker(limits: HostLimits) -> Host:
    host = Host(limits)
    for _ in range(limits.failures):
        assert host.gate.breaker.state(host.now) == "closed"
        host.gate.failed(status=503, wait_s=None, now=host.now)
    assert host.gate.breaker.state(host.now) == "open"
    return host


def test_a_breaker_pauses_longer_and_longer_and_closes_after_one_good_probe() -> None:
    limits = replace(EASY, failures=3, pause_s=5, longest_pause_s=15, lease_s=1e9)
    host = open_breaker(limits)
    for number in range(20):
        host.ask(str(number))
    sent_at = []
    for expected_pause in (5, 10, 15, 15):
        before = host.now
        probe = host.until_next()
        assert len(probe) == 1, "a probe is one turn, however many wait"
        assert host.now - before == expected_pause
        assert host.admit() == [], "a second turn beside the probe"
        sent_at.append(host.now)
        host.gate.failed(status=None, wait_s=None, now=host.now)
        host.gate.leave(probe[0], answered=False, now=host.now)
    [probe_that_works] = host.until_next()
    host.gate.leave(probe_that_works, answered=True, now=host.now)
    assert host.admit() == [], "a failure of the probe may still be told"
    host.pass_s(PROBATION_S)
    assert host.gate.breaker.state(host.now) == "closed"
    assert len(host.admit()) == 15
    for _ in range(3):
        host.gate.failed(status=503, wait_s=None, now=host.now)
    host.ask("after")
    before = host.now
    host.until_next()
    assert host.now - before == 5, "the pauses begin anew"


def test_a_probe_whose_failure_is_told_after_its_turn_has_failed_all_the_same() -> None:
    limits = replace(EASY, failures=2, pause_s=5)
    host = open_breaker(limits)
    for number in range(20):
        host.ask(str(number))
    for expected_pause in (5, 10, 20, 40):
        before = host.now
        [probe] = host.until_next()
        assert host.now - before == pytest.approx(expected_pause)
        host.gate.leave(probe, answered=True, now=host.now)
        host.pass_s(PROBATION_S / 2)
        assert host.admit() == []
        host.gate.failed(status=503, wait_s=None, now=host.now)
    assert host.gate.away(host.now + limits.patience_s) != "", "no answer since the first failure"
    [probe] = host.until_next()
    host.gate.leave(probe, answered=True, now=host.now)
    host.pass_s(PROBATION_S)
    assert len(host.admit()) == 15


def test_failures_further_apart_than_the_window_do_not_open_the_breaker() -> None:
    host = Host(replace(EASY, failures=3, window_s=10))
    for _ in range(20):
        host.gate.failed(status=500, wait_s=None, now=host.now)
        host.pass_s(5.1)
    assert host.gate.breaker.state(host.now) == "closed"


@pytest.mark.parametrize("status", [400, 401, 403, 404, 416])
def test_answers_about_one_file_say_nothing_about_the_host(status: int) -> None:
    host = Host(EASY)
    for _ in range(100):
        host.gate.failed(status=status, wait_s=None, now=host.now)
    assert not is_trouble(status)
    assert host.gate.breaker.state(host.now) == "closed"


def test_failures_of_what_was_under_way_do_not_prolong_the_pause() -> None:
    host = open_breaker(replace(EASY, failures=3, pause_s=5))
    for _ in range(50):
        host.pass_s(0.05)
        host.gate.failed(status=503, wait_s=None, now=host.now)
    host.ask("next")
    host.until_next()
    assert host.now == 5


def test_a_probe_whose_holder_was_killed_is_followed_by_another() -> None:
    host = open_breaker(replace(EASY, failures=1, pause_s=5, lease_s=30))
    host.ask("killed")
    assert host.until_next() == ["killed"]
    host.ask("next")
    assert host.admit() == []
    host.pass_s(29.9)
    host.gate.queue("next", requests=1, now=host.now)
    assert host.admit() == []
    host.now = host.gate.look_again_at()
    assert host.now == 5 + 30
    assert host.admit() == ["next"]


def test_turns_of_the_killed_are_given_back_and_those_of_the_living_are_not() -> None:
    host = Host(replace(EASY, turns=2, lease_s=30))
    for ticket in ("alive", "killed", "waiting", "killed waiting"):
        host.ask(ticket)
    assert host.admit() == ["alive", "killed"]
    for _ in range(4):
        host.pass_s(10)
        host.gate.hold("alive", now=host.now)
        host.gate.queue("waiting", requests=1, now=host.now)
        host.admit()
    assert host.gate.held == {"alive", "waiting"}
    assert host.gate.queued == ()


def test_turns_that_were_held_before_a_restart_count_after_it() -> None:
    host = Host(replace(EASY, turns=2))
    host.gate.hold("from before", now=host.now)
    host.gate.hold("from before", now=host.now)
    for ticket in "abc":
        host.ask(ticket)
    assert host.admit() == ["a"]
    host.gate.leave("from before", answered=True, now=host.now)
    assert host.admit() == ["b"]


def test_asking_and_leaving_twice_does_no_harm() -> None:
    host = Host(replace(EASY, turns=1))
    for _ in range(2):
        host.ask("a")
        host.ask("b")
    assert host.admit() == ["a"]
    host.ask("a")
    assert host.gate.queued == ("b",)
    for _ in range(2):
        host.gate.leave("a", answered=True, now=host.now)
    assert host.admit() == ["b"]
    host.gate.leave("unknown", answered=True, now=host.now)


def test_a_host_that_is_away_for_longer_than_patience_is_called_so_and_still_probed() -> None:
    host = open_breaker(replace(EASY, failures=1, pause_s=5, longest_pause_s=5, patience_s=60))
    while not host.gate.away(host.now):
        host.ask("probe")
        host.until_next()
        host.gate.failed(status=None, wait_s=None, now=host.now)
        host.gate.leave("probe", answered=False, now=host.now)
    assert 60 < host.now <= 70
    assert host.gate.away(host.now) == "no good answer for 65 s"
    host.ask("probe")
    host.until_next()
    host.gate.leave("probe", answered=True, now=host.now)
    host.pass_s(PROBATION_S)
    assert host.gate.away(host.now) == ""
    host.gate.failed(status=429, wait_s=3600, now=host.now)
    assert host.gate.away(host.now) == "it asked to be left alone for 3600 s"


@given(st.integers(0, 10**9))
def test_seconds_to_wait_are_read_as_they_are(seconds: int) -> None:
    assert retry_after_s(f" {seconds} ", now=NOW) == seconds


@given(st.integers(-(10**6), 10**6))
def test_dates_to_wait_for_are_read_in_all_three_forms(seconds: int) -> None:
    when = NOW + timedelta(seconds=seconds)
    for text in (
        format_datetime(when, usegmt=True),
        when.strftime("%A, %d-%b-%y %H:%M:%S GMT"),
        when.strftime("%a %b %e %H:%M:%S %Y"),
    ):
        assert retry_after_s(text, now=NOW) == max(0, seconds), text


@pytest.mark.parametrize("text", [None, "", "soon", "-5", "1.5", "1e3", "²", "12 s", "9" * 40, "Mon, 99 Foo 2026"])
def test_what_is_neither_seconds_nor_a_date_asks_for_nothing(text: str | None) -> None:
    assert retry_after_s(text, now=NOW) is None


@given(st.text(max_size=40))
def test_no_header_makes_the_parser_fail(text: str) -> None:
    seconds = retry_after_s(text, now=NOW)
    assert seconds is None or seconds >= 0


def test_of_two_limits_the_stricter_asks_less_in_every_respect() -> None:
    ours = HostLimits(rate_per_s=10, turns=4, pause_s=1, failures=3)
    theirs = HostLimits(rate_per_s=2, turns=9, pause_s=60, failures=5)
    both = ours.stricter(theirs)
    assert both == theirs.stricter(ours)
    assert (both.rate_per_s, both.turns, both.pause_s, both.failures) == (2, 4, 60, 3)


@pytest.mark.parametrize("wrong", [{"rate_per_s": 0}, {"turns": -1}, {"pause_s": math.nan}, {"burst": math.inf}])
def test_limits_that_limit_nothing_or_all_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be greater than 0, got"):
        HostLimits(**wrong)  # type: ignore[arg-type]


def test_an_idle_breaker_is_closed() -> None:
    assert Breaker().state(0.0) == "closed"
    assert Gate(EASY, now=0.0).look_again_at() == math.inf
