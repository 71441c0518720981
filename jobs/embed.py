"""Embed a region and period: a row per cell in GeoParquet, and a map of patch encodings every 80 m.

Builds the region's chips first, one pair of looks per cell. Run the same command again to complete what is missing.

Example:
    ray job submit --working-dir . -- python jobs/embed.py \
        model=s3://bucket/runs/base/model.safetensors region=region.geojson period=2023-07 out=s3://bucket/embeddings/2023-07
"""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any, Final

from jobs.support.cell_choice import Wanted
from jobs.support.coverage import EMBEDDED, coverage
from jobs.support.dry_run import say_plan
from jobs.support.embedding import (
    coverage_file,
    embed_chips,
    embeddings_file,
    open_maps,
    write_maps,
    written_chips,
)
from jobs.support.encoder import Inference, LoadedModel, ModelSource, check_units, load_model
from jobs.support.job import JobError, connect, run_job
from jobs.support.region_build import build_store
from jobs.support.region_settings import RegionBuild, content_request
from jobs.support.run_record import RunRecord, recorded
from pipeline.canonical import differences
from pipeline.grid import PIXEL_M, Cell, cells_covering
from pipeline.objects import Objects
from pipeline.quiet import quiet_data
from pipeline.regions import parse_period, parse_region
from pipeline.splits import SplitRules
from pipeline.store import Store
from pipeline.versions import Version

log = logging.getLogger("embed")

_DONE = "embeddings.json"
"""Written last: where it is, everything else is complete."""

# One pair per cell, and every cell that touches the region, so that zones overlap rather than leave slivers.
_WANTED: Final = Wanted(
    per_cell="one",
    owners_only=False,
    splits=SplitRules(block_cells=16, val_fraction=0, test_fraction=0, buffer_cells=0, seed=0),
)


class Embed(RegionBuild):
    """Embed a region and period: a row per cell in GeoParquet, and a map of patch encodings every 80 m."""

    model: str
    """The model.safetensors that pretrain wrote, or released CROMA weights (the official file or torchgeo's): a path or
    s3://, az://, gs://."""

    out: str
    """Directory for the chips, embeddings.parquet, coverage.parquet and the maps."""

    inference: Inference = Inference(batch_size=8)
    """How the model is run; an image is a whole chip."""


def main(settings: Embed) -> None:
    """Build the region's chips, run the model over them, write what it says."""
    model = load_model(settings.model)
    patch_px = model.croma.config.patch_px
    if settings.side_px % patch_px:
        raise ValueError(
            f"side_px={settings.side_px} is no multiple of the model's patch, {patch_px} px: chips of 264 or 120 px are"
        )
    period = parse_period(settings.period)
    cells = cells_covering(parse_region(settings.region), side_m=settings.side_px * PIXEL_M, owners_only=False)
    out, request = Objects.at(settings.out), {**chips_request(settings), "model_sha256": model.sha256}
    done = _done(out, request)
    chips = f"{out.url}/chips.zarr"
    if settings.dry_run and not done:
        directory = settings.directory_for(settings.out)
        say_plan(settings, chips, chips_request(settings), _WANTED, directory=directory)
        _say_estimate(len(cells), settings, model)
        return
    if settings.dry_run:
        log.info("%s is complete already: nothing to do", settings.out)
        return
    with recorded(settings, job="embed", output=settings.out) as record:
        record.inputs["model"] = {"url": settings.model, "sha256": model.sha256}
        if done:
            log.info("%s is complete already: nothing to do", settings.out)
            record.results.update(reused=True, **done["counts"])
            return
        version = build_store(settings, chips, chips_request(settings), _WANTED, record)
        check_units(Store.open(version.url).layout, model.normalisation)
        about = {
            "model_sha256": model.sha256,
            "dataset": f"{settings.out.rstrip('/')}/chips.zarr",
            "dataset_version": version.number,
            "period": [moment.isoformat() for moment in period],
        }
        counts = _write_coverage(out, cells, version, about)
        names = sorted(["coverage.parquet", *_embed(settings, out, version, model, record, about)])
        # Last: where it is, everything else is complete.
        out.put_json(_DONE, {**about, "request": request, "counts": counts, "files": names})
        record.outputs.update({name: f"{out.url}/{name}" for name in names})
        record.results.update(reused=False, **counts)
        log.info("%s: %s", settings.out, counts)


def _embed(
    settings: Embed, out: Objects, version: Version, model: LoadedModel, record: RunRecord, about: dict[str, Any]
) -> list[str]:
    """Run the model and write all files but the coverage; returns their names."""
    store, chips = Store.open(version.url), written_chips(version)
    side_m = settings.side_px * PIXEL_M
    connect(settings)
    quiet_data()
    cells = [Cell.from_id(cell, side_m=side_m) for cell in chips["cell"].to_pylist()]
    with open_maps(cells, model) as maps:
        with record.stage("embed"), maps:
            source = ModelSource(url=settings.model, sha256=model.sha256)
            embedded = embed_chips(store, chips, source, settings.inference, maps)
        with record.stage("write"):
            period = parse_period(settings.period)
            table = embeddings_file(chips, embedded, period=period, side_m=side_m, about=about)
            out.put("embeddings.parquet", table)
            out.put_json("pca.json", {**embedded.basis.to_dict(), "model_sha256": model.sha256})
            tags = {"model_sha256": model.sha256, "period": settings.period, "what": "joint patch encodings of CROMA"}
            return ["embeddings.parquet", "pca.json", *write_maps(maps, embedded.basis, out, tags=tags)]


def _write_coverage(out: Objects, cells: list[Cell], version: Version, about: dict[str, Any]) -> dict[str, Any]:
    """Say of every cell what became of it.

    Raises:
        JobError: No cell has a chip.
    """
    table = coverage(cells, version)
    out.put("coverage.parquet", coverage_file(table, cells, about=about))
    counts = Counter(table["status"].to_pylist())
    reasons = Counter(reason for reason in table["reason"].to_pylist() if reason)
    if not counts[EMBEDDED]:
        raise JobError(f"none of {len(cells)} cells has a chip: {dict(reasons)}; see {out.url}/coverage.parquet")
    return {"requested": len(cells), **counts, "reasons": dict(reasons)}


def chips_request(settings: RegionBuild) -> dict[str, Any]:
    """The settings that decide the chips."""
    return content_request(settings, per_cell=_WANTED.per_cell, owners_only=_WANTED.owners_only)


def _done(out: Objects, request: dict[str, Any]) -> dict[str, Any] | None:
    """What a complete run of this request left; another request's is refused."""
    try:
        done = out.get_json(_DONE)
    except FileNotFoundError:
        return None
    changed = list(differences(done["request"], request))
    if changed:
        raise JobError(f"{out.url} holds another run: {'; '.join(changed)}; give another out")
    return done


def _say_estimate(num_cells: int, settings: Embed, model: LoadedModel) -> None:
    width, patch_px = model.croma.config.width, model.croma.config.patch_px
    map_mb = num_cells * (settings.side_px // patch_px) ** 2 * width * 4 / 1e6
    log.info(
        "would embed at most %d cells: about %.1f MB of embeddings and at most %.0f MB of maps",
        num_cells, num_cells * 3 * width * 2 / 1e6, map_mb,
    )  # fmt: skip


if __name__ == "__main__":
    run_job(Embed, main)
