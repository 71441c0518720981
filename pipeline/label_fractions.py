"""What a label collection has over many cells, roughly: a hundred points of each, from the maps' overviews."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
import ray
import shapely
from numpy.typing import NDArray

from pipeline.antimeridian import within_180
from pipeline.broker import AccessSpec, access_for
from pipeline.grid import Cell
from pipeline.ingest import on_cluster
from pipeline.labels import LABEL_MISSING
from pipeline.reader import Window, reader_named

Maps = Sequence[tuple[str, bytes]]
"""(unsigned href of a map, footprint as WKB in longitude/latitude)."""

_POINTS_PER_SIDE: Final = 10
_CELLS_PER_TASK: Final = 64


def class_fractions(cells: Sequence[Cell], maps: Maps, classes: Sequence[int], spec: AccessSpec) -> NDArray[np.float64]:
    """(cell, class) fractions of each cell that are of each class; zeros where no map has data.

    Args:
        cells: Of any zones.
        maps: Of one label collection.
        classes: Codes, in the order of the second axis.
        spec: How the archive may be reached; read side by side on the Ray cluster if this process is part of one.

    Raises:
        ReadError: A map could not be read.
    """
    fractions = np.zeros((len(cells), len(classes)))
    starts = range(0, len(cells), _CELLS_PER_TASK)
    for start, part in _parts(cells, maps, classes, spec, starts):
        fractions[start : start + len(part)] = part
    return fractions


def _parts(
    cells: Sequence[Cell], maps: Maps, classes: Sequence[int], spec: AccessSpec, starts: Sequence[int]
) -> Iterator[tuple[int, NDArray[np.float64]]]:
    if len(starts) <= 1 or not ray.is_initialized():
        for start in starts:
            yield start, _read(cells[start : start + _CELLS_PER_TASK], maps, classes, spec)
        return

    def work(start: int) -> dict[str, Any]:
        part = _read(cells[start : start + _CELLS_PER_TASK], maps, classes, spec)
        return {"start": start, "part": part.tolist()}

    for row in on_cluster(work, starts):
        yield int(row["start"]), np.array(row["part"].tolist())


def _read(cells: Sequence[Cell], maps: Maps, classes: Sequence[int], spec: AccessSpec) -> NDArray[np.float64]:
    reader = reader_named("window", access_for(spec))
    outlines = shapely.from_wkb([footprint for _, footprint in maps])
    fractions = np.zeros((len(cells), len(classes)))
    for number, cell in enumerate(cells):
        hrefs = [
            maps[place][0]
            for place in np.flatnonzero(shapely.intersects(outlines, within_180(cell.footprint))).tolist()
        ]
        if hrefs:
            window = Window(epsg=cell.epsg, bounds=cell.bounds)
            seen = reader.labels(hrefs, window, missing=LABEL_MISSING, resolution_m=cell.side_m // _POINTS_PER_SIDE)
            fractions[number] = [np.mean(seen == code) for code in classes]
    return fractions
