"""What steps are like: averaged over ranks, on the log, and in files that the report and the next start read."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from ray.train.torch import get_device
from torch import distributed

from jobs.support.fed_ranks import fed_in_total, said_waiting
from jobs.support.job import log_to_stderr
from jobs.support.representation import said_health
from jobs.support.waiting import probable_cause
from jobs.support.words import size
from model.croma import CONFIGS, Objective
from model.flops import TRAINING_FACTOR, pretraining_flops
from pipeline.objects import Objects

log = logging.getLogger(__name__)


def step_flops(plan: Mapping[str, Any]) -> int:
    """Operations of a training step per sample, as they count for a share of the peak; `plan` of the training loop."""
    config = CONFIGS[plan["size"]]
    forward = pretraining_flops(
        config,
        (plan["looks"]["crop_px"] // config.patch_px) ** 2,
        mask_fraction=plan["step"]["mask_fraction"],
        num_contrasted=plan["global_batch"],
        objective=Objective(**plan.get("objective", {})),
    )
    return TRAINING_FACTOR * forward


def speed_of(waited_s: float, step_s: float, samples: int, flops: int, peak: float | None) -> dict[str, float]:
    """Of a step: times, samples per second of all ranks, and the share of this device's peak where that is known."""
    took_s = max(waited_s + step_s, 1e-9)
    share = {"peak_share": flops / took_s / peak} if peak else {}
    return {"waited_s": waited_s, "step_s": step_s, "samples_per_s": samples / took_s, **share}


def forget_losses_after(url: str, seen: int) -> None:
    """Remove what was written of steps whose checkpoint was not finished: they are taken again."""
    losses = Objects.at(url)
    for path in losses.list():
        if int(Path(path).stem) > seen:
            losses.delete(path)


def write_losses(
    url: str, steps: Sequence[Mapping[str, float]], ranks: Sequence[Mapping[str, float]], *, rank: int, total: int
) -> dict[str, float]:
    """Average steps over the ranks; rank 0 logs them and writes them to a file named by the samples seen.

    Args:
        url: Directory of the losses.
        steps: This rank's since the last report.
        ranks: What each was fed, of `jobs.support.fed_ranks`.
        rank: This one.
        total: Samples of the run.

    Returns:
        Means over the steps that have a value; of skipped steps, their number.
    """
    names = list(dict.fromkeys(name for step in steps for name in step))
    values = torch.tensor([[step.get(name, math.nan) for name in names] for step in steps], dtype=torch.float64)
    if distributed.is_initialized():
        values = values.to(get_device())
        distributed.all_reduce(values)
        values /= distributed.get_world_size()
    # What a step does not have, it has on no rank.
    rows = [dict(zip(names, row, strict=True)) for row in values.tolist()]
    averaged = [{name: value for name, value in row.items() if not math.isnan(value)} for row in rows]
    found = {name: [step[name] for step in averaged if name in step] for name in names}
    means = {name: sum(each) / len(each) for name, each in found.items() if each}
    if "skipped" in found:
        means["skipped"] = sum(found["skipped"])
    if rank == 0:
        seen = int(averaged[-1]["samples"])
        Objects.at(url).put_json(
            f"{seen:012d}.json", {"steps": averaged, "ranks": list(ranks), "written_s": time.time()}
        )
        log_to_stderr()
        log.info("%d of %d samples: %s", seen, total, _said(means, ranks))
        if cause := probable_cause(averaged):
            log.warning("%s", cause)
    return means


def _said(means: Mapping[str, float], ranks: Sequence[Mapping[str, float]]) -> str:
    """A report in words."""
    parts = []
    if "loss" in means:
        parts += [
            f"loss {means['loss']:.3f} (contrastive {means['contrastive']:.3f}, optical "
            f"{means['reconstruction_optical']:.3f}, radar {means['reconstruction_radar']:.3f})",
            f"match {means['match_fraction']:.2f}",
            f"gradient {means['gradient_norm']:.3g}",
            f"temperature {means['temperature']:.3g}",
        ]
    parts.append(f"learning rate {means['learning_rate']:.3g}")
    peak = f" ({means['peak_share']:.0%} of the peak)" if "peak_share" in means else ""
    parts.append(f"{means['samples_per_s']:.3g} samples/s{peak}")
    parts.append(f"{size(fed_in_total(ranks)['bytes_per_s'])}/s")
    parts.append(said_waiting(ranks))
    parts.append(f"{means['shards']:.0f} shards and {means['blocks']:.0f} blocks of cells in a batch")
    parts += said_health(means)
    if "skipped" in means:
        parts.append(f"{means['skipped']:.0f} steps skipped, not finite")
    return ", ".join(parts)
