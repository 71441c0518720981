"""Where and when: what is understood and what is refused."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from pipeline.regions import parse_period, parse_region


@pytest.mark.parametrize(
    ("text", "start", "end"),
    [
        ("2023", (2023, 1, 1), (2024, 1, 1)),
        ("2023-12", (2023, 12, 1), (2024, 1, 1)),
        ("2024-02-29", (2024, 2, 29), (2024, 3, 1)),
        ("2023-06/2023-08", (2023, 6, 1), (2023, 9, 1)),
        ("2023-06-15/2023", (2023, 6, 15), (2024, 1, 1)),
    ],
)
def test_a_period_holds_its_last_day(text: str, start: tuple[int, ...], end: tuple[int, ...]) -> None:
    assert parse_period(text) == (datetime(*start, tzinfo=UTC), datetime(*end, tzinfo=UTC))  # type: ignore[misc]


@pytest.mark.parametrize("text", ["June", "2023-13", "2023-02-30", "2023-08/2023-06", ""])
def test_what_is_not_a_period_is_refused_with_its_value(text: str) -> None:
    with pytest.raises(ValueError, match="period=" + text):
        parse_period(text)


def test_a_box_that_ends_west_of_its_start_crosses_the_antimeridian() -> None:
    region = parse_region("179.5,-17,-179.5,-16")
    assert region.geom_type == "MultiPolygon"
    assert region.area == pytest.approx(1.0)


def test_a_geojson_of_several_features_is_their_union(tmp_path: Path) -> None:
    def square(west: float) -> dict[str, object]:
        ring = [[west, 0.0], [west + 1, 0.0], [west + 1, 1.0], [west, 1.0], [west, 0.0]]
        return {"type": "Feature", "properties": {}, "geometry": {"type": "Polygon", "coordinates": [ring]}}

    path = tmp_path / "region.geojson"
    path.write_text(json.dumps({"type": "FeatureCollection", "features": [square(10), square(11)]}))
    assert parse_region(str(path)).area == pytest.approx(2.0)


@pytest.mark.parametrize(
    "text", ["1,2,3", "1,2,x,4", "0,5,1,4", "0,85,1,86", "0,0,0,1", "200,0,201,1", "no-such-file.geojson"]
)
def test_what_is_not_a_region_is_refused_with_its_value(text: str) -> None:
    with pytest.raises(ValueError, match="region=" + text):
        parse_region(text)


def test_a_file_that_is_not_geojson_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "region.geojson"
    path.write_text("[1, 2")
    with pytest.raises(ValueError, match="is not JSON"):
        parse_region(str(path))
    path.write_text('{"a": 1}')
    with pytest.raises(ValueError, match="is not GeoJSON"):
        parse_region(str(path))
