"""Versions of a store: planned, built, then sealed and never written again.

Planning writes the manifest, and its plan last. Building writes shards, each with its part of the chip table last.
Sealing checks that the ledger equals the manifest and publishes. Each step can be killed and run again. A version
that follows starts at a new shard, so earlier ones stay as they are.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import islice
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline import chip_table, plans, tables
from pipeline.canonical import canonical, canonical_hash, differences
from pipeline.leases import Clock, IsGone, Lease, hold, utc_now
from pipeline.manifest import REJECTIONS_SCHEMA
from pipeline.objects import Objects, concurrently
from pipeline.planning import Planner
from pipeline.plans import Plan
from pipeline.statistics import BandStatistics
from pipeline.store import Store, StoreError, persistently
from pipeline.types import Watch, unwatched

State = Literal["planning", "building", "sealed"]


LEASE_S = 120.0
"""How long a driver may be silent before another takes over."""

_FOLDER = "versions"
_CHIPS = "chips"
_CHIP_TABLE = "chip_table"
_STATISTICS = "statistics.json"
_STATISTICS_KEY = "statistics"
_PART = re.compile(rf"{_CHIPS}/shard-(\d+)(\.failed)?\.parquet")

_SHARDS_AT_ONCE = 64
"""So many parts of the chip table are in memory at a time while building."""


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
        """What `write_plan` returned; None while planning."""
        return self._json_if_there("plan.json")

    @property
    def sealed(self) -> dict[str, Any] | None:
        """The ledger's counts, and the hash and the parts of the chip table; None until sealed."""
        return self._json_if_there("sealed.json")

    def first_shard(self) -> int:
        """Where this version's rows begin: after the last shard of the version before, however short that is."""
        if self.number == 1:
            return 0
        return int(Version(self.url, self.number - 1)._planned()["end_shard"])

    def write_plan(
        self,
        items: pa.Table,
        rejections: pa.Table | Iterable[pa.Table],
        manifest_parts: Iterable[pa.Table],
        plan: Mapping[str, Any] | None = None,
        *,
        looks: pa.Table | None = None,
        confirm: Callable[[], None] | None = None,
    ) -> dict[str, Any]:
        """Write the manifest and what it was made from, make room in the store; the plan last, which ends planning.

        Args:
            items: The items used, ascending by id.
            rejections: Candidates that were not taken, with the reason; asked for after all manifest parts.
            manifest_parts: The manifest, ascending by `row` over all parts; written as they come.
            plan: Further facts to keep with the plan; a count given here must be right.
            looks: What the rows' `look` counts in; then `plan` has `block_cells`. Without it, rows have all names.
            confirm: Called before each part and before the plan; raises where another driver plans by now.

        Returns:
            The plan as written, see `pipeline.plans.write_manifest`; num_rejections beside.

        Raises:
            StoreError: Planned already, also by another driver meanwhile, or rows are not ascending, not in their shard
                or below the first shard.
        """
        if self.state != "planning":
            raise StoreError(f"{self.name} is planned already")
        assert (looks is not None) == ("block_cells" in (plan or {})), "looks and block_cells go together"
        store = Store.open(self.url)
        counted = plans.write_manifest(
            self.objects,
            _confirmed(manifest_parts, confirm),
            first_shard=self.first_shard(),
            shard_chips=store.layout.shard_chips,
        )
        if looks is not None:
            plans.write_looks(self.objects, looks)
        plans.write_items(self.objects, items)
        tables_of_rejections = [rejections] if isinstance(rejections, pa.Table) else rejections
        counted["num_rejections"] = plans.write_rejections(self.objects, tables_of_rejections)
        written = {**(plan or {}), **counted}
        wrong = list(differences(dict(plan or {}), {key: written[key] for key in plan or {}}))
        if wrong:
            raise StoreError(f"{self.name}: the plan is not its manifest's: {'; '.join(wrong)}")
        store.resize(written["end_row"])
        if confirm is not None:
            confirm()
        try:
            self.objects.put_json("plan.json", written, create=True)
        except FileExistsError:
            # A write whose answer got lost finds its own.
            if canonical(self.plan) != canonical(written):
                raise StoreError(f"{self.name} was planned by another driver meanwhile: run again") from None
        return written

    def write_planned(
        self,
        planner: Planner,
        items: pa.Table,
        rejections: Iterable[pa.Table] = (),
        facts: Mapping[str, Any] | None = None,
        *,
        watch: Watch = unwatched,
        confirm: Callable[[], None] | None = None,
    ) -> dict[str, Any]:
        """Write what a planner has planned, see `write_plan`; what it left out joins the rejections.

        Raises:
            StoreError: As `write_plan`, or the planner left every candidate out.
        """

        def every_rejection() -> Iterator[pa.Table]:
            yield from rejections
            yield from planner.left_out()

        if planner.num_rows and next(planner.parts(), None) is None:
            raise StoreError(f"{self.name}: earlier versions have all {planner.num_rows} candidates; nothing is new")
        parts = watch(planner.parts(), total=planner.num_rows, what="candidates", amount=_num_rows)
        facts = {**(facts or {}), **planner.facts}
        return self.write_plan(items, every_rejection(), parts, facts, looks=planner.looks(), confirm=confirm)

    def manifest(self, *, columns: Sequence[str] | None = None) -> pa.Table:
        """One row per candidate chip, ascending by row, with all names; for versions that fit into memory."""
        return self._plan().manifest(columns)

    def manifest_batches(self, *, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """The manifest, some thousand rows at a time."""
        return self._plan().batches(columns)

    def manifest_of(self, shard: int, *, columns: Sequence[str] | None = None) -> pa.Table:
        """The manifest of one shard; reads little more than that."""
        rows = self._rows_of(shard)
        return self._plan().of_rows(rows.start, rows.stop, columns)

    def looks(self) -> pa.Table | None:
        """Every distinct set of items that a candidate was seen by; None where rows name their items themselves."""
        return self._plan().looks()

    def items(self) -> pa.Table:
        """The items used."""
        return self._plan().items()

    def items_of(self, manifest: pa.Table) -> pa.Table:
        """The items that some rows of the manifest name; reads little more than those."""
        return self._plan().items_of(manifest)

    def rejections(self) -> pa.Table:
        """Candidates that never came into the manifest; for versions that fit into memory."""
        return pa.concat_tables([*self.rejection_batches()] or [REJECTIONS_SCHEMA.empty_table()])

    def rejection_batches(self) -> Iterator[pa.Table]:
        """Candidates that never came into the manifest, some thousand at a time."""
        return self._plan().rejections()

    def shards(self) -> range:
        """Numbers of this version's shards."""
        plan = self._planned()
        return range(plan["first_shard"], plan["end_shard"])

    def part(self, shard: int) -> pa.Table | None:
        """The chip table of one shard; None until its task has ended."""
        for failed in (False, True):
            try:
                return self.objects.get_table(_chips_part(shard, failed=failed))
            except FileNotFoundError:
                continue
        return None

    def withdraw_part(self, shard: int) -> None:
        """Say that a shard with failures is about to be written again; before any of its pixels are.

        Raises:
            StoreError: Sealed.
        """
        self._refuse_if_sealed()
        self.objects.delete(_chips_part(shard, failed=True))

    def write_part(self, shard: int, table: pa.Table, *, statistics: BandStatistics | None = None) -> None:
        """Say that a shard is done, and what became of its candidates; after all its pixels are written.

        A part with failures has another name, so that a list of names tells what is left to do.

        Args:
            shard: Number of the shard.
            table: Its part of the chip table.
            statistics: Of its chips; they are added up when the version is sealed.

        Raises:
            StoreError: Sealed, or no chip table, or rows of other shards.
        """
        self._refuse_if_sealed()
        try:
            chip_table.check(table)
        except ValueError as error:
            raise StoreError(f"{self.name} shard {shard}: {error}") from error
        rows, own = table["row"].to_numpy(), self._rows_of(shard)
        if shard not in self.shards() or np.any((rows < own.start) | (rows >= own.stop)):
            raise StoreError(f"{self.name} shard {shard}: the part has rows of other shards")
        failed = bool(pc.any(pc.equal(table["status"], chip_table.FAILED)).as_py())
        metadata = {} if statistics is None else {_STATISTICS_KEY: _packed(statistics)}
        data = tables.encode([table], metadata=metadata)
        persistently(lambda: self.objects.put(_chips_part(shard, failed=failed), data))
        if not failed:
            self.objects.delete(_chips_part(shard, failed=True))

    def finished_shards(self) -> set[int]:
        """Shards that need no more work: their part is there and no candidate failed."""
        return {shard for shard, failed in self._parts_there().items() if not failed}

    def failed_shards(self) -> set[int]:
        """Shards whose part is there and says that candidates failed."""
        return {shard for shard, failed in self._parts_there().items() if failed}

    def failures(self) -> Iterator[pa.Table]:
        """The chip table's rows of candidates that failed, a table for each of some shards; reads no other shard."""
        if self.state == "sealed":
            for batch in self.chip_batches():
                failed = batch.filter(pc.equal(batch["status"], chip_table.FAILED))
                if failed.num_rows:
                    yield failed
            return
        for shard in sorted(self.failed_shards()):
            part = self.part(shard)
            assert part is not None, shard
            yield part.filter(pc.equal(part["status"], chip_table.FAILED))

    def counts(self) -> dict[str, Any]:
        """The ledger of what has been done so far, see `pipeline.chip_table.ledger`; when sealed, of everything."""
        if (sealed := self.sealed) is not None:
            return {name: sealed[name] for name in ("requested", *chip_table.STATUSES, "reasons")}
        batches = self.chip_batches(columns=["row", "status", "reason"])
        return chip_table.add_ledgers(chip_table.ledger(batch) for batch in batches)

    def chips(self, *, columns: Sequence[str] | None = None) -> pa.Table:
        """This version's chip table, ascending by row; while building, of the shards that are done."""
        table = chip_table.concatenate(self.chip_batches(columns=columns))
        return table if columns is None else table.select([*columns])

    def chip_batches(self, *, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """This version's chip table, ascending by row, some thousand rows at a time.

        Labels that a shard lacks may be missing from a batch.
        """
        if (sealed := self.sealed) is not None:
            for number in range(len(sealed["part_rows"])):
                yield from tables.batches(self.objects, tables.part_path(_CHIP_TABLE, number), columns)
            return
        there = iter(sorted(self._parts_there()))
        while shards := list(islice(there, _SHARDS_AT_ONCE)):
            parts = chip_table.concatenate(part for part in concurrently(self.part, shards) if part is not None)
            yield parts if columns is None else parts.select([n for n in columns if n in parts.column_names])

    def chip_table_parts(self) -> Iterator[bytes]:
        """The files of the sealed chip table, in order; their bytes together have the hash in `sealed`."""
        sealed = self.sealed or {"part_rows": []}
        return (self.objects.get(tables.part_path(_CHIP_TABLE, n)) for n in range(len(sealed["part_rows"])))

    def chips_of(self, shard: int, *, columns: Sequence[str] | None = None) -> pa.Table:
        """This version's chip table of one shard; reads little more than that. Without rows if it is not done.

        Raises:
            ValueError: The shard is of another version.
        """
        rows = self._rows_of(shard)
        sealed = self.sealed
        if sealed is None:
            part = self.part(shard)
            part = chip_table.SCHEMA.empty_table() if part is None else part
            return part if columns is None else part.select([*columns])
        number = int(np.searchsorted(sealed["part_rows"], rows.start, side="right")) - 1
        if number < 0:
            raise ValueError(f"{self.name} has no shard {shard}")
        path = tables.part_path(_CHIP_TABLE, number)
        found = tables.matching(self.objects, path, "row", np.array(rows), columns=columns)
        return found if columns is None else found.select([*columns])

    def all_chips(self, *, columns: Sequence[str] | None = None) -> pa.Table:
        """What a reader of this version sees: its own chips and those of all versions before it, each once."""
        table = chip_table.concatenate(self.all_chip_batches(columns=columns))
        return table if columns is None else table.select([*columns])

    def all_chip_batches(self, *, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """As `all_chips`, some thousand rows at a time, ascending by row.

        Failures that a later version tried again are that version's.
        """
        versions = self.versions()
        retried = max((v.number for v in versions if v.number > 1 and v._planned().get("retries")), default=0)
        for version in versions:
            if version.number >= retried:
                yield from version.chip_batches(columns=columns)
                continue
            wanted = None if columns is None else list(dict.fromkeys([*columns, "status"]))
            for batch in version.chip_batches(columns=wanted):
                kept = batch.filter(pc.not_equal(batch["status"], chip_table.FAILED))
                yield kept if columns is None else kept.select([n for n in columns if n in kept.column_names])

    def written_rows(self, *, split: str | None = None) -> NDArray[np.int64]:
        """Rows of the store that hold a chip for a reader of this version, ascending; 8 bytes each."""
        columns = ["row", "status", *([] if split is None else ["split"])]
        found = [chip_table.written_rows(batch, split=split) for batch in self.all_chip_batches(columns=columns)]
        return np.concatenate([np.empty(0, np.int64), *found])

    def versions(self) -> list[Version]:
        """The versions whose chips a reader of this one sees, ascending."""
        return [Version(self.url, number + 1) for number in range(self.number)]

    def statistics(self) -> BandStatistics | None:
        """Of the chips of this version; None where its tasks took none, or it is not sealed."""
        try:
            return BandStatistics.from_json(self.objects.get(_STATISTICS).decode())
        except FileNotFoundError:
            return None

    def all_statistics(self) -> BandStatistics | None:
        """Of the chips that a reader of this version sees; None where any of the versions has none."""
        total = BandStatistics()
        for version in self.versions():
            own = version.statistics()
            if own is None:
                return None
            total.merge(own)
        return total

    def seal(self, *, watch: Watch = unwatched) -> dict[str, Any]:
        """Publish: from here on nothing of this version is written again. Sealing twice does nothing.

        The chip table is compacted part by part; one part is in memory at a time.

        Args:
            watch: Shows how many shards' parts are compacted.

        Returns:
            The ledger's counts, and the hash of the compacted chip table.

        Raises:
            StoreError: A shard has no part, or the ledger is not the manifest's; names what is missing.
        """
        if (sealed := self.sealed) is not None:
            return sealed
        parts = self._parts_there()
        missing = [shard for shard in self.shards() if shard not in parts]
        if missing:
            raise StoreError(f"{self.name} cannot be sealed: shards {chip_table.some(missing)} are not done")
        statistics = BandStatistics()
        digest, part_rows = hashlib.sha256(), list[int]()
        ledgers: list[dict[str, Any]] = []
        checked = self._checked_groups(parts, statistics, ledgers)
        watched = watch(checked, total=len(self.shards()), what="shards", amount=lambda group: len(group[1]))
        written = tables.write_parts(
            self.objects,
            _CHIP_TABLE,
            ((number, chips) for number, _, chips in watched if chips.num_rows),
            groups_per_part=plans.groups_per_part(self._planned()["shard_chips"]),
        )
        for first, data in written:
            digest.update(data)
            part_rows.append(int(first["row"][0].as_py()))
        tables.delete_parts_from(self.objects, _CHIP_TABLE, len(part_rows))
        if statistics.chips:
            self.objects.put(_STATISTICS, statistics.to_json().encode())
        content = {**chip_table.add_ledgers(ledgers), "sha256": digest.hexdigest(), "part_rows": part_rows}
        self.objects.put_json("sealed.json", content, create=True)
        return content

    def summary(self) -> dict[str, Any]:
        """What this version is and how far it has come; reads no table."""
        plan, sealed = self.plan, self.sealed
        content: dict[str, Any] = {
            "url": self.url,
            "version": self.number,
            "state": self.state,
            "request": self.request,
        }
        if plan is not None:
            names = ("num_chips", "num_rejections", "first_shard", "end_shard", "shard_chips")
            content |= {name: plan[name] for name in names}
        if sealed is not None:
            content["ledger"] = self.counts()
        elif plan is not None:
            parts = self._parts_there()
            content |= {"done_shards": len(parts), "shards_with_failures": sum(parts.values())}
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

    def _plan(self) -> Plan:
        return Plan(self.objects, self._planned())

    def _parts_there(self) -> dict[int, bool]:
        """Shard -> whether its part has failures; from the list of names alone."""
        found = sorted((_PART.fullmatch(path) for path in self.objects.list(_CHIPS)), key=lambda m: bool(m and m[2]))
        shards = self.shards()
        # With both, which a killed redoing of failures may leave, the part without failures is the later one.
        named = {int(match[1]): bool(match[2]) for match in reversed(found) if match}
        return {shard: failed for shard, failed in named.items() if shard in shards}

    def _checked_groups(
        self, parts: Mapping[int, bool], statistics: BandStatistics, ledgers: list[dict[str, Any]]
    ) -> Iterator[tuple[int, range, pa.Table]]:
        """Row groups of the chip table and their shards, compared with the manifest; counted up on the way."""
        plan, planned = self._plan(), self._planned()
        step = plans.rows_per_group(planned["shard_chips"]) // planned["shard_chips"]
        for number, first in enumerate(range(planned["first_shard"], planned["end_shard"], step)):
            shards = range(first, min(first + step, planned["end_shard"]))
            paths = [_chips_part(shard, failed=parts[shard]) for shard in shards]
            found = concurrently(lambda path: tables.read_with_metadata(self.objects, path), paths)
            chips = chip_table.concatenate(table for table, _ in found)
            rows = self._rows_of(shards[0]).start, self._rows_of(shards[-1]).stop
            if mismatch := chip_table.mismatch(plan.of_rows(*rows, chip_table.FROM_MANIFEST), chips):
                raise StoreError(f"{self.name} cannot be sealed: {mismatch}")
            ledgers.append(chip_table.ledger(chips))
            for _, metadata in found:
                if packed := metadata.get(_STATISTICS_KEY):
                    statistics.merge(_unpacked(packed))
            yield number, shards, chips

    def _json_if_there(self, path: str) -> dict[str, Any] | None:
        try:
            return self.objects.get_json(path)
        except FileNotFoundError:
            return None

    def _refuse_if_sealed(self) -> None:
        if self.objects.exists("sealed.json"):
            raise StoreError(f"{self.name} is sealed")


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


def _confirmed(parts: Iterable[pa.Table], confirm: Callable[[], None] | None) -> Iterator[pa.Table]:
    """The parts; each is handed over only when the right to write it is confirmed."""
    for part in parts:
        if confirm is not None:
            confirm()
        yield part


def _num_rows(table: pa.Table) -> int:
    return int(table.num_rows)


def _chips_part(shard: int, *, failed: bool) -> str:
    return f"{_CHIPS}/shard-{shard:06d}{'.failed' if failed else ''}.parquet"


def _packed(statistics: BandStatistics) -> str:
    """As text for the footer of a part: a third as long."""
    return base64.b64encode(zlib.compress(statistics.to_json().encode())).decode()


def _unpacked(text: str) -> BandStatistics:
    return BandStatistics.from_json(zlib.decompress(base64.b64decode(text)).decode())
