"""A large search: cut into pieces, asked for in parallel within the archive's limits, kept, and put together again."""

from __future__ import annotations

import logging
import threading
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from queue import SimpleQueue
from typing import Any

import ray
from ray.data import DataContext
from shapely.geometry.base import BaseGeometry

from pipeline.access import Access, HostUnavailable, host_of
from pipeline.archives import Archive
from pipeline.broker import AccessSpec, access_for
from pipeline.catalog import Catalog, Patience, SearchError, collection_of, require_collection, search_piece
from pipeline.catalog_results import Judged, Noted, Refused, judge, settle
from pipeline.objects import Objects, concurrently
from pipeline.search_cache import Answer, Freshness, keep, recall, utc_now
from pipeline.search_pieces import SIDE_DEG, Piece, pieces_of
from pipeline.types import Item, Sensor, Watch, unwatched

log = logging.getLogger(__name__)

FEW_PIECES = 32
"""Up to so many are asked for from this process, without Ray."""

_MOST_THREADS = 8
_ENOUGH_FAILURES = 3
_CPUS_PER_TASK = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """What a catalog has for a region and period."""

    items: list[Item]
    """Sorted by time and id; each granule once, in its newest processing."""

    refused: list[Refused]
    """Items that are not used, and why."""

    noted: list[Noted]
    """What was wrong with items that are used."""

    pieces: int
    from_cache: int
    """Of the pieces, those that were not asked for again."""


@dataclass(frozen=True, kw_only=True)
class _Search:
    """What every piece's search needs; travels to tasks."""

    archive: Archive
    sensor: Sensor
    access_spec: AccessSpec
    patience: Patience
    catalog: Catalog = field(repr=False)

    def ask(self, piece: Piece, cache: Objects | None, access: Access) -> Answer:
        """Ask for one piece, and keep the answer."""
        searched_at = utc_now()
        features = search_piece(self.catalog, self.archive, self.sensor, piece, access, self.patience)
        answer = Answer(searched_at=searched_at, features=features)
        if cache is not None:
            keep(cache, _key(self.archive, self.sensor, piece), piece, answer, self.archive, self.sensor)
        log.debug("%s %s: %d items", self.archive.name, piece.name, len(features))
        return answer


def access_spec_of(archive: Archive, *, shared: bool = True) -> AccessSpec:
    """How an archive may be reached, by what its descriptor says."""
    host = host_of(archive.stac_url)
    return AccessSpec(
        signing=archive.signing,
        storage=archive.storage_limits,
        api=archive.api_limits,
        api_hosts=(host,) if host else (),
        shared=shared,
    )


def search_region(
    archive: Archive,
    sensor: Sensor,
    region: BaseGeometry,
    period: tuple[datetime, datetime],
    *,
    access_spec: AccessSpec | None = None,
    cache: Objects | None = None,
    side_deg: int = SIDE_DEG,
    freshness: Freshness | None = None,
    patience: Patience | None = None,
    watch: Watch = unwatched,
) -> SearchResult:
    """Every item of one sensor that meets a region in a period.

    Pieces that the cache has are not asked for; the others are, side by side and within the archive's limits: a few
    from threads of this process, many as a Ray Data job if there is a cache for them to be kept in. A run that was
    killed, or whose archive went away, loses only what it was just asking for.

    Args:
        archive: Whom to ask.
        sensor: optical or radar.
        region: Longitude/latitude.
        period: Half-open, UTC.
        access_spec: How the archive may be reached; by default as its descriptor says.
        cache: Where answers are kept, for this search and for others that need the same pieces.
        side_deg: Side of the areas, whole degrees.
        freshness: How long an answer counts.
        patience: How long the server is given for one request.
        watch: Shows how far the search is.

    Raises:
        SearchError: No such collection, or the catalog does not answer; the message names the piece.
    """
    collection = collection_of(archive, sensor)
    pieces = pieces_of(region, period, side_deg=side_deg)

    def judged(answer: Answer) -> tuple[datetime, Judged]:
        # At once, because items take a third of the memory of what they are made from.
        return answer.searched_at, judge(answer.features, archive, sensor, region, period)

    def recalled(piece: Piece) -> tuple[datetime, Judged] | None:
        assert cache is not None
        answer = recall(cache, _key(archive, sensor, piece), piece, freshness or Freshness(), now)
        return None if answer is None else judged(answer)

    now = utc_now()
    kept = concurrently(recalled, pieces) if cache is not None else []
    answers = {piece: answer for piece, answer in zip(pieces, kept, strict=False) if answer is not None}
    from_cache = len(answers)
    missing = [piece for piece in pieces if piece not in answers]
    if missing:
        spec = access_spec or access_spec_of(archive)
        access, patience = access_for(spec), patience or Patience()
        catalog = Catalog.open(archive.stac_url, access, patience)
        search = _Search(archive=archive, sensor=sensor, access_spec=spec, patience=patience, catalog=catalog)
        log.info("%s: %d pieces of %s to ask for, %d in the cache", archive.name, len(missing), collection, from_cache)
        for piece, answer in watch(_asked(search, missing, cache), total=len(missing), what="pieces"):
            answers[piece] = judged(answer)
        if not any(part for _, part in answers.values()):
            require_collection(catalog, collection, access, patience)
    # Of an item that changed between two pieces, the later answer counts.
    together: Judged = {}
    for _, (_, part) in sorted(answers.items(), key=lambda entry: (entry[1][0], entry[0])):
        together |= part
    found = settle(together)
    return SearchResult(
        items=found.items, refused=found.refused, noted=found.noted, pieces=len(pieces), from_cache=from_cache
    )


def _key(archive: Archive, sensor: Sensor, piece: Piece) -> str:
    return piece.key(archive.stac_url, collection_of(archive, sensor))


def _asked(search: _Search, pieces: list[Piece], cache: Objects | None) -> Iterator[tuple[Piece, Answer]]:
    """Answers as they come.

    Raises:
        SearchError: One of them failed; what came before is kept.
    """
    if cache is not None and len(pieces) > FEW_PIECES:
        return _asked_by_tasks(search, pieces, cache)
    return _asked_by_threads(search, pieces, cache)


def _asked_by_threads(search: _Search, pieces: list[Piece], cache: Objects | None) -> Iterator[tuple[Piece, Answer]]:
    access = _Stoppable(access_for(search.access_spec))
    todo, answered = iter(pieces), SimpleQueue[tuple[Piece, Answer | Exception]]()
    taking = threading.Lock()

    def work() -> None:
        while (piece := _next(todo, taking)) is not None and not access.stopped.is_set():
            try:
                answered.put((piece, search.ask(piece, cache, access)))
            except Exception as error:  # noqa: BLE001  # it is raised where the answers are taken
                answered.put((piece, error))
                # Here too: where the answers are taken, this may be later than the next piece is asked for.
                access.stopped.set()

    # Daemons: who waits for a turn at a host that is away must not hold up the end of a search that has failed.
    for _ in range(min(search.access_spec.api.turns, len(pieces), _MOST_THREADS)):
        threading.Thread(target=work, daemon=True).start()
    try:
        for done in range(len(pieces)):
            piece, answer = answered.get()
            if isinstance(answer, SearchError):
                raise _stopped(answer, done, len(pieces), cache) from answer
            if isinstance(answer, Exception):
                raise answer
            yield piece, answer
    finally:
        access.stopped.set()


def _next(todo: Iterator[Piece], taking: threading.Lock) -> Piece | None:
    with taking:
        return next(todo, None)


class _Stoppable:
    """Access that gives no turns any more once it was stopped."""

    def __init__(self, access: Access) -> None:
        self._access = access
        self.stopped = threading.Event()

    def sign(self, href: str) -> str:
        return self._access.sign(href)

    @contextmanager
    def turn(self, url: str, *, requests: int = 1) -> Iterator[None]:
        with self._access.turn(url, requests=requests):
            if self.stopped.is_set():
                raise HostUnavailable("the search has ended")
            yield

    def failed(self, url: str, *, status: int | None = None, retry_after_s: float | None = None) -> None:
        self._access.failed(url, status=status, retry_after_s=retry_after_s)


def _asked_by_tasks(search: _Search, pieces: list[Piece], cache: Objects) -> Iterator[tuple[Piece, Answer]]:
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False

    def work(row: dict[str, Any]) -> dict[str, Any]:
        try:
            search.ask(pieces[row["piece"]], cache, access_for(search.access_spec))
        except SearchError as error:
            return {"piece": row["piece"], "error": str(error)}
        return {"piece": row["piece"], "error": ""}

    rows = ray.data.from_items([{"piece": index} for index in range(len(pieces))], override_num_blocks=len(pieces))
    tasks = rows.map(work, num_cpus=_CPUS_PER_TASK, concurrency=min(search.access_spec.api.turns, len(pieces)))
    errors: list[str] = []
    done = 0
    # Closed as soon as it is known to be in vain, or the job would go on beside whoever hears of the error.
    with closing(_rows(tasks)) as results:
        for row in results:
            if row["error"]:
                errors.append(row["error"])
                log.error("%s", row["error"])
                if len(errors) == _ENOUGH_FAILURES:
                    break
                continue
            done += 1
            piece = pieces[row["piece"]]
            # Items stay out of Ray's object store: the task kept them, and they are read here, where they are needed.
            answer = recall(cache, _key(search.archive, search.sensor, piece), piece, Freshness(), utc_now())
            if answer is None:
                raise SearchError(f"{cache.url} lost what was just kept of {piece.name}")
            yield piece, answer
    if errors:
        raise _stopped(SearchError(errors[0]), done, len(pieces), cache)


def _rows(tasks: Any) -> Generator[dict[str, Any], None, None]:
    yield from tasks.iter_rows()


def _stopped(error: SearchError, done: int, total: int, cache: Objects | None) -> SearchError:
    if total == 1:
        return error
    kept = f"are kept in {cache.url}: run again to ask for the rest" if cache else "are lost, because there is no cache"
    return SearchError(f"{error}; {done} of {total} pieces were answered and {kept}")
