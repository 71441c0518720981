"""A sealed store of chips that compress as real ones do, and the same pixels as plain arrays; for measurements.

Few chips, many rows: later shards are links to the first ones, so that an epoch is long and all of it lies in memory.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy.ndimage import zoom

from pipeline.chip_table import chip_table
from pipeline.grid import Cell
from pipeline.layout import Layout
from pipeline.manifest import ITEMS_SCHEMA, MANIFEST_SCHEMA, REJECTIONS_SCHEMA
from pipeline.store import Store
from pipeline.types import ChipArrays
from pipeline.versions import begin
from tests.small_stores import Candidate, _ledger_row, _manifest_row

_NOISE = {"b10": 50, "b20": 90, "b60": 40, "radar": 150}
"""Deviation of what neighbouring pixels do not have in common; by it the chips compress as real ones do (1.46)."""


def make_chips(count: int, layout: Layout) -> dict[str, NDArray[np.generic]]:
    """Smooth fields with noise, by array: (chip, band, y, x)."""
    rng = np.random.default_rng(0)
    chips = {}
    for name, spec in layout.arrays().items():
        pixels = np.empty((count, *spec.shape), spec.dtype)
        field = zoom(rng.normal(0, 500, (40, 40)), 20, order=1)
        low, middle = (-4000, -1300) if name == "radar" else (1, 1500)
        for chip in range(count):
            for band in range(spec.shape[0]):
                y, x = rng.integers(0, len(field) - spec.shape[-1], 2)
                smooth = field[y : y + spec.shape[-1], x : x + spec.shape[-1]]
                noisy = middle + smooth + rng.standard_normal(smooth.shape, np.float32) * _NOISE[name]
                pixels[chip, band] = np.maximum(noisy, low)
        chips[name] = pixels
    return chips


def write_long_store(url: str, layout: Layout, chips: dict[str, NDArray[np.generic]], num_rows: int) -> float:
    """A store of so many rows whose chips repeat; returns how much smaller its objects are than their pixels."""
    count = len(next(iter(chips.values())))
    assert count % layout.shard_chips == num_rows % count == 0, (count, num_rows)

    def chip(row: int) -> ChipArrays:
        return {name: pixels[row] for name, pixels in chips.items()}

    store = Store.create(url, layout)
    store.resize(num_rows)
    version = begin(url, {})
    candidates = [Candidate(cell=Cell(epsg=32633, column=100 + row, row=2000, side_m=2640)) for row in range(num_rows)]
    manifest = [_manifest_row(row, each, layout.shard_chips) for row, each in enumerate(candidates)]
    planned = pa.Table.from_pylist(manifest, schema=MANIFEST_SCHEMA)
    version.write_plan(ITEMS_SCHEMA.empty_table(), REJECTIONS_SCHEMA.empty_table(), [planned])
    repeated = count // layout.shard_chips
    hashes: dict[int, str] = {}
    for shard in version.shards():
        rows = store.rows_of(shard)
        if shard < repeated:
            hashes |= store.write_shard(shard, ((row, chip(row)) for row in rows))
        else:
            for name in layout.arrays():
                first, link = (Path(url, store.shard_key(name, number)) for number in (shard % repeated, shard))
                link.parent.mkdir(parents=True, exist_ok=True)
                os.link(first, link)
        of_rows = {row: hashes[row % count] for row in rows}
        version.write_part(shard, chip_table([_ledger_row(manifest[row], candidates[row], of_rows) for row in rows]))
    version.seal()
    stored = sum(
        Path(url, store.shard_key(name, n)).stat().st_size for name in layout.arrays() for n in range(repeated)
    )
    return sum(pixels.nbytes for pixels in chips.values()) / stored
