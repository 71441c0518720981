"""The steps of embedding a region's chips: run the model, fill the maps, collect one row per chip."""

from __future__ import annotations

import logging
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from jobs.support.dense_map import DenseMaps, MapGrid, write_dense_cog, write_picture
from jobs.support.encoder import KINDS, Inference, LoadedModel, ModelSource, chips_of, encoded
from jobs.support.geoparquet import to_geoparquet, vectors_column
from jobs.support.job import progress
from jobs.support.principal import Basis, Moments, principal_basis
from pipeline.chip_table import WRITTEN
from pipeline.grid import PIXEL_M, Cell, is_owned
from pipeline.layout import MODEL_ARRAYS
from pipeline.objects import Objects
from pipeline.store import Store
from pipeline.versions import Version

log = logging.getLogger(__name__)

_FROM_MANIFEST: Final = (
    "optical_datetime", "radar_datetime", "dt_s", "orbit_state", "relative_orbit", "optical_items", "radar_items",
    "baseline",
)  # fmt: skip
_FROM_CHIPS: Final = ("valid_fraction", "cloud_fraction")
_MODEL: Final = "model"


@dataclass(frozen=True, kw_only=True)
class Embedded:
    """What came out of the model, as far as it fits into memory."""

    rows: NDArray[np.int64]
    """(chip,) ascending rows of the store."""

    vectors: dict[str, NDArray[np.float32]]
    """optical, radar and joint -> (chip, D)."""

    basis: Basis
    """Of all joint patch encodings."""


def written_chips(version: Version) -> pa.Table:
    """The chip table's rows that hold a chip, beside what the manifest knows of them; ascending by row."""
    chips = version.chips()
    chips = chips.filter(pc.equal(chips["status"], WRITTEN))
    manifest = version.manifest(columns=["row", *_FROM_MANIFEST])
    at = pc.index_in(chips["row"], value_set=manifest["row"].combine_chunks())
    found = manifest.take(at)
    for name in _FROM_MANIFEST:
        chips = chips.append_column(name, found[name])
    return chips


def embed_chips(store: Store, chips: pa.Table, source: ModelSource, inference: Inference, maps: DenseMaps) -> Embedded:
    """Run the model over whole chips; patch encodings go into the maps as they come, one chip at a time."""
    side_m = store.layout.side_px * PIXEL_M
    rows = chips["row"].to_numpy()
    cells = [Cell.from_id(cell, side_m=side_m) for cell in chips["cell"].to_pylist()]
    vectors = {kind: np.empty((len(rows), maps.width), np.float32) for kind in KINDS}
    moments = Moments(maps.width)
    images = chips_of(store.url, rows, arrays=MODEL_ARRAYS, batch_size=inference.batch_size)
    outputs = [*(f"{kind}_embedding" for kind in KINDS), "joint_encodings"]
    batches = encoded(images, {_MODEL: source}, inference, outputs=outputs, num_images=len(rows))
    for batch in progress(batches, total=len(rows), what="chips", amount=lambda b: len(b["row"])):
        places = np.searchsorted(rows, batch["row"])
        for kind in KINDS:
            vectors[kind][places] = batch[f"{_MODEL}/{kind}_embedding"]
        for place, encodings in zip(places.tolist(), batch[f"{_MODEL}/joint_encodings"], strict=True):
            maps.write(cells[place], encodings)
            moments.add(encodings)
    return Embedded(rows=rows, vectors=vectors, basis=principal_basis(moments))


@contextmanager
def open_maps(cells: Iterable[Cell], model: LoadedModel) -> Iterator[DenseMaps]:
    """Empty maps around some cells in a temporary folder of this machine, gone at the end of the ``with`` block."""
    zones: dict[int, list[Cell]] = defaultdict(list)
    for cell in cells:
        zones[cell.epsg].append(cell)
    config = model.croma.config
    grids = [MapGrid.around(of_zone, patch_px=config.patch_px) for of_zone in zones.values()]
    with tempfile.TemporaryDirectory(prefix="twinlook-") as folder:
        yield DenseMaps(Path(folder), grids, width=config.width)


def embeddings_file(
    chips: pa.Table, embedded: Embedded, *, period: tuple[datetime, datetime], side_m: int, about: dict[str, Any]
) -> bytes:
    """The GeoParquet of embeddings: one row per chip.

    Args:
        chips: From `written_chips`.
        embedded: Of these chips.
        period: Half-open, UTC.
        side_m: Side of the cells.
        about: What holds for the whole file; `model_sha256` and `dataset_version` are columns, too.
    """
    cells = [Cell.from_id(cell, side_m=side_m) for cell in chips["cell"].to_pylist()]
    moment = pa.timestamp("us", tz="UTC")
    num_rows = len(cells)
    table = pa.table(
        {
            "cell": chips["cell"],
            # A place at a zone border is in cells of both zones: those who want it once take the owned ones.
            "owned": pa.array([is_owned(cell) for cell in cells]),
            "period_start": pa.array([period[0]] * num_rows, moment),
            "period_end": pa.array([period[1]] * num_rows, moment),
            **{name: chips[name] for name in (*_FROM_MANIFEST, *_FROM_CHIPS)},
            "chip_sha256": chips["sha256"],
            "model_sha256": pa.array([about["model_sha256"]] * num_rows),
            "dataset_version": pa.array([about["dataset_version"]] * num_rows, pa.int32()),
            **{f"{kind}_embedding": vectors_column(embedded.vectors[kind]) for kind in KINDS},
        }
    )
    return to_geoparquet(table, [cell.footprint for cell in cells], about=about)


def coverage_file(table: pa.Table, cells: Sequence[Cell], *, about: dict[str, Any]) -> bytes:
    """The GeoParquet of what became of every cell."""
    return to_geoparquet(table, [cell.footprint for cell in cells], about=about)


def write_maps(maps: DenseMaps, basis: Basis, out: Objects, *, tags: dict[str, str]) -> list[str]:
    """Write a zone's encodings, its picture as a COG and as a PNG, for every zone; returns their names."""
    names = []
    for epsg, grid in maps.grids.items():
        source = maps.path(epsg)
        made = {name: source.with_name(name) for name in (f"dense-{epsg}.tif", f"pca-{epsg}.tif", f"pca-{epsg}.png")}
        dense, picture, png = made.values()
        write_dense_cog(source, dense, tags=tags)
        write_picture(source, picture, png, basis, grid)
        for name, path in made.items():
            out.put(name, path.read_bytes())
            path.unlink()
            names.append(name)
        rows, columns = grid.shape
        log.info("EPSG:%d: %d x %d tokens of %d m", epsg, rows, columns, grid.token_m)
    return names
