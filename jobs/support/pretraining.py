"""A pretraining run on Ray Train: its plan, the trainer, the losses on disk, the exported weights."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from numpy.typing import NDArray
from ray.train import (
    Checkpoint,
    CheckpointConfig,
    FailureConfig,
    Result,
    RunConfig,
    ScalingConfig,
    TrainingFailedError,
    UserCallback,
    ValidationConfig,
)
from ray.train.torch import TorchConfig, TorchTrainer

from jobs.support import failures, nonfinite
from jobs.support.dealing import TRAINING, Dealing, nothing_yet, worker_start_timeout
from jobs.support.encoder import radar_unit
from jobs.support.fed import fed_chips, order_facts
from jobs.support.initial_weights import initial_normalisation
from jobs.support.job import JobError
from jobs.support.model_files import ITEM_FILE, WEIGHTS_FILE, write_model
from jobs.support.run_record import code_commit
from jobs.support.training_loop import CHECKPOINT_FILE, NEIGHBOURHOODS_FILE, samples_in, train_worker
from jobs.support.training_report import ReportWriter
from jobs.support.worker_counts import worker_counts
from model import pretrained
from model.averaging import restore_averaged
from model.normalisation import RADAR_UNIT, SSL4EO_S12, Normalisation, from_statistics
from pipeline.chip_table import WRITTEN
from pipeline.epochs import ORDER_VERSION
from pipeline.fed_chips import Feed, keep_rows
from pipeline.mixture import pooled
from pipeline.neighbourhoods import neighbourhoods
from pipeline.objects import Objects
from pipeline.positions import Course
from pipeline.redaction import redact
from pipeline.sources import Sources
from pipeline.store import Store
from pipeline.versions import Version

log = logging.getLogger(__name__)

_RUN_NAME = "train"


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """What is trained on what."""

    settings: dict[str, Any]
    """Of the job, as plain values."""

    feed: Feed

    num_samples: int
    """Of an epoch; what is below a global batch begins the next one."""

    @property
    def course(self) -> Course:
        """How long an epoch and a step are."""
        return Course(epoch_samples=self.num_samples, global_batch=self.feed.global_batch)


def say_plan(plan: TrainingPlan) -> None:
    """What will be trained, on the log."""
    settings = plan.settings
    steps = plan.course.seen_after(settings["epochs"]) // settings["global_batch"]
    sizes = (plan.num_samples, settings["epochs"], steps, settings["global_batch"], settings["num_workers"])
    log.info(
        "CROMA %s on %d samples per epoch, %d epochs in %d steps of %d samples on %s workers", settings["size"], *sizes
    )
    if left_over := plan.course.left_over(settings["epochs"]):
        log.info("%d samples at the end of the last epoch are less than a step and will be left out", left_over)


def fit(
    plan: TrainingPlan,
    out: Objects,
    *,
    validation: ValidationConfig | None = None,
    callbacks: Sequence[UserCallback] = (),
) -> Result:
    """Train to the end, from the newest checkpoint in `out` if there is one.

    Args:
        plan: What on what.
        out: Directory of the run.
        validation: How checkpoints are evaluated meanwhile; None: they are not.
        callbacks: For the controller, beside those that write the report and what workers were lost to.

    Raises:
        JobError: Workers were lost too often, or a loss was not finite; says which and what to do.
    """
    settings, workers = plan.settings, worker_counts(plan.settings["num_workers"])
    use_gpu = settings["use_gpu"]
    if use_gpu is None:
        use_gpu = ray.cluster_resources().get("GPU", 0) >= workers.least
    bfloat16 = settings["precision"] == "bfloat16" or (settings["precision"] == "auto" and use_gpu)
    feed = keep_rows(plan.feed, out.url)
    if seen := samples_seen(out):
        epoch = plan.course.epoch_of(seen)
        log.info("going on in epoch %d after %d samples", epoch, seen)
    # Of sealed versions, and so the same at every start.
    if not out.exists(NEIGHBOURHOODS_FILE):
        out.put(NEIGHBOURHOODS_FILE, neighbourhoods(feed.sources).to_bytes())

    # Ray Train is typed as it was before its second version, whose settings these are.
    trainer = TorchTrainer(
        train_worker,  # type: ignore[arg-type]
        train_loop_config={
            "out": out.url,
            "losses_url": f"{out.url}/losses",
            "size": settings["size"],
            "epochs": settings["epochs"],
            "global_batch": settings["global_batch"],
            "num_samples": plan.num_samples,
            "order": {
                **asdict(feed.order),
                **order_facts(feed),
                "num_samples": plan.num_samples,
                "order_version": ORDER_VERSION,
            },
            "origin": {**_origin(feed), "commit": code_commit()},
            "peak_learning_rate": settings["learning_rate"],
            "warmup_fraction": settings["warmup_fraction"],
            "weight_decay": settings["weight_decay"],
            "normalisation": normalisation_of(plan, out).to_dict(),
            "step": _step_settings(settings, bfloat16=bfloat16),
            "objective": settings["objective"],
            "recompute": settings["recompute_activations"],
            "compile": settings["compile"],
            "report_every_epochs": settings["report_every_epochs"],
            "checkpoint_every_samples": settings["checkpoint_every_samples"],
            "threads": None if use_gpu else 1,
            "shard_chips": Sources(feed.sources).layout.shard_chips,
            "window_batches": feed.order.window_batches,
            "sources": feed.sources,
            "cache": feed.cache,
            "looks": _looks_plan(plan, out),
            "evaluate": {"every_samples": settings["evaluate"]["every_samples"]} if validation else None,
            "nonfinite": {
                "out": out.url,
                "sources": feed.sources,
                **{name: settings[name] for name in ("on_nonfinite", "max_skipped_steps")},
            },
            "ema_decay": settings["ema_decay"],
            "from_weights": settings["from_weights"] is not None,
            "feed": feed if settings["feed"] == "in_process" else None,
            "feed_threads": settings["feed_threads"],
        },
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=tuple(workers) if workers.elastic else workers.most,  # type: ignore[arg-type]
            use_gpu=use_gpu,
            elastic_resize_monitor_interval_s=settings["grow_interval_s"],  # type: ignore[call-arg]
            resources_per_worker={"CPU": settings["cpus_per_worker"], **({"GPU": 1} if use_gpu else {})},
        ),
        run_config=RunConfig(
            name=_RUN_NAME,
            storage_path=out.url,
            failure_config=FailureConfig(  # type: ignore[call-arg]
                max_failures=settings["max_failures"],
                max_preemption_failures=-1 if settings["max_preemptions"] is None else settings["max_preemptions"],
                preemption_grace_s=settings["preemption_grace_s"],
            ),
            checkpoint_config=CheckpointConfig(num_to_keep=settings["keep_checkpoints"]),
            callbacks=[ReportWriter(out), failures.FailureLog(out), *callbacks],  # type: ignore[list-item]
        ),
        datasets={TRAINING: nothing_yet} if settings["feed"] == "ray" else None,
        dataset_config=Dealing(feed, lambda: samples_seen(out), cpus_per_worker=settings["cpus_per_worker"]),
        validation_config=validation,
    )
    try:
        with worker_start_timeout(settings["worker_start_timeout_s"]):
            result = trainer.fit()
    except TrainingFailedError as error:
        raise JobError(failures.explain(error, out, settings)) from error
    if (ended := result.return_value) is not None:  # type: ignore[attr-defined]
        raise JobError(nonfinite.explain(out, **ended))
    return result


def _origin(feed: Feed) -> dict[str, Any]:
    """Where the chips are from, as plain values."""
    first, *others = ({"store": redact(each.url), "version": each.version} for each in feed.sources)
    return {**first, "others": others} if others else first


def _step_settings(settings: Mapping[str, Any], *, bfloat16: bool) -> dict[str, Any]:
    """Of `model.training.StepSettings`."""
    named = ("seed", "mask_fraction", "shared_masks", "max_logit_scale", "augment", "micro_batch")
    crop_px = settings["crop_px"]
    scaled = {"scale_sides_px": (crop_px // 2, window_px(settings)), "scaled_px": crop_px}
    return {
        **{name: settings[name] for name in named},
        "bfloat16": bfloat16,
        **(scaled if settings["scale_augmentation"] else {}),
    }


def _looks_plan(plan: TrainingPlan, out: Objects) -> dict[str, Any]:
    """Of `jobs.support.training_looks.Looks`."""
    named = ("crop_px", "seed", "mask_fraction", "shared_masks")
    chips = {"out": out.url, "store": plan.feed.url, "version": plan.feed.version}
    return {**chips, **{name: plan.settings[name] for name in named}}


def window_px(settings: Mapping[str, Any]) -> int:
    """Side of what is read of a chip, pixels of 10 m: more than the crop where its scale is to vary."""
    crop_px: int = settings["crop_px"]
    return crop_px * 3 // 2 if settings["scale_augmentation"] else crop_px


def export_model(checkpoint: Checkpoint | None, plan: TrainingPlan, out: Objects) -> str:
    """Write the weights, averaged ones if there are, and what describes them; returns the model's hash."""
    assert checkpoint is not None, "a run that ended well has a checkpoint"
    with checkpoint.as_directory() as folder, (Path(folder) / CHECKPOINT_FILE).open("rb") as file:
        saved = pretrained.load(file)
    model, normalisation = restore_averaged(saved)
    name, decay = f"CROMA {plan.settings['size']}", saved["training"]["ema_decay"]
    trained_on = ", ".join(redact(source.url) for source in plan.feed.sources)
    return write_model(out, model, normalisation, name=name, trained_on=trained_on, ema_decay=decay)


def is_exported(out: Objects) -> bool:
    """Whether a run has been trained to its end."""
    return out.exists(WEIGHTS_FILE) and out.exists(ITEM_FILE)


def read_losses(out: Objects) -> list[dict[str, float]]:
    """Every step's averages so far, in order of samples seen."""
    return [step for path in out.list("losses") for step in out.get_json(path)["steps"]]


def normalisation_of(plan: TrainingPlan, out: Objects) -> Normalisation:
    """What scales the bands, in the units and of the level of the store; `out`: directory of the run."""
    if plan.settings["normalisation"] == "ssl4eo-s12":
        return SSL4EO_S12
    if plan.settings["normalisation"] == "weights":
        return initial_normalisation(out)
    feed = plan.feed
    means, stds = zip(*(pooled_statistics(chips) for chips in fed_chips(feed)), strict=True)
    mean, std = pooled(np.stack(means), np.stack(stds), [part.taken for part in feed.parts] or [1])
    names = (Version(source.url, source.version).name for source in feed.sources)
    layout = Store.open(feed.url).layout
    return from_statistics(
        mean.tolist(),
        std.tolist(),
        source=f"training chips of {' and '.join(names)}",
        radar_unit=radar_unit(layout) or RADAR_UNIT,
        level=layout.optical_level,
    )


def pooled_statistics(chips: pa.Table) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and deviation per band over all pixels of the training chips, from those of each chip."""
    rows = [r for r in chips.select(["status", "split", "mean", "std"]).to_pylist() if r["status"] == WRITTEN]
    rows = [r for r in rows if r["split"] == "train"] or rows
    means, stds = (np.array([r[name] for r in rows], dtype=np.float64) for name in ("mean", "std"))
    mean = np.nanmean(means, axis=0)
    # Law of total variance, chips being equally large.
    return mean, np.sqrt(np.nanmean(stds**2, axis=0) + np.nanvar(means, axis=0))


def samples_seen(out: Objects) -> int:
    """Samples seen by the newest checkpoint that Ray Train knows, which is the one that it resumes from."""
    try:
        snapshot = out.get_json(f"{_RUN_NAME}/checkpoint_manager_snapshot.json")
    except FileNotFoundError:
        return 0
    newest = snapshot.get("latest_checkpoint_result")
    return samples_in(newest["checkpoint_dir_name"]) if newest else 0
