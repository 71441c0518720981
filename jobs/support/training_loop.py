"""What each Ray Train worker runs: batches in, steps, reports with checkpoints out."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray.train
import torch
from ray.train import Checkpoint
from ray.train.torch import get_device, prepare_model
from torch import distributed

from jobs.support.job import log_to_stderr
from jobs.support.training_looks import Looks
from jobs.support.waiting import probable_cause
from model.croma import CONFIGS, CromaPretraining, Objective
from model.normalisation import Normalisation
from model.pretrained import load, load_weights, restore_pretraining, save, to_checkpoint
from model.training import StepSettings, build_optimizer, learning_rate, train_step
from pipeline.objects import Objects

log = logging.getLogger(__name__)

CHECKPOINT_FILE = "croma.pt"
"""In a Ray Train checkpoint: weights, configuration and normalisation, and what going on needs."""


def train_worker(plan: dict[str, Any]) -> None:
    """Train on this worker's share of the feed, from the newest checkpoint of the run if there is one.

    Args:
        plan: Plain values: size, epochs, global_batch, num_samples (per epoch), peak_learning_rate, warmup_fraction,
            weight_decay, normalisation, step (of `StepSettings`), report_every_epochs, threads, losses_url,
            shard_chips (of the store), looks (of `Looks`); where they differ from the defaults, objective (of
            `Objective`), recompute (activation checkpointing) and compile (a backend of torch.compile, or off).
    """
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    if plan["threads"]:
        torch.set_num_threads(plan["threads"])
    torch.manual_seed(plan["step"]["seed"])
    normalisation = Normalisation.from_dict(plan["normalisation"])
    pretraining = CromaPretraining(CONFIGS[plan["size"]], Objective(**plan.get("objective", {})))
    pretraining.croma.recompute_activations(plan.get("recompute", False))
    if (backend := plan.get("compile", "off")) != "off":
        # In place: a wrapper would give the weights other names.
        pretraining.compile(backend=backend)
    model = prepare_model(pretraining)
    optimizer = build_optimizer(pretraining, weight_decay=plan["weight_decay"])
    first_epoch, samples_seen = _resume(pretraining, optimizer)
    if first_epoch and rank == 0:
        log.info("going on after epoch %d, %d samples seen", first_epoch, samples_seen)
    total = plan["epochs"] * plan["num_samples"]
    step_settings = StepSettings(**plan["step"])
    model.train()
    looks = Looks(plan["looks"])
    steps: list[dict[str, float]] = []
    for epoch in range(first_epoch, plan["epochs"]):
        for batch, waited_s in _batches(plan["global_batch"] // world):
            start = time.monotonic()
            rate = learning_rate(
                samples_seen,
                peak=plan["peak_learning_rate"],
                warmup_samples=int(plan["warmup_fraction"] * total),
                total_samples=total,
            )
            values = train_step(
                model,
                batch,
                optimizer,
                normalisation=normalisation,
                settings=step_settings,
                epoch=epoch,
                learning_rate=rate,
            )
            samples_seen += plan["global_batch"]
            shards = (batch["row"] // plan["shard_chips"]).unique().numel()
            elapsed = time.monotonic() - start
            feed = {"waited_s": waited_s, "step_s": elapsed, "shards": shards}
            steps.append({"samples": samples_seen, "epoch": epoch, **feed, **values})
        done = epoch + 1
        if done % plan["report_every_epochs"] == 0 or done == plan["epochs"]:
            means = _write_losses(plan["losses_url"], steps, rank=rank, total=total)
            if rank == 0:
                looks.write(pretraining, normalisation, samples_seen, last=done == plan["epochs"])
            state = {"optimizer": optimizer.state_dict(), "epochs_done": done, "samples_seen": samples_seen}
            _report(pretraining, normalisation, state, means, rank=rank)
            steps = []


def _batches(batch_size: int) -> Iterator[tuple[dict[str, torch.Tensor], float]]:
    """This worker's batches of one epoch on its device, each with the seconds it was waited for."""
    shard = ray.train.get_dataset_shard("train")
    batches = iter(shard.iter_torch_batches(batch_size=batch_size, device=get_device(), drop_last=True))
    while True:
        start = time.monotonic()
        try:
            batch = next(batches)
        except StopIteration:
            return
        yield batch, time.monotonic() - start


def _resume(pretraining: CromaPretraining, optimizer: torch.optim.Optimizer) -> tuple[int, int]:
    """Load the newest checkpoint of the run, if any: epochs done and samples seen."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return 0, 0
    with checkpoint.as_directory() as folder, (Path(folder) / CHECKPOINT_FILE).open("rb") as file:
        saved = load(file)
    load_weights(pretraining, restore_pretraining(saved)[0].state_dict())
    state = saved["training"]
    optimizer.load_state_dict(state["optimizer"])
    return int(state["epochs_done"]), int(state["samples_seen"])


def _report(
    pretraining: CromaPretraining,
    normalisation: Normalisation,
    state: dict[str, Any],
    means: dict[str, float],
    *,
    rank: int,
) -> None:
    """Report the means since the last report, with a checkpoint; every worker takes part."""
    name = f"epoch-{state['epochs_done']:05d}"
    if rank:
        ray.train.report(means, checkpoint=None, checkpoint_dir_name=name)
        return
    with tempfile.TemporaryDirectory(prefix="twinlook-") as folder:
        with (Path(folder) / CHECKPOINT_FILE).open("wb") as file:
            save(to_checkpoint(pretraining, normalisation, training=state), file)
        ray.train.report(means, checkpoint=Checkpoint.from_directory(folder), checkpoint_dir_name=name)


def _write_losses(url: str, steps: list[dict[str, float]], *, rank: int, total: int) -> dict[str, float]:
    """Average steps over the ranks; rank 0 logs them and writes them to a file named by the samples seen.

    A resumed run that comes by the same samples again replaces the file.

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
        Objects.at(url).put_json(f"{seen:012d}.json", {"steps": averaged})
        log_to_stderr()
        log.info(
            "%d of %d samples: loss %.3f (contrastive %.3f, optical %.3f, radar %.3f), match %.2f, waited %.0f %%, "
            "%.0f shards in a batch of a worker",
            seen, total, means["loss"], means["contrastive"], means["reconstruction_optical"],
            means["reconstruction_radar"], means["match_fraction"],
            100 * means["waited_s"] / (means["waited_s"] + means["step_s"]), means["shards"],
        )  # fmt: skip
        if cause := probable_cause(averaged):
            log.warning("%s", cause)
    return means
