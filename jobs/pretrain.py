"""Pretrain CROMA on a chip store, across the workers of a Ray cluster.

Run the same command again to go on where it stopped.

Example:
    ray job submit --working-dir . -- python jobs/pretrain.py \
        store=s3://bucket/chips.zarr out=s3://bucket/runs/base preset=croma-base-ssl4eo num_workers=16
"""

from __future__ import annotations

import logging

from jobs.support.checkpoint_scores import read_scores
from jobs.support.encoder import check_units
from jobs.support.failures import failures
from jobs.support.fed import sealed_sources
from jobs.support.initial_weights import INITIAL_FILE
from jobs.support.job import JobError, connect, run_job
from jobs.support.model_files import WEIGHTS_FILE
from jobs.support.online_evaluation import check_evaluation, prepare_evaluation
from jobs.support.pretrain_request import claim, first_weights, leave_cpus_to_read, plan_training, with_lanes
from jobs.support.pretrain_settings import TrainingSettings
from jobs.support.pretraining import export_model, fit, is_exported, say_plan, window_px
from jobs.support.run_record import recorded
from jobs.support.tracking import tracked, tracker_of
from jobs.support.training_estimate import say_estimate
from jobs.support.training_report import REPORT_FILE, write_training_report
from jobs.support.worker_counts import check_divides, worker_counts
from model.normalisation import SSL4EO_S12
from pipeline.objects import Objects
from pipeline.sources import Sources

log = logging.getLogger("pretrain")


class Pretrain(TrainingSettings):
    """Pretrain CROMA on a chip store, across the workers of a Ray cluster."""


def main(settings: TrainingSettings) -> None:
    """Plan, train or go on, export the weights, write the page."""
    sources = sealed_sources(settings.fed)
    layout = Sources(sources).layout
    if not (layout.has_optical and layout.has_radar):
        raise JobError(f"{sources[0].url} lacks a sensor; pretraining needs both")
    if settings.normalisation == "ssl4eo-s12":
        check_units(layout, SSL4EO_S12)
    if (side_px := window_px(settings.model_dump())) > layout.side_px:
        with_scale = f", with scale_augmentation {side_px} px," if settings.scale_augmentation else ""
        raise ValueError(
            f"crop_px={settings.crop_px}{with_scale} is larger than the store's chips of {layout.side_px} px"
        )
    check_divides(worker_counts(settings.num_workers), settings.global_batch)
    settings = with_lanes(settings)
    plan = plan_training(settings, sources)
    evaluated_on = check_evaluation(settings.evaluate, plan.feed)
    tracker = tracker_of(settings.mlflow, settings.out)
    if settings.dry_run:
        say_plan(plan)
        say_estimate(plan)
        return
    with recorded(settings, job="pretrain", output=settings.out) as record:
        out = Objects.at(settings.out)
        weights = first_weights(settings, out, layout)
        claim(out, settings, sources)
        if weights:
            out.put(INITIAL_FILE, weights)
        inputs = [{"url": each.url, "version": each.version} for each in sources]
        record.inputs.update({"stores": inputs} if settings.stores else {"store": inputs[0]})
        if is_exported(out):
            log.info("%s holds a trained model already: nothing to do", settings.out)
            record.results["reused"] = True
            if not out.exists(REPORT_FILE):
                record.outputs["report"] = write_training_report(out)
            if tracker:
                tracker.catch_up(status="FINISHED", artifacts=True)
            return
        say_plan(plan)
        with tracked(tracker):
            connect(settings)
            leave_cpus_to_read(settings)
            with record.stage("train"):
                validation = prepare_evaluation(settings.evaluate, evaluated_on, out, seed=settings.seed)
                try:
                    result = fit(plan, out, validation=validation, callbacks=[tracker] if tracker else [])
                finally:
                    record.results["failures"] = failures(out)
            with record.stage("export"):
                digest = export_model(result.checkpoint, plan, out)
                record.outputs["report"] = write_training_report(out)
        record.outputs["model"] = {"url": f"{settings.out.rstrip('/')}/{WEIGHTS_FILE}", "sha256": digest}
        left_over = plan.course.left_over(settings.epochs)
        record.results.update(result.metrics or {}, samples_left_over=left_over, reused=False)
        if scores := read_scores(out):
            record.results["scores"] = scores[-1]
        log.info("trained: %s/%s (%s)", settings.out.rstrip("/"), WEIGHTS_FILE, digest[:12])


if __name__ == "__main__":
    run_job(Pretrain, main)
