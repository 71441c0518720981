"""Pairing many cells: cut into areas that are paired side by side on the cluster; tables of numbers come back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final

import pyarrow as pa
import ray

from pipeline.grid import Cell
from pipeline.ingest import on_cluster
from pipeline.manifest import candidates_of, rejections_table
from pipeline.pairing import PairRules, pair_cells, pairing_areas
from pipeline.types import Acquisition

CELLS_PER_AREA: Final = 64
"""Side of an area in cells, a multiple of any block's."""

FEW_CELLS: Final = 20_000
"""Up to so many are paired in this process, which takes some seconds."""

_TABLES: Final = ("candidates", "looks", "rejections")

_AREAS_AT_ONCE: Final = 64
"""Areas whose items are on their way to tasks at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Matched:
    """What came of pairing an area."""

    num_cells: int
    candidates: pa.Table
    """`CANDIDATES_SCHEMA`: the pairs."""

    looks: pa.Table
    """What the candidates' `look` counts in."""

    rejections: pa.Table
    """Candidates that were not taken, with the reason."""


def match_cells(
    cells: Sequence[Cell], optical: Sequence[Acquisition], radar: Sequence[Acquisition], rules: PairRules
) -> Matched:
    """`pair_cells` as tables."""
    pairs, rejections = pair_cells(cells, optical, radar, rules)
    candidates, looks = candidates_of(pairs)
    return Matched(num_cells=len(cells), candidates=candidates, looks=looks, rejections=rejections_table(rejections))


def match_areas(
    cells: Sequence[Cell], optical: Sequence[Acquisition], radar: Sequence[Acquisition], rules: PairRules
) -> Iterator[Matched]:
    """Pair cells area by area: few of them here, many on the Ray cluster, if this process is part of one.

    What comes is the same, in another order of areas.
    """
    areas = pairing_areas(cells, optical, radar, cells_per_side=CELLS_PER_AREA)
    if len(cells) <= FEW_CELLS or not ray.is_initialized():
        yield from (match_cells(*area, rules) for area in areas)
        return
    while wave := list(islice(areas, _AREAS_AT_ONCE)):
        yield from _match_wave([ray.put(area) for area in wave], rules)


def _match_wave(areas: Sequence[ray.ObjectRef[Any]], rules: PairRules) -> Iterator[Matched]:
    def work(number: int) -> dict[str, Any]:
        cells, optical, radar = ray.get(areas[number])
        matched = match_cells(cells, optical, radar, rules)
        return {"num_cells": matched.num_cells, **{name: _to_bytes(getattr(matched, name)) for name in _TABLES}}

    for row in on_cluster(work, range(len(areas))):
        tables = {name: pa.ipc.open_stream(row[name]).read_all() for name in _TABLES}
        yield Matched(num_cells=row["num_cells"], **tables)


def _to_bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return bytes(sink.getvalue())
