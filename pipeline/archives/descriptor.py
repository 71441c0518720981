"""What is said about an archive: where its catalog is and how it differs from the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from pipeline.bands import OPTICAL_BANDS, SCENE_CLASSIFICATION
from pipeline.limits import HostLimits

OffsetRule = Literal["baseline", "baseline_unless_flagged"]
Signing = Literal["none", "planetary-computer"]

API_LIMITS = HostLimits(rate_per_s=5.0, burst=10, turns=4)
STORAGE_LIMITS = HostLimits()


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

    api_limits: HostLimits = API_LIMITS
    """What the hosts of the catalog, and of tokens, are asked for at most, by everybody together."""

    storage_limits: HostLimits = STORAGE_LIMITS
    """What each host that holds files is asked for at most, by everybody together."""


SENTINEL_2_ESA_KEYS: Mapping[str, str] = MappingProxyType(
    {band: band for band in (*OPTICAL_BANDS, SCENE_CLASSIFICATION)}
)

SENTINEL_2_COMMON_NAMES: Mapping[str, str] = MappingProxyType(
    {
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
)

SENTINEL_1_KEYS: Mapping[str, str] = MappingProxyType({"VV": "vv", "VH": "vh"})
