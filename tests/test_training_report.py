"""The page of a run: from what lies in its directory, self-contained, whole at any moment of the run."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch

from jobs.report import Report
from jobs.report import main as write_again
from jobs.support.curves import curves_of
from jobs.support.training_looks import LOOKS_FILE, Looks, held_out, look
from jobs.support.training_report import ReportWriter, training_page, write_training_report
from model.croma import CromaPretraining, Objective
from model.normalisation import SSL4EO_S12
from pipeline.grid import Cell
from pipeline.objects import Objects
from tests.sample_chips import LAYOUT, make_chip
from tests.small_stores import SMALL, Candidate, write_store

NORMALISATION = replace(SSL4EO_S12, source="test")
REQUEST = {"size": "tiny", "store": "chips.zarr", "version": 1, "epochs": 4, "global_batch": 8}


def steps(first: int, number: int, **more: float) -> list[dict[str, float]]:
    names = ("loss", "contrastive", "reconstruction_optical", "reconstruction_radar", "match_fraction", "temperature")
    return [
        {
            "samples": 8.0 * n, "epoch": 0.0, "waited_s": 0.5, "step_s": 1.5, "gradient_norm": 1.0,
            "learning_rate": 1e-4, **dict.fromkeys(names, 1 / n), **more,
        }
        for n in range(first, first + number)
    ]  # fmt: skip


def put(out: Objects, what: list[dict[str, float]], **more: object) -> None:
    out.put_json(f"losses/{int(what[-1]['samples']):012d}.json", {"steps": what, **more})


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    url = str(tmp_path_factory.mktemp("stores") / "chips.zarr")
    splits = ["train"] * 3 + ["val"] * 5 + ["test"] * 2
    cells = [Cell(epsg=32633, column=100 + n, row=2000, side_m=240) for n in range(len(splits))]
    candidates = [Candidate(cell=cell, split=split) for cell, split in zip(cells, splits, strict=True)]
    write_store(url, LAYOUT, candidates, make_chip, request={}, statistics=True)
    return url


def plan(store: str, out: Path) -> dict[str, object]:
    chips = {"store": store, "version": 1, "crop_px": 24, "out": str(out)}
    return {**chips, "seed": 0, "mask_fraction": 0.75, "shared_masks": False}


def test_many_steps_are_few_points_and_nothing_is_lost() -> None:
    curves = curves_of(steps(1, 1000), points=30)
    assert len(curves.samples) == 30
    assert curves.samples[-1] == 8000
    assert curves.most["loss"][0] == 1
    assert curves.least["loss"][-1] == pytest.approx(1 / 1000)
    assert curves.hours[-1] == pytest.approx(2000 / 3600)
    assert curves.samples_per_s == pytest.approx(np.full(30, 4.0))
    assert curves.waited_share == pytest.approx(np.full(30, 0.25))
    assert len(curves_of(steps(1, 1)).samples) == 1


def test_steps_that_were_done_again_count_once_as_they_were_done_last() -> None:
    again = steps(3, 2, loss=9.0)
    curves = curves_of([*steps(1, 4), *again])
    assert curves.samples.tolist() == [8, 16, 24, 32]
    assert curves.mean["loss"].tolist() == [1, 0.5, 9, 9]


def test_a_page_can_be_written_at_any_moment_and_needs_nothing_else(store: str, tmp_path: Path) -> None:
    out = Objects.at(tmp_path / "run")
    with pytest.raises(FileNotFoundError):
        training_page(out)
    out.put_json("request.json", REQUEST)
    with pytest.raises(FileNotFoundError, match="no losses yet"):
        training_page(out)
    put(out, steps(1, 3))
    page = training_page(out)
    assert "24" in page
    assert "None yet" in page
    assert "evenly over the batches" in page  # the warning: a quarter of the time went into waiting

    Looks(plan(store, tmp_path / "run")).write(CromaPretraining(SMALL), NORMALISATION, 24)
    assert "What each worker was fed" not in page
    ranks = [{"samples_per_s": 3.0, "bytes_per_s": 2e9, "waited_share": 0.1 * rank} for rank in range(2)]
    put(out, steps(4, 3, shards=2.0, blocks=3.0), ranks=ranks)
    write_again(Report(run=out.url))
    page = (tmp_path / "run/report.html").read_text()
    assert "Chips of the validation split" in page
    rows = [re.findall(r"<t[dh]>(.*?)</t[dh]>", row) for row in re.findall(r"<tr>(.*?)</tr>", page)]
    assert ["1", "3", "2 GB", "10 %"] in rows
    assert ["all", "6", "4 GB", "5 %"] in rows
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    assert len(re.findall(r"data:image/jpeg;base64,[A-Za-z0-9+/=]+", page)) == 4 * 6 + 2 * 4 * (1 + 5)


def test_pages_and_pictures_are_not_made_again_at_once_and_a_store_that_is_away_is_borne(
    store: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out, model = Objects.at(tmp_path / "run"), CromaPretraining(SMALL)
    out.put_json("request.json", REQUEST)
    put(out, steps(1, 3))
    writer, looks = ReportWriter(out), Looks(plan(store, tmp_path / "run"))
    for samples in (24, 32):
        looks.write(model, NORMALISATION, samples)
        writer.after_report(None, [], None)
        assert out.get_json(LOOKS_FILE)["samples"] == 24
        assert out.exists("report.html") == (samples == 24)
        out.delete("report.html")
    looks.write(model, NORMALISATION, 40, last=True)
    assert out.get_json(LOOKS_FILE)["samples"] == 40

    broken = CromaPretraining(SMALL)
    torch.nn.init.constant_(broken.radar_projection.bias, torch.inf)
    looks.write(broken, NORMALISATION, 48, last=True)
    assert out.get_json(LOOKS_FILE)["samples"] == 40
    assert "no pictures for the report at 48 samples: similarities between sensors are not finite" in caplog.text

    (tmp_path / "file").write_text("no folder can be here")
    Looks(plan(store, tmp_path / "file/run")).write(model, NORMALISATION, 24)
    ReportWriter(Objects.at(tmp_path / "file/run")).after_report(None, [], None)
    assert "no pictures for the report at 24 samples" in caplog.text
    assert "the report was not written" in caplog.text


def test_looking_changes_neither_weights_nor_random_numbers(store: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = CromaPretraining(SMALL).train()
    before, state = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    Looks(plan(store, tmp_path)).write(model, NORMALISATION, 8)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_is_shown_is_held_out_the_same_each_time_and_of_both_sensors(store: str, tmp_path: Path) -> None:
    how = plan(store, tmp_path)
    chips, model = held_out(how), CromaPretraining(SMALL)
    assert (chips.split, chips.rows.tolist()) == ("val", [3, 4, 5, 6, 7])
    found = look(model, NORMALISATION, chips, how)
    assert found == look(model, NORMALISATION, chips, how)
    truth, seen = (
        decoded(text) for text in (found["pictures"]["3"]["optical"], found["completed"][0]["optical"]["seen"])
    )
    assert truth.shape == seen.shape == (24, 24, 3)
    grey = (np.abs(seen.astype(int) - 214) < 12).all(axis=2)
    assert grey.mean() == pytest.approx(7 / 9, abs=0.1)  # of nine patches two are kept
    for sensor in ("optical", "radar"):
        for query in found["neighbours"][sensor]:
            similarities = [each["similarity"] for each in query["nearest"]]
            assert similarities == sorted(similarities, reverse=True)
            place = query["place_of_partner"]
            assert query["nearest"][place - 1]["row"] == query["row"]


@pytest.mark.parametrize(
    ("objective", "missing"),
    [
        (Objective(contrastive_weight=0.0), "the contrast between sensors no weight"),
        (Objective(reconstruction_weight=0.0), "reconstruction no weight"),
    ],
)
def test_what_is_not_trained_for_is_not_shown(store: str, tmp_path: Path, objective: Objective, missing: str) -> None:
    out = Objects.at(tmp_path)
    out.put_json("request.json", REQUEST)
    put(out, steps(1, 3))
    Looks(plan(store, tmp_path)).write(CromaPretraining(SMALL, objective), NORMALISATION, 24)
    write_training_report(out)
    assert missing in (tmp_path / "report.html").read_text()


def decoded(text: str) -> np.ndarray:
    return np.asarray(matplotlib.image.imread(io.BytesIO(base64.b64decode(text)), format="jpeg"))
