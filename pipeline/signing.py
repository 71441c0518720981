"""Signatures on hrefs: added just before reading, never kept, never shown."""

from __future__ import annotations

import re

import planetary_computer

from pipeline.archives import Signing

_QUERY = re.compile(r"\?[^\s'\"<>)]*")


def sign(href: str, signing: Signing) -> str:
    """The href that can be read now; tokens are cached by the SDK in this process and renewed before they expire."""
    # The SDK would hand an expired signature back unchanged, so it is only ever given unsigned hrefs.
    return str(planetary_computer.sign(href.partition("?")[0])) if signing == "planetary-computer" else href


def redact(text: str) -> str:
    """The text without the query part of any URL in it."""
    return _QUERY.sub("?…", text)
