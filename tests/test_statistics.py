"""Statistics of bands: numpy over all pixels at once is the oracle, and the order of merging is no matter."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.bands import NATIVE_GROUPS, RADAR_BANDS
from pipeline.statistics import BANDS, OPTICAL_BIN, RADAR_BIN, BandStatistics, band_moments
from pipeline.types import ChipArrays

SIDE = 12


def chip(seed: int, *, holes: float = 0.1, extreme: bool = False) -> ChipArrays:
    rng = np.random.default_rng(seed)
    highest = 65535 if extreme else 9000
    arrays: ChipArrays = {}
    for group, step in (("b10", 1), ("b20", 2), ("b60", 6)):
        shape = (len(NATIVE_GROUPS[group]), SIDE // step, SIDE // step)
        values = rng.integers(1, highest, shape, dtype=np.uint16, endpoint=True)
        arrays[group] = np.where(rng.random(shape) < holes, 0, values).astype(np.uint16)
    radar = rng.integers(-5000, 32767 if extreme else 500, (2, SIDE, SIDE), dtype=np.int16, endpoint=True)
    arrays["radar"] = np.where(rng.random(radar.shape) < holes, -32768, radar).astype(np.int16)
    return arrays


def valid_values(chips: list[ChipArrays], band: str) -> np.ndarray:
    if band in RADAR_BANDS:
        pixels = np.concatenate([c["radar"][RADAR_BANDS.index(band)].ravel() for c in chips])
        return pixels[pixels != -32768] / 100
    group, index = next((g, bands.index(band)) for g, bands in NATIVE_GROUPS.items() if band in bands)
    pixels = np.concatenate([c[group][index].ravel() for c in chips])
    return pixels[pixels != 0].astype(float)


def width(band: str) -> float:
    return RADAR_BIN / 100 if band in RADAR_BANDS else OPTICAL_BIN


def of_all(chips: list[ChipArrays]) -> BandStatistics:
    statistics = BandStatistics()
    for one in chips:
        statistics.add(one)
    return statistics


@pytest.mark.parametrize("extreme", [False, True])
def test_they_agree_with_numpy_over_all_pixels(extreme: bool) -> None:
    chips = [chip(seed, extreme=extreme) for seed in range(5)]
    statistics = of_all(chips)
    assert statistics.chips == 5
    for band in BANDS:
        values = valid_values(chips, band)
        assert statistics.count(band) == values.size
        assert statistics.mean(band) == pytest.approx(values.mean(), rel=1e-12)
        assert statistics.std(band) == pytest.approx(values.std(), rel=1e-9)
        for percent in (0, 1, 2, 25, 50, 75, 98, 99, 100):
            exact = np.percentile(values, percent)
            assert abs(statistics.percentile(band, percent) - exact) <= width(band), (band, percent)
        counts, edges = statistics.histogram(band)
        assert (counts == np.histogram(values, edges)[0]).all()


@settings(max_examples=15)
@given(st.permutations(range(6)), st.lists(st.integers(1, 5), max_size=4))
def test_parts_merge_to_the_same_in_any_order(order: list[int], cuts: list[int]) -> None:
    chips = [chip(seed, extreme=True) for seed in order]
    merged = BandStatistics()
    for part in np.split(np.arange(6), sorted(cuts)):
        merged.merge(BandStatistics.from_json(of_all([chips[n] for n in part]).to_json()))
    assert merged.to_json() == of_all([chip(seed, extreme=True) for seed in range(6)]).to_json()


@given(st.integers(0, 1000), st.floats(0, 1), st.floats(0, 100))
def test_percentiles_lie_within_a_bin_of_numpys(seed: int, holes: float, percent: float) -> None:
    one = chip(seed, holes=holes)
    statistics = BandStatistics.of(one)
    for band in ("B02", "B09", "VH"):
        values = valid_values([one], band)
        if values.size:
            assert abs(statistics.percentile(band, percent) - np.percentile(values, percent)) <= width(band)
        else:
            assert np.isnan([statistics.percentile(band, percent), statistics.mean(band), statistics.std(band)]).all()


def test_they_survive_more_pixels_than_64_bits_could_square() -> None:
    statistics = BandStatistics.of(chip(0, extreme=True))
    whole = json.loads(statistics.to_json())
    for _ in range(50):
        statistics.merge(BandStatistics.from_json(statistics.to_json()))
    assert json.loads(statistics.to_json())["bands"]["B02"]["squares"] == whole["bands"]["B02"]["squares"] * 2**50
    assert statistics.std("B02") == pytest.approx(BandStatistics.of(chip(0, extreme=True)).std("B02"), rel=1e-12)


def test_a_sensor_that_is_absent_stays_empty() -> None:
    statistics = BandStatistics.of({"radar": chip(0)["radar"]})
    assert set(statistics.summary()) == {"VV", "VH"}
    assert statistics.count("B02") == 0


def test_other_formats_are_refused() -> None:
    with pytest.raises(ValueError, match="format must be 1, got 9"):
        BandStatistics.from_json('{"format": 9, "chips": 0, "bands": {}}')


def test_a_shards_statistics_are_small() -> None:
    assert len(of_all([chip(seed) for seed in range(20)]).to_json()) < 60_000


def test_moments_of_a_chip_come_in_the_models_band_order_over_valid_pixels() -> None:
    one = {**chip(0), "radar": np.full((2, SIDE, SIDE), -32768, np.int16)}
    means, deviations = band_moments(one)
    for place, band in enumerate(BANDS):
        values = valid_values([one], band)
        expected = (values.mean(), values.std()) if values.size else (np.nan, np.nan)
        assert (means[place], deviations[place]) == pytest.approx(expected, nan_ok=True)
    assert BANDS == ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12", "VV", "VH")
