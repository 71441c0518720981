"""Hand a model on: in our layout, the official one, torchgeo's, or as a program, with a STAC Item beside it.

Reads any of the layouts but the program, so that released weights become ours and ours theirs.

Example:
    python -m jobs.export_model model=s3://bucket/runs/base/model.safetensors layout=torchgeo out=s3://bucket/exported
"""

from __future__ import annotations

import logging
from typing import Literal

from pydantic import Field

from jobs.support.encoder import load_model
from jobs.support.job import JobError, run_job
from jobs.support.model_files import FILES, ITEMS, write_model
from jobs.support.run_record import recorded
from jobs.support.settings import JobSettings
from pipeline.objects import Objects

log = logging.getLogger("export_model")


class ExportModel(JobSettings):
    """Hand a model on: in our layout, the official one, torchgeo's, or as a program, with a STAC Item beside it."""

    model: str
    """The model.safetensors that pretrain wrote, or released CROMA weights (the official file or torchgeo's): a path or
    s3://, az://, gs://."""

    layout: Literal["safetensors", "official", "torchgeo", "torch-export"]
    """safetensors: ours, with sizes and normalisation; official: five state dicts; torchgeo: one, for its CROMA;
    torch-export: a program of the encoders for any batch and images of 16 to 2048 px, which needs torch alone."""

    out: str
    """Directory for the file and its Item."""

    image_px: int | None = Field(default=120, ge=8, multiple_of=8)
    """Side of the images that torchgeo's model is made for, pixels: from 0.8 on its bias lies with the weights. None
    leaves it out, for earlier versions."""

    name: str = "CROMA"
    """Of the model, in the Item: letters, digits, points, dashes and blanks."""

    trained_on: str | None = None
    """Name or URI of the dataset, in the Item; unset: what the normalisation was taken from."""


def main(settings: ExportModel) -> None:
    """Load, write, say where."""
    model, out, name = load_model(settings.model), Objects.at(settings.out), FILES[settings.layout]
    if settings.dry_run:
        size_mb = sum(each.numel() for each in model.croma.parameters()) * 4 / 1e6
        log.info("would write %s/%s (%.0f MB) and %s", settings.out, name, size_mb, ITEMS[settings.layout])
        return
    _refuse_another(out, ITEMS[settings.layout], model.sha256)
    with recorded(settings, job="export_model", output=settings.out) as record:
        record.inputs["model"] = {"url": settings.model, "sha256": model.sha256}
        write_model(
            out,
            model.croma,
            model.normalisation,
            name=settings.name,
            trained_on=settings.trained_on or model.normalisation.source,
            layout=settings.layout,
            objective=model.objective,
            image_px=settings.image_px,
        )
        record.outputs.update({each: f"{out.url}/{each}" for each in (name, ITEMS[settings.layout])})
        log.info("%s/%s (%s)", settings.out, name, model.sha256[:12])


def _refuse_another(out: Objects, item: str, sha256: str) -> None:
    """Leave another model's files alone."""
    if out.exists(item) and (there := out.get_json(item)["properties"]["twinlook:model_sha256"]) != sha256:
        raise JobError(f"{out.url}/{item} is of another model ({there[:12]}, not {sha256[:12]}); give another out")


if __name__ == "__main__":
    run_job(ExportModel, main)
