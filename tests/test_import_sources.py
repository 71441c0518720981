"""What is found in datasets' folders, and their pixels and labels, against rasterio's and the files' own."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import rasterio
from numpy.testing import assert_array_equal
from numpy.typing import NDArray

from pipeline.bands import NATIVE_GROUPS, OPTICAL_BANDS
from pipeline.grid import cell_at
from pipeline.imports import bigearthnet, eurosat, sen1floods11, ssl4eo, ssl4eo_v11
from pipeline.imports.plan import manifest_parts, sample_from_row
from pipeline.imports.rasters import to_optical, to_radar
from pipeline.imports.samples import Choices, Look, Reading, Sample, Source, Unfit, pair_looks
from pipeline.layout import Layout
from pipeline.splits import SplitRules, split_of
from pipeline.types import ChipArrays, ChipError
from tests.aligned_datasets import read_tif, write_ssl4eo_v11, write_tif

BOTH = Choices()
RULES = SplitRules(block_cells=4, val_fraction=0.2, test_fraction=0.2, buffer_cells=1, seed=3)


def read_all(source: Source, folder: Path, choices: Choices = BOTH) -> dict[str, Reading]:
    """Sample name -> chip, or why there is none, read unit by unit."""
    layout = source.layout(choices)
    units: dict[str, list[Sample]] = {}
    for sample in source.find(folder, choices).samples:
        units.setdefault(sample.unit or sample.name, []).append(sample)
    read = {}
    for samples in units.values():
        for sample, reading in zip(samples, source.read(folder, samples, layout), strict=True):
            if not isinstance(reading, Exception):
                layout.check(0, reading)
            read[sample.name] = reading
    return read


def chip_of(reading: Reading) -> ChipArrays:
    assert isinstance(reading, dict), reading
    return reading


def centi_db(decibel: NDArray[Any]) -> NDArray[Any]:
    """The stated formula: hundredths of a decibel, at least -5000, NaN as no data."""
    with np.errstate(invalid="ignore"):
        return np.where(np.isnan(decibel), -32768, np.maximum(np.round(decibel.astype(np.float64) * 100), -5000))


def band(chip: ChipArrays, name: str) -> NDArray[Any]:
    (group,) = (group for group, names in NATIVE_GROUPS.items() if name in names)
    return chip[group][NATIVE_GROUPS[group].index(name)]


@pytest.fixture
def ssl4eo_folder(shared_data: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(shared_data / "ssl4eo-s12", tmp_path / "ssl4eo"))


# SSL4EO-S12


@pytest.mark.parametrize("level", ["l2a", "l1c"])
def test_ssl4eo_pixels_are_the_files_own(shared_data: Path, level: str) -> None:
    folder, choices = shared_data / "ssl4eo-s12", Choices(level=level)  # type: ignore[arg-type]
    samples = {sample.name: sample for sample in ssl4eo.find(folder, choices).samples}
    chips = read_all(ssl4eo, folder, choices)
    assert len(chips) == 2
    for name, reading in chips.items():
        chip, files = chip_of(reading), samples[name].files
        assert files["optical"].startswith("s2a" if level == "l2a" else "s2c")
        for each in OPTICAL_BANDS:
            file = each.replace("B0", "B")
            assert_array_equal(band(chip, each), read_tif(folder / files["optical"] / f"{file}.tif")[0])
        for index, each in enumerate(("VV", "VH")):
            assert_array_equal(chip["radar"][index], centi_db(read_tif(folder / files["radar"] / f"{each}.tif")[0]))


def test_ssl4eo_pairs_the_looks_of_a_place_and_says_how_far_apart_they_are(shared_data: Path) -> None:
    folder = shared_data / "ssl4eo-s12"
    for pairing in ("nearest", "index"):
        found = ssl4eo.find(folder, Choices(pairing=pairing))  # type: ignore[arg-type]
        assert [(each.name, each.dt_s) for each in found.samples] == [
            ("0000200/0", round((datetime(2020, 6, 7, 1, 8) - datetime(2020, 6, 4, 5, 46, 39)).total_seconds())),
            ("0000200/1", round((datetime(2020, 9, 3, 13, 12, 12) - datetime(2020, 8, 13, 5, 46, 39)).total_seconds())),
        ]
    first = found.samples[0]
    assert (first.orbit_state, first.relative_orbit, first.baseline, first.offset_dn) == ("descending", 107, "02.14", 0)
    assert first.optical_id == "S2B_MSIL2A_20200604T054639_N0214_R048_T43RCP_20200604T094332"
    near = ssl4eo.find(folder, Choices(max_dt_days=10))
    assert [each.name for each in near.samples] == ["0000200/0"]
    assert [(each.reason, each.detail[:9]) for each in near.not_taken] == [("dt", "21.3 days")]


def displacement(optical: NDArray[Any], radar: NDArray[Any], reach: int = 6) -> tuple[int, int]:
    """(y, x) by which radar edges lie off optical ones, in whole pixels."""

    def edges(image: NDArray[Any]) -> NDArray[Any]:
        smooth = sum(np.roll(image, (y, x), (0, 1)) for y in range(-2, 3) for x in range(-2, 3))
        size = np.hypot(*np.gradient(smooth))[reach:-reach, reach:-reach]
        return np.asarray((size - size.mean()) / size.std())

    inner = (slice(reach, -reach),) * 2
    ours, theirs = edges(optical)[inner], edges(radar)
    scores = {}
    for y in range(-reach, reach + 1):
        for x in range(-reach, reach + 1):
            moved = np.roll(theirs, (-y, -x), (0, 1))[inner]
            scores[y, x] = float((ours * moved).mean())
    return max(scores, key=lambda step: scores[step])


def test_ssl4eo_sensors_lie_on_each_other_pixel_by_pixel_and_not_where_their_headers_say(shared_data: Path) -> None:
    folder = shared_data / "ssl4eo-s12"
    first = ssl4eo.find(folder, BOTH).samples[0]
    chip = chip_of(read_all(ssl4eo, folder)[first.name])
    with rasterio.open(folder / first.files["radar"] / "VV.tif") as file:
        radar_at = ~file.transform
    optical_at = rasterio.Affine(*first.transform)  # type: ignore[misc]
    optical = band(chip, "B04").astype(float) + band(chip, "B03")
    radar = chip["radar"].astype(float).sum(axis=0)
    for y in (0, 132):
        for x in (0, 132):
            quarter = (slice(y, y + 132), slice(x, x + 132))
            measured = np.array(displacement(optical[quarter], radar[quarter]))
            column, row = radar_at @ (optical_at @ (x + 66.0, y + 66.0))
            claimed = np.array([row - y - 66, column - x - 66])
            assert np.abs(measured).max() <= 2, measured
            assert np.abs(claimed - measured).max() > 3, (claimed, measured)


def test_ssl4eo_takes_out_the_offset_of_scenes_that_were_fetched_again(ssl4eo_folder: Path) -> None:
    (scene, *_) = sorted((ssl4eo_folder / "s2a" / "0000200").iterdir())
    metadata = json.loads((scene / "metadata.json").read_bytes())
    (scene / "metadata.json").write_text(json.dumps({**metadata, "PROCESSING_BASELINE": "05.00"}))
    for path in scene.glob("B*.tif"):
        with rasterio.open(path, "r+") as file:
            file.write(file.read() + 1000)
    chips = read_all(ssl4eo, ssl4eo_folder)
    assert_array_equal(band(chip_of(chips["0000200/0"]), "B12"), read_tif(scene / "B12.tif")[0] - 1000)


def test_ssl4eo_says_which_file_is_missing_damaged_or_of_another_size(ssl4eo_folder: Path) -> None:
    first, second = sorted((ssl4eo_folder / "s2a" / "0000200").iterdir())
    (first / "B11.tif").unlink()
    whole = (second / "B8.tif").read_bytes()
    (second / "B8.tif").write_bytes(whole[: len(whole) // 3])
    chips = read_all(ssl4eo, ssl4eo_folder)
    assert isinstance(chips["0000200/0"], ChipError)
    assert "B11.tif: is missing" in str(chips["0000200/0"])
    assert isinstance(chips["0000200/1"], ChipError)
    assert "B8.tif" in str(chips["0000200/1"])
    for path in ssl4eo_folder.rglob("V?.tif"):
        write_tif(path, np.full((1, 260, 260), -10.5, np.float32) - np.random.default_rng(0).random(1, np.float32))
    read = read_all(ssl4eo, ssl4eo_folder, Choices(sensors="radar"))
    assert [(type(each), str(each)) for each in read.values()] == [(Unfit, "wrong_size")] * 2


def test_ssl4eo_can_be_taken_with_one_sensor(shared_data: Path) -> None:
    folder = shared_data / "ssl4eo-s12"
    assert [set(chip_of(each)) for each in read_all(ssl4eo, folder, Choices(sensors="radar")).values()] == [
        {"radar"}
    ] * 2
    optical = read_all(ssl4eo, folder, Choices(sensors="optical"))
    assert [set(chip_of(each)) for each in optical.values()] == [{"b10", "b20", "b60"}] * 2


def look(day: int) -> Look:
    return Look(
        path=f"day-{day:03d}", datetime=datetime(2020, 1, 1, tzinfo=UTC).replace(month=1 + day // 28, day=1 + day % 28)
    )


def test_looks_are_paired_by_nearness_or_by_their_place_in_time() -> None:
    optical, radar = [look(20), look(0), look(40)], [look(38), look(2)]
    nearest, left = pair_looks(optical, radar, Choices(max_dt_days=15))
    assert [(a.path, b.path) for a, b in nearest] == [("day-000", "day-002"), ("day-040", "day-038")]
    assert [(each.name, each.reason) for each in left] == [("day-020", "dt")]
    by_place, left = pair_looks(optical, radar, Choices(pairing="index"))
    assert [(a.path, b.path) for a, b in by_place] == [("day-000", "day-002"), ("day-020", "day-038")]
    assert [(each.name, each.reason) for each in left] == [("day-040", "no_radar")]
    ties, _ = pair_looks([look(10)], [look(14), look(6)], BOTH)
    assert ties[0][1].path == "day-006"
    assert pair_looks([look(1)], [], BOTH)[1][0].reason == "no_radar"


# SSL4EO-S12 v1.1


@pytest.fixture(scope="module")
def v11(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("v11")
    stored = {
        ("train", 1): write_ssl4eo_v11(folder, split="train", number=1, places=["0080717", "0060573"]),
        ("val", 1): write_ssl4eo_v11(folder, split="val", number=1, places=["0000173"], dates=1),
    }
    return folder, {
        f"{place}_{date}": {product: pixels[number, date] for product, pixels in stored[key].items()}
        for key, places, dates in ((("train", 1), ["0080717", "0060573"], 2), (("val", 1), ["0000173"], 1))
        for number, place in enumerate(places)
        for date in range(dates)
    }


def test_v11_pixels_are_those_of_the_archives_without_their_offset(v11: tuple[Path, dict[str, Any]]) -> None:
    folder, stored = v11
    chips = read_all(ssl4eo_v11, folder)
    assert chips.keys() == stored.keys()
    for name, pixels in stored.items():
        chip = chip_of(chips[name])
        for index, each in enumerate(OPTICAL_BANDS):
            dn = pixels["S2L2A"][index].astype(int)
            assert_array_equal(band(chip, each), np.where(dn == 0, 0, np.maximum(dn - 1000, 1)))
        assert band(chip, "B01")[10, 10] == 1
        assert_array_equal(chip["radar"], centi_db(pixels["S1GRD"]))
        assert (chip["radar"][:, -1] == -32768).all()


def test_v11_says_places_dates_and_splits(v11: tuple[Path, dict[str, Any]]) -> None:
    samples = {each.name: each for each in ssl4eo_v11.find(v11[0], BOTH).samples}
    one = samples["0060573_1"]
    assert (one.split, one.index, one.dt_s, one.offset_dn) == ("train", (1, 1), 31 * 3600, 1000)
    assert (one.optical_id, one.radar_id) == ("S2L2A_0060573_1", "S1GRD_0060573_1")
    assert one.optical_datetime == datetime(2020, 7, 18, 9, 40, 31, tzinfo=UTC)
    assert (one.crs, one.transform) == ("EPSG:32633", (10, 0, 510_000, 0, -10, 4_213_000))
    assert samples["0000173_0"].split == "val"
    assert {each.unit for each in samples.values() if each.name.endswith("_0")} == {
        "train/ssl4eos12_train_seasonal_data_000001.zarr.zip/0",
        "val/ssl4eos12_val_seasonal_data_000001.zarr.zip/0",
    }


def rewrite(path: Path, change: dict[str, bytes | None]) -> None:
    """A zip file with other content, or None, under some names."""
    with zipfile.ZipFile(path) as archive:
        content: dict[str, bytes | None] = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in {**content, **change}.items():
            if data is not None:
                archive.writestr(name, data)


def test_v11_loses_only_what_a_damaged_chunk_held(v11: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(v11[0], tmp_path / "v11"))
    (train,) = (folder / "train" / "S2L2A").iterdir()
    (val,) = (folder / "val" / "S1GRD").iterdir()
    rewrite(train, {"bands/0.1.0.0.0": b"no blosc"})
    val.write_bytes(b"no zip")
    chips = read_all(ssl4eo_v11, folder)
    assert {name: isinstance(each, ChipError) for name, each in chips.items()} == {
        "0080717_0": False, "0080717_1": True, "0060573_0": False, "0060573_1": True,
    }  # fmt: skip
    assert train.name in str(chips["0060573_1"])
    (refused,) = ssl4eo_v11.find(folder, BOTH).not_taken
    assert (refused.name, refused.reason) == (f"val/S1GRD/{val.name}", "unreadable")
    val.unlink()
    (refused,) = ssl4eo_v11.find(folder, BOTH).not_taken
    assert (refused.reason, refused.detail) == ("no_radar", "is missing")


def test_v11_without_the_offset_it_should_have_is_noticed(v11: tuple[Path, dict[str, Any]]) -> None:
    reading = read_all(ssl4eo_v11, v11[0], Choices(offset_dn=4000))["0000173_0"]
    assert isinstance(reading, ChipError)
    assert "below the offset of 4000" in str(reading)
    as_is = chip_of(read_all(ssl4eo_v11, v11[0], Choices(offset_dn=0))["0000173_0"])
    assert_array_equal(band(as_is, "B12"), v11[1]["0000173_0"]["S2L2A"][11])


# EuroSAT


def test_eurosat_patches_have_their_bands_in_order_and_their_folder_as_class(shared_data: Path) -> None:
    folder = shared_data / "eurosat-ms"
    samples = {each.name: each for each in eurosat.find(folder, Choices(sensors="optical")).samples}
    chips = read_all(eurosat, folder)
    assert len(chips) == 8
    for name, reading in chips.items():
        pixels, chip = read_tif(folder / samples[name].files["optical"]), chip_of(reading)
        for index, each in enumerate(("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B09")):
            assert_array_equal(band(chip, each), pixels[index])
        for index, each in ((10, "B11"), (11, "B12"), (12, "B8A")):
            assert_array_equal(band(chip, each), pixels[index])
        label = samples[name].labels["eurosat"]
        assert isinstance(label, int)
        assert eurosat.CLASSES[label] == name.partition("_")[0]
        # Seen in the pixels: what is left out shows cirrus only, and B8A looks like B8 on land.
        assert pixels[9].mean() < 20
        if not name.startswith("SeaLake"):
            assert np.corrcoef(band(chip, "B8A").ravel(), band(chip, "B08").ravel())[0, 1] > 0.8


def test_eurosat_is_found_below_other_folders_and_split_by_its_lists(shared_data: Path, tmp_path: Path) -> None:
    deep = tmp_path / "ds/images/remote_sensing/otherDatasets/sentinel_2/tif"
    shutil.copytree(shared_data / "eurosat-ms", deep)
    lists = tmp_path / "lists"
    lists.mkdir()
    (lists / "eurosat-train.txt").write_text("AnnualCrop_1.jpg\nForest_2.jpg\n")
    (lists / "eurosat-val.txt").write_text("Pasture_300.jpg\n")
    (lists / "eurosat-test.txt").write_text("SeaLake_3000.jpg\nForest_1.jpg\n")
    found = eurosat.find(tmp_path, Choices(split_lists=str(lists)))
    assert {each.name: each.split for each in found.samples} == {
        "AnnualCrop_1": "train", "Forest_2": "train", "Pasture_300": "val", "SeaLake_3000": "test", "Forest_1": "test",
    }  # fmt: skip
    assert {each.reason for each in found.not_taken} == {"not_in_split_lists"}
    assert len(found.not_taken) == 3
    with pytest.raises(ValueError, match=r"none of eurosat-train\.txt"):
        eurosat.find(tmp_path, Choices(split_lists=str(deep)))


# BigEarthNet


def test_bigearthnet_pairs_have_the_files_pixels_and_the_labels_of_their_json(shared_data: Path) -> None:
    folder = shared_data / "bigearthnet-samples"
    found = bigearthnet.find(folder, BOTH)
    assert [each.name for each in found.samples] == [
        "S2A_MSIL2A_20170617T113321_36_85",
        "S2A_MSIL2A_20170617T113321_4_55",
    ]
    assert {each.reason for each in found.not_taken} == {"no_radar", "no_optical"}
    chips = read_all(bigearthnet, folder)
    for sample in found.samples:
        chip = chip_of(chips[sample.name])
        for each in OPTICAL_BANDS:
            assert_array_equal(band(chip, each), read_tif(folder / f"s2/{sample.name}/{sample.name}_{each}.tif")[0])
        for index, each in enumerate(("VV", "VH")):
            decibel = read_tif(folder / f"s1/{sample.radar_id}/{sample.radar_id}_{each}.tif")[0]
            assert_array_equal(chip["radar"][index], centi_db(decibel))
            assert np.unique(chip["radar"][index]).size > 1000
        said = json.loads((folder / f"s2/{sample.name}/{sample.name}_labels_metadata.json").read_bytes())
        codes = sample.labels["bigearthnet"]
        assert isinstance(codes, list)
        assert codes == sorted({bigearthnet.CLASS_OF_43[label] for label in said["labels"]} - {None})
        assert abs(sample.dt_s or 0) < 86400


def test_bigearthnet_43_classes_become_19() -> None:
    assert len(bigearthnet.CLASS_OF_43) == 43
    assert {code for code in bigearthnet.CLASS_OF_43.values() if code is not None} == set(range(19))
    assert sum(code is None for code in bigearthnet.CLASS_OF_43.values()) == 11
    names = ["Sea and ocean", "Airports", "Transitional woodland/shrub", "Estuaries"]
    assert bigearthnet.to_codes(names, "patch") == [13, 18]
    assert bigearthnet.to_codes(["Marine waters", "Transitional woodland, shrub"], "patch") == [13, 18]
    with pytest.raises(ValueError, match="patch: 'Oceans' is no class"):
        bigearthnet.to_codes(["Oceans"], "patch")


def test_bigearthnet_can_be_taken_with_one_sensor(shared_data: Path) -> None:
    folder = shared_data / "bigearthnet-samples"
    optical = bigearthnet.find(folder, Choices(sensors="optical"))
    assert len(optical.samples) == sum(1 for path in (folder / "s2").iterdir() if path.is_dir())
    # A name without its leading zero, and a patch whose labels are not beside it.
    moments = {each.name: each.optical_datetime for each in optical.samples}
    assert moments["S2B_MSIL2A_20170924T93021_41_29"] == datetime(2017, 9, 24, 9, 30, 21, tzinfo=UTC)
    labels = {each.name: each.labels["bigearthnet"] for each in optical.samples}
    assert labels["S2B_MSIL2A_20170924T93021_41_29"] == [8, 10]
    assert labels["S2A_MSIL2A_20170613T101031_N9999_R022_T33UUP_75_43"] is None
    # One patch has files that end in tiff.
    chips = read_all(bigearthnet, folder, Choices(sensors="optical"))
    assert {tuple(chip_of(each)) for each in chips.values()} == {("b10", "b20", "b60")}
    radar = read_all(bigearthnet, folder, Choices(sensors="radar"))
    assert {tuple(chip_of(each)) for each in radar.values()} == {("radar",)}


def test_the_second_bigearthnet_is_read_by_its_table(shared_data: Path, tmp_path: Path) -> None:
    old, radar = "S2A_MSIL2A_20170617T113321_36_85", "S1A_IW_GRDH_1SDV_20170617T064724_29UPU_36_85"
    new = "S2A_MSIL2A_20170617T113321_N9999_R080_T29UPU_36_85"
    source = shared_data / "bigearthnet-samples"
    optical_folder = tmp_path / "BigEarthNet-S2" / new.rsplit("_", 2)[0] / new
    optical_folder.mkdir(parents=True)
    for path in (source / "s2" / old).glob("*.tif"):
        shutil.copy(path, optical_folder / path.name.replace(old, new))
    shutil.copytree(source / "s1" / radar, tmp_path / "BigEarthNet-S1" / radar.rsplit("_", 3)[0] / radar)
    row = {"patch_id": new, "labels": ["Pastures", "Arable land"], "split": "validation", "s1_name": radar}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "metadata.parquet")
    (sample,) = bigearthnet.find(tmp_path, BOTH).samples
    assert (sample.name, sample.radar_id, sample.split, sample.labels) == (new, radar, "val", {"bigearthnet": [2, 4]})
    again, before = read_all(bigearthnet, tmp_path)[new], read_all(bigearthnet, source)[old]
    for name, pixels in chip_of(before).items():
        assert_array_equal(chip_of(again)[name], pixels)


def test_bigearthnet_repacked_with_four_bands_is_refused(shared_data: Path) -> None:
    with pytest.raises(ValueError, match=r"repacked as s2\.tif with some of the bands: all 12 are needed"):
        bigearthnet.find(shared_data / "bigearthnet-v2-4band", BOTH)


def test_bigearthnet_radar_on_another_grid_is_not_stacked(shared_data: Path, tmp_path: Path) -> None:
    name = "S2A_MSIL2A_20170617T113321_36_85"
    (sample,) = [
        each for each in bigearthnet.find(shared_data / "bigearthnet-samples", BOTH).samples if each.name == name
    ]
    shutil.copytree(shared_data / "bigearthnet-samples" / sample.files["radar"], tmp_path / sample.files["radar"])
    shutil.copytree(shared_data / "bigearthnet-samples" / sample.files["optical"], tmp_path / sample.files["optical"])
    for path in (tmp_path / sample.files["radar"]).glob("*.tif"):
        with rasterio.open(path, "r+") as file:
            file.transform = file.transform @ rasterio.Affine.translation(1, 0)
    (reading,) = read_all(bigearthnet, tmp_path).values()
    assert isinstance(reading, ChipError)
    assert "on another grid than the chip's other files, by 1.00 px" in str(reading)


# Sen1Floods11


def test_sen1floods11_chips_have_the_files_pixels_and_water(shared_data: Path) -> None:
    folder = shared_data / "sen1floods11"
    ((name, reading),) = read_all(sen1floods11, folder).items()
    chip, optical = chip_of(reading), read_tif(folder / f"{name}_S2Hand.tif")
    with rasterio.open(folder / f"{name}_S2Hand.tif") as file:
        said = [f"B{each[1:].zfill(2)}" for each in file.descriptions]
    for each in OPTICAL_BANDS:
        assert_array_equal(band(chip, each), optical[said.index(each)])
    assert_array_equal(chip["radar"], centi_db(read_tif(folder / f"{name}_S1Hand.tif")))
    label = read_tif(folder / f"{name}_LabelHand.tif")[0]
    assert_array_equal(chip["label_flood"], np.where(label == -1, 255, label))


def test_sen1floods11_radar_alone_takes_every_chip_and_keeps_what_is_missing(shared_data: Path) -> None:
    folder = shared_data / "sen1floods11"
    found = sen1floods11.find(folder, BOTH)
    assert {(each.name.partition("_")[0], each.reason) for each in found.not_taken} == {
        (event, "no_optical") for event in ("India", "Mekong", "Nigeria", "Pakistan", "Spain")
    }
    chips = read_all(sen1floods11, folder, Choices(sensors="radar"))
    assert len(chips) == 6
    nigeria = chip_of(chips["Nigeria_812045"])
    assert (nigeria["radar"] == -32768).sum() == 1158
    assert nigeria["radar"][nigeria["radar"] != -32768].min() == -5000
    assert (chip_of(chips["Mekong_333434"])["label_flood"] == 255).mean() == pytest.approx(0.22, abs=0.01)


def test_sen1floods11_knows_its_events_and_splits(shared_data: Path, tmp_path: Path) -> None:
    (tmp_path / "flood_train_data.csv").write_text("Spain_7370579_S1Hand.tif,Spain_7370579_LabelHand.tif\n")
    choices = Choices(sensors="radar", split_lists=str(tmp_path))
    (sample,) = sen1floods11.find(shared_data / "sen1floods11", choices).samples
    assert (sample.split, sample.orbit_state, sample.relative_orbit) == ("train", "descending", 110)
    assert sample.radar_datetime == datetime(2019, 9, 17, tzinfo=UTC)
    assert sample.optical_datetime is None


# Of all


@pytest.mark.parametrize("source", [ssl4eo, ssl4eo_v11, bigearthnet, eurosat, sen1floods11])
def test_a_folder_of_something_else_is_refused_and_says_what_was_expected(source: Source, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected"):
        source.find(tmp_path, BOTH)


def test_decibel_is_kept_to_its_hundredths_and_nothing_else_passes_for_it() -> None:
    values = np.array([[-0.004, -12.344, -12.346, -60.0, np.nan, -np.inf, np.inf, 3.25]], np.float64)
    assert to_radar(values, what="x").tolist() == [[0, -1234, -1235, -5000, -32768, -5000, -32768, 325]]
    with pytest.raises(ChipError, match="x: no value below 0, which is linear power"):
        to_radar(np.array([[0.01, 0.3]]), what="x")
    with pytest.raises(ChipError, match="x: only whole decibels"):
        to_radar(np.array([[-12.0, -13.0, np.nan]]), what="x")


def test_what_is_not_positive_is_no_data() -> None:
    dn = np.array([[-5, 0, 1, 32767]], np.int16)
    assert to_optical(dn, offset_dn=0, what="x").tolist() == [[0, 0, 1, 32767]]
    with pytest.raises(ChipError, match="x: float32 where integers"):
        to_optical(dn.astype(np.float32), offset_dn=0, what="x")


def samples_of(count: int) -> Iterator[Sample]:
    for number in range(count):
        yield Sample(
            name=f"s{number}",
            unit=f"u{number // 3}",
            files={"optical": f"o{number}", "radar": f"r{number}"},
            index=(number, 1),
            lonlat=(10 + number / 10, 47.0),
            split="test" if number % 7 == 0 else None,
            labels={"kind": None if number % 5 == 0 else [number]},
        )


def test_every_sample_has_one_row_whole_units_in_a_shard_and_the_split_of_its_ground() -> None:
    samples = list(samples_of(100))
    (part,) = manifest_parts(samples, first_row=16, shard_chips=8, rules=RULES)
    rows = part.to_pylist()
    assert sorted(row["pair"] for row in rows) == sorted(sample.name for sample in samples)
    numbers = [row["row"] for row in rows]
    assert numbers == sorted(set(numbers))
    assert min(numbers) == 16
    assert all(row["shard"] == row["row"] // 8 for row in rows)
    assert all(len({row["shard"] for row in rows if row["unit"] == f"u{unit}"}) == 1 for unit in range(34))
    by_name = {sample.name: sample for sample in samples}
    for row in rows:
        sample = by_name[row["pair"]]
        assert sample.lonlat is not None
        assert row["split"] == (sample.split or split_of(cell_at(*sample.lonlat, side_m=2640), RULES))
        assert row["label_kind"] == sample.labels["kind"]
        assert row["cell"] is None
        read = sample_from_row(row)
        assert (read.name, read.files, read.index) == (sample.name, dict(sample.files), sample.index)
    assert numbers != [row["row"] for row in sorted(rows, key=lambda row: int(row["pair"][1:]))]


def test_what_cannot_be_planned_is_refused() -> None:
    samples = list(samples_of(6))
    with pytest.raises(ValueError, match="6 samples have fewer names"):
        list(manifest_parts([*samples[1:], replace(samples[1])], first_row=0, shard_chips=8, rules=RULES))
    with pytest.raises(ValueError, match="shard_chips=2: 3 chips of u"):
        list(manifest_parts(samples, first_row=0, shard_chips=2, rules=RULES))


def test_all_layouts_are_of_stores_that_can_be(tmp_path: Path) -> None:
    for source in (ssl4eo, ssl4eo_v11, bigearthnet, eurosat, sen1floods11):
        layout = source.layout(BOTH)
        assert Layout.from_attributes(layout.attributes()) == layout
        assert layout.grid is None
