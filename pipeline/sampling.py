"""Which cells a dataset is made of: all of a region, some on land, by land cover, around cities, or a list.

Only owned cells are sampled, each at most once. A sample depends on the seed and on what is asked alone, not on the
order of a file; and asking for more cells adds to those that fewer would be (but by strata, where shares move).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final

import numpy as np
import shapely
from numpy.typing import NDArray
from pyproj import Geod
from shapely.geometry.base import BaseGeometry

from pipeline.grid import (
    Cell,
    Floats,
    Integers,
    cell_at,
    cells_at,
    centres_lonlat,
    grid_order,
    is_owned,
    owned,
    zone_covers,
)
from pipeline.places import Places, read_places, read_table

ClassesOf = Callable[[Sequence[Cell]], NDArray[np.floating[Any]]]
"""Cells -> (cell, class) fractions of each cell that are of each class of a label collection."""

_EARTH: Final = Geod(ellps="WGS84")

_BATCH: Final = 4096
"""Points that are drawn at a time; to change it is to change every sample."""

_FRUITLESS_BATCHES: Final = 50
"""After so many batches without a new cell there are held to be no more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CityRules:
    """How cells are drawn around cities, as SSL4EO-S12 does."""

    cities: Places
    """Points, with their population if only the largest are to be taken."""

    sigma_km: float = 50.0
    """Standard deviation of a cell's distance from its city, to the east and to the north, each."""

    most_populated: int = 10_000
    """Only the largest so many are drawn from, all with the same chance."""

    def __post_init__(self) -> None:
        if self.sigma_km <= 0:
            raise ValueError(f"sigma_km must be positive, got {self.sigma_km}")
        if self.most_populated < 1:
            raise ValueError(f"most_populated must be at least 1, got {self.most_populated}")


def sample_uniform(
    region: BaseGeometry, num_cells: int, *, side_m: int, seed: int, land: BaseGeometry | None = None
) -> list[Cell]:
    """Draw from the cells of a region, all with the same chance.

    Args:
        region: Longitude/latitude.
        num_cells: How many.
        side_m: Side of the cells in metres.
        seed: Decides which.
        land: Longitude/latitude; only cells whose centre lies on it. None is everywhere.

    Returns:
        Cells in the order of `cells_covering`, of which they are.

    Raises:
        ValueError: There are not so many.
    """
    cells = list(islice(shuffled_cells(region, side_m=side_m, seed=seed, land=land), num_cells))
    if len(cells) < num_cells:
        where = "the region" if land is None else "the land of the region"
        raise ValueError(f"num_cells={num_cells}: {where} has only {len(cells)} cells of {side_m} m")
    return sorted(cells, key=grid_order)


def sample_stratified(
    region: BaseGeometry,
    num_cells: int,
    classes_of: ClassesOf,
    *,
    side_m: int,
    seed: int,
    pool_factor: int = 10,
    land: BaseGeometry | None = None,
) -> list[Cell]:
    """Draw the same number of cells of every class that prevails somewhere.

    The classes of `pool_factor` times as many cells as asked for are looked up. A cell counts for the class with its
    largest fraction, of equal ones the first; a cell without any class is left out. A class with too few cells gives
    all of them, and the others share what is missing.

    Args:
        region: Longitude/latitude.
        num_cells: How many.
        classes_of: Reads a label collection.
        side_m: Side of the cells in metres.
        seed: Decides which.
        pool_factor: Cells looked up for each one asked for: the more, the more of rare classes.
        land: As for `sample_uniform`.

    Returns:
        Cells in the order of `cells_covering`, of which they are.

    Raises:
        ValueError: There are not so many with a class.
    """
    pool = list(islice(shuffled_cells(region, side_m=side_m, seed=seed, land=land), num_cells * pool_factor))
    fractions = np.asarray(classes_of(pool))
    strata = np.where(fractions.sum(axis=1) > 0, np.argmax(fractions, axis=1), -1) if pool else np.empty(0, np.int64)
    members = [np.flatnonzero(strata == number) for number in np.unique(strata[strata >= 0])]
    if sum(map(len, members)) < num_cells:
        raise ValueError(
            f"num_cells={num_cells}: of {len(pool)} cells that were looked up only {sum(map(len, members))} have a "
            "class; ask for fewer, raise pool_factor, or take a region that the labels cover"
        )
    chosen: list[int] = []
    # The smallest stratum first: what it lacks is shared among those that are left.
    for left, stratum in zip(range(len(members), 0, -1), sorted(members, key=lambda m: (len(m), m[0])), strict=True):
        chosen += stratum[: (num_cells - len(chosen)) // left].tolist()
    return sorted((pool[place] for place in chosen), key=grid_order)


def sample_around(
    rules: CityRules,
    num_cells: int,
    *,
    side_m: int,
    seed: int,
    region: BaseGeometry | None = None,
    land: BaseGeometry | None = None,
) -> list[Cell]:
    """Draw cells from normal distributions around cities that are drawn at random.

    Args:
        rules: Which cities, and how far from them.
        num_cells: How many.
        side_m: Side of the cells in metres.
        seed: Decides which.
        region: Longitude/latitude; only cells whose centre lies in it. None is everywhere.
        land: Likewise.

    Returns:
        Cells in the order of `cells_covering`.

    Raises:
        ValueError: A place is not a point, or there are not so many cells within reach.
    """
    lon, lat = _largest(rules)
    inside = [area for area in (region, land) if area is not None]
    for area in inside:
        shapely.prepare(area)
    random = np.random.default_rng(seed)
    found: dict[Cell, None] = {}
    fruitless = 0
    while len(found) < num_cells and fruitless < _FRUITLESS_BATCHES:
        before = len(found)
        city = random.integers(len(lon), size=_BATCH)
        east_m, north_m = random.normal(0.0, rules.sigma_km * 1000.0, (2, _BATCH))
        azimuth, distance_m = np.degrees(np.arctan2(east_m, north_m)), np.hypot(east_m, north_m)
        point_lon, point_lat, _ = _EARTH.fwd(lon[city], lat[city], azimuth, distance_m)
        found |= dict.fromkeys(_owned_cells(np.asarray(point_lon), np.asarray(point_lat), inside, side_m))
        fruitless = fruitless + 1 if len(found) == before else 0
    if len(found) < num_cells:
        raise ValueError(
            f"num_cells={num_cells}: only {len(found)} cells of {side_m} m were found within reach of {len(lon)} "
            f"points with sigma_km={rules.sigma_km}; ask for fewer, give more points or raise sigma_km"
        )
    return sorted(islice(found, num_cells), key=grid_order)


def read_cells(path: str, *, side_m: int) -> list[Cell]:
    """Cells of a list: ids, or points that lie in them.

    Args:
        path: CSV or Parquet file with a column `cell`, or any file of points that `read_places` reads, or a text file
            (.txt) with a cell's id or `lon,lat` on each line.
        side_m: Side of the cells in metres.

    Returns:
        Cells in the order of `cells_covering`, each once.

    Raises:
        ValueError: Not such a file, a place that is no point or outside of the UTM zones, or a cell that its zone does
            not own.
    """
    if path.endswith("txt"):
        cells = [_listed(line.strip(), path, side_m) for line in _lines(path) if line.strip()]
    elif not path.endswith("json") and "cell" in (table := read_table(path)).column_names:
        cells = [_listed(str(name), path, side_m) for name in table["cell"].to_pylist()]
    else:
        places = read_places(path)
        lon, lat = _points(places)
        cells = [_owner(x, y, path, side_m) for x, y in zip(lon.tolist(), lat.tolist(), strict=True)]
    if not cells:
        raise ValueError(f"{path}: lists no cell")
    return sorted(set(cells), key=grid_order)


def read_land(path: str) -> BaseGeometry:
    """Polygons of land from a file, such as Natural Earth's `ne_10m_land` as GeoJSON.

    Raises:
        ValueError: Not a file of polygons.
    """
    land = shapely.union_all(read_places(path).shapes)
    if land.area == 0:
        raise ValueError(f"{path}: holds no polygon")
    return land


def shuffled_cells(region: BaseGeometry, *, side_m: int, seed: int, land: BaseGeometry | None = None) -> Iterator[Cell]:
    """Owned cells of a region in a random order, found only as far as they are asked for.

    A cell's place in the order follows from the seed and the cell alone: a larger region puts more cells between, and
    changes nothing else.
    """
    if land is not None:
        shapely.prepare(land)
    covers = list(zone_covers(region, side_m=side_m, owners_only=True))
    around = sum(len(cover.columns) * len(cover.rows) for cover in covers)
    # At first so few that a world of cells costs no more than their numbers.
    start, end = 0.0, min(1.0, 20_000 / max(around, 1))
    while start < 1.0:
        found: list[tuple[float, Cell]] = []
        for cover in covers:
            for columns, rows in cover.pieces(max_cells=1 << 20):
                draws = _draws(cover.epsg, columns, rows, seed)
                here = (draws >= start) & (draws < end)
                columns, rows = cover.meeting(columns[here], rows[here])
                if land is not None:
                    on_land = shapely.contains_xy(land, *centres_lonlat(cover.epsg, columns, rows, side_m=side_m))
                    columns, rows = columns[on_land], rows[on_land]
                draws = _draws(cover.epsg, columns, rows, seed)
                found += zip(draws.tolist(), _cells(cover.epsg, columns, rows, side_m), strict=True)
        yield from (cell for _, cell in sorted(found))
        start, end = end, min(1.0, end * 4)


def _draws(epsg: int, columns: Integers, rows: Integers, seed: int) -> Floats:
    """(cell,) uniform in [0, 1), from the seed and the cell alone: splitmix64's finalizer, once for each number."""
    state = np.full(len(columns), seed % (1 << 64), np.uint64)
    for part in (np.int64(epsg), columns.astype(np.int64), rows.astype(np.int64)):
        state = state + np.asarray(part).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state ^= state >> np.uint64(31)
    return (state >> np.uint64(11)).astype(np.float64) / 2**53


def _cells(epsg: int, columns: Integers, rows: Integers, side_m: int) -> list[Cell]:
    return [
        Cell(epsg=epsg, column=column, row=row, side_m=side_m)
        for column, row in zip(columns.tolist(), rows.tolist(), strict=True)
    ]


def _owned_cells(lon: Floats, lat: Floats, inside: Sequence[BaseGeometry], side_m: int) -> Iterator[Cell]:
    """Cells of those points that lie in the UTM zones, are owned, and have their centre in all the areas; in order."""
    in_zones = (lat >= -80.0) & (lat < 84.0)
    epsg, columns, rows = cells_at(lon[in_zones], lat[in_zones], side_m=side_m)
    good = np.zeros(len(epsg), np.bool_)
    for zone in np.unique(epsg).tolist():
        here = np.flatnonzero(epsg == zone)
        good[here] = owned(zone, columns[here], rows[here], side_m=side_m)
        centres = centres_lonlat(zone, columns[here], rows[here], side_m=side_m)
        for area in inside:
            good[here] &= shapely.contains_xy(area, *centres)
    for zone, column, row in zip(epsg[good].tolist(), columns[good].tolist(), rows[good].tolist(), strict=True):
        yield Cell(epsg=zone, column=column, row=row, side_m=side_m)


def _largest(rules: CityRules) -> tuple[Floats, Floats]:
    """Longitudes and latitudes of the most populated cities, each once, in an order of their own."""
    lon, lat = _points(rules.cities)
    order = np.lexsort((lat, lon, -rules.cities.population))
    points = dict.fromkeys(zip(lon[order].tolist(), lat[order].tolist(), strict=True))
    largest = np.array(list(islice(points, rules.most_populated)))
    return largest[:, 0], largest[:, 1]


def _points(places: Places) -> tuple[Floats, Floats]:
    wrong = np.flatnonzero(shapely.get_type_id(places.shapes) != shapely.GeometryType.POINT)
    if len(wrong):
        raise ValueError(f"place {places.names[wrong[0]]} is not a point but a {places.shapes[wrong[0]].geom_type}")
    return shapely.get_x(places.shapes), shapely.get_y(places.shapes)


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error


def _listed(text: str, path: str, side_m: int) -> Cell:
    """The cell of an id or of `lon,lat`."""
    lon, comma, lat = text.partition(",")
    try:
        if comma:
            return _owner(float(lon), float(lat), path, side_m)
        cell = Cell.from_id(text, side_m=side_m)
    except ValueError as error:
        raise ValueError(f"{path}: {text!r} is neither a cell nor lon,lat ({error})") from error
    if not is_owned(cell):
        raise ValueError(f"{path}: cell {text} is not owned by its zone; its place is sampled as another zone's cell")
    return cell


def _owner(lon: float, lat: float, path: str, side_m: int) -> Cell:
    """The owned cell at a point, or right beside it where the zones' cells leave a gap."""
    if not -80.0 <= lat < 84.0 or not -180.0 <= lon <= 360.0:
        raise ValueError(f"{path}: {lon},{lat} lies outside of the UTM zones (80 S to 84 N)")
    cell = cell_at(lon, lat, side_m=side_m)
    if is_owned(cell):
        return cell
    beyond = cell_at(*cell.centre_lonlat, side_m=side_m)
    if not is_owned(beyond):
        raise ValueError(f"{path}: no zone owns a cell at {lon},{lat}, a sliver between two zones; move it a little")
    return beyond
