"""The plan beside the ledger: what every candidate was to be and what became of it, some thousand rows at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.chip_table import FAILED
from pipeline.types import Watch, unwatched
from pipeline.versions import Version


def ledger_rows(
    version: Version,
    *,
    manifest: Sequence[str],
    chips: Sequence[str],
    own: bool = False,
    watch: Watch = unwatched,
) -> Iterator[pa.Table]:
    """Candidates whose fate is known, ascending by row; columns of the manifest beside those of the chip table.

    Failures that a later version tried again are that version's.

    Args:
        version: Planned; while it is building, its shards that are done.
        manifest: Columns of the manifest.
        chips: Columns of the chip table; what a batch lacks is null.
        own: Leave out the versions before this one.
        watch: Shows how many rows have been gone through.
    """
    versions = [version] if own else version.versions()
    retried = max((each.number for each in version.versions() if (each.plan or {}).get("retries")), default=0)
    all_of_it = ((each, batch) for each in versions for batch in _of_one(each, manifest, chips))
    total = sum((each.plan or {"num_chips": 0})["num_chips"] for each in versions)
    for each, batch in watch(all_of_it, total=total, what="candidates", amount=lambda pair: pair[1].num_rows):
        rows = batch.filter(pc.not_equal(batch["status"], FAILED)) if each.number < retried else batch
        if rows.num_rows:
            yield rows


def _of_one(version: Version, manifest: Sequence[str], chips: Sequence[str]) -> Iterator[pa.Table]:
    known = list(dict.fromkeys(["row", "status", *chips]))
    planned = version.manifest_batches(columns=list(dict.fromkeys(["row", *manifest])))
    waiting: pa.Table | None = None
    for batch in version.chip_batches(columns=known):
        if not batch.num_rows:
            continue
        last = batch["row"][-1].as_py()
        there = [] if waiting is None else [waiting]
        while not there or there[-1]["row"][-1].as_py() < last:
            there.append(next(planned))
        rows = pa.concat_tables(there)
        waiting = there[-1]
        places = np.searchsorted(rows["row"].to_numpy(), batch["row"].to_numpy())
        beside = rows.take(places)
        assert np.array_equal(beside["row"].to_numpy(), batch["row"].to_numpy()), f"{version.name}: not its manifest"
        columns = {name: batch[name] if name in batch.column_names else pa.nulls(batch.num_rows) for name in known}
        yield pa.table({**columns, **{name: beside[name] for name in manifest if name not in known}})
