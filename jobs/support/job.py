"""What starts and ends every job: settings, logging, the cluster, progress, exit codes."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import TypeVar

import ray

from jobs.support.progress import progress
from jobs.support.settings import JobSettings, parse
from pipeline.access import HostUnavailable, SigningRefused
from pipeline.catalog import SearchError
from pipeline.redaction import Redacting, redact

__all__ = ["JobError", "connect", "log_to_stderr", "progress", "run_job"]

log = logging.getLogger(__name__)

J = TypeVar("J", bound=JobSettings)


class JobError(Exception):
    """The job cannot go on; the message says what failed, with which item, and what to do."""


def run_job(settings_class: type[J], main: Callable[[J], None]) -> None:
    """Parse the command line, run, and exit: 0 done, 1 refused or failed with a message, 2 wrong settings."""
    log_to_stderr()
    settings = parse(settings_class)
    # A job that is asked to end unwinds: what it started is stopped, leases are given back, run.json says so.
    signal.signal(signal.SIGTERM, _ended)
    try:
        main(settings)
    except (JobError, SearchError, HostUnavailable, SigningRefused, ValueError, OSError) as error:
        log.debug("failed", exc_info=True)
        sys.stderr.write(f"error: {redact(str(error))}\n")
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; run the same command again to go on\n")
        raise SystemExit(130) from None


def _ended(number: int, _: FrameType | None) -> None:
    sys.stderr.write("ended by a signal; run the same command again to go on\n")
    raise SystemExit(128 + number)


def log_to_stderr() -> None:
    """One line per message; for drivers, and for actors that speak for them."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)-7s %(message)s", datefmt="%H:%M:%S")
    for handler in logging.getLogger().handlers:
        handler.addFilter(Redacting())
    # It times its own steps, one search piece after another.
    logging.getLogger("stac_geoparquet").setLevel(logging.WARNING)


def connect(settings: JobSettings) -> None:
    """Join the cluster that the job was submitted to, the one of `ray_address`, or start a local one for this run."""
    if ray.is_initialized():
        return
    address = settings.ray_address or os.environ.get("RAY_ADDRESS")
    if address:
        ray.init(address=address, logging_level=logging.WARNING)
    else:
        # Ray Train asks the dashboard's API how its own actors are, and complains every second where there is none.
        ray.init(address="local", include_dashboard=True, dashboard_host="127.0.0.1", logging_level=logging.WARNING)
    resources = ray.cluster_resources()
    log.info("Ray %s: %g CPUs, %g GPUs", ray.__version__, resources.get("CPU", 0), resources.get("GPU", 0))
