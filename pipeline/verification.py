"""Whether a version is what it says: ledger = manifest, objects = ledger, pixels = hashes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from pipeline import chip_table
from pipeline.canonical import differences
from pipeline.chip_table import FROM_MANIFEST, some
from pipeline.shard_reader import ShardReader
from pipeline.store import Store, StoreError, chip_hash
from pipeline.versions import Version, latest

_SHOWN: Final = 20
"""So many problems are named, the others counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardReport:
    """What was found in one shard."""

    shard: int
    chips: int
    """Chips that the ledger says were written."""

    problems: tuple[str, ...]
    """One line each; none if all is well."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What was found in a version."""

    shards: int
    chips: int
    """Chips that the ledger says were written."""

    num_problems: int
    problems: tuple[str, ...]
    """The first of them, one line each."""

    pixels: bool
    """Whether every chip was read and compared with its hash."""

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return self.num_problems == 0


CheckShards = Callable[[Version, bool], Iterable[ShardReport]]
"""Checks every shard of a version, with its pixels or without, in any order."""


def check_shards(version: Version, pixels: bool) -> Iterator[ShardReport]:
    """Every shard in this process, one after another."""
    return (verify_shard(version, shard, pixels=pixels) for shard in version.shards())


def verify(version: Version, *, pixels: bool, check: CheckShards = check_shards) -> Report:
    """Compare a version with itself, shard by shard.

    Args:
        version: Planned; where it is not sealed, shards that are not done are problems.
        pixels: Read every chip and compare it with its hash; otherwise only the indices of shard objects are read.
        check: How shards are checked; `pipeline.ingest.check_shards_on_cluster` does it on Ray.

    Raises:
        StoreError: There is no such version, or it is not planned.
    """
    problems: list[str] = []
    reports = num_problems = chips = 0

    def note(found: Iterable[str]) -> None:
        nonlocal num_problems
        for problem in found:
            num_problems += 1
            if len(problems) < _SHOWN:
                problems.append(problem)

    note(_of_the_whole(version))
    for report in check(version, pixels):
        note(report.problems)
        reports, chips = reports + 1, chips + report.chips
    if reports != len(version.shards()):
        note([f"{reports} of {len(version.shards())} shards were checked"])
    return Report(shards=reports, chips=chips, num_problems=num_problems, problems=tuple(problems), pixels=pixels)


def verify_shard(version: Version, shard: int, *, pixels: bool) -> ShardReport:
    """Compare the objects of one shard with the ledger, and the ledger with the manifest."""
    store = Store.open(version.url)
    try:
        chips = version.chips_of(shard)
    except OSError as error:
        return ShardReport(shard=shard, chips=0, problems=(f"shard {shard}: its chip table cannot be read: {error}",))
    rows = chip_table.written_rows(chips).tolist()
    problems = [*_of_ledger(version, shard, chips), *_of_objects(store, shard, rows)]
    if pixels and not problems:
        hashes = dict(zip(chips["row"].to_pylist(), chips["sha256"].to_pylist(), strict=True))
        problems += _of_pixels(store, shard, {row: hashes[row] for row in rows})
    named = tuple(f"shard {shard}: {problem}" for problem in problems)
    return ShardReport(shard=shard, chips=len(rows), problems=named)


def _of_ledger(version: Version, shard: int, chips: Any) -> Iterator[str]:
    manifest = version.manifest_of(shard, columns=FROM_MANIFEST)
    if manifest.num_rows and not chips.num_rows:
        yield "is not done"
        return
    if mismatch := chip_table.mismatch(manifest, chips):
        yield mismatch
    try:
        chip_table.check(chips)
    except ValueError as error:
        yield str(error)


def _of_objects(store: Store, shard: int, rows: list[int]) -> Iterator[str]:
    for name in store.layout.arrays():
        key = store.shard_key(name, shard)
        try:
            there = store.rows_there(name, shard)
        except ValueError as error:
            yield f"{key}: {error}"
            continue
        if missing := sorted(set(rows) - there):
            yield f"{key} lacks the chips of rows {some(missing)}"
        if strays := sorted(there - set(rows)):
            yield f"{key} has chips in rows {some(strays)}, which the ledger does not"


def _of_pixels(store: Store, shard: int, hashes: dict[int, str]) -> Iterator[str]:
    if not hashes:
        return
    reader = ShardReader(store, shard, store.layout.arrays(), sorted(hashes))
    scratch = reader.scratch()
    for row, expected in hashes.items():
        try:
            reader.read(row, scratch)
        except (RuntimeError, ValueError) as error:
            yield f"row {row} cannot be decoded: {error}"
            continue
        if (found := chip_hash(scratch)) != expected:
            yield f"row {row} has pixels of hash {found[:12]}…, the ledger says {expected[:12]}…"


def _of_the_whole(version: Version) -> Iterator[str]:
    store, plan, sealed = Store.open(version.url), version.plan, version.sealed
    if plan is None:
        raise StoreError(f"{version.name} is not planned yet")
    if store.num_rows < plan["end_row"]:
        yield f"the arrays end at row {store.num_rows}, the plan at {plan['end_row']}"
    for name in store.layout.arrays():
        strays = sorted(shard for shard in store.shards_there(name) if shard >= _end_shard(version.url))
        if strays:
            yield f"{name} has objects of shards {some(strays)}, which no version has"
    if sealed is None:
        return
    try:
        digest, batches = hashlib.sha256(), version.chip_batches(columns=["row", "status", "reason"])
        counts = chip_table.add_ledgers(chip_table.ledger(batch) for batch in batches)
        for part in version.chip_table_parts():
            digest.update(part)
    except (OSError, ValueError) as error:
        yield f"the chip table cannot be read: {error}"
        return
    if counts["requested"] != plan["num_chips"]:
        yield f"the ledger has {counts['requested']} candidates, the plan {plan['num_chips']}"
    yield from (f"the ledger's counts: {line}" for line in differences({n: sealed[n] for n in counts}, counts))
    if digest.hexdigest() != sealed["sha256"]:
        yield "the chip table is not the one that was sealed: its hash differs"


def _end_shard(url: str) -> int:
    """The shard after the last that a version has planned."""
    newest = latest(url)
    while newest is not None and newest.number:
        if newest.state != "planning":
            return newest.shards().stop
        newest = Version(url, newest.number - 1)
    raise StoreError(f"{url} has no version that is planned")
