"""What a run is fed: which stores in which shares, and which of their chips."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import shapely
from pydantic import Field

from jobs.support.job import JobError
from jobs.support.settings import Group
from pipeline.chip_filter import EVERY_CHIP, ChipFilter, Chosen, region_hash
from pipeline.fed_chips import Feed
from pipeline.mixture import Part, parts_by_weight
from pipeline.regions import parse_region
from pipeline.sources import Source, choose_all
from pipeline.versions import Version, latest_sealed

log = logging.getLogger(__name__)


class FedStore(Group):
    """One of several stores."""

    store: str
    """Chip store with both sensors: a path or s3://, az://, gs://."""

    version: int | None = Field(default=None, ge=1)
    """Sealed version of the store; unset: the newest."""

    weight: float | None = Field(default=None, gt=0)
    """Share of the samples, against the weights of the others; unset for all of them: every chip once an epoch."""


class ChipConditions(Group):
    """Which chips are fed; what is unset lets all through. Nothing is copied."""

    split: Literal["train", "val", "test", "buffer"] = "train"
    """Split that is trained on."""

    max_dt_days: float | None = Field(default=None, ge=0)
    """Largest time between the two acquisitions, days."""

    max_cloud_fraction: float | None = Field(default=None, ge=0, le=1)
    """Largest fraction of cloud and cloud shadow, as the build's screening recorded it."""

    orbit: Literal["any", "ascending", "descending"] = "any"
    """Direction of the radar's orbit."""

    region: str | None = None
    """GeoJSON file, or west,south,east,north in degrees: the middle of a chip must lie in it."""

    def of_chips(self) -> ChipFilter:
        """Without the split.

        Raises:
            ValueError: No region.
        """
        region = None if self.region is None else shapely.to_wkb(parse_region(self.region))
        return ChipFilter(
            max_dt_days=self.max_dt_days,
            max_cloud_fraction=self.max_cloud_fraction,
            orbit=self.orbit,
            region=region,
        )

    def request(self) -> dict[str, Any]:
        """What decides the chips, as JSON values: a file may be moved, or hold another region."""
        wkb = self.of_chips().region
        return {**self.model_dump(mode="json"), "region": None if wkb is None else region_hash(wkb)}


def sealed_sources(stores: Sequence[FedStore]) -> tuple[Source, ...]:
    """The versions that are meant.

    Raises:
        StoreError: A store is missing or has no sealed version.
        JobError: A version is not built to its end, a store is named twice, or some have weights and some have none.
    """
    versions = [Version(each.store, each.version) if each.version else latest_sealed(each.store) for each in stores]
    for number, version in enumerate(versions):
        if version.state != "sealed":
            raise JobError(f"{version.name} is {version.state}: build it to the end first")
        if version.url in [before.url for before in versions[:number]]:
            raise JobError(f"stores: {version.url} is named twice")
    without = [each.store for each in stores if each.weight is None]
    if 0 < len(without) < len(stores):
        raise JobError(f"stores: some have a weight, but not {', '.join(without)}")
    return tuple(Source(url=version.url, version=version.number) for version in versions)


def parts_of(stores: Sequence[FedStore], chosen: Sequence[Chosen], *, global_batch: int) -> tuple[Part, ...]:
    """What an epoch takes of each store, said on the log; nothing where there is one alone, of which it takes all."""
    for each in chosen:
        log.info("chips after each condition, of %s", each)
    if len(stores) == 1:
        return ()
    chips = [len(each.rows) for each in chosen]
    weights = [store.weight for store in stores if store.weight is not None]
    parts = parts_by_weight(chips, weights or chips)
    for each, part in zip(chosen, parts, strict=True):
        share = part.taken / sum(chips)
        log.info(
            "an epoch takes %d chips of %s, which has %d: %.1f %%", part.taken, each.name, part.num_chips, 100 * share
        )
        if share * global_batch > part.num_chips:
            log.warning(
                "a batch of %d has about %.0f chips of %s, more than the %d there are: a chip will meet itself, and is "
                "contrasted with itself",
                global_batch, share * global_batch, each.name, part.num_chips,
            )  # fmt: skip
    return parts


def fed_chips(feed: Feed) -> Iterator[pa.Table]:
    """The chip table of each store, of the chips that are fed."""
    for source, chosen in zip(feed.sources, choose_all(feed.sources, feed.only, split=feed.split), strict=True):
        chips = Version(source.url, source.version).all_chips()
        yield chips.filter(pc.is_in(chips["row"], value_set=pa.array(chosen.rows)))


def order_facts(feed: Feed) -> dict[str, Any]:
    """What decides the order of samples beside `Feed.order`: by which conditions chips are fed, if there are any."""
    if feed.only == EVERY_CHIP and feed.split == "train":
        return {}
    return {"filter": {"split": feed.split, **feed.only.facts()}}
