"""Who drives a build: named so that a driver which was killed on this machine can be followed at once."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.leases import Lease


def owner() -> str:
    """Host, process id and the process's start: names this driver and no later one with the same process id."""
    return f"{socket.gethostname()}/{os.getpid()}/{_start_of(os.getpid())}"


def is_gone(name: str) -> bool:
    """Whether an owner was a process of this machine that has ended; False for what cannot be known."""
    host, _, process = name.partition("/")
    pid, _, start = process.partition("/")
    return host == socket.gethostname() and pid.isdigit() and _start_of(int(pid)) != start


@contextmanager
def kept_alive(lease: Lease) -> Iterator[None]:
    """Renew a lease in the background for the length of a ``with`` block.

    A driver that is suspended longer than the lease lasts may lose it; then it stops at its next renewal, and what
    its tasks have written is the same as the other driver's tasks would write.
    """
    stop = threading.Event()
    lost: list[BaseException] = []

    def renew() -> None:
        while not stop.wait(lease.ttl_s / 4):
            try:
                lease.renew()
            except Exception as error:  # noqa: BLE001  # handed to the driver's own thread below
                lost.append(error)
                return

    thread = threading.Thread(target=renew, name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    if lost:
        raise lost[0]


def _start_of(pid: int) -> str:
    """Start time of a process in clock ticks since boot; empty where there is no such process or no /proc."""
    try:
        # The name in parentheses may hold spaces; start time is the 20th field after it.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""
