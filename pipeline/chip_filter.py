"""Which written chips of a store are fed: conditions on the chip table and the manifest; no pixel is read or copied."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import shapely
from numpy.typing import NDArray

from pipeline.chip_places import centres, footprints, georeferences, place_columns
from pipeline.chip_table import WRITTEN
from pipeline.layout import Layout
from pipeline.store import Store, StoreError
from pipeline.versions import Version

_DAY_S: Final = 86_400


@dataclass(frozen=True, slots=True, kw_only=True)
class ChipFilter:
    """Conditions that a chip must meet to be fed; without any, all of a split are."""

    max_dt_days: float | None = None
    """Largest time between the two acquisitions, days."""

    max_cloud_fraction: float | None = None
    """Largest fraction of cloud, as screening recorded it."""

    orbit: str = "any"
    """Direction of the radar's orbit: any, ascending or descending."""

    region: bytes | None = None
    """WKB in longitude/latitude; the middle of a chip must lie in it."""

    def facts(self) -> dict[str, Any]:
        """What decides which chips are fed, as JSON values; a region by its hash."""
        region = None if self.region is None else region_hash(self.region)
        names = ("max_dt_days", "max_cloud_fraction", "orbit")
        return {**{name: getattr(self, name) for name in names}, "region": region}

    def _of_manifest(self, layout: Layout) -> Mapping[str, tuple[str, ...]]:
        """Conditions that the manifest decides, by what a user calls them, with the columns that they need."""
        conditions: dict[str, tuple[str, ...]] = {}
        if self.max_dt_days is not None:
            conditions[f"max_dt_days={self.max_dt_days:g}"] = ("dt_s",)
        if self.orbit != "any":
            conditions[f"orbit={self.orbit}"] = ("orbit_state",)
        if self.region is not None:
            conditions["region"] = place_columns(layout)
        return conditions

    def _met(self, manifest: pa.Table, layout: Layout) -> Iterator[NDArray[np.bool_]]:
        """Whether rows meet each condition of `_of_manifest`; what is not recorded does not."""
        if self.max_dt_days is not None:
            within = pc.less_equal(pc.abs(manifest["dt_s"]), self.max_dt_days * _DAY_S)
            yield pc.fill_null(within, fill_value=False).to_numpy()
        if self.orbit != "any":
            yield pc.fill_null(pc.equal(manifest["orbit_state"], self.orbit), fill_value=False).to_numpy()
        if self.region is not None:
            crs, transform = georeferences(manifest, layout)
            lon, lat = centres(footprints(crs, transform, side_px=layout.side_px)).T
            area = shapely.from_wkb(self.region)
            shapely.prepare(area)
            yield shapely.contains_xy(area, lon, lat)


EVERY_CHIP: Final = ChipFilter()
"""No condition."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """What a filter has left of a version."""

    name: str
    """Of the version."""

    rows: NDArray[np.int64]
    """(chip,) ascending."""

    left: Mapping[str, int]
    """Chips after each condition, the first one being that a chip was written."""

    def __str__(self) -> str:
        return f"{self.name}: " + ", ".join(f"{condition}: {number}" for condition, number in self.left.items())

    def or_refuse(self) -> Chosen:
        """Itself, if there are any chips.

        Raises:
            StoreError: There are none; says how many each condition has left.
        """
        if not self.rows.size:
            split = next((name.removeprefix("split=") for name in self.left if name.startswith("split=")), None)
            none = f"{self.name} holds no chips" + (f" of split {split}" if split else "")
            found = ", ".join(f"{condition}: {number}" for condition, number in self.left.items())
            raise StoreError(f"{none} that are to be fed; left after each condition: {found}")
        return self


def region_hash(wkb: bytes) -> str:
    """Equal for equal areas."""
    return hashlib.sha256(shapely.normalize(shapely.from_wkb(wkb)).wkb).hexdigest()


def choose(version: Version, only: ChipFilter, *, split: str | None) -> Chosen:
    """The written chips of a version, and of those before it, that meet every condition.

    Args:
        version: Whose readers' chips are looked at.
        only: The conditions.
        split: train, val, test or buffer; None: whatever the split.
    """
    columns = ["row", "status"]
    columns += [] if split is None else ["split"]
    columns += [] if only.max_cloud_fraction is None else ["cloud_fraction"]
    rows, left = np.empty(0, np.int64), {"written": 0}
    parts = [rows]
    for batch in version.all_chip_batches(columns=columns):
        batch = batch.filter(pc.equal(batch["status"], WRITTEN))
        left["written"] += batch.num_rows
        if split is not None:
            batch = batch.filter(pc.equal(batch["split"], split))
            _count(left, f"split={split}", batch.num_rows)
        if only.max_cloud_fraction is not None:
            # What was not looked at is NaN, which is not below anything.
            batch = batch.filter(
                pc.less_equal(batch["cloud_fraction"], pa.scalar(only.max_cloud_fraction, pa.float32()))
            )
            _count(left, f"max_cloud_fraction={only.max_cloud_fraction:g}", batch.num_rows)
        parts.append(batch["row"].to_numpy())
    rows = np.sort(np.concatenate(parts))
    layout = Store.open(version.url).layout
    if conditions := only._of_manifest(layout):
        planned, met = _manifest_says(version, only, layout, conditions)
        met = met[:, np.searchsorted(planned, rows)]
        for number, condition in enumerate(conditions):
            kept = met[: number + 1].all(axis=0)
            left[condition] = int(kept.sum())
        rows = rows[met.all(axis=0)]
    return Chosen(name=version.name, rows=rows, left=left)


def _manifest_says(
    version: Version, only: ChipFilter, layout: Layout, conditions: Mapping[str, tuple[str, ...]]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """(row,) of all candidates, ascending, and (condition, row) whether each meets it."""
    columns = ["row", *(name for names in conditions.values() for name in names)]
    rows: list[NDArray[np.int64]] = []
    met: list[NDArray[np.bool_]] = []
    for each in version.versions():
        for batch in each.manifest_batches(columns=columns):
            rows.append(batch["row"].to_numpy())
            met.append(np.stack(list(only._met(batch, layout))))
    return np.concatenate(rows), np.concatenate(met, axis=1)


def _count(left: dict[str, int], condition: str, number: int) -> None:
    left[condition] = left.get(condition, 0) + number
