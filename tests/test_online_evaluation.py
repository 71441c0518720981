"""Checkpoints probed while pretraining goes on: beside it, whatever becomes of it, and through a lost driver."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import ray
import torch
from mlflow import MlflowClient
from numpy.testing import assert_allclose
from ray.train import Checkpoint

from jobs.pretrain import Pretrain, main
from jobs.support import checkpoint_scores, training_loop
from jobs.support.checkpoint_scores import (
    ScoringPlan,
    as_keywords,
    embed_windows,
    evaluate_checkpoint,
    initial_model,
    read_scores,
)
from jobs.support.encoder import encode
from jobs.support.job import JobError
from jobs.support.online_evaluation import OnlineEvaluation, check_evaluation
from jobs.support.pretraining import read_losses
from jobs.support.score_curves import newest_scores, points_of, score_curves
from jobs.support.settings import parse
from jobs.support.training_loop import checkpoint_name, evaluation_due
from model.croma import CONFIGS, CromaPretraining, Objective
from model.normalisation import SSL4EO_S12
from pipeline.fed_chips import Feed
from pipeline.grid import Cell
from pipeline.objects import Objects
from pipeline.statistics import band_moments
from pipeline.store import Store
from tests import test_evaluate as labelled
from tests.conftest import ROOT
from tests.sample_chips import LAYOUT, make_chip
from tests.small_stores import SMALL, Candidate, write_store

pytestmark = [
    # Ray's own settings object warns about its own fields when it is copied.
    pytest.mark.filterwarnings("ignore:.* is deprecated:Warning:ray.data.context"),
    pytest.mark.filterwarnings("ignore:.* is deprecated:Warning:ray.data._internal"),
]

EPOCH, BATCH, EPOCHS = 8, 4, 3
PLACE = ("row", "y_px", "x_px")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What is trained on."""
    url = str(tmp_path_factory.mktemp("stores") / "chips.zarr")
    cells = [Cell(epsg=32633, column=100 + n, row=2000, side_m=240) for n in range(EPOCH)]
    write_store(url, LAYOUT, [Candidate(cell=cell) for cell in cells], make_chip, request={}, statistics=True)
    return url


def write_labelled(url: Path) -> str:
    """What is evaluated on."""
    cells = zip(labelled.cells(len(labelled.SPLITS)), labelled.SPLITS, strict=True)
    candidates = [Candidate(cell=cell, split=split) for cell, split in cells]
    write_store(str(url), labelled.LAYOUT, candidates, labelled.chip_of, request={"splits": {"block_cells": 1}})
    return str(url)


@pytest.fixture(scope="module")
def probed(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_labelled(tmp_path_factory.mktemp("stores") / "labelled.zarr")


def run(store: str, probed: str, out: str, **more: Any) -> None:
    values = {
        "store": store,
        "out": out,
        "run_dir": out,
        "size": "tiny",
        "epochs": EPOCHS,
        "crop_px": 24,
        "global_batch": BATCH,
        "cpus_per_worker": 0.5,
        "keep_checkpoints": 1,
        "evaluate.store": probed,
        "evaluate.label": "cover",
        "evaluate.window_px": 24,
        "evaluate.neighbours": 5,
        "evaluate.num_cpus": 0.5,
        **more,
    }
    main(parse(Pretrain, [f"{key}={value}" for key, value in values.items()]))


@pytest.mark.parametrize(
    ("every", "expected"), [(None, [12, 24, 36, 48]), (24, [24, 48]), (20, [24, 48]), (30, [36, 48]), (1000, [48])]
)
def test_a_checkpoint_is_evaluated_where_a_multiple_was_passed_and_at_the_end(
    every: int | None, expected: list[int]
) -> None:
    plan = {"evaluate": {"every_samples": every}}
    assert [seen for seen in range(12, 49, 12) if evaluation_due(seen, seen - 12, 48, plan)] == expected
    assert not evaluation_due(48, 36, 48, {"evaluate": None})


def test_places_that_are_trained_on_are_refused(store: str, probed: str, tmp_path: Path) -> None:
    feed = Feed(url=store, version=1, crop_px=24, global_batch=BATCH)
    asked = OnlineEvaluation(store=probed, label="cover")
    assert check_evaluation(OnlineEvaluation(), feed) is None
    version = check_evaluation(asked, feed)
    assert version is not None
    assert version.number == 1
    # The store that is trained on has val and test splits of its own.
    assert check_evaluation(asked, Feed(url=probed, version=1, crop_px=24, global_batch=BATCH)) is not None
    with pytest.raises(JobError, match=r"are trained on in .* \(split test\)"):
        check_evaluation(asked, Feed(url=probed, version=1, split="test", crop_px=24, global_batch=BATCH))
    with pytest.raises(JobError, match=r"has no label='worldcover' \(it has: cover\)"):
        check_evaluation(asked.model_copy(update={"label": "worldcover"}), feed)

    def elsewhere(name: str, columns: list[int], layout: Any = LAYOUT, split: str = "val") -> OnlineEvaluation:
        cells = [Cell(epsg=32633, column=column, row=2000, side_m=240) for column in columns]
        candidates = [Candidate(cell=cell, split=split) for cell in cells]
        write_store(str(tmp_path / name), layout, candidates, lambda row: make_chip(row, layout), request={})
        return OnlineEvaluation(store=str(tmp_path / name), label="worldcover")

    with pytest.raises(JobError, match=r"2 cells of .* that are val or test, .* are trained on"):
        check_evaluation(elsewhere("both", [106, 107, 108, 109]), feed)
    assert check_evaluation(elsewhere("taught", [106, 107], split="train"), feed) is not None
    assert check_evaluation(elsewhere("beside", [108, 109]), feed) is not None
    with pytest.raises(JobError, match="radar_product sigma0_grd, the store that is trained on gamma0_rtc"):
        check_evaluation(elsewhere("grd", [108], replace(LAYOUT, radar_product="sigma0_grd")), feed)


def test_the_weights_at_0_samples_are_those_that_training_begins_with(tmp_path: Path) -> None:
    torch.manual_seed(7)
    begun = training_loop._new_model({"size": "tiny"})
    trained = CromaPretraining(CONFIGS["tiny"], Objective())
    state = torch.get_rng_state()
    fresh = initial_model(trained, seed=7, out=Objects.at(str(tmp_path)))
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in begun.croma.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value)


def plan_of(out: Path, probed: str, **more: Any) -> ScoringPlan:
    values = {
        "out": str(out), "store": probed, "windows": "evaluation/windows.parquet", "window_px": 24, "group_cells": 1,
        "neighbours": 5, "batch_size": 7, "seed": 0, "num_cpus": 0.5, "num_gpus": 0.0, "timeout_s": 60.0,
    }  # fmt: skip
    return ScoringPlan(**{**values, **more})


def kept_windows() -> pa.Table:
    """All windows of the labelled store, as `jobs.support.evaluation.choose_windows` has them."""
    cells = [cell.id for cell in labelled.cells(len(labelled.SPLITS))]
    places = [
        {"row": row, "y_px": y, "x_px": x, "code": labelled.CODES[labelled.window_class(row, 2 * (y > 0) + (x > 0))],
         "status": "kept", "cell": cells[row], "split": split}
        for row, split in enumerate(labelled.SPLITS) if split != "buffer" for y in (0, 24) for x in (0, 24)
    ]  # fmt: skip
    return pa.Table.from_pylist([{"window": number, **place} for number, place in enumerate(places)])


def test_windows_are_encoded_as_the_model_does(probed: str, tmp_path: Path) -> None:
    opened, kept = Store.open(probed), kept_windows().filter(pc.not_equal(pc.field("row"), 3))
    torch.manual_seed(0)
    croma = CromaPretraining(SMALL).croma.eval()
    found = embed_windows(opened, kept, {"a": croma}, SSL4EO_S12, plan_of(tmp_path, probed), bfloat16=False)
    assert [(each.source, each.kind) for each in found] == [
        ("a", "optical"), ("a", "radar"), ("a", "joint"), ("band statistics", "both"),
    ]  # fmt: skip
    images = [opened.read_window(*place, 24) for place in zip(*(kept[n].to_pylist() for n in PLACE), strict=True)]
    batch = {name: np.stack([image[name] for image in images]) for name in ("b10", "b20", "b60", "radar")}
    expected = encode(croma, SSL4EO_S12, batch)
    for each in found[:3]:
        assert_allclose(each.vectors, expected[f"{each.kind}_embedding"], atol=2e-5)
    assert_allclose(found[3].vectors[5], np.concatenate(band_moments(images[5])), rtol=1e-5)


def tasks() -> dict[str, Any]:
    """What may happen in place of an evaluation; made here, so that they travel whole."""

    def dies(checkpoint: Checkpoint, plan: ScoringPlan) -> None:
        os._exit(1)

    def waits(checkpoint: Checkpoint, plan: ScoringPlan) -> None:
        time.sleep(600)

    return {"dies": dies, "waits": waits, "finds nothing": checkpoint_scores._score}


@pytest.mark.slow
@pytest.mark.usefixtures("small_cluster")
@pytest.mark.parametrize(
    ("task", "timeout_s", "error"),
    [
        ("dies", 300.0, "WorkerCrashedError"),
        ("waits", 0.5, "not done within evaluate.timeout_s=0.5"),
        ("finds nothing", 300.0, "FileNotFoundError: [Errno 2] No such file"),
    ],
)
def test_an_evaluation_that_fails_is_written_down_and_not_tried_again(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    probed: str,
    task: str,
    timeout_s: float,
    error: str,
) -> None:
    monkeypatch.setattr(checkpoint_scores, "_score", tasks()[task])
    folder = tmp_path / "train" / checkpoint_name(24)
    folder.mkdir(parents=True)
    keywords = as_keywords(plan_of(tmp_path, probed, timeout_s=timeout_s))
    for _ in range(2):
        assert evaluate_checkpoint(Checkpoint.from_directory(str(folder)), **keywords) == {}
    (scores,) = read_scores(Objects.at(tmp_path))
    assert scores["samples"] == 24
    assert scores["error"].startswith(error)
    assert caplog.text.count("the checkpoint at 24 samples was not evaluated") == 1


@pytest.mark.slow
@pytest.mark.usefixtures("small_cluster")
def test_checkpoints_whose_evaluation_was_lost_with_the_driver_are_evaluated_on_resume_and_tracking_goes_on(
    store: str, probed: str, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    address = ray.get_runtime_context().gcs_address
    # CPUs that are not there: all checkpoints wait for their evaluation, until the driver dies.
    more = {"ray_address": address, "evaluate.num_cpus": 64, "mlflow.enabled": "true"}
    code = f"from tests.test_online_evaluation import run; run({store!r}, {probed!r}, {str(out)!r}, **{more!r})"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    snapshot = out / "train" / "checkpoint_manager_snapshot.json"
    last = checkpoint_name(EPOCH * EPOCHS)
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment) as driver:
        while driver.poll() is None and not (snapshot.exists() and last in snapshot.read_text()):
            time.sleep(0.1)
        assert driver.poll() is None, "the run ended before its driver could be killed"
        driver.kill()
    steps = read_losses(Objects.at(out))
    assert [step["samples"] for step in steps] == [BATCH * (n + 1) for n in range(EPOCH * EPOCHS // BATCH)]
    assert not (out / "scores").exists()
    run_id = Objects.at(out).get_json("mlflow.json")["run_id"]

    run(store, probed, str(out), **{"mlflow.enabled": "true"})
    scores = read_scores(Objects.at(out))
    # More than keep_checkpoints: those that wait are kept.
    assert [each["samples"] for each in scores] == [0, 8, 16, 24]
    assert read_losses(Objects.at(out)) == steps
    kinds = {(row["source"], row["kind"], row["probe"]) for row in scores[0]["scores"]}
    assert {("untrained", kind, probe) for kind in ("optical", "radar", "joint") for probe in ("knn", "linear")} < kinds
    assert ("band statistics", "both", "linear") in kinds
    assert len(points_of(scores, kind="joint", probe="knn")) == 4
    assert json.loads((out / "run.json").read_text())["results"]["scores"] == scores[-1]
    page = (out / "report.html").read_text()
    assert "Probes on held-out labels" in page
    assert "was not evaluated" not in page

    client = MlflowClient(tracking_uri=f"sqlite:///{out}/mlflow.db")
    assert Objects.at(out).get_json("mlflow.json")["run_id"] == run_id
    assert client.get_run(run_id).info.status == "FINISHED"
    assert client.get_run(run_id).data.params["epochs"] == str(EPOCHS)
    losses = client.get_metric_history(run_id, "loss")
    assert [(metric.step, metric.value) for metric in losses] == [(step["samples"], step["loss"]) for step in steps]
    known = client.get_metric_history(run_id, "linear/joint/balanced_accuracy")
    assert [metric.step for metric in known] == [0, 8, 16, 24]
    assert {artifact.path for artifact in client.list_artifacts(run_id)} == {"report.html", "model.stac.json"}

    # Asked differently, the scores would not be comparable.
    (out / "model.safetensors").unlink()
    with pytest.raises(JobError, match="scores of another evaluation: neighbours: 5 -> 6"):
        run(store, probed, str(out), **{"evaluate.neighbours": 6})


@pytest.mark.slow
@pytest.mark.usefixtures("small_cluster")
def test_training_goes_on_where_evaluation_fails_and_mlflow_is_away(
    store: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out, probed = tmp_path / "run", write_labelled(tmp_path / "labelled.zarr")
    for file in (tmp_path / "labelled.zarr" / "b10" / "c").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:100])
    uri = "http://somebody:verysecret@127.0.0.1:9"
    with caplog.at_level(logging.INFO):
        run(store, probed, str(out), epochs=1, **{"mlflow.tracking_uri": uri})
    assert (out / "model.safetensors").is_file()
    (scores,) = read_scores(Objects.at(out))
    assert scores["samples"] == EPOCH
    assert "The checkpoint at 8 samples was not evaluated" in (out / "report.html").read_text()
    assert newest_scores([scores]) is score_curves([scores]) is None
    assert "MLflow was not brought up to date" in caplog.text
    assert "verysecret" not in caplog.text
    for file in out.rglob("*"):
        assert not file.is_file() or b"verysecret" not in file.read_bytes(), file
