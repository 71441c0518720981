"""A model described as a STAC Item with the Machine Learning Model extension: what it takes, what it gives, its hashes.

Only a dict is made; whoever exports the weights writes it beside them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from datetime import datetime
from typing import Any, Final

import torch

from model.croma import Croma
from model.normalisation import BandScaling, Normalisation
from model.pretrained import model_hash

EXTENSIONS: Final = (
    "https://stac-extensions.github.io/mlm/v1.5.2/schema.json",
    "https://stac-extensions.github.io/file/v2.1.0/schema.json",
)
ARTIFACTS: Final = {".safetensors": "safetensors.torch.save_file", ".pt": "torch.save", ".pt2": "torch.export.save"}
"""Ending of the file -> what wrote it."""

_PREPROCESSING: Final = "clip to [0, 1] after scaling; no data becomes 0.5"


def model_item(
    croma: Croma,
    normalisation: Normalisation,
    *,
    name: str,
    href: str,
    num_bytes: int,
    sha256: str,
    created: datetime,
    trained_on: str,
    geometry: Mapping[str, Any] | None = None,
    bbox: tuple[float, float, float, float] | None = None,
) -> dict[str, Any]:
    """The STAC Item of a file of weights.

    Args:
        croma: The model in the file.
        normalisation: In the file, too.
        name: Of the model, letters, digits, points, dashes and blanks; also the Item's id.
        href: Of the file, relative to the Item or absolute.
        num_bytes: Size of the file.
        sha256: Of the file, in hexadecimal digits.
        created: When; with a time zone.
        trained_on: Name or URI of the dataset.
        geometry: Where it was trained, GeoJSON in degrees; None where that is unknown.
        bbox: Of the geometry: west, south, east, north in degrees.

    Raises:
        ValueError: When `href` ends in nothing that weights are saved as, or only one of geometry and bbox is given.
    """
    artifact = next((kind for ending, kind in ARTIFACTS.items() if href.endswith(ending)), None)
    if artifact is None:
        raise ValueError(f"{href} is no file of weights: it ends in none of {', '.join(ARTIFACTS)}")
    if (geometry is None) != (bbox is None):
        raise ValueError("geometry and bbox go together")
    config = dataclasses.asdict(croma.config)
    item: dict[str, Any] = {
        "type": "Feature",
        "stac_version": "1.1.0",
        "stac_extensions": list(EXTENSIONS),
        "id": name,
        "geometry": None if geometry is None else dict(geometry),
        "properties": {
            "datetime": created.isoformat(),
            "created": created.isoformat(),
            "description": "CROMA: radar and optical encoders of Sentinel-1 and Sentinel-2 images of one place.",
            "bands": [
                {"name": band, "unit": scaling.unit}
                for scaling in (normalisation.optical, normalisation.radar)
                for band in scaling.bands
            ],
            "mlm:name": name,
            "mlm:architecture": "CROMA",
            "mlm:tasks": ["similarity-search", "semantic-segmentation"],
            "mlm:framework": "PyTorch",
            "mlm:framework_version": torch.__version__.partition("+")[0],
            "mlm:total_parameters": sum(each.numel() for each in croma.parameters()),
            "mlm:memory_size": sum(each.numel() * each.element_size() for each in croma.parameters()),
            "mlm:pretrained": True,
            "mlm:pretrained_source": trained_on,
            "mlm:hyperparameters": {key: value for key, value in config.items() if not key.startswith("decoder")},
            "mlm:input": [
                _input("optical", normalisation.optical, config["patch_px"]),
                _input("radar", normalisation.radar, config["patch_px"]),
            ],
            "mlm:output": [
                each for sensor in ("radar", "optical", "joint") for each in _outputs(sensor, croma.config.width)
            ],
            "twinlook:normalisation_source": normalisation.source,
            "twinlook:model_sha256": model_hash(croma, normalisation),
        },
        "links": [],
        "assets": {
            "weights": {
                "href": href,
                "title": "Weights, sizes and normalisation",
                "type": "application/octet-stream",
                "roles": ["mlm:model", "mlm:weights", "data"],
                "mlm:artifact_type": artifact,
                "file:size": num_bytes,
                # A multihash: sha2-256, 32 bytes.
                "file:checksum": f"1220{sha256}",
            }
        },
    }
    return item if bbox is None else item | {"bbox": list(bbox)}


def _input(sensor: str, scaling: BandScaling, patch_px: int) -> dict[str, Any]:
    return {
        "name": sensor,
        "description": f"{scaling.unit}; height and width are multiples of {patch_px} px of 10 m; may be absent",
        "bands": list(scaling.bands),
        "input": {
            "shape": [-1, len(scaling.bands), -1, -1],
            "dim_order": ["batch", "bands", "height", "width"],
            "data_type": "float32",
        },
        # As `BandScaling.apply`: mean - 2 σ becomes 0, mean + 2 σ becomes 1.
        "value_scaling": [
            {"type": "min-max", "minimum": mean - 2 * std, "maximum": mean + 2 * std}
            for mean, std in zip(scaling.mean, scaling.std, strict=True)
        ],
        "resize_type": None,
        "pre_processing_function": {"format": "text", "expression": _PREPROCESSING},
    }


def _outputs(sensor: str, width: int) -> list[dict[str, Any]]:
    return [
        {
            "name": f"{sensor}_embedding",
            "description": "One vector per image",
            "tasks": ["similarity-search"],
            "result": {"shape": [-1, width], "dim_order": ["batch", "embedding"], "data_type": "float32"},
        },
        {
            "name": f"{sensor}_encodings",
            "description": "One vector per patch, row by row",
            "tasks": ["semantic-segmentation"],
            "result": {"shape": [-1, -1, width], "dim_order": ["batch", "token", "embedding"], "data_type": "float32"},
        },
    ]
