"""Which cells a job is about: by sampling, and without those that come too near to what is kept out."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from typing import Final, Literal

import pyarrow as pa
import shapely
from shapely import affinity
from shapely.geometry.base import BaseGeometry

from jobs.support.job import JobError
from jobs.support.region_settings import Exclusion, Sampling
from pipeline.antimeridian import within_180
from pipeline.archives import Archive
from pipeline.broker import AccessSpec, access_for
from pipeline.catalog import search_labels
from pipeline.exclusions import ExclusionRules, keep_out
from pipeline.grid import Cell, cells_covering
from pipeline.label_fractions import class_fractions
from pipeline.labels import LABEL_CLASSES
from pipeline.manifest import rejections_table
from pipeline.pairing import Rejection
from pipeline.places import read_places
from pipeline.sampling import CityRules, read_cells, read_land, sample_around, sample_stratified, sample_uniform
from pipeline.splits import SplitRules

log = logging.getLogger(__name__)

_DEGREE_M: Final = 110_500.0
"""Shortest length of a degree of latitude."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a job wants of a region's cells, beside its settings."""

    per_cell: Literal["all", "one", "season"]
    owners_only: bool
    """See `cells_covering`; samples are always of owned cells."""

    splits: SplitRules
    per_season: int = 1
    labels: tuple[str, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)
    exclude: Exclusion = field(default_factory=Exclusion)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Cells, and what was kept out."""

    cells: list[Cell]

    rejections: pa.Table
    """`REJECTIONS_SCHEMA`: cells that are kept out."""

    region: BaseGeometry
    """Longitude/latitude: where the archive has to be asked, which cells at the rim of a region reach beyond."""


def choose_cells(
    region: BaseGeometry, wanted: Wanted, *, side_m: int, seed: int, archive: Archive, spec: AccessSpec
) -> Choice:
    """Sample and exclude.

    Args:
        region: Longitude/latitude.
        wanted: What to sample and what to exclude.
        side_m: Side of the cells, metres.
        seed: Decides the sample.
        archive: Has the labels that stratified sampling goes by.
        spec: How it may be reached.

    Raises:
        JobError: No cell is left, or a listed cell lies outside of the region.
        ValueError: A file cannot be read, or there are not so many cells.
        SearchError: The archive has no such labels here.
    """
    cells = _sampled(region, wanted, side_m=side_m, seed=seed, archive=archive, spec=spec)
    log.info("%d cells of %d m", len(cells), side_m)
    rejections: list[Rejection] = []
    if wanted.exclude.areas is not None:
        rules = ExclusionRules(areas=read_places(wanted.exclude.areas), buffer_m=wanted.exclude.buffer_m)
        cells, rejections = keep_out(cells, rules)
        log.info("%d of them are kept out by exclude.areas=%s", len(rejections), wanted.exclude.areas)
    if not cells:
        kept_out = "; exclude.areas keeps all of them out" if rejections else ""
        raise JobError(f"there is no cell of {side_m} m in the region{kept_out}")
    return Choice(
        cells=cells,
        rejections=rejections_table(rejections),
        region=_reach(region, side_m) if wanted.sampling.method == "all" else _outlines(cells),
    )


def _sampled(
    region: BaseGeometry, wanted: Wanted, *, side_m: int, seed: int, archive: Archive, spec: AccessSpec
) -> list[Cell]:
    how = wanted.sampling
    land = read_land(how.land) if how.land else None
    match how.method:
        case "all":
            return cells_covering(region, side_m=side_m, owners_only=wanted.owners_only)
        case "list":
            assert how.file is not None, how
            return _inside(read_cells(how.file, side_m=side_m), region, how.file)
        case "uniform":
            assert how.num_cells is not None, how
            return sample_uniform(region, how.num_cells, side_m=side_m, seed=seed, land=land)
        case "cities":
            assert how.num_cells is not None, how
            assert how.file is not None, how
            rules = CityRules(cities=read_places(how.file), sigma_km=how.sigma_km, most_populated=how.most_populated)
            return sample_around(rules, how.num_cells, side_m=side_m, seed=seed, region=region, land=land)
        case "stratified":
            assert how.num_cells is not None, how
            found = search_labels(archive, how.labels, region, access_for(spec))
            maps = [(href, outline.wkb) for _, href, outline in found]
            codes = sorted(LABEL_CLASSES[how.labels])
            return sample_stratified(
                region,
                how.num_cells,
                lambda cells: class_fractions(cells, maps, codes, spec),
                side_m=side_m,
                seed=seed,
                pool_factor=how.pool_factor,
                land=land,
            )


def _inside(cells: list[Cell], region: BaseGeometry, file: str) -> list[Cell]:
    shapely.prepare(region)
    outside = [cell.id for cell in cells if not region.intersects(within_180(cell.footprint))]
    if outside:
        raise JobError(f"sampling.file={file}: {len(outside)} cells lie outside of region, {outside[0]} for one")
    return cells


def _outlines(cells: list[Cell]) -> BaseGeometry:
    return shapely.union_all([within_180(cell.footprint) for cell in cells])


def _reach(region: BaseGeometry, side_m: int) -> BaseGeometry:
    """A little more than all cells that meet a region, in longitude/latitude."""
    diagonal_deg = math.sqrt(2) * side_m / _DEGREE_M
    farthest_deg = min(max(abs(region.bounds[1]), abs(region.bounds[3])) + diagonal_deg, 85.0)
    grown = shapely.buffer(region, diagonal_deg / math.cos(math.radians(farthest_deg)), join_style="mitre")
    world = shapely.box(-180, -90, 180, 90)
    turned = (affinity.translate(grown, xoff=turn) for turn in (-360.0, 0.0, 360.0))
    return shapely.union_all([shapely.intersection(part, world) for part in turned])
