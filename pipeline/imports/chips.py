"""From the samples of a unit to chips and to what the ledger says of each: what `pipeline.ingest.build` is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.bands import NATIVE_GROUPS
from pipeline.chip_table import FAILED, FROM_MANIFEST, REJECTED, WRITTEN
from pipeline.imports.plan import LABEL_PREFIX, sample_from_row
from pipeline.imports.samples import Reading, Unfit
from pipeline.imports.sources import SOURCES
from pipeline.layout import Layout
from pipeline.types import ChipArrays, Item

_PIXELS = {*NATIVE_GROUPS, "radar"}
"""Arrays of the sensors, beside labels and classes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportUnit:
    """Makes the chips of a unit; what every task of an import is given."""

    source: str
    folder: str
    """Of the dataset; every node must see it."""

    layout: Layout
    """Of the store."""

    min_valid_fraction: float = 0.0
    """Smallest share of 10 m pixels with data in all bands."""

    def __call__(
        self, rows: Sequence[Mapping[str, Any]], items: Mapping[str, Item]
    ) -> tuple[dict[int, ChipArrays], list[dict[str, Any]]]:
        """From the manifest's rows of a unit to its chips, by row, and to what became of every row."""
        samples = [sample_from_row(row) for row in rows]
        readings = SOURCES[self.source].read(Path(self.folder), samples, self.layout)
        chips: dict[int, ChipArrays] = {}
        ledger: list[dict[str, Any]] = []
        for row, reading in zip(rows, readings, strict=True):
            outcome = _outcome(reading, self.layout, self.min_valid_fraction)
            ledger.append({**_planned(row), **outcome})
            if outcome["status"] == WRITTEN:
                assert isinstance(reading, dict)
                chips[row["row"]] = reading
        return chips, ledger


def judge(chip: ChipArrays, layout: Layout, *, min_valid_fraction: float) -> dict[str, Any]:
    """What the ledger says of a chip that could be read: its fractions, and the reason if it is not kept."""
    specs = layout.arrays()
    side = (layout.side_px, layout.side_px)
    valid: dict[str, NDArray[np.bool_]] = {"optical": np.ones(side, np.bool_), "radar": np.ones(side, np.bool_)}
    for name in specs.keys() & _PIXELS:
        of_array = (chip[name] != specs[name].nodata).all(axis=0)
        step = specs[name].step_px
        valid["radar" if name == "radar" else "optical"] &= of_array.repeat(step, axis=0).repeat(step, axis=1)
    fraction = float((valid["optical"] & valid["radar"]).mean())
    reason = ""
    for sensor, pixels in valid.items():
        if not pixels.any():
            reason = reason or f"no_{sensor}_data"
    if fraction < min_valid_fraction:
        reason = reason or "too_little_valid"
    radar = {"radar_valid_fraction": float(valid["radar"].mean())} if layout.has_radar else {}
    return {"reason": reason, "valid_fraction": fraction, **radar}


def _outcome(reading: Reading, layout: Layout, min_valid_fraction: float) -> dict[str, Any]:
    if isinstance(reading, Unfit):
        return {"status": REJECTED, "reason": str(reading)}
    if isinstance(reading, Exception):
        return {"status": FAILED, "error": str(reading)}
    seen = judge(reading, layout, min_valid_fraction=min_valid_fraction)
    if seen["reason"]:
        return {"status": REJECTED, **seen}
    return {"status": WRITTEN, **seen}


def _planned(row: Mapping[str, Any]) -> dict[str, Any]:
    """What the ledger takes over from the manifest."""
    return {name: value for name, value in row.items() if name in FROM_MANIFEST or name.startswith(LABEL_PREFIX)}
