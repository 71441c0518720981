"""Which cells a dataset is made of, from build_dataset's command line."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import shapely

from pipeline.grid import Cell, cells_covering
from pipeline.labels import LABEL_MISSING
from pipeline.regions import parse_region
from pipeline.store import Store
from pipeline.versions import Version
from tests.building import PROFILE, built, exit_code, words

pytestmark = [
    pytest.mark.usefixtures("small_cluster"),
    # Ray's own settings object warns about its own fields when it is copied.
    pytest.mark.filterwarnings("ignore:.* is deprecated:Warning:ray.data.context"),
    pytest.mark.filterwarnings("ignore:.* is deprecated:Warning:ray.data._internal"),
]

EVERYTHING = {"screening.max_cloud_fraction": 1.0, "pairing.max_cloud_percent": 100.0}


@pytest.fixture(scope="module")
def whole(simulated_stac: str, tmp_path_factory: pytest.TempPathFactory) -> Version:
    """Every cell of the region, whatever the clouds."""
    return built(simulated_stac, tmp_path_factory.mktemp("built") / "chips.zarr", **EVERYTHING)


def considered(version: Version) -> set[str]:
    """Cells that a version knows of: with candidates or with a reason why not."""
    return {*version.manifest(columns=["cell"])["cell"].to_pylist(), *version.rejections()["cell"].to_pylist()}


def hashes(version: Version, cells: set[str]) -> set[tuple[str, str, str]]:
    rows = version.chips(columns=["cell", "pair", "sha256"]).to_pylist()
    return {(row["cell"], row["pair"], row["sha256"]) for row in rows if row["cell"] in cells}


def test_all_cells_of_the_region_are_considered(whole: Version) -> None:
    cells = cells_covering(parse_region(",".join(map(str, PROFILE.region))), side_m=2640)
    assert considered(whole) == {cell.id for cell in cells}


def test_a_uniform_sample_is_some_of_them(whole: Version, simulated_stac: str, tmp_path: Path) -> None:
    how = {**EVERYTHING, "sampling.method": "uniform", "sampling.num_cells": 5}
    five = considered(built(simulated_stac, tmp_path / "five.zarr", **how))
    assert len(five) == 5
    assert five < considered(whole)
    assert considered(built(simulated_stac, tmp_path / "again.zarr", **how)) == five
    assert considered(built(simulated_stac, tmp_path / "other.zarr", **how, seed=1)) != five


def test_a_list_of_cells_gives_their_chips_alone(whole: Version, simulated_stac: str, tmp_path: Path) -> None:
    copied = [row["cell"] for row in whole.manifest().to_pylist() if row["cell"].startswith("33N")]
    wanted = sorted(set(copied))[:2]
    listed = tmp_path / "cells.txt"
    listed.write_text("\n".join(wanted))
    how = {**EVERYTHING, "labels": "none", "sampling.method": "list", "sampling.file": listed}
    version = built(simulated_stac, tmp_path / "chips.zarr", **how)
    assert considered(version) == set(wanted)
    assert {entry[:2] for entry in hashes(version, set(wanted))} == {entry[:2] for entry in hashes(whole, set(wanted))}
    # Another list is another request, also under the same name.
    listed.write_text(wanted[0])
    assert exit_code(words(simulated_stac, tmp_path / "chips.zarr", **how)) == 1


def test_cells_around_a_city_are_near_it(simulated_stac: str, tmp_path: Path) -> None:
    west, south, east, north = PROFILE.region
    lon, lat = (west + east) / 2, (south + north) / 2
    cities = tmp_path / "cities.csv"
    cities.write_text(f"lon,lat,population\n{lon},{lat},100000\n")
    how = {"sampling.method": "cities", "sampling.file": cities, "sampling.num_cells": 4, "sampling.sigma_km": 2}
    version = built(simulated_stac, tmp_path / "chips.zarr", **EVERYTHING, **how)
    near = considered(version)
    assert len(near) == 4
    centres = np.array([Cell.from_id(name, side_m=2640).centre_lonlat for name in near])
    assert np.hypot((centres[:, 0] - lon) * 74, (centres[:, 1] - lat) * 111).max() < 10


def test_a_stratified_sample_has_as_many_of_every_land_cover(
    whole: Version, simulated_stac: str, tmp_path: Path
) -> None:
    store = Store.open(whole.url)
    prevailing: dict[str, int] = {}
    for row in whole.chips(columns=["row", "cell", "status"]).to_pylist():
        if row["status"] == "written":
            label = store.read_chip(row["row"])["label_worldcover"]
            prevailing[row["cell"]] = int(np.bincount(label[label != LABEL_MISSING]).argmax())
    strata = Counter(prevailing.values())
    assert len(strata) > 1
    number = 2 * len(strata)
    how = {"sampling.method": "stratified", "sampling.num_cells": number, "sampling.pool_factor": 50}
    version = built(simulated_stac, tmp_path / "chips.zarr", **EVERYTHING, **how)
    taken = Counter(prevailing[name] for name in considered(version) if name in prevailing)
    # By a hundred points of each cell, not by all its pixels: at most one cell may count otherwise.
    assert sum(taken.values()) >= number - 1
    assert all(taken[code] >= min(2, there) - 1 for code, there in strata.items()), (taken, strata)


def test_no_chip_comes_near_what_is_kept_out(whole: Version, simulated_stac: str, tmp_path: Path) -> None:
    written = sorted({row["cell"] for row in whole.chips().to_pylist() if row["status"] == "written"})
    kept_out = Cell.from_id(written[0], side_m=2640)
    areas = tmp_path / "test-set.geojson"
    feature = {
        "type": "Feature",
        "properties": {"name": "test set"},
        "geometry": shapely.geometry.mapping(kept_out.footprint.buffer(-0.001)),
    }
    areas.write_text(json.dumps({"type": "FeatureCollection", "features": [feature]}))
    how = {**EVERYTHING, "exclude.areas": areas, "exclude.buffer_m": 500}
    version = built(simulated_stac, tmp_path / "chips.zarr", **how)
    excluded = {r["cell"]: r["detail"] for r in version.rejections().to_pylist() if r["reason"] == "excluded"}
    assert kept_out.id in excluded
    assert len(excluded) > 1
    assert not set(excluded) & set(version.manifest(columns=["cell"])["cell"].to_pylist())
    assert considered(version) == considered(whole)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"sampling.method": "uniform", "sampling.num_cells": 10_000}, "num_cells=10000"),
        ({"sampling.method": "list", "sampling.file": "/nowhere.txt"}, "/nowhere.txt"),
        ({"exclude.areas": "/nowhere.geojson"}, "/nowhere.geojson"),
    ],
)
def test_what_cannot_be_sampled_ends_with_a_message(
    how: dict[str, object], message: str, simulated_stac: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(words(simulated_stac, tmp_path / "chips.zarr", **how)) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "chips.zarr").exists()
