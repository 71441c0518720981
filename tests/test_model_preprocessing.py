"""Normalisation and preparation of batches, against numpy."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from model import normalisation, preprocessing
from model.normalisation import SSL4EO_S12, BandScaling, Normalisation, from_statistics
from model.preprocessing import prepare, turn
from model.randomness import sample_keys
from pipeline import bands

MEAN = [1000.0 + 100 * band for band in range(12)] + [-11.0, -18.0]
STD = [500.0 + 10 * band for band in range(12)] + [4.0, 5.0]
STATISTICS = from_statistics(MEAN, STD, source="made up")


def batch_of(seed: int, *, samples: int = 2, side_px: int = 24, holes: float = 0.1) -> dict[str, torch.Tensor]:
    """Random integers over and beyond the clipped range, some without data."""
    random = np.random.default_rng(seed)

    def optical(num_bands: int, side: int) -> torch.Tensor:
        pixels = random.integers(1, 6000, (samples, num_bands, side, side)).astype(np.uint16)
        pixels[random.random(pixels.shape) < holes] = 0
        return torch.from_numpy(pixels)

    radar = random.integers(-5000, 1000, (samples, 2, side_px, side_px)).astype(np.int16)
    radar[random.random(radar.shape) < holes] = -32768
    return {
        "b10": optical(4, side_px),
        "b20": optical(6, side_px // 2),
        "b60": optical(2, side_px // 6),
        "radar": torch.from_numpy(radar),
    }


def bilinear(image: NDArray[np.float64], factor: int) -> NDArray[np.float64]:
    """One band (y, x) on a grid `factor` times finer: each new pixel centre between the four old ones around it."""
    size = image.shape[0]
    at = np.clip((np.arange(size * factor) + 0.5) / factor - 0.5, 0, size - 1)
    low = np.floor(at).astype(int)
    high = np.minimum(low + 1, size - 1)
    weight = at - low
    rows = image[low] * (1 - weight)[:, None] + image[high] * weight[:, None]
    return rows[:, low] * (1 - weight) + rows[:, high] * weight


def oracle(batch: dict[str, torch.Tensor]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Fill with the mean, bring to 10 m, scale, clip: in numpy, band by band, in units of the source."""
    samples, _, side, _ = batch["b10"].shape
    optical = np.empty((samples, 12, side, side))
    for group, names in bands.NATIVE_GROUPS.items():
        pixels = batch[group].numpy().astype(np.float64)
        for index, name in enumerate(names):
            band = bands.OPTICAL_BANDS.index(name)
            filled = np.where(pixels[:, index] == bands.OPTICAL_NODATA, MEAN[band], pixels[:, index])
            for sample in range(samples):
                optical[sample, band] = bilinear(filled[sample], side // pixels.shape[-1])
    db = batch["radar"].numpy() / 100.0
    radar = np.where(batch["radar"].numpy() == bands.RADAR_NODATA, np.array(MEAN[12:])[:, None, None], db)
    both = []
    for image, mean, std in ((optical, MEAN[:12], STD[:12]), (radar, MEAN[12:], STD[12:])):
        low = (np.array(mean) - 2 * np.array(std))[:, None, None]
        both.append(np.clip((image - low) / (4 * np.array(std)[:, None, None]), 0, 1))
    return both[0], both[1]


def test_bands_are_those_of_the_store() -> None:
    assert normalisation.OPTICAL_BANDS == bands.OPTICAL_BANDS
    assert normalisation.RADAR_BANDS == bands.RADAR_BANDS
    assert preprocessing.NATIVE_GROUPS == bands.NATIVE_GROUPS
    assert (preprocessing.OPTICAL_NODATA, preprocessing.RADAR_NODATA) == (bands.OPTICAL_NODATA, bands.RADAR_NODATA)


@settings(max_examples=20)
@given(seed=st.integers(0, 2**32 - 1), side_px=st.sampled_from([6, 24, 30]))
def test_a_prepared_batch_equals_the_numpy_oracle(seed: int, side_px: int) -> None:
    batch = batch_of(seed, side_px=side_px)
    optical, radar = prepare(batch, STATISTICS)
    assert optical is not None
    assert radar is not None
    assert optical.dtype == radar.dtype == torch.float32
    expected_optical, expected_radar = oracle(batch)
    np.testing.assert_allclose(optical.numpy(), expected_optical, atol=2e-6)
    np.testing.assert_allclose(radar.numpy(), expected_radar, atol=2e-6)


def test_preparing_equals_normalising_what_was_already_on_10_m() -> None:
    batch = batch_of(1, holes=0)
    optical, radar = prepare(batch, STATISTICS)
    on_10_m = np.empty((2, 12, 24, 24))
    for group, names in bands.NATIVE_GROUPS.items():
        for index, name in enumerate(names):
            for sample in range(2):
                pixels = batch[group][sample, index].numpy().astype(np.float64)
                on_10_m[sample, bands.OPTICAL_BANDS.index(name)] = bilinear(pixels, 24 // len(pixels))
    torch.testing.assert_close(STATISTICS.optical.apply(torch.from_numpy(on_10_m)), optical, atol=2e-6, rtol=0)
    torch.testing.assert_close(STATISTICS.radar.apply(batch["radar"].float() / 100), radar, atol=2e-6, rtol=0)


def test_optical_groups_may_all_be_on_10_m() -> None:
    batch = batch_of(2)
    fine = {name: batch[name].repeat_interleave(24 // batch[name].shape[-1], -1) for name in ("b10", "b20", "b60")}
    fine = {name: pixels.repeat_interleave(24 // pixels.shape[-2], -2) for name, pixels in fine.items()}
    optical, radar = prepare(fine, STATISTICS)
    assert radar is None
    assert optical is not None
    nearest = (fine["b60"][:, 0].float() - (MEAN[0] - 2 * STD[0])) / (4 * STD[0])
    expected = torch.where(fine["b60"][:, 0] == 0, 0.5, nearest).clamp(0, 1)
    torch.testing.assert_close(optical[:, 0], expected, atol=1e-6, rtol=0)


def test_no_data_becomes_the_mean_of_its_band() -> None:
    batch = {name: torch.zeros_like(pixels) for name, pixels in batch_of(0).items()}
    batch["radar"] += bands.RADAR_NODATA
    for image in prepare(batch, STATISTICS):
        assert image is not None
        assert torch.allclose(image, torch.tensor(0.5), atol=1e-6, rtol=0)
    assert (STATISTICS.radar.apply(torch.full((1, 2, 4, 4), float("nan"))) == 0.5).all()


def test_both_sensors_are_turned_alike_and_as_numpy_turns() -> None:
    rows = torch.arange(64)
    keys = sample_keys(rows, torch.zeros_like(rows), seed=1, epoch=2)
    batch = batch_of(3, samples=64, side_px=12)
    plain = torch.cat([each for each in prepare(batch, STATISTICS) if each is not None], dim=1)
    turned = torch.cat([each for each in prepare(batch, STATISTICS, keys=keys) if each is not None], dim=1)
    seen = set()
    for before, after in zip(plain.numpy(), turned.numpy(), strict=True):
        symmetries = [
            np.rot90(flipped, quarter, (1, 2)) for flipped in (before, before[:, :, ::-1]) for quarter in range(4)
        ]
        matching = [index for index, each in enumerate(symmetries) if np.array_equal(each, after)]
        assert len(matching) == 1
        seen.add(matching[0])
    assert seen == set(range(8))
    assert torch.equal(turn(plain, keys), turned)


@pytest.mark.parametrize("sensor", ["optical", "radar"])
def test_mean_and_two_deviations_become_half_and_the_ends(sensor: str) -> None:
    scaling: BandScaling = getattr(STATISTICS, sensor)
    mean, std = (torch.tensor(each)[None, :, None, None] for each in (scaling.mean, scaling.std))
    for sigmas, expected in ((0, 0.5), (-2, 0), (2, 1), (1, 0.75), (-5, 0), (9, 1)):
        assert torch.allclose(scaling.apply(mean + sigmas * std), torch.tensor(float(expected)), atol=1e-6)


def test_a_chip_is_normalised_alike_in_any_batch() -> None:
    pixels = torch.rand(5, 12, 8, 8) * 4000
    assert torch.equal(SSL4EO_S12.optical.apply(pixels)[2:3], SSL4EO_S12.optical.apply(pixels[2:3]))


def test_a_normalisation_survives_json() -> None:
    for each in (STATISTICS, SSL4EO_S12):
        assert Normalisation.from_dict(json.loads(json.dumps(each.to_dict()))) == each
    before_levels = {name: value for name, value in SSL4EO_S12.to_dict().items() if name != "level"}
    assert Normalisation.from_dict(before_levels) == replace(SSL4EO_S12, level=None)


@pytest.mark.parametrize(
    ("given_values", "named"),
    [
        ({"radar_unit": "gamma0 linear"}, "'gamma0 linear' were given where 'gamma0 dB'"),
        ({"optical_unit": "reflectance"}, "'reflectance' were given where 'reflectance x 10000'"),
        ({"radar_bands": ("VH", "VV")}, "VH VV were given where VV VH"),
        ({"optical_bands": bands.OPTICAL_BANDS[:-1]}, "B01 B02"),
    ],
)
def test_other_units_and_band_orders_are_refused(given_values: dict[str, str], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        STATISTICS.check(**given_values)  # type: ignore[arg-type]


def test_the_same_units_are_accepted_and_both_kinds_of_decibel() -> None:
    STATISTICS.check()
    STATISTICS.check(radar_unit="sigma0 dB")
    SSL4EO_S12.check()


def test_images_of_another_level_are_refused_where_the_level_is_known() -> None:
    with pytest.raises(ValueError, match="level l1c were given where l2a is expected"):
        SSL4EO_S12.check(level="l1c")
    SSL4EO_S12.check(level="l2a")
    replace(SSL4EO_S12, level=None).check(level="l1c")
    with pytest.raises(ValueError, match="level must be one of l2a, l1c, or None: got 'l3'"):
        replace(SSL4EO_S12, level="l3")


@pytest.mark.parametrize(("mean", "std"), [(float("nan"), 1.0), (0.0, 0.0), (0.0, -1.0), (0.0, float("inf"))])
def test_statistics_that_cannot_scale_are_refused_by_band(mean: float, std: float) -> None:
    with pytest.raises(ValueError, match="band B04"):
        from_statistics([*MEAN[:3], mean, *MEAN[4:]], [*STD[:3], std, *STD[4:]], source="broken")


def test_statistics_of_too_few_bands_are_refused() -> None:
    with pytest.raises(ValueError, match="2 bands, 1 means"):
        from_statistics(MEAN[:-1], STD[:-1], source="short")


def test_a_broken_dict_is_no_normalisation() -> None:
    values = STATISTICS.to_dict()
    del values["radar"]
    with pytest.raises(ValueError, match="radar"):
        Normalisation.from_dict(values)
