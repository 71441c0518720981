"""Signatures on hrefs: added just before reading, never kept, never shown."""

from __future__ import annotations

import hashlib
import os
import re
import socket
from dataclasses import dataclass, field
from datetime import UTC, datetime
from urllib.parse import urlsplit

import planetary_computer
import pydantic
import requests
from planetary_computer.sas import BLOB_STORAGE_DOMAIN, SASToken
from planetary_computer.settings import Settings

from pipeline.archives import Signing
from pipeline.limits import retry_after_s
from pipeline.redaction import describe
from pipeline.redaction import redact as redact

KEY_VARIABLE = "PC_SDK_SUBSCRIPTION_KEY"
"""Environment variable of the subscription key; read where tokens are asked for, and nowhere else."""

_PUBLIC_ACCOUNT = "ai4edatasetspublicassets"
_TIMEOUT_S = (5.0, 20.0)
_TRY_AGAIN = re.compile(r"try again in (\d+) s", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Container:
    """A container of blobs: what one token is for."""

    account: str
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """A signature for all blobs of a container; shows itself in no message."""

    query: str = field(repr=False)
    """What goes behind the question mark of a URL."""

    asked: datetime
    """When it was asked for, UTC."""

    expires: datetime
    """UTC."""

    @property
    def digest(self) -> str:
        """Tells tokens apart without showing them."""
        return hashlib.sha256(self.query.encode()).hexdigest()[:16]

    @property
    def lifetime_s(self) -> float:
        """From being asked for until it expires, seconds."""
        return max(0.0, (self.expires - self.asked).total_seconds())

    def lasts(self, margin_s: float, *, now: datetime) -> bool:
        """Whether it is valid for that long from now, or for a quarter of its life if that is shorter."""
        return (self.expires - now).total_seconds() > min(margin_s, self.lifetime_s / 4)


class TokenError(Exception):
    """No token was given; the message names the container, and the status says whether to ask again."""

    def __init__(self, message: str, *, status: int | None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after_s = retry_after_s


def sign(href: str, signing: Signing) -> str:
    """The href that can be read now; tokens are cached by the SDK in this process and renewed before they expire."""
    # The SDK would hand an expired signature back unchanged, so it is only ever given unsigned hrefs.
    if signing != "planetary-computer":
        return href
    path, _, query = str(planetary_computer.sign(href.partition("?")[0])).partition("?")
    return f"{path}?{_without_slash(query)}" if query else path


def container_of(href: str) -> Container | None:
    """The container whose token an href needs; None where Planetary Computer signs nothing."""
    parts = urlsplit(href)
    host = parts.netloc
    account, container = host.removesuffix(BLOB_STORAGE_DOMAIN), parts.path.lstrip("/").partition("/")[0]
    if account in (host, _PUBLIC_ACCOUNT) or not container:
        return None
    return Container(account, container)


def signed_with(href: str, token: Token) -> str:
    """The href with this signature, in place of any that it has."""
    return f"{href.partition('?')[0]}?{_without_slash(token.query)}"


def token_endpoint() -> str:
    """URL below which tokens are asked for, from the environment of this process or the SDK's own default."""
    return str(Settings.get().sas_url).rstrip("/")


def fetch_token(container: Container) -> Token:
    """Ask Planetary Computer for a token: one request, no retries, so that whoever asks can obey what it answers.

    The subscription key is taken from the environment of this process.

    Raises:
        TokenError: There was no answer, or none with a token.
    """
    settings = Settings.get()
    asked = datetime.now(UTC)
    try:
        response = requests.get(
            f"{token_endpoint()}/{container.account}/{container.name}",
            headers={"Ocp-Apim-Subscription-Key": settings.subscription_key} if settings.subscription_key else None,
            timeout=_TIMEOUT_S,
        )
        if response.status_code != requests.codes.ok:
            wait_s = retry_after_s(response.headers.get("Retry-After"), now=datetime.now(UTC))
            said = _TRY_AGAIN.search(response.text)
            raise TokenError(
                _refusal(container, response.status_code, has_key=bool(settings.subscription_key)),
                status=response.status_code,
                retry_after_s=float(said[1]) if wait_s is None and said else wait_s,
            )
        answer = SASToken(**response.json())
    except (requests.RequestException, pydantic.ValidationError, ValueError, TypeError) as error:
        # A validation error repeats what it was given.
        reason = describe(error) if isinstance(error, requests.RequestException) else "its answer holds no token"
        raise TokenError(f"{_name(container)}: {reason}", status=None) from None
    expires = answer.expiry if answer.expiry.tzinfo else answer.expiry.replace(tzinfo=UTC)
    return Token(query=answer.token, asked=asked, expires=expires)


def _without_slash(query: str) -> str:
    """The same parameters without a slash."""
    # In its messages GDAL names a file by what follows the last slash of its URL: of a signature that holds one it
    # would show the rest, and nothing would tell that it is part of one.
    return query.replace("/", "%2F")


def _name(container: Container) -> str:
    return f"a token for container {container.account}/{container.name} from {urlsplit(token_endpoint()).netloc}"


def _refusal(container: Container, status: int, *, has_key: bool) -> str:
    message = f"{_name(container)}: HTTP {status}"
    if status not in (401, 403):
        return message
    where = f"on node {socket.gethostname()} (process {os.getpid()}), where tokens are asked for"
    if has_key:
        return f"{message}; the key of {KEY_VARIABLE} {where}, is not accepted"
    return (
        f"{message}; {KEY_VARIABLE} is not set {where}: set it in the environment of the cluster's nodes (a Kubernetes "
        "secret, not runtime_env)"
    )
