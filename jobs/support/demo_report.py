"""The demo's one page: what was built, what was learnt, what came out; self-contained, to be opened from a file."""

from __future__ import annotations

import base64
from collections import Counter
from dataclasses import dataclass
from typing import Any

import jinja2
import numpy as np
import pyarrow.compute as pc

from jobs.support import pictures
from jobs.support.evaluation_report import score_tables
from jobs.support.pretraining import read_losses
from pipeline.grid import PIXEL_M, Cell
from pipeline.objects import Objects
from pipeline.store import Store
from pipeline.types import ChipArrays
from pipeline.versions import Version, latest_sealed

_GALLERY = 6


@dataclass(frozen=True, kw_only=True)
class DemoOutputs:
    """Where the four jobs left their results."""

    store: str
    run: str
    evaluation: str
    embeddings: str


def write_report(outputs: DemoOutputs, out: Objects) -> str:
    """Write report.html from what the jobs left; returns where it is."""
    version = latest_sealed(outputs.store)
    page = (
        _environment()
        .get_template("demo.html.j2")
        .render(
            **_dataset(version),
            **_training(Objects.at(outputs.run)),
            evaluation=score_tables(Objects.at(outputs.evaluation).get_json("metrics.json")),
            **_map(Objects.at(outputs.embeddings)),
            outputs=outputs,
        )
    )
    out.put("report.html", page.encode())
    return f"{out.url}/report.html"


def _dataset(version: Version) -> dict[str, Any]:
    store = Store.open(version.url)
    side_m = store.layout.side_px * PIXEL_M
    chips, manifest = version.chips(), version.manifest()
    written = chips.filter(pc.equal(chips["status"], "written"))
    per_cell = Counter(Cell.from_id(cell, side_m=side_m) for cell in written["cell"].to_pylist())
    asked = {Cell.from_id(cell, side_m=side_m) for cell in manifest["cell"].to_pylist()}
    dt_s = manifest.filter(pc.is_in(manifest["row"], value_set=written["row"].combine_chunks()))["dt_s"].to_pylist()
    gallery, label = _gallery(store, written["row"].to_pylist(), written["cell"].to_pylist())
    return {
        "ledger": version.sealed,
        "not_taken": dict(Counter(version.rejections()["reason"].to_pylist()).most_common()),
        "num_cells": len(per_cell),
        "splits": dict(Counter(written["split"].to_pylist()).most_common()),
        "coverage": _inline(pictures.coverage(per_cell, sorted(asked - set(per_cell)))),
        "days": _inline(pictures.histogram_days(dt_s)),
        "gallery": _inline(pictures.chip_gallery(gallery, label=label)),
    }


def _gallery(store: Store, rows: list[int], cells: list[str]) -> tuple[list[tuple[str, ChipArrays]], str | None]:
    """Some chips, evenly from first to last."""
    chosen = np.unique(np.linspace(0, len(rows) - 1, _GALLERY).round().astype(int)).tolist()
    label = next((f"label_{name}" for name in store.layout.labels), None)
    return [(cells[i], store.read_chip(rows[i])) for i in chosen], label


def _training(run: Objects) -> dict[str, Any]:
    steps = read_losses(run)
    return {"losses": _inline(pictures.loss_curves(steps)), "last_step": steps[-1], "num_steps": len(steps)}


def _map(embeddings: Objects) -> dict[str, Any]:
    names = [name for name in embeddings.list() if name.startswith("pca-") and name.endswith(".png")]
    maps = {name.removeprefix("pca-").removesuffix(".png"): _inline(embeddings.get(name)) for name in names}
    return {"maps": maps, "pca": embeddings.get_json("pca.json")}


def _inline(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _environment() -> jinja2.Environment:
    return jinja2.Environment(loader=jinja2.PackageLoader("jobs.support"), autoescape=True, trim_blocks=True)
