"""A dataset's folder -> a sealed version of a chip store."""

from __future__ import annotations

import hashlib
import logging
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pyarrow.compute as pc
from pydantic import Field

from jobs.support.driver_lease import Held, is_gone, kept_alive, owner
from jobs.support.job import JobError, connect
from jobs.support.progress import watching
from jobs.support.region_settings import Splits
from jobs.support.run_record import RunRecord
from jobs.support.settings import JobSettings
from jobs.support.version_stages import complete, describe, summary
from pipeline.chip_table import WRITTEN
from pipeline.imports.chips import ImportUnit
from pipeline.imports.plan import manifest_parts, rejections_table, split_of_sample
from pipeline.imports.samples import Choices, Found
from pipeline.imports.sources import SOURCES, SourceName
from pipeline.layout import Layout
from pipeline.manifest import ITEMS_SCHEMA
from pipeline.objects import Objects
from pipeline.splits import SplitRules
from pipeline.store import Store
from pipeline.versions import Version, begin

log = logging.getLogger(__name__)

_SHOWN = 10
_ENCODED_SHARE = 0.7
"""Of plain pixels, with lz4 or zstd; none is 1."""


class ImportSettings(JobSettings):
    """What decides the chips of an import."""

    source: SourceName
    """Which dataset the folder holds."""

    folder: str
    """Of the dataset, unpacked; a path that every node sees."""

    store: str
    """Zarr group to create, or to complete if it exists: a path or s3://, az://, gs://."""

    sensors: Literal["both", "optical", "radar"] = "both"
    """Sensors to import; samples that lack one of them are not taken, and counted."""

    level: Literal["l2a", "l1c"] = "l2a"
    """Processing level of Sentinel-2; for ssl4eo-s12 and ssl4eo-s12-v1.1, which have both."""

    pairing: Literal["nearest", "index"] = "nearest"
    """For ssl4eo-s12: each optical look with the radar look nearest in time, or the n-th with the n-th."""

    max_dt_days: float = Field(default=30.0, gt=0)
    """For ssl4eo-s12: largest time between the two looks, days; the dataset's own limit is 30."""

    offset_dn: int | None = Field(default=None, ge=0)
    """For ssl4eo-s12-v1.1: what was added to reflectance x 10 000; unset: 1000, as its Zarr release has it."""

    split_lists: str | None = None
    """Folder of the dataset's official split lists; unset: looked for in its folder and in splits below it."""

    splits: Splits = Splits()
    """Train, val and test by blocks of ground, where the dataset has no split of its own; cells of 2640 m."""

    min_valid_fraction: float = Field(default=0.0, ge=0, le=1)
    """Chips with a smaller share of 10 m pixels with data in all bands are rejected."""

    shard_chips: int = Field(default=256, ge=1)
    """Chips in a shard: the unit of writing and of parallel work."""

    codec: Literal["lz4", "zstd", "none"] = "lz4"
    """Compression of the chips; none for a local NVMe cache."""

    seed: int = 0
    """Decides the order of chips in the store and the splits."""

    max_failed_fraction: float = Field(default=0.01, ge=0, le=1)
    """The job fails if more than this fraction of the chips could not be read."""

    @property
    def choices(self) -> Choices:
        """What to take of the dataset."""
        names = ("sensors", "level", "pairing", "max_dt_days", "offset_dn", "split_lists")
        return Choices(**{name: getattr(self, name) for name in names})

    @property
    def split_rules(self) -> SplitRules:
        """For chips whose dataset does not say their split."""
        return SplitRules(**self.splits.model_dump(), seed=self.seed)

    @property
    def request(self) -> dict[str, Any]:
        """What decides the content; folders may be moved, and the rest may differ between runs that complete it."""
        elsewhere = {*JobSettings.model_fields, "folder", "store", "split_lists", "max_failed_fraction"}
        lists = None if self.split_lists is None else _digest(Path(self.split_lists))
        return {**self.model_dump(mode="json", exclude=elsewhere), "split_lists": lists}

    @property
    def layout(self) -> Layout:
        """Of the store."""
        return replace(SOURCES[self.source].layout(self.choices), shard_chips=self.shard_chips, codec=self.codec)


def find_samples(settings: ImportSettings) -> Found:
    """What the folder holds; no pixel is read.

    Raises:
        JobError: The folder is not there, or nothing in it can be taken.
        ValueError: It holds another dataset.
    """
    folder = Path(settings.folder)
    if not folder.is_dir():
        raise JobError(f"folder={settings.folder} is no folder; give that of the unpacked dataset")
    found = SOURCES[settings.source].find(folder, settings.choices)
    reasons = dict(Counter(each.reason for each in found.not_taken))
    log.info("%d samples; not taken: %s", len(found.samples), reasons or "none")
    for each in found.not_taken[:_SHOWN]:
        log.info("not taken: %s: %s", each.name, " ".join(filter(None, [each.reason, each.detail])))
    if not found.samples:
        raise JobError(f"nothing in {settings.folder} can be imported: {reasons}; see sensors in --help")
    return found


def say_plan(settings: ImportSettings) -> None:
    """What an import would do, on the log."""
    found = find_samples(settings)
    splits = Counter(split_of_sample(sample, settings.split_rules) for sample in found.samples)
    layout = settings.layout
    pixels = sum(spec.dtype.itemsize * math.prod(spec.shape) for spec in layout.arrays().values())
    share = 1.0 if settings.codec == "none" else _ENCODED_SHARE
    log.info("would import %d chips of %d px: %s", len(found.samples), layout.side_px, dict(sorted(splits.items())))
    log.info("would store about %.2f GB in %s", len(found.samples) * pixels * share / 1e9, ", ".join(layout.arrays()))


def import_store(settings: ImportSettings, record: RunRecord) -> Version:
    """Plan what is not planned, import what is not imported, seal; a sealed version of the same request is left alone.

    Raises:
        JobError: Nothing to import, or too many chips failed; what was written is kept, a rerun redoes their shards.
        StoreError: The store holds another layout or another request, or somebody else is building it.
    """
    found = None
    if not Objects.at(settings.store).exists("zarr.json"):
        # A folder with nothing in it leaves nothing behind.
        with record.stage("find"):
            found = find_samples(settings)
    Store.create(settings.store, settings.layout)
    version = begin(settings.store, settings.request)
    if version.state == "sealed":
        log.info("%s version %d is complete already: nothing to do", settings.store, version.number)
        describe(version, record, again=False)
        record.results.update(reused=True, **_summary(version))
        return version
    with version.lease(owner(), is_gone=is_gone) as lease, kept_alive(lease) as held:
        if version.state == "planning":
            with record.stage("find"):
                found = found or find_samples(settings)
            with record.stage("plan"):
                _plan(version, found, settings, held)
        connect(settings)
        complete(version, _unit(settings), record, held=held, max_failed_fraction=settings.max_failed_fraction)
    record.results.update(reused=False, **_summary(version))
    return version


def _plan(version: Version, found: Found, settings: ImportSettings, held: Held) -> None:
    parts = manifest_parts(
        found.samples,
        first_row=version.first_shard() * settings.shard_chips,
        shard_chips=settings.shard_chips,
        rules=settings.split_rules,
    )
    watched = watching("plan")(parts, total=len(found.samples), what="samples", amount=lambda part: part.num_rows)
    rejections = rejections_table(found.not_taken)
    plan = version.write_plan(ITEMS_SCHEMA.empty_table(), rejections, watched, confirm=held.confirm)
    log.info("planned %d chips in %d shards", plan["num_chips"], len(version.shards()))


def _unit(settings: ImportSettings) -> ImportUnit:
    return ImportUnit(
        source=settings.source,
        folder=str(Path(settings.folder).absolute()),
        layout=settings.layout,
        min_valid_fraction=settings.min_valid_fraction,
    )


def _summary(version: Version) -> dict[str, Any]:
    """What became of the samples, and how many chips each split has."""
    splits: Counter[str] = Counter()
    for chips in version.chip_batches(columns=["row", "status", "split"]):
        splits.update(chips.filter(pc.equal(chips["status"], WRITTEN))["split"].to_pylist())
    return {**summary(version), "splits": dict(sorted(splits.items()))}


def _digest(folder: Path) -> str:
    """Of the lists in a folder; of none, where it is not there, which finding samples will say."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.glob("*") if path.suffix in (".csv", ".txt")):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode() + path.read_bytes())
    return digest.hexdigest()
