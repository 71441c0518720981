"""Items of many places and months, by the hundred, in the form of the Planetary Computer's, and a catalog of them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import shapely

from pipeline.bands import OPTICAL_BANDS, SCENE_CLASSIFICATION
from pipeline.simulation.archive import write_catalog

START = datetime(2023, 1, 1, tzinfo=UTC)
DAYS = 120
ORBIT = timedelta(days=10) / 143


def optical_item(
    name: str, when: datetime, west: float, south: float, *, size_deg: float = 1.0, tile: str = "", **properties: Any
) -> dict[str, Any]:
    """An item over a square."""
    square = shapely.box(west, south, west + size_deg, south + size_deg)
    assets = {band: f"https://files.example/{name}/{band}.tif" for band in (*OPTICAL_BANDS, SCENE_CLASSIFICATION)}
    return {
        "type": "Feature",
        "stac_version": "1.0.0",
        "stac_extensions": [],
        "id": name,
        "collection": "sentinel-2-l2a",
        "geometry": shapely.geometry.mapping(square),
        "bbox": list(square.bounds),
        "links": [],
        "properties": {
            "datetime": when.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            "platform": "Sentinel-2A",
            "proj:epsg": 32632,
            "sat:relative_orbit": 22,
            "sat:orbit_state": "descending",
            "s2:mgrs_tile": tile or name,
            "s2:processing_baseline": "04.00",
            "s2:datatake_id": f"GS2A_{when:%Y%m%dT%H%M%S}_{31_000 + (when - START) // ORBIT:06d}_N04.00",
            "s2:generation_time": (when + timedelta(days=1)).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            "eo:cloud_cover": 12.5,
            **properties,
        },
        "assets": {
            band: {
                **{"href": href, "type": "image/tiff; application=geotiff; profile=cloud-optimized", "roles": ["data"]},
                **{"gsd": 10, "proj:shape": [10980, 10980], "proj:bbox": [399960, 5190240, 509760, 5300040]},
                **{"proj:transform": [10, 0, 399960, 0, -10, 5300040], "title": f"Band {band} - 10m"},
                "eo:bands": [{"name": band, "description": f"Band {band}", "center_wavelength": 0.49}],
            }
            for band, href in assets.items()
        },
    }


def many_items(count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Items anywhere between 0 and 20 degrees east and 40 and 50 degrees north, within `DAYS` from `START` on."""
    random = np.random.default_rng(seed)
    items = []
    for index in range(count):
        when = START + timedelta(seconds=int(random.integers(0, DAYS * 86400)), microseconds=24000)
        west, south = random.uniform(0, 19), random.uniform(40, 49)
        items.append(optical_item(f"S2A_{index:04d}", when, round(west, 4), round(south, 4)))
    return items


def write_items(directory: Path, items: list[dict[str, Any]]) -> Path:
    """A catalog of the items that a server can be started on."""
    write_catalog(directory, items)
    return directory
