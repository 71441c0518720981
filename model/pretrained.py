"""Weights with everything needed to use them: configuration, normalisation and, where training goes on, its state.

A checkpoint is a dict of plain values and tensors. There are two kinds of files, and neither can hold code: safetensors
for weights that go out; torch's own (read with ``weights_only=True``) where an optimizer's state goes too.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pickle
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, Final, TypeVar

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from model.croma import Croma, CromaConfig, CromaPretraining, Objective
from model.normalisation import Normalisation

FORMAT: Final = "twinlook-croma"
VERSION: Final = 1

_Model = TypeVar("_Model", Croma, CromaPretraining)

_PRETRAINING_PREFIX: Final = "croma."
_TENSOR_PARTS: Final = ("model", "pretraining")


def to_checkpoint(
    model: Croma | CromaPretraining, normalisation: Normalisation, *, training: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Collect what a file of weights holds; tensors are shared with the model, not copied.

    Args:
        model: Unwrapped. Of a CromaPretraining the encoders go under ``model``, the rest under ``pretraining``.
        normalisation: Means and σ the model was trained with.
        training: What a resumed run needs, plain values and tensors, such as the optimizer's state and samples seen.
    """
    checkpoint: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "config": dataclasses.asdict(model.config),
        "normalisation": normalisation.to_dict(),
        "training": dict(training or {}),
    }
    if isinstance(model, Croma):
        return checkpoint | {"model": model.state_dict(), "objective": None, "pretraining": None}
    rest = {key: value for key, value in model.state_dict().items() if not key.startswith(_PRETRAINING_PREFIX)}
    objective = dataclasses.asdict(model.objective)
    return checkpoint | {"model": model.croma.state_dict(), "objective": objective, "pretraining": rest}


def save(checkpoint: Mapping[str, Any], file: BinaryIO) -> None:
    """Write a checkpoint made by `to_checkpoint` in torch's format, with its training state."""
    torch.save(dict(checkpoint), file)


def save_weights(checkpoint: Mapping[str, Any], file: BinaryIO) -> None:
    """Write a checkpoint made by `to_checkpoint` as safetensors.

    Raises:
        ValueError: When it has a training state, which that format has no place for.
    """
    if checkpoint["training"]:
        raise ValueError(f"safetensors hold no training state: {', '.join(checkpoint['training'])}")
    tensors = {
        f"{part}.{key}": tensor.contiguous()
        for part in _TENSOR_PARTS
        for key, tensor in (checkpoint[part] or {}).items()
    }
    plain = {key: json.dumps(value) for key, value in checkpoint.items() if key not in (*_TENSOR_PARTS, "training")}
    file.write(safetensors.torch.save(tensors, metadata=plain))


def load(file: BinaryIO) -> dict[str, Any]:
    """Read a checkpoint of either kind onto the CPU.

    Raises:
        ValueError: When the file is none, or of another format or version.
    """
    return checked(read(file))


def read(file: BinaryIO) -> Any:
    """The tensors and plain values in a file of either kind, on the CPU; raises ValueError where it is none."""
    try:
        start = file.read(9)
        file.seek(0)
        # Safetensors begin with the length of a JSON object, then that object.
        if start[8:] == b"{":
            return _read_safetensors(file.read())
        return torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError, KeyError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"not a checkpoint of tensors and plain values: {reason}") from error


def checked(checkpoint: Any) -> dict[str, Any]:
    """What was read, if it is a checkpoint of ours; ValueError where it is of another format or version."""
    found = checkpoint.get("format") if isinstance(checkpoint, dict) else type(checkpoint).__name__
    if found != FORMAT:
        raise ValueError(f"not a {FORMAT} checkpoint: its format is {found!r}")
    if checkpoint.get("version") != VERSION:
        raise ValueError(f"checkpoint version {checkpoint.get('version')!r} is not {VERSION}, which this code reads")
    return dict(checkpoint)


def restore(checkpoint: Mapping[str, Any]) -> tuple[Croma, Normalisation]:
    """The encoders of a checkpoint, in evaluation mode, and their normalisation; ValueError where keys differ."""
    config = _config(checkpoint)
    croma = without_weights(lambda: Croma(config))
    load_weights(croma, checkpoint["model"])
    return croma.eval(), Normalisation.from_dict(checkpoint["normalisation"])


def restore_pretraining(checkpoint: Mapping[str, Any]) -> tuple[CromaPretraining, Normalisation]:
    """The whole pretraining model of a checkpoint; raises ValueError where there are only encoders or keys differ."""
    if checkpoint["pretraining"] is None:
        raise ValueError("this checkpoint holds the encoders alone: pretraining cannot go on from it")
    config, objective = _config(checkpoint), objective_of(checkpoint)
    model = without_weights(lambda: CromaPretraining(config, objective))
    encoders = {_PRETRAINING_PREFIX + key: value for key, value in checkpoint["model"].items()}
    load_weights(model, {**encoders, **checkpoint["pretraining"]})
    return model, Normalisation.from_dict(checkpoint["normalisation"])


def objective_of(checkpoint: Mapping[str, Any]) -> Objective | None:
    """What the model of a checkpoint was trained for; None where it holds the encoders alone."""
    return None if checkpoint["objective"] is None else Objective(**checkpoint["objective"])


def without_weights(build: Callable[[], _Model]) -> _Model:
    """A model whose weights are yet to be loaded: drawing large ones at random takes seconds."""
    with torch.device("meta"):
        model = build()
    return model.to_empty(device="cpu")


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy weights into a model.

    Raises:
        ValueError: Naming the first keys that are missing, not expected, or of another shape.
    """
    expected = model.state_dict()
    shapes = [
        f"{key} is {tuple(weights[key].shape)} instead of {tuple(expected[key].shape)}"
        for key in expected.keys() & weights.keys()
        if weights[key].shape != expected[key].shape
    ]
    problems = {
        "missing": expected.keys() - weights.keys(),
        "not expected": weights.keys() - expected.keys(),
        "of another shape": shapes,
    }
    if any(problems.values()):
        parts = [f"{len(keys)} {what}: {_first(keys)}" for what, keys in problems.items() if keys]
        raise ValueError(f"weights do not fit the model: {'; '.join(parts)}")
    model.load_state_dict(weights)


def model_hash(model: Croma | CromaPretraining, normalisation: Normalisation) -> str:
    """Sha-256 of what decides an embedding: encoder weights, their sizes, the normalisation; the same on any device.

    Not the level of the optical images: it decides which stores are refused, and no number.
    """
    croma = model if isinstance(model, Croma) else model.croma
    sizes = {key: value for key, value in dataclasses.asdict(croma.config).items() if not key.startswith("decoder")}
    scaling = {key: value for key, value in normalisation.to_dict().items() if key != "level"}
    digest = hashlib.sha256(json.dumps([sizes, scaling], sort_keys=True).encode())
    for name, tensor in sorted(croma.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        # As bytes: numpy knows no bfloat16, and a tensor without dimensions cannot be viewed as another type.
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read_safetensors(content: bytes) -> dict[str, Any]:
    tensors = safetensors.torch.load(content)
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    plain = {key: json.loads(value) for key, value in header.get("__metadata__", {}).items()}
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in _TENSOR_PARTS}
    for name, tensor in tensors.items():
        part, _, key = name.partition(".")
        parts.setdefault(part, {})[key] = tensor
    return {**plain, **parts, "pretraining": parts["pretraining"] or None, "training": {}}


def _config(checkpoint: Mapping[str, Any]) -> CromaConfig:
    try:
        return CromaConfig(**checkpoint["config"])
    except TypeError as error:
        raise ValueError(f"the checkpoint's configuration does not fit: {error}") from error


def _first(keys: Any) -> str:
    ordered = sorted(keys)
    return ", ".join(ordered[:3]) + (", …" if len(ordered) > 3 else "")
