"""Which block a chip is of: as the manifests say, over versions and over stores."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.chip_table import chip_table
from pipeline.grid import Cell
from pipeline.layout import Layout
from pipeline.manifest import ITEMS_SCHEMA, MANIFEST_SCHEMA, REJECTIONS_SCHEMA
from pipeline.neighbourhoods import Neighbourhoods, neighbourhoods
from pipeline.sources import Source, Sources
from pipeline.store import Store
from pipeline.versions import Version, begin
from tests.small_stores import Candidate, _ledger_row, _manifest_row

SHARD = 4
LAYOUT = Layout(side_px=6, shard_chips=SHARD)
CELL = Candidate(cell=Cell(epsg=32633, column=1, row=2, side_m=60), status="failed")

Blocks = list[str | None]


def write_versions(url: str, versions: list[Blocks]) -> Source:
    """Versions of candidates of the blocks given, one after the other; imported ones have none."""
    store, first_shard = Store.create(url, LAYOUT), 0
    for number, blocks in enumerate(versions):
        version = begin(url, {}, number=number + 1)
        rows = range(first_shard * SHARD, first_shard * SHARD + len(blocks))
        planned = [_manifest_row(row, CELL, SHARD) | {"block": block} for row, block in zip(rows, blocks, strict=True)]
        store.resize(rows.stop)
        manifest = pa.Table.from_pylist(planned, schema=MANIFEST_SCHEMA)
        version.write_plan(ITEMS_SCHEMA.empty_table(), REJECTIONS_SCHEMA.empty_table(), [manifest])
        for shard in version.shards():
            own = [row for row in planned if row["shard"] == shard]
            version.write_part(shard, chip_table([_ledger_row(row, CELL, {}) for row in own]))
        version.seal()
        first_shard = version.shards().stop
    return Source(url=url, version=len(versions))


of_version = st.lists(st.sampled_from(["a", "b", "c", None]), min_size=1, max_size=11)


@given(stores=st.lists(st.lists(of_version, min_size=1, max_size=2), min_size=1, max_size=2))
@settings(max_examples=20)
def test_two_chips_are_of_one_block_where_one_stores_manifest_says_so(stores: list[list[Blocks]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        sources = [write_versions(str(Path(folder, f"{n}.zarr")), each) for n, each in enumerate(stores)]
        found = Neighbourhoods.from_bytes(neighbourhoods(sources).to_bytes())
        together = Sources(sources)
        expected: dict[int, object] = {}
        for number, source in enumerate(sources):
            for version in Version(source.url, source.version).versions():
                manifest = version.manifest(columns=["row", "block"])
                rows = together.rows_of(number, manifest["row"].to_numpy()).tolist()
                for row, block in zip(rows, manifest["block"].to_pylist(), strict=True):
                    expected[row] = (number, row if block is None else block)
    rows = np.array(sorted(expected))
    numbers = found.of(rows)
    pairs = set(zip(numbers.tolist(), (expected[row] for row in rows.tolist()), strict=True))
    assert len(pairs) == len(set(expected.values())) == len(set(numbers.tolist()))
    assert np.all(np.diff(found.starts) > 0)
