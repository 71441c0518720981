"""The bands, their order and their native ground resolution: the one table that fixes them.

The order is CROMA's (SSL4EO-S12's without B10): twelve optical bands, then two radar bands.
"""

from __future__ import annotations

from typing import Final

OPTICAL_BANDS: Final = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12")
"""Sentinel-2 bands in the order the model takes them."""

RADAR_BANDS: Final = ("VV", "VH")
"""Sentinel-1 polarisations in the order the model takes them."""

SCENE_CLASSIFICATION: Final = "SCL"
"""Sentinel-2's per-pixel classes at 20 m, for masks; never a model input."""

NATIVE_GROUPS: Final[dict[str, tuple[str, ...]]] = {
    "b10": ("B02", "B03", "B04", "B08"),
    "b20": ("B05", "B06", "B07", "B8A", "B11", "B12"),
    "b60": ("B01", "B09"),
}
"""Store array -> optical bands in it, each on the sensor's own grid."""

RESOLUTION_M: Final[dict[str, int]] = {"b10": 10, "b20": 20, "b60": 60, "radar": 10, "scl": 20}
"""Store array -> pixel side in metres."""

OPTICAL_NODATA: Final = 0
"""uint16 reflectance x 10 000: no data; valid pixels are >= 1."""

RADAR_NODATA: Final = -32768
"""int16 centi-dB: no data."""

SCL_NODATA: Final = 0
