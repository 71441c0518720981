"""What a user says of the chips of a region and period: shared by the jobs that build a store from an archive."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Literal, Self

import shapely
from pydantic import Field, model_validator

from jobs.support.settings import Group, JobSettings
from pipeline.broker import AccessSpec
from pipeline.limits import HostLimits
from pipeline.reader import Patience
from pipeline.regions import parse_region


class Pairing(Group):
    """Which radar look goes with which optical one."""

    max_dt_days: float = Field(default=3.0, gt=0, le=60)
    """Largest time between the two acquisitions, days."""

    max_cloud_percent: float = Field(default=60.0, ge=0, le=100)
    """Optical scenes with more cloud than this over the whole scene are not considered, percent."""

    min_overlap: float = Field(default=0.999, gt=0, le=1)
    """Smallest fraction of a cell that each acquisition must cover."""

    orbit: Literal["any", "ascending", "descending", "same"] = "any"
    """Direction of the radar's orbit; same is one direction for all pairs of a cell."""

    one_track: bool = False
    """Take one relative orbit of the radar for all pairs of a cell: the same look angle every time."""

    relative_orbits: tuple[int, ...] = ()
    """Only these relative orbits of the radar; none named is all."""


class Screening(Group):
    """What the pixels of a chip must be like to be kept."""

    max_cloud_fraction: float = Field(default=0.2, ge=0, le=1)
    """Largest fraction of cloud and cloud shadow among the chip's valid pixels."""

    min_valid_fraction: float = Field(default=0.99, ge=0, le=1)
    """Smallest fraction of pixels with data in both sensors."""

    max_shadow_fraction: float = Field(default=1.0, ge=0, le=1)
    """Largest fraction of cloud shadow alone among the chip's valid pixels."""

    max_snow_fraction: float = Field(default=1.0, ge=0, le=1)
    """Largest fraction of snow and ice among the chip's valid pixels."""

    max_border_noise_fraction: float = Field(default=1.0, ge=0, le=1)
    """Largest fraction of valid radar pixels that are noise along a swath's edge."""

    on_suspect: Literal["keep", "reject"] = "keep"
    """What becomes of chips whose pixels contradict their item's metadata, such as a forgotten offset; they are
    flagged in the ledger either way."""


class Sampling(Group):
    """Which cells of the region are taken."""

    method: Literal["all", "uniform", "stratified", "cities", "list"] = "all"
    """all; uniform: some at random; stratified: as many of every land cover; cities: around the points of a file, as
    SSL4EO-S12 was sampled; list: those of a file."""

    num_cells: int | None = Field(default=None, ge=1)
    """How many; for uniform, stratified and cities."""

    land: str | None = None
    """File of polygons: only cells whose centre lies on them are drawn."""

    file: str | None = None
    """CSV, Parquet, GeoJSON or text file: cities with lon, lat and perhaps population, or a list of cells or points."""

    sigma_km: float = Field(default=50.0, gt=0)
    """With cities: standard deviation of a cell's distance from its city, kilometres."""

    most_populated: int = Field(default=10_000, ge=1)
    """With cities: only the largest so many are drawn from."""

    labels: str = "worldcover"
    """With stratified: label collection of the archive whose classes are drawn alike."""

    pool_factor: int = Field(default=10, ge=1)
    """With stratified: cells whose classes are looked up for each one that is asked for."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.method in ("uniform", "stratified", "cities") and self.num_cells is None:
            raise ValueError(f"sampling.method={self.method} needs sampling.num_cells")
        if self.method in ("cities", "list") and self.file is None:
            raise ValueError(f"sampling.method={self.method} needs sampling.file")
        return self


class Exclusion(Group):
    """Areas that no chip may come near, such as the footprints of evaluation sets."""

    areas: str | None = None
    """File of points, boxes or polygons (GeoJSON, GeoParquet, CSV); unset: none."""

    buffer_m: float = Field(default=0.0, ge=0)
    """Cells that come so near to an area are left out too, metres."""


class Politeness(Group):
    """What an archive's hosts are asked for at most, by the whole cluster together."""

    storage_requests_per_s: float | None = Field(default=None, gt=0)
    """Requests per second to each host with files; unset: the archive's own limit."""

    storage_turns: int | None = Field(default=None, ge=1)
    """Blocks that are read from one host at a time; unset: the archive's own limit."""

    api_requests_per_s: float | None = Field(default=None, gt=0)
    """Requests per second to the catalog, and for tokens; unset: the archive's own limit."""

    patience_min: float | None = Field(default=None, gt=0)
    """How long a host that does not answer is waited for, minutes; unset: half an hour."""

    def applied_to(self, spec: AccessSpec) -> AccessSpec:
        """Limits with what is set here in place of the archive's own."""
        patience = {"patience_s": None if self.patience_min is None else self.patience_min * 60}
        storage = {"rate_per_s": self.storage_requests_per_s, "turns": self.storage_turns, **patience}
        api = {"rate_per_s": self.api_requests_per_s, **patience}
        return replace(spec, storage=_with(spec.storage, storage), api=_with(spec.api, api))


def _with(limits: HostLimits, values: Mapping[str, float | int | None]) -> HostLimits:
    given: dict[str, Any] = {name: value for name, value in values.items() if value is not None}
    return replace(limits, **given)


class Reading(Group):
    """How pixels are read."""

    reader: Literal["window", "stackstac"] = "window"
    """What reads: windows of the files themselves, or stackstac; their pixels are equal."""

    attempts: int = Field(default=7, ge=1)
    """How often a read that may pass is tried, after pauses that double: seven times outlast two minutes."""

    timeout_s: float = Field(default=30.0, gt=0)
    """How long one request may take, seconds."""

    longest_wait_s: float = Field(default=120.0, gt=0)
    """A server that asks for a longer pause is given up for this run, seconds."""

    def patience(self) -> Patience:
        """How long a read is tried."""
        return Patience(attempts=self.attempts, timeout_s=self.timeout_s, longest_wait_s=self.longest_wait_s)


class Splits(Group):
    """Train, val and test by blocks of cells."""

    block_cells: int = Field(default=16, ge=1)
    """Side of a split block, cells."""

    val_fraction: float = Field(default=0.1, ge=0, lt=1)
    """Fraction of split blocks for choosing hyper-parameters."""

    test_fraction: float = Field(default=0.1, ge=0, lt=1)
    """Fraction of split blocks for the reported numbers."""

    buffer_cells: int = Field(default=1, ge=0, le=8)
    """Train gives up cells this near to a val or test block, cells."""


class RegionBuild(JobSettings):
    """What decides the chips of a region and period."""

    archive: str = "planetary-computer"
    """planetary-computer, earth-search, earth-search/sentinel-2-c1-l2a, or the URL of a STAC API with Planetary
    Computer's collections."""

    region: str = ""
    """Where, always to be given: a GeoJSON file, or west,south,east,north in degrees."""

    period: str = ""
    """When, always to be given: 2023, 2023-06, 2023-06-01 or two of these joined by a slash; the end is included. It is
    the optical look of a pair that lies in it; the radar's may lie pairing.max_dt_days before or after."""

    side_px: int = Field(default=264, ge=12, multiple_of=6)
    """Side of a chip, pixels of 10 m."""

    block_cells: int = Field(default=8, ge=1, le=16)
    """Side of the blocks of cells that are read together, cells."""

    shard_chips: int = Field(default=256, ge=1)
    """Chips in a shard: the unit of writing and of parallel work."""

    codec: Literal["lz4", "zstd", "none"] = "lz4"
    """Compression of the chips; none for a local NVMe cache."""

    pairing: Pairing = Pairing()
    """Which radar look goes with which optical one."""

    screening: Screening = Screening()
    """What the pixels of a chip must be like to be kept."""

    reading: Reading = Reading()
    """How pixels are read."""

    cpus_per_task: float = Field(default=1.0, gt=0)
    """CPUs that Ray sets aside for each task, which builds one shard and reads with several threads."""

    politeness: Politeness = Politeness()
    """What an archive's hosts are asked for at most, by the whole cluster together."""

    search_cache: str | None = None
    """Directory or URL where the catalog's answers are kept for the next run, and for other runs; unset: in run_dir."""

    seed: int = 0
    """Decides the order of units in the store and the splits."""

    max_failed_fraction: float = Field(default=0.01, ge=0, le=1)
    """The job fails if more than this fraction of the candidate chips could not be read."""

    @property
    def builds(self) -> bool:
        """Whether anything is asked of the archive."""
        return True

    @model_validator(mode="after")
    def _where_and_when(self) -> Self:
        missing = [name for name in ("region", "period") if self.builds and not getattr(self, name)]
        if missing:
            raise ValueError("\n".join(f"{name} is required and was not given" for name in missing))
        return self

    @model_validator(mode="after")
    def _blocks_fit_shards(self) -> Self:
        if self.block_cells**2 > self.shard_chips:
            chips = self.block_cells**2
            raise ValueError(f"block_cells={self.block_cells}: {chips} chips do not fit shard_chips={self.shard_chips}")
        return self


FILES: Final = (("sampling", "file"), ("sampling", "land"), ("exclude", "areas"))
"""Settings that name a file whose content decides the store's."""

_HOW: Final = {"max_failed_fraction", "politeness", "reading", "cpus_per_task", "search_cache"}
"""Settings that change nothing in what is built."""


def content_request(settings: RegionBuild, **more: Any) -> dict[str, Any]:
    """The settings that decide what is in a store; the rest may differ between runs that complete it.

    Args:
        settings: A job's, of which only those of `RegionBuild` count.
        more: What else decides the content, as JSON values; of `FILES` in it, what is in them counts.
    """
    names = RegionBuild.model_fields.keys() - JobSettings.model_fields.keys() - _HOW
    request = settings.model_dump(mode="json", include=names)
    # A local archive may be served at another port the next time; a file may be moved, or hold another region.
    request["archive"] = settings.archive if "://" not in settings.archive else "local"
    request["region"] = hashlib.sha256(shapely.normalize(parse_region(settings.region)).wkb).hexdigest()
    for group, name in FILES:
        if (path := more.get(group, {}).get(name)) is not None:
            more[group] = {**more[group], name: _file_hash(f"{group}.{name}", path)}
    return {**request, **more}


def _file_hash(setting: str, path: str) -> str:
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise ValueError(f"{setting}={path}: cannot be read ({error.strerror})") from error
