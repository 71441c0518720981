"""What a trained model is handed on as: a file of weights, or a program, and a STAC Item that describes it."""

from __future__ import annotations

import hashlib
import io
from datetime import UTC, datetime
from typing import Final

import torch

from model import pretrained
from model.croma import Croma, CromaPretraining, Objective
from model.exported import export_encoders
from model.normalisation import Normalisation
from model.released import to_released, to_torchgeo
from model.stac import model_item
from pipeline.objects import Objects

FILES: Final = {
    "safetensors": "model.safetensors",
    "official": "official.pt",
    "torchgeo": "torchgeo.pt",
    "torch-export": "encoders.pt2",
}
"""Layout -> file, see `model.stac.LAYOUTS`."""

ITEMS: Final = {layout: f"{name.partition('.')[0]}.stac.json" for layout, name in FILES.items()}
"""Layout -> the Item beside it."""

WEIGHTS_FILE: Final = FILES["safetensors"]
ITEM_FILE: Final = ITEMS["safetensors"]


def write_model(
    out: Objects,
    model: Croma | CromaPretraining,
    normalisation: Normalisation,
    *,
    name: str,
    trained_on: str,
    layout: str = "safetensors",
    objective: Objective | None = None,
    image_px: int | None = None,
    ema_decay: float | None = None,
) -> str:
    """Write a model in one layout; the Item last of all.

    Args:
        out: Folder.
        model: Unwrapped. Of a pretraining model, safetensors hold all, the other layouts the encoders.
        normalisation: Means and σ the model was trained with.
        name: Of the model: letters, digits, points, dashes and blanks.
        trained_on: Name or URI of the dataset.
        layout: One of FILES.
        objective: What a Croma was pretrained for, if that is known.
        image_px: Side of torchgeo's images, see `model.released.to_torchgeo`.
        ema_decay: Of the average that the weights are, see `model.averaging`; None where they are the last step's.

    Returns:
        The model's hash, see `model.pretrained.model_hash`.
    """
    croma, objective = (model, objective) if isinstance(model, Croma) else (model.croma, model.objective)
    buffer = io.BytesIO()
    if layout == "safetensors":
        pretrained.save_weights(pretrained.to_checkpoint(model, normalisation), buffer)
    elif layout == "official":
        torch.save(to_released(croma), buffer)
    elif layout == "torchgeo":
        torch.save(to_torchgeo(croma, image_px=image_px), buffer)
    elif layout == "torch-export":
        torch.export.save(export_encoders(croma), buffer)
    else:
        raise ValueError(f"layout must be one of {', '.join(FILES)}, got {layout!r}")
    content = buffer.getvalue()
    item = model_item(
        croma,
        normalisation,
        name=name,
        href=f"./{FILES[layout]}",
        num_bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        created=datetime.now(UTC),
        trained_on=trained_on,
        layout=layout,
        objective=objective,
        ema_decay=ema_decay,
    )
    out.put(FILES[layout], content)
    out.put_json(ITEMS[layout], item)
    return pretrained.model_hash(croma, normalisation)
