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
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import ray.train
import torch
from ray.train import Checkpoint, CheckpointUploadMode
from ray.train.torch import get_device, prepare_model
from torch import Tensor

from jobs.support.batch_mix import mixed
from jobs.support.cache_watch import CacheWatch
from jobs.support.dealing import TRAINING
from jobs.support.device_feed import as_tensors, device_batches
from jobs.support.device_peaks import peak_of
from jobs.support.fed_ranks import fed_in_total, fed_ranks
from jobs.support.initial_weights import begin_with
from jobs.support.job import log_to_stderr
from jobs.support.nonfinite import RunEndedError, SkippedSteps, forget_after
from jobs.support.preemption import Notice
from jobs.support.representation import measured_health
from jobs.support.step_losses import forget_losses_after, speed_of, step_flops, write_losses
from jobs.support.training_looks import Looks
from model.averaging import WeightAverage
from model.croma import CONFIGS, CromaPretraining, Objective
from model.normalisation import Normalisation
from model.pretrained import load, load_weights, restore_pretraining, save, to_checkpoint
from model.training import NonFiniteError, StepSettings, build_optimizer, learning_rate, train_step
from pipeline.canonical import differences
from pipeline.neighbourhoods import Neighbourhoods
from pipeline.objects import Objects
from pipeline.positions import Course

log = logging.getLogger(__name__)

CHECKPOINT_FILE = "croma.pt"
"""In a Ray Train checkpoint: weights, configuration and normalisation, and what going on needs."""

NEIGHBOURHOODS_FILE = "neighbourhoods.npz"
"""In the directory of a run: `Neighbourhoods` of what is fed."""

_NAME_PREFIX = "samples-"


class PositionError(RuntimeError):
    """The feed handed over other samples than those that come next."""


def train_worker(plan: dict[str, Any]) -> dict[str, int] | None:
    """Train on this worker's share of the feed, from the newest checkpoint of the run if there is one.

    Args:
        plan: Plain values: out (directory of the run), size, epochs, global_batch, num_samples (per epoch), order (what
            decides the order of samples), peak_learning_rate, warmup_fraction, weight_decay, normalisation, step (of
            `StepSettings`), checkpoint_every_samples (or None: at the end of every report_every_epochs), threads,
            losses_url, origin (of the run: store, version, commit), shard_chips (of the stores), window_batches (of
            `SampleOrder`), looks (of `Looks`), nonfinite (of `SkippedSteps`), ema_decay (of `WeightAverage`, or None)
            and from_weights (whether the run begins with weights in its directory); where they differ from the
            defaults, objective (of `Objective`), recompute (activation checkpointing), compile (a backend of
            torch.compile, or off), evaluate (every_samples, or None: every checkpoint; see `evaluation_due`), cache (a
            `ShardCache`), feed (a `Feed`, if workers read themselves) and feed_threads.

    Returns:
        Samples seen and steps skipped when a loss that was not finite ended the run; None when it was trained to its
        end. Said and not raised: what comes again every time is not worth another start of the workers.
    """
    try:
        _train(plan)
    except RunEndedError as ended:
        return {"samples": ended.samples, "skipped": ended.skipped}
    return None


def _train(plan: dict[str, Any]) -> None:
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    if plan["threads"]:
        torch.set_num_threads(plan["threads"])
    torch.manual_seed(plan["step"]["seed"])
    normalisation = Normalisation.from_dict(plan["normalisation"])
    pretraining = _new_model(plan)
    if plan["from_weights"] and rank == 0 and ray.train.get_checkpoint() is None:
        _begin_with(pretraining, plan["out"])
    # Every rank takes rank 0's weights here.
    model = prepare_model(pretraining)
    optimizer = build_optimizer(pretraining, weight_decay=plan["weight_decay"])
    average = WeightAverage(pretraining, decay=plan["ema_decay"]) if plan["ema_decay"] else None
    state = _resume(pretraining, optimizer, average, plan["order"])
    seen = int(state.get("samples_seen", 0))
    if rank == 0:
        forget_losses_after(plan["losses_url"], seen)
        forget_after(Objects.at(plan["out"]), seen)
    course = Course(epoch_samples=plan["num_samples"], global_batch=plan["global_batch"])
    total, size = course.seen_after(plan["epochs"]), plan["global_batch"] // world
    step_settings = StepSettings(**plan["step"])
    model.train()
    looks, notice = Looks(plan["looks"]), Notice()
    cache = CacheWatch(plan.get("cache"))
    skipped = SkippedSteps(plan["nonfinite"], rank=rank, count=int(state.get("skipped", 0)))
    peak, flops = peak_of(get_device()), size * step_flops(plan)
    steps: list[dict[str, float]] = []
    rows: list[Tensor] = []
    where = Neighbourhoods.from_bytes(Objects.at(plan["out"]).get(NEIGHBOURHOODS_FILE))
    own = _own_batches(plan, rank, world, seen)
    began = time.monotonic()
    while seen < total:
        epoch = course.epoch_of(seen)
        num_steps = (course.seen_after(epoch + 1) - seen) // plan["global_batch"]
        for batch, waited_s in islice(own, num_steps) if own else _batches(size, plan["window_batches"]):
            _check_positions(batch["position"], seen + rank * size, size)
            rate = learning_rate(
                seen,
                peak=plan["peak_learning_rate"],
                warmup_samples=int(plan["warmup_fraction"] * total),
                total_samples=total,
            )
            seen += plan["global_batch"]
            try:
                values = train_step(
                    model, batch, optimizer, normalisation=normalisation, settings=step_settings, learning_rate=rate
                )
            except NonFiniteError as error:
                skipped.step(error, batch, seen)
                values = {"skipped": 1.0, "learning_rate": rate}
            else:
                if average:
                    average.update(pretraining, num_samples=plan["global_batch"], seen=seen)
            # What a batch holds may be written over when the next one is asked for.
            rows.append(batch["row"].clone())
            # From step to step: on a GPU the optimizer still works when a step has returned.
            now = time.monotonic()
            speed, began = speed_of(waited_s, now - began - waited_s, size * world, flops, peak), now
            fed = {"fed_bytes": float(sum(each.nbytes for each in batch.values()))}
            steps.append({"samples": seen, "epoch": epoch, **speed, **fed, **values})
            # Every rank asks after every step, also where a checkpoint is due anyhow.
            if notice.is_new() or checkpoint_due(seen, course, plan):
                for name, numbers in mixed(rows, where, plan["shard_chips"]).items():
                    for step, number in zip(steps, numbers, strict=True):
                        step[name] = number
                # Other numbers of samples, and whole images, would be compiled for the few times that they come.
                with torch.compiler.set_stance("force_eager"):
                    health = measured_health(pretraining, batch, normalisation=normalisation, settings=step_settings)
                    if rank == 0:
                        shown = average.model if average else pretraining
                        looks.write(shown, normalisation, seen, last=seen == total)
                steps[-1] |= health
                cached = cache.since_last(say=context.get_local_rank() == 0)
                ranks = fed_ranks(steps, cached, samples=size)
                means = write_losses(plan["losses_url"], steps, ranks, rank=rank, total=total)
                means |= {**fed_in_total(ranks), **cached}
                facts = {name: plan[name] for name in ("order", "origin", "ema_decay")}
                state = {"optimizer": optimizer.state_dict(), "samples_seen": seen, "skipped": skipped.count, **facts}
                if average:
                    state["average"] = average.state_dict()
                evaluated = evaluation_due(seen, seen - len(steps) * plan["global_batch"], total, plan)
                _report(pretraining, normalisation, state, means, rank=rank, evaluated=evaluated)
                steps, rows = [], []
                began = time.monotonic()
        if seen != course.seen_after(epoch + 1):
            raise PositionError(f"epoch {epoch} ended after {seen} samples instead of {course.seen_after(epoch + 1)}")


def _begin_with(pretraining: CromaPretraining, out: str) -> None:
    """Load the weights that the run begins with, and say what they lack."""
    random = begin_with(pretraining, Objects.at(out))
    log_to_stderr()
    log.info("began with the weights given%s", f", but for {', '.join(random)}: random" if random else "")


def _new_model(plan: Mapping[str, Any]) -> CromaPretraining:
    """With weights as they begin."""
    pretraining = CromaPretraining(CONFIGS[plan["size"]], Objective(**plan.get("objective", {})))
    pretraining.croma.recompute_activations(plan.get("recompute", False))
    if (backend := plan.get("compile", "off")) != "off":
        pretraining.compile_layers(backend)
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


def _batches(batch_size: int, block_batches: int) -> Iterator[tuple[dict[str, Tensor], float]]:
    """This worker's batches of one epoch on its device, each with the seconds it was waited for."""
    start = time.monotonic()
    shard, device = ray.train.get_dataset_shard(TRAINING), get_device()
    # The next block is on its way while the batches of one are learnt from.
    how = {"batch_size": batch_size, "prefetch_batches": block_batches, "drop_last": False}
    batches: Iterator[dict[str, Tensor]]
    if device.type == "cpu":
        # As they lie in the object store.
        batches = map(as_tensors, shard.iter_batches(batch_format="numpy", **how))
    else:
        batches = iter(shard.iter_torch_batches(device=device, **how))
    while (batch := next(batches, None)) is not None:
        yield batch, time.monotonic() - start
        start = time.monotonic()


def _own_batches(
    plan: Mapping[str, Any], rank: int, world: int, seen: int
) -> Iterator[tuple[dict[str, Tensor], float]] | None:
    """This worker's batches of the whole run, if it reads the store itself."""
    if plan.get("feed") is None:
        return None
    feed, threads = replace(plan["feed"], ranks=world), plan["feed_threads"]
    return device_batches(feed, rank=rank, seen=seen, epochs=plan["epochs"], threads=threads, device=get_device())


def _check_positions(positions: Tensor, first: int, size: int) -> None:
    """Refuse what is not this rank's part of the next global batch: a sample would be seen twice or never."""
    if not torch.equal(positions, torch.arange(first, first + size, device=positions.device)):
        raise PositionError(
            f"the feed handed over {len(positions)} samples, {positions.min()} to {positions.max()} of the run, where "
            f"{first} to {first + size - 1} come next"
        )


def _resume(
    pretraining: CromaPretraining,
    optimizer: torch.optim.Optimizer,
    average: WeightAverage | None,
    order: Mapping[str, Any],
) -> dict[str, Any]:
    """Load the newest checkpoint of the run, if any; returns its state, which is empty where there is none."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return {}
    with checkpoint.as_directory() as folder, (Path(folder) / CHECKPOINT_FILE).open("rb") as file:
        saved = load(file)
    load_weights(pretraining, restore_pretraining(saved)[0].state_dict())
    state: dict[str, Any] = saved["training"]
    if changed := list(differences(state["order"], dict(order))):
        raise ValueError(f"the checkpoint is of another order of samples: {'; '.join(changed)}")
    optimizer.load_state_dict(state["optimizer"])
    if average:
        average.load_state_dict(state["average"])
    return state


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
