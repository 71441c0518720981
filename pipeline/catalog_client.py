"""Asking a STAC API: within its limits, patiently, and without taking a broken answer for the end of a search."""

from __future__ import annotations

import json
import logging
import random
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urljoin, urlsplit

from pystac.link import Link
from pystac_client import ConformanceClasses, ItemSearch
from pystac_client.exceptions import APIError
from pystac_client.stac_api_io import StacApiIO
from requests import Response

from pipeline.access import Access, HostUnavailable
from pipeline.limits import is_trouble, retry_after_s
from pipeline.redaction import redact

log = logging.getLogger(__name__)

_PAGE_SIZE = 100
_RESTARTS = 2
_LONGEST_MESSAGE = 300

Bounds = tuple[float, float, float, float]
"""West, south, east, north in degrees; never over the antimeridian."""


class SearchError(Exception):
    """The catalog could not be asked, or its answer could not be understood."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long a server is given."""

    tries: int = 6
    """Of one request that is not answered, or answered with 408, 425, 429 or 5xx."""

    first_pause_s: float = 1.0
    """Before the second try; doubled with every further one, and up to half as long again by chance."""

    timeout_s: tuple[float, float] = (10.0, 60.0)
    """To connect; and to wait for the next bytes of an answer. Servers give up on a search after 30-60 s."""

    longest_retry_after_s: float = 900.0
    """A server that wants to be left alone for longer is left alone: the search ends with what it said."""

    tries_to_open: int = 4
    """Of the landing page, where nothing is lost yet: a mistyped address is told within ten seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Catalog:
    """A STAC API by its landing page; asked for once, then sent to whoever searches."""

    url: str
    search_url: str
    posts: bool
    """Whether it says that it can be searched by POST."""

    conforms_to: tuple[str, ...]

    @classmethod
    def open(cls, url: str, access: Access, patience: Patience | None = None) -> Catalog:
        """Read the landing page.

        Raises:
            SearchError: No answer, or no STAC API that can be searched.
        """
        with _search_errors(f"opening {url}"):
            patience = patience or Patience()
            opening = replace(patience, tries=min(patience.tries, patience.tries_to_open))
            landing = _Requests(access, opening).read_json(url)
        landing = landing if isinstance(landing, dict) else {}
        links = landing.get("links") or []
        found = [link for link in links if link.get("rel") == "search"]
        searches = {str(link.get("method", "GET")).upper(): urljoin(url, str(link["href"])) for link in found}
        if not searches:
            raise SearchError(f"{url} is no STAC API that can be searched: its landing page has no link to a search")
        method = "POST" if "POST" in searches else next(iter(searches))
        conforms_to = tuple(map(str, landing.get("conformsTo") or ()))
        return cls(url=url, search_url=searches[method], posts=method == "POST", conforms_to=conforms_to)

    @property
    def selects_fields(self) -> bool:
        """Whether it says that it can leave out what is not asked for."""
        return any(re.match(ConformanceClasses.FIELDS.pattern, uri) for uri in self.conforms_to)

    def features(
        self,
        collection: str,
        bounds: Bounds,
        period: tuple[datetime, datetime] | None,
        access: Access,
        *,
        fields: list[str] | None = None,
        patience: Patience | None = None,
    ) -> list[dict[str, Any]]:
        """All items of a collection in a box and a period, whatever the pages; at least those, perhaps more.

        Only what every STAC API has is asked for (place, time, collection), and `fields` where the server says that it
        has them, because answers are then a quarter as long and cost the server half as much. Filtering by cloud cover
        or anything else is left to who pairs, who records why an item was not taken.

        Args:
            collection: Its id.
            bounds: In degrees.
            period: Half-open, UTC; None is all times.
            access: Asked before every request, and told of those that failed.
            fields: Of an item that are needed; None is all.
            patience: How long the server is given.

        Raises:
            SearchError: No answer in spite of patience, or one that is not to be understood.
        """
        # The server's end is inclusive; ours is not: a search up to the last microsecond before it.
        interval = (period[0], period[1] - timedelta(microseconds=1)) if period else None
        during = "" if period is None else f", {period[0]:%Y-%m-%d}/{period[1]:%Y-%m-%d}"
        with _search_errors(f"searching {collection} at {self.url} (bbox {','.join(map(str, bounds))}{during})"):
            requests = _Requests(access, patience or Patience())
            search = ItemSearch(
                self.search_url,
                method="POST" if self.posts else "GET",
                stac_io=requests,
                collections=[collection],
                bbox=bounds,
                datetime=interval,
                limit=_PAGE_SIZE,
                fields=fields if fields and self.selects_fields else None,
            )
            for restarts_left in reversed(range(_RESTARTS + 1)):
                # Not the search's own pages, which end at the first empty one.
                pages = requests.get_pages(search.url, search.method, search.get_parameters())
                try:
                    return [feature for page in pages for feature in page["features"]]
                except _PagingError as error:
                    if not restarts_left:
                        raise
                    log.warning("searching %s at %s from its first page again: %s", collection, self.url, error)
        raise AssertionError("unreachable")

    def has_collection(self, collection: str, access: Access, patience: Patience | None = None) -> bool:
        """Whether the collection exists; a search in one that does not is answered with nothing.

        Raises:
            SearchError: No answer.
        """
        url = f"{self.url.rstrip('/')}/collections/{collection}"
        try:
            _Requests(access, patience or Patience()).read_json(url)
        except APIError as error:
            if getattr(error, "status_code", None) == 404:
                return False
            raise SearchError(f"asking for {url}: {_short(error)}") from None
        return True


class _PagingError(Exception):
    """The way from page to page broke; from the first page it may be whole."""


class _Requests(StacApiIO):
    """pystac-client's requests, each in its turn, repeated where that may help, and from page to page with care."""

    def __init__(self, access: Access, patience: Patience) -> None:
        super().__init__(timeout=patience.timeout_s, max_retries=None)
        self._access = access
        self._patience = patience
        self._retry_after: str | None = None
        self.session.hooks["response"].append(self._remember)

    def request(
        self,
        href: str,
        method: str | None = None,
        headers: dict[str, str] | None = None,
        parameters: dict[str, Any] | None = None,
    ) -> str:
        """See the base class; tried again after 408, 425, 429, 5xx and no answer, not before the server wants it."""
        for attempt in range(1, self._patience.tries + 1):
            self._retry_after = None
            try:
                with self._access.turn(href):
                    return self._send(href, method, headers, parameters)
            except APIError as error:
                pause_s = self._pause_s(error, attempt)
                log.warning("%s, try %d: %s; waiting %.1f s", urlsplit(href).netloc, attempt, _short(error), pause_s)
                # Waited here, and not in the turn, which others may have meanwhile.
                time.sleep(pause_s)
        raise AssertionError("unreachable")

    def get_pages(
        self, url: str, method: str | None = None, parameters: dict[str, Any] | None = None
    ) -> Iterator[dict[str, Any]]:
        """All pages of a search; the base class stops at the first empty one and follows any link for ever."""
        page = self._page(url, method=method, parameters=parameters)
        matched = page.get("numberMatched", (page.get("context") or {}).get("matched"))
        read, followed = len(page["features"]), {_identity({"href": url, "body": parameters})}
        yield page
        while (link := _next_link(page, url)) is not None:
            if _identity(link) in followed:
                raise _PagingError("the link to the next page leads back to one that was read")
            followed.add(_identity(link))
            page = self._page(Link.from_dict(link), parameters=parameters)
            read += len(page["features"])
            if not page["features"] and _next_link(page, url) is None and isinstance(matched, int) and read < matched:
                raise _PagingError(f"the pages ended after {read} of {matched} items")
            yield page

    def _page(self, source: Any, **how: Any) -> dict[str, Any]:
        """A page that holds items, or none; some servers answer an error as a page without such a list."""
        try:
            page = self.read_json(source, **how)
        except APIError as error:
            status = getattr(error, "status_code", None)
            if isinstance(source, str) or is_trouble(status):
                raise
            # Tokens of pages expire, and every server has another status for that.
            raise _PagingError(f"the next page was refused: status {status}: {_short(error)}") from None
        except ValueError as error:
            raise _PagingError(f"the answer is no JSON: {_short(error)}") from None
        if not isinstance(page, dict) or not isinstance(page.get("features"), list):
            raise SearchError(f"expected a page of items, got {redact(json.dumps(page))[:_LONGEST_MESSAGE]}")
        return page

    def _send(
        self, href: str, method: str | None, headers: dict[str, str] | None, parameters: dict[str, Any] | None
    ) -> str:
        """One request; the access hears of its failure before the turn ends."""
        try:
            return super().request(href, method, headers, parameters)
        except APIError as error:
            asked_s = retry_after_s(self._retry_after, now=datetime.now(UTC))
            self._access.failed(href, status=getattr(error, "status_code", None), retry_after_s=asked_s)
            raise

    def _pause_s(self, error: APIError, attempt: int) -> float:
        """How long to wait before the next try.

        Raises:
            APIError: There is none.
        """
        status = getattr(error, "status_code", None)
        if not is_trouble(status) or status == 501 or attempt == self._patience.tries:
            raise error
        asked_s = retry_after_s(self._retry_after, now=datetime.now(UTC))
        if asked_s is not None and asked_s > self._patience.longest_retry_after_s:
            raise SearchError(f"the server asks to be left alone for {asked_s:.0f} s; run again after that") from None
        pause_s = self._patience.first_pause_s * 2.0 ** (attempt - 1) * random.uniform(1.0, 1.5)  # noqa: S311
        return max(pause_s, asked_s or 0.0)

    def _remember(self, response: Response, *_: object, **__: object) -> None:
        self._retry_after = response.headers.get("Retry-After")


def _next_link(page: Mapping[str, Any], url: str) -> dict[str, Any] | None:
    """The link to the page after this one, at the address that was asked.

    Raises:
        SearchError: It leads to another host.
    """
    link = next((dict(link) for link in page.get("links") or () if link.get("rel") == "next"), None)
    if link is None:
        return None
    target, asked = urlsplit(urljoin(url, str(link.get("href", "")))), urlsplit(url)
    if target.hostname != asked.hostname:
        raise SearchError(f"the link to the next page leads to another host: {target.hostname}")
    # Behind a proxy, servers write the scheme and the port that they see themselves.
    return {**link, "href": target._replace(scheme=asked.scheme, netloc=asked.netloc).geturl()}


def _identity(link: Mapping[str, Any]) -> str:
    return json.dumps([link.get("href"), link.get("body") or None], sort_keys=True, default=str)


@contextmanager
def _search_errors(what: str) -> Iterator[None]:
    """Say what was being done, and keep what a server answered short and free of signatures."""
    try:
        yield
    except SearchError as error:
        raise SearchError(f"{what}: {error}") from error
    except (APIError, _PagingError, HostUnavailable, OSError, ValueError) as error:
        status = getattr(error, "status_code", None)
        raise SearchError(f"{what}: {f'status {status}: ' if status else ''}{_short(error)}") from None


def _short(error: Exception) -> str:
    text = " ".join(redact(str(error)).split())
    return text if len(text) <= _LONGEST_MESSAGE else f"{text[:_LONGEST_MESSAGE]}…"
