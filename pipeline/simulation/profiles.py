"""Which scenes a simulated archive holds: the demo's, and the tests' small and nasty one.

Both lie where UTM zone 32 meets zone 33 (12 degrees east, Bavaria), with a second area south of the equator.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

import numpy as np
from pyproj import Transformer

from pipeline.simulation.frame import Frame, Ground, Plane
from pipeline.simulation.scenes import LabelScene, OpticalScene, RadarScene, Scene, Swath

Bbox = tuple[float, float, float, float]
"""West, south, east, north in degrees."""

CELL_M: Final = 2640
"""Side of the cells that the areas are measured in."""

_MARGIN_M: Final = 240
_RADAR_MARGIN_M: Final = 720
_GROUND_MARGIN_M: Final = 900
_BORDER_LON: Final = 12.0
_PLANE: Final = Plane(epsg=32632, anchor_x_m=716_000.0, anchor_y_m=5_354_000.0)
_SOUTHERN_PLANE: Final = Plane(epsg=32736, anchor_x_m=625_000.0, anchor_y_m=9_624_000.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """An archive to simulate."""

    name: str
    scenes: tuple[Scene, ...]

    region: Bbox
    """The main area, some of whose cells belong to the neighbouring zone: for training."""

    border_region: Bbox
    """A strip along the zone border."""

    southern_region: Bbox
    embed_region: Bbox
    """A small part of the main area."""

    period: str = "2021-09-01/2022-09-30"
    """Dates that hold every scene."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Block:
    """Cells of one zone, from the western column and northern row."""

    epsg: int
    column: int
    row: int
    columns: int
    rows: int

    def frame(self, margin_m: int = 0) -> Frame:
        """10 m pixels over the cells and a margin."""
        origin = 0 if self.epsg < 32700 else 10_000_000
        return Frame(
            epsg=self.epsg,
            left=float(self.column * CELL_M - margin_m),
            top=float(origin + (self.row + 1) * CELL_M + margin_m),
            resolution=10.0,
            width_px=(self.columns * CELL_M + 2 * margin_m) // 10,
            height_px=(self.rows * CELL_M + 2 * margin_m) // 10,
        )


def _demo() -> Profile:
    main = _Block(epsg=32632, column=266, row=2033, columns=10, rows=11)
    part = _Block(epsg=32632, column=266, row=2033, columns=4, rows=11)
    optical = [
        _optical(main, "S2B", "2021-09-05T10:15:59", "03.01", 0.03),
        _optical(main, "S2A", "2022-05-01T10:20:31", "04.00", 0.0, Swath(heading_deg=102.0, reach_m=7_000.0)),
        _optical(part, "S2A", "2022-06-10T10:20:31", "04.00", 0.85, within=main),
        _optical(main, "S2B", "2022-06-12T10:15:59", "04.00", 0.06),
        _optical(main, "S2B", "2022-07-15T10:20:29", "05.10", 0.0),
        _optical(main, "S2B", "2022-08-31T10:15:59", "05.10", 0.04),
    ]
    radar = [
        _radar(main, "2021-09-05T05:26:13", False, 39.0, 0),
        _radar(main, "2022-04-29T17:07:02", True, 36.0, 1),
        _radar(main, "2022-06-13T05:26:16", False, 33.0, 2),
        _radar(part, "2022-06-28T17:07:06", True, 36.0, 3, within=main),
        _radar(main, "2022-07-15T17:07:07", True, 42.0, 4),
        _radar(main, "2022-09-01T17:07:10", True, 42.0, 5, Swath(heading_deg=282.0, reach_m=9_000.0)),
    ]
    scenes = [*optical, *(_beyond_border(scene) for scene in optical[3:5]), *radar, *_southern(4), *_labels(main)]
    return _profile("demo", main, scenes, southern_cells=4, embed_cells=4)


def _test() -> Profile:
    main = _Block(epsg=32632, column=271, row=2030, columns=4, rows=4)
    optical = [
        _optical(main, "S2B", "2021-09-05T10:15:59", "03.01", 0.10),
        _optical(main, "S2A", "2022-06-10T10:20:31", "04.00", 0.85),
        _optical(main, "S2B", "2022-06-12T10:15:59", "04.00", 0.12),
        _optical(main, "S2B", "2022-07-15T10:20:29", "05.10", 0.0, Swath(heading_deg=102.0, reach_m=8_500.0)),
    ]
    radar = [
        _radar(main, "2021-09-05T05:26:13", False, 39.0, 0),
        _radar(main, "2022-06-13T05:26:16", False, 33.0, 2),
        _radar(main, "2022-06-28T17:07:06", True, 36.0, 3),
        _radar(main, "2022-07-15T17:07:07", True, 42.0, 4, Swath(heading_deg=282.0, reach_m=-1_500.0)),
    ]
    scenes = [*optical, _beyond_border(optical[2]), *radar, *_southern(2), *_labels(main)]
    return _profile("test", main, scenes, southern_cells=2, embed_cells=2)


def _profile(name: str, main: _Block, scenes: list[Scene], *, southern_cells: int, embed_cells: int) -> Profile:
    _, south, east, north = region = _inside(main.frame())
    part = _Block(epsg=main.epsg, column=main.column + 1, row=main.row - 1, columns=embed_cells, rows=embed_cells)
    return Profile(
        name=name,
        scenes=tuple(scenes),
        region=region,
        border_region=(_BORDER_LON - 0.02, south, min(_BORDER_LON + 0.02, east), north),
        southern_region=_inside(_southern_block(southern_cells).frame()),
        embed_region=_inside(part.frame()),
    )


def _optical(
    block: _Block,
    platform: str,
    sensed: str,
    baseline: str,
    cloud_fraction: float,
    swath: Swath | None = None,
    within: _Block | None = None,
) -> OpticalScene:
    """A scene over a block, which may be a part of the area's."""
    return OpticalScene(
        platform=platform, sensed=_utc(sensed), baseline=baseline, cloud_fraction=cloud_fraction,
        frame=block.frame(_MARGIN_M), ground=_ground(within or block), swath=swath,
    )  # fmt: skip


def _radar(
    block: _Block,
    sensed: str,
    ascending: bool,
    incidence_deg: float,
    offset: int,
    swath: Swath | None = None,
    within: _Block | None = None,
) -> RadarScene:
    """A pass whose grid lies whole 10 m pixels, but never a multiple of 60 m, beside Sentinel-2's."""
    around = block.frame(_RADAR_MARGIN_M)
    shifted = Frame(
        epsg=around.epsg,
        left=around.left - 10.0 * (1 + offset % 5),
        top=around.top + 10.0 * (5 - offset % 5),
        resolution=10.0,
        width_px=around.width_px,
        height_px=around.height_px,
    )
    return RadarScene(
        platform="S1A", sensed=_utc(sensed), ascending=ascending, incidence_deg=incidence_deg,
        frame=shifted, ground=_ground(within or block), swath=swath,
    )  # fmt: skip


def _beyond_border(scene: OpticalScene) -> OpticalScene:
    """The same overpass's tile in the neighbouring zone: the scene's part from a little west of the border on."""
    to_lonlat = Transformer.from_crs(scene.frame.epsg, 4326, always_xy=True)
    to_zone = Transformer.from_crs(4326, scene.frame.epsg + 1, always_xy=True)
    _, bottom, right, top = scene.frame.bounds
    lon, lat = to_lonlat.transform([right, right], [bottom, top])
    x, y = to_zone.transform([_BORDER_LON - 0.02] * 2 + lon, lat + lat)
    west, south = (math.floor(value / 60) * 60 for value in (min(x), min(y)))
    east, north = (math.ceil(value / 60) * 60 for value in (max(x), max(y)))
    frame = Frame(
        epsg=scene.frame.epsg + 1, left=float(west), top=float(north), resolution=10.0,
        width_px=(east - west) // 10, height_px=(north - south) // 10,
    )  # fmt: skip
    return OpticalScene(
        platform=scene.platform, sensed=scene.sensed, baseline=scene.baseline, cloud_fraction=scene.cloud_fraction,
        frame=frame, ground=scene.ground, swath=scene.swath,
    )  # fmt: skip


def _southern(cells: int) -> Iterator[Scene]:
    block = _southern_block(cells)
    yield _optical(block, "S2A", "2022-06-15T07:46:09", "04.00", 0.05)
    yield _radar(block, "2022-06-15T16:04:18", True, 38.0, 2)
    yield from _labels(block)


def _southern_block(cells: int) -> _Block:
    return _Block(epsg=32736, column=236, row=-142, columns=cells, rows=cells)


def _labels(block: _Block) -> Iterator[LabelScene]:
    """The parts of each 3 x 3 degree tile that cover a block, on the tile's own pixels."""
    per_degree = 12_000
    west, south, east, north = block.frame(_RADAR_MARGIN_M).footprint().bounds
    for tile_west in range(math.floor(west / 3) * 3, math.ceil(east), 3):
        left, right = max(west, tile_west), min(east, tile_west + 3)
        column, row = math.floor(left * per_degree), math.ceil(north * per_degree)
        frame = Frame(
            epsg=4326, left=column / per_degree, top=row / per_degree, resolution=1 / per_degree,
            width_px=math.ceil(right * per_degree) - column, height_px=row - math.floor(south * per_degree),
        )  # fmt: skip
        yield LabelScene(frame=frame, ground=_ground(block))


def _inside(frame: Frame) -> Bbox:
    """The largest box of whole 0.001 degrees whose edges stay inside a frame."""
    left, bottom, right, top = frame.bounds
    to_lonlat = Transformer.from_crs(frame.epsg, 4326, always_xy=True)
    x, y = np.linspace(left, right, 9), np.linspace(bottom, top, 9)
    west = max(to_lonlat.transform([left] * 9, y)[0])
    east = min(to_lonlat.transform([right] * 9, y)[0])
    south = max(to_lonlat.transform(x, [bottom] * 9)[1])
    north = min(to_lonlat.transform(x, [top] * 9)[1])
    return (
        math.ceil(west * 1000) / 1000,
        math.ceil(south * 1000) / 1000,
        math.floor(east * 1000) / 1000,
        math.floor(north * 1000) / 1000,
    )


def _ground(block: _Block) -> Ground:
    plane = _PLANE if block.epsg == _PLANE.epsg else _SOUTHERN_PLANE
    return Ground(plane=plane, frame=block.frame(_GROUND_MARGIN_M))


def _utc(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


PROFILES: Final = {profile.name: profile for profile in (_demo(), _test())}
