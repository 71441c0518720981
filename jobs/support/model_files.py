"""What a trained model is handed on as: weights as safetensors, and a STAC Item that describes them."""

from __future__ import annotations

import hashlib
import io
from datetime import UTC, datetime
from typing import Final

from model import pretrained
from model.croma import Croma, CromaPretraining
from model.normalisation import Normalisation
from model.stac import model_item
from pipeline.objects import Objects

WEIGHTS_FILE: Final = "model.safetensors"
ITEM_FILE: Final = "model.stac.json"


def write_model(
    out: Objects, model: Croma | CromaPretraining, normalisation: Normalisation, *, name: str, trained_on: str
) -> str:
    """Write the encoders and, of a pretraining model, what pretraining goes on with; the Item last of all.

    Args:
        out: Folder.
        model: Unwrapped.
        normalisation: Means and σ the model was trained with.
        name: Of the model: letters, digits, points, dashes and blanks.
        trained_on: Name or URI of the dataset.

    Returns:
        The model's hash, see `model.pretrained.model_hash`.
    """
    buffer = io.BytesIO()
    pretrained.save_weights(pretrained.to_checkpoint(model, normalisation), buffer)
    content = buffer.getvalue()
    croma = model if isinstance(model, Croma) else model.croma
    item = model_item(
        croma,
        normalisation,
        name=name,
        href=f"./{WEIGHTS_FILE}",
        num_bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        created=datetime.now(UTC),
        trained_on=trained_on,
    )
    out.put(WEIGHTS_FILE, content)
    out.put_json(ITEM_FILE, item)
    return pretrained.model_hash(croma, normalisation)
