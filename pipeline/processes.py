"""Servers that are started for the length of a ``with`` block, and must not outlive who started them."""

from __future__ import annotations

import ctypes
import signal
import socket
from contextlib import suppress

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """In a child before it runs: be sent SIGTERM when the parent ends, even if it is killed. Linux only."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def free_port() -> int:
    """A TCP port of this machine that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
