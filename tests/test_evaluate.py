"""Probing a model on held-out windows: which windows there are, how scores are resampled, and the whole job."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from numpy.typing import NDArray

from jobs.evaluate import Evaluate, main
from jobs.support.bootstrap import draw_groups, group_confusions, interval, resampled_scores, scores_of
from jobs.support.encoder import Inference, ModelSource, encode, load_model, untrained_like
from jobs.support.evaluation import draw_windows, encode_windows, find_windows, samples_of
from jobs.support.job import JobError
from jobs.support.probing import Features, Samples, Scoreboard, run_probes
from jobs.support.settings import parse
from jobs.support.windows import cut_windows, judge_windows, label_windows, majority_class, window_corners
from model import probes
from model.croma import Croma, CromaConfig
from model.normalisation import SSL4EO_S12
from model.released import NORMALISATION, to_released
from pipeline.grid import Cell
from pipeline.layout import Layout
from pipeline.statistics import band_moments
from pipeline.store import Store
from pipeline.types import ChipArrays
from pipeline.versions import latest_sealed
from tests.small_stores import Candidate, write_model, write_store

# Ray warns of its own settings whenever it copies them.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.* is deprecated:Warning:ray.data.context"),
]

LAYOUT = Layout(side_px=48, shard_chips=4, labels={"cover": {10: "trees", 20: "water", 30: "bare"}})
CODES = (10, 20, 30)
SPLITS = ("train",) * 7 + ("val",) * 3 + ("test",) * 4 + ("buffer",) * 2


def window_class(row: int, quarter: int) -> int:
    return (row + quarter) % 3


def chip_of(row: int) -> ChipArrays:
    """Four windows of 24 px; brightness goes with the class, but not only."""
    rng = np.random.default_rng(row)
    haze = rng.normal(0, 1, 4)
    chip: ChipArrays = {}
    for name, spec in LAYOUT.arrays().items():
        half = spec.shape[-1] // 2
        pixels = np.empty(spec.shape, spec.dtype)
        for quarter in range(4):
            label = window_class(row, quarter)
            y, x = divmod(quarter, 2)
            part = (..., slice(y * half, (y + 1) * half), slice(x * half, (x + 1) * half))
            shape = pixels[part].shape
            if name == "label_cover":
                pixels[part] = CODES[label]
            elif name == "radar":
                pixels[part] = rng.normal(-2200 + 500 * label + 300 * haze[quarter], 200, shape).round()
            else:
                pixels[part] = rng.normal(800 + 900 * label + 400 * haze[quarter], 150, shape).clip(1, 9999).round()
        chip[name] = pixels
    return chip


def cells(number: int) -> list[Cell]:
    return [Cell(epsg=32632, column=1000 + n % 5, row=9000 + n // 5, side_m=480) for n in range(number)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=200_000_000)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    url = str(tmp_path_factory.mktemp("labelled") / "chips.zarr")
    candidates = [Candidate(cell=cell, split=split) for cell, split in zip(cells(16), SPLITS, strict=True)]
    write_store(url, LAYOUT, candidates, chip_of, request={"splits": {"block_cells": 1}})
    return url


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model") / "model.pt"
    write_model(path)
    return str(path)


def settings(model: str, store: str, out: Path, **more: Any) -> Evaluate:
    words = {
        "model": model,
        "store": store,
        "out": out,
        "label": "cover",
        "window_px": 24,
        "neighbours": 5,
        "inference.num_actors": 1,
    }
    return parse(Evaluate, [f"{key}={value}" for key, value in {**words, **more}.items()])


@given(st.integers(1, 100).map(lambda n: 6 * n), st.integers(1, 30).map(lambda n: 6 * n))
def test_windows_lie_side_by_side_in_the_middle_of_the_chip(side_px: int, window_px: int) -> None:
    if window_px > side_px:
        with pytest.raises(ValueError, match=f"window_px={window_px}"):
            window_corners(side_px, window_px)
        return
    corners = window_corners(side_px, window_px)
    covered = np.zeros((side_px, side_px), int)
    for y, x in corners:
        assert y % 6 == x % 6 == 0
        assert y + window_px <= side_px >= x + window_px
        covered[y : y + window_px, x : x + window_px] += 1
    assert covered.max() == 1
    assert len(corners) == (side_px // window_px) ** 2
    before, after = corners[0][0], side_px - corners[-1][0] - window_px
    assert 0 <= after - before < 12


def test_the_class_of_a_window_is_the_one_that_covers_most_of_it() -> None:
    codes = np.array([[10, 10], [20, 30]], np.uint8)
    assert majority_class(codes, CODES) == (10, 0.5)
    assert majority_class(codes, [30, 10, 20]) == (10, 0.5)
    assert majority_class(np.array([[20, 10]], np.uint8), CODES) == (10, 0.5)
    assert majority_class(np.array([[20, 20, 255]], np.uint8), CODES) == (-1, pytest.approx(2 / 3))
    assert majority_class(np.array([[20, 20, 77]], np.uint8), CODES)[0] == -1


def test_windows_are_kept_by_their_majority_and_numbered_in_the_order_of_the_store() -> None:
    label = np.full((2, 12, 12), 10, np.uint8)
    label[0, :6, :6] = 255
    label[0, :6, 6:9] = 20
    label[1, :, 6:] = 20
    label[1, 0, 11] = 10
    found = label_windows(
        {"row": np.array([7, 3]), "label_cover": label},
        label="label_cover",
        known=CODES,
        corners=window_corners(12, 6),
        window_px=6,
    )
    windows = judge_windows(pa.table(found), min_majority=0.6)
    assert windows["window"].to_pylist() == list(range(8))
    assert windows["row"].to_pylist() == [3] * 4 + [7] * 4
    assert windows["status"].to_pylist() == ["kept"] * 4 + ["missing_labels", "no_majority", "kept", "kept"]
    assert windows["code"].to_pylist()[:4] == [10, 20, 10, 20]
    assert windows["share"].to_pylist()[1] == pytest.approx(35 / 36)


def test_so_many_windows_of_each_split_are_drawn_by_the_seed_alone() -> None:
    split = np.repeat(["train", "val", "test"], [30, 5, 12])
    table = pa.table({"status": ["kept", "no_majority", "kept"] * 15 + ["kept", "kept"], "split": split})
    draws = [draw_windows(table, at_most=8, seed=seed)["status"].to_pylist() for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    for drawn in draws:
        counts = {s: sum(d == "kept" for d, of in zip(drawn, split, strict=True) if of == s) for s in set(split)}
        assert counts == {"train": 8, "val": 3, "test": 8}
        assert all(
            (d == b) or (b == "kept" and d == "not_drawn")
            for d, b in zip(drawn, table["status"].to_pylist(), strict=True)
        )


def test_cut_windows_are_the_stores_windows(store: str) -> None:
    opened = Store.open(store)
    rows = np.array([2, 5])
    names = ("b10", "b20", "b60", "radar")
    batch = {"row": rows, **{name: np.stack([opened.read_chip(row)[name] for row in rows]) for name in names}}
    places = {"row": np.array([2, 2, 4, 5]), "y_px": np.array([0, 24, 0, 12]), "x_px": np.array([24, 0, 0, 6])}
    specs = [spec for name, spec in LAYOUT.arrays().items() if name in names]
    cut = cut_windows(batch, windows={**places, "window": np.array([9, 4, 1, 3])}, specs=specs, window_px=24)
    assert cut["window"].tolist() == [9, 4, 3]
    for index, place in enumerate([0, 1, 3]):
        y, x, row = (int(places[name][place]) for name in ("y_px", "x_px", "row"))
        expected = opened.read_window(row, y, x, 24)
        for name in names:
            assert_array_equal(cut[name][index], expected[name])
        assert_allclose(cut["band_statistics"][index], np.concatenate(band_moments(expected)), rtol=1e-6)


@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.integers(2, 5))
def test_resampled_scores_are_those_of_the_resampled_windows(seed: int, num_groups: int, num_classes: int) -> None:
    rng = np.random.default_rng(seed)
    groups = np.concatenate([np.arange(num_groups), rng.integers(0, num_groups, 30)])
    truth, predicted = rng.integers(0, num_classes, (2, len(groups)))
    draws = draw_groups(num_groups, 5, rng)
    assert_array_equal(draws.sum(axis=1), num_groups)
    resampled = resampled_scores(group_confusions(truth, predicted, groups, num_classes), draws)
    for number, draw in enumerate(draws):
        windows = np.concatenate([np.flatnonzero(groups == g) for g, times in enumerate(draw) for _ in range(times)])
        confusion = probes.confusion_matrix(
            torch.from_numpy(truth[windows]), torch.from_numpy(predicted[windows]), num_classes
        )
        for name, value in probes.scores(confusion).items():
            assert resampled[name][number] == pytest.approx(value)


def test_an_interval_is_wider_where_groups_hold_copies() -> None:
    rng = np.random.default_rng(0)
    truth = np.repeat(rng.integers(0, 2, 40), 10)
    predicted = np.where(np.repeat(rng.random(40) < 0.7, 10), truth, 1 - truth)
    widths = []
    for groups in (np.arange(400), np.repeat(np.arange(40), 10)):
        confusions = group_confusions(truth, predicted, groups, 2)
        low, high = interval(resampled_scores(confusions, draw_groups(len(confusions), 2000, rng))["accuracy"])
        assert low < (truth == predicted).mean() < high
        widths.append(high - low)
    assert widths[1] > 2.5 * widths[0]


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(200):
        right = rng.random(60) < rng.choice([0.5, 0.9], 60)
        truth = np.zeros(60, np.int64)
        confusions = group_confusions(truth, np.where(right, 0, 1), np.arange(60), 2)
        low, high = interval(resampled_scores(confusions, draw_groups(60, 300, rng))["accuracy"])
        hits += low <= 0.7 <= high
    assert 180 <= hits <= 200


def test_differences_are_paired() -> None:
    rng = np.random.default_rng(2)
    truth = rng.integers(0, 3, 90)
    vectors = np.eye(3, dtype=np.float32)[truth] + rng.normal(0, 0.4, (90, 3)).astype(np.float32)
    split = np.repeat(["train", "val", "test"], 30)
    samples = Samples(labels=truth, num_classes=3, split=split, groups=np.arange(30) // 3)
    good, same = (
        run_probes(Features(source=name, kind="joint", vectors=vectors), samples, k=5)[1]
        for name in ("trained", "untrained")
    )
    board = Scoreboard(samples, num_resamples=200, seed=0)
    row = board.row(good)
    assert row["accuracy"]["low"] < row["accuracy"]["value"] < row["accuracy"]["high"]
    assert board.difference(good, same)["accuracy"] == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_statistics_in_other_units_are_probed_the_same() -> None:
    rng = np.random.default_rng(3)
    truth = rng.integers(0, 2, 60)
    vectors = rng.normal(0, 1, (60, 4)).astype(np.float32) + truth[:, np.newaxis]
    samples = Samples(
        labels=truth, num_classes=2, split=np.repeat(["train", "val", "test"], 20), groups=np.zeros(20, np.int64)
    )
    scaled = vectors * np.array([1e4, 1, 1e-3, 50], np.float32) + np.array([5e3, 0, 2, -7], np.float32)
    plain, other = (
        [r.predicted for r in run_probes(Features(source="band statistics", kind="both", vectors=v), samples, k=5)]
        for v in (vectors, scaled)
    )
    assert_array_equal(plain[0], other[0])
    assert (plain[1] == other[1]).mean() > 0.9


def test_scores_of_many_matrices_are_those_of_each() -> None:
    confusions: NDArray[np.int64] = np.random.default_rng(4).integers(0, 4, (7, 3, 3))
    confusions[0, 1] = 0
    confusions[0, :, 1] = 0
    many = scores_of(confusions)
    for index, confusion in enumerate(confusions):
        for name, value in probes.scores(torch.from_numpy(confusion)).items():
            assert many[name][index] == pytest.approx(value)


def test_embeddings_through_the_job_are_the_models_own(cluster: None, store: str, model: str) -> None:
    opened, loaded = Store.open(store), load_model(model)
    version = latest_sealed(store)
    windows = find_windows(opened, version, label="cover", window_px=24, min_majority=0.5)
    assert windows.num_rows == 4 * 14
    assert_array_equal(windows["code"].to_numpy(), [CODES[window_class(r, q)] for r in range(14) for q in range(4)])
    assert windows["split"].to_pylist() == [SPLITS[row] for row in range(14) for _ in range(4)]
    source = ModelSource(url=model, sha256=loaded.sha256)
    sources = {"trained": source, "untrained": replace(source, untrained_seed=5)}
    features = encode_windows(opened, windows, sources, Inference(batch_size=7, num_actors=2), window_px=24)
    images = [opened.read_window(row, y, x, 24) for row in range(14) for y in (0, 24) for x in (0, 24)]
    batch = {name: np.stack([image[name] for image in images]) for name in ("b10", "b20", "b60", "radar")}
    expected = encode(loaded.croma, SSL4EO_S12, batch)
    by_name = {(each.source, each.kind): each.vectors for each in features}
    fresh = encode(untrained_like(loaded, seed=5).croma, SSL4EO_S12, batch)
    for kind in ("optical", "radar", "joint"):
        assert_allclose(by_name["trained", kind], expected[f"{kind}_embedding"], atol=2e-5)
        assert_allclose(by_name["untrained", kind], fresh[f"{kind}_embedding"], atol=2e-5)
        assert not np.allclose(fresh[f"{kind}_embedding"], expected[f"{kind}_embedding"], atol=0.1)
    assert_allclose(by_name["band statistics", "both"][3], np.concatenate(band_moments(images[3])), rtol=1e-5)
    samples = samples_of(windows, side_px=48, group_cells=2)
    assert len(samples.groups) == 16
    test_cells = cells(16)[10:14]
    squares = [(cell.column // 2, cell.row // 2) for cell in test_cells]
    assert int(samples.groups.max()) + 1 == len(set(squares))
    for i in range(4):
        for j in range(4):
            assert (samples.groups[4 * i] == samples.groups[4 * j]) == (squares[i] == squares[j])


def test_a_model_is_scored_beside_its_baselines(
    cluster: None, store: str, model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "evaluation"
    main(settings(model, store, out))
    metrics = json.loads((out / "metrics.json").read_text())
    rows = {(row["source"], row["kind"], row["probe"]): row for row in metrics["scores"]}
    assert len(rows) == 2 * 3 * 2 + 2 + 1
    assert rows["band statistics", "both", "linear"]["accuracy"]["value"] > 0.5
    assert rows["majority class", "none", "none"]["accuracy"]["value"] < 0.5
    assert rows["trained", "joint", "knn"]["accuracy"]["value"] > 0.5
    assert [row["name"] for row in metrics["classes"]] == ["trees", "water", "bare"]
    assert sum(row["train"] for row in metrics["classes"]) == 28
    assert (metrics["windows"], metrics["test_groups"]) == ({"kept": 56}, 4)
    assert len(metrics["differences"]) == 3 * 2 * 2

    predictions = pq.read_table(out / "predictions.parquet")
    right = np.equal(predictions["code"].to_pylist(), predictions["trained/joint/linear"].to_pylist())
    assert right.mean() == pytest.approx(rows["trained", "joint", "linear"]["accuracy"]["value"])
    assert np.trace(metrics["confusion"]["trained/joint/linear"]) == right.sum()
    page = (out / "report.html").read_text()
    assert "<svg" in page
    assert "http" not in page.replace("http://www.w3.org", "")

    before = (out / "metrics.json").read_bytes()
    with caplog.at_level("INFO"):
        main(settings(model, store, out))
    assert "holds this evaluation already" in caplog.text
    assert (out / "metrics.json").read_bytes() == before
    with pytest.raises(JobError, match=r"another evaluation: neighbours: 5 -> 3; give another out"):
        main(settings(model, store, out, neighbours=3))


def test_a_dry_run_counts_and_writes_nothing(
    cluster: None, store: str, model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        main(settings(model, store, tmp_path / "evaluation", dry_run="true"))
    assert "trees" in caplog.text
    assert "would embed 56 windows" in caplog.text
    assert not list(tmp_path.iterdir())


def refusal(store: str, model: str, out: Path, **more: Any) -> str:
    with pytest.raises((ValueError, JobError)) as refused:
        main(settings(model, store, out, **more))
    assert not (out / "metrics.json").exists()
    return str(refused.value)


def test_what_cannot_be_evaluated_is_refused_before_anything_is_written(store: str, model: str, tmp_path: Path) -> None:
    out = tmp_path / "evaluation"
    assert "no model at" in refusal(store, str(tmp_path / "model.pt"), out)
    (tmp_path / "broken.pt").write_bytes(b"no checkpoint")
    assert "broken.pt: not a checkpoint" in refusal(store, str(tmp_path / "broken.pt"), out)
    assert "no store at" in refusal(str(tmp_path / "nothing"), model, out)
    assert "has no label='map' (it has: cover)" in refusal(store, model, out, label="map")
    assert not out.exists()
    assert not Path(f"{out}.run").exists()


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        (["train"] * 3 + ["val"], "no test windows.*smaller split blocks"),
        (["train"] * 3 + ["test"], "no val windows"),
        (["buffer"] * 4, "no chips in train, val or test"),
    ],
)
def test_a_store_that_holds_nothing_out_is_refused(
    cluster: None, model: str, tmp_path: Path, splits: list[str], message: str
) -> None:
    url = str(tmp_path / "chips.zarr")
    candidates = [Candidate(cell=cell, split=split) for cell, split in zip(cells(4), splits, strict=True)]
    write_store(url, LAYOUT, candidates, chip_of, request={})
    with pytest.raises(JobError, match=message):
        main(settings(model, url, tmp_path / "out"))


def test_a_class_that_train_lacks_is_refused_or_left_out_as_asked(cluster: None, model: str, tmp_path: Path) -> None:
    def without_bare_in_train(row: int) -> ChipArrays:
        chip = chip_of(row)
        if SPLITS[row] == "train":
            chip["label_cover"] = np.where(chip["label_cover"] == 30, 20, chip["label_cover"]).astype(np.uint8)
        return chip

    url = str(tmp_path / "chips.zarr")
    candidates = [Candidate(cell=cell, split=split) for cell, split in zip(cells(16), SPLITS, strict=True)]
    write_store(url, LAYOUT, candidates, without_bare_in_train, request={})
    assert "no train window shows: bare" in refusal(url, model, tmp_path / "out")
    main(settings(model, url, tmp_path / "out", rare_classes="leave-out", group_cells=1))
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert [row["name"] for row in metrics["classes"]] == ["trees", "water"]
    assert metrics["windows"]["rare_class"] == sum(window_class(r, q) == 2 for r in range(7, 14) for q in range(4))


def test_released_weights_can_be_evaluated(cluster: None, store: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = CromaConfig(width=32, optical_depth=2, radar_depth=1, joint_depth=1, heads=16)
    path = tmp_path / "CROMA_small.pt"
    torch.save(to_released(Croma(config)), path)
    main(settings(str(path), store, tmp_path / "out", dry_run="true"))
    loaded = ModelSource(url=str(path), sha256=load_model(str(path)).sha256).open()
    assert (loaded.croma.config, loaded.normalisation) == (config, NORMALISATION)


def test_a_model_is_refused_on_chips_of_another_level(model: str, tmp_path: Path) -> None:
    layout = replace(LAYOUT, optical_level="l1c")
    url = str(tmp_path / "chips.zarr")
    candidates = [Candidate(cell=cell, split=split) for cell, split in zip(cells(2), ("train", "test"), strict=True)]
    write_store(url, layout, candidates, lambda row: without_classes(chip_of(row)), request={})
    with pytest.raises(ValueError, match="level l1c were given where l2a is expected"):
        main(settings(model, url, tmp_path / "out"))


def without_classes(chip: ChipArrays) -> ChipArrays:
    return {name: pixels for name, pixels in chip.items() if name != "scl"}


def test_the_untrained_network_differs_only_in_its_weights(model: str) -> None:
    loaded = load_model(model)
    first, again, other = (untrained_like(loaded, seed=seed) for seed in (1, 1, 2))
    assert (first.croma.config, first.normalisation) == (loaded.croma.config, loaded.normalisation)
    assert first.sha256 == again.sha256
    assert len({first.sha256, other.sha256, loaded.sha256}) == 3
    assert not first.croma.training


def test_a_model_that_is_replaced_while_it_is_used_is_noticed(model: str, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(Path(model).read_bytes())
    source = ModelSource(url=str(path), sha256=load_model(str(path)).sha256)
    source.open()
    write_model(path, seed=9)
    with pytest.raises(JobError, match="changed while it was used"):
        source.open()
