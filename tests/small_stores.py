"""Sealed stores of a few made-up chips, and small models to run over them, for tests of what stands on both."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from model.croma import Croma, CromaConfig
from model.normalisation import SSL4EO_S12
from model.pretrained import save, to_checkpoint
from pipeline.chip_table import chip_table
from pipeline.grid import Cell
from pipeline.layout import Layout
from pipeline.manifest import ITEMS_SCHEMA, MANIFEST_SCHEMA, REJECTIONS_SCHEMA
from pipeline.statistics import band_moments
from pipeline.store import Store
from pipeline.types import ChipArrays
from pipeline.versions import Version, begin

SMALL = CromaConfig(width=32, optical_depth=2, radar_depth=1, joint_depth=1, heads=2, decoder_width=16, decoder_heads=2)
BLOCK_CELLS = 4
MOMENT = datetime(2023, 7, 1, 10, tzinfo=UTC)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One row of the plan and what became of it."""

    cell: Cell
    split: str = "train"
    status: str = "written"
    dt_s: int | None = None
    """Unset: six hours, less a second for every row."""

    orbit_state: str = "ascending"
    cloud_fraction: float = 0.01
    """Of a written one."""


def write_model(path: Path, *, seed: int = 0, config: CromaConfig = SMALL) -> Croma:
    """A model with random weights at a path; all of them away from their initial value."""
    torch.manual_seed(seed)
    croma = Croma(config).eval()
    with torch.no_grad():
        for parameter in croma.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    content = io.BytesIO()
    save(to_checkpoint(croma, SSL4EO_S12), content)
    path.write_bytes(content.getvalue())
    return croma


def write_store(
    url: str,
    layout: Layout,
    candidates: Sequence[Candidate],
    make_chip: Callable[[int], ChipArrays],
    *,
    request: Mapping[str, Any],
    rejections: Sequence[Mapping[str, str]] = (),
    statistics: bool = False,
) -> Version:
    """Plan, build and seal a store whose rows are the candidates, in their order."""
    store = Store.create(url, layout)
    store.resize(len(candidates))
    version = begin(url, request)
    manifest = [_manifest_row(row, each, layout.shard_chips) for row, each in enumerate(candidates)]
    version.write_plan(
        ITEMS_SCHEMA.empty_table(),
        pa.Table.from_pylist([dict(row) for row in rejections], schema=REJECTIONS_SCHEMA),
        [pa.Table.from_pylist(manifest, schema=MANIFEST_SCHEMA)],
    )
    for shard in version.shards():
        rows = [row for row in store.rows_of(shard) if row < len(candidates)]
        hashes = store.write_shard(
            shard, ((row, make_chip(row)) for row in rows if candidates[row].status == "written")
        )
        ledger = [_ledger_row(manifest[row], candidates[row], hashes) for row in rows]
        if statistics:
            for row in ledger:
                row["mean"], row["std"] = band_moments(make_chip(row["row"]))
        version.write_part(shard, chip_table(ledger))
    version.seal()
    return version


def _manifest_row(row: int, candidate: Candidate, shard_chips: int) -> dict[str, Any]:
    cell = candidate.cell
    return {
        "row": row,
        "shard": row // shard_chips,
        "unit": f"unit-{row}",
        "block": f"{candidate.cell.epsg}_{candidate.cell.column // BLOCK_CELLS}_{candidate.cell.row // BLOCK_CELLS}",
        "cell": cell.id,
        "epsg": cell.epsg,
        "column": cell.column,
        "cell_row": cell.row,
        "pair": f"pair-{row}",
        "optical_items": [f"S2_{row}"],
        "radar_items": [f"S1_{row}", f"S1_{row}b"],
        "optical_datetime": MOMENT + timedelta(seconds=row),
        "radar_datetime": MOMENT + timedelta(hours=6),
        "dt_s": 21600 - row if candidate.dt_s is None else candidate.dt_s,
        "orbit_state": candidate.orbit_state,
        "relative_orbit": 44,
        "baseline": "05.09",
        "offset_dn": 1000,
        "split": candidate.split,
        "overlap": 1.0,
    }


def _ledger_row(planned: Mapping[str, Any], candidate: Candidate, hashes: Mapping[int, str]) -> dict[str, Any]:
    named = {name: planned[name] for name in ("row", "cell", "pair", "unit", "split")}
    outcome = {
        "written": {
            "sha256": hashes.get(planned["row"]),
            "valid_fraction": 1.0,
            "cloud_fraction": candidate.cloud_fraction,
        },
        "rejected": {"reason": "cloudy", "valid_fraction": 1.0, "cloud_fraction": 0.9},
        "failed": {"error": "item S2 band B02: decode error"},
    }
    return {**named, "status": candidate.status, **outcome[candidate.status]}
