"""From a unit of the plan to chips: read the block once, cut it, judge every chip."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeVar

import numpy as np
import shapely
from numpy.typing import NDArray

from pipeline.access import Access, DirectAccess
from pipeline.antimeridian import within_180
from pipeline.archives import Signing
from pipeline.bands import RESOLUTION_M
from pipeline.chip_table import FROM_MANIFEST
from pipeline.grid import Cell, block_key, cells_bounds, utm_box_lonlat
from pipeline.labels import LABEL_MISSING
from pipeline.reader import Patience, Reader, ReaderName, ReadError, View, Window, reader_named
from pipeline.screening import Screening, ScreenRules, screen_chip, screen_classes
from pipeline.types import Acquisition, ChipArrays, Item, Sensor

if TYPE_CHECKING:
    from pipeline.broker import AccessSpec

LabelMaps = Mapping[str, Sequence[tuple[str, bytes]]]
"""Label name -> (unsigned href of a map, footprint as WKB in longitude/latitude)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How chips are made, apart from where and when."""

    screen: ScreenRules

    signing: Signing = "none"
    """How hrefs are signed where `access` says nothing."""

    access: AccessSpec | None = None
    """How the archive may be reached; in this process alone, without limits, unless given."""

    side_m: int
    labels: LabelMaps = field(default_factory=dict)

    reader: ReaderName = "window"
    """Which engine reads."""

    patience: Patience = field(default_factory=Patience)
    """How long a read is tried."""


LedgerRow = dict[str, Any]
"""What became of one candidate: the columns of the chip table, but for the hash and the moments of what is written."""

T = TypeVar("T")
Row = Mapping[str, Any]

SPARSE_CELLS: Final = 4
"""Side of the parts that a sparse block is read in, in cells."""

_FILE_BLOCK_M: Final = 5120
"""Side of the blocks that archives' files come in, 512 pixels of 10 m: what is read besides what is wanted."""


@dataclass(frozen=True, slots=True)
class _Cut:
    """One chip as it was read."""

    chip: ChipArrays
    flags: frozenset[str]
    """What is odd about its items."""


def build_unit(
    rows: Sequence[Row], items: Mapping[str, Item], recipe: Recipe, access: Access | None = None
) -> tuple[dict[int, ChipArrays], list[LedgerRow]]:
    """Make the chips of one unit: one block of cells of one pair of acquisitions.

    Each chip is made of the items that its own row names, and is the same whatever else is in the unit. The scene
    classification is read first, and the other assets only around the cells that it leaves. Where an asset cannot be
    read, only the cells that need it are lost; where it is damaged, only those which the damage touches.

    Args:
        rows: The unit's rows of the manifest.
        items: Item id -> item, at least those that the rows name.
        recipe: How chips are made.
        access: How the archive is reached; alone and at once unless given.

    Returns:
        Row -> arrays of the chips that are kept; and one ledger row for every row given.
    """
    reader = reader_named(recipe.reader, access or DirectAccess(recipe.signing), recipe.patience)
    cells = _cells(rows, recipe)
    classes = _in_parts(rows, cells, lambda part: _read_classes(part, items, cells, reader))
    scl = {number: own for number, own in classes.items() if not isinstance(own, ReadError)}
    seen = {number: screen_classes(own, recipe.screen) for number, own in scl.items()}
    kept = [row for row in rows if row["row"] in seen and not seen[row["row"]].reason]
    read = _in_parts(kept, cells, lambda part: _read_chips(part, items, cells, scl, recipe, reader))
    chips: dict[int, ChipArrays] = {}
    ledger: list[LedgerRow] = []
    for row in rows:
        number = row["row"]
        result = read.get(number)
        failure = next((r for r in (classes[number], result) if isinstance(r, ReadError)), None)
        if failure:
            # What was seen before the failure is written down too.
            columns = seen[number].as_columns() if number in seen else {}
            ledger.append(_ledger_row(row, status="failed", error=f"cell {row['cell']}: {failure}", **columns))
            continue
        if isinstance(result, _Cut):
            seen[number] = screen_chip(result.chip, seen[number], recipe.screen, flags=result.flags)
            if not seen[number].reason:
                chips[number] = result.chip
        ledger.append(_judged(row, seen[number], chips.get(number)))
    return chips, ledger


def reading_groups(cells: Mapping[int, Cell]) -> list[list[int]]:
    """How the wanted cells of a block are best read: together, or, when few are left, in parts of 4 x 4.

    Args:
        cells: Number -> cell.

    Returns:
        The numbers of each group, in a fixed order. Reading what lies around a group costs about half a file's block
        on each side.
    """
    parts: dict[Any, list[int]] = {}
    for number, cell in cells.items():
        parts.setdefault(block_key(cell, cells_per_side=SPARSE_CELLS), []).append(number)
    groups = list(parts.values())
    apart = sum(_cost(cells[number] for number in group) for group in groups)
    return groups if apart < _cost(cells.values()) else [list(cells)]


def _cost(cells: Iterable[Cell]) -> float:
    """Square metres that are read for a window around cells."""
    left, bottom, right, top = cells_bounds(cells)
    return (right - left + _FILE_BLOCK_M) * (top - bottom + _FILE_BLOCK_M)


def _in_parts(
    rows: Sequence[Row], cells: Mapping[int, Cell], read: Callable[[Sequence[Row]], Mapping[int, T]]
) -> dict[int, T | ReadError]:
    """What `read` gives for each row; where a file cannot be read, rows are parted to lose as few as possible."""
    if not rows:
        return {}
    try:
        return {**read(rows)}
    except ReadError as error:
        parts: list[Sequence[Row]] = [] if error.transient else [*_by_items(rows).values()]
        if len(parts) == 1:
            parts = [*_halves(rows, cells)] if error.kind == "damaged" and len(rows) > 1 else []
        if not parts:
            return {row["row"]: error for row in rows}
    return {number: result for part in parts for number, result in _in_parts(part, cells, read).items()}


def _by_items(rows: Sequence[Row]) -> dict[Any, list[Row]]:
    """Rows by the items that they are made of: where the tiles of an acquisition meet, cells need different ones."""
    parts: dict[Any, list[Row]] = {}
    for row in rows:
        parts.setdefault((tuple(row["optical_items"]), tuple(row["radar_items"])), []).append(row)
    return parts


def _halves(rows: Sequence[Row], cells: Mapping[int, Cell]) -> tuple[Sequence[Row], Sequence[Row]]:
    """Two compact halves of a block."""
    left, bottom, right, top = cells_bounds(cells[row["row"]] for row in rows)

    def place(row: Row) -> tuple[int, int]:
        cell = cells[row["row"]]
        return (cell.column, cell.row) if right - left >= top - bottom else (cell.row, cell.column)

    ordered = sorted(rows, key=place)
    return ordered[: len(rows) // 2], ordered[len(rows) // 2 :]


def _read_classes(
    rows: Sequence[Row], items: Mapping[str, Item], cells: Mapping[int, Cell], reader: Reader
) -> dict[int, NDArray[np.uint8]]:
    parts = [*_by_items(rows).values()]
    views = [_view(part, items, cells, ("optical",)) for part in parts]
    return {
        row["row"]: _cut(classes, "scl", view.window, cells[row["row"]])
        for part, view, classes in zip(parts, views, reader.classes(views), strict=True)
        for row in part
    }


def _read_chips(
    rows: Sequence[Row],
    items: Mapping[str, Item],
    cells: Mapping[int, Cell],
    classes: Mapping[int, NDArray[np.uint8]],
    recipe: Recipe,
    reader: Reader,
) -> dict[int, _Cut]:
    by_number = {row["row"]: row for row in rows}
    groups = [
        [by_number[number] for number in group]
        for part in _by_items(rows).values()
        for group in reading_groups({row["row"]: cells[row["row"]] for row in part})
    ]
    views = [_view(group, items, cells, ("optical", "radar")) for group in groups]
    around = [_paste(classes, cells, group, view.window) for group, view in zip(groups, views, strict=True)]
    read = reader.pixels(views, classes=around)
    cut: dict[int, _Cut] = {}
    for group, view, arrays in zip(groups, views, read.arrays, strict=True):
        arrays.update(_read_labels(view.window, recipe, reader))
        for row in group:
            number = row["row"]
            chip = {name: _cut(array, name, view.window, cells[number]) for name, array in arrays.items()}
            cut[number] = _Cut({**chip, "scl": classes[number]}, _flags_of(row, read.flags))
        arrays.clear()
    return cut


def _read_labels(window: Window, recipe: Recipe, reader: Reader) -> ChipArrays:
    labels: ChipArrays = {}
    box = within_180(utm_box_lonlat(window.epsg, window.bounds))
    for name, maps in recipe.labels.items():
        hrefs = [href for href, footprint in maps if shapely.from_wkb(footprint).intersects(box)]
        missing = np.full(window.shape(10), LABEL_MISSING, np.uint8)
        labels[f"label_{name}"] = reader.labels(hrefs, window, missing=LABEL_MISSING) if hrefs else missing
    return labels


def _paste(
    classes: Mapping[int, NDArray[np.uint8]], cells: Mapping[int, Cell], group: Sequence[Row], window: Window
) -> NDArray[np.uint8]:
    """(y, x) at 20 m: the classification over a group's cells; 0 between them."""
    around = np.zeros(window.shape(RESOLUTION_M["scl"]), np.uint8)
    for row in group:
        _part(around, "scl", window, cells[row["row"]])[...] = classes[row["row"]]
    return around


def _flags_of(row: Row, flags: Mapping[str, frozenset[str]]) -> frozenset[str]:
    items = (name for sensor in ("optical", "radar") for name in row[f"{sensor}_items"])
    return frozenset(flag for name in items for flag in flags[name])


def _cells(rows: Sequence[Row], recipe: Recipe) -> dict[int, Cell]:
    return {row["row"]: Cell.from_id(row["cell"], side_m=recipe.side_m) for row in rows}


def _view(rows: Sequence[Row], items: Mapping[str, Item], cells: Mapping[int, Cell], sensors: Iterable[Sensor]) -> View:
    """What rows of the same items are cut from; items of their own zone before those that have to be warped."""
    own = [cells[row["row"]] for row in rows]
    looks = []
    for sensor in sensors:
        members = [items[name] for name in rows[0][f"{sensor}_items"]]
        members.sort(key=lambda item: (item.epsg != own[0].epsg, item.datetime, item.id))
        looks.append(Acquisition(sensor=sensor, items=tuple(members)))
    window = Window(epsg=own[0].epsg, bounds=cells_bounds(own), square_m=own[0].side_m)
    return View(window=window, looks=tuple(looks))


def _cut(array: NDArray[Any], name: str, window: Window, cell: Cell) -> NDArray[Any]:
    """A copy of the cell's part of an array over a window, `(..., y, x)`."""
    return np.ascontiguousarray(_part(array, name, window, cell))


def _part(array: NDArray[Any], name: str, window: Window, cell: Cell) -> NDArray[Any]:
    """The cell's part of an array over a window."""
    resolution = RESOLUTION_M.get(name, 10)
    left, _, right, top = cell.bounds
    row, column = round((window.bounds[3] - top) / resolution), round((left - window.bounds[0]) / resolution)
    side = round((right - left) / resolution)
    return array[..., row : row + side, column : column + side]


def _judged(row: Row, seen: Screening, chip: ChipArrays | None) -> LedgerRow:
    columns = seen.as_columns()
    if chip is None:
        return _ledger_row(row, status="rejected", reason=seen.reason, **columns)
    return _ledger_row(row, status="written", **columns)


def _ledger_row(row: Row, *, status: str, reason: str = "", error: str = "", **more: Any) -> LedgerRow:
    named = {name: row[name] for name in FROM_MANIFEST}
    return {**named, "status": status, "reason": reason, "error": error, **more}
