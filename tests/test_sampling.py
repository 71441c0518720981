"""Sampling: deterministic, without duplicates, owners only, as many as asked for or a reason why not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pyproj import Geod

from pipeline.grid import Cell, cell_at, cells_covering, grid_order, is_owned
from pipeline.places import Places
from pipeline.sampling import (
    CityRules,
    read_cells,
    read_land,
    sample_around,
    sample_stratified,
    sample_uniform,
    shuffled_cells,
)

SIDE_M = 2640
REGION = shapely.box(11.7, 47.8, 12.3, 48.2)
ALL = cells_covering(REGION, side_m=SIDE_M)


def cities(points: Sequence[tuple[float, float]], population: Sequence[float] | None = None) -> Places:
    return Places(
        names=[str(n) for n in range(len(points))],
        shapes=np.array([shapely.Point(p) for p in points], dtype=object),
        population=np.array(population or [0.0] * len(points)),
    )


@given(st.floats(-170, 170), st.floats(-75, 80), st.floats(0.05, 0.6), st.integers(0, 3))
@settings(max_examples=30)
def test_all_cells_of_a_region_shuffled_are_the_cells_that_cover_it(
    west: float, south: float, size: float, seed: int
) -> None:
    region = shapely.box(west, south, west + size, south + size / 2)
    shuffled = list(shuffled_cells(region, side_m=SIDE_M, seed=seed))
    assert sorted(shuffled, key=grid_order) == cells_covering(region, side_m=SIDE_M)


@given(st.integers(0, len(ALL)), st.integers(0, 10))
def test_a_larger_sample_holds_the_smaller_one(num: int, seed: int) -> None:
    some = sample_uniform(REGION, num, side_m=SIDE_M, seed=seed)
    assert len(some) == len(set(some)) == num
    assert set(some) <= set(ALL)
    assert some == sorted(some, key=grid_order)
    half = sample_uniform(REGION, num // 2, side_m=SIDE_M, seed=seed)
    assert set(half) <= set(some)


def test_every_cell_of_a_region_has_the_same_chance() -> None:
    counts = dict.fromkeys(ALL, 0)
    seeds, num = 400, len(ALL) // 4
    for seed in range(seeds):
        for cell in sample_uniform(REGION, num, side_m=SIDE_M, seed=seed):
            counts[cell] += 1
    share = np.array(list(counts.values())) / seeds
    # A binomial share of a quarter over 400 draws has a standard deviation of 0.022.
    assert abs(share - num / len(ALL)).max() < 5 * 0.022
    assert 0.9 < share.std() / 0.022 < 1.1


def test_a_larger_region_puts_cells_between_and_changes_no_order() -> None:
    small = list(shuffled_cells(shapely.box(11.8, 47.9, 12.2, 48.1), side_m=SIDE_M, seed=5))
    large = list(shuffled_cells(REGION, side_m=SIDE_M, seed=5))
    assert [cell for cell in large if cell in set(small)] == small


def test_a_world_is_sampled_without_looking_at_every_cell() -> None:
    world = shapely.box(-180, -80, 180, 84)
    cells = sample_uniform(world, 2000, side_m=9960, seed=0)
    assert all(is_owned(cell) for cell in cells)
    north = np.array([cell.centre_lonlat[1] for cell in cells])
    # Uniform on the ground, so by the sine of the latitude.
    edges = np.sin(np.radians([-80, 0, 30, 50, 84]))
    expected = np.diff(edges) / (edges[-1] - edges[0]) * 2000
    found = np.histogram(np.sin(np.radians(north)), edges)[0]
    assert (abs(found - expected) < 5 * np.sqrt(expected)).all()


def test_only_cells_with_their_centre_on_land_are_drawn() -> None:
    land = shapely.Point(12.0, 48.0).buffer(0.1)
    on_land = [cell for cell in ALL if land.contains(shapely.Point(cell.centre_lonlat))]
    assert sample_uniform(REGION, len(on_land), side_m=SIDE_M, seed=1, land=land) == on_land
    with pytest.raises(ValueError, match=f"num_cells=9999: the land of the region has only {len(on_land)} cells"):
        sample_uniform(REGION, 9999, side_m=SIDE_M, seed=1, land=land)


def test_a_region_with_too_few_cells_is_named_with_their_number() -> None:
    with pytest.raises(ValueError, match=f"num_cells=9999: the region has only {len(ALL)} cells of 2640 m"):
        sample_uniform(REGION, 9999, side_m=SIDE_M, seed=1)


def stripes(cells: Sequence[Cell]) -> NDArray[np.float64]:
    """Three classes by longitude, the first rare, and nothing at all in the east."""
    lon = np.array([cell.centre_lonlat[0] for cell in cells])
    kinds = np.digitize(lon, [11.71, 12.0, 12.2])
    return np.eye(4)[kinds][:, :3] * 0.6


def test_strata_get_the_same_number_of_cells_and_a_rare_one_all_it_has() -> None:
    for order in (1, -1):
        cells = sample_stratified(
            REGION, 60, lambda cells, order=order: stripes(cells)[:, ::order], side_m=SIDE_M, seed=2
        )
        assert len(set(cells)) == 60
        kinds = stripes(cells).argmax(axis=1)
        rare = int((stripes(ALL)[:, 0] > 0).sum())
        assert rare < 20
        counts = np.bincount(kinds, minlength=3)
        assert counts[0] == rare
        assert abs(counts[1] - counts[2]) <= 1
        assert (stripes(cells).sum(axis=1) > 0).all()


def test_strata_without_enough_labelled_cells_say_so() -> None:
    with pytest.raises(ValueError, match="num_cells=50: of 50 cells that were looked up only 0 have a class"):
        sample_stratified(REGION, 50, lambda cells: np.zeros((len(cells), 3)), side_m=SIDE_M, seed=0, pool_factor=1)


def test_cells_around_cities_lie_at_normal_distances() -> None:
    points = [(11.0, 48.0), (0.0, 60.0), (179.9, -17.0)]
    rules = CityRules(cities=cities(points), sigma_km=50)
    cells = sample_around(rules, 1500, side_m=SIDE_M, seed=3)
    assert len(set(cells)) == 1500
    assert all(is_owned(cell) for cell in cells)
    lon, lat = np.array([cell.centre_lonlat for cell in cells]).T
    distance = np.array([Geod(ellps="WGS84").inv(np.full(1500, x), np.full(1500, y), lon, lat)[2] for x, y in points])
    nearest = distance.min(axis=0) / 1000
    assert (np.bincount(distance.argmin(axis=0)) > 400).all()
    # A Rayleigh distribution's median is 1.18 sigma; cells drawn twice count once, which widens it a little.
    assert 1.15 * 50 < np.median(nearest) < 1.35 * 50


@given(st.permutations(range(6)), st.integers(1, 40))
@settings(max_examples=20)
def test_the_order_of_cities_makes_no_difference_and_more_cells_hold_the_fewer(order: list[int], num: int) -> None:
    points = [(10.0 + n, 45.0 + n / 2) for n in range(6)]
    population = [float(n // 2) for n in range(6)]
    rules = CityRules(cities=cities(points, population), sigma_km=5, most_populated=3)
    shuffled = CityRules(
        cities=cities([points[n] for n in order], [population[n] for n in order]), sigma_km=5, most_populated=3
    )
    cells = sample_around(rules, num, side_m=SIDE_M, seed=1)
    assert cells == sample_around(shuffled, num, side_m=SIDE_M, seed=1)
    assert set(cells) <= set(sample_around(rules, num + 5, side_m=SIDE_M, seed=1))
    # The three largest are the two of population 2 and one of population 1.
    assert all(cell.centre_lonlat[0] > 11.7 for cell in cells)


def test_cells_around_cities_stay_in_the_region_and_on_land() -> None:
    land = shapely.box(11.0, 47.0, 11.2, 49.0)
    rules = CityRules(cities=cities([(11.1, 48.0)]))
    cells = sample_around(rules, 50, side_m=SIDE_M, seed=0, region=shapely.box(0, 47.9, 20, 50), land=land)
    for cell in cells:
        lon, lat = cell.centre_lonlat
        assert 11.0 <= lon <= 11.2
        assert lat >= 47.9


def test_too_few_cells_around_cities_say_what_to_do() -> None:
    rules = CityRules(cities=cities([(11.0, 48.0)]), sigma_km=1)
    with pytest.raises(ValueError, match=r"num_cells=500: only \d+ cells .* 1 points with sigma_km=1; ask for fewer"):
        sample_around(rules, 500, side_m=SIDE_M, seed=0)
    lines = Places(names=["x"], shapes=np.array([shapely.box(0, 0, 1, 1)], dtype=object), population=np.zeros(1))
    with pytest.raises(ValueError, match="place x is not a point but a Polygon"):
        sample_around(CityRules(cities=lines), 5, side_m=SIDE_M, seed=0)


@pytest.mark.parametrize(("field", "value"), [("sigma_km", 0.0), ("most_populated", 0)])
def test_a_city_rule_that_cannot_be_is_refused_with_its_value(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{field}.*{value}"):
        CityRules(**{"cities": cities([(0, 0)]), field: value})  # type: ignore[arg-type]


def test_a_list_of_cells_is_read_in_every_form(tmp_path: Path) -> None:
    cells = ALL[::7]
    points = [cell.centre_lonlat for cell in cells]
    table = pa.table({"cell": [cell.id for cell in cells]})
    lonlat = pa.table({"lon": [p[0] for p in points], "lat": [p[1] for p in points]})
    pa.parquet.write_table(table, tmp_path / "cells.parquet")
    pa.parquet.write_table(lonlat, tmp_path / "points.parquet")
    pa.csv.write_csv(table, tmp_path / "cells.csv")
    pa.csv.write_csv(lonlat, tmp_path / "points.csv")
    features = [{"type": "Feature", "properties": {}, "geometry": {"type": "Point", "coordinates": p}} for p in points]
    (tmp_path / "points.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    half = len(cells) // 2
    lines = [*(cell.id for cell in cells[:half]), "", *(f"{lon},{lat}" for lon, lat in points[half:]), cells[0].id]
    (tmp_path / "cells.txt").write_text("\n".join(lines))
    for path in sorted(tmp_path.iterdir()):
        assert read_cells(str(path), side_m=SIDE_M) == cells, path.name


def test_a_listed_point_at_a_zone_border_becomes_the_cell_that_is_sampled_there(tmp_path: Path) -> None:
    path = tmp_path / "points.txt"
    seen = 0
    for lat in np.arange(40.0, 50.0, 0.13):
        for lon in (11.99, 12.01):
            path.write_text(f"{lon},{lat}")
            sampled = [cell_at(lon, lat, side_m=SIDE_M)]
            sampled.append(cell_at(*sampled[0].centre_lonlat, side_m=SIDE_M))
            if not any(map(is_owned, sampled)):
                with pytest.raises(ValueError, match="a sliver between two zones"):
                    read_cells(str(path), side_m=SIDE_M)
                continue
            (cell,) = read_cells(str(path), side_m=SIDE_M)
            seen += 1
            assert is_owned(cell)
            assert cell.footprint.distance(shapely.Point(lon, lat)) < 0.03
    assert seen > 140


def test_a_list_with_what_is_no_cell_is_refused_with_it(tmp_path: Path) -> None:
    path = tmp_path / "cells.txt"
    stranger = next(c for c in cells_covering(REGION, side_m=SIDE_M, owners_only=False) if not is_owned(c))
    for text, message in (
        ("33N_x", "'33N_x' is neither a cell nor lon,lat"),
        ("1,2,3", "'1,2,3' is neither"),
        ("10,85", "10.0,85.0 lies outside of the UTM zones"),
        (stranger.id, f"cell {stranger.id} is not owned by its zone"),
        ("", "lists no cell"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_cells(str(path), side_m=SIDE_M)
    with pytest.raises(ValueError, match="cannot be read"):
        read_cells(str(tmp_path / "none.txt"), side_m=SIDE_M)


def test_land_is_read_from_polygons(tmp_path: Path) -> None:
    path = tmp_path / "land.geojson"
    path.write_text(shapely.to_geojson(shapely.MultiPolygon([shapely.box(0, 0, 1, 1), shapely.box(0.5, 0, 2, 1)])))
    assert read_land(str(path)).area == pytest.approx(2.0)
    path.write_text(shapely.to_geojson(shapely.Point(1, 1)))
    with pytest.raises(ValueError, match="holds no polygon"):
        read_land(str(path))


def test_a_sample_is_the_same_in_every_version() -> None:
    # To change these is to move the cells of every dataset that was sampled.
    uniform = sample_uniform(REGION, 3, side_m=SIDE_M, seed=0)
    around = sample_around(CityRules(cities=cities([(11.0, 48.0)])), 3, side_m=SIDE_M, seed=0)
    assert [cell.id for cell in uniform] == ["32N_0267_2011", "33N_0110_2023", "33N_0108_2014"]
    assert [cell.id for cell in around] == ["32N_0257_2039", "32N_0242_2034", "32N_0249_1977"]
