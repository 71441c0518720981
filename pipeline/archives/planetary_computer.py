"""Microsoft's Planetary Computer."""

from __future__ import annotations

from types import MappingProxyType

from pipeline.archives.descriptor import SENTINEL_1_KEYS, SENTINEL_2_ESA_KEYS, Archive
from pipeline.limits import HostLimits

PLANETARY_COMPUTER = Archive(
    name="planetary-computer",
    stac_url="https://planetarycomputer.microsoft.com/api/stac/v1",
    optical_collection="sentinel-2-l2a",
    radar_collection="sentinel-1-rtc",
    label_collections=MappingProxyType({"worldcover": "esa-worldcover"}),
    asset_keys=MappingProxyType({**SENTINEL_2_ESA_KEYS, **SENTINEL_1_KEYS}),
    signing="planetary-computer",
    account_variable="PC_SDK_SUBSCRIPTION_KEY",
    # The service names no numbers, and has shut out whoever searched so much that others felt it. Its catalog and its
    # tokens come from one host; its files lie on one host per sensor.
    api_limits=HostLimits(rate_per_s=5.0, burst=10, turns=4),
    storage_limits=HostLimits(rate_per_s=400.0, burst=400, turns=64),
)

ARCHIVES = (PLANETARY_COMPUTER,)
