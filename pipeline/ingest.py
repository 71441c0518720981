"""Building the store on Ray Data: one task per shard group; pixels stay in the task, receipts come back.

The driver holds numbers of shards and no plan: a task is told which shard of which version it builds, and reads what
the plan says of it. Shards go out in waves, so that also a plan of 100 million chips is a few thousand tasks at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import pyarrow as pa
import ray

from pipeline.broker import access_for
from pipeline.chip_table import FAILED, chip_table, ledger, some
from pipeline.chips import LedgerRow, Recipe, build_unit
from pipeline.manifest import items_from_table
from pipeline.quiet import quiet_data
from pipeline.statistics import BandStatistics
from pipeline.store import Store, StoreError
from pipeline.types import ChipArrays, Item
from pipeline.verification import ShardReport, verify_shard
from pipeline.versions import Version

A = TypeVar("A")
B = TypeVar("B")

_TASKS_PER_CPU = 32
"""Of a wave: at its end CPUs idle for about a task's half, which is then 1-2 % of the wave."""

_MIN_WAVE = 256

_LOST_IN_A_ROW = 3
"""After so many shards one after another that could not be written, the store is taken to be away."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What a task says when its shard group is written."""

    shard: int
    written: int
    rejected: int
    failed: int
    seconds: float

    error: str = ""
    """Why the shard could not be written; then it is not done."""

    @property
    def outcomes(self) -> dict[str, int]:
        """How many candidates came to each status."""
        return {"written": self.written, "rejected": self.rejected, "failed": self.failed}


MakeUnit = Callable[
    [Sequence[Mapping[str, Any]], Mapping[str, Item]], tuple[Mapping[int, ChipArrays], Sequence[LedgerRow]]
]
"""From the rows of a unit and their items to its chips, by row, and to what became of each row."""


def by_recipe(recipe: Recipe) -> MakeUnit:
    """`build_unit`; in a task, the archive is reached as the task's process may reach it."""

    def make(
        rows: Sequence[Mapping[str, Any]], items: Mapping[str, Item]
    ) -> tuple[Mapping[int, ChipArrays], Sequence[LedgerRow]]:
        return build_unit(rows, items, recipe, access_for(recipe.access) if recipe.access else None)

    return make


def build_shard(
    version: Version, shard: int, manifest: pa.Table, items: pa.Table, recipe: Recipe | MakeUnit
) -> Receipt:
    """Read the units of one shard group, write its shard objects, then its part of the chip table.

    The part is written last and says "done": a task killed before leaves nothing that a reader looks at, and the
    next run writes the same bytes again. The pixels of two units are in memory at a time.

    A task whose node was cut off may work on while another does its shard. What it could not read, that one may have:
    before it writes, it looks whether its shard has become done, and then leaves everything as it is.

    Args:
        version: Being built.
        shard: Number of the shard.
        manifest: Its rows.
        items: At least those that the rows name.
        recipe: How chips are made.

    Raises:
        OSError: The store could not be written; the shard is not done.
    """
    start = time.monotonic()
    make = by_recipe(recipe) if isinstance(recipe, Recipe) else recipe
    rows, statistics = list[LedgerRow](), BandStatistics()
    # From here on the shard is not done, whatever an earlier run has said of it.
    version.withdraw_part(shard)
    chips = made_chips(manifest, items_from_table(items), make, rows, statistics)
    try:
        hashes = Store.open(version.url).write_shard(shard, _unless_done(version, shard, chips))
    except _DoneByAnotherError as done:
        return _receipt(shard, done.part, seconds=round(time.monotonic() - start, 3))
    part = chip_table({**row, "sha256": hashes.get(row["row"], "")} for row in rows)
    version.write_part(shard, part, statistics=statistics)
    return _receipt(shard, part, seconds=round(time.monotonic() - start, 3))


def build_planned_shard(version: Version, shard: int, recipe: Recipe | MakeUnit) -> Receipt:
    """What a task does: `build_shard` with what the plan says of the shard.

    A shard that is finished is left alone: a task may be run again after its work was done, where a node died.

    Returns:
        The receipt; one with an `error` where the store could not be read or written.
    """
    start = time.monotonic()
    try:
        if (part := _done_part(version, shard)) is not None:
            return _receipt(shard, part, seconds=0.0)
        manifest = version.manifest_of(shard)
        return build_shard(version, shard, manifest, version.items_of(manifest), recipe)
    except OSError as error:
        seconds = round(time.monotonic() - start, 3)
        return Receipt(shard=shard, written=0, rejected=0, failed=0, seconds=seconds, error=str(error))


def build(
    version: Version,
    recipe: Recipe | MakeUnit,
    *,
    cpus_per_task: float = 1.0,
    shards_per_wave: int | None = None,
) -> Generator[Receipt, None, None]:
    """Build what is missing of a version on the Ray cluster; yields receipts as they come.

    Shard groups that are finished without failures are left alone; those with failed chips are redone whole.

    Args:
        version: Planned.
        recipe: How chips are made, or what makes them.
        cpus_per_task: That a task takes, of its node's.
        shards_per_wave: Tasks that are handed to Ray at a time; unset: 32 per CPU of the cluster.

    Raises:
        StoreError: Shards could not be written; what is written is kept, and another run builds the others.
    """
    missing = sorted(set(version.shards()) - version.finished_shards())
    make = by_recipe(recipe) if isinstance(recipe, Recipe) else recipe
    lost: list[Receipt] = []
    in_a_row = 0
    rows = on_cluster(
        lambda shard: asdict(build_planned_shard(version, shard, make)),
        missing,
        cpus_per_task=cpus_per_task,
        tasks_per_wave=shards_per_wave,
    )
    # Closed at once where nobody wants more: tasks that have not begun are then not begun.
    with closing(rows):
        for row in rows:
            receipt = Receipt(**row)
            if not receipt.error:
                in_a_row = 0
                yield receipt
                continue
            lost.append(receipt)
            in_a_row += 1
            if in_a_row == _LOST_IN_A_ROW:
                break
    if lost:
        raise StoreError(
            f"{version.name}: shards {some([receipt.shard for receipt in lost])} could not be written; what is written "
            f"is kept, running again builds the others. First: {lost[0].error}"
        )


def check_shards_on_cluster(version: Version, pixels: bool) -> Iterator[ShardReport]:
    """`pipeline.verification.verify_shard` for every shard, on the Ray cluster; for `verify`."""

    def check(shard: int) -> dict[str, Any]:
        report = verify_shard(version, shard, pixels=pixels)
        return {"shard": shard, "chips": report.chips, "problems": "\n".join(report.problems)}

    for row in on_cluster(check, version.shards()):
        yield ShardReport(shard=row["shard"], chips=row["chips"], problems=tuple(row["problems"].splitlines()))


def on_cluster(
    work: Callable[[int], dict[str, Any]],
    numbers: Sequence[int],
    *,
    cpus_per_task: float = 1.0,
    tasks_per_wave: int | None = None,
) -> Generator[dict[str, Any], None, None]:
    """Do something for each of many numbers, as one Ray task each; results as they come."""
    quiet_data()

    def of_row(row: dict[str, Any]) -> dict[str, Any]:
        return work(int(row["number"]))

    for wave in _waves(numbers, tasks_per_wave):
        tasks = ray.data.from_items([{"number": number} for number in wave], override_num_blocks=len(wave))
        yield from tasks.map(of_row, num_cpus=cpus_per_task).iter_rows()


def _waves(numbers: Sequence[int], tasks_per_wave: int | None) -> Iterable[Sequence[int]]:
    start = 0
    while start < len(numbers):
        cpus = int(ray.cluster_resources().get("CPU", 1)) if ray.is_initialized() else 1
        size = tasks_per_wave or max(_MIN_WAVE, _TASKS_PER_CPU * cpus)
        yield numbers[start : start + size]
        start += size


class _DoneByAnotherError(Exception):
    """A shard became done while its chips were made."""

    def __init__(self, part: pa.Table) -> None:
        super().__init__()
        self.part = part


def _done_part(version: Version, shard: int) -> pa.Table | None:
    """The part of a shard that needs no more work: nothing in it failed, or its version is sealed."""
    part = version.part(shard)
    if part is None or (FAILED in part["status"].to_pylist() and version.state != "sealed"):
        return None
    return part


def _unless_done(
    version: Version, shard: int, chips: Iterator[tuple[int, ChipArrays]]
) -> Iterator[tuple[int, ChipArrays]]:
    """The chips as they come; after the last, and so before any is written, whether that is still wanted.

    Raises:
        _DoneByAnotherError: It is not.
    """
    yield from chips
    if (part := _done_part(version, shard)) is not None:
        raise _DoneByAnotherError(part)


def _receipt(shard: int, part: pa.Table, *, seconds: float) -> Receipt:
    counts = ledger(part)
    statuses = {status: counts[status] for status in ("written", "rejected", "failed")}
    return Receipt(shard=shard, **statuses, seconds=seconds)


def made_chips(
    manifest: pa.Table,
    items: Mapping[str, Item],
    make: MakeUnit,
    rows: list[LedgerRow],
    statistics: BandStatistics,
) -> Iterator[tuple[int, ChipArrays]]:
    """The chips of a shard, unit by unit; the next unit is made while the chips of one are taken.

    Making a unit is mostly waiting for a server, and what is done with its chips is not.

    Args:
        manifest: The shard's rows.
        items: Item id -> item, at least those that the rows name.
        make: What makes a unit; called in a thread.
        rows: What became of every row is appended to it.
        statistics: Every chip is counted in it; a chip's moments come from the same count of its pixels.
    """
    units: dict[str, list[Mapping[str, Any]]] = {}
    for each in manifest.sort_by("row").to_pylist():
        units.setdefault(each["unit"], []).append(each)
    for chips, unit_rows in _one_ahead(lambda unit: make(unit, items), [*units.values()]):
        rows += unit_rows
        by_row = {each["row"]: each for each in unit_rows}
        for row, chip in chips.items():
            own = BandStatistics.of(chip)
            statistics.merge(own)
            by_row[row]["mean"], by_row[row]["std"] = own.moments()
            yield row, chip


def _one_ahead(work: Callable[[A], B], inputs: Sequence[A]) -> Iterator[B]:
    """What `work` gives for each input, in order; the next one is worked on while one is used."""
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as thread:
        coming = [thread.submit(work, each) for each in inputs[:1]]
        for each in inputs[1:]:
            result = coming.pop().result()
            coming.append(thread.submit(work, each))
            yield result
        for last in coming:
            yield last.result()
