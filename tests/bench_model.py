"""CROMA against torchgeo's and against the reference's step as it reads, on two CPU threads: time and memory.

Time is measured interleaved in one process, memory in a process for each. The inference part needs torchgeo's
wheel in TORCHGEO_WHEEL (`pip download --no-deps torchgeo==0.8.1`). `gpu` alone measures on the GPU at hand, see
`tests/bench_device.py`.

Example:
    TORCHGEO_WHEEL=torchgeo-0.8.1-py3-none-any.whl python -m tests.bench_model
    python -m tests.bench_model gpu base
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from model.alibi import grid_bias
from model.augmentation import PAPER_SIDES_PX
from model.croma import BASE, REFERENCE_OBJECTIVE, Croma, CromaPretraining
from model.flops import inference_flops
from model.masking import draw_masks
from model.normalisation import SSL4EO_S12
from model.released import from_torchgeo
from model.training import StepSettings, pretraining_inputs
from tests import bench_device, plain_croma
from tests.torchgeo_croma import load_torchgeo

THREADS = 2
INFERENCE = {120: (2, 11, 1.1), 168: (2, 11, 1.4), 240: (1, 9, 2.0), 504: (1, 5, 3.0)}
"""Image side in px -> samples in a batch, rounds, and how many times torchgeo's speed is aimed at."""

PRETRAINING_BATCH = 8
PRETRAINING_ROUNDS = 11

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
    ways: Ways = {"theirs": torch.inference_mode()(lambda: theirs(radar, optical))}
    if only is None:
        croma, _ = from_torchgeo(theirs.state_dict())
        ways["ours"] = torch.inference_mode()(lambda: croma(optical, radar))
        ways["products"] = products(size_px, samples)
    return ways


def products(size_px: int, samples: int) -> Callable[[], object]:
    """Matrix products of one shape, as many as a pass has operations, and nothing else: no pass takes less."""
    rows, width = samples * (size_px // BASE.patch_px) ** 2, BASE.width
    count = round(samples * inference_flops(BASE, (size_px // BASE.patch_px) ** 2) / (2 * rows * width * 4 * width))
    tokens, into = torch.rand(rows, width), torch.empty(rows, 4 * width)
    # Out of the cache by the time they are used again, as a model's are.
    weights = torch.rand(BASE.optical_depth, width, 4 * width)

    def multiply() -> None:
        for number in range(count):
            torch.mm(tokens, weights[number % len(weights)], out=into)

    return multiply


def pretraining(only: str | None = None) -> Ways:
    """Forward and backward passes of base at 120 px with 56 visible patches; no optimizer."""
    model = CromaPretraining(BASE, REFERENCE_OBJECTIVE)
    optical, radar = torch.rand(PRETRAINING_BATCH, 12, 120, 120), torch.rand(PRETRAINING_BATCH, 2, 120, 120)
    masks = draw_masks(torch.arange(PRETRAINING_BATCH), 225)

    def step(losses: Callable[[], torch.Tensor]) -> None:
        model.zero_grad()
        losses().backward()

    ways: Ways = {
        "theirs": lambda: step(lambda: sum(plain_croma.losses(model, optical, radar, masks))),
        "ours": lambda: step(lambda: model(optical, radar, masks).total),
    }
    return ways if only is None else {only: ways[only]}


def preprocessing(scale: bool) -> Ways:
    """From a batch of the store's integers to normalised, turned and masked input, beside the step it belongs to."""
    settings = StepSettings(seed=0, scale_sides_px=PAPER_SIDES_PX if scale else None)
    batch = bench_device.batch_of(PRETRAINING_BATCH, 180 if scale else 120, torch.device("cpu"))
    prepare = partial(pretraining_inputs, patch_px=8, normalisation=SSL4EO_S12, settings=settings)
    return {"preparing": lambda: prepare(batch), **pretraining("ours")}


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


def report(
    title: str, make: Callable[..., Ways], arguments: tuple[object, ...], rounds: int, aim: float | None = None
) -> None:
    """One line: seconds of both, their ratio and what is aimed at, then the memory of each.

    Of the inference part also the ratio that products alone would reach.
    """
    ways = make(*arguments)
    (theirs, ours, *others), (wall, cpu) = ways, timed(ways, rounds)
    del ways

    def ratios_to(name: str, of: dict[str, list[float]]) -> list[float]:
        return sorted(a / b for a, b in zip(of[theirs], of[name], strict=True))

    ratios, of_wall = ratios_to(ours, cpu), statistics.median(ratios_to(ours, wall))
    most = "".join(f"; {name} alone {statistics.median(ratios_to(name, cpu)):.2f}" for name in others)
    seconds = {name: statistics.median(values) for name, values in cpu.items()}
    aimed = "" if aim is None else f">= {aim}"
    compared = theirs == "theirs"
    held = [f"{peak_bytes(make, (*arguments, name)) / 2**20:9.0f}" for name in ("theirs", "ours") if compared]
    say(
        f"{title:34} {seconds[theirs]:9.2f} {seconds[ours]:9.2f} {statistics.median(ratios):7.2f}"
        f" ({ratios[0]:.2f}-{ratios[-1]:.2f}) {aimed:>7} {of_wall:7.2f} {' '.join(held)}{most}"
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
    """Measure what the arguments name (inference, 504, pretraining, preprocessing), or all; or gpu [base] [large]."""
    wanted = set(sys.argv[1:]) or {"inference", "504", "pretraining", "preprocessing"}
    if "gpu" in wanted:
        bench_device.main([size for size in ("base", "large") if size in wanted or len(wanted) == 1])
        return
    torch.set_num_threads(THREADS)
    if not Path(os.environ.get("TORCHGEO_WHEEL", "")).is_file():
        say("no wheel in TORCHGEO_WHEEL: nothing to compare inference with")
        wanted -= {"inference", "504"}
    say(
        f"{'CPU seconds; MiB over model, input':34} {'theirs':>9} {'ours':>9} {'CPU ratio (range)':>19} {'aim':>7}"
        f" {'wall':>7} {'theirs':>9} {'ours':>9}"
    )
    for size_px, (samples, rounds, aim) in INFERENCE.items():
        if ("504" if size_px == 504 else "inference") in wanted:
            report(f"forward, base, {size_px} px, batch {samples}", inference, (size_px, samples), rounds, aim)
    if "pretraining" in wanted:
        report(f"step, base, 120 px, batch {PRETRAINING_BATCH}", pretraining, (), PRETRAINING_ROUNDS, 1.0)
    if "preprocessing" in wanted:
        report("preparing a batch | its step", preprocessing, (False,), PRETRAINING_ROUNDS)
        report("scaling 180 px windows | its step", preprocessing, (True,), PRETRAINING_ROUNDS)


if __name__ == "__main__":
    main()
