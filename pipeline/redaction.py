"""Keeping signatures and keys out of what is shown: one rule for every message, log line and file."""

from __future__ import annotations

import logging
import re
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_SHOWN = "…"

# From a question mark on, what looks like the parameters of a URL; also where the whole URL was quoted once more.
_QUERY = re.compile(r"(\?|%3F)(?=[^\s'\"<>()]*(?:=|%3D))[^\s'\"<>()]*", re.IGNORECASE)

_USER = re.compile(r"(://)[^/\s@'\"<>]+@|(%3A%2F%2F)(?:(?!%2F)[^/\s@'\"<>])+?%40", re.IGNORECASE)

# Parameters by name, for where there is no question mark: a bare token, a connection string, a log of parameters.
_PARAMETER = re.compile(
    r"""\b(
        sig | se | st | sp | spr | sv | skoid | sktid | skt | ske | skv |
        X-(?:Amz|Goog)-[A-Za-z-]+ | AWSAccessKeyId | GoogleAccessId | Signature | Credential |
        AccountKey | SharedAccessSignature |
        [\w-]*(?:access_key|access_key_id|account_key|master_key|sas_key|subscription_key|api_key|password|secret|token)
    )(=|%3D)(?!…)[^\s&;,'"<>()]+""",
    re.IGNORECASE | re.VERBOSE,
)

_HEADER = re.compile(
    r"""\b(Authorization | Ocp-Apim-Subscription-Key | X-Amz-Security-Token | X-Api-Key | AWS_SECRET_ACCESS_KEY |
        PC_SDK_SUBSCRIPTION_KEY | token | password | secret)
    (['"]?\s*:\s*['"]?)(?!…)((?:(?:Bearer|Basic|SharedKey|AWS4-HMAC-SHA256|AWS)\s+)?[^\s'",;}]+)""",
    re.IGNORECASE | re.VERBOSE,
)


def redact(text: str) -> str:
    """The text without what could be a signature, a key or a password: parameters of URLs, users in URLs, headers."""
    text = _USER.sub(rf"\1\2{_SHOWN}@", text)
    text = _QUERY.sub(rf"\1{_SHOWN}", text)
    text = _PARAMETER.sub(rf"\1\2{_SHOWN}", text)
    return _HEADER.sub(rf"\1\2{_SHOWN}", text)


def redact_values(content: Any) -> Any:
    """A JSON value with every text in it redacted, however deep; names of fields stay."""
    if isinstance(content, str):
        return redact(content)
    if isinstance(content, Mapping):
        return {name: redact_values(value) for name, value in content.items()}
    if isinstance(content, Sequence):
        return [redact_values(value) for value in content]
    return content


def describe(error: BaseException) -> str:
    """One line on an error and on what caused it, without signatures: some libraries say what failed only there."""
    return redact("; ".join(f"{type(part).__name__}: {part}".replace("\n", " ").strip(": ") for part in _chain(error)))


class Redacting(logging.Filter):
    """Takes signatures out of log records, tracebacks included; belongs on handlers, which see every logger's."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Rewrite the record; none is dropped."""
        record.msg, record.args = redact(record.getMessage()), ()
        if record.exc_info and record.exc_info[0] is not None:
            record.exc_text = redact("".join(traceback.format_exception(*record.exc_info)).rstrip())
            record.exc_info = None
        return True


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error, its cause, the cause's cause; and what a group of errors holds."""
    seen: set[int] = set()
    left: list[BaseException | None] = [error]
    while left:
        part = left.pop(0)
        if part is None or id(part) in seen:
            continue
        seen.add(id(part))
        yield part
        if isinstance(part, BaseExceptionGroup):
            left += part.exceptions
        left.append(part.__cause__ or (None if part.__suppress_context__ else part.__context__))
