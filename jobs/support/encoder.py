"""A model on Ray Data: images in, encodings and embeddings out; one load per actor."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from pydantic import Field
from ray.data import ActorPoolStrategy, Dataset

from jobs.support.job import JobError
from jobs.support.settings import Group
from model import pretrained
from model.croma import Croma, Objective
from model.normalisation import Normalisation
from model.preprocessing import prepare
from model.released import from_any
from pipeline.layout import MODEL_ARRAYS, Layout
from pipeline.objects import Objects
from pipeline.whole_chips import WholeChipSource

KINDS: Final = ("optical", "radar", "joint")
"""Of embeddings, in the order of tables and columns."""

_RADAR_UNITS: Final = {"gamma0_rtc": "gamma0 dB", "sigma0_grd": "sigma0 dB"}

# Shares of a CPU for encoding and reading side by side: both fit on one CPU, so neither can wait for the other.
_ACTOR_CPUS: Final = 0.75
_READ_CPUS: Final = 0.25


class Inference(Group):
    """How a model is run over a store."""

    batch_size: int = Field(default=64, ge=1)
    """Images encoded at a time."""

    num_actors: int | None = Field(default=None, ge=1)
    """Processes that hold the model; unset: one per GPU, or one per CPU where there are no GPUs."""

    use_gpu: bool | None = None
    """Whether each of them takes a GPU; unset: if the cluster has any."""

    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of matrix products; auto is bfloat16 on GPUs and float32 on CPUs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """Where an actor finds a model; plain values, because each loads it for itself, also when it is started anew."""

    url: str
    sha256: str
    """What the file must hold: it could be replaced while the job runs."""

    untrained_seed: int | None = None
    """If given, the file's weights are drawn anew from this seed."""

    def open(self) -> LoadedModel:
        """Load the model; raises JobError as `load_model` does, or where it is another one by now."""
        model = load_model(self.url)
        if model.sha256 != self.sha256:
            raise JobError(f"{self.url} changed while it was used: {self.sha256[:12]} became {model.sha256[:12]}")
        return model if self.untrained_seed is None else untrained_like(model, seed=self.untrained_seed)


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """What a checkpoint holds."""

    croma: Croma
    """In evaluation mode, on the CPU."""

    normalisation: Normalisation
    sha256: str
    """Of weights and normalisation, see `model.pretrained.model_hash`."""

    objective: Objective | None = None
    """What it was pretrained for, if the file says so."""


def load_model(url: str) -> LoadedModel:
    """The model of a file that `pretrain` wrote, of the official weights, or of torchgeo's.

    Raises:
        JobError: There is no such file, or it is none of those.
    """
    read = read_file(url, missing=f"no model at {url}: give the model.safetensors that pretrain wrote")
    with refused(url):
        croma, normalisation = from_any(read)
    objective = pretrained.objective_of(read) if "objective" in read else None
    digest = pretrained.model_hash(croma, normalisation)
    return LoadedModel(croma=croma, normalisation=normalisation, sha256=digest, objective=objective)


def read_file(url: str, *, missing: str) -> Any:
    """What a file of weights holds, whoever wrote it.

    Raises:
        JobError: There is no such file, which `missing` says, or it is none of weights.
    """
    folder, _, name = url.rpartition("/")
    try:
        content = Objects.at(folder or ("/" if url.startswith("/") else ".")).get(name)
    except FileNotFoundError:
        raise JobError(missing) from None
    with refused(url):
        return pretrained.read(io.BytesIO(content))


@contextmanager
def refused(url: str) -> Iterator[None]:
    """Name the file that is not what it should be.

    Raises:
        JobError: In place of a ValueError.
    """
    try:
        yield
    except ValueError as error:
        raise JobError(f"{url}: {error}") from error


def untrained_like(model: LoadedModel, *, seed: int) -> LoadedModel:
    """The architecture and normalisation of a model, with fresh weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        croma = Croma(model.croma.config).eval()
    return LoadedModel(
        croma=croma, normalisation=model.normalisation, sha256=pretrained.model_hash(croma, model.normalisation)
    )


def check_units(layout: Layout, normalisation: Normalisation) -> None:
    """Refuse a store whose numbers mean something else than the model was trained on; raises ValueError."""
    # What a store lacks cannot be in wrong units.
    normalisation.check(radar_unit=radar_unit(layout) or normalisation.radar.unit, level=layout.optical_level)


def radar_unit(layout: Layout) -> str | None:
    """What a store's radar numbers mean, in the model's words; None where it has no radar."""
    return _RADAR_UNITS[layout.radar_product] if layout.radar_product else None


def encode(
    croma: Croma, normalisation: Normalisation, images: Mapping[str, NDArray[Any]], *, bfloat16: bool = False
) -> dict[str, NDArray[np.float32]]:
    """Run a model over images of the store, on the device that it is on.

    Args:
        croma: In evaluation mode.
        normalisation: Of its checkpoint.
        images: Store array name -> (B, band, y, x); other names are left aside.
        bfloat16: Use bfloat16 in matrix products.

    Returns:
        What `Croma.forward` returns, as float32.
    """
    device = next(croma.parameters()).device
    # Copied: what Ray hands out may not be written to, which torch cannot promise.
    batch = {name: torch.tensor(images[name], device=device) for name in MODEL_ARRAYS if name in images}
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
        outputs = croma(*prepare(batch, normalisation))
    return {name: values.float().cpu().numpy() for name, values in outputs.items()}


class Encoder:
    """What each actor runs: some models, loaded once, over batch after batch."""

    def __init__(
        self, sources: Mapping[str, ModelSource], outputs: Sequence[str], *, gpu: bool, bfloat16: bool
    ) -> None:
        self.models = {name: source.open() for name, source in sources.items()}
        for model in self.models.values():
            model.croma.to("cuda" if gpu else "cpu")
        self.outputs = outputs
        self.bfloat16 = bfloat16

    def __call__(self, batch: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Replace the images of a batch by their `model/output`; other columns stay."""
        columns = {name: values for name, values in batch.items() if name not in MODEL_ARRAYS}
        for name, model in self.models.items():
            encoded = encode(model.croma, model.normalisation, batch, bfloat16=self.bfloat16)
            columns |= {f"{name}/{output}": encoded[output] for output in self.outputs}
        return columns


def chips_of(store: str, rows: NDArray[np.int64], *, arrays: Sequence[str], batch_size: int) -> Dataset:
    """Whole chips of some rows (ascending), in blocks of about a batch, so that all actors get some."""
    source = WholeChipSource(store, rows, arrays=arrays, batch_size=batch_size)
    num_tasks = len(source.get_read_tasks(1))
    cpus = 1.0 if ray.cluster_resources().get("GPU", 0) else _READ_CPUS
    dataset: Dataset = ray.data.read_datasource(source, override_num_blocks=num_tasks, num_cpus=cpus)
    dataset.context.target_max_block_size = max(1, int(0.9 * batch_size * source.chip_bytes))
    return dataset


def encoded(
    images: Dataset,
    sources: Mapping[str, ModelSource],
    inference: Inference,
    *,
    outputs: Sequence[str],
    num_images: int,
) -> Iterator[dict[str, NDArray[Any]]]:
    """Run models over a dataset of images, in a pool of actors.

    Batches come back in the order of the images, so that what is summed over them is the same in every run.

    Args:
        images: Blocks with the model's arrays and any other columns.
        sources: Name -> where its model is; all nodes must reach it, as they do the store.
        inference: How.
        outputs: Which of the models' outputs are wanted.
        num_images: In the dataset; there are never more actors than batches.
    """
    gpu, num_actors = _devices(inference)
    pool = min(num_actors, -(-num_images // inference.batch_size))
    dataset = images.map_batches(
        Encoder,
        fn_constructor_args=[dict(sources), list(outputs)],
        fn_constructor_kwargs={
            "gpu": gpu,
            "bfloat16": inference.precision == "bfloat16" or (inference.precision == "auto" and gpu),
        },
        batch_size=inference.batch_size,
        batch_format="numpy",
        # At least one and at once all: a pool of fixed size warns where there are fewer blocks.
        compute=ActorPoolStrategy(min_size=1, max_size=pool, initial_size=pool),
        **({"num_gpus": 1} if gpu else {"num_cpus": _ACTOR_CPUS}),
    )
    dataset.context.execution_options.preserve_order = True
    yield from dataset.iter_batches(batch_size=None, batch_format="numpy")


def _devices(inference: Inference) -> tuple[bool, int]:
    """Whether on GPUs, and how many actors."""
    resources = ray.cluster_resources()
    gpu = inference.use_gpu if inference.use_gpu is not None else resources.get("GPU", 0) >= 1
    there = int(resources.get("GPU" if gpu else "CPU", 0))
    if gpu and not there:
        raise JobError("inference.use_gpu=true, but the cluster has no GPU")
    return gpu, inference.num_actors or max(1, there)
