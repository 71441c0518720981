"""CROMA against torchgeo's and against the reference's step as it reads, on two CPU threads: time, then memory.

Time is measured interleaved in one process, memory in a process for each. The inference part needs torchgeo's
wheel in TORCHGEO_WHEEL (`pip download --no-deps torchgeo==0.8.1`).

Example:
    TORCHGEO_WHEEL=torchgeo-0.8.1-py3-none-any.whl python -m tests.bench_model
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from model.alibi import grid_bias
from model.croma import BASE, REFERENCE_OBJECTIVE, Croma, CromaPretraining
from model.masking import draw_masks
from model.normalisation import SSL4EO_S12
from model.preprocessing import prepare
from model.released import from_torchgeo
from tests import plain_croma
from tests.torchgeo_croma import load_torchgeo

THREADS = 2
INFERENCE = {120: (2, 5), 168: (2, 5), 240: (1, 5), 504: (1, 3)}
"""Image side in px -> samples in a batch, and rounds."""

PRETRAINING_BATCH = 8
PRETRAINING_ROUNDS = 5

Ways = dict[str, Callable[[], object]]


def inference(size_px: int, samples: int, only: str | None = None) -> Ways:
    """Forward passes of base with both sensors."""
    optical, radar = torch.rand(samples, 12, size_px, size_px), torch.rand(samples, 2, size_px, size_px)
    if only == "ours":
        croma = Croma(BASE).eval()
        return {"ours": torch.inference_mode()(lambda: croma(optical, radar))}
    torchgeo = load_torchgeo(os.environ["TORCHGEO_WHEEL"])
    # Its own takes minutes at 504 px, and is not what is compared.
    torchgeo.get_2dalibi = lambda num_heads, num_patches: grid_bias(
        round(num_patches**0.5), round(num_patches**0.5), num_heads, torch.device("cpu")
    )
    theirs = torchgeo.CROMA(image_size=size_px, encoder_dim=768, encoder_depth=12, num_heads=16).eval()
    ways: Ways = {"torchgeo": torch.inference_mode()(lambda: theirs(radar, optical))}
    if only is None:
        croma = from_torchgeo(theirs.state_dict())
        ways["ours"] = torch.inference_mode()(lambda: croma(optical, radar))
    return ways


def pretraining(only: str | None = None) -> Ways:
    """Forward and backward passes of base at 120 px with 56 visible patches; no optimizer."""
    model = CromaPretraining(BASE, REFERENCE_OBJECTIVE)
    optical, radar = torch.rand(PRETRAINING_BATCH, 12, 120, 120), torch.rand(PRETRAINING_BATCH, 2, 120, 120)
    masks = draw_masks(torch.arange(PRETRAINING_BATCH), 225)

    def step(losses: Callable[[], torch.Tensor]) -> None:
        model.zero_grad()
        losses().backward()

    ways: Ways = {
        "as it reads": lambda: step(lambda: sum(plain_croma.losses(model, optical, radar, masks))),
        "ours": lambda: step(lambda: model(optical, radar, masks).total),
    }
    return ways if only is None else {only: ways[only]}


def preprocessing() -> Ways:
    """From a batch of the store's integers to normalised and turned input, beside the step it belongs to."""
    size = PRETRAINING_BATCH
    batch = {
        "b10": torch.randint(1, 5000, (size, 4, 120, 120)).to(torch.uint16),
        "b20": torch.randint(1, 5000, (size, 6, 60, 60)).to(torch.uint16),
        "b60": torch.randint(1, 5000, (size, 2, 20, 20)).to(torch.uint16),
        "radar": torch.randint(-3000, 0, (size, 2, 120, 120)).to(torch.int16),
    }
    return {"preparing": lambda: prepare(batch, SSL4EO_S12, keys=torch.arange(size)), **pretraining("ours")}


def timed(ways: Ways, rounds: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Wall and CPU seconds of each way, round by round, after one that does not count."""
    wall: dict[str, list[float]] = {name: [] for name in ways}
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    for count in range(rounds + 1):
        for name, way in ways.items():
            start, busy = time.perf_counter(), time.process_time()
            way()
            if count:
                wall[name].append(time.perf_counter() - start)
                cpu[name].append(time.process_time() - busy)
    return wall, cpu


def report(title: str, ways: Ways, rounds: int) -> None:
    wall, cpu = timed(ways, rounds)
    theirs, ours = ways
    ratios = sorted(a / b for a, b in zip(cpu[theirs], cpu[ours], strict=True))
    of_wall = statistics.median(a / b for a, b in zip(wall[theirs], wall[ours], strict=True))
    seconds = {name: statistics.median(values) for name, values in cpu.items()}
    say(
        f"{title:34} {seconds[theirs]:9.2f} {seconds[ours]:9.2f} {statistics.median(ratios):7.2f}"
        f" ({ratios[0]:.2f}-{ratios[-1]:.2f}) {of_wall:7.2f}"
    )


def peak_bytes(make: Callable[..., Ways], arguments: tuple[object, ...]) -> int:
    """Most memory that a fresh process needs for one call, over what it holds with model and input made."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_bytes, (make, arguments))


def _peak_bytes(make: Callable[..., Ways], arguments: tuple[object, ...]) -> int:
    torch.set_num_threads(THREADS)
    (way,) = make(*arguments).values()
    # Making the model leaves a peak behind; what is held now is what counts.
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    Path("/proc/self/clear_refs").write_text("5")
    way()
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(peak.split()[1]) * 1024 - resident


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> None:
    """Measure what the arguments name (inference, 504, pretraining, preprocessing, memory), or all."""
    torch.set_num_threads(THREADS)
    wanted = set(sys.argv[1:]) or {"inference", "504", "pretraining", "preprocessing", "memory"}
    with_torchgeo = "TORCHGEO_WHEEL" in os.environ
    if not with_torchgeo:
        say("no TORCHGEO_WHEEL: nothing to compare inference with")
        wanted -= {"inference", "504"}
    say(f"{'CPU seconds':34} {'theirs':>9} {'ours':>9} {'CPU ratio (range)':>19} {'wall':>7}")
    for size_px, (samples, rounds) in INFERENCE.items():
        if ("504" if size_px == 504 else "inference") in wanted:
            report(f"forward, base, {size_px} px, batch {samples}", inference(size_px, samples), rounds)
    if "pretraining" in wanted:
        report(f"step, base, 120 px, batch {PRETRAINING_BATCH}", pretraining(), PRETRAINING_ROUNDS)
    if "preprocessing" in wanted:
        report("preparing a batch | its step", preprocessing(), PRETRAINING_ROUNDS)
    if "memory" in wanted:
        say(f"{'peak MiB over model and input':34} {'theirs':>9} {'ours':>9}")
        for size_px, (samples, _) in INFERENCE.items() if with_torchgeo else ():
            theirs, ours = (peak_bytes(inference, (size_px, samples, name)) for name in ("torchgeo", "ours"))
            say(f"{f'forward, base, {size_px} px, batch {samples}':34} {theirs / 2**20:9.0f} {ours / 2**20:9.0f}")
        theirs, ours = (peak_bytes(pretraining, (name,)) for name in ("as it reads", "ours"))
        say(f"{f'step, base, 120 px, batch {PRETRAINING_BATCH}':34} {theirs / 2**20:9.0f} {ours / 2**20:9.0f}")


if __name__ == "__main__":
    main()
