"""Versions of a store: planned, built, then sealed and never written again.

Planning writes the manifest, and its plan last. Building writes shards, each with its part of the chip table last.
Sealing checks that the ledger equals the manifest and publishes. Each step can be killed and run again. A version
that follows starts at a new shard, so earlier ones stay as they are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import pyarrow as pa

from pipeline import chip_table
from pipeline.canonical import canonical, canonical_hash, differences
from pipeline.leases import Clock, IsGone, Lease, hold, utc_now
from pipeline.objects import Objects, concurrently
from pipeline.plans import read_manifest, write_manifest
from pipeline.store import Store, StoreError

State = Literal["planning", "building", "sealed"]

LEASE_S = 120.0
"""How long a driver may be silent before another takes over."""

_FOLDER = "versions"


class Version:
    """One version of a store, by its number from 1; reads what lies there each time it is asked."""

    def __init__(self, url: str, number: int) -> None:
        store = Objects.at(url)
        self.url = store.url
        self.number = number
        self.objects = store.child(f"{_FOLDER}/{number:04d}")

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.url} version {self.number}"

    @property
    def state(self) -> State:
        """Planning until the plan is written, building until sealed."""
        if self.objects.exists("sealed.json"):
            return "sealed"
        return "building" if self.objects.exists("plan.json") else "planning"

    @property
    def request(self) -> dict[str, Any]:
        """The settings that decide the content."""
        settings = self.objects.get_json("request.json")["settings"]
        assert isinstance(settings, dict)
        return settings

    @property
    def plan(self) -> dict[str, Any] | None:
        """num_chips, first_row, end_row, first_shard, end_shard, num_parts, shard_chips; None while planning."""
        return self._json_if_there("plan.json")

    @property
    def sealed(self) -> dict[str, Any] | None:
        """The ledger's counts and the hash of the chip table; None until sealed."""
        return self._json_if_there("sealed.json")

    def first_shard(self) -> int:
        """Where this version's rows begin: after the last shard of the version before, however short that is."""
        if self.number == 1:
            return 0
        return int(Version(self.url, self.number - 1)._planned()["end_shard"])

    def write_plan(
        self,
        items: pa.Table,
        rejections: pa.Table,
        manifest_parts: Iterable[pa.Table],
        plan: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Write the manifest and what it was made from; the plan last, which ends planning.

        Args:
            items: The items used.
            rejections: Candidates that were not taken, with the reason.
            manifest_parts: The manifest, ascending by `row` over all parts; written as they come.
            plan: Further facts to keep with the plan; a count given here must be right.

        Returns:
            The plan as written.

        Raises:
            StoreError: Planned already, or rows are not ascending, not in their shard or below the first shard.
        """
        if self.state != "planning":
            raise StoreError(f"{self.name} is planned already")
        shard_chips = Store.open(self.url).layout.shard_chips
        counted = write_manifest(self.objects, manifest_parts, first_shard=self.first_shard(), shard_chips=shard_chips)
        self.objects.put_table("items.parquet", items)
        self.objects.put_table("rejections.parquet", rejections)
        written = {**(plan or {}), **counted}
        wrong = list(differences(dict(plan or {}), {key: written[key] for key in plan or {}}))
        if wrong:
            raise StoreError(f"{self.name}: the plan is not its manifest's: {'; '.join(wrong)}")
        self.objects.put_json("plan.json", written)
        return written

    def manifest(self, *, columns: Sequence[str] | None = None) -> pa.Table:
        """One row per candidate chip, ascending by row."""
        return read_manifest(self.objects, self._planned()["num_parts"], columns=columns)

    def items(self) -> pa.Table:
        """The items used."""
        return self.objects.get_table("items.parquet")

    def rejections(self) -> pa.Table:
        """Candidates that never came into the manifest."""
        return self.objects.get_table("rejections.parquet")

    def shards(self) -> range:
        """Numbers of this version's shards."""
        plan = self._planned()
        return range(plan["first_shard"], plan["end_shard"])

    def part(self, shard: int) -> pa.Table | None:
        """The chip table of one shard; None until its task has ended."""
        try:
            return self.objects.get_table(_chips_part(shard))
        except FileNotFoundError:
            return None

    def write_part(self, shard: int, table: pa.Table) -> None:
        """Say that a shard is done, and what became of its candidates; after all its pixels are written.

        Raises:
            StoreError: Sealed, or no chip table, or rows of other shards.
        """
        self._refuse_if_sealed()
        try:
            chip_table.check(table)
        except ValueError as error:
            raise StoreError(f"{self.name} shard {shard}: {error}") from error
        if shard not in self.shards() or not set(table["row"].to_pylist()) <= set(self._rows_of(shard)):
            raise StoreError(f"{self.name} shard {shard}: the part has rows of other shards")
        self.objects.put_table(_chips_part(shard), table)

    def finished_shards(self) -> set[int]:
        """Shards that need no more work: their part is there and no candidate failed."""
        parts = set(self.objects.list("chips"))
        there = [shard for shard in self.shards() if _chips_part(shard) in parts]
        tables = concurrently(lambda shard: self.objects.get_table(_chips_part(shard), columns=["status"]), there)
        failed = [chip_table.FAILED in table["status"].to_pylist() for table in tables]
        return {shard for shard, any_failed in zip(there, failed, strict=True) if not any_failed}

    def chips(self, *, columns: Sequence[str] | None = None) -> pa.Table:
        """This version's chip table, ascending by row; while building, of the shards that are done."""
        if self.state == "sealed":
            return self.objects.get_table("chips.parquet", columns=columns)
        chips = self._parts()
        return chips if columns is None else chips.select([*columns])

    def all_chips(self, *, columns: Sequence[str] | None = None) -> pa.Table:
        """What a reader of this version sees: its own chips and those of all versions before it."""
        versions = [Version(self.url, number + 1) for number in range(self.number)]
        return chip_table.concatenate(version.chips(columns=columns) for version in versions)

    def seal(self) -> dict[str, Any]:
        """Publish: from here on nothing of this version is written again. Sealing twice does nothing.

        Returns:
            The ledger's counts, and the hash of the compacted chip table.

        Raises:
            StoreError: A shard has no part, or the ledger is not the manifest's; names what is missing.
        """
        if (sealed := self.sealed) is not None:
            return sealed
        chips = self._parts()
        self._refuse_unequal(chips)
        data = self.objects.put_table("chips.parquet", chips)
        content = {**chip_table.ledger(chips), "sha256": hashlib.sha256(data).hexdigest()}
        self.objects.put_json("sealed.json", content, create=True)
        return content

    def lease(
        self, owner: str, *, ttl_s: float = LEASE_S, clock: Clock = utc_now, is_gone: IsGone = lambda _: False
    ) -> AbstractContextManager[Lease]:
        """The right to plan, build and seal this version, see `pipeline.leases.hold`.

        Raises:
            StoreError: Sealed, or another owner is at it.
        """
        self._refuse_if_sealed()
        leases = self.objects.child("leases")
        return hold(leases, what=self.name, owner=owner, ttl_s=ttl_s, clock=clock, is_gone=is_gone)

    def __repr__(self) -> str:
        return f"Version({self.url!r}, {self.number})"

    def __reduce__(self) -> tuple[Callable[[str, int], Version], tuple[str, int]]:
        return Version, (self.url, self.number)

    def _planned(self) -> dict[str, Any]:
        plan = self.plan
        if plan is None:
            raise StoreError(f"{self.name} is not planned yet")
        return plan

    def _rows_of(self, shard: int) -> range:
        shard_chips = self._planned()["shard_chips"]
        return range(shard * shard_chips, (shard + 1) * shard_chips)

    def _parts(self) -> pa.Table:
        return chip_table.concatenate(concurrently(self.objects.get_table, self.objects.list("chips")))

    def _json_if_there(self, path: str) -> dict[str, Any] | None:
        try:
            return self.objects.get_json(path)
        except FileNotFoundError:
            return None

    def _refuse_if_sealed(self) -> None:
        if self.objects.exists("sealed.json"):
            raise StoreError(f"{self.name} is sealed")

    def _refuse_unequal(self, chips: pa.Table) -> None:
        parts = set(self.objects.list("chips"))
        missing = [shard for shard in self.shards() if _chips_part(shard) not in parts]
        if missing:
            raise StoreError(f"{self.name} cannot be sealed: shards {chip_table.some(missing)} are not done")
        manifest = self.manifest(columns=chip_table.FROM_MANIFEST)
        if mismatch := chip_table.mismatch(manifest, chips):
            raise StoreError(f"{self.name} cannot be sealed: {mismatch}")


def latest(url: str) -> Version | None:
    """The newest version of a store, in whatever state; None if there is none."""
    numbers = [int(name) for name in Objects.at(url).folders(_FOLDER) if name.isdigit()]
    return Version(url, max(numbers)) if numbers else None


def latest_sealed(url: str) -> Version:
    """The newest version that can be relied on.

    Raises:
        StoreError: None is sealed, or there is no store.
    """
    newest = latest(Store.open(url).url)
    while newest is not None and newest.number:
        if newest.state == "sealed":
            return newest
        newest = Version(url, newest.number - 1)
    raise StoreError(f"{url} has no sealed version: its build has not ended")


def begin(url: str, request: Mapping[str, Any], *, number: int | None = None) -> Version:
    """Begin a version, or find the one that was begun with the same request.

    Args:
        url: Of a store that exists.
        request: Settings that decide the content, as JSON values.
        number: Of the version; unset: the newest, or 1. The number after a sealed one begins an append.

    Raises:
        StoreError: The version was begun with another request (names the settings that differ), or the version
            before it is not sealed.
    """
    newest = latest(Store.open(url).url)
    version = Version(url, number or (newest.number if newest else 1))
    if version.number > 1 and Version(url, version.number - 1).state != "sealed":
        raise StoreError(f"{version.name} cannot begin before version {version.number - 1} is sealed")
    settings = json.loads(canonical(request))
    try:
        version.objects.put_json("request.json", {"hash": canonical_hash(request), "settings": settings}, create=True)
    except FileExistsError:
        changed = list(differences(version.request, settings))
        if changed:
            raise StoreError(f"{version.name} was begun with another request: {'; '.join(changed)}") from None
    return version


def _chips_part(shard: int) -> str:
    return f"chips/shard-{shard:06d}.parquet"
