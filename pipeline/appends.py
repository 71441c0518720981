"""Versions that follow others: what is built already stays out, and what failed is tried again."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.chip_table import FAILED
from pipeline.manifest import ITEMS_SCHEMA, LOOKS_SCHEMA
from pipeline.planning import Planner
from pipeline.splits import SPLITS
from pipeline.store import StoreError
from pipeline.types import Watch, unwatched
from pipeline.versions import Version

_CELL = ("epsg", "column", "cell_row")


def leave_out_earlier(planner: Planner, version: Version, *, watch: Watch = unwatched) -> None:
    """Keep a planner from planning what versions before this one have, whatever became of it there.

    Such candidates become rejections for `in_earlier_version`; failures among them are for `plan_retry`. A pair is
    known by its id, and by its items too: what an archive names otherwise than before has not been flown again.

    Raises:
        StoreError: An earlier version was not planned on the grid of cells.
    """
    looks = planner.looks()
    for earlier in version.versions()[:-1]:
        now_called = _now_called(earlier.looks(), looks)
        batches = earlier.manifest_batches(columns=[*_CELL, "pair"])
        total = (earlier.plan or {}).get("num_chips")
        for batch in watch(batches, total=total, what="earlier candidates", amount=lambda batch: batch.num_rows):
            _refuse_without_cells(earlier, batch)
            pairs = batch["pair"].combine_chunks().dictionary_encode()
            epsg, column, cell_row = (batch[name].to_numpy() for name in _CELL)
            pair, names = pairs.indices.to_numpy(), pairs.dictionary.to_pylist()
            planner.leave_out(epsg, column, cell_row, pair, pairs=names)
            for place, name in enumerate(names):
                for other in sorted(now_called.get(name, ())):
                    rows = np.flatnonzero(pair == place)
                    planner.leave_out(epsg[rows], column[rows], cell_row[rows], np.zeros_like(rows), pairs=[other])


def plan_retry(
    version: Version, facts: Mapping[str, Any] | None = None, *, confirm: Callable[[], None] | None = None
) -> dict[str, Any]:
    """Plan a version of the candidates that failed in the ones before it; readers see its outcome instead of theirs.

    Args:
        version: Begun after a sealed one, not planned.
        facts: To keep with the plan.
        confirm: See `Version.write_plan`.

    Returns:
        The plan as written.

    Raises:
        StoreError: Nothing failed; or an earlier version was not planned on the grid of cells.
    """
    planner, items = plan_of_failures(version)
    return version.write_planned(planner, items, facts={**(facts or {}), "retries": True}, confirm=confirm)


def plan_of_failures(version: Version) -> tuple[Planner, pa.Table]:
    """The candidates that failed in the versions before this one, and their items; writes nothing.

    Raises:
        StoreError: Nothing failed; or an earlier version was not planned on the grid of cells.
    """
    manifests, items = [], [ITEMS_SCHEMA.empty_table()]
    for earlier in with_open_failures(version):
        for failed in earlier.failures():
            shards = np.unique(failed["row"].to_numpy() // earlier_shard_chips(earlier))
            for shard in shards.tolist():
                planned = earlier.manifest_of(shard)
                _refuse_without_cells(earlier, planned)
                planned = planned.filter(pc.is_in(planned["row"], value_set=failed["row"].combine_chunks()))
                manifests.append(planned)
                items.append(earlier.items_of(planned))
    if not manifests:
        raise StoreError(f"{version.name}: no candidate of an earlier version failed; there is nothing to try again")
    planner = _planner(version)
    for planned in manifests:
        split = np.array([SPLITS.index(name) for name in planned["split"].to_pylist()], np.uint8)
        epsg, column, cell_row = (planned[name].to_numpy() for name in _CELL)
        planner.add(
            epsg,
            column,
            cell_row,
            np.arange(planned.num_rows),
            planned["overlap"].to_numpy(),
            looks=planned.select(LOOKS_SCHEMA.names[1:]),
            split=split,
        )
    return planner, _once(items)


def with_open_failures(version: Version) -> list[Version]:
    """The versions before this one whose failures no version between has tried again."""
    earlier = version.versions()[:-1]
    retried = max((v.number for v in earlier if (v.plan or {}).get("retries")), default=1)
    return [v for v in earlier if v.number >= retried and (v.sealed or {}).get(FAILED)]


def earlier_shard_chips(version: Version) -> int:
    """Rows of a shard of a planned version."""
    plan = version.plan
    assert plan is not None, version
    return int(plan["shard_chips"])


def _now_called(earlier: pa.Table | None, looks: pa.Table) -> dict[str, set[str]]:
    """Earlier pair -> other ids under which pairs of the same items, of both sensors, are planned now."""
    if earlier is None:
        return {}
    pairs_of: dict[str, set[str]] = defaultdict(set)
    for pair, *items in _pairs_and_items(looks):
        for item in chain(*items):
            pairs_of[item].add(pair)
    called: dict[str, set[str]] = defaultdict(set)
    for pair, *items in _pairs_and_items(earlier):
        optical, radar = (set().union(*(pairs_of.get(item, ()) for item in of_sensor)) for of_sensor in items)
        called[pair] |= (optical & radar) - {pair}
    return called


def _pairs_and_items(looks: pa.Table) -> Iterator[tuple[Any, ...]]:
    return zip(*(looks[name].to_pylist() for name in ("pair", "optical_items", "radar_items")), strict=True)


def _planner(version: Version) -> Planner:
    """Blocks as in the version before; splits are given, never drawn."""
    plan = Version(version.url, version.number - 1).plan
    assert plan is not None, version

    def no_splits(*_: Any) -> Any:
        raise AssertionError("splits are given")

    return Planner(
        block_cells=plan["block_cells"],
        shard_chips=plan["shard_chips"],
        first_row=version.first_shard() * plan["shard_chips"],
        seed=version.number,
        splits_of=no_splits,
    )


def _refuse_without_cells(version: Version, manifest: pa.Table) -> None:
    missing = [name for name in _CELL if name not in manifest.column_names]
    if missing:
        raise StoreError(f"{version.name} was not planned on the grid of cells: its manifest has no {missing[0]}")


def _once(items: list[pa.Table]) -> pa.Table:
    """Items by id, each once."""
    table = pa.concat_tables(items, promote_options="default")
    ids = table["id"].to_pylist()
    firsts = {name: place for place, name in reversed(list(enumerate(ids)))}
    return table.take([firsts[name] for name in sorted(firsts)])
