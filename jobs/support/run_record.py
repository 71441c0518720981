"""run.json: what a run was asked, with what it ran, what it read and wrote, and how long it took."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

from jobs.support.settings import JobSettings
from pipeline.objects import Objects
from pipeline.redaction import redact_values

_PACKAGES = ("twinlook", "ray", "torch", "zarr", "rasterio", "stackstac", "pystac-client", "numpy", "pyarrow")


@dataclass(kw_only=True)
class RunRecord:
    """What a run says of itself; filled while it runs."""

    directory: str
    """Where run.json lies and where the job puts what a person looks at."""

    inputs: dict[str, Any] = field(default_factory=dict)
    outputs: dict[str, Any] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    timings_s: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a part of the run."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.timings_s[name] = round(self.timings_s.get(name, 0.0) + time.monotonic() - start, 3)


@contextmanager
def recorded(settings: JobSettings, *, job: str, output: str) -> Iterator[RunRecord]:
    """Write run.json when the run starts and when it ends, however it ends; no signature or key is in it.

    Args:
        settings: The whole of them are kept.
        job: Name of the job.
        output: The job's main output; decides the directory when the settings do not.
    """
    record = RunRecord(directory=settings.directory_for(output))
    objects = Objects.at(record.directory)
    head = {
        "job": job,
        "command": " ".join(sys.argv),
        "settings": settings.model_dump(mode="json"),
        "commit": code_commit(),
        "versions": {
            "python": platform.python_version(),
            **{name: version_of(name) for name in _PACKAGES if _has(name)},
        },
        "hardware": {"machine": platform.machine(), "system": platform.platform(), "cpus": os.cpu_count()},
        "started": datetime.now(UTC).isoformat(),
    }

    def write(status: str, error: str | None) -> None:
        body = {
            **head,
            "status": status,
            "error": error,
            "inputs": record.inputs,
            "outputs": record.outputs,
            "results": record.results,
            "timings_s": record.timings_s,
        }
        objects.put_json("run.json", redact_values(body))

    write("running", None)
    start = time.monotonic()
    try:
        yield record
    except BaseException as error:
        record.timings_s["total"] = round(time.monotonic() - start, 3)
        write("failed", "".join(traceback.format_exception_only(error)).strip())
        raise
    record.timings_s["total"] = round(time.monotonic() - start, 3)
    write("succeeded", None)


def code_commit() -> str | None:
    """Commit of the code that runs; from git, or from the image's TWINLOOK_COMMIT where there is no git."""
    root = Path(__file__).resolve().parents[2]
    if (root / ".git").exists():
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603  # a fixed command
        if done.returncode == 0:
            return done.stdout.strip()
    return os.environ.get("TWINLOOK_COMMIT")


def _has(package: str) -> bool:
    try:
        version_of(package)
    except ModuleNotFoundError:
        return False
    return True
