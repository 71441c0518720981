"""Element 84's Earth Search over the open data on AWS: one archive per Sentinel-2 collection."""

from __future__ import annotations

from dataclasses import replace

from pipeline.archives.descriptor import SENTINEL_2_COMMON_NAMES, Archive
from pipeline.limits import HostLimits

EARTH_SEARCH = Archive(
    name="earth-search",
    stac_url="https://earth-search.aws.element84.com/v1",
    optical_collection="sentinel-2-l2a",
    radar_collection=None,
    radar_refusal=(
        "its sentinel-1-grd is in slant geometry, with ground control points only, and its proj:* fields do not "
        "describe the files; use an archive with terrain-corrected Sentinel-1 (planetary-computer)"
    ),
    asset_keys=SENTINEL_2_COMMON_NAMES,
    # The published offset of -0.1 is no sign that anything is left to take off: most items have both it and the flag.
    offset_rule="baseline_unless_flagged",
    api_limits=HostLimits(rate_per_s=5.0, burst=10, turns=4),
    storage_limits=HostLimits(rate_per_s=400.0, burst=400, turns=64),
)

# Collection 1 publishes the same offset and has left it in the pixels.
EARTH_SEARCH_C1 = replace(
    EARTH_SEARCH,
    name="earth-search/sentinel-2-c1-l2a",
    optical_collection="sentinel-2-c1-l2a",
    offset_rule="baseline",
)

ARCHIVES = (EARTH_SEARCH, EARTH_SEARCH_C1)
