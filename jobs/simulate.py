"""Write a simulated archive of Sentinel-1, Sentinel-2 and land cover, for trying things without a network.

Run the same command again and a complete archive is left as it is. `rustac serve` serves its collections and items.

Example:
    python -m jobs.simulate out=archive profile=demo seed=0
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from pathlib import Path
from typing import Literal

from pydantic import Field

from jobs.support.job import run_job
from jobs.support.run_record import recorded
from jobs.support.settings import JobSettings
from pipeline.simulation.archive import is_complete, write_archive
from pipeline.simulation.items import collection_of
from pipeline.simulation.profiles import PROFILES, Profile

log = logging.getLogger("simulate")

_BYTES_PER_PIXEL = {"sentinel-2-l2a": 10.2, "sentinel-1-rtc": 4.7, "esa-worldcover": 0.02}
"""On disk, all bands together, as measured on the demo's archive."""


class Simulate(JobSettings):
    """Write a simulated archive of Sentinel-1, Sentinel-2 and land cover."""

    out: str
    """Local directory to create; the items name it, so it cannot be moved afterwards."""

    profile: Literal["demo", "test"] = "demo"
    """demo: enough to train on; test: small, with every quirk the tests need."""

    seed: int = 0
    """Decides every pixel."""

    processes: int = Field(default_factory=lambda: os.cpu_count() or 1, ge=1)
    """Scenes made at the same time."""


def main(settings: Simulate) -> None:
    """Say what there is to write, and write it."""
    profile, out = PROFILES[settings.profile], Path(settings.out)
    _say(profile)
    if settings.dry_run:
        return
    with recorded(settings, job="simulate", output=settings.out) as record:
        record.results["reused"] = is_complete(out, profile, seed=settings.seed)
        with record.stage("write"):
            write_archive(out, profile, seed=settings.seed, processes=settings.processes)
        record.outputs["archive"] = {"url": str(out.resolve())}
        served = f"rustac serve {settings.out}/collections/*.json {settings.out}/items/*.json"
        log.info("%s; to serve it: %s", "reused" if record.results["reused"] else "written", served)


def _say(profile: Profile) -> None:
    pixels: Counter[str] = Counter()
    for scene in profile.scenes:
        pixels[collection_of(scene)] += scene.frame.width_px * scene.frame.height_px
    megabytes = sum(_BYTES_PER_PIXEL[name] * count for name, count in pixels.items()) / 1e6
    log.info("%s: %d scenes, about %.0f MB", profile.name, len(profile.scenes), megabytes)
    for name, box in (
        ("region", profile.region),
        ("embed_region", profile.embed_region),
        ("border_region", profile.border_region),
        ("southern_region", profile.southern_region),
    ):
        log.info("%s=%s", name, ",".join(map(str, box)))
    log.info("period=%s", profile.period)


if __name__ == "__main__":
    run_job(Simulate, main)
