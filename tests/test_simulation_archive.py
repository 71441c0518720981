"""The archive on disk: pixels, items, and that it is whole or not there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import shapely
from jsonschema import Draft7Validator
from numpy.typing import NDArray
from pystac_client import Client
from referencing import Registry, Resource
from rio_cogeo.cogeo import cog_validate

from jobs.simulate import Simulate, main
from pipeline.bands import OPTICAL_BANDS, RADAR_BANDS
from pipeline.simulation import archive as archive_module
from pipeline.simulation.archive import is_complete, write_archive, write_scene
from pipeline.simulation.profiles import PROFILES
from pipeline.simulation.scenes import LabelScene, OpticalScene, RadarScene
from pipeline.simulation.server import StacServer
from tests.real_scenes import write_real_archive

PROFILE = PROFILES["test"]
OPTICAL = [scene for scene in PROFILE.scenes if isinstance(scene, OpticalScene)]
RADAR = [scene for scene in PROFILE.scenes if isinstance(scene, RadarScene)]
LABELS = [scene for scene in PROFILE.scenes if isinstance(scene, LabelScene)]


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("simulated") / "archive"
    write_archive(directory, PROFILE, seed=3)
    return directory


@pytest.fixture(scope="module")
def client(archive: Path) -> Iterator[Client]:
    with StacServer(archive) as server:
        yield Client.open(server.url)


def items(archive: Path) -> list[dict[str, Any]]:
    files = sorted((archive / "items").glob("*.json"))
    return [item for file in files for item in json.loads(file.read_text())["features"]]


def pixels(archive: Path, scene: OpticalScene | RadarScene | LabelScene, band: str) -> NDArray[Any]:
    item = next(item for item in items(archive) if item["id"] == scene.id and _epsg(item) == scene.frame.epsg)
    with rasterio.open(item["assets"][band]["href"]) as file:
        return file.read(1)


def _epsg(item: dict[str, Any]) -> int:
    return int(item["properties"]["proj:epsg"])


def test_every_raster_is_a_valid_cog_on_the_grid_its_item_states(archive: Path) -> None:
    for item in items(archive):
        for name, asset in item["assets"].items():
            valid, errors, warnings = cog_validate(asset["href"])
            assert valid, (item["id"], name, errors)
            assert not warnings, (item["id"], name, warnings)
            where = asset if "proj:transform" in asset else item["properties"]
            with rasterio.open(asset["href"]) as file:
                assert list(file.transform)[:6] == where["proj:transform"][:6]
                assert list(file.shape) == where["proj:shape"]
                assert file.crs.to_epsg() == _epsg(item)
                assert file.compression.name == "deflate"
                assert file.overviews(1) or max(file.shape) <= 512
                expected = {"sentinel-1-rtc": ("float32", -32768), "esa-worldcover": ("uint8", 0)}
                otherwise = ("uint8" if name == "SCL" else "uint16", 0)
                assert (file.dtypes[0], file.nodata) == expected.get(item["collection"], otherwise)


def test_an_optical_pixel_without_data_lies_outside_the_swath_and_nowhere_else(archive: Path) -> None:
    for scene in OPTICAL:
        coarse = scene.frame.coarser(6)
        seen = np.ones((coarse.height_px, coarse.width_px), bool)
        if scene.swath:
            seen = scene.swath.holds(coarse, scene.ground.plane)
            assert 0.02 < np.mean(~seen) < 0.5
        for band in (*OPTICAL_BANDS, "SCL"):
            data = pixels(archive, scene, band) != 0
            step = data.shape[0] // coarse.height_px
            np.testing.assert_array_equal(data, seen.repeat(step, 0).repeat(step, 1))


def test_a_radar_pixel_without_data_lies_outside_the_swath_and_nowhere_else(archive: Path) -> None:
    for scene in RADAR:
        seen = np.ones((scene.frame.height_px, scene.frame.width_px), bool)
        if scene.swath:
            seen = scene.swath.holds(scene.frame, scene.ground.plane)
            assert 0.02 < np.mean(~seen) < 0.5
        for band in RADAR_BANDS:
            power = pixels(archive, scene, band.lower())
            np.testing.assert_array_equal(power != -32768, seen)
            assert (power[seen] > 0).all()


def test_clouds_are_bright_shadows_dark_and_both_are_classified(archive: Path) -> None:
    cloudy = next(scene for scene in OPTICAL if scene.cloud_fraction > 0.5)
    fair = next(scene for scene in OPTICAL if scene.cloud_fraction == 0.12 and scene.frame.epsg == 32632)
    blue = pixels(archive, fair, "B02").reshape(552, 2, 552, 2).mean(axis=(1, 3)) - fair.offset_dn
    infrared, classes = pixels(archive, fair, "B8A").astype(float) - fair.offset_dn, pixels(archive, fair, "SCL")
    clear = np.isin(classes, (4, 5, 6))
    assert 0.5 < clear.mean() < 0.95
    assert blue[classes == 9].min() > np.percentile(blue[clear], 99)
    assert blue[classes == 8].mean() > 1.8 * blue[clear].mean()
    assert np.median(infrared[classes == 3]) < 0.75 * np.median(infrared[np.isin(classes, (4, 5))])
    assert np.isin(pixels(archive, cloudy, "SCL"), (8, 9, 10)).mean() > 0.7


def test_clear_classes_follow_the_land(archive: Path) -> None:
    clear_day = next(scene for scene in OPTICAL if scene.cloud_fraction == 0)
    classes = pixels(archive, clear_day, "SCL")
    red, infrared = (pixels(archive, clear_day, band).astype(float) - 1000 for band in ("B05", "B8A"))
    assert set(np.unique(classes)) == {0, 4, 5, 6}
    index = (infrared - red) / (infrared + red)
    assert np.median(index[classes == 4]) > np.median(index[classes == 5]) + 0.1
    assert np.median(infrared[classes == 6]) < 1000


def test_the_offset_is_on_exactly_from_baseline_04_00(archive: Path) -> None:
    found = {}
    for scene in OPTICAL:
        item = next(item for item in items(archive) if item["id"] == scene.id)
        found[scene.id] = item["properties"]["s2:processing_baseline"]
        land = pixels(archive, scene, "B12")
        darkest = np.percentile(land[land > 0], 0.5)
        assert (darkest > 900) == (float(found[scene.id]) >= 4.0) == (scene.offset_dn == 1000), scene.id
    assert sorted(set(found.values())) == ["03.01", "04.00", "05.10"]


def test_dates_make_pairs_and_one_pass_is_too_far_from_all(archive: Path) -> None:
    del archive
    here = [scene for scene in RADAR if scene.frame.epsg == 32632]
    gaps = [min(abs((scene.sensed - other.sensed).total_seconds()) for other in OPTICAL) / 86400 for scene in here]
    assert sorted(gap > 3 for gap in gaps) == [False] * (len(gaps) - 1) + [True]


def test_labels_are_the_land_that_the_scenes_show(archive: Path) -> None:
    east = next(scene for scene in LABELS if scene.tile == "N48E012")
    west = next(scene for scene in LABELS if scene.tile == "N48E009")
    assert west.frame.bounds[2] == pytest.approx(east.frame.bounds[0])
    clear_day = next(scene for scene in OPTICAL if scene.cloud_fraction == 0)
    codes = pixels(archive, west, "map")
    lon, lat = 11.95, np.linspace(48.30, 48.36, 400)
    from pyproj import Transformer

    x, y = Transformer.from_crs(4326, 32632, always_xy=True).transform(np.full(400, lon), lat)
    frame = west.frame
    label = codes[((frame.top - lat) * 12000).astype(int), int((lon - frame.left) * 12000)]
    classes = pixels(archive, clear_day, "SCL")
    row, column = (clear_day.frame.top - y) / 20, (x - clear_day.frame.left) / 20
    seen = classes[row.astype(int), column.astype(int)]
    assert np.mean((label == 80) == (seen == 6)) > 0.97
    assert {80} <= set(np.unique(codes)) <= {10, 20, 30, 40, 50, 60, 80, 90}


def test_items_have_the_fields_of_the_recorded_real_ones(archive: Path, shared_data: Path) -> None:
    recorded = shared_data / "stac/planetary-computer"
    for collection in ("sentinel-1-rtc", "sentinel-2-l2a"):
        real = json.loads((recorded / f"items-{collection}.json").read_text())[0]
        ours = next(item for item in items(archive) if item["collection"] == collection)
        assert set(real["properties"]) == set(ours["properties"])
        for name, asset in ours["assets"].items():
            absent = set(real["assets"][name]) - set(asset)
            assert absent <= {"file:size", "file:checksum"}, (name, absent)
            for key in ("type", "roles", "title", "gsd", "raster:bands", "eo:bands"):
                assert real["assets"][name].get(key) == asset.get(key)


def test_items_and_collections_are_valid_stac(archive: Path, shared_data: Path) -> None:
    folder = shared_data.parent / "schemas"
    if not folder.is_dir():
        pytest.skip(f"no schemas at {folder}")
    schemas = [json.loads(path.read_text()) for path in sorted(folder.rglob("*.json"))]
    registry = Registry().with_resources(
        (schema["$id"], Resource.from_contents(schema)) for schema in schemas if "$id" in schema
    )
    base = "https://schemas.stacspec.org/v1.0.0"
    kinds = {"Feature": "item-spec/json-schema/item.json", "Collection": "collection-spec/json-schema/collection.json"}
    collections = [json.loads(path.read_text()) for path in (archive / "collections").glob("*.json")]
    for document in [*items(archive), *collections]:
        schema = {"$ref": f"{base}/{kinds[document['type']]}"}
        Draft7Validator(schema, registry=registry).validate(document)
        if document["type"] == "Feature":
            assert shapely.geometry.shape(document["geometry"]).is_valid


def test_the_same_seed_gives_the_same_pixels_and_another_does_not(archive: Path, tmp_path: Path) -> None:
    scene = next(scene for scene in OPTICAL if scene.frame.epsg == 32736)
    pass_ = next(scene for scene in RADAR if scene.frame.epsg == 32736)
    for seed, same in ((3, True), (4, False)):
        for each, asset in ((scene, "B08"), (pass_, "vh")):
            again = write_scene(each, tmp_path / str(seed), seed=seed)
            with rasterio.open(again["assets"][asset]["href"]) as file:
                assert np.array_equal(file.read(1), pixels(archive, each, asset)) == same


def test_a_complete_archive_is_left_alone_and_another_is_refused(archive: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in archive.rglob("*")}
    write_archive(archive, PROFILE, seed=3)
    assert {path: path.stat().st_mtime_ns for path in archive.rglob("*")} == before
    with pytest.raises(ValueError, match="holds no archive of profile test, seed 4"):
        write_archive(archive, PROFILE, seed=4)
    assert {path: path.stat().st_mtime_ns for path in archive.rglob("*")} == before


def test_an_interrupted_archive_is_not_there_and_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = replace(PROFILE, scenes=tuple(scene for scene in PROFILE.scenes if scene.frame.epsg in (32736, 4326)))
    directory = tmp_path / "archive"
    with monkeypatch.context() as patch:
        patch.setattr(archive_module, "radar_item", _power_cut)
        with pytest.raises(KeyboardInterrupt):
            write_archive(directory, small, seed=3)
    assert not directory.exists()
    write_archive(directory, small, seed=3)
    assert is_complete(directory, small, seed=3)
    assert {item["id"] for item in items(directory)} == {scene.id for scene in small.scenes}
    assert [path.name for path in tmp_path.iterdir()] == ["archive"]
    assert all(Path(asset["href"]).exists() for item in items(directory) for asset in item["assets"].values())


def _power_cut(*_: object) -> None:
    raise KeyboardInterrupt


def test_what_is_not_an_archive_is_neither_overwritten_nor_served(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        write_archive(tmp_path, PROFILE, seed=3)
    assert (tmp_path / "precious.txt").read_text() == "mine"
    with pytest.raises(ValueError, match="no archive at"), StacServer(tmp_path):
        pass


def test_the_server_lists_the_collections(client: Client) -> None:
    found = {collection.id for collection in client.get_collections()}
    assert found == {"sentinel-2-l2a", "sentinel-1-rtc", "esa-worldcover"}


def test_searching_by_place_and_time_finds_what_lies_there(client: Client) -> None:
    june = client.search(
        collections=["sentinel-2-l2a"], bbox=PROFILE.region, datetime="2022-06-11T00:00:00Z/2022-06-13T00:00:00Z"
    )
    expected = sorted(scene.id for scene in OPTICAL if scene.sensed.day == 12 and scene.frame.epsg != 32736)
    assert sorted(item.id for item in june.items()) == expected
    south = client.search(
        collections=["sentinel-1-rtc", "sentinel-2-l2a"], intersects=shapely.box(*PROFILE.southern_region)
    )
    assert {item.properties["proj:code"] for item in south.items()} == {"EPSG:32736"}
    assert len(list(client.search(collections=["esa-worldcover"], bbox=PROFILE.border_region).items())) == 2


def test_small_pages_hold_everything_once(client: Client, archive: Path) -> None:
    pages = list(client.search(limit=3).pages())
    found = [item.id for page in pages for item in page.items]
    assert len(pages) > 3
    assert sorted(found) == sorted(item["id"] for item in items(archive))


def test_the_server_ends_with_its_context(archive: Path) -> None:
    with StacServer(archive) as server:
        pid = server.pid
        assert pid is not None
        assert Path(f"/proc/{pid}").exists()
    assert not Path(f"/proc/{pid}").exists()


def test_the_job_says_what_it_would_do_and_does_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    main(Simulate(out=str(tmp_path / "archive"), profile="test", dry_run=True))
    assert f"region={','.join(map(str, PROFILE.region))}" in caplog.text
    assert not list(tmp_path.iterdir())


def test_the_job_reuses_a_complete_archive(archive: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    main(Simulate(out=str(archive), profile="test", seed=3, processes=1, run_dir=str(run_dir)))
    assert json.loads((run_dir / "run.json").read_text())["results"] == {"reused": True}


def test_real_pixels_become_an_archive_that_gives_them_back(shared_data: Path, tmp_path: Path) -> None:
    real = write_real_archive(shared_data, tmp_path / "real")
    assert [len(cells) for cells in real.cells.values()] == [1, 1, 1, 4]
    with StacServer(real.directory) as server:
        client = Client.open(server.url)
        for place, region in real.regions.items():
            found = list(client.search(bbox=region, datetime=real.periods[place]).items())
            assert {item.collection_id for item in found} == {"sentinel-1-rtc", "sentinel-2-l2a"}, place
    source = shared_data / "terramind-examples/38D_378R_2_3"
    with rasterio.open(source / "S2L2A.tif") as file:
        expected = file.read(8)[:222, :222]
    item = next(item for item in items(real.directory) if "T36MXB" in item["id"])
    with rasterio.open(item["assets"]["B08"]["href"]) as file:
        np.testing.assert_array_equal(file.read(1).astype(int) - 1000, np.maximum(expected, 1))
    with rasterio.open(source / "S1RTC.tif") as file:
        decibels = file.read(1)[:222, :222]
    radar = next(item for item in items(real.directory) if _epsg(item) == 32736 and "vv" in item["assets"])
    with rasterio.open(radar["assets"]["vv"]["href"]) as file:
        np.testing.assert_allclose(10 * np.log10(file.read(1)), decibels, atol=1e-4)


@pytest.mark.slow
def test_two_processes_write_what_one_does(archive: Path, tmp_path: Path) -> None:
    directory = tmp_path / "archive"
    write_archive(directory, PROFILE, seed=3, processes=2)
    for file in sorted(path.relative_to(archive) for path in archive.rglob("*.tif")):
        assert (directory / file).read_bytes() == (archive / file).read_bytes(), file
    shutil.rmtree(directory)
