"""A lease: only one driver at a time, on any store that can create a file if it is absent.

Leases are numbered files; who creates the next number holds it. A holder that is killed is followed once its lease
has expired. Tasks need none: what they write is whole and the same whoever writes it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from pipeline.objects import Objects
from pipeline.store import StoreError

log = logging.getLogger(__name__)

Clock = Callable[[], datetime]
IsGone = Callable[[str], bool]


def utc_now() -> datetime:
    """The time leases go by."""
    return datetime.now(UTC)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """The right to drive what a folder of leases stands for; renew it well before `ttl_s` is over."""

    objects: Objects
    """Folder of the leases."""

    what: str
    """What is leased, for messages."""

    owner: str
    number: int
    ttl_s: float
    clock: Clock

    def renew(self) -> None:
        """Hold on for another `ttl_s` from now.

        Raises:
            StoreError: Somebody else has taken over, because this lease had expired.
        """
        newest = _newest(self.objects)
        if newest != self.number:
            holder = self.objects.get_json(_name(newest))["owner"]
            raise StoreError(f"{self.what}: the lease was lost to {holder}")
        self._write(self.clock() + timedelta(seconds=self.ttl_s))

    def _write(self, expires: datetime, *, create: bool = False) -> None:
        content = {"owner": self.owner, "expires": expires.isoformat(timespec="seconds")}
        self.objects.put_json(_name(self.number), content, create=create)


@contextmanager
def hold(
    objects: Objects,
    *,
    what: str,
    owner: str,
    ttl_s: float,
    clock: Clock = utc_now,
    is_gone: IsGone = lambda _: False,
) -> Iterator[Lease]:
    """Hold the lease of a folder for the length of a ``with`` block.

    Args:
        objects: Folder of the leases.
        what: What is leased, for messages.
        owner: Who asks; the same owner may take over from itself at once.
        ttl_s: How long after the last renewal others may take over, in seconds.
        clock: Tells the time, UTC.
        is_gone: Whether an owner is known to have ended, so that its lease need not be waited for.

    Raises:
        StoreError: Another owner holds a lease that has not expired.
    """
    newest = _newest(objects)
    if newest:
        _refuse_live(objects, newest, what=what, owner=owner, now=clock(), is_gone=is_gone)
    lease = Lease(objects=objects, what=what, owner=owner, number=newest + 1, ttl_s=ttl_s, clock=clock)
    try:
        lease._write(clock() + timedelta(seconds=ttl_s), create=True)
    except FileExistsError as error:
        winner = objects.get_json(_name(lease.number))["owner"]
        raise StoreError(f"{what} is being built by {winner}, who was faster") from error
    try:
        yield lease
    finally:
        try:
            lease._write(clock())
        except OSError as error:
            # It runs out by itself; and what ended the block, if anything did, is what is to be heard of.
            log.warning("%s: the lease could not be given back and runs out in %.0f s: %s", what, ttl_s, error)


def _refuse_live(objects: Objects, number: int, *, what: str, owner: str, now: datetime, is_gone: IsGone) -> None:
    held = objects.get_json(_name(number))
    if held["owner"] == owner or is_gone(held["owner"]):
        return
    if datetime.fromisoformat(held["expires"]) > now:
        raise StoreError(f"{what} is being built by {held['owner']}, whose lease runs until {held['expires']}")


def _newest(objects: Objects) -> int:
    names = objects.list()
    return int(names[-1].removesuffix(".json")) if names else 0


def _name(number: int) -> str:
    return f"{number:08d}.json"
