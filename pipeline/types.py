"""The nouns that cross module borders."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from shapely.geometry.base import BaseGeometry

Sensor = Literal["optical", "radar"]

ChipArrays = dict[str, NDArray[np.generic]]
"""Store array name -> pixels of one chip, as `(band, y, x)` (`scl` and labels as `(y, x)`)."""

Watch = Callable[..., Iterable[Any]]
"""Shows how far something is: called as ``watch(what comes, total=..., what=...)``, and with ``amount=`` where one that
comes stands for several; passes on what comes."""


def unwatched(coming: Iterable[Any], **_: Any) -> Iterable[Any]:
    """Pass on what comes, and show nothing."""
    return coming


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

    absolute_orbit: int | None = None
    """Orbit since launch in which the overpass began; None where the archive does not say."""

    datatake: str = ""
    """Start of the optical datatake, such as 20230602T101559: the same for all its tiles, however often they are
    processed; empty for radar, and where the archive does not say."""

    tile: str = ""
    """MGRS tile of an optical item, such as 33UUP."""

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
        """The overpass, as in ``sentinel-2a_20230602T101559_R022`` or ``sentinel-1a_O048795_R095``.

        Platform; the optical datatake, else the orbit since launch; relative orbit. All items of an overpass have these
        in common, so that its id is the same whichever of them are found. If an overpass has two (a pass that crosses
        the equator, a datatake that was cut), the earlier one of `items` counts. If the archive names none, the start
        of the earliest of `items` does: of those that a cell needs, which every search that holds the cell finds.
        """
        first = min(self.items, key=_naming)
        orbit = first.absolute_orbit
        when = first.datatake or (f"{first.datetime:%Y%m%dT%H%M%S}" if orbit is None else f"O{orbit:06d}")
        return f"{first.platform}_{when}_R{first.relative_orbit:03d}"

    @property
    def datetime(self) -> datetime:
        """Start of the earliest item, UTC."""
        return min(item.datetime for item in self.items)


def _naming(item: Item) -> tuple[bool, str, bool, int, datetime, str]:
    """The least of an acquisition's items names it."""
    orbit = item.absolute_orbit
    return not item.datatake, item.datatake, orbit is None, orbit or 0, item.datetime, item.id


class ChipError(Exception):
    """A chip could not be made; the message names the item and the band, and holds no signature.

    Args:
        message: What failed.
        transient: Whether it failed in a way that may pass (a busy server), rather than by what the file holds.
    """

    def __init__(self, message: str, *, transient: bool = False) -> None:
        super().__init__(message)
        self.transient = transient
