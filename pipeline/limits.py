"""How many requests a host gets: rate, turns at a time, pauses that it asked for, and a breaker when it is in trouble.

Nothing here waits or asks for the time: every method is told what time it is, in seconds on any one clock.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Literal

BreakerState = Literal["closed", "open", "probing"]

_TROUBLE = frozenset({408, 425, 429})

PROBATION_S = 1.0
"""After a probe that went well the rest waits this long: some failures are told only after their turn has ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostLimits:
    """What one host is asked for at most, by everybody together."""

    rate_per_s: float = 200.0
    """Requests per second, in the long run."""

    burst: int = 200
    """Requests that may go at once after a quiet time."""

    turns: int = 64
    """Turns at a time; a turn is one request of ours, or the reads of one block: over as many connections for each of
    the reader's threads as its window has rows of the file's blocks, about five."""

    lease_s: float = 30.0
    """A turn whose holder is not heard of for so long is given to the next, seconds."""

    failures: int = 8
    """So many failures within `window_s` open the breaker: nothing is sent until its pause is over."""

    window_s: float = 30.0
    pause_s: float = 5.0
    """The breaker's first pause, seconds; after it one turn goes as a probe, and each that fails doubles the pause."""

    longest_pause_s: float = 300.0

    patience_s: float = 1800.0
    """After so long without an answer, seconds, whoever waits is told that the host is away."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{field.name} must be greater than 0, got {value}")

    def stricter(self, other: HostLimits) -> HostLimits:
        """Of each number the one that asks less of the host; whoever waits keeps the shorter patience."""
        longer = ("window_s", "pause_s", "longest_pause_s")
        return HostLimits(
            **{
                field.name: (max if field.name in longer else min)(
                    getattr(self, field.name), getattr(other, field.name)
                )
                for field in fields(self)
            }
        )


def retry_after_s(value: str | None, *, now: datetime) -> float | None:
    """Seconds to wait by a Retry-After header: a number of seconds or an HTTP date; None where it says neither.

    A date in the past is 0.
    """
    text = (value or "").strip()
    if text.isascii() and text.isdigit():
        return float(text) if len(text) < 16 else None
    try:
        when = parsedate_to_datetime(text)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    # HTTP dates are in GMT, also the one of the three forms that does not say so.
    when = when.replace(tzinfo=UTC) if when.tzinfo is None else when
    return max(0.0, (when - now).total_seconds())


def is_trouble(status: int | None) -> bool:
    """Whether a failure says that the host is in trouble or wants to be left alone: no answer, 408, 425, 429, 5xx."""
    return status is None or status >= 500 or status in _TROUBLE


class Bucket:
    """A rate with a burst. What asks for more than the burst goes once the bucket is full, and is paid off after."""

    def __init__(self, *, now: float) -> None:
        self._level_at = now
        self._level = math.inf  # full, whatever the burst

    def ready_at(self, requests: int, limits: HostLimits) -> float:
        """When so many requests may go."""
        lacking = min(requests, limits.burst) - min(self._level, limits.burst)
        return self._level_at + max(0.0, lacking) / limits.rate_per_s

    def take(self, requests: int, limits: HostLimits, *, now: float) -> None:
        """Send so many requests now."""
        earned = max(0.0, now - self._level_at) * limits.rate_per_s
        self._level = min(self._level + earned, limits.burst) - requests
        self._level_at = max(now, self._level_at)


class Breaker:
    """Stops asking a host in trouble: pauses, then one probe, then everything again or a longer pause."""

    def __init__(self) -> None:
        self._failed_at: deque[float] = deque()
        self._pause_s = 0.0
        self._until = -math.inf
        self._open_since: float | None = None
        self._probe: str | None = None
        self._proven_at: float | None = None

    def state(self, now: float) -> BreakerState:
        """`closed`: all may go; `open`: nothing before `until`; `probing`: one at a time may."""
        self._close_if_proven(now)
        if self._open_since is None:
            return "closed"
        return "open" if now < self._until else "probing"

    def ready_at(self) -> float:
        """When the next may go, as far as time alone decides: infinity while a probe is under way."""
        if self._open_since is None:
            return -math.inf
        if self._proven_at is not None:
            return self._proven_at
        return math.inf if self._probe is not None else self._until

    def away_s(self, now: float) -> float:
        """Seconds since the breaker opened without an answer in between; 0 while it is closed."""
        self._close_if_proven(now)
        return 0.0 if self._open_since is None else now - self._open_since

    def went(self, ticket: str, *, now: float) -> None:
        """A turn begins; while probing, it is the probe."""
        self._close_if_proven(now)
        if self._open_since is not None:
            self._probe = ticket

    def ended(self, ticket: str, *, answered: bool, now: float) -> None:
        """A turn ended, and whether it got its answers; a probe that did closes the breaker, if nothing follows."""
        if ticket != self._probe:
            return
        self._probe = None
        if answered:
            self._proven_at = now + PROBATION_S

    def failed(self, limits: HostLimits, *, now: float) -> None:
        """A request got no answer, or one that says trouble."""
        self._close_if_proven(now)
        if self._open_since is not None:
            # While open, what was under way still comes in: one trouble, not many.
            if now >= self._until:
                self._pause(limits, now, longer=self._probe is not None or self._proven_at is not None)
            self._probe = self._proven_at = None
            return
        self._failed_at.append(now)
        while self._failed_at[0] <= now - limits.window_s:
            self._failed_at.popleft()
        if len(self._failed_at) >= limits.failures:
            self._open_since = now
            self._pause(limits, now, longer=False)

    def _close_if_proven(self, now: float) -> None:
        if self._proven_at is not None and now >= self._proven_at:
            self._open_since = self._proven_at = None
            self._pause_s = 0.0
            self._failed_at.clear()

    def _pause(self, limits: HostLimits, now: float, *, longer: bool) -> None:
        wanted = self._pause_s * 2 if longer else self._pause_s
        self._pause_s = min(max(wanted, limits.pause_s), limits.longest_pause_s)
        self._until = now + self._pause_s


@dataclass(slots=True)
class _Ticket:
    requests: int
    heard_at: float


class Gate:
    """Who may send to one host now: first come, first served, under all of its limits.

    Tickets are any unique strings. A ticket queues, is admitted, and leaves; all may be said twice without harm.
    """

    def __init__(self, limits: HostLimits, *, now: float) -> None:
        self.limits = limits
        self.breaker = Breaker()
        self._bucket = Bucket(now=now)
        self._paused_until = -math.inf
        self._queue: OrderedDict[str, _Ticket] = OrderedDict()
        self._held: dict[str, _Ticket] = {}
        self.requests = 0
        """Requests that were admitted so far."""

    @property
    def held(self) -> frozenset[str]:
        """Tickets whose turn it is."""
        return frozenset(self._held)

    @property
    def queued(self) -> Sequence[str]:
        """Tickets that wait, the next one first."""
        return tuple(self._queue)

    def queue(self, ticket: str, *, requests: int, now: float) -> None:
        """Take a place behind those who wait; or say that one still waits, or still holds its turn."""
        known = self._held.get(ticket) or self._queue.setdefault(ticket, _Ticket(requests, now))
        known.heard_at = now

    def hold(self, ticket: str, *, now: float) -> None:
        """The holder of a turn is there; one that is not known (any more) is taken at its word."""
        self._queue.pop(ticket, None)
        self._held.setdefault(ticket, _Ticket(0, now)).heard_at = now

    def admit(self, *, now: float) -> list[str]:
        """Those whose turn it is from now on."""
        self._forget(now)
        admitted = []
        while self._queue and now >= self.ready_at():
            ticket, entry = self._queue.popitem(last=False)
            self._bucket.take(entry.requests, self.limits, now=now)
            self.breaker.went(ticket, now=now)
            self._held[ticket] = _Ticket(entry.requests, now)
            self.requests += entry.requests
            admitted.append(ticket)
        return admitted

    def ready_at(self) -> float:
        """When the next in the queue may go if nobody leaves or fails before: infinity where that must come first."""
        if not self._queue or len(self._held) >= self.limits.turns:
            return math.inf
        first = next(iter(self._queue.values()))
        return max(self._paused_until, self.breaker.ready_at(), self._bucket.ready_at(first.requests, self.limits))

    def look_again_at(self) -> float:
        """When to call `admit` again if nothing happens until then; infinity if there is nothing to wait for."""
        heard = min((t.heard_at for t in (*self._held.values(), *self._queue.values())), default=math.inf)
        return min(self.ready_at(), heard + self.limits.lease_s)

    def leave(self, ticket: str, *, answered: bool, now: float) -> None:
        """A turn is over, or no longer wanted.

        Args:
            ticket: Queued or held; it is well if it is neither.
            answered: Whether the host gave its answers, which is what a probe is for.
            now: The time.
        """
        self._queue.pop(ticket, None)
        self._held.pop(ticket, None)
        self.breaker.ended(ticket, answered=answered, now=now)

    def failed(self, *, status: int | None, wait_s: float | None, now: float) -> None:
        """A request failed, with an HTTP status or without an answer, and the host may have said how long to wait."""
        if wait_s is not None:
            self.pause(now + wait_s)
        if is_trouble(status):
            self.breaker.failed(self.limits, now=now)

    def pause(self, until: float) -> None:
        """Send nothing before a time."""
        self._paused_until = max(self._paused_until, until)

    def paused_s(self, now: float) -> float:
        """Seconds of pause that are left of what the host asked for."""
        return max(0.0, self._paused_until - now)

    def away(self, now: float) -> str:
        """Why waiting makes no sense, or nothing: the host gave no answer, or wants none asked, for too long."""
        if (away_s := self.breaker.away_s(now)) > self.limits.patience_s:
            return f"no good answer for {away_s:.0f} s"
        if (asked_s := self.paused_s(now)) > self.limits.patience_s:
            return f"it asked to be left alone for {asked_s:.0f} s"
        return ""

    def _forget(self, now: float) -> None:
        """Drop those who were not heard of for the length of a lease: killed, or cut off."""
        for tickets in (self._held, self._queue):
            for ticket in [t for t, entry in tickets.items() if entry.heard_at + self.limits.lease_s <= now]:
                del tickets[ticket]
                self.breaker.ended(ticket, answered=False, now=now)
