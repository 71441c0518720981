"""A model described as a STAC Item with the Machine Learning Model extension: what it takes, what it gives, its hashes.

Only a dict is made; whoever exports the weights writes it beside them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from datetime import datetime
from typing import Any, Final, NamedTuple

import torch

from model.croma import Croma, Objective
from model.normalisation import BandScaling, Normalisation
from model.pretrained import model_hash

EXTENSIONS: Final = (
    "https://stac-extensions.github.io/mlm/v1.5.2/schema.json",
    "https://stac-extensions.github.io/file/v2.1.0/schema.json",
)


class FileKind(NamedTuple):
    """What a file is, in the extension's words and in ours."""

    artifact_type: str
    media_type: str
    title: str


_PYTORCH: Final = "application/octet-stream; application=pytorch"
LAYOUTS: Final = {
    "safetensors": FileKind(
        "safetensors.torch.save_file",
        "application/octet-stream; application=safetensors",
        "Weights, sizes and normalisation",
    ),
    "official": FileKind("torch.save", _PYTORCH, "Weights as released checkpoints hold them, in five state dicts"),
    "torchgeo": FileKind("torch.save", _PYTORCH, "Weights as torchgeo's CROMA loads them"),
    "torch-export": FileKind("torch.export.save", _PYTORCH, "The encoders as a program, which needs torch alone"),
}
"""How a model can be handed on. Only the first holds the normalisation: of the others, the Item alone has it."""

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
    layout: str = "safetensors",
    objective: Objective | None = None,
    ema_decay: float | None = None,
    geometry: Mapping[str, Any] | None = None,
    bbox: tuple[float, float, float, float] | None = None,
) -> dict[str, Any]:
    """The STAC Item of a file of weights.

    Args:
        croma: The model in the file.
        normalisation: What its inputs are scaled by.
        name: Of the model, letters, digits, points, dashes and blanks; also the Item's id.
        href: Of the file, relative to the Item or absolute.
        num_bytes: Size of the file.
        sha256: Of the file, in hexadecimal digits.
        created: When; with a time zone.
        trained_on: Name or URI of the dataset.
        layout: Of the file, one of LAYOUTS.
        objective: What it was trained for, if that is known: what that leaves untrained is said so.
        ema_decay: Of the average that the weights are, see `model.averaging`; None where they are no average.
        geometry: Where it was trained, GeoJSON in degrees; None where that is unknown.
        bbox: Of the geometry: west, south, east, north in degrees.

    Raises:
        ValueError: When there is no such layout, or only one of geometry and bbox is given.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    kind, untrained = LAYOUTS[layout], untrained_outputs(objective)
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
                each
                for sensor in ("radar", "optical", "joint")
                for each in _outputs(sensor, croma.config.width, untrained)
            ],
            "twinlook:layout": layout,
            "twinlook:optical_level": normalisation.level,
            "twinlook:untrained_outputs": untrained,
            "twinlook:ema_decay": ema_decay,
            "twinlook:normalisation_source": normalisation.source,
            "twinlook:model_sha256": model_hash(croma, normalisation),
        },
        "links": [],
        "assets": {
            "weights": {
                "href": href,
                "title": kind.title,
                "type": kind.media_type,
                "roles": ["mlm:model", "mlm:weights", "data"],
                "mlm:artifact_type": kind.artifact_type,
                "file:size": num_bytes,
                # A multihash: sha2-256, 32 bytes.
                "file:checksum": f"1220{sha256}",
            }
        },
    }
    return item if bbox is None else item | {"bbox": list(bbox)}


def untrained_outputs(objective: Objective | None) -> list[str]:
    """Outputs of `Croma.forward` that pass through weights which this objective left as they were drawn."""
    if objective is None:
        return []
    heads = [] if objective.contrastive_weight else ["radar_embedding", "optical_embedding"]
    return heads + ([] if objective.reconstruction_weight else ["joint_encodings", "joint_embedding"])


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


def _outputs(sensor: str, width: int, untrained: Collection[str]) -> list[dict[str, Any]]:
    embedding, encodings = f"{sensor}_embedding", f"{sensor}_encodings"
    hint = {name: ", of weights that were not trained" if name in untrained else "" for name in (embedding, encodings)}
    return [
        {
            "name": embedding,
            "description": f"One vector per image{hint[embedding]}",
            "tasks": ["similarity-search"],
            "result": {"shape": [-1, width], "dim_order": ["batch", "embedding"], "data_type": "float32"},
        },
        {
            "name": encodings,
            "description": f"One vector per patch, row by row{hint[encodings]}",
            "tasks": ["semantic-segmentation"],
            "result": {"shape": [-1, -1, width], "dim_order": ["batch", "token", "embedding"], "data_type": "float32"},
        },
    ]
