"""Who drives a build: named so that a driver which was killed on this machine can be followed at once."""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.leases import Lease
from pipeline.store import StoreError

log = logging.getLogger(__name__)


def owner() -> str:
    """Host, process id and the process's start: names this driver and no later one with the same process id."""
    return f"{socket.gethostname()}/{os.getpid()}/{_start_of(os.getpid())}"


def is_gone(name: str) -> bool:
    """Whether an owner was a process of this machine that has ended; False for what cannot be known."""
    host, _, process = name.partition("/")
    pid, _, start = process.partition("/")
    return host == socket.gethostname() and pid.isdigit() and _start_of(int(pid)) != start


class Held:
    """The lease of a driver at work, renewed in the background; says when another driver has taken over."""

    def __init__(self, lease: Lease) -> None:
        self._lease = lease
        self._lost: StoreError | None = None

    def check(self) -> None:
        """Asks nobody; for between two steps of the work.

        Raises:
            StoreError: The last renewal found that another driver has taken over.
        """
        if self._lost is not None:
            raise self._lost

    def confirm(self) -> None:
        """Renew now, before what cannot be taken back: a driver that was suspended does not know what it has lost.

        Raises:
            StoreError: Another driver has taken over.
            OSError: The store cannot be asked.
        """
        self.check()
        self._lease.renew()

    def renew_until(self, stop: threading.Event) -> None:
        """Renew again and again; ends when told to, or when the lease is lost.

        A store that cannot be reached is no loss: nobody takes over in it either, so it is asked again.
        """
        while not stop.wait(self._lease.ttl_s / 4):
            try:
                self._lease.renew()
            except StoreError as error:
                log.error("%s; this driver stops", error)
                self._lost = error
                return
            except OSError as error:
                log.warning("the lease could not be renewed and will be tried again: %s", error)


@contextmanager
def kept_alive(lease: Lease) -> Iterator[Held]:
    """Renew a lease in the background for the length of a ``with`` block.

    A driver that is suspended for longer than the lease lasts may lose it. Whoever works under it asks `Held.check` on
    the way and `Held.confirm` before sealing; what its tasks have written until then is what the other driver's tasks
    write too.

    Raises:
        StoreError: The block has ended, but another driver had taken over.
    """
    held, stop = Held(lease), threading.Event()
    thread = threading.Thread(target=held.renew_until, args=(stop,), name="lease", daemon=True)
    thread.start()
    try:
        yield held
    finally:
        stop.set()
        thread.join()
    held.check()


def _start_of(pid: int) -> str:
    """Start time of a process in clock ticks since boot; empty where there is no such process or no /proc."""
    try:
        # The name in parentheses may hold spaces; start time is the 20th field after it.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""
