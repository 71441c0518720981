"""import_dataset as a user runs it, over real samples of every dataset it takes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal

from jobs.import_dataset import ImportDataset, main
from jobs.support.encoder import check_units, encode
from jobs.support.job import run_job
from jobs.support.settings import parse
from model.croma import Croma, CromaConfig
from model.normalisation import SSL4EO_S12
from pipeline.fed_chips import Feed
from pipeline.feed import training_samples
from pipeline.store import Store
from pipeline.verification import verify_shard
from pipeline.versions import Version, latest_sealed
from pipeline.whole_chips import read_chips
from tests.aligned_datasets import read_tif, state_of, write_ssl4eo_v11

ROOT = Path(__file__).resolve().parent.parent

pytestmark = [
    pytest.mark.usefixtures("small_cluster"),
    # Ray's own settings object warns about its own fields when it is copied.
    pytest.mark.filterwarnings("ignore:.* is deprecated:Warning:ray.data.context"),
    pytest.mark.filterwarnings("ignore:.* is deprecated:Warning:ray.data._internal"),
]


def words(source: str, folder: Path, store: Path, **more: object) -> list[str]:
    return [f"{key}={value}" for key, value in {"source": source, "folder": folder, "store": store, **more}.items()]


def imported(source: str, folder: Path, store: Path, **more: object) -> Version:
    main(parse(ImportDataset, words(source, folder, store, **more)))
    return latest_sealed(str(store))


def exit_code(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> Any:
    monkeypatch.setattr(sys, "argv", ["jobs/import_dataset.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        run_job(ImportDataset, main)
    return stopped.value.code


def record_of(version: Version) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(Path(f"{version.url}.run/run.json").read_text())
    return content


def rows_by_name(version: Version) -> dict[str, dict[str, Any]]:
    """Manifest and chip table of each sample, joined."""
    chips = {row["row"]: row for row in version.chips().to_pylist()}
    return {row["pair"]: {**row, **chips[row["row"]]} for row in version.manifest().to_pylist()}


@pytest.fixture(scope="module")
def ssl4eo(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Version:
    store = tmp_path_factory.mktemp("ssl4eo") / "chips.zarr"
    return imported("ssl4eo-s12", shared_data / "ssl4eo-s12", store)


def test_ssl4eo_becomes_a_store_of_its_native_bands(ssl4eo: Version, shared_data: Path) -> None:
    store, rows = Store.open(ssl4eo.url), rows_by_name(ssl4eo)
    layout = store.layout
    assert (layout.side_px, layout.optical_grid, layout.radar_product, layout.optical_level, layout.grid) == (
        264, "native", "sigma0_grd", "l2a", None,
    )  # fmt: skip
    assert list(layout.arrays()) == ["b10", "b20", "b60", "radar"]
    assert {name: round(row["dt_s"] / 86400) for name, row in rows.items()} == {"0000200/0": 3, "0000200/1": 21}
    for row in rows.values():
        chip = store.read_chip(row["row"])
        scene = shared_data / "ssl4eo-s12" / dict(row["files"])["optical"]
        assert_array_equal(chip["b60"], np.concatenate([read_tif(scene / f"{name}.tif") for name in ("B1", "B9")]))
        assert (row["status"], row["valid_fraction"], row["radar_valid_fraction"]) == ("written", 1.0, 1.0)
        assert np.allclose(row["mean"][1], chip["b10"][0].mean())
        assert np.allclose(row["mean"][12], chip["radar"][0].mean() / 100)
        assert row["crs"] == "EPSG:4326"
        assert row["cell"] is None
    record = record_of(ssl4eo)
    assert record["status"] == "succeeded"
    assert record["results"]["written"] == 2
    assert record["settings"]["max_dt_days"] == 30.0


def test_an_imported_version_is_checked_and_summed_up_as_any_other(ssl4eo: Version) -> None:
    assert verify_shard(ssl4eo, 0, pixels=True).problems == ()
    statistics, store = ssl4eo.statistics(), Store.open(ssl4eo.url)
    assert statistics is not None
    pixels = np.concatenate([store.read_chip(row)["b60"][1].ravel() for row in ssl4eo.written_rows().tolist()])
    assert statistics.mean("B09") == pytest.approx(pixels.mean())
    assert statistics.std("B09") == pytest.approx(pixels.std())
    assert statistics.count("VV") == 2 * 264 * 264


def test_the_model_trains_and_encodes_from_an_imported_store(ssl4eo: Version) -> None:
    check_units(Store.open(ssl4eo.url).layout, SSL4EO_S12)
    feed = Feed(url=ssl4eo.url, version=1, crop_px=120, crops_per_chip=2, global_batch=2)
    (first, *_) = training_samples(feed).iter_batches(batch_size=2, batch_format="numpy")
    (whole,) = read_chips(ssl4eo.url, batch_size=2).iter_batches(batch_size=None, batch_format="numpy")
    torch.manual_seed(0)
    croma = Croma(
        CromaConfig(width=32, optical_depth=2, radar_depth=1, joint_depth=1, heads=2, decoder_width=16, decoder_heads=2)
    ).eval()
    for images, patches in ((first, 15 * 15), (whole, 33 * 33)):
        outputs = encode(croma, SSL4EO_S12, images)
        assert outputs["joint_encodings"].shape == (2, patches, 32)
        assert all(np.isfinite(values).all() for values in outputs.values())


def test_running_again_changes_nothing_and_another_request_is_refused(
    ssl4eo: Version, shared_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, before = shared_data / "ssl4eo-s12", state_of(Path(ssl4eo.url))
    imported("ssl4eo-s12", folder, Path(ssl4eo.url))
    assert state_of(Path(ssl4eo.url)) == before
    assert record_of(ssl4eo)["results"]["reused"] is True
    assert exit_code(monkeypatch, words("ssl4eo-s12", folder, Path(ssl4eo.url), seed=4)) == 1
    assert "seed: 0 -> 4" in capsys.readouterr().err
    assert exit_code(monkeypatch, words("ssl4eo-s12", folder, Path(ssl4eo.url), level="l1c")) == 1
    assert "another layout" in capsys.readouterr().err


def test_ssl4eo_v11_is_imported_file_by_file_and_date_by_date(tmp_path: Path) -> None:
    places = {"train": ["0080717", "0060573"], "val": ["0000173"]}
    stored = {
        split: write_ssl4eo_v11(tmp_path / "v11", split=split, number=1, places=names)
        for split, names in places.items()
    }
    version = imported("ssl4eo-s12-v1.1", tmp_path / "v11", tmp_path / "chips.zarr", shard_chips=4)
    store, rows = Store.open(version.url), rows_by_name(version)
    assert len(rows) == 6
    assert len(version.shards()) == 2
    assert store.layout.optical_grid == "10m"
    for split, names in places.items():
        for number, name in enumerate(names):
            for date in range(2):
                row = rows[f"{name}_{date}"]
                chip, pixels = store.read_chip(row["row"]), stored[split]
                assert (row["split"], row["status"], row["dt_s"]) == (split, "written", 31 * 3600)
                assert 0.99 < row["valid_fraction"] < 1.0
                dn = pixels["S2L2A"][number, date, [1, 2, 3, 7]].astype(int)
                assert_array_equal(chip["b10"], np.where(dn == 0, 0, np.maximum(dn - 1000, 1)))
                decibel = pixels["S1GRD"][number, date].astype(np.float64)
                assert_array_equal(chip["radar"], np.where(np.isnan(decibel), -32768, np.round(decibel * 100)))


def test_bigearthnet_keeps_its_labels_per_chip(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "bigearthnet-samples"
    version = imported("bigearthnet", folder, tmp_path / "chips.zarr", sensors="optical")
    layout, rows = Store.open(version.url).layout, rows_by_name(version)
    assert (layout.side_px, layout.has_radar, layout.optical_grid) == (120, False, "native")
    assert len(rows) == 12
    classes, labelled = layout.chip_labels["bigearthnet"], 0
    for name, row in rows.items():
        path = folder / f"s2/{name}/{name}_labels_metadata.json"
        if not path.exists():
            assert row["label_bigearthnet"] is None
            continue
        labelled += 1
        ours, theirs = {classes[code] for code in row["label_bigearthnet"]}, json.loads(path.read_bytes())["labels"]
        assert {label for label in theirs if label in classes.values()} <= ours
        assert all(np.isnan(row["mean"][12:]))
    assert labelled == 9
    both = imported("bigearthnet", folder, tmp_path / "both.zarr")
    assert {row["status"] for row in rows_by_name(both).values()} == {"written"}
    assert Counter(both.rejections()["reason"].to_pylist()) == {"no_radar": 10, "no_optical": 7}
    assert record_of(both)["results"]["not_taken"] == {"no_radar": 10, "no_optical": 7}


def test_eurosat_keeps_its_class_per_chip(shared_data: Path, tmp_path: Path) -> None:
    version = imported("eurosat", shared_data / "eurosat-ms", tmp_path / "chips.zarr", codec="zstd", shard_chips=3)
    store, rows = Store.open(version.url), rows_by_name(version)
    assert len(rows) == 8
    assert len(version.shards()) == 3
    for name, row in rows.items():
        assert store.layout.chip_labels["eurosat"][row["label_eurosat"]] == name.partition("_")[0]
        pixels = read_tif(shared_data / "eurosat-ms" / dict(row["files"])["optical"])
        chip = store.read_chip(row["row"])
        assert_array_equal(chip["b20"][3], pixels[12])
        assert_array_equal(chip["b60"][1], pixels[8])
    (batch,) = read_chips(version.url, batch_size=8).iter_batches(batch_size=None, batch_format="numpy")
    assert {name: batch[name].shape for name in ("b10", "b20", "b60")} == {
        "b10": (8, 4, 64, 64), "b20": (8, 6, 64, 64), "b60": (8, 2, 64, 64),
    }  # fmt: skip


def test_official_splits_are_kept_and_other_lists_are_another_request(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lists, store = tmp_path / "lists", tmp_path / "chips.zarr"
    lists.mkdir()
    for split, names in {"train": ["Forest_1", "Forest_2"], "val": ["Pasture_300"], "test": ["Forest_3"]}.items():
        (lists / f"eurosat-{split}.txt").write_text("".join(f"{name}.jpg\n" for name in names))
    version = imported("eurosat", shared_data / "eurosat-ms", store, split_lists=lists)
    splits = {name: row["split"] for name, row in rows_by_name(version).items()}
    assert splits == {"Forest_1": "train", "Forest_2": "train", "Pasture_300": "val", "Forest_3": "test"}
    assert record_of(version)["results"]["splits"] == {"test": 1, "train": 2, "val": 1}
    assert record_of(version)["results"]["not_taken"] == {"not_in_split_lists": 4}
    again = words("eurosat", shared_data / "eurosat-ms", store, split_lists=lists.rename(tmp_path / "moved"))
    main(parse(ImportDataset, again))
    (tmp_path / "moved" / "eurosat-val.txt").write_text("SeaLake_3000.jpg\n")
    assert exit_code(monkeypatch, again) == 1
    assert "another request: split_lists" in capsys.readouterr().err


def test_sen1floods11_keeps_its_water_per_pixel(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "sen1floods11"
    version = imported("sen1floods11", folder, tmp_path / "chips.zarr", sensors="radar", min_valid_fraction=0.999)
    store, rows = Store.open(version.url), rows_by_name(version)
    assert len(rows) == 6
    assert {row["reason"] for row in rows.values() if row["status"] == "rejected"} == {"too_little_valid"}
    assert rows["Nigeria_812045"]["radar_valid_fraction"] == pytest.approx(1 - 579 / 512**2, abs=1e-5)
    for name, row in rows.items():
        if row["status"] == "written":
            label = read_tif(folder / f"{name}_LabelHand.tif")[0]
            assert_array_equal(store.read_chip(row["row"])["label_flood"], np.where(label == -1, 255, label))


def test_what_cannot_be_read_is_in_the_ledger_and_is_tried_again(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, folder = shared_data / "eurosat-ms", tmp_path / "eurosat"
    shutil.copytree(source, folder)
    (folder / "Forest" / "Forest_2.tif").write_bytes((source / "Forest" / "Forest_2.tif").read_bytes()[:5000])
    store = tmp_path / "chips.zarr"
    assert exit_code(monkeypatch, words("eurosat", folder, store, shard_chips=4)) == 1
    said = capsys.readouterr().err
    assert "1 of 8 chips could not be read (12.5%, more than max_failed_fraction=0.01)" in said
    assert "Forest_2.tif" in said
    building = Version(str(store), 1)
    assert building.state == "building"
    assert building.counts()["failed"] == 1
    before = state_of(store)
    shutil.copy(source / "Forest" / "Forest_2.tif", folder / "Forest" / "Forest_2.tif")
    version = imported("eurosat", folder, store, shard_chips=4)
    assert version.counts()["written"] == 8
    # The shard without failures was left alone.
    untouched = [path for path, written in before.items() if "/c/" in path and state_of(store)[path] == written]
    assert len(untouched) == 3
    whole = imported("eurosat", source, tmp_path / "whole.zarr", shard_chips=4)
    # By the hash of the chip table: its rows hold NaN for the sensor that is absent, which equals nothing.
    assert version.sealed == whole.sealed


ALONE = """
import sys
import time
from jobs.import_dataset import ImportDataset, main
from jobs.support import importing
from jobs.support.settings import parse
from pipeline.ingest import build_planned_shard

# A cluster takes longer to start than the import lasts: the same tasks, one after another, in this process.
importing.connect = lambda settings: None
importing.build = lambda version, unit: (build_planned_shard(version, shard, unit) for shard in version.shards())
main(parse(ImportDataset, sys.argv[1:]))
"""


@pytest.mark.slow
def test_an_import_that_was_killed_ends_in_the_same_store(shared_data: Path, tmp_path: Path) -> None:
    folder, whole, store = tmp_path / "eurosat", tmp_path / "whole.zarr", tmp_path / "chips.zarr"
    for copy in range(20):
        for path in sorted((shared_data / "eurosat-ms").glob("*/*.tif")):
            target = folder / path.parent.name / f"{path.parent.name}_{copy}{path.stem.partition('_')[2]}.tif"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    command = [sys.executable, "-c", ALONE, *words("eurosat", folder, store, shard_chips=4)]
    parts = store / "versions/0001/chips"
    with subprocess.Popen(command, cwd=ROOT, start_new_session=True, stderr=subprocess.DEVNULL) as driver:
        while driver.poll() is None and len(list(parts.glob("shard-*.parquet"))) < 3:
            time.sleep(0.005)
        assert driver.poll() is None, "the import was over before it could be killed"
        os.killpg(driver.pid, signal.SIGKILL)
    assert Version(str(store), 1).state == "building"
    resumed = imported("eurosat", folder, store, shard_chips=4)
    expected = imported("eurosat", folder, whole, shard_chips=4)
    assert resumed.sealed == expected.sealed
    shards = [path.relative_to(whole) for path in whole.glob("*/c/**/*") if path.is_file()]
    assert len(shards) == 3 * 40
    assert all((store / path).read_bytes() == (whole / path).read_bytes() for path in shards)
    assert resumed.counts()["written"] == 160


def test_a_dry_run_counts_and_writes_nothing(
    shared_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = words("eurosat", shared_data / "eurosat-ms", tmp_path / "chips.zarr")
    with caplog.at_level("INFO"):
        main(parse(ImportDataset, [*arguments, "--dry-run"]))
    assert "would import 8 chips of 64 px" in caplog.text
    assert "would store about 0.00 GB in b10, b20, b60" in caplog.text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("source", "folder", "message"),
    [
        ("bigearthnet", "bigearthnet-v2-4band", "all 12 are needed"),
        ("eurosat", "ssl4eo-s12", "holds no EuroSAT"),
        ("ssl4eo-s12", "eurosat-ms", "has no folder s2a and no folder s1"),
        ("ssl4eo-s12-v1.1", "ssl4eo-s12", "holds no SSL4EO-S12 v1.1"),
        ("eurosat", "nowhere", "is no folder"),
    ],
)
def test_a_folder_of_something_else_is_refused_and_leaves_nothing(
    source: str,
    folder: str,
    message: str,
    shared_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    store = tmp_path / "chips.zarr"
    assert exit_code(monkeypatch, words(source, shared_data / folder, store)) == 1
    assert message in capsys.readouterr().err
    assert not store.exists()
