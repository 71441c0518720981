"""Say what is in a store: all of it, one cell of it, or one chip.

Example:
    python -m jobs.describe store=s3://bucket/chips.zarr
    python -m jobs.describe store=s3://bucket/chips.zarr cell=33N_0108_2013
    python -m jobs.describe store=s3://bucket/chips.zarr cell=13.41,52.52
    python -m jobs.describe store=s3://bucket/chips.zarr row=1017 picture=chip.png
    python -m jobs.describe store=s3://bucket/chips.zarr report=report.html format=json
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from jobs.support.dataset_facts import dataset_facts
from jobs.support.dataset_report import write_dataset_report
from jobs.support.description import (
    cell_lines,
    describe_cell,
    describe_row,
    open_version,
    row_lines,
    row_picture,
    store_lines,
)
from jobs.support.job import run_job
from jobs.support.progress import watching
from jobs.support.settings import JobSettings
from pipeline.objects import Objects

log = logging.getLogger("describe")


class Describe(JobSettings):
    """Say what is in a store: all of it, one cell of it, or one chip."""

    store: str
    """Zarr group that build_dataset or import_dataset wrote: a path or s3://, az://, gs://."""

    version: int | None = Field(default=None, ge=1)
    """Number of the version; unset: the newest, with all before it."""

    cell: str | None = None
    """Cell to explain, as 33N_0108_2013, or longitude,latitude of a point in it."""

    row: int | None = Field(default=None, ge=0)
    """Row to explain."""

    picture: str | None = None
    """PNG to write the row's chip to."""

    report: str | None = None
    """Page about the whole store to write: a path or URL that ends in .html, or the folder for report.html."""

    chips: int = Field(default=12, ge=0, le=200)
    """Sample chips on the page."""

    seed: int = 0
    """Decides which chips are on the page."""

    format: Literal["text", "json"] = "text"
    """Lines for people, or one JSON object for programs."""

    @model_validator(mode="after")
    def _one_question(self) -> Self:
        if self.cell is not None and self.row is not None:
            raise ValueError("cell and row: ask for one of them at a time")
        if self.picture is not None and self.row is None:
            raise ValueError("picture needs a row: cell=... says which rows a cell has")
        return self


def main(settings: Describe) -> None:
    """Open the version, find what was asked for, say it."""
    version = open_version(settings.store, settings.version)
    if settings.dry_run:
        log.info("would read the plan and the ledger of %s", version.name)
        return
    if settings.report:
        folder, name = _folder_and_name(settings.report, "report.html", suffix=".html")
        chosen = {"gallery": settings.chips, "seed": settings.seed}
        log.info("wrote %s", write_dataset_report(version, folder, name=name, **chosen, watch=watching("report")))
    if settings.cell is not None:
        cell = describe_cell(version, settings.cell)
        _say(settings, cell, cell_lines(cell))
    elif settings.row is not None:
        row = describe_row(version, settings.row)
        if settings.picture:
            folder, name = _folder_and_name(settings.picture, "chip.png", suffix=".png")
            folder.put(name, row_picture(version, row))
            log.info("wrote %s/%s", folder.url, name)
        _say(settings, row, row_lines(row))
    elif not settings.report or settings.format == "json":
        facts = dataset_facts(version, watch=watching("describe"))
        _say(settings, facts.to_dict(), store_lines(facts))


def _say(settings: Describe, content: dict[str, Any], lines: Iterable[str]) -> None:
    text = json.dumps(content, indent=1, ensure_ascii=False) if settings.format == "json" else "\n".join(lines)
    sys.stdout.write(f"{text}\n")


def _folder_and_name(url: str, default: str, *, suffix: str) -> tuple[Objects, str]:
    """Where a file goes: as it is named, or under its usual name into a folder."""
    if not url.endswith(suffix):
        return Objects.at(url), default
    folder, _, name = url.rpartition("/")
    return Objects.at(folder or PurePosixPath().as_posix()), name


if __name__ == "__main__":
    run_job(Describe, main)
