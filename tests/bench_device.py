"""CROMA on one device: samples per second, share of the device's peak, memory, compile time, where the time goes.

Steps are whole ones: preparing the store's integers, forward, backward and optimizer, in bfloat16. Batches that do not
fit are halved. The share of the peak counts the model's own operations (`model/flops.py`) against dense bfloat16.
Beside it: what preparing a batch takes of a step, which attention kernel is fastest, and what bfloat16 and compiling
change in encodings, losses and gradients.

Example:
    python -m tests.bench_model gpu
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Final, Literal

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from jobs.support.device_peaks import peak_of
from model.augmentation import PAPER_SIDES_PX
from model.croma import CONFIGS, Croma, CromaConfig, CromaPretraining
from model.flops import TRAINING_FACTOR, inference_flops, pretraining_flops
from model.masking import num_kept
from model.memory import training_memory
from model.normalisation import SSL4EO_S12
from model.preprocessing import prepare
from model.training import StepSettings, accumulate_gradients, build_optimizer, pretraining_inputs, train_step

BACKENDS: Final = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is run."""

    config: CromaConfig
    what: Literal["pretraining", "inference"]
    batch: int
    image_px: int = 120
    backend: str | None = None
    """Of torch.compile; None runs eagerly."""

    whole: bool = False
    """Compile the model in one graph; else, as jobs do in pretraining, layer by layer."""

    @property
    def flops(self) -> int:
        """Of one sample."""
        num_patches = (self.image_px // self.config.patch_px) ** 2
        if self.what == "inference":
            return inference_flops(self.config, num_patches)
        return TRAINING_FACTOR * pretraining_flops(self.config, num_patches, num_contrasted=self.batch)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What came out."""

    samples_per_s: float
    flops_per_s: float
    memory_bytes: int | None
    """Most that was allocated on the device at once; None on a CPU."""

    first_s: float
    """What the first call took longer than the later ones: compiling, where that is on."""


def batch_of(samples: int, image_px: int, device: torch.device) -> dict[str, Tensor]:
    """Random integers as the store holds them."""

    def pixels(channels: int, side_px: int, low: int, high: int, kind: torch.dtype) -> Tensor:
        return torch.randint(low, high, (samples, channels, side_px, side_px), device=device).to(kind)

    return {
        "b10": pixels(4, image_px, 1, 5000, torch.uint16),
        "b20": pixels(6, image_px // 2, 1, 5000, torch.uint16),
        "b60": pixels(2, image_px // 6, 1, 5000, torch.uint16),
        "radar": pixels(2, image_px, -3000, 0, torch.int16),
        "row": torch.arange(samples, device=device),
        "k": torch.zeros(samples, dtype=torch.int64, device=device),
        "epoch": torch.zeros(samples, dtype=torch.int64, device=device),
    }


def step_of(case: Case, device: torch.device) -> Callable[[], object]:
    """One call of what the case is about."""
    # Graphs of the models before would count against the limit of recompilations.
    torch.compiler.reset()
    if case.what == "pretraining":
        model = CromaPretraining(case.config).to(device).train()
        optimizer, batch = build_optimizer(model), batch_of(case.batch, case.image_px, device)
        if case.backend and case.whole:
            model.compile(backend=case.backend)
        elif case.backend:
            model.compile_layers(case.backend)
        settings = StepSettings(seed=0, bfloat16=True)
        return lambda: train_step(
            model, batch, optimizer, normalisation=SSL4EO_S12, settings=settings, learning_rate=1e-4
        )
    croma = Croma(case.config).to(device).eval()
    encode = torch.compile(croma, backend=case.backend) if case.backend else croma
    optical, radar = (torch.rand(case.batch, bands, case.image_px, case.image_px, device=device) for bands in (12, 2))

    def infer() -> object:
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16):
            return encode(optical, radar)

    return infer


def measure(case: Case, device: torch.device, *, seconds: float = 5.0) -> Measured:
    """Call after call for about `seconds`, after two that do not count."""
    step = step_of(case, device)
    first_s, _ = _timed(step, 1, device), _timed(step, 1, device)
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    rounds = max(2, round(seconds / _timed(step, 1, device)))
    each_s = _timed(step, rounds, device) / rounds
    return Measured(
        samples_per_s=case.batch / each_s,
        flops_per_s=case.flops * case.batch / each_s,
        memory_bytes=torch.cuda.max_memory_allocated(device) if cuda else None,
        first_s=first_s - each_s,
    )


def fitting(case: Case, device: torch.device, *, seconds: float = 5.0) -> tuple[Case, Measured]:
    """The case with the largest batch that fits, halving it."""
    while True:
        try:
            return case, measure(case, device, seconds=seconds)
        except torch.OutOfMemoryError:
            if case.batch == 1:
                raise
            case = replace(case, batch=case.batch // 2)


def where_time_goes(case: Case, device: torch.device, *, rows: int = 12) -> list[tuple[str, float]]:
    """Operations (on a GPU: kernels) by their share of the time on the device, the largest first."""
    step = step_of(case, device)
    step()
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiler:
        _timed(step, 2, device)
    # On a GPU its kernels: the operations that start them would count the same time again.
    times = {
        event.key: event.self_device_time_total if cuda else event.self_cpu_time_total
        for event in profiler.key_averages()
        if event.device_type == (DeviceType.CUDA if cuda else DeviceType.CPU) and not event.is_user_annotation
    }
    total = sum(times.values())
    return sorted(((name, time_us / total) for name, time_us in times.items()), key=lambda row: -row[1])[:rows]


def attention_seconds(
    tokens: int, batch: int, heads: int, head_width: int, device: torch.device, *, shared_bias: bool, repeat: int = 20
) -> dict[str, float | None]:
    """Forward and backward of biased attention in bfloat16, by backend; None where there is no such kernel."""
    shape = (batch, heads, tokens, head_width)
    inputs = [torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    bias_shape = (1 if shared_bias else batch, heads, tokens, tokens)
    bias = torch.randn(bias_shape, device=device, dtype=torch.bfloat16)

    def attend() -> object:
        return functional.scaled_dot_product_attention(*inputs, attn_mask=bias).sum().backward()

    def seconds(backend: SDPBackend) -> float | None:
        with sdpa_kernel(backend):
            try:
                _timed(attend, 2, device)
            except RuntimeError:
                return None
            return _timed(attend, repeat, device) / repeat

    return {name: seconds(backend) for name, backend in BACKENDS.items()}


def preparing_seconds(samples: int, window_px: int, device: torch.device, *, repeat: int = 20) -> float:
    """From the store's integers to normalised, turned and masked input at 120 px; of larger windows, scaled as well."""
    settings = StepSettings(seed=0, scale_sides_px=PAPER_SIDES_PX if window_px > 120 else None)
    batch = batch_of(samples, window_px, device)

    def inputs() -> object:
        return pretraining_inputs(batch, patch_px=8, normalisation=SSL4EO_S12, settings=settings)

    _timed(inputs, 2, device)
    return _timed(inputs, repeat, device) / repeat


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Of a way to compute from eager float32: norms of differences over norms of what is compared."""

    encodings: float
    """Joint ones, of whole images."""

    loss: float
    gradient: float
    """All parameters' as one vector."""


def numerics(config: CromaConfig, device: torch.device, *, samples: int = 32) -> dict[str, Difference]:
    """What bfloat16 and compiling change: the same weights, samples and masks, by way of computing."""
    torch.manual_seed(0)
    weights, batch = CromaPretraining(config).state_dict(), batch_of(samples, 120, device)
    optical, radar = prepare(batch, SSL4EO_S12)

    def computed(backend: str | None, bfloat16: bool) -> tuple[Tensor, Tensor, Tensor]:
        torch.compiler.reset()
        model = CromaPretraining(config).to(device)
        model.load_state_dict(weights)
        if backend:
            model.compile_layers(backend)
        settings = StepSettings(seed=0, bfloat16=bfloat16)
        losses = accumulate_gradients(model, batch, normalisation=SSL4EO_S12, settings=settings)
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            encodings = model.croma(optical, radar)["joint_encodings"].double()
        gradient = torch.cat([each.grad.double().flatten() for each in model.parameters() if each.grad is not None])
        return encodings, losses.total.double(), gradient

    exact = computed(None, False)
    ways = {
        "eager bfloat16": (None, True),
        "layers, float32": ("inductor", False),
        "layers, bfloat16": ("inductor", True),
    }
    found = {}
    for name, way in ways.items():
        apart = (((a - b).norm() / b.norm()).item() for a, b in zip(computed(*way), exact, strict=True))
        found[name] = Difference(**dict(zip(("encodings", "loss", "gradient"), apart, strict=True)))
    return found


def speed_lines(case: Case, device: torch.device, peak_flops: float | None, *, seconds: float = 3.0) -> Iterator[str]:
    """How fast a case is with the largest batch that fits; of pretraining, also where the time goes."""
    case, found = fitting(case, device, seconds=seconds)
    share = f"{found.flops_per_s / peak_flops:.1%}" if peak_flops else "?"
    memory = "?" if found.memory_bytes is None else f"{found.memory_bytes / 2**20:.0f}"
    how = "eager" if case.backend is None else f"{case.backend}, {'whole' if case.whole else 'layers'}"
    title = f"{case.what}, batch {case.batch}, {how}"
    yield f"{title:44} {found.samples_per_s:10.0f} {share:>8} {memory:>8} {found.first_s:9.1f} s"
    if case.what == "inference":
        return
    yield from (f"    {part:6.1%}  {name[:90]}" for name, part in where_time_goes(case, device))
    for window_px in (120, 180):
        part = preparing_seconds(case.batch, window_px, device) * found.samples_per_s / case.batch
        yield f"    {part:6.1%}  as long as a step takes preparing its batch of {window_px} px"
    counted = training_memory(case.config, image_px=120, batch=case.batch).total / 2**20
    yield f"    {counted:6.0f}  MiB by the count that a dry run goes by"


def attention_lines(config: CromaConfig, device: torch.device) -> Iterator[str]:
    """Which kernel is fastest for the attention of visible patches, and of whole images."""
    num_patches = (120 // config.patch_px) ** 2
    for tokens, shared in ((num_kept(num_patches, 0.75), False), (num_patches, True)):
        for head_width in (config.width // config.heads, 64):
            found_s = attention_seconds(tokens, 256, config.heads, head_width, device, shared_bias=shared)
            told = ", ".join(f"{name} {'none' if s is None else f'{1e3 * s:.2f} ms'}" for name, s in found_s.items())
            yield f"attention, {tokens} tokens, heads of {head_width}, batch 256: {told}"


def numerics_lines(config: CromaConfig, device: torch.device) -> Iterator[str]:
    """What bfloat16 and compiling change."""
    for way, apart in numerics(config, device).items():
        yield (
            f"{way} against eager float32, relative: encodings {apart.encodings:.1e}, loss {apart.loss:.1e}, "
            f"gradient {apart.gradient:.1e}"
        )


def lines(device: torch.device, size: str, peak_flops: float | None) -> Iterator[str]:
    """The whole report on a size, line by line as it is measured."""
    config = CONFIGS[size]
    yield f"{size + ', bfloat16':44} {'samples/s':>10} {'of peak':>8} {'MiB':>8} {'first call':>11}"
    step, pass_ = (Case(config=config, what=what, batch=1024) for what in ("pretraining", "inference"))
    cases = (step, pass_, replace(step, backend="inductor"), replace(pass_, backend="inductor", whole=True),
             replace(step, backend="inductor", whole=True))  # fmt: skip
    for case in cases:
        yield from speed_lines(case, device, peak_flops)
    yield from attention_lines(config, device)
    yield from numerics_lines(config, device)


def main(sizes: list[str]) -> None:
    """Models of these sizes on the GPU at hand."""
    if not torch.cuda.is_available():
        sys.stdout.write("no GPU here: nothing measured\n")
        return
    device, name = torch.device("cuda"), torch.cuda.get_device_name()
    sys.stdout.write(f"{name}, torch {torch.__version__}\n")
    for size in sizes:
        for line in lines(device, size, peak_of(device)):
            sys.stdout.write(f"{line}\n")
            sys.stdout.flush()


def _timed(call: Callable[[], object], rounds: int, device: torch.device) -> float:
    """Seconds for so many calls, what they started on the device included."""
    _wait_for(device)
    start = time.perf_counter()
    for _ in range(rounds):
        call()
    _wait_for(device)
    return time.perf_counter() - start


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
