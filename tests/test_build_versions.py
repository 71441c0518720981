"""Versions that follow others, and stores compared with themselves, from build_dataset's command line."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pytest

from jobs.build_dataset import BuildDataset, main
from jobs.support.settings import parse
from pipeline.chip_table import written_rows
from pipeline.manifest import items_from_table
from pipeline.store import Store
from pipeline.versions import Version, latest
from tests.building import PROFILE, built, candidates_of_a_dry_run, exit_code, words
from tests.stac_proxy import Asked, StacProxy

pytestmark = [
    pytest.mark.usefixtures("small_cluster"),
    # Ray's own settings object warns about its own fields when it is copied.
    pytest.mark.filterwarnings("ignore:.* is deprecated:Warning:ray.data.context"),
    pytest.mark.filterwarnings("ignore:.* is deprecated:Warning:ray.data._internal"),
]

SOUTH = ",".join(map(str, PROFILE.southern_region))


@pytest.fixture(scope="module")
def version(simulated_stac: str, tmp_path_factory: pytest.TempPathFactory) -> Version:
    """The southern region alone; not to be changed."""
    return built(simulated_stac, tmp_path_factory.mktemp("built") / "chips.zarr", region=SOUTH, labels="none")


def copied(version: Version, folder: Path) -> Path:
    shutil.copytree(version.url, folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def told(version: Version) -> list[tuple[object, ...]]:
    """What a reader of a version is told of every candidate, but for where it lies."""
    columns = ("cell", "pair", "split", "status", "sha256")
    return sorted(tuple(row[key] for key in columns) for row in version.all_chips(columns=columns).to_pylist())


def test_a_store_is_what_it_says_and_verify_says_so(version: Version, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        main(parse(BuildDataset, [f"store={version.url}", "--verify"]))
    assert f"{len(written_rows(version.chips()))} chips" in caplog.text
    assert "0 problems" in caplog.text


def test_one_wrong_byte_is_found(version: Version, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = copied(version, tmp_path / "chips.zarr")
    victim = store / "b10/c/0/0/0/0"
    damaged = bytearray(victim.read_bytes())
    damaged[len(damaged) // 3] ^= 1
    victim.write_bytes(damaged)
    assert exit_code([f"store={store}", "--verify"]) == 1
    assert "is not what it says" in capsys.readouterr().err


def test_another_region_becomes_a_version_of_its_own(simulated_stac: str, tmp_path: Path) -> None:
    west, south, east, north = PROFILE.region
    half = ",".join(map(str, (west, south, (west + east) / 2, north)))
    plain = {"labels": "none"}
    whole = built(simulated_stac, tmp_path / "whole.zarr", **plain)
    store = tmp_path / "chips.zarr"
    first = built(simulated_stac, store, region=half, **plain)
    before = contents(store)
    expected = candidates_of_a_dry_run(simulated_stac, store, append="true", **plain)
    second = built(simulated_stac, store, append="true", **plain)
    assert expected == second.manifest().num_rows
    assert (first.number, second.number) == (1, 2)
    after = contents(store)
    assert all(after[name] == content for name, content in before.items() if not name.endswith("zarr.json"))
    # Together they hold what one build of the whole region holds, each chip once.
    assert first.chips().num_rows
    assert second.chips().num_rows
    assert told(second) == told(whole)
    assert pc.sum(pc.equal(second.rejections()["reason"], "in_earlier_version")).as_py() == first.chips().num_rows
    # The same again changes nothing.
    assert built(simulated_stac, store, append="true", **plain).number == 2
    assert contents(store) == after


def test_another_request_is_only_appended_when_asked(
    version: Version, simulated_stac: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = copied(version, tmp_path / "chips.zarr")
    other = {"region": SOUTH, "labels": "none", "period": "2022-06"}
    assert exit_code(words(simulated_stac, store, **other)) == 1
    assert "--append adds yours as a version" in capsys.readouterr().err
    assert exit_code(words(simulated_stac, store, **other, seed=7, append="true")) == 1
    assert "all versions must share" in capsys.readouterr().err
    newest = latest(str(store))
    assert newest is not None
    assert newest.number == 1


def test_what_failed_is_tried_again_in_a_new_version(
    version: Version, simulated_stac: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = version.chips()["row"].to_pylist()[0]
    used = next(r for r in version.manifest().to_pylist() if r["row"] == written)["optical_items"][0]
    damaged = Path(items_from_table(version.items())[used].assets["B8A"])
    whole = tmp_path / "whole.tif"
    shutil.copy(damaged, whole)
    store = tmp_path / "chips.zarr"
    south = {"region": SOUTH, "labels": "none", "max_failed_fraction": 1}
    try:
        damaged.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
        first = built(simulated_stac, store, **south)
    finally:
        shutil.copy(whole, damaged)
    assert first.sealed is not None
    assert first.sealed["failed"] > 0
    assert candidates_of_a_dry_run(simulated_stac, store, **south, retry_failed="true") == first.sealed["failed"]
    second = built(simulated_stac, store, **south, retry_failed="true")
    assert second.number == 2
    assert second.chips().num_rows == first.sealed["failed"]
    assert told(second) == told(version)
    assert len(second.written_rows()) == len(version.written_rows())
    assert exit_code(words(simulated_stac, store, **south, retry_failed="true")) == 1
    assert "nothing to try again" in capsys.readouterr().err


def test_what_was_wrong_with_items_is_kept_in_the_version(simulated_stac: str, tmp_path: Path) -> None:
    def change(asked: Asked, answer: dict[str, Any]) -> dict[str, Any]:
        optical = [f for f in answer.get("features", ()) if f.get("collection") == "sentinel-2-l2a"]
        for feature in optical:
            del feature["properties"]["eo:cloud_cover"]
            without = {key: asset for key, asset in feature["assets"].items() if key != "B05"}
            answer["features"].append({**feature, "id": f"{feature['id']}_torn", "assets": without})
        return answer

    with StacProxy(simulated_stac) as proxy:
        proxy.change = change
        version = built(proxy.url, tmp_path / "chips.zarr", region=SOUTH, labels="none")
    (used,) = {name for row in version.manifest().to_pylist() for name in row["optical_items"]}
    notes = version.objects.get_table("item_notes.parquet").to_pylist()
    assert sorted((note["item"], note["used"]) for note in notes) == [(used, True), (f"{used}_torn", False)]
    said = {note["item"]: note["note"] for note in notes}
    assert said[f"{used}_torn"] == "has no asset B05"
    assert said[used].startswith("has no eo:cloud_cover")


def test_nothing_new_leaves_no_version_behind(
    version: Version, simulated_stac: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = copied(version, tmp_path / "chips.zarr")
    stricter = {"region": SOUTH, "labels": "none", "pairing.max_dt_days": 2.9}
    for dry in ("false", "true"):
        assert exit_code(words(simulated_stac, store, **stricter, append="true", dry_run=dry)) == 1
        assert "nothing is new" in capsys.readouterr().err
    newest = latest(str(store))
    assert newest is not None
    assert newest.number == 1
    assert Store.open(str(store)).num_rows == Store.open(version.url).num_rows
