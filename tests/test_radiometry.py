"""Radiometry and screening: the stated integer formulas, and what is kept."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pipeline.radiometry import harmonise, looks_like_decibel, to_centi_db
from pipeline.screening import ScreenRules, screen_chip, screen_classes
from pipeline.types import ChipArrays

RULES = ScreenRules(max_cloud_fraction=0.2, min_valid_fraction=0.9)


@given(arrays(np.uint16, (3, 5)), st.sampled_from([0, 1000]))
def test_harmonised_numbers_follow_the_formula(dn: np.ndarray, offset: int) -> None:
    expected = [[0 if v == 0 else max(v - offset, 1) for v in row] for row in dn.tolist()]
    assert harmonise(dn, offset_dn=offset).tolist() == expected


@given(arrays(np.float32, (4, 4), elements=st.floats(0, 1000, width=32)))
def test_centi_decibel_follow_the_formula(gamma0: np.ndarray) -> None:
    exact = np.round(1000 * np.log10(np.maximum(gamma0, np.float32(1e-5)).astype(np.float64)))
    assert (to_centi_db(gamma0) == exact).all()


def test_radar_without_data_stays_apart_from_radar_that_is_dark() -> None:
    gamma0 = np.array([np.nan, -32768.0, 0.0, -0.001, 1e-6, 1.0], dtype=np.float32)
    assert to_centi_db(gamma0).tolist() == [-32768, -32768, -5000, -5000, -5000, 0]


@pytest.mark.parametrize(("mean", "decibel"), [(-12.0, True), (0.1, False)])
def test_decibel_is_told_from_linear_power(mean: float, decibel: bool) -> None:
    values = np.random.default_rng(0).normal(mean, 0.02, (50, 50)).astype(np.float32)
    values[:20] = np.nan
    assert looks_like_decibel(values) is decibel


@pytest.mark.parametrize(
    ("classes", "reason"),
    [
        ([4] * 10, ""),
        ([4] * 8 + [9] * 2, ""),
        ([4] * 7 + [3, 8, 9], "cloudy"),
        ([0] * 2 + [4] * 8, "too_little_valid"),
        ([0] * 10, "no_optical_data"),
    ],
)
def test_a_chip_is_judged_by_its_classes(classes: list[int], reason: str) -> None:
    assert screen_classes(np.array([classes], dtype=np.uint8), RULES).reason == reason


def test_cloud_is_a_fraction_of_the_valid_pixels() -> None:
    seen = screen_classes(np.array([[0, 0, 9, 4]], dtype=np.uint8), RULES)
    assert (seen.cloud_fraction, seen.clear_fraction, seen.valid_fraction) == (0.5, 0.5, 0.5)


def chip(side: int = 12) -> ChipArrays:
    rng = np.random.default_rng(0)
    return {
        "b10": rng.integers(1, 9000, (4, side, side), dtype=np.uint16),
        "b20": rng.integers(1, 9000, (6, side // 2, side // 2), dtype=np.uint16),
        "b60": rng.integers(1, 9000, (2, side // 6, side // 6), dtype=np.uint16),
        "radar": rng.integers(-3000, 0, (2, side, side), dtype=np.int16),
    }


def test_a_hole_in_one_60_m_band_takes_36_pixels() -> None:
    holed = chip()
    holed["b60"][1, 0, 0] = 0
    seen = screen_classes(np.full((6, 6), 4, np.uint8), RULES)
    judged = screen_chip(holed, seen, RULES)
    assert judged.valid_fraction == 1 - 36 / 144
    assert judged.reason == "too_little_valid"
