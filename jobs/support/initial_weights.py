"""Weights that a run begins with instead of random ones: a copy in its directory, so that nothing else is needed later.

A run that was begun goes on from its own checkpoints; before there is one, it begins again from the copy.
"""

from __future__ import annotations

import io
import logging
from dataclasses import fields
from typing import Any, Final

from jobs.support.encoder import check_units, read_file, refused
from jobs.support.job import JobError
from model import pretrained
from model.croma import Croma, CromaConfig, CromaPretraining
from model.normalisation import Normalisation
from model.released import from_any
from pipeline.layout import Layout
from pipeline.objects import Objects

log = logging.getLogger(__name__)

INITIAL_FILE: Final = "initial.safetensors"
"""In the directory of a run: what it began with, in our layout."""


def read_weights(url: str, *, config: CromaConfig, layout: Layout, own_scaling: bool) -> bytes:
    """The file of weights to begin with, brought to our layout if it is another's.

    Args:
        url: Of a file of ours, of the released weights, or of torchgeo's.
        config: Sizes of the model to be trained.
        layout: Of the store.
        own_scaling: Whether bands will be scaled by the statistics that come with the weights.

    Raises:
        JobError: There is no such file, it is none of those, or of a model of another size.
        ValueError: The store's units or level are not those that the statistics were taken in.
    """
    missing = f"no weights at {url}: give a model.safetensors, or a file of released weights"
    read = read_file(url, missing=missing)
    with refused(url):
        croma, normalisation = from_any(read, heads=config.heads)
        # Whatever the file has: encoders alone, or the decoder and the projections too.
        whole = isinstance(read, dict) and read.get("pretraining") is not None
        model = pretrained.restore_pretraining(read)[0] if whole else croma
    if differing := _differing(model, config):
        raise JobError(f"{url} is of a model of another size: {differing}; give its size")
    if own_scaling:
        check_units(layout, normalisation)
    else:
        log.info("bands will be scaled otherwise than for %s (%s): it has to adapt", url, normalisation.source)
    buffer = io.BytesIO()
    pretrained.save_weights(pretrained.to_checkpoint(model, normalisation), buffer)
    return buffer.getvalue()


def initial_normalisation(out: Objects) -> Normalisation:
    """What the weights that a run began with were trained with."""
    return Normalisation.from_dict(_read(out)["normalisation"])


def begin_with(model: CromaPretraining, out: Objects) -> list[str]:
    """Load a run's first weights.

    Args:
        model: With random weights; what the file lacks keeps them.
        out: Directory of the run.

    Returns:
        Parts that keep random weights: decoder, optical_projection, radar_projection, logit_scale, or none of them.
    """
    saved = _read(out)
    weights = {f"croma.{key}": tensor for key, tensor in saved["model"].items()} | (saved["pretraining"] or {})
    own = model.state_dict()
    fresh = {key: tensor for key, tensor in own.items() if key not in weights}
    pretrained.load_weights(model, {**weights, **fresh})
    return sorted({key.partition(".")[0] for key in fresh})


def _read(out: Objects) -> dict[str, Any]:
    return pretrained.load(io.BytesIO(out.get(INITIAL_FILE)))


def _differing(model: Croma | CromaPretraining, config: CromaConfig) -> str:
    """Sizes of a model that are not those wanted, in words; a decoder's only where there is one."""
    whole = isinstance(model, CromaPretraining)
    names = [field.name for field in fields(config) if whole or not field.name.startswith("decoder")]
    differing = [name for name in names if getattr(model.config, name) != getattr(config, name)]
    return ", ".join(f"{name} {getattr(model.config, name)} instead of {getattr(config, name)}" for name in differing)
