"""The landscape and what hides it, before anything is written."""

from __future__ import annotations

from datetime import UTC, datetime

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.simulation.clouds import Sky, scene_classification, sky_over
from pipeline.simulation.frame import Frame, Ground, Plane, enlarge
from pipeline.simulation.landcover import CODES, survey
from pipeline.simulation.noise import normal, polygons, uniform, value_noise
from pipeline.simulation.optical import OpticalConditions, bands_of
from pipeline.simulation.profiles import PROFILES
from pipeline.simulation.radar import LOOKS, RadarConditions, backscatter_of
from pipeline.simulation.scenes import OpticalScene, RadarScene, Swath, absolute_orbit, mgrs_square, relative_orbit
from pipeline.simulation.spectra import LAND_COVERS

PLANE = Plane(epsg=32632, anchor_x_m=716_000.0, anchor_y_m=5_354_000.0)


def frame(*, left: float = 715_200.0, top: float = 5_360_040.0, width: int = 240, height: int = 180) -> Frame:
    return Frame(epsg=32632, left=left, top=top, resolution=10.0, width_px=width, height_px=height)


def optical(seed: int = 5, **changes: float) -> OpticalConditions:
    values = {"season_day": 180, "cloud_fraction": 0.0, "sun_zenith_deg": 35.0, "sun_azimuth_deg": 150.0}
    return OpticalConditions(**{**values, "offset_dn": 0, "seed": seed, **changes})


@given(st.integers(0, 2**31 - 1), st.integers(-500, 500), st.integers(-500, 500))
def test_a_field_answers_the_same_for_a_place_whatever_else_is_asked(seed: int, east: int, north: int) -> None:
    x = np.arange(east, east + 40, dtype=np.float32)[np.newaxis, :] * 10
    y = np.arange(north, north + 30, dtype=np.float32)[:, np.newaxis] * 10
    for field in (value_noise, polygons):
        whole = field(x, y, spacing_m=130.0, seed=seed)
        np.testing.assert_array_equal(field(x[:, 7:9], y[11:20], spacing_m=130.0, seed=seed), whole[11:20, 7:9])


def test_noise_has_the_stated_mean_and_spread() -> None:
    x = np.arange(0, 4000, 7, dtype=np.float32)
    for values in (
        value_noise(x[np.newaxis, :], x[:, np.newaxis], spacing_m=30.0, seed=3),
        normal(np.arange(200_000, dtype=np.uint32) * np.uint32(2654435761), 4),
    ):
        assert abs(float(values.mean())) < 0.03
        assert abs(float(values.std()) - 1) < 0.03
    shares = uniform(np.arange(200_000, dtype=np.uint32) * np.uint32(2654435761), 3)
    np.testing.assert_allclose(np.histogram(shares, 10, (0, 1))[0] / shares.size, 0.1, atol=0.01)


def test_enlarging_follows_a_plane_exactly() -> None:
    rows, columns = np.mgrid[0:5, 0:6].astype(np.float32) * 8
    expected_rows, expected_columns = np.mgrid[0:30, 0:37]
    np.testing.assert_allclose(enlarge(rows, 8, (30, 37)), expected_rows, atol=1e-5)
    np.testing.assert_allclose(enlarge(columns, 8, (30, 37)), expected_columns, atol=1e-5)


def test_a_window_of_the_land_is_the_land_of_the_window() -> None:
    whole = survey(frame(), PLANE, seed=7)
    part = survey(frame(left=715_200.0 + 310, top=5_360_040.0 - 470, width=90, height=60), PLANE, seed=7)
    window = whole.window(47, 31, 60, 90)
    for name in ("cover", "brightness", "texture", "scatter", "lateness"):
        np.testing.assert_array_equal(getattr(part, name), getattr(window, name))


def test_the_neighbouring_zone_sees_the_same_land_within_a_pixel() -> None:
    from pyproj import Transformer

    here = survey(frame(left=720_000.0, width=400, height=400), PLANE, seed=7)
    to_here = Transformer.from_crs(32633, 32632, always_xy=True)
    x, y = Transformer.from_crs(32632, 32633, always_xy=True).transform(722_000.0, 5_358_040.0)
    there_frame = Frame(
        epsg=32633, left=x // 60 * 60 - 1200, top=y // 60 * 60 + 1200, resolution=10.0, width_px=240, height_px=240
    )
    there = survey(there_frame, PLANE, seed=7)
    rows, columns = np.mgrid[0:240:7, 0:240:7]
    centre_x, centre_y = to_here.transform(there_frame.left + (columns + 0.5) * 10, there_frame.top - (rows + 0.5) * 10)
    row, column = (5_360_040.0 - centre_y) / 10, (centre_x - 720_000.0) / 10
    expected = here.cover[row.astype(int), column.astype(int)]
    assert np.mean(there.cover[rows, columns] == expected) > 0.97  # patch borders within one pixel differ
    nearest = here.brightness[row.astype(int), column.astype(int)]
    assert np.mean(np.isclose(there.brightness[rows, columns], nearest)) > 0.9


def test_every_land_cover_has_its_share_and_a_worldcover_code() -> None:
    assert abs(sum(cover.share for cover in LAND_COVERS) - 1) < 1e-9
    assert set(CODES.tolist()) <= {10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 100}
    wide = Frame(epsg=32632, left=700_000.0, top=5_370_000.0, resolution=100.0, width_px=600, height_px=600)
    counts = np.bincount(survey(wide, PLANE, seed=1).cover.ravel(), minlength=len(LAND_COVERS)) / 360_000
    np.testing.assert_allclose(counts, [cover.share for cover in LAND_COVERS], atol=0.035)


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.85])
def test_clouds_cover_about_the_fraction_asked_for(fraction: float) -> None:
    wide = Frame(epsg=32632, left=700_000.0, top=5_370_000.0, resolution=100.0, width_px=600, height_px=600)
    sky = sky_over(wide, PLANE, cloud_fraction=fraction, sun_zenith_deg=30, sun_azimuth_deg=150, seed=3)
    assert abs(float((sky.opacity > 0.5).mean()) - fraction) < 0.06


def test_a_shadow_lies_away_from_the_sun_behind_its_cloud() -> None:
    # Sun in the south at 45 degrees: every shadow lies 1300 m north of its cloud.
    sky = sky_over(frame(height=240), PLANE, cloud_fraction=0.4, sun_zenith_deg=45, sun_azimuth_deg=180, seed=3)
    np.testing.assert_allclose(sky.shadow[:-130], sky.opacity[130:], atol=0.06)
    assert sky.opacity.std() > 0.1


def test_clouds_hide_shadows_and_shadows_hide_land() -> None:
    values = np.array([[0.9, 0.4, 0.1, 0.0, 0.0, 0.0, 0.0]], np.float32)
    shadow = np.array([[1.0, 0.0, 0.0, 0.9, 0.0, 0.0, 0.0]], np.float32)
    sky = Sky(opacity=values, cirrus=np.array([[0, 0, 0, 0, 0.2, 0, 0]], np.float32), shadow=shadow)
    green = np.array([[True, True, True, True, True, True, False]])
    water = np.array([[False, False, False, False, False, True, False]])
    assert scene_classification(sky, green, water).tolist() == [[9, 8, 7, 3, 10, 6, 5]]


def test_land_shared_by_both_sensors_is_all_that_they_share() -> None:
    land = survey(frame(), PLANE, seed=7)
    valid10, valid60 = np.ones((180, 240), bool), np.ones((30, 40), bool)
    bands, _ = bands_of(land, frame(), PLANE, optical(), valid=valid60, noise_seed=1)
    other, _ = bands_of(land, frame(), PLANE, optical(seed=6), valid=valid60, noise_seed=2)
    pass_ = RadarConditions(season_day=180, ascending=True, incidence_deg=38.0, seed=9)
    radar = backscatter_of(land, frame(), PLANE, pass_, valid=valid10)
    assert np.corrcoef(bands["B08"].ravel(), other["B08"].ravel())[0, 1] > 0.7
    assert not np.array_equal(bands["B08"], other["B08"])
    assert (radar["VV"] > 0).all()


def test_speckle_has_the_looks_of_the_real_product() -> None:
    flat = survey(frame(), PLANE, seed=7)
    for name in ("texture", "scatter", "roughness", "facing", "lateness"):
        getattr(flat, name)[:] = 0
    flat.cover[:] = 1
    still = RadarConditions(
        season_day=180, ascending=True, incidence_deg=38.0, seed=9,
        incidence_slope_deg=0.0, attenuation_spread_db=0.0, wetness_spread_db=0.0,
    )  # fmt: skip
    vv = backscatter_of(flat, frame(), PLANE, still, valid=np.ones((180, 240), bool))["VV"]
    assert abs(float(vv.mean() ** 2 / vv.var()) - LOOKS) < 0.3


def test_swath_edges_are_drawn_where_pixels_end() -> None:
    swath = Swath(heading_deg=102.0, reach_m=300.0)
    seen = swath.holds(frame(), PLANE)
    area = swath.clip(frame(), PLANE).area / 100
    assert 0 < seen.mean() < 1
    assert abs(seen.sum() - area) < 0.01 * seen.size


def test_orbits_and_squares_are_those_of_real_items() -> None:
    assert absolute_orbit("S1A", datetime(2020, 6, 7, 1, 8, tzinfo=UTC)) == 32904
    assert relative_orbit("S2B", datetime(2020, 8, 13, 5, 49, 52, tzinfo=UTC)) == 48
    assert relative_orbit("S2A", datetime(2020, 7, 21, 8, 6, 11, tzinfo=UTC)) == 78
    south = Frame(epsg=32735, left=499_980.0, top=9_200_020.0, resolution=10.0, width_px=10_980, height_px=10_980)
    assert mgrs_square(south) == "35MNM"
    north = Frame(epsg=32660, left=300_000.0, top=6_500_040.0, resolution=10.0, width_px=10_980, height_px=10_980)
    assert mgrs_square(north) == "60VUK"


def test_grids_are_anchored_like_the_real_ones() -> None:
    for profile in PROFILES.values():
        optical_scenes = [scene for scene in profile.scenes if isinstance(scene, OpticalScene)]
        radar_scenes = [scene for scene in profile.scenes if isinstance(scene, RadarScene)]
        for scene in optical_scenes:
            origin = 0 if scene.frame.epsg < 32700 else 10_000_000
            assert scene.frame.left % 60 == 0
            assert (origin - scene.frame.top) % 60 == 0
        assert {scene.frame.epsg for scene in optical_scenes} == {32632, 32633, 32736}
        assert any(scene.frame.top % 60 for scene in optical_scenes if scene.frame.epsg == 32736)
        for scene in radar_scenes:
            assert scene.frame.left % 10 == scene.frame.top % 10 == 0
            assert scene.frame.left % 60
        assert {scene.frame.epsg for scene in radar_scenes} == {32632, 32736}
        assert {scene.ascending for scene in radar_scenes} == {True, False}


def test_a_corner_off_the_60_m_grid_is_refused() -> None:
    scene = next(scene for scene in PROFILES["test"].scenes if isinstance(scene, OpticalScene))
    with pytest.raises(ValueError, match="multiple of 60 m"):
        OpticalScene(
            platform="S2A", sensed=scene.sensed, baseline="04.00", cloud_fraction=0.0,
            frame=frame(left=715_210.0), ground=scene.ground,
        )  # fmt: skip
    with pytest.raises(ValueError, match="does not lie on the pixels"):
        Ground(plane=PLANE, frame=frame()).offset_of(frame(left=715_204.0))


def test_some_cells_of_the_region_belong_to_the_neighbouring_zone() -> None:
    import shapely

    from pipeline.grid import cells_covering

    for profile in PROFILES.values():
        zones = [cell.epsg for cell in cells_covering(shapely.box(*profile.region), side_m=2640)]
        assert zones.count(32632) >= 1.5 * zones.count(32633) > 0
        south = cells_covering(shapely.box(*profile.southern_region), side_m=2640)
        assert {cell.epsg for cell in south} == {32736}
