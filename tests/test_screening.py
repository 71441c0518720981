"""Screening: what is kept, why not, and what is written down of either."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pipeline.screening import ScreenRules, border_noise, screen_chip, screen_classes
from pipeline.types import ChipArrays

RULES = ScreenRules(max_cloud_fraction=0.5, min_valid_fraction=0.5)
SIDE = 240


def chip(radar: np.ndarray | None = None) -> ChipArrays:
    return {
        "b10": np.full((4, SIDE, SIDE), 500, np.uint16),
        "b20": np.full((6, SIDE // 2, SIDE // 2), 500, np.uint16),
        "b60": np.full((2, SIDE // 6, SIDE // 6), 500, np.uint16),
        "radar": np.full((2, SIDE, SIDE), -1200, np.int16) if radar is None else radar,
    }


def clear() -> np.ndarray:
    return np.full((SIDE // 2, SIDE // 2), 4, np.uint8)


def test_fractions_are_of_the_valid_pixels() -> None:
    scl = np.array([[0, 0, 3, 9], [10, 11, 11, 4], [5, 6, 7, 2]], np.uint8)
    seen = screen_classes(scl, replace(RULES, max_cloud_fraction=1.0))
    assert seen.as_columns() | {"radar_valid_fraction": None, "border_noise_fraction": None} == {
        "valid_fraction": pytest.approx(10 / 12),
        "cloud_fraction": pytest.approx(0.3),
        "shadow_fraction": pytest.approx(0.1),
        "snow_fraction": pytest.approx(0.2),
        "clear_fraction": pytest.approx(0.3),
        "radar_valid_fraction": None,
        "border_noise_fraction": None,
        "flags": "",
    }
    assert np.isnan(seen.radar_valid_fraction)


@pytest.mark.parametrize(
    ("classes", "limit", "reason"),
    [
        ([3] * 3 + [4] * 7, {"max_shadow_fraction": 0.2}, "shadowed"),
        ([3] * 2 + [4] * 8, {"max_shadow_fraction": 0.2}, ""),
        ([11] * 9 + [4], {}, ""),
        ([11] * 9 + [4], {"max_snow_fraction": 0.5}, "snowy"),
        ([9] * 6 + [4] * 4, {}, "cloudy"),
    ],
)
def test_every_limit_has_its_reason(classes: list[int], limit: dict[str, float], reason: str) -> None:
    assert screen_classes(np.array([classes], np.uint8), replace(RULES, **limit)).reason == reason


def test_what_was_seen_is_written_down_of_rejected_chips_too() -> None:
    radar = np.full((2, SIDE, SIDE), -1200, np.int16)
    radar[:, :, : SIDE * 3 // 4] = -32768
    seen = screen_chip(chip(radar), screen_classes(clear(), RULES), RULES, flags=frozenset({"b", "a"}))
    assert seen.reason == "too_little_valid"
    assert seen.radar_valid_fraction == 0.25
    assert seen.valid_fraction == 0.25
    assert seen.clear_fraction == 1.0
    assert seen.as_columns()["flags"] == "a b"


def test_a_dark_strip_along_the_swaths_edge_is_border_noise() -> None:
    radar = np.full((2, SIDE, SIDE), -1200, np.int16)
    radar[:, :, :60] = -32768
    radar[:, :, 60:80] = -3600
    noise = border_noise(radar)
    assert noise[:, 60:80].all()
    assert noise.sum() == 20 * SIDE
    rules = replace(RULES, max_border_noise_fraction=0.1)
    seen = screen_chip(chip(radar), screen_classes(clear(), rules), rules)
    assert seen.border_noise_fraction == pytest.approx(20 / 180)
    assert seen.reason == "border_noise"
    assert screen_chip(chip(radar), screen_classes(clear(), RULES), RULES).reason == ""


def test_dark_water_is_no_border_noise() -> None:
    lake = np.full((2, SIDE, SIDE), -3300, np.int16)
    assert not border_noise(lake).any()
    lake[:, :5] = -32768  # an edge far away
    assert not border_noise(lake)[5 + 50 :].any()


@pytest.mark.parametrize(("policy", "reason"), [("keep", ""), ("reject", "suspect")])
def test_a_chip_of_a_suspect_item_is_flagged_and_kept_or_not(policy: str, reason: str) -> None:
    rules = replace(RULES, on_suspect=policy)
    seen = screen_chip(chip(), screen_classes(clear(), rules), rules, flags=frozenset({"offset_suspect"}))
    assert (seen.reason, seen.flags) == (reason, {"offset_suspect"})
    assert screen_chip(chip(), screen_classes(clear(), rules), rules).reason == ""
