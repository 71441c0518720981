"""What `jobs/pretrain.py` is asked for: which samples, whether they can be read, whether a directory is its own."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

import ray

from jobs.support.fed import parts_of
from jobs.support.initial_weights import INITIAL_FILE, read_weights
from jobs.support.job import JobError
from jobs.support.pretrain_settings import TrainingSettings
from jobs.support.pretraining import TrainingPlan, is_exported, samples_seen, window_px
from jobs.support.training_report import REQUEST_FILE
from jobs.support.worker_counts import worker_counts
from model.croma import CONFIGS
from pipeline.canonical import differences
from pipeline.epochs import usual_window
from pipeline.fed_chips import Feed
from pipeline.layout import Layout
from pipeline.objects import Objects
from pipeline.sources import Source, choose_all

log = logging.getLogger("pretrain")


def with_lanes(settings: TrainingSettings) -> TrainingSettings:
    """The settings with a number of lanes: the one given, or else the run's if it was begun, or one per worker.

    Raises:
        ValueError: It does not divide the global batch.
    """
    lanes, out = settings.lanes, Objects.at(settings.out)
    if lanes is None and out.exists(REQUEST_FILE):
        lanes = out.get_json(REQUEST_FILE).get("lanes")
    lanes = lanes or worker_counts(settings.num_workers).most
    if settings.global_batch % lanes:
        raise ValueError(f"global_batch={settings.global_batch} is no multiple of lanes={lanes}")
    return settings.model_copy(update={"lanes": lanes})


def plan_training(settings: TrainingSettings, sources: tuple[Source, ...]) -> TrainingPlan:
    """What is trained on what; `settings` as `with_lanes` has them.

    Raises:
        JobError: There are fewer samples than one global batch.
        StoreError: No chip meets the conditions.
    """
    assert settings.lanes is not None
    only, split = settings.filter.of_chips(), settings.filter.split
    chosen = choose_all(sources, only, split=split)
    feed = Feed(
        url=sources[0].url,
        version=sources[0].version,
        others=sources[1:],
        parts=parts_of(settings.fed, chosen, global_batch=settings.global_batch),
        only=only,
        split=split,
        cache=settings.cache,
        crop_px=window_px(settings.model_dump()),
        crops_per_chip=settings.crops_per_chip,
        seed=settings.seed,
        global_batch=settings.global_batch,
        lanes=settings.lanes,
        window_chips=usual_window(settings.crops_per_chip),
        ranks=worker_counts(settings.num_workers).most,
    )
    samples = feed.order.epoch_chips(sum(len(each.rows) for each in chosen)) * feed.crops_per_chip
    if samples < settings.global_batch:
        names = " and ".join(each.name for each in chosen)
        raise JobError(
            f"{names}: {samples} training samples are fewer than one global batch of {settings.global_batch}; "
            "lower global_batch, raise crops_per_chip, or build a larger dataset"
        )
    return TrainingPlan(settings=settings.model_dump(), feed=feed, num_samples=samples)


def first_weights(settings: TrainingSettings, out: Objects, layout: Layout) -> bytes | None:
    """The weights to begin with; None where none are wanted, or the run was begun and has its copy of them."""
    if settings.from_weights is None or out.exists(INITIAL_FILE):
        return None
    if (seen := samples_seen(out)) or is_exported(out):
        log.info("%s was trained for %d samples: from_weights is of no matter", settings.out, seen)
        return None
    config, own_scaling = CONFIGS[settings.size], settings.normalisation == "weights"
    return read_weights(settings.from_weights, config=config, layout=layout, own_scaling=own_scaling)


def leave_cpus_to_read(settings: TrainingSettings) -> None:
    """Refuse to wait for ever, on a machine that will not grow, for the CPU that reads the store."""
    if settings.feed == "in_process" or settings.ray_address or os.environ.get("RAY_ADDRESS"):
        return
    most = worker_counts(settings.num_workers).most
    there, taken = ray.cluster_resources().get("CPU", 0), most * settings.cpus_per_worker
    beside, with_it = 0.0, ""
    if settings.evaluate.store:
        beside, with_it = settings.evaluate.num_cpus, f" and evaluate.num_cpus={settings.evaluate.num_cpus:g}"
    if there - taken - beside < 1:
        raise JobError(
            f"num_workers={settings.num_workers} with cpus_per_worker={settings.cpus_per_worker:g}{with_it} leave none "
            f"of this machine's {there:g} CPUs to read the store; lower one of them, to "
            f"{max(0.0, there - 1 - beside) / most:g} CPUs per worker for example"
        )


def claim(out: Objects, settings: TrainingSettings, sources: Sequence[Source]) -> None:
    """Bind the run's directory to what decides its result; another run's is refused."""
    how = {"num_workers", "use_gpu", "cpus_per_worker", "keep_checkpoints", "checkpoint_every_samples"}
    how |= {"cache_dir", "cache_bytes", "feed", "feed_threads"}
    losses = {"max_failures", "max_preemptions", "preemption_grace_s", "worker_start_timeout_s", "grow_interval_s"}
    elsewhere = {
        "dry_run",
        "ray_address",
        "run_dir",
        "out",
        "preset",
        "assume",
        "evaluate",
        "mlflow",
        "recompute_activations",
        "compile",
        "on_nonfinite",
        "max_skipped_steps",
        *how,
        *losses,
    }
    request: dict[str, Any] = {
        **settings.model_dump(mode="json", exclude=elsewhere),
        "filter": settings.filter.request(),
    }
    if settings.stores:
        stores = zip(settings.stores, sources, strict=True)
        request["stores"] = [{**each.model_dump(mode="json"), "version": found.version} for each, found in stores]
    else:
        request["version"] = sources[0].version
    try:
        out.put_json(REQUEST_FILE, request, create=True)
    except FileExistsError:
        changed = list(differences(out.get_json(REQUEST_FILE), request))
        if changed:
            raise JobError(f"{settings.out} holds another run: {'; '.join(changed)}; give another out") from None
