"""build_dataset as a user runs it: a real STAC server, real files, real Ray."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import rasterio
from rasterio.windows import from_bounds

from jobs.build_dataset import BuildDataset, main
from jobs.support.settings import parse
from pipeline.bands import NATIVE_GROUPS
from pipeline.grid import Cell
from pipeline.manifest import items_from_table
from pipeline.store import Store
from pipeline.versions import Version
from tests.building import PROFILE, ROOT, built, candidates_of_a_dry_run, exit_code, words

pytestmark = [
    pytest.mark.usefixtures("small_cluster"),
    # Ray's own settings object warns about its own fields when it is copied.
    pytest.mark.filterwarnings("ignore:.* is deprecated:Warning:ray.data.context"),
    pytest.mark.filterwarnings("ignore:.* is deprecated:Warning:ray.data._internal"),
]


@pytest.fixture(scope="module")
def version(simulated_stac: str, tmp_path_factory: pytest.TempPathFactory) -> Version:
    return built(simulated_stac, tmp_path_factory.mktemp("built") / "chips.zarr")


def test_the_ledger_equals_the_request(version: Version) -> None:
    chips, manifest = version.chips(), version.manifest()
    assert chips["row"].to_pylist() == manifest["row"].to_pylist()
    counts = version.sealed
    assert counts is not None
    assert counts["requested"] == counts["written"] + counts["rejected"] + counts["failed"]
    assert counts["written"] > 10
    assert counts["failed"] == 0
    assert counts["reasons"]["cloudy"] > 0
    assert set(version.rejections()["reason"].to_pylist()) >= {"cloudy_scene", "no_radar_in_time", "too_little_overlap"}


def test_both_zones_and_both_baselines_are_in_the_store(version: Version) -> None:
    manifest, chips = version.manifest().to_pylist(), version.chips().to_pylist()
    written = [row for row, chip in zip(manifest, chips, strict=True) if chip["status"] == "written"]
    assert {row["epsg"] for row in written} == {32632, 32633}
    assert {row["offset_dn"] for row in written} == {0, 1000}
    assert all(abs(row["dt_s"]) <= 3 * 86400 for row in manifest)


def test_aligned_chips_hold_the_files_own_numbers(version: Version) -> None:
    store, items = Store.open(version.url), items_from_table(version.items())
    manifest = {row["row"]: row for row in version.manifest().to_pylist()}
    checked = 0
    for chip in version.chips().to_pylist():
        row = manifest[chip["row"]]
        item = items[row["optical_items"][0]]
        if chip["status"] != "written" or item.epsg != row["epsg"]:
            continue
        bounds = Cell.from_id(row["cell"], side_m=2640).bounds
        arrays = store.read_chip(chip["row"])
        for group, bands in NATIVE_GROUPS.items():
            for pixels, band in zip(arrays[group], bands, strict=True):
                with rasterio.open(item.assets[band]) as file:
                    dn = file.read(1, window=from_bounds(*bounds, transform=file.transform)).astype(int)
                expected = np.where(dn == 0, 0, np.maximum(dn - row["offset_dn"], 1))
                if len(row["optical_items"]) == 1:
                    assert (pixels == expected).all(), (row["cell"], band)
                    checked += 1
    assert checked > 100


def test_a_second_run_changes_nothing(version: Version, simulated_stac: str) -> None:
    folder = Path(version.url)

    def state() -> dict[str, int]:
        return {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob("*")) if path.is_file()}

    before = state()
    built(simulated_stac, folder)
    assert state() == before
    record = json.loads(Path(f"{folder}.run/run.json").read_text())
    assert record["status"] == "succeeded"
    assert record["results"]["reused"] is True
    assert record["settings"]["pairing"]["max_dt_days"] == 3.0


def test_another_request_for_the_same_store_is_refused(
    version: Version, simulated_stac: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(words(simulated_stac, Path(version.url), seed=7)) == 1
    assert "seed" in capsys.readouterr().err


def test_a_southern_region_is_built_on_the_grid_from_the_equator(simulated_stac: str, tmp_path: Path) -> None:
    region = ",".join(map(str, PROFILE.southern_region))
    version = built(simulated_stac, tmp_path / "south.zarr", region=region, labels="none")
    written = [chip for chip in version.chips().to_pylist() if chip["status"] == "written"]
    assert written
    assert all(re.match(r"36S_\d+_-\d+", chip["cell"]) for chip in written)


@pytest.mark.slow
def test_a_build_that_was_killed_ends_in_the_same_store(version: Version, simulated_stac: str, tmp_path: Path) -> None:
    store = tmp_path / "chips.zarr"
    command = [sys.executable, "-m", "jobs.build_dataset", *words(simulated_stac, store)]
    # Its own session, so that the whole run can be killed at once, as when a machine is lost.
    driver = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stderr=subprocess.DEVNULL)
    parts = store / "versions/0001/chips"
    while driver.poll() is None and not list(parts.glob("shard-*.parquet")):
        time.sleep(0.02)
    assert driver.poll() is None, "the build was over before it could be killed"
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    assert Version(str(store), 1).state == "building"
    again = built(simulated_stac, store)
    assert again.sealed == version.sealed
    shards = [path for path in Path(version.url).glob("*/c/**/*") if path.is_file()]
    assert len(shards) >= 6 * len(version.shards())
    for path in shards:
        assert path.read_bytes() == (store / path.relative_to(version.url)).read_bytes(), path


def test_a_corrupt_file_is_recorded_and_mended_by_a_rerun(
    simulated_stac: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], version: Version
) -> None:
    row = next(r for r in version.chips().to_pylist() if r["status"] == "written")["row"]
    used = next(r for r in version.manifest().to_pylist() if r["row"] == row)["optical_items"][0]
    damaged = Path(items_from_table(version.items())[used].assets["B8A"])
    whole = tmp_path / "whole.tif"
    shutil.copy(damaged, whole)
    store = tmp_path / "chips.zarr"
    try:
        damaged.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
        assert exit_code(words(simulated_stac, store)) == 1
        assert "could not be read" in capsys.readouterr().err
        failed = [chip for chip in Version(str(store), 1).chips().to_pylist() if chip["status"] == "failed"]
        assert failed
        assert all("B8A" in chip["error"] for chip in failed)
        assert Version(str(store), 1).state == "building"
        begun = Version(str(store), 1)
        finished = begun.finished_shards()
        left = [row for row in begun.manifest()["shard"].to_pylist() if row not in finished]
        assert 0 < len(left) < begun.manifest().num_rows
        assert candidates_of_a_dry_run(simulated_stac, store) == len(left)
        tolerant = built(simulated_stac, tmp_path / "tolerant.zarr", max_failed_fraction=1.0)
        assert tolerant.sealed is not None
        assert tolerant.sealed["failed"] == len(failed)
    finally:
        shutil.copy(whole, damaged)
    mended = built(simulated_stac, store)
    assert mended.sealed == version.sealed
    assert candidates_of_a_dry_run(simulated_stac, store) == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"period": "1999"}, "has no sentinel-2-l2a item"),
        ({"region": "100,10,100.1,10.1"}, "has no sentinel-2-l2a item"),
        ({"region": "11,48,12"}, "region=11,48,12"),
        ({"period": "yesterday"}, "period=yesterday"),
        ({"pairing.max_dt_days": 0.0001}, "no pair of acquisitions can be made"),
        ({"archive": "http://127.0.0.1:9"}, "http://127.0.0.1:9"),
        ({"archive": "nowhere"}, "archive='nowhere'"),
    ],
)
def test_bad_input_ends_with_a_message_and_leaves_nothing(
    simulated_stac: str, tmp_path: Path, more: dict[str, object], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(words(simulated_stac, tmp_path / "chips.zarr", **more)) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "chips.zarr").exists()


def test_a_store_of_another_layout_version_is_refused(
    simulated_stac: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "chips.zarr"
    folder.mkdir()
    newer = {"zarr_format": 3, "node_type": "group", "attributes": {"twinlook": {"layout_version": 99}}}
    (folder / "zarr.json").write_text(json.dumps(newer))
    assert exit_code(words(simulated_stac, folder)) == 1
    assert "layout version 99" in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == ["zarr.json"]


def test_a_dry_run_writes_nothing_but_the_search(
    simulated_stac: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        main(parse(BuildDataset, [*words(simulated_stac, tmp_path / "chips.zarr"), "--dry-run"]))
    assert "candidate chips" in caplog.text
    kept = {path.relative_to(tmp_path).parts[:2] for path in tmp_path.rglob("*") if path.is_file()}
    assert kept == {("chips.zarr.run", "search")}
    # The search is there for the run itself.
    kept_pieces = [
        (int(here), int(of)) for here, of in re.findall(r"(\d+) of (\d+) pieces from the cache", caplog.text)
    ]
    assert [here for here, _ in kept_pieces] == [0, 0]
    caplog.clear()
    with caplog.at_level("INFO"):
        main(parse(BuildDataset, [*words(simulated_stac, tmp_path / "chips.zarr"), "--dry-run"]))
    assert all(f"{of} of {of} pieces from the cache" in caplog.text for _, of in kept_pieces)
