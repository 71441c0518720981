"""Any STAC API with Planetary Computer's collections and plain hrefs, by its URL."""

from __future__ import annotations

from pipeline.archives.descriptor import Archive
from pipeline.archives.planetary_computer import PLANETARY_COMPUTER
from pipeline.limits import HostLimits


def archive_at(url: str) -> Archive:
    """The archive of a STAC API's URL; nothing is signed, and its catalog is asked more than those of others."""
    return Archive(
        name="local",
        stac_url=url.rstrip("/"),
        optical_collection=PLANETARY_COMPUTER.optical_collection,
        radar_collection=PLANETARY_COMPUTER.radar_collection,
        label_collections=PLANETARY_COMPUTER.label_collections,
        asset_keys=PLANETARY_COMPUTER.asset_keys,
        api_limits=HostLimits(turns=8),
    )
