"""The datasets that can be imported, by the names that users give them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal

from pipeline.imports import bigearthnet, eurosat, sen1floods11, ssl4eo, ssl4eo_v11
from pipeline.imports.samples import Source

SourceName = Literal["ssl4eo-s12", "ssl4eo-s12-v1.1", "bigearthnet", "eurosat", "sen1floods11"]

SOURCES: Final[Mapping[str, Source]] = {
    "ssl4eo-s12": ssl4eo,
    "ssl4eo-s12-v1.1": ssl4eo_v11,
    "bigearthnet": bigearthnet,
    "eurosat": eurosat,
    "sen1floods11": sen1floods11,
}
