"""What is kept out: against a brute-force measurement, from every kind of file."""

from __future__ import annotations

import json
import time
from pathlib import Path

import geopandas
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from pyproj import Transformer

from pipeline.exclusions import ExclusionRules, keep_out
from pipeline.grid import Cell, cell_at, cells_covering
from pipeline.places import Places, read_places

SIDE_M = 2640

PLACES = {
    "plain": (13.0, 48.0),
    "zone border": (12.0, 48.0),
    "equator": (30.0, 0.0),
    "antimeridian": (180.0, -17.0),
    "norway": (3.0, 60.0),
    "svalbard": (21.0, 78.5),
}


def places(shapes: list[shapely.Geometry]) -> Places:
    return Places(
        names=[f"area {n}" for n in range(len(shapes))],
        shapes=np.array(shapes, dtype=object),
        population=np.zeros(len(shapes)),
    )


def around(place: tuple[float, float]) -> list[Cell]:
    lon, lat = place
    found: list[Cell] = []
    for east in (-0.05, 0.05):
        middle = cell_at((lon + east + 180) % 360 - 180, lat + 0.01, side_m=SIDE_M)
        found += [
            Cell(epsg=middle.epsg, column=middle.column + c, row=middle.row + r, side_m=SIDE_M)
            for c in range(-2, 3)
            for r in range(-1, 2)
        ]
    return list(dict.fromkeys(found))


def distance_m(cell: Cell, shape: shapely.Geometry) -> float:
    """Between the cell's square and many points along the shape, in the plane of the cell's zone."""
    forward = Transformer.from_crs(4326, cell.epsg, always_xy=True)
    dense = shapely.segmentize(shape, 0.003)
    x, y = forward.transform(*shapely.get_coordinates(dense).T)
    line = shapely.points(x, y) if shape.geom_type == "Point" else shapely.polygons(np.column_stack([x, y]))
    return float(shapely.distance(line, shapely.box(*cell.bounds)).min())


@st.composite
def scenes(draw: st.DrawFn) -> tuple[list[Cell], list[shapely.Geometry], float]:
    place = PLACES[draw(st.sampled_from(sorted(PLACES)))]
    shapes: list[shapely.Geometry] = []
    for _ in range(draw(st.integers(1, 5))):
        west, south = place[0] + draw(st.floats(-0.3, 0.3)), place[1] + draw(st.floats(-0.2, 0.2))
        width, height = draw(st.sampled_from([(0.0, 0.0), (0.02, 0.02), (0.9, 0.05)]))
        if width == 0:
            shapes.append(shapely.Point((west + 180) % 360 - 180 if draw(st.booleans()) else west, south))
        else:
            shapes.append(shapely.box(west, south, west + width, south + height))
    return around(place), shapes, draw(st.sampled_from([0.0, 500.0, 5000.0, 30000.0]))


@given(scenes())
@settings(max_examples=60)
def test_cells_within_the_buffer_of_an_area_are_out_and_name_the_nearest(
    scene: tuple[list[Cell], list[shapely.Geometry], float],
) -> None:
    cells, shapes, buffer_m = scene
    kept, rejections = keep_out(cells, ExclusionRules(areas=places(shapes), buffer_m=buffer_m))
    assert [cell for cell in cells if cell in set(kept)] == kept
    named = {rejection.cell: rejection.detail for rejection in rejections}
    assert len(kept) + len(named) == len(cells)
    for cell in cells:
        gaps = [distance_m(cell, shape) for shape in shapes]
        if abs(min(gaps) - buffer_m) < 2 and buffer_m:
            continue  # Along the lines, a metre is a matter of how finely they are followed.
        if min(gaps) > 0 or buffer_m:
            assert (cell.id in named) == (min(gaps) <= buffer_m)
        if cell.id in named:
            name, _, gap = named[cell.id].partition(" is ")
            assert gaps[int(name.removeprefix("area "))] <= min(gaps) + 2
            assert abs(float(gap.removesuffix(" m away")) - min(gaps)) < 2


def test_the_reason_names_the_area_and_the_cell() -> None:
    cells = cells_covering(shapely.box(13.0, 48.0, 13.1, 48.05), side_m=SIDE_M)
    inside = cells[5].centre_lonlat
    kept, rejections = keep_out(cells, ExclusionRules(areas=places([shapely.Point(inside)]), buffer_m=0))
    assert kept == [cell for cell in cells if cell != cells[5]]
    (rejection,) = rejections
    assert (rejection.cell, rejection.reason, rejection.optical) == (cells[5].id, "excluded", "")
    assert rejection.detail == "area 0 is 0 m away"


def test_a_country_is_kept_out_whole_and_does_not_reach_around_the_world() -> None:
    half_a_world = shapely.box(-10, -60, 150, 70)
    cells = [
        cell_at(lon, lat, side_m=SIDE_M) for lon, lat in ((0, 60), (149, -59), (151, 0), (-170, 0), (0, 71), (60, 5))
    ]
    kept, rejections = keep_out(cells, ExclusionRules(areas=places([half_a_world]), buffer_m=10_000))
    assert kept == [cells[2], cells[3], cells[4]]
    assert len(rejections) == 3


def test_a_hundred_thousand_footprints_are_quick() -> None:
    random = np.random.default_rng(0)
    west, south = random.uniform(0, 30, 100_000), random.uniform(40, 60, 100_000)
    areas = Places(
        names=[str(n) for n in range(100_000)],
        shapes=shapely.box(west, south, west + 0.012, south + 0.012),
        population=np.zeros(100_000),
    )
    cells = cells_covering(shapely.box(10, 47, 13, 48.5), side_m=SIDE_M)
    start = time.process_time()
    kept, rejections = keep_out(cells, ExclusionRules(areas=areas, buffer_m=1000))
    assert time.process_time() - start < 5
    assert min(len(kept), len(rejections)) > 500


def test_a_buffer_below_zero_is_refused() -> None:
    with pytest.raises(ValueError, match=r"buffer_m.*-1"):
        ExclusionRules(areas=places([shapely.Point(0, 0)]), buffer_m=-1)


def test_areas_are_read_from_every_kind_of_file(tmp_path: Path) -> None:
    corners = [(10.0, 48.0, 10.1, 48.1), (179.9, -17.0, -179.9, -16.9), (5.0, 60.0, 5.0, 60.0)]
    columns = {name: [box[n] for box in corners] for n, name in enumerate(("west", "south", "east", "north"))}
    table = pa.table({"name": ["a", "b", "c"], **columns})
    pa.csv.write_csv(table, tmp_path / "boxes.csv")
    pa.parquet.write_table(table, tmp_path / "boxes.parquet")
    east = [box[2] + (360 if box[2] < box[0] else 0) for box in corners]
    shapes = [shapely.box(b[0], b[1], e, b[3]) for b, e in zip(corners, east, strict=True)]
    # Around the world the wrong way, as many files have it.
    wrong = shapely.transform(shapes[1], lambda c: np.column_stack([(c[:, 0] + 180) % 360 - 180, c[:, 1]]))
    written = [shapes[0], wrong, shapely.Point(5.0, 60.0)]
    geopandas.GeoDataFrame({"name": ["a", "b", "c"]}, geometry=written, crs=4326).to_parquet(tmp_path / "geo.parquet")
    features = [
        {"type": "Feature", "properties": {"name": name}, "geometry": shapely.geometry.mapping(shape)}
        for name, shape in zip("abc", written, strict=True)
    ]
    (tmp_path / "areas.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    for path in sorted(tmp_path.iterdir()):
        found = read_places(str(path))
        assert found.names == ["a", "b", "c"]
        assert np.allclose(shapely.bounds(found.shapes), [shape.bounds for shape in shapes]), path.name
        cells = [
            cell_at(x, y, side_m=SIDE_M)
            for x, y in ((10.05, 48.05), (180, -16.95), (-179.95, -16.95), (5, 60), (0, -17))
        ]
        kept, _ = keep_out(cells, ExclusionRules(areas=found, buffer_m=100))
        assert kept == [cells[-1]], path.name


def test_points_are_named_by_their_row_where_they_have_no_name(tmp_path: Path) -> None:
    path = tmp_path / "points.csv"
    path.write_text("lon,lat,population\n1,2,30\n3,4,\n")
    found = read_places(str(path))
    assert found.names == ["1", "2"]
    assert found.population.tolist() == [30, 0]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "x,y\n1,2\n", "has neither lon and lat nor west, south, east and north"),
        ("a.csv", "name,lon,lat\nhere,1,95\n", "here is not in degrees"),
        ("a.csv", "name,lon,lat\nhere,1,\n", "here is not in degrees"),
        ("a.csv", "lon,lat\n", "holds no place"),
        ("a.csv", "", "is neither Parquet nor CSV"),
        ("a.geojson", "[1, 2", "is not JSON"),
        ("a.geojson", '{"a": 1}', "is not GeoJSON"),
        ("a.parquet", "no", "is neither Parquet nor CSV"),
    ],
)
def test_what_is_no_file_of_places_is_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_places(str(path))
    with pytest.raises(ValueError, match="cannot be read"):
        read_places(str(tmp_path / f"none-{name}"))


def test_a_geoparquet_in_metres_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "utm.parquet"
    geopandas.GeoDataFrame(geometry=[shapely.Point(500000, 5e6)], crs=32633).to_parquet(path)
    with pytest.raises(ValueError, match="convert it to EPSG:4326"):
        read_places(str(path))
