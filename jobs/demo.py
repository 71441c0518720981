"""Send one real thread through every part: archive, dataset, pretraining, evaluation, embeddings, report.

Starts a Ray cluster on this machine, submits the four jobs to it as a user would, and stops it. What is complete
from an earlier run is reused.

Example:
    python -m jobs.demo out=runs/demo
"""

from __future__ import annotations

import logging
import os
import shlex
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jobs.support.demo_report import DemoOutputs, write_report
from jobs.support.job import run_job
from jobs.support.local_cluster import LocalCluster, local_cluster
from jobs.support.run_record import recorded
from jobs.support.settings import JobSettings
from pipeline.archives import archive_named
from pipeline.catalog import require_account
from pipeline.objects import Objects

log = logging.getLogger("demo")

_ROOT = Path(__file__).resolve().parent.parent


class Demo(JobSettings):
    """Send one real thread through every part: archive, dataset, pretraining, evaluation, embeddings, report."""

    out: str = "runs/demo"
    """Directory for everything that the demo makes."""

    archive: Literal["simulated", "planetary-computer"] = "simulated"
    """A small archive made and served on this machine, or the real one (needs a network and a subscription key)."""

    profile: Literal["demo", "test"] = "demo"
    """Simulated archive: demo takes some minutes and has enough to learn from, test is small and only shows the way."""

    seed: int = 0
    """Of the archive, the splits and the training."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where and when the demo looks."""

    url: str
    """The archive, as the jobs take it."""

    region: str
    embed_region: str
    period: str
    embed_period: str


def main(settings: Demo) -> None:
    """Make or find the archive, run the four jobs on a cluster, write the report."""
    out = Objects.at(settings.out)
    outputs = DemoOutputs(
        store=f"{out.url}/chips.zarr",
        run=f"{out.url}/pretrain",
        evaluation=f"{out.url}/evaluate",
        embeddings=f"{out.url}/embed",
    )
    if settings.dry_run:
        for name, words in _jobs(settings, outputs, _place_without_archive(settings)).items():
            log.info("would submit: %s", _entrypoint(name, words))
        return
    with recorded(settings, job="demo", output=settings.out) as record, ExitStack() as stack:
        with record.stage("archive"):
            place = stack.enter_context(_archive(settings, Path(out.url)))
        with record.stage("start Ray"):
            cluster = stack.enter_context(local_cluster(num_cpus=max(4, os.cpu_count() or 1)))
        for name, words in _jobs(settings, outputs, place).items():
            with record.stage(name):
                _submit(cluster, name, words)
        with record.stage("report"):
            record.outputs["report"] = write_report(outputs, out)
    log.info("done in %.0f s: %s", record.timings_s["total"], record.timings_s)
    log.info("look at %s", record.outputs["report"])


def _jobs(settings: Demo, outputs: DemoOutputs, place: Place) -> dict[str, dict[str, object]]:
    """Job name -> its settings, in the order in which they run."""
    common = {"archive": place.url, "shard_chips": 64, "block_cells": 4, "seed": settings.seed}
    return {
        "build_dataset": {
            **common,
            "region": place.region,
            "period": place.period,
            "store": outputs.store,
            "labels": "worldcover",
            # Larger blocks, or a buffer, would leave little of so small a region.
            "splits.block_cells": 2 if settings.profile == "demo" else 1,
            "splits.buffer_cells": 0,
            "splits.val_fraction": 0.1 if settings.profile == "demo" else 0.25,
            "splits.test_fraction": 0.25 if settings.profile == "demo" else 0.35,
        },
        "pretrain": {
            "store": outputs.store,
            "out": outputs.run,
            "preset": "tiny-demo",
            **({} if settings.profile == "demo" else {"epochs": 1, "global_batch": 4}),
            "seed": settings.seed,
        },
        "evaluate": {
            "model": f"{outputs.run}/model.safetensors",
            "store": outputs.store,
            "label": "worldcover",
            "window_px": 72,
            "max_windows": 500,
            "rare_classes": "leave-out",
            "out": outputs.evaluation,
            "seed": settings.seed,
        },
        "embed": {
            **common,
            "model": f"{outputs.run}/model.safetensors",
            "region": place.embed_region,
            "period": place.embed_period,
            "out": outputs.embeddings,
        },
    }


def _submit(cluster: LocalCluster, name: str, words: dict[str, object]) -> None:
    log.info("submitting %s", name)
    cluster.run(name, _entrypoint(name, words), working_dir=_ROOT)


def _entrypoint(name: str, words: dict[str, object]) -> str:
    return shlex.join(["python", f"jobs/{name}.py", *(f"{key}={value}" for key, value in words.items())])


@contextmanager
def _archive(settings: Demo, out: Path) -> Iterator[Place]:
    if settings.archive == "planetary-computer":
        require_account(archive_named(settings.archive))
        yield _place_without_archive(settings)
        return
    # Only here: the real archive needs neither the simulator nor what it needs.
    from pipeline.simulation.archive import write_archive
    from pipeline.simulation.profiles import PROFILES
    from pipeline.simulation.server import StacServer

    write_archive(out / "archive", PROFILES[settings.profile], seed=settings.seed, processes=os.cpu_count() or 1)
    with StacServer(out / "archive") as server:
        log.info("the simulated archive answers at %s", server.url)
        yield _simulated(server.url, settings.profile)


def _place_without_archive(settings: Demo) -> Place:
    if settings.archive == "simulated":
        return _simulated("http://127.0.0.1:PORT", settings.profile)
    # Around Freising: fields, forest, a town and the Isar, near the border of zones 32 and 33.
    return Place(
        url=settings.archive,
        region="11.62,48.30,11.98,48.48",
        embed_region="11.70,48.36,11.84,48.44",
        period="2022-05/2022-08",
        embed_period="2022-07",
    )


def _simulated(url: str, name: str) -> Place:
    from pipeline.simulation.profiles import PROFILES

    profile = PROFILES[name]
    region, embed_region = (",".join(map(str, box)) for box in (profile.region, profile.embed_region))
    return Place(url=url, region=region, embed_region=embed_region, period=profile.period, embed_period="2022-07")


if __name__ == "__main__":
    run_job(Demo, main)
