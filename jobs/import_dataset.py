"""Import an aligned dataset into a chip store: the one CROMA was pretrained on, or labelled patches.

Example:
    ray job submit --working-dir . -- python jobs/import_dataset.py \
        source=ssl4eo-s12 folder=/data/ssl4eo-s12 store=s3://bucket/ssl4eo.zarr
"""

from __future__ import annotations

import logging

from jobs.support.importing import ImportSettings, import_store, say_plan
from jobs.support.job import run_job
from jobs.support.run_record import recorded

log = logging.getLogger("import_dataset")


class ImportDataset(ImportSettings):
    """Import an aligned dataset (SSL4EO-S12, BigEarthNet, EuroSAT, Sen1Floods11) into a chip store."""


def main(settings: ImportDataset) -> None:
    """Find, plan, read, judge, write, seal."""
    if settings.dry_run:
        say_plan(settings)
        return
    with recorded(settings, job="import_dataset", output=settings.store) as record:
        record.inputs["dataset"] = {"source": settings.source, "folder": settings.folder}
        version = import_store(settings, record)
        record.outputs["store"] = {"url": settings.store, "version": version.number}
        for name, value in record.results.items():
            log.info("%s: %s", name.replace("_", " "), value)


if __name__ == "__main__":
    run_job(ImportDataset, main)
