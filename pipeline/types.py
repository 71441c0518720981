"""The nouns that cross module borders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from shapely.geometry.base import BaseGeometry

Sensor = Literal["optical", "radar"]

ChipArrays = dict[str, NDArray[np.generic]]
"""Store array name -> pixels of one chip, as `(band, y, x)` (`scl` and labels as `(y, x)`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One item of an archive, with the archive's quirks already resolved."""

    id: str
    collection: str
    sensor: Sensor
    datetime: datetime
    """Start of sensing, UTC."""

    epsg: int
    footprint: BaseGeometry
    """Where the item has data, longitude/latitude."""

    assets: Mapping[str, str]
    """Band name -> unsigned href."""

    platform: str
    relative_orbit: int
    orbit_state: str
    """ascending or descending."""

    cloud_percent: float = 0.0
    """Of the whole optical item, 0-100; 0 for radar."""

    baseline: str = ""
    """Sentinel-2 processing baseline, such as 04.00; empty for radar."""

    offset_dn: int = 0
    """What was added to digital numbers (1000 from baseline 04.00 on where the archive left it in)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Acquisition:
    """The items of one sensor from one overpass; mosaicked before use."""

    sensor: Sensor
    items: tuple[Item, ...]

    @property
    def id(self) -> str:
        """Stable name: the first item's id."""
        return self.items[0].id

    @property
    def datetime(self) -> datetime:
        """Start of the earliest item, UTC."""
        return min(item.datetime for item in self.items)


class ChipError(Exception):
    """A chip could not be made; the message names the cell, the item and the band, and holds no signature."""
