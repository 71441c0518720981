"""Label collections whose classes can be stored beside the chips."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

LABEL_MISSING: Final = 255
"""uint8: no label."""

WORLDCOVER_CLASSES: Final[Mapping[int, str]] = {
    10: "tree cover",
    20: "shrubland",
    30: "grassland",
    40: "cropland",
    50: "built-up",
    60: "bare or sparse vegetation",
    70: "snow and ice",
    80: "permanent water",
    90: "herbaceous wetland",
    95: "mangroves",
    100: "moss and lichen",
}
"""ESA WorldCover 10 m, product user manual v2.0, table 3."""

LABEL_CLASSES: Final[Mapping[str, Mapping[int, str]]] = {"worldcover": WORLDCOVER_CLASSES}
"""Label name -> code -> class."""
