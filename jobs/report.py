"""Write the page of a pretraining run again, from what lies in its directory; while it runs, or after it broke off.

Example:
    python -m jobs.report run=s3://bucket/runs/base
"""

from __future__ import annotations

import logging

from jobs.support.job import run_job
from jobs.support.settings import JobSettings
from jobs.support.training_report import write_training_report
from pipeline.objects import Objects

log = logging.getLogger("report")


class Report(JobSettings):
    """Write the page of a pretraining run again, from what lies in its directory."""

    run: str
    """Directory of the run, `out` of pretrain: a path or s3://, az://, gs://."""


def main(settings: Report) -> None:
    """Write report.html into the run's directory."""
    if settings.dry_run:
        log.info("would write %s/report.html", settings.run.rstrip("/"))
        return
    log.info("wrote %s", write_training_report(Objects.at(settings.run)))


if __name__ == "__main__":
    run_job(Report, main)
