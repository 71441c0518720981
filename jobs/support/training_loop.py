"""What each Ray Train worker runs: batches in, steps, reports with checkpoints out.

A checkpoint holds what going on needs: weights, optimizer, samples seen (from which the learning rate and the feed's
position follow), normalisation, objective, what decides the order of samples, and the commit of the code. There is no
state of random generators in it, as nothing draws from one after the weights are initialised: masks, flips, turns and
crops follow from (seed, epoch, row, k).
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ray.train
import torch
from ray.train import Checkpoint, CheckpointUploadMode
from ray.train.torch import get_device, prepare_model
from torch import Tensor, distributed

from jobs.support.batch_mix import shards_over_ranks
from jobs.support.cache_watch import CacheWatch
from jobs.support.job import log_to_stderr
from jobs.support.training_looks import Looks
from jobs.support.waiting import probable_cause
from model.croma import CONFIGS, CromaPretraining, Objective
from model.normalisation import Normalisation
from model.pretrained import load, load_weights, restore_pretraining, save, to_checkpoint
from model.training import NonFiniteError, StepSettings, build_optimizer, learning_rate, train_step
from pipeline.canonical import differences
from pipeline.objects import Objects
from pipeline.positions import Course
from pipeline.sources import Sources

log = logging.getLogger(__name__)

CHECKPOINT_FILE = "croma.pt"
"""In a Ray Train checkpoint: weights, configuration and normalisation, and what going on needs."""

_NAME_PREFIX = "samples-"


class PositionError(RuntimeError):
    """The feed handed over other samples than those that come next."""


def train_worker(plan: dict[str, Any]) -> None:
    """Train on this worker's share of the feed, from the newest checkpoint of the run if there is one.

    Args:
        plan: Plain values: size, epochs, global_batch, num_samples (per epoch), order (what decides the order of
            samples), peak_learning_rate, warmup_fraction, weight_decay, normalisation, step (of `StepSettings`),
            checkpoint_every_samples (or None: at the end of every report_every_epochs), threads, losses_url, origin
            (of the run: store, version, commit), shard_chips and sources (of the stores), looks (of `Looks`); where
            they differ from the defaults, objective (of `Objective`), recompute (activation checkpointing), compile (a
            backend of torch.compile, or off), evaluate (every_samples, or None: every checkpoint; see
            `evaluation_due`) and cache (a `ShardCache`).
    """
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    if plan["threads"]:
        torch.set_num_threads(plan["threads"])
    torch.manual_seed(plan["step"]["seed"])
    normalisation = Normalisation.from_dict(plan["normalisation"])
    pretraining = _new_model(plan)
    model = prepare_model(pretraining)
    optimizer = build_optimizer(pretraining, weight_decay=plan["weight_decay"])
    seen = _resume(pretraining, optimizer, plan["order"])
    if rank == 0:
        _forget_losses_after(plan["losses_url"], seen)
    course = Course(epoch_samples=plan["num_samples"], global_batch=plan["global_batch"])
    total, size = course.seen_after(plan["epochs"]), plan["global_batch"] // world
    step_settings = StepSettings(**plan["step"])
    model.train()
    looks = Looks(plan["looks"])
    cache = CacheWatch(plan.get("cache"))
    steps: list[dict[str, float]] = []
    shards: list[Tensor] = []
    while seen < total:
        epoch = course.epoch_of(seen)
        for batch, waited_s in _batches(size):
            _check_positions(batch["position"], seen + rank * size, size)
            start = time.monotonic()
            rate = learning_rate(
                seen,
                peak=plan["peak_learning_rate"],
                warmup_samples=int(plan["warmup_fraction"] * total),
                total_samples=total,
            )
            try:
                values = train_step(
                    model, batch, optimizer, normalisation=normalisation, settings=step_settings, learning_rate=rate
                )
            except NonFiniteError as error:
                error.add_note(Sources(plan["sources"]).name_rows(batch["row"].tolist()))
                raise
            seen += plan["global_batch"]
            shards.append((batch["row"] // plan["shard_chips"]).unique())
            elapsed = time.monotonic() - start
            feed = {"waited_s": waited_s, "step_s": elapsed}
            steps.append({"samples": seen, "epoch": epoch, **feed, **values})
            if checkpoint_due(seen, course, plan):
                for step, number in zip(steps, shards_over_ranks(shards), strict=True):
                    step["shards"] = number
                means = _write_losses(plan["losses_url"], steps, rank=rank, total=total)
                means |= cache.since_last(say=context.get_local_rank() == 0)
                if rank == 0:
                    looks.write(pretraining, normalisation, seen, last=seen == total)
                facts = {name: plan[name] for name in ("order", "origin")}
                state = {"optimizer": optimizer.state_dict(), "samples_seen": seen, **facts}
                evaluated = evaluation_due(seen, seen - len(steps) * plan["global_batch"], total, plan)
                _report(pretraining, normalisation, state, means, rank=rank, evaluated=evaluated)
                steps, shards = [], []
        if seen != course.seen_after(epoch + 1):
            raise PositionError(f"epoch {epoch} ended after {seen} samples instead of {course.seen_after(epoch + 1)}")


def _new_model(plan: Mapping[str, Any]) -> CromaPretraining:
    """With weights as they begin."""
    pretraining = CromaPretraining(CONFIGS[plan["size"]], Objective(**plan.get("objective", {})))
    pretraining.croma.recompute_activations(plan.get("recompute", False))
    if (backend := plan.get("compile", "off")) != "off":
        # In place: a wrapper would give the weights other names.
        pretraining.compile(backend=backend)
    return pretraining


def checkpoint_due(seen: int, course: Course, plan: Mapping[str, Any]) -> bool:
    """Whether the step after which so many samples are seen is followed by a checkpoint; the last one always is."""
    if seen == course.seen_after(plan["epochs"]):
        return True
    every: int | None = plan["checkpoint_every_samples"]
    if every:
        return seen // every > (seen - course.global_batch) // every
    done, epochs = course.epoch_of(seen), int(plan["report_every_epochs"])
    return seen == course.seen_after(done) and done % epochs == 0


def evaluation_due(seen: int, before: int, total: int, plan: Mapping[str, Any]) -> bool:
    """Whether the checkpoint after so many samples is evaluated; the last of a run with evaluation always is.

    Args:
        seen: Samples until now.
        before: Samples until the checkpoint before.
        total: Samples of the run.
        plan: Of `train_worker`.
    """
    if (evaluate := plan.get("evaluate")) is None:
        return False
    every: int | None = evaluate["every_samples"]
    return not every or seen == total or seen // every > before // every


def checkpoint_name(samples_seen: int) -> str:
    """Of the folder of a checkpoint; no two of a run are equal."""
    return f"{_NAME_PREFIX}{samples_seen:012d}"


def samples_in(checkpoint_name: str) -> int:
    """Samples seen when a checkpoint of this name was taken.

    Raises:
        ValueError: It is not one of ours.
    """
    if not checkpoint_name.startswith(_NAME_PREFIX):
        raise ValueError(f"checkpoint {checkpoint_name} is of an earlier release: give another out")
    return int(checkpoint_name.removeprefix(_NAME_PREFIX))


def _batches(batch_size: int) -> Iterator[tuple[dict[str, Tensor], float]]:
    """This worker's batches of one epoch on its device, each with the seconds it was waited for."""
    shard = ray.train.get_dataset_shard("train")
    batches = iter(shard.iter_torch_batches(batch_size=batch_size, device=get_device(), drop_last=False))
    while True:
        start = time.monotonic()
        try:
            batch = next(batches)
        except StopIteration:
            return
        yield batch, time.monotonic() - start


def _check_positions(positions: Tensor, first: int, size: int) -> None:
    """Refuse what is not this rank's part of the next global batch: a sample would be seen twice or never."""
    if not torch.equal(positions, torch.arange(first, first + size, device=positions.device)):
        raise PositionError(
            f"the feed handed over {len(positions)} samples, {positions.min()} to {positions.max()} of the run, where "
            f"{first} to {first + size - 1} come next"
        )


def _resume(pretraining: CromaPretraining, optimizer: torch.optim.Optimizer, order: Mapping[str, Any]) -> int:
    """Load the newest checkpoint of the run, if any; returns the samples seen."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return 0
    with checkpoint.as_directory() as folder, (Path(folder) / CHECKPOINT_FILE).open("rb") as file:
        saved = load(file)
    load_weights(pretraining, restore_pretraining(saved)[0].state_dict())
    state = saved["training"]
    if changed := list(differences(state["order"], dict(order))):
        raise ValueError(f"the checkpoint is of another order of samples: {'; '.join(changed)}")
    optimizer.load_state_dict(state["optimizer"])
    return int(state["samples_seen"])


def _report(
    pretraining: CromaPretraining,
    normalisation: Normalisation,
    state: dict[str, Any],
    means: dict[str, float],
    *,
    rank: int,
    evaluated: bool,
) -> None:
    """Report the means since the last report, with a checkpoint that is copied while training goes on.

    Every worker takes part.
    """
    checkpoint = None
    if rank == 0:
        # Ray removes the folder when the copy is made.
        folder = tempfile.mkdtemp(prefix="twinlook-")
        with (Path(folder) / CHECKPOINT_FILE).open("wb") as file:
            save(to_checkpoint(pretraining, normalisation, training=state), file)
        checkpoint = Checkpoint.from_directory(folder)
    ray.train.report(
        means,
        checkpoint=checkpoint,
        checkpoint_dir_name=checkpoint_name(state["samples_seen"]),
        checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
        validation=evaluated,
    )


def _forget_losses_after(url: str, seen: int) -> None:
    """Remove what was written of steps whose checkpoint was not finished: they are taken again."""
    losses = Objects.at(url)
    for path in losses.list():
        if int(Path(path).stem) > seen:
            losses.delete(path)


def _write_losses(url: str, steps: list[dict[str, float]], *, rank: int, total: int) -> dict[str, float]:
    """Average steps over the ranks; rank 0 logs them and writes them to a file named by the samples seen.

    Returns:
        Means over the steps.
    """
    names = list(steps[0])
    values = torch.tensor([[step[name] for name in names] for step in steps], dtype=torch.float64)
    if distributed.is_initialized():
        values = values.to(get_device())
        distributed.all_reduce(values)
        values /= distributed.get_world_size()
    averaged = [dict(zip(names, row, strict=True)) for row in values.tolist()]
    means = {name: sum(step[name] for step in averaged) / len(averaged) for name in names}
    if rank == 0:
        seen = int(averaged[-1]["samples"])
        Objects.at(url).put_json(f"{seen:012d}.json", {"steps": averaged, "written_s": time.time()})
        log_to_stderr()
        log.info(
            "%d of %d samples: loss %.3f (contrastive %.3f, optical %.3f, radar %.3f), match %.2f, waited %.0f %%, "
            "%.0f shards in a batch",
            seen, total, means["loss"], means["contrastive"], means["reconstruction_optical"],
            means["reconstruction_radar"], means["match_fraction"],
            100 * means["waited_s"] / (means["waited_s"] + means["step_s"]), means["shards"],
        )  # fmt: skip
        if cause := probable_cause(averaged):
            log.warning("%s", cause)
    return means
