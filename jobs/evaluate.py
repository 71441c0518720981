"""Score a model's embeddings on labelled chips that training never saw, beside two baselines.

Example:
    ray job submit --working-dir . -- python jobs/evaluate.py \
        model=s3://bucket/runs/base/model.safetensors store=s3://bucket/labelled.zarr out=s3://bucket/evaluations/base
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import replace
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from jobs.support.encoder import Inference, LoadedModel, ModelSource, check_units, load_model
from jobs.support.evaluation import (
    check_labelled,
    check_windows,
    choose_windows,
    count_windows,
    encode_windows,
    group_side,
    probe_all,
    samples_of,
    score,
)
from jobs.support.evaluation_report import predictions_table, render_report, say_counts, say_estimate, say_scores
from jobs.support.job import JobError, connect, run_job
from jobs.support.probing import TRAINED, UNTRAINED
from jobs.support.run_record import RunRecord, recorded
from jobs.support.settings import JobSettings
from jobs.support.windows import KEPT
from pipeline.canonical import differences
from pipeline.objects import Objects
from pipeline.quiet import quiet_data
from pipeline.store import Store
from pipeline.versions import Version, latest_sealed

log = logging.getLogger("evaluate")


class Evaluate(JobSettings):
    """Score a model's embeddings on labelled chips that training never saw, beside two baselines."""

    model: str
    """The model.safetensors that pretrain wrote, or released CROMA weights (the official file or torchgeo's): a path or
    s3://, az://, gs://."""

    store: str
    """Chip store with labels and with train, val and test splits."""

    version: int | None = Field(default=None, ge=1)
    """Sealed version of the store; unset: the newest."""

    out: str
    """Directory for metrics.json, predictions.parquet and report.html."""

    label: str = "worldcover"
    """Which of the store's labels is asked for."""

    window_px: int = Field(default=120, ge=24, multiple_of=24)
    """Side of the windows that chips are cut into, each a sample, pixels of 10 m."""

    min_majority: float = Field(default=0.5, ge=0, le=1)
    """Windows whose most frequent class covers less than this fraction are left out."""

    rare_classes: Literal["refuse", "leave-out"] = "refuse"
    """What to do with classes that val or test windows show, but no train window."""

    max_windows: int | None = Field(default=None, ge=10)
    """Windows of each split, drawn at random; unset: all."""

    neighbours: int = Field(default=20, ge=1)
    """Windows of train that vote on the class of a test window, the nearest ones."""

    group_cells: int | None = Field(default=None, ge=1)
    """Side of the squares of cells that are resampled as one for the intervals, cells; unset: the split blocks'."""

    num_resamples: int = Field(default=1000, ge=100)
    """Resamples behind each interval."""

    seed: int = 0
    """Decides the untrained network's weights, the windows that are drawn and the resamples."""

    inference: Inference = Inference()
    """How the models are run."""


def main(settings: Evaluate) -> None:
    """Find the windows, embed them, probe, write the numbers and the report."""
    store, version, model = _inputs(settings)
    if settings.dry_run:
        windows = _windows(settings, store, version)
        num_kept = windows["status"].to_pylist().count(KEPT)
        say_estimate(model, num_kept, settings.window_px)
        return
    out, request = Objects.at(settings.out), _request(settings, version, model)
    metrics = _metrics_of(out, request)
    with recorded(settings, job="evaluate", output=settings.out) as record:
        record.inputs.update(store={"url": settings.store, "version": version.number}, model=model.sha256)
        reused = metrics is not None
        if metrics is None:
            metrics = _evaluate(settings, store, version, model, record)
            out.put("report.html", render_report(metrics).encode())
            # Last: where it is, the evaluation is complete.
            out.put_json("metrics.json", metrics)
        else:
            log.info("%s holds this evaluation already: nothing to do", settings.out)
        say_scores(metrics)
        record.outputs.update({name: f"{out.url}/{name}" for name in ("metrics.json", "report.html")})
        record.results.update(reused=reused, scores=metrics["scores"])


def _evaluate(
    settings: Evaluate, store: Store, version: Version, model: LoadedModel, record: RunRecord
) -> dict[str, Any]:
    """All numbers of metrics.json; writes the predictions."""
    with record.stage("find windows"):
        windows = _windows(settings, store, version)
    kept = windows.filter(pc.equal(windows["status"], KEPT))
    trained = ModelSource(url=settings.model, sha256=model.sha256)
    sources = {TRAINED: trained, UNTRAINED: replace(trained, untrained_seed=settings.seed)}
    with record.stage("embed"):
        features = encode_windows(store, kept, sources, settings.inference, window_px=settings.window_px)
    group_cells = settings.group_cells or group_side(version)
    samples = samples_of(kept, side_px=store.layout.side_px, group_cells=group_cells)
    with record.stage("probe"):
        results = probe_all(features, samples, k=settings.neighbours)
    classes = count_windows(windows, store.layout.labels[settings.label])
    predictions = predictions_table(kept, results, [row["code"] for row in classes])
    Objects.at(settings.out).put_table("predictions.parquet", predictions)
    return {
        "request": _request(settings, version, model),
        "model": settings.model,
        "store": settings.store,
        "classes": classes,
        "group_cells": group_cells,
        "windows": dict(Counter(windows["status"].to_pylist())),
        **score(results, samples, num_resamples=settings.num_resamples, seed=settings.seed),
    }


def _windows(settings: Evaluate, store: Store, version: Version) -> pa.Table:
    """All windows, said on the log; refused where they cannot be probed."""
    connect(settings)
    quiet_data()
    how = ("label", "window_px", "min_majority", "max_windows", "rare_classes", "seed")
    windows = choose_windows(store, version, **{name: getattr(settings, name) for name in how})
    classes = store.layout.labels[settings.label]
    say_counts(count_windows(windows, classes), windows)
    check_windows(windows, version, classes)
    return windows


def _inputs(settings: Evaluate) -> tuple[Store, Version, LoadedModel]:
    """What is evaluated on what; refuses what cannot be before anything starts."""
    model = load_model(settings.model)
    store = Store.open(settings.store)
    version = Version(settings.store, settings.version) if settings.version else latest_sealed(settings.store)
    if version.state != "sealed":
        raise JobError(f"{version.name} is {version.state}: build it to the end first")
    check_labelled(store, settings.label)
    patch_px = model.croma.config.patch_px
    if settings.window_px % patch_px:
        raise ValueError(f"window_px={settings.window_px} is no multiple of the model's patch, {patch_px} px")
    check_units(store.layout, model.normalisation)
    return store, version, model


def _request(settings: Evaluate, version: Version, model: LoadedModel) -> dict[str, Any]:
    """What decides the numbers: the settings, the weights, and the chips themselves."""
    elsewhere = {"dry_run", "ray_address", "run_dir", "out", "model", "store", "version", "inference"}
    chips = [(Version(version.url, number + 1).sealed or {}).get("sha256") for number in range(version.number)]
    return {**settings.model_dump(mode="json", exclude=elsewhere), "model_sha256": model.sha256, "chips_sha256": chips}


def _metrics_of(out: Objects, request: dict[str, Any]) -> dict[str, Any] | None:
    """The numbers of this very request, if they are there already; another request's are refused."""
    try:
        metrics = out.get_json("metrics.json")
    except FileNotFoundError:
        return None
    changed = list(differences(metrics["request"], request))
    if changed:
        raise JobError(f"{out.url} holds another evaluation: {'; '.join(changed)}; give another out")
    return metrics


if __name__ == "__main__":
    run_job(Evaluate, main)
