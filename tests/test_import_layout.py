"""Stores whose bands are all on 10 m, of any side, with one sensor or labels per chip: and who reads them."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from numpy.testing import assert_array_equal

from jobs.support.encoder import check_units, encode
from jobs.support.windows import cut_windows, window_corners
from model import released
from model.croma import Croma, CromaConfig
from model.normalisation import SSL4EO_S12
from model.preprocessing import prepare
from pipeline.bands import NATIVE_GROUPS
from pipeline.crops import cut_batches
from pipeline.epochs import crop_windows, sample_order
from pipeline.fed_chips import Feed
from pipeline.layout import Layout
from pipeline.positions import plan_spans
from pipeline.store import Store
from pipeline.whole_chips import whole_batches
from tests.sample_chips import make_chip

FINE = Layout(side_px=64, shard_chips=4, optical_level="l1c", optical_grid="10m", grid=None)


def test_bands_that_are_all_on_10_m_keep_their_arrays() -> None:
    arrays = FINE.arrays()
    assert {name: (spec.shape, spec.resolution_m, spec.step_px) for name, spec in arrays.items()} == {
        "b10": ((4, 64, 64), 10, 1),
        "b20": ((6, 64, 64), 10, 1),
        "b60": ((2, 64, 64), 10, 1),
        "radar": ((2, 64, 64), 10, 1),
    }
    assert {spec.dimension_names[1:] for spec in arrays.values()} == {
        (f"band_{name}", "y_10m", "x_10m") for name in arrays
    }


@pytest.mark.parametrize(
    "layout",
    [
        FINE,
        Layout(side_px=512, has_radar=False, optical_grid="10m", labels={"flood": {0: "not water", 1: "water"}}),
        Layout(side_px=7, has_optical=False, radar_product="sigma0_grd", chip_labels={"kind": {0: "a", 1: "b"}}),
        Layout(side_px=120, has_classes=False, grid=None),
    ],
)
def test_a_layout_is_what_its_attributes_say(layout: Layout, tmp_path: Path) -> None:
    assert Layout.from_attributes(layout.attributes()) == layout
    assert "scl" not in layout.arrays()
    assert Store.create(str(tmp_path / "store"), layout).layout == layout
    assert Store.open(str(tmp_path / "store")).layout == layout


def test_a_store_from_before_these_properties_is_read_as_it_was() -> None:
    attributes = {
        name: value
        for name, value in Layout(labels={"map": {1: "one"}}).attributes().items()
        if name not in ("optical_grid", "has_classes", "chip_labels")
    }
    assert Layout.from_attributes(attributes) == Layout(labels={"map": {1: "one"}})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"side_px": 64}, "positive multiple of 6, got 64"),
        ({"side_px": 0, "optical_grid": "10m"}, "positive number, got 0"),
        ({"optical_grid": "20m"}, "optical_grid must be one of native, 10m, got '20m'"),
        ({"optical_level": "l3"}, "optical_level must be one of l2a, l1c, got 'l3'"),
        ({"radar_product": "slc"}, "radar_product must be one of gamma0_rtc, sigma0_grd, got 'slc'"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Layout(**wrong)


@pytest.fixture
def fine_store(tmp_path: Path) -> Store:
    store = Store.create(str(tmp_path / "store"), FINE)
    store.resize(4)
    store.write_shard(0, [(row, make_chip(row, FINE)) for row in range(4)])
    return store


def test_any_window_of_such_a_store_can_be_read(fine_store: Store) -> None:
    window = fine_store.read_window(2, 1, 3, 7)
    assert_array_equal(window["b60"], make_chip(2, FINE)["b60"][:, 1:8, 3:10])
    assert_array_equal(xr.open_zarr(fine_store.url, consolidated=False)["b60"][2], make_chip(2, FINE)["b60"])


def test_the_feed_cuts_crops_of_any_size_at_any_pixel(fine_store: Store) -> None:
    feed = Feed(url=fine_store.url, version=1, crop_px=31, crops_per_chip=20, global_batch=16)
    (span,) = plan_spans(np.arange(4), shard_chips=FINE.shard_chips, order=feed.order, epoch=3)
    samples = sample_order(span.pieces[0].window, order=feed.order)
    corners = crop_windows(samples, seed=0, epoch=3, side_px=64, crop_px=31, step_px=1)
    assert {*np.unique(corners % 6)} == set(range(6))
    assert corners.min() >= 0
    assert corners.max() <= 64 - 31
    batches = list(cut_batches(fine_store, span, feed=feed))
    for name in ("b10", "b20", "b60", "radar"):
        crops = np.concatenate([batch[name] for batch in batches])
        for (row, _), (y, x), crop in zip(samples, corners, crops, strict=True):
            assert_array_equal(crop, make_chip(int(row), FINE)[name][:, y : y + 31, x : x + 31])


def test_the_model_takes_such_pixels_as_they_are(fine_store: Store) -> None:
    rows = np.array([0, 3])
    (batch,) = whole_batches(fine_store, rows, arrays=("b10", "b20", "b60", "radar"), batch_size=2)
    images = {name: torch.from_numpy(batch[name]) for name in ("b10", "b20", "b60", "radar")}
    optical, radar = prepare(images, SSL4EO_S12)
    assert optical is not None
    assert radar is not None
    assert radar.shape == (2, 2, 64, 64)
    bands = SSL4EO_S12.optical
    for group, names in NATIVE_GROUPS.items():
        for index, band in enumerate(names):
            at = bands.bands.index(band)
            pixels = batch[group][:, index].astype(np.float64)
            scaled = ((pixels - bands.mean[at]) / (4 * bands.std[at]) + 0.5).clip(0, 1)
            expected = np.where(pixels == 0, 0.5, scaled)
            np.testing.assert_allclose(optical[:, at].numpy(), expected, atol=2e-6)


def test_windows_of_such_chips_lie_side_by_side_at_any_pixel() -> None:
    corners = window_corners(64, 15, step_px=1)
    assert len(corners) == 16
    assert corners[0] == (2, 2)
    assert {b - a for (_, a), (_, b) in pairwise(corners[:4])} == {15}
    with pytest.raises(ValueError, match="window_px=15 must be a multiple of 6"):
        window_corners(66, 15)


def test_what_a_sensor_would_say_is_left_at_0_where_it_is_absent() -> None:
    layout = Layout(side_px=64, has_radar=False, optical_level="l1c", optical_grid="10m")
    chip = make_chip(5, layout)
    batch = {**{name: pixels[np.newaxis] for name, pixels in chip.items()}, "row": np.array([5])}
    window = {"row": np.array([5]), "y_px": np.array([3]), "x_px": np.array([1]), "window": np.array([0])}
    cut = cut_windows(batch, windows=window, specs=[*layout.arrays().values()], window_px=10)
    assert_array_equal(cut["b20"][0], chip["b20"][:, 3:13, 1:11])
    means, deviations = cut["band_statistics"][0].reshape(2, 14)
    assert (means[:12] > 0).all()
    assert (deviations[:12] > 0).all()
    assert (means[12:] == 0).all()
    assert (deviations[12:] == 0).all()


def test_a_model_encodes_what_a_store_of_one_sensor_has() -> None:
    torch.manual_seed(0)
    config = CromaConfig(
        width=32, optical_depth=2, radar_depth=1, joint_depth=1, heads=2, decoder_width=16, decoder_heads=2
    )
    croma = Croma(config).eval()
    chip = make_chip(1, FINE)
    both = encode(croma, SSL4EO_S12, {name: pixels[np.newaxis] for name, pixels in chip.items()})
    radar = encode(croma, SSL4EO_S12, {"radar": chip["radar"][np.newaxis]})
    assert radar.keys() == {"radar_encodings", "radar_embedding"}
    for name, values in radar.items():
        np.testing.assert_allclose(values, both[name], atol=1e-5)


def test_units_are_checked_of_the_sensors_that_are_there() -> None:
    check_units(Layout(radar_product="sigma0_grd", has_classes=False, grid=None), SSL4EO_S12)
    check_units(Layout(has_radar=False), SSL4EO_S12)
    check_units(Layout(has_optical=False), SSL4EO_S12)


@pytest.mark.parametrize("product", ["gamma0_rtc", "sigma0_grd"])
@pytest.mark.parametrize("unit", ["gamma0 linear", "sigma0 linear"])
def test_weights_of_linear_radar_refuse_decibels(product: str, unit: str) -> None:
    linear = replace(SSL4EO_S12, radar=replace(SSL4EO_S12.radar, unit=unit))
    decibels = product.partition("_")[0]
    with pytest.raises(ValueError, match=f"'{decibels} dB' were given where '{unit}' is expected"):
        check_units(Layout(radar_product=product), linear)


def test_weights_of_level_2a_refuse_level_1c() -> None:
    with pytest.raises(ValueError, match="level l1c were given where l2a"):
        check_units(Layout(optical_level="l1c"), SSL4EO_S12)
    check_units(Layout(optical_level="l1c"), released.NORMALISATION)
