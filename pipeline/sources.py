"""Stores that are fed together: their shards stand one after the other, so that every chip has one row of its own.

Store i's shards follow the last shard of store i - 1, each with as much room as the largest shard of any store has.
So what plans and reads by shard and row works on several stores as on one, where both numbers are the store's own.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from pipeline.canonical import differences
from pipeline.chip_filter import ChipFilter, Chosen, choose
from pipeline.layout import Layout
from pipeline.shard_cache import ShardCache, StoreCache
from pipeline.store import Store, StoreError
from pipeline.versions import Version

_MUST_AGREE = ("side_px", "has_optical", "has_radar", "optical_level", "optical_grid", "radar_product")
"""Of layouts: what decides the arrays that are fed, their units and their sizes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Chips that are fed."""

    url: str
    """Of the store."""

    version: int
    """Number of a version: its chips and those of the versions before it."""


class Sources:
    """Some stores, opened as one; see `pipeline.shard_reader.ChipShards`.

    Raises:
        StoreError: A store is missing, or its chips are not like those of the first.
    """

    def __init__(self, sources: Sequence[Source], *, cache: ShardCache | None = None) -> None:
        self.sources = tuple(sources)
        self.cache = cache
        self._stores = [Store.open(source.url) for source in sources]
        for store in self._stores[1:]:
            _refuse_unlike(self._stores[0], store)
        room = max(store.layout.shard_chips for store in self._stores)
        self.layout: Layout = replace(self._stores[0].layout, shard_chips=room)
        # Where each store's shards begin; of one alone nothing needs to be read for it.
        ends = (Version(source.url, source.version).shards().stop for source in self.sources[:-1])
        self._first_shards = [0, *accumulate(ends)]
        if cache is not None:
            self._keep_in(cache)

    def holder(self, shard: int) -> tuple[Store, int]:
        """The store that has a shard, and the shard's number there."""
        number = self._number(shard)
        return self._stores[number], shard - self._first_shards[number]

    def rows_of(self, number: int, own: NDArray[np.int64]) -> NDArray[np.int64]:
        """Rows of one store as they are counted over all."""
        chips, room = self._stores[number].layout.shard_chips, self.layout.shard_chips
        rows: NDArray[np.int64] = (self._first_shards[number] + own // chips) * room + own % chips
        return rows

    def origin(self, row: int) -> tuple[Source, int]:
        """The store that has a row, and the row's number there; undoes `rows_of`."""
        shard, place = divmod(row, self.layout.shard_chips)
        store, own = self.holder(shard)
        return self.sources[self._number(shard)], own * store.layout.shard_chips + place

    def _keep_in(self, cache: ShardCache) -> None:
        """Let shards be read through a cache, which is told what is fed."""
        found = [Version(source.url, source.version).versions() for source in self.sources]
        seals = [tuple(_seal(version) for version in versions) for versions in found]
        cache = replace(cache, contents=tuple(seal for each in seals for seal in each))
        for store, versions, each in zip(self._stores, found, seals, strict=True):
            first_shards = tuple(version.first_shard() for version in versions)
            store.cache = StoreCache(cache=cache, first_shards=first_shards, seals=each)

    def _number(self, shard: int) -> int:
        return bisect_right(self._first_shards, shard) - 1


def choose_all(sources: Iterable[Source], only: ChipFilter, *, split: str | None) -> list[Chosen]:
    """The chips of each source that are fed, with its own rows; see `choose`.

    Raises:
        StoreError: A source has none.
    """
    return [choose(Version(each.url, each.version), only, split=split).or_refuse() for each in sources]


def _seal(version: Version) -> str:
    """Hash of the chip table, and so of all pixels, of a sealed version."""
    sealed = version.sealed
    assert sealed is not None, version
    return str(sealed["sha256"])[:20]


def _refuse_unlike(first: Store, other: Store) -> None:
    had, has = ({name: getattr(store.layout, name) for name in _MUST_AGREE} for store in (first, other))
    if changed := list(differences(had, has)):
        raise StoreError(f"{other.url} cannot be mixed with {first.url}: {'; '.join(changed)}")
