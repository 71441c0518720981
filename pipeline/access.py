"""How this process may reach an archive's servers: with which signatures, and how many requests at a time."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import urlsplit

from pipeline.archives import Signing
from pipeline.signing import sign


class Access(Protocol):
    """Asked before every request to an archive, and told how it went."""

    def sign(self, href: str) -> str:
        """The href with a signature that is valid now; given unsigned hrefs only.

        Raises:
            SigningRefused: The archive gives no signature for it.
            HostUnavailable: Whoever gives signatures has not answered for longer than the limits allow.
        """

    def turn(self, url: str, *, requests: int = 1) -> AbstractContextManager[None]:
        """The right to send requests to the host of a URL, for the length of a ``with`` block.

        Waits for the host's rate and concurrency limit, and while its circuit breaker is open.

        Raises:
            HostUnavailable: The host has not answered for longer than the limits allow.
        """

    def failed(self, url: str, *, status: int | None = None, retry_after_s: float | None = None) -> None:
        """A request to the URL's host failed: with an HTTP status (403: the signature is dropped), or no answer."""


class HostUnavailable(Exception):  # noqa: N818  # what it says, as FileNotFoundError does
    """A host has been away for too long; the message names the host and no signature."""


class SigningRefused(Exception):  # noqa: N818
    """An archive gives no signature: the account or its key is missing, or there is no such container."""


def host_of(url: str) -> str | None:
    """Host, with its port if it has one, that a URL's requests go to; None for a local file."""
    parts = urlsplit(url)
    return parts.netloc.rpartition("@")[2].lower() or None if parts.scheme not in ("", "file") else None


@dataclass(frozen=True, slots=True)
class DirectAccess:
    """Signs in this process and limits nothing: for one process on a local archive, and for tests."""

    signing: Signing = "none"

    def sign(self, href: str) -> str:
        """See `Access`."""
        return sign(href, self.signing)

    def turn(self, url: str, *, requests: int = 1) -> AbstractContextManager[None]:
        """See `Access`."""
        return nullcontext()

    def failed(self, url: str, *, status: int | None = None, retry_after_s: float | None = None) -> None:
        """See `Access`."""
