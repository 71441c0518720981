"""Why a read failed, so that it is known what may help.

GDAL says the HTTP status only when it cannot open a file. When a file opens and a later request fails, it says that
it got no bytes, whatever the server said; then the server is asked once more, by us.
"""

from __future__ import annotations

import os
import re
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

import rasterio

from pipeline.access import host_of
from pipeline.limits import retry_after_s
from pipeline.reader_gdal import READ_ERRORS, gdal_options, gdal_path, last_byte
from pipeline.reader_types import Kind, Patience, ReadError
from pipeline.redaction import describe

_STATUS = re.compile(r"HTTP response code: (\d{3})")
_NO_ANSWER = re.compile(r"CURL error|timed out|Timeout|reset by peer|Could not (?:connect|resolve)", re.IGNORECASE)
_NO_FILE = re.compile(r"No such file|does not exist in the file system", re.IGNORECASE)
_NO_BYTES = re.compile(r"got \d+ bytes, expected|Read error at|Cannot seek|Seek error", re.IGNORECASE)

_TIFF: Final = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_SMALLEST_HEADER_BYTES: Final = 512


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server says when it is asked for a file's first bytes."""

    status: int | None
    """None: nothing."""

    retry_after_s: float | None = None
    size: int | None = None
    """Of the file, in bytes."""

    start: bytes = b""
    """The file's first bytes."""


Ask = Callable[[str], Answer]
"""From a signed href to what its server says."""


def diagnose(error: Exception, href: str, patience: Patience, told: dict[str, Answer], ask: Ask) -> ReadError:
    """Why reading failed, asking the server where GDAL does not say.

    Args:
        error: What the engine met.
        href: Signed.
        patience: How long the server may take.
        ask: How a server is asked, when it is one's turn.
        told: Host -> what it answered when it had no time, so that no more is asked of it; added to.
    """
    remote = href.startswith(("http://", "https://"))
    if isinstance(error, ReadError) and not (remote and error.kind == "unreadable"):
        return error
    message = str(error) if isinstance(error, ReadError) else describe(error)
    status = _STATUS.search(message)
    kind: Kind
    if status:
        return _of_status(Answer(int(status[1])), message, href, told, ask)
    if _NO_ANSWER.search(message):
        return ReadError(message, kind="busy")
    if not remote:
        return ReadError(message, kind="missing" if _NO_FILE.search(message) else _of_content(message))
    kind = _of_content(message)
    if kind == "damaged" and not _NO_BYTES.search(message):
        return ReadError(message, kind=kind)
    # What comes next looks the same whether a request failed or the file is broken.
    answer = ask(href)
    if answer.status is None or answer.status >= 400:
        return _of_status(answer, message, href, told, ask)
    if kind == "unreadable":
        return ReadError(message, kind="busy" if answer.start in _TIFF and not _is_short(answer) else kind)
    if answer.size is not None and _cut_off(href, answer.size, patience):
        return ReadError(f"the file is cut off after {answer.size} bytes; {message}", kind="damaged")
    return ReadError(message, kind="busy")


def ask_server(href: str, patience: Patience) -> Answer:
    """Ask a server for the first bytes of a signed href."""
    request = urllib.request.Request(href, headers={"Range": "bytes=0-3"})  # noqa: S310  # given http(s) only
    # The certificates that GDAL trusts, which rasterio sets.
    trusted = ssl.create_default_context(cafile=os.environ.get("GDAL_CURL_CA_BUNDLE"))
    try:
        with urllib.request.urlopen(request, timeout=patience.timeout_s, context=trusted) as response:  # noqa: S310
            _, _, size = response.headers.get("Content-Range", "").partition("/")
            return Answer(response.status, size=int(size) if size.isdigit() else None, start=response.read(4))
    except urllib.error.HTTPError as error:
        return Answer(error.code, retry_after_s=retry_after_s(error.headers.get("Retry-After"), now=datetime.now(UTC)))
    except OSError:
        return Answer(None)


def _of_status(answer: Answer, message: str, href: str, told: dict[str, Answer], ask: Ask) -> ReadError:
    status = answer.status
    kind: Kind
    if status in (401, 403):
        kind = "forbidden"
    elif status in (404, 410):
        kind = "missing"
    elif status is None or status in (408, 425, 429) or status >= 500:
        kind = "busy"
    else:
        kind = "unreadable"
    if status in (429, 503) and answer.retry_after_s is None:
        # GDAL does not pass on how long the server asked to wait.
        host = host_of(href) or ""
        if host not in told:
            told[host] = ask(href)
        answer = told[host]
    said = "no answer" if status is None else f"HTTP {status}"
    return ReadError(f"{said}; {message}", kind=kind, status=status, retry_after_s=answer.retry_after_s)


def _of_content(message: str) -> Kind:
    """Whether only some of a file's blocks may be bad: those that were met in reading, not in opening."""
    return "damaged" if "IReadBlock failed" in message or "Read failed" in message else "unreadable"


def _is_short(answer: Answer) -> bool:
    """Whether a file is smaller than any header of a scene."""
    return answer.size is not None and answer.size < _SMALLEST_HEADER_BYTES


def _cut_off(href: str, size: int, patience: Patience) -> bool:
    """Whether a file's header promises more bytes than there are."""
    try:
        with rasterio.Env(**gdal_options(patience)), rasterio.open(gdal_path(href)) as dataset:
            return last_byte(dataset) > size
    except READ_ERRORS:
        return False
