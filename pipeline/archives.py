"""Archives as data: where a provider's catalog is and how it differs from the others.

Adding an archive is adding a value here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from pipeline.bands import OPTICAL_BANDS, SCENE_CLASSIFICATION

OffsetRule = Literal["baseline", "baseline_unless_flagged"]
Signing = Literal["none", "planetary-computer"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Archive:
    """A provider's catalog with its quirks."""

    name: str

    stac_url: str
    """Root of the STAC API."""

    optical_collection: str

    radar_collection: str | None
    """Terrain-corrected Sentinel-1 in linear gamma0; None where the archive has none that can be used."""

    radar_refusal: str = ""
    """Why the archive's Sentinel-1 is not used, where it is not."""

    label_collections: Mapping[str, str] = field(default_factory=dict)
    """Name of a label -> collection whose asset `map` holds its classes."""

    asset_keys: Mapping[str, str]
    """Band -> key of the asset in an item."""

    offset_rule: OffsetRule = "baseline"
    """How to know whether 1000 was added to an item's digital numbers. `baseline`: from processing baseline 04.00
    on, always. `baseline_unless_flagged`: the same, unless the item says that the archive took it off."""

    signing: Signing = "none"

    account_variable: str | None = None
    """Environment variable with the subscription key, where the radar collection needs an account."""


_SENTINEL_2_ESA_KEYS = {band: band for band in (*OPTICAL_BANDS, SCENE_CLASSIFICATION)}

_SENTINEL_2_COMMON_NAMES = {
    "B01": "coastal",
    "B02": "blue",
    "B03": "green",
    "B04": "red",
    "B05": "rededge1",
    "B06": "rededge2",
    "B07": "rededge3",
    "B08": "nir",
    "B8A": "nir08",
    "B09": "nir09",
    "B11": "swir16",
    "B12": "swir22",
    SCENE_CLASSIFICATION: "scl",
}

_SENTINEL_1_KEYS = {"VV": "vv", "VH": "vh"}

PLANETARY_COMPUTER = Archive(
    name="planetary-computer",
    stac_url="https://planetarycomputer.microsoft.com/api/stac/v1",
    optical_collection="sentinel-2-l2a",
    radar_collection="sentinel-1-rtc",
    label_collections=MappingProxyType({"worldcover": "esa-worldcover"}),
    asset_keys=MappingProxyType({**_SENTINEL_2_ESA_KEYS, **_SENTINEL_1_KEYS}),
    signing="planetary-computer",
    account_variable="PC_SDK_SUBSCRIPTION_KEY",
)

EARTH_SEARCH = Archive(
    name="earth-search",
    stac_url="https://earth-search.aws.element84.com/v1",
    optical_collection="sentinel-2-l2a",
    radar_collection=None,
    radar_refusal=(
        "its sentinel-1-grd is in slant geometry, with ground control points only, and its proj:* fields do not "
        "describe the files; use an archive with terrain-corrected Sentinel-1 (planetary-computer)"
    ),
    asset_keys=MappingProxyType(_SENTINEL_2_COMMON_NAMES),
    offset_rule="baseline_unless_flagged",
)


def archive_named(name: str) -> Archive:
    """The archive of a name, or any STAC API with Planetary Computer's collections and plain hrefs by its URL.

    Raises:
        ValueError: Neither a known name nor an http(s) URL.
    """
    known = {archive.name: archive for archive in (PLANETARY_COMPUTER, EARTH_SEARCH)}
    if name in known:
        return known[name]
    if name.startswith(("http://", "https://")):
        return Archive(
            name="local",
            stac_url=name.rstrip("/"),
            optical_collection=PLANETARY_COMPUTER.optical_collection,
            radar_collection=PLANETARY_COMPUTER.radar_collection,
            label_collections=PLANETARY_COMPUTER.label_collections,
            asset_keys=PLANETARY_COMPUTER.asset_keys,
        )
    raise ValueError(f"archive={name!r} is neither one of {', '.join(known)} nor the URL of a STAC API")
