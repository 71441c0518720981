"""pretrain as a user runs it: real Ray Train with two workers on a real store."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from jobs.pretrain import Pretrain, main
from jobs.support.encoder import check_units
from jobs.support.failures import failures
from jobs.support.job import JobError
from jobs.support.pretraining import TrainingPlan, normalisation_of, pooled_statistics, read_losses
from jobs.support.settings import parse
from model.croma import TINY
from model.normalisation import SSL4EO_S12
from model.pretrained import load, restore
from pipeline.fed_chips import Feed
from pipeline.grid import Cell
from pipeline.objects import Objects
from pipeline.store import Store, StoreError
from pipeline.versions import latest_sealed
from tests.sample_chips import LAYOUT, make_chip
from tests.small_stores import Candidate, write_model, write_store

pytestmark = [
    # Ray's own settings object warns about its own fields when it is copied.
    pytest.mark.filterwarnings("ignore:.* is deprecated:Warning:ray.data.context"),
    pytest.mark.filterwarnings("ignore:.* is deprecated:Warning:ray.data._internal"),
]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stores") / "chips.zarr"
    splits = ["train"] * 9 + ["test", "buffer"]
    cells = [Cell(epsg=32633, column=100 + n, row=2000, side_m=240) for n in range(len(splits))]
    candidates = [Candidate(cell=cell, split=split) for cell, split in zip(cells, splits, strict=True)]
    version = write_store(str(folder), LAYOUT, candidates, make_chip, request={"test": 1}, statistics=True)
    assert version.state == "sealed"
    return folder


def settings(store: Path, out: Path, **more: object) -> Pretrain:
    values = {"store": store, "out": out, "size": "tiny", "epochs": 2, "crop_px": 24, "global_batch": 4, **more}
    return parse(Pretrain, [f"{key}={value}" for key, value in values.items()])


@pytest.mark.slow
@pytest.mark.usefixtures("small_cluster")
def test_two_workers_train_and_the_same_command_goes_on(store: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    main(settings(store, out, num_workers=2, cpus_per_worker=0.5, crops_per_chip=2))
    steps = read_losses(Objects.at(out))
    seen = [step["samples"] for step in steps]
    # Of two epochs of 18 samples: what is no whole batch of the first begins the second.
    assert seen == [4 * (n + 1) for n in range(9)]
    assert {step["epoch"] for step in steps} == {0, 1}
    # Over both workers: of the four samples of a global batch, from three shards.
    assert all(1 <= step["shards"] <= 3 for step in steps)
    assert "Chips of the test split" in (out / "report.html").read_text()
    with (out / "model.safetensors").open("rb") as file:
        croma, normalisation = restore(load(file))
    assert normalisation.source.startswith("training chips of")
    before = {name: value.clone() for name, value in croma.state_dict().items()}

    # Complete: nothing is done again.
    main(settings(store, out, num_workers=2, cpus_per_worker=0.5, crops_per_chip=2))
    assert read_losses(Objects.at(out)) == steps

    # As if the run had been killed after its last checkpoint: it ends with the same weights, without another step.
    (out / "model.safetensors").unlink()
    main(settings(store, out, num_workers=2, cpus_per_worker=0.5, crops_per_chip=2))
    with (out / "model.safetensors").open("rb") as file:
        again = restore(load(file))[0].state_dict()
    assert all(torch.equal(before[name], again[name]) for name in before)
    assert read_losses(Objects.at(out)) == steps

    with pytest.raises(JobError, match=r"holds another run: learning_rate"):
        main(settings(store, out, num_workers=2, cpus_per_worker=0.5, crops_per_chip=2, learning_rate=0.5))


def test_what_cannot_be_trained_on_is_refused_before_anything_starts(store: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no store at"):
        main(settings(tmp_path / "nothing.zarr", tmp_path / "run"))
    with pytest.raises(ValueError, match=r"crop_px=2400 is larger"):
        main(settings(store, tmp_path / "run", crop_px=2400))
    with pytest.raises(ValueError, match="global_batch=4 is no multiple of num_workers=3"):
        main(settings(store, tmp_path / "run", num_workers=3))
    with pytest.raises(JobError, match="fewer than one global batch"):
        main(settings(store, tmp_path / "run", global_batch=4096))
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def other_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Level-1C images and GRD radar."""
    layout = replace(LAYOUT, optical_level="l1c", radar_product="sigma0_grd")
    url = tmp_path_factory.mktemp("stores") / "chips.zarr"
    candidates = [Candidate(cell=Cell(epsg=32633, column=100 + n, row=2000, side_m=240)) for n in range(4)]
    write_store(str(url), layout, candidates, lambda row: make_chip(row, layout), request={}, statistics=True)
    return url


def test_statistics_of_another_level_are_refused_before_anything_starts(other_store: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="level l1c were given where l2a is expected"):
        main(settings(other_store, tmp_path / "run", normalisation="ssl4eo-s12"))
    assert not (tmp_path / "run").exists()
    main(settings(other_store, tmp_path / "run", normalisation="store", dry_run="true"))


def test_statistics_of_a_store_are_in_its_own_units_and_of_its_level(store: Path, other_store: Path) -> None:
    for url, unit, level in ((store, "gamma0 dB", "l2a"), (other_store, "sigma0 dB", "l1c")):
        feed = Feed(url=str(url), version=1, crop_px=24, global_batch=2)
        plan = TrainingPlan(settings={"normalisation": "store"}, feed=feed, num_samples=4)
        taken = normalisation_of(plan, Objects.at("nothing is read here"))
        assert (taken.radar.unit, taken.level) == (unit, level)
        check_units(Store.open(url).layout, taken)


def test_statistics_of_chips_pool_to_those_of_all_their_pixels(store: Path) -> None:
    chips = latest_sealed(str(store)).chips()
    mean, std = pooled_statistics(chips)
    rows = [row for row in chips.to_pylist() if row["status"] == "written" and row["split"] == "train"]
    assert mean[0] == pytest.approx(sum(row["mean"][0] for row in rows) / len(rows), rel=1e-5)
    second = sum(row["std"][0] ** 2 + row["mean"][0] ** 2 for row in rows) / len(rows)
    assert std[0] == pytest.approx((second - mean[0] ** 2) ** 0.5, rel=1e-4)


@pytest.mark.usefixtures("small_cluster")
def test_workers_that_leave_no_cpu_to_read_are_refused_at_once(store: Path, tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"num_workers=2 with cpus_per_worker=1 leave none of this machine's 2 CPUs"):
        main(settings(store, tmp_path / "run", num_workers=2))


@pytest.mark.slow
@pytest.mark.usefixtures("small_cluster")
def test_every_way_of_training_ends_in_a_model(tmp_path: Path) -> None:
    larger = replace(LAYOUT, side_px=48)
    cells = [Cell(epsg=32633, column=100 + n, row=2000, side_m=480) for n in range(8)]
    candidates = [Candidate(cell=cell, split="train") for cell in cells]
    url = tmp_path / "chips.zarr"
    write_store(str(url), larger, candidates, lambda row: make_chip(row, larger), request={}, statistics=True)
    how = {
        "scale_augmentation": "true",
        "micro_batch": 2,
        "recompute_activations": "true",
        "shared_masks": "true",
        "max_logit_scale": 4.6,
        "objective.target_statistics": "per_sensor",
        "objective.joint_self_bias": "cross",
        "objective.gathered_gradient": "false",
        "compile": "aot_eager",
        "epochs": 1,
    }
    out = tmp_path / "run"
    given = write_model(tmp_path / "given.safetensors", config=TINY).state_dict()
    main(settings(url, out, **how, ema_decay=0.9, from_weights=tmp_path / "given.safetensors"))
    assert len(read_losses(Objects.at(out))) == 2
    with (out / "model.safetensors").open("rb") as file:
        croma, normalisation = restore(load(file))
    # Two steps at low rates from the weights that were given, and scaled as for those.
    assert normalisation == SSL4EO_S12
    assert all(torch.allclose(value, given[name], atol=1e-3) for name, value in croma.state_dict().items())
    assert Objects.at(out).get_json("request.json")["from_weights"].endswith("given.safetensors")
    item = json.loads((out / "model.stac.json").read_text())
    assert item["properties"]["mlm:name"] == "CROMA tiny"
    with pytest.raises(ValueError, match=r"crop_px=48, with scale_augmentation 72 px, is larger"):
        main(settings(url, out, **{**how, "crop_px": 48}))


@pytest.mark.slow
@pytest.mark.usefixtures("small_cluster")
def test_weights_that_run_away_end_a_run_at_once_with_the_chips_and_what_to_do(store: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    how = {"learning_rate": 1e38, "warmup_fraction": 0, "on_nonfinite": "skip", "max_skipped_steps": 1}
    with pytest.raises(
        JobError, match=r"not finite on rank 0 in the step to 12 samples, after 1 that were skipped"
    ) as end:
        main(settings(store, out, **how, checkpoint_every_samples=8))
    assert "(cell 33N_0" in str(end.value)
    assert "a lower learning_rate" in str(end.value)
    steps = read_losses(Objects.at(out))
    assert [(step["samples"], step.get("skipped", 0)) for step in steps] == [(4, 0), (8, 1)]
    records = [Objects.at(out).get_json(path) for path in Objects.at(out).list("nonfinite")]
    assert [(each["samples"], len(each["chips"])) for each in records] == [(8, 4), (12, 4)]
    # No worker was started again for it.
    assert failures(Objects.at(out)) == []


def test_an_objective_without_any_weight_is_refused(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        settings(store, tmp_path, **{"objective.contrastive_weight": 0, "objective.reconstruction_weight": 0})
    assert "both weights are 0" in capsys.readouterr().err
