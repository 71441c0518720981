"""What pretraining would take: time, money, memory and what the feed has to bring; arithmetic on a plan.

What is counted, what was read from the store just now, and what is assumed are told apart in every line.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from pydantic import Field

from jobs.support import words
from jobs.support.feed_rate import FeedRate, measure_feed
from jobs.support.pretraining import TrainingPlan
from jobs.support.settings import Group
from jobs.support.worker_counts import worker_counts
from model.croma import CONFIGS, Objective
from model.flops import TRAINING_FACTOR, pretraining_flops
from model.memory import TrainingMemory, training_memory
from pipeline.fed_chips import FedChips

log = logging.getLogger(__name__)

DEVICE_BYTES: Final = 2e9
"""What the driver, libraries and the allocator's cuttings take of a GPU on top; a guess, not measured."""

MEMORY_FACTOR: Final = 1.5
"""What was counted and what a step took on a CPU differ by no more than this, in either direction."""

CHECKPOINT_BYTES: Final = 12
"""Of a parameter: its weight and two moments, in float32; 4 more with an average of the weights."""


class Assumptions(Group):
    """What a dry run cannot know; nothing of it changes a run."""

    samples_per_s: float | None = Field(default=None, gt=0)
    """Samples per second and GPU, where somebody has measured it; unset: from the peak and the share of it."""

    peak_tflops: float = Field(default=989.0, gt=0)
    """Of a GPU in dense bfloat16, 10^12 operations per second; 989 is an H100's data sheet, 312 an A100's."""

    peak_share: float = Field(default=0.3, gt=0, le=1)
    """Fraction of the peak that training reaches. Steps of base on an H200 reached 0.26, with compile=inductor 0.31."""

    usd_per_gpu_hour: float = Field(default=3.0, ge=0)
    """Price of a GPU for an hour; an order of magnitude, not an offer."""

    gpu_gb: float = Field(default=80.0, gt=0)
    """Memory of a GPU, 10^9 bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingEstimate:
    """What a run would take."""

    steps: int
    epochs: int
    samples: int
    """Seen over all epochs, some of them many times."""

    sample_flops: int
    """Of the model's own work on a sample, forward and backward."""

    repeated_flops: int
    """What gradient caching and activation checkpointing compute a second time, of a sample."""

    samples_per_s: float | None
    """Per worker; None where nothing is known: on CPUs nobody has said how fast they are."""

    measured: bool
    """Whether somebody gave that rate; else it is a share of the peak."""

    num_workers: int
    memory: TrainingMemory
    on_gpus: bool
    checkpoint_bytes: int
    sample_bytes: int
    """Of a sample as it travels to a worker."""

    crops_per_chip: int
    feed: FeedRate

    @property
    def hours(self) -> float | None:
        """From the first step to the last, if the feed keeps up."""
        rate = self.rate
        return None if rate is None else self.samples / rate / 3600

    @property
    def rate(self) -> float | None:
        """Samples per second of all workers."""
        return None if self.samples_per_s is None else self.samples_per_s * self.num_workers

    @property
    def readers(self) -> float | None:
        """CPUs that have to read, at the rate of the one that was tried."""
        return None if self.rate is None else self.rate / self.feed.samples_per_s


def say_estimate(plan: TrainingPlan) -> TrainingEstimate:
    """Read a shard or two of the store, and say on the log what the run would take."""
    source = FedChips(plan.feed)
    found = training_estimate(
        plan.settings,
        samples_per_epoch=plan.num_samples,
        sample_bytes=source.sample_bytes(),
        window_px=plan.feed.crop_px,
        feed=measure_feed(plan.feed, source.rows),
    )
    for line in training_estimate_lines(found, Assumptions(**plan.settings["assume"])):
        log.info("%s", line)
    return found


def training_estimate(
    settings: Mapping[str, Any],
    *,
    samples_per_epoch: int,
    sample_bytes: int,
    window_px: int,
    feed: FeedRate,
) -> TrainingEstimate:
    """Reckon a run.

    Args:
        settings: Of `pretrain`, as plain values.
        samples_per_epoch: That are trained on.
        sample_bytes: Of a sample as the feed sends it.
        window_px: Side of what is read of a chip.
        feed: What the store gave when it was tried.
    """
    assumed = Assumptions(**settings["assume"])
    config, objective = CONFIGS[settings["size"]], Objective(**settings["objective"])
    workers = worker_counts(settings["num_workers"]).most
    batch = settings["global_batch"] // workers
    on_gpus = settings["use_gpu"] is not False
    num_patches = (settings["crop_px"] // config.patch_px) ** 2
    counted = {"mask_fraction": settings["mask_fraction"], "num_contrasted": settings["global_batch"]}
    forward = pretraining_flops(config, num_patches, objective=objective, **counted)
    repeated = forward if settings["recompute_activations"] else 0
    if (settings["micro_batch"] or batch) < batch and objective.contrastive_weight:
        repeated += pretraining_flops(config, num_patches, objective=Objective(reconstruction_weight=0.0), **counted)
    rate = assumed.samples_per_s
    if rate is None and on_gpus:
        rate = assumed.peak_tflops * 1e12 * assumed.peak_share / (TRAINING_FACTOR * forward + repeated)
    memory = training_memory(
        config,
        image_px=settings["crop_px"],
        batch=batch,
        micro_batch=settings["micro_batch"],
        num_ranks=workers,
        mask_fraction=settings["mask_fraction"],
        objective=objective,
        bfloat16=settings["precision"] == "bfloat16" or (settings["precision"] == "auto" and on_gpus),
        recompute=settings["recompute_activations"],
        window_px=window_px,
        sample_bytes=sample_bytes,
        averaged=settings["ema_decay"] is not None,
    )
    return TrainingEstimate(
        steps=settings["epochs"] * samples_per_epoch // settings["global_batch"],
        epochs=settings["epochs"],
        samples=settings["epochs"] * samples_per_epoch // settings["global_batch"] * settings["global_batch"],
        sample_flops=TRAINING_FACTOR * forward,
        repeated_flops=repeated,
        samples_per_s=rate,
        measured=assumed.samples_per_s is not None,
        num_workers=workers,
        memory=memory,
        on_gpus=on_gpus,
        checkpoint_bytes=memory.optimizer // 8 * (CHECKPOINT_BYTES + (4 if settings["ema_decay"] else 0)),
        sample_bytes=sample_bytes,
        crops_per_chip=settings["crops_per_chip"],
        feed=feed,
    )


def training_estimate_lines(found: TrainingEstimate, assumed: Assumptions) -> Iterator[str]:
    """An estimate in words, a line each."""
    yield f"{found.steps} steps in {found.epochs} epochs; {words.count(found.samples)} samples seen in all"
    again = f", and {found.repeated_flops / 1e9:.0f} repeated to save memory" if found.repeated_flops else ""
    total = f"{found.samples * found.sample_flops:.2e} FLOP in all"
    yield f"{found.sample_flops / 1e9:.3g} GFLOP per sample{again}; {total} (counted)"
    yield from _time_lines(found, assumed)
    yield from _memory_lines(found, assumed)
    yield f"a checkpoint about {words.size(found.checkpoint_bytes)}"
    yield from _feed_lines(found)


def _time_lines(found: TrainingEstimate, assumed: Assumptions) -> Iterator[str]:
    if found.samples_per_s is None or found.hours is None:
        yield "how long on CPUs: unknown; say assume.samples_per_s, of one worker, as the log of a run shows it"
        return
    unit = "GPU" if found.on_gpus else "worker"
    how = (
        "given as assume.samples_per_s"
        if found.measured
        else f"ASSUMED: {assumed.peak_share:.0%} of {assumed.peak_tflops:g} TFLOP/s; base reached 26% "
        "on one H200, compiled 31%"
    )
    yield f"{found.samples_per_s:.0f} samples/s per {unit} ({how})"
    unit_hours, plural = found.hours * found.num_workers, "s" if found.num_workers > 1 else ""
    money = f", about {unit_hours * assumed.usd_per_gpu_hour:,.0f} USD at {assumed.usd_per_gpu_hour:g} USD an hour"
    yield (
        f"about {words.duration(found.hours * 3600)} on {found.num_workers} {unit}{plural}, "
        f"{unit_hours:,.1f} {unit}-hours{money if found.on_gpus else ''}, if the feed keeps up and nothing is lost"
    )


def _memory_lines(found: TrainingEstimate, assumed: Assumptions) -> Iterator[str]:
    memory, there = found.memory, assumed.gpu_gb * 1e9
    states = memory.parameters + memory.gradients + memory.optimizer
    yield (
        f"memory per worker about {words.size(memory.total)}: {words.size(states)} weights, gradients and AdamW, "
        f"{words.size(memory.activations)} activations, {words.size(memory.inputs + memory.contrast)} inputs and "
        f"similarities (counted; right within 5% for base on one H200, within a factor of {MEMORY_FACTOR:g} on CPUs)"
    )
    needed = memory.total + DEVICE_BYTES
    if found.on_gpus and needed > there:
        yield (
            f"that is more than a GPU of {assumed.gpu_gb:g} GB has, with {words.size(DEVICE_BYTES)} for its driver: "
            "lower micro_batch, or set recompute_activations"
        )


def _feed_lines(found: TrainingEstimate) -> Iterator[str]:
    feed = found.feed
    yield (
        f"read just now {feed.shards} shard{'s' if feed.shards > 1 else ''}, {words.size(feed.num_bytes)}, at "
        f"{words.size(feed.bytes_per_s)}/s (cached by the system, perhaps); one CPU reads, decodes and crops "
        f"{feed.samples_per_s:.0f} samples/s (measured)"
    )
    if found.rate is None or found.readers is None:
        return
    stored = found.rate * feed.chip_bytes / found.crops_per_chip
    yield (
        f"the feed has to bring {found.rate:.0f} samples/s: {words.size(found.rate * found.sample_bytes)}/s to the "
        f"workers, {words.size(stored)}/s from the store, and about {found.readers:.0f} CPUs like this one to read"
    )
    if stored > feed.bytes_per_s:
        yield (
            f"that is {stored / feed.bytes_per_s:.1f} times what one reader got: many read at once, but see that the "
            "storage gives it, or raise crops_per_chip"
        )
