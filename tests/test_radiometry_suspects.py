"""Offsets dealt with wrongly are told from the pixels; real and simulated scenes are never accused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import shapely
from hypothesis import given
from hypothesis import strategies as st

from pipeline.access import DirectAccess
from pipeline.radiometry import harmonise, offset_flags, radar_flags, to_centi_db
from pipeline.reader import View, Window, reader_named
from pipeline.types import Acquisition, ChipArrays, Item
from tests.real_scenes import write_real_archive


def scenes(directory: Path, sensor: str) -> Iterator[tuple[Item, ChipArrays, np.ndarray | None]]:
    """Every item of an archive in a directory with its whole extent: item, arrays, classes."""
    for path in sorted(directory.glob("items/*.json")):
        about = json.loads(path.read_text())
        for feature in about["features"] if about["type"] == "FeatureCollection" else [about]:
            item = as_item(feature)
            if item is None or item.sensor != sensor:
                continue
            with rasterio.open(item.assets["B01" if sensor == "optical" else "VV"]) as file:
                left, bottom, right, top = file.bounds
            window = Window(epsg=item.epsg, bounds=(left, bottom, right, top))
            reader = reader_named("window", DirectAccess())
            look = Acquisition(sensor=item.sensor, items=(item,))
            view = View(window=window, looks=(look,))
            classes = reader.classes([view])[0] if sensor == "optical" else None
            read = reader.pixels([view], classes=None if classes is None else [classes])
            assert read.flags[item.id] == frozenset(), item.id
            yield item, read.arrays[0], classes


def as_item(feature: dict[str, Any]) -> Item | None:
    properties = feature["properties"]
    if not {"B02", "vv"} & set(feature["assets"]):
        return None
    optical = "B02" in feature["assets"]
    bands = {key.upper() if not optical else key: asset["href"] for key, asset in feature["assets"].items()}
    code = properties.get("proj:epsg") or int(properties["proj:code"].removeprefix("EPSG:"))
    baseline = properties.get("s2:processing_baseline", "")
    return Item(
        id=feature["id"],
        collection=feature["collection"],
        sensor="optical" if optical else "radar",
        datetime=properties["datetime"],
        epsg=code,
        footprint=shapely.geometry.shape(feature["geometry"]),
        assets=bands,
        platform="",
        relative_orbit=0,
        orbit_state="",
        offset_dn=1000 if baseline >= "04.00" else 0,
    )


def accused(arrays: ChipArrays, classes: np.ndarray, change: Any) -> frozenset[str]:
    return offset_flags([change(arrays["b10"])], [change(arrays["b20"])], [classes])


def left_in(pixels: np.ndarray) -> np.ndarray:
    return np.where(pixels > 0, pixels + 1000, 0).astype(np.uint16)


def taken_off_twice(pixels: np.ndarray) -> np.ndarray:
    return harmonise(pixels, offset_dn=1000)


def test_real_scenes_are_right_and_their_shifted_copies_are_not(shared_data: Path, tmp_path: Path) -> None:
    write_real_archive(shared_data, tmp_path / "archive")
    seen = 0
    for item, arrays, classes in scenes(tmp_path / "archive", "optical"):
        assert classes is not None
        seen += 1
        assert accused(arrays, classes, left_in) == {"offset_suspect"}, item.id
        assert accused(arrays, classes, taken_off_twice) == {"double_offset_suspect"}, item.id
    assert seen >= 5
    assert sum(1 for _ in scenes(tmp_path / "archive", "radar")) >= 5


def test_simulated_scenes_are_right(simulated_archive: Path) -> None:
    shifted = [
        (accused(arrays, classes, left_in), accused(arrays, classes, taken_off_twice))
        for _, arrays, classes in scenes(simulated_archive, "optical")
        if classes is not None
    ]
    assert len(shifted) >= 5
    assert sum(ours == {"offset_suspect"} for ours, _ in shifted) > len(shifted) / 2
    assert sum(1 for _ in scenes(simulated_archive, "radar")) >= 5


def test_a_real_scene_without_classes_to_tell_by_is_not_accused(shared_data: Path) -> None:
    bands = {}
    (folder,) = (path.parent for path in (shared_data / "major-tom").rglob("B02.tif"))
    for name in ("B02", "B03", "B04", "B08", "B05", "B06", "B07", "B8A", "B11", "B12"):
        with rasterio.open(folder / f"{name}.tif") as file:
            bands[name] = file.read(1)
    b10 = np.stack([bands[name] for name in ("B02", "B03", "B04", "B08")])
    b20 = np.stack([bands[name] for name in ("B05", "B06", "B07", "B8A", "B11", "B12")])
    vegetation = bands["B8A"].astype(float) / np.maximum(bands["B04"][::2, ::2], 1) > 2.5
    water = bands["B8A"] < 800
    classes = np.where(water, 6, np.where(vegetation, 4, 5)).astype(np.uint8)
    arrays: ChipArrays = {"b10": b10, "b20": b20}
    assert accused(arrays, classes, lambda pixels: pixels) == frozenset()
    assert accused(arrays, classes, left_in) == {"offset_suspect"}
    assert accused(arrays, classes, taken_off_twice) == {"double_offset_suspect"}
    # Bare ground alone could be as bright as it likes.
    assert accused(arrays, np.full_like(classes, 5), left_in) == frozenset()


@given(st.integers(1000, 6000), st.sampled_from([5, 8, 9, 11, 0]))
def test_bright_ground_is_never_accused(level: int, scl: int) -> None:
    bright = np.full((10, 64, 64), level, np.uint16)
    assert offset_flags([bright[:4]], [bright[4:, ::2, ::2]], [np.full((32, 32), scl, np.uint8)]) == frozenset()


def test_radar_in_digital_numbers_is_seen() -> None:
    numbers = np.random.default_rng(0).rayleigh(150, (2, 264, 264)).astype(np.float32)
    assert radar_flags([to_centi_db(numbers)]) == {"radar_scale_suspect"}
    assert radar_flags([to_centi_db((numbers / 1000) ** 2)]) == frozenset()
    assert radar_flags([]) == frozenset()
