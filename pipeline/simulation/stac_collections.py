"""The collections of a simulated archive, shaped like the Planetary Computer's."""

from __future__ import annotations

from typing import Final

from pipeline.bands import OPTICAL_BANDS, RADAR_BANDS, SCENE_CLASSIFICATION
from pipeline.simulation.items import Json, label_asset, optical_asset, radar_asset

_PROVIDERS: Final = [{"name": "twinlook", "roles": ["producer", "host"]}]


def collections() -> list[Json]:
    """One per sensor and one of labels, with global extent like the real ones."""
    return [_optical(), _radar(), _labels()]


def _optical() -> Json:
    return {
        **_base("sentinel-2-l2a", "Sentinel-2 Level-2A", "2015-06-27T10:25:31Z", None),
        "description": "Simulated Sentinel-2 scenes in the form of the Level-2A product.",
        "keywords": ["Sentinel", "Copernicus", "Reflectance", "simulated"],
        "summaries": {
            "gsd": [10, 20, 60],
            "platform": ["Sentinel-2A", "Sentinel-2B"],
            "instruments": ["msi"],
            "constellation": ["sentinel-2"],
        },
        "item_assets": {band: optical_asset(band) for band in (*OPTICAL_BANDS, SCENE_CLASSIFICATION)},
    }


def _radar() -> Json:
    return {
        **_base("sentinel-1-rtc", "Sentinel 1 Radiometrically Terrain Corrected (RTC)", "2014-10-10T00:28:21Z", None),
        "description": "Simulated Sentinel-1 scenes: gamma naught as linear power, 10 m, terrain corrected.",
        "keywords": ["Sentinel", "Copernicus", "SAR", "RTC", "simulated"],
        "summaries": {
            "platform": ["SENTINEL-1A", "SENTINEL-1B"],
            "constellation": ["Sentinel-1"],
            "sar:instrument_mode": ["IW"],
            "sar:polarizations": [list(RADAR_BANDS)],
            "sat:orbit_state": ["ascending", "descending"],
        },
        "item_assets": {band.lower(): radar_asset(band) for band in RADAR_BANDS},
    }


def _labels() -> Json:
    return {
        **_base("esa-worldcover", "ESA WorldCover", "2021-01-01T00:00:00Z", "2021-12-31T23:59:59Z"),
        "description": "The simulated land cover itself, in the form of the ESA WorldCover map.",
        "keywords": ["Land cover", "simulated"],
        "summaries": {"esa_worldcover:product_version": ["2.0.0"]},
        "item_assets": {"map": label_asset()},
    }


def _base(collection_id: str, title: str, start: str, end: str | None) -> Json:
    return {
        "type": "Collection",
        "stac_version": "1.0.0",
        "stac_extensions": [],
        "id": collection_id,
        "title": title,
        "license": "Apache-2.0",
        "providers": _PROVIDERS,
        "extent": {"spatial": {"bbox": [[-180, -90, 180, 90]]}, "temporal": {"interval": [[start, end]]}},
        "links": [],
    }
