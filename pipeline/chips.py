"""From a unit of the plan to chips: read the block once, cut it, judge every chip."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray

from pipeline.archives import Signing
from pipeline.bands import RESOLUTION_M
from pipeline.chip_table import FROM_MANIFEST
from pipeline.grid import Cell, cells_bounds, utm_box_lonlat
from pipeline.labels import LABEL_MISSING
from pipeline.reader import Window, read_classes, read_labels, read_optical, read_radar
from pipeline.screening import Screening, ScreenRules, band_statistics, screen_chip, screen_classes
from pipeline.store import chip_hash
from pipeline.types import Acquisition, ChipArrays, ChipError, Item

LabelMaps = Mapping[str, Sequence[tuple[str, bytes]]]
"""Label name -> (unsigned href of a map, footprint as WKB in longitude/latitude)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How chips are made, apart from where and when."""

    screen: ScreenRules
    signing: Signing
    side_m: int
    labels: LabelMaps = field(default_factory=dict)


LedgerRow = dict[str, Any]
"""What became of one candidate; the columns of the chip table."""


def build_unit(
    rows: Sequence[Mapping[str, Any]], items: Mapping[str, Item], recipe: Recipe
) -> tuple[dict[int, ChipArrays], list[LedgerRow]]:
    """Make the chips of one unit: one block of cells of one pair of acquisitions.

    The scene classification is read first, and the other assets only around the cells that it leaves. Where an asset
    is corrupt, the cells are read one by one, so that only those which the damage touches are lost.

    Args:
        rows: The unit's rows of the manifest.
        items: Item id -> item, at least those that the rows name.
        recipe: How chips are made.

    Returns:
        Row -> arrays of the chips that are kept; and one ledger row for every row given.
    """
    try:
        return _build_block(rows, items, recipe)
    except ChipError as error:
        if len(rows) > 1 and not error.transient:
            parts = [build_unit([row], items, recipe) for row in rows]
            return {r: chip for chips, _ in parts for r, chip in chips.items()}, [
                row for _, part in parts for row in part
            ]
        return {}, [_ledger_row(row, status="failed", error=f"cell {row['cell']}: {error}") for row in rows]


def _build_block(
    rows: Sequence[Mapping[str, Any]], items: Mapping[str, Item], recipe: Recipe
) -> tuple[dict[int, ChipArrays], list[LedgerRow]]:
    optical, radar = (_look(rows, items, sensor) for sensor in ("optical", "radar"))
    cells = {row["row"]: Cell.from_id(row["cell"], side_m=recipe.side_m) for row in rows}
    window = _window(cells.values())
    classes = read_classes(optical, window, recipe.signing)
    seen = {number: screen_classes(_cut(classes, "scl", window, cell), recipe.screen) for number, cell in cells.items()}
    kept = {number: cell for number, cell in cells.items() if not seen[number].reason}
    block = _read_block(optical, radar, _window(kept.values()), recipe) if kept else {}
    chips: dict[int, ChipArrays] = {}
    ledger: list[LedgerRow] = []
    for row in rows:
        number = row["row"]
        if number in kept:
            inner = _window(kept.values())
            chip = {name: _cut(array, name, inner, cells[number]) for name, array in block.items()}
            chip["scl"] = _cut(classes, "scl", window, cells[number])
            seen[number] = screen_chip(chip, seen[number], recipe.screen)
            if not seen[number].reason:
                chips[number] = chip
        ledger.append(_judged(row, seen[number], chips.get(number)))
    return chips, ledger


def _read_block(optical: Acquisition, radar: Acquisition, window: Window, recipe: Recipe) -> ChipArrays:
    block = read_optical(optical, window, recipe.signing)
    block["radar"] = read_radar(radar, window, recipe.signing)
    box = utm_box_lonlat(window.epsg, window.bounds)
    for name, maps in recipe.labels.items():
        hrefs = [href for href, footprint in maps if shapely.from_wkb(footprint).intersects(box)]
        shape = window.shape(10)
        block[f"label_{name}"] = (
            read_labels(hrefs, window, recipe.signing, missing=LABEL_MISSING)
            if hrefs
            else np.full(shape, LABEL_MISSING, np.uint8)
        )
    return block


def _look(rows: Sequence[Mapping[str, Any]], items: Mapping[str, Item], sensor: str) -> Acquisition:
    """The acquisition with the items of all rows."""
    names = sorted({name for row in rows for name in row[f"{sensor}_items"]})
    members = sorted((items[name] for name in names), key=lambda item: (item.datetime, item.id))
    return Acquisition(sensor=members[0].sensor, items=tuple(members))


def _window(cells: Any) -> Window:
    cells = list(cells)
    return Window(epsg=cells[0].epsg, bounds=cells_bounds(cells))


def _cut(array: NDArray[Any], name: str, window: Window, cell: Cell) -> NDArray[Any]:
    """The cell's part of an array over a window, `(..., y, x)`."""
    resolution = RESOLUTION_M.get(name, 10)
    left, _, right, top = cell.bounds
    row, column = round((window.bounds[3] - top) / resolution), round((left - window.bounds[0]) / resolution)
    side = round((right - left) / resolution)
    return np.ascontiguousarray(array[..., row : row + side, column : column + side])


def _judged(row: Mapping[str, Any], seen: Screening, chip: ChipArrays | None) -> LedgerRow:
    fractions: dict[str, Any] = {
        "valid_fraction": seen.valid_fraction,
        "cloud_fraction": seen.cloud_fraction,
        "clear_fraction": seen.clear_fraction,
    }
    if chip is None:
        return _ledger_row(row, status="rejected", reason=seen.reason, **fractions)
    means, deviations = band_statistics(chip)
    return _ledger_row(row, status="written", sha256=chip_hash(chip), mean=means, std=deviations, **fractions)


def _ledger_row(row: Mapping[str, Any], *, status: str, reason: str = "", error: str = "", **more: Any) -> LedgerRow:
    named = {name: row[name] for name in FROM_MANIFEST}
    return {**named, "status": status, "reason": reason, "error": error, **more}
