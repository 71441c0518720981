"""How far a stage is: a bar on a terminal, plain lines in a log; rate, time left, and what came of it so far."""

from __future__ import annotations

import logging
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from tqdm import tqdm

from jobs.support import words
from pipeline.types import Watch

log = logging.getLogger(__name__)

T = TypeVar("T")

LINE_EVERY_S = 10.0
_WINDOW_S = 300.0
"""The rate is that of the last minutes: caches fill, archives slow down."""


def progress(
    items: Iterable[T],
    *,
    total: int | None,
    what: str,
    amount: Callable[[T], int] = lambda _: 1,
    stage: str = "",
    outcomes: Callable[[T], Mapping[str, int]] | None = None,
    brief_s: float = 0.0,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[T]:
    """Pass items on and show how far it is: a bar on a terminal, else a line every ten seconds and one at the end.

    Args:
        items: What to pass on.
        total: Sum of the amounts; None where nobody knows.
        what: Plural noun for the amounts.
        amount: How much one item stands for.
        stage: What is being done, such as search, pair or build.
        outcomes: What came of one item, such as how many were written, rejected and failed; added up and shown.
        brief_s: What takes no longer than this is not spoken of.
        clock: Seconds, for tests.
    """
    state = _Progress(total=total, what=what, stage=stage, start=clock())
    bar = None
    if sys.stderr.isatty():
        bar = tqdm(total=total, unit=f" {what}", desc=stage or None, smoothing=0.05, delay=brief_s)
    try:
        for item in items:
            number = amount(item)
            now = clock()
            state.add(number, outcomes(item) if outcomes else {}, now)
            if bar is not None:
                bar.update(number)
                if state.outcomes:
                    bar.set_postfix_str(state.said_outcomes(), refresh=False)
            elif state.is_time(now):
                log.info("%s", state.line(now))
            yield item
        # Also where the last item was not the last of the total, or there was none.
        if bar is None and state.done and clock() - state.start >= brief_s:
            log.info("%s", state.last_line(clock()))
    finally:
        if bar is not None:
            bar.close()


def watching(stage: str) -> Watch:
    """Shows how far a stage is that most often is brief."""

    def watch(coming: Iterable[T], **how: Any) -> Iterator[T]:
        return progress(coming, stage=stage, brief_s=LINE_EVERY_S, **how)

    return watch


class _Progress:
    """What has been done so far, and how fast."""

    def __init__(self, *, total: int | None, what: str, stage: str, start: float) -> None:
        self.total = total
        self.what = what
        self.stage = f"{stage}: " if stage else ""
        self.start = self.last_line_s = start
        self.done = 0
        self.outcomes: Counter[str] = Counter()
        self._recent = deque([(start, 0)])

    def add(self, number: int, outcomes: Mapping[str, int], now: float) -> None:
        self.done += number
        self.outcomes.update(outcomes)
        self._recent.append((now, self.done))
        while len(self._recent) > 2 and now - self._recent[1][0] > _WINDOW_S:
            self._recent.popleft()

    def is_time(self, now: float) -> bool:
        """Whether a line is due before the end."""
        return now - self.last_line_s >= LINE_EVERY_S and self.done != self.total

    def rate(self, now: float) -> float:
        """Per second, over the last minutes."""
        then, done = self._recent[0]
        return (self.done - done) / (now - then) if now > then else 0.0

    def line(self, now: float) -> str:
        self.last_line_s = now
        rate = self.rate(now)
        of, left = "", ""
        if self.total is not None:
            of = f" of {self.total}"
            left = f", {words.duration((self.total - self.done) / rate)} left" if rate else ""
        return f"{self.stage}{self.done}{of} {self.what}, {_rate(rate)}{left}{self._outcomes()}"

    def last_line(self, now: float) -> str:
        seconds = now - self.start
        rate = self.done / seconds if seconds > 0 else 0.0
        of = "" if self.total in (None, self.done) else f" of {self.total}"
        took = f"in {words.duration(seconds)}, {_rate(rate)}"
        return f"{self.stage}{self.done}{of} {self.what} {took}{self._outcomes()}"

    def said_outcomes(self) -> str:
        return ", ".join(f"{number} {name}" for name, number in self.outcomes.items())

    def _outcomes(self) -> str:
        return f"; {self.said_outcomes()}" if self.outcomes else ""


def _rate(per_s: float) -> str:
    """Per second, or per minute or hour where that would be less than one."""
    for factor, unit in ((1, "s"), (60, "min"), (3600, "h")):
        if per_s * factor >= 1 or unit == "h":
            break
    return f"{per_s * factor:.1f}/{unit}"
