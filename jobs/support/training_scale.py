"""What training on many GPUs asks of everything around them, on paper: feed, network, driver, checkpoints.

Counted from the sizes of the model and of the store's layout, from the planner itself, and from rates that were seen on
two CPUs (`infra/benchmarks.md`). How fast a GPU is, and what networks bring, is assumed, and called so.
"""

# G samples of a global batch, R GPUs

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from jobs.support.dealing import RANKS_EACH
from jobs.support.estimate import CODEC_RATIO
from jobs.support.training_estimate import CHECKPOINT_BYTES, Assumptions
from model.croma import CONFIGS, CromaConfig
from model.flops import TRAINING_FACTOR, pretraining_flops
from model.memory import training_memory
from pipeline.epochs import SampleOrder, usual_window
from pipeline.layout import MODEL_ARRAYS, Layout

CROP_PX: Final = 120

PEAK_SHARE: Final = 0.35
"""Of an H100's peak, that GPUs are to reach at the least; what is slower asks for less."""

FEED_CORE_MS: Final[Mapping[int, float]] = {1: 0.88, 4: 0.31}
"""Crops per chip -> milliseconds of a CPU per crop of 120 px: a K-th of a chip's decoding, and cutting."""

ROWS_CORE_US: Final = 0.14
"""Of the driver per candidate in the chip table, microseconds of CPU, to find the rows of a split."""

PLAN_CORE_MS: Final = 0.3
"""Of a process that plans, milliseconds of CPU per read task and epoch."""

TASK_CORE_MS: Final = 0.7
"""Of the same per read task, to put it where Ray's workers find it."""

HANDOUT_CORE_MS: Final = 10.0
"""Of a process that deals out, milliseconds of CPU per read task and its block."""

ROWS_BYTES: Final = 16
"""Of the driver per chip while rows are read: what was found, and all of it in one array."""

PLAN_BYTES: Final = 12
"""Of a process that plans, per chip: half a gigabyte over its start, and 1.2 for 10^8 chips."""

WRITTEN_SHARE: Final = 0.6
"""Of the rows of a shard, where 4 of 10 candidates are cloudy."""

DISK_GB_S: Final = 1.0
"""A checkpoint is written to a local disk first, assumed."""

FABRIC_GB_S: Final[Mapping[str, float]] = {"400 GB/s a node (EFA)": 400.0, "12.5 GB/s a node (Ethernet)": 12.5}
"""Network between nodes -> 10^9 bytes per second into and out of one, data sheets. Rings over eight GPUs use all of it
for what one of them sends; within a node NVLink brings 450."""

GPUS_PER_NODE: Final = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What a training at full speed asks for; bytes, seconds, and numbers per second, of all GPUs unless said."""

    sample_flops: int
    gpu_samples_per_s: float
    samples_per_s: float
    step_s: float
    epoch_s: float
    feed_bytes_per_s: float
    """To the workers."""

    store_bytes_per_s: float
    """Of chips that are trained on, each decoded once."""

    node_bytes_per_s: float
    """Into a node of 8 GPUs that reads its share: from the store, and blocks that other nodes made."""

    store_requests_per_s: float
    """One per array and shard; at least, since shards lie in two windows now and then."""

    readers: float
    """CPUs that read, decode and cut."""

    block_bytes: float
    """Of a block, which is a rank's part of a span: at least two lie in a rank's node, and one in each task."""

    blocks_per_s: float
    dealers: int
    """Processes that deal out."""

    blocks_dealt_per_s: float
    """That they can deal out."""

    tasks: int
    """Read tasks of an epoch."""

    in_flight_bytes: float
    """What the tasks that run at a time bring: with the order kept, all of it may have to wait for the first."""

    rows_s: float
    """Before the first step of a run, to find the rows; CPU seconds of the driver."""

    plan_s: float
    """At the start of every epoch; CPU seconds of each process that deals out."""

    put_s: float
    """The same, to put the read tasks."""

    driver_bytes: float
    dealer_bytes: float
    """Of each process that deals out; they lie on the driver's node."""

    gathered_bytes: int
    """Features of all ranks, on every GPU, float32."""

    gradient_bytes: int
    """Of the weights, float32, on every GPU."""

    exchanged_bytes: float
    """Sent by a GPU in a step: gathering features, and summing their gradients and those of the weights, by rings."""

    checkpoint_bytes: int

    @property
    def stall_s(self) -> float:
        """In which the first worker writes a checkpoint and the others wait for it."""
        return self.checkpoint_bytes / 1e9 / DISK_GB_S

    @property
    def dealt_share(self) -> float:
        """Of full speed, that the processes which deal out allow."""
        return min(1.0, self.blocks_dealt_per_s / self.blocks_per_s)

    @property
    def start_share(self) -> float:
        """Of an epoch's time at full speed, that passes before its first step."""
        return (self.plan_s + self.put_s) / self.epoch_s


def demand(
    *,
    size: Literal["tiny", "base", "large"],
    crops_per_chip: int,
    window_px: int,
    num_gpus: int = 64,
    global_batch: int = 7168,
    num_chips: int = 10**8,
) -> Demand:
    """Reckon it.

    Args:
        size: Of the model.
        crops_per_chip: K.
        window_px: Side of what is read of a chip: 180 with scale augmentation, else 120.
        num_gpus: R.
        global_batch: G.
        num_chips: That are trained on in an epoch.
    """
    config, layout = CONFIGS[size], Layout()
    flops = TRAINING_FACTOR * pretraining_flops(config, _num_patches(config), num_contrasted=global_batch)
    of_gpu = Assumptions().peak_tflops * 1e12 * PEAK_SHARE / flops
    rate = of_gpu * num_gpus
    chips_per_s = rate / crops_per_chip
    written = round(WRITTEN_SHARE * layout.shard_chips)
    order = SampleOrder(
        crops_per_chip=crops_per_chip,
        global_batch=global_batch,
        lanes=num_gpus,
        window_chips=usual_window(crops_per_chip),
    )
    block = order.window_batches * order.lane_share
    tasks, dealers = round(num_chips * crops_per_chip / block), -(-num_gpus // RANKS_EACH)
    core_s = _crop_core_s(crops_per_chip, window_px)
    sample_bytes = layout.window_bytes(window_px, MODEL_ARRAYS)
    from_store = chips_per_s * layout.window_bytes(layout.side_px, MODEL_ARRAYS) * CODEC_RATIO[layout.codec]
    nodes = num_gpus / GPUS_PER_NODE
    gathered, gradients = global_batch * 2 * config.width * 4, _trained(config) * 4
    ring = (num_gpus - 1) / num_gpus
    return Demand(
        sample_flops=flops,
        gpu_samples_per_s=of_gpu,
        samples_per_s=rate,
        step_s=global_batch / rate,
        epoch_s=num_chips * crops_per_chip / rate,
        feed_bytes_per_s=rate * sample_bytes,
        store_bytes_per_s=from_store,
        node_bytes_per_s=(from_store + rate * sample_bytes * (nodes - 1) / nodes) / nodes,
        store_requests_per_s=chips_per_s / written * len(MODEL_ARRAYS),
        readers=rate * core_s,
        block_bytes=block * sample_bytes,
        blocks_per_s=rate / block,
        dealers=dealers,
        blocks_dealt_per_s=dealers * 1e3 / HANDOUT_CORE_MS,
        tasks=tasks,
        in_flight_bytes=rate * core_s * block * sample_bytes,
        rows_s=num_chips / WRITTEN_SHARE * ROWS_CORE_US * 1e-6,
        plan_s=tasks / dealers * PLAN_CORE_MS * 1e-3,
        put_s=tasks / dealers * TASK_CORE_MS * 1e-3,
        driver_bytes=0.3e9 + num_chips * ROWS_BYTES,
        dealer_bytes=0.3e9 + num_chips * PLAN_BYTES,
        gathered_bytes=gathered,
        gradient_bytes=gradients,
        exchanged_bytes=ring * (gathered + 2 * gathered + 2 * gradients),
        checkpoint_bytes=_trained(config) * CHECKPOINT_BYTES,
    )


def scale_table() -> str:
    """64 GPUs and 100 million chips, in Markdown."""
    cases = [("base", 1, 120), ("base", 4, 120), ("base", 1, 180), ("base", 4, 180), ("large", 1, 180)]
    found = [demand(size=size, crops_per_chip=k, window_px=px) for size, k, px in cases]  # type: ignore[arg-type]
    rows = [
        ("GFLOP per sample", [f"{d.sample_flops / 1e9:.1f}" for d in found]),
        ("samples/s of a GPU, ASSUMED", [f"{d.gpu_samples_per_s:,.0f}" for d in found]),
        ("samples/s of all", [f"{d.samples_per_s:,.0f}" for d in found]),
        ("a step, ms", [f"{d.step_s * 1e3:.0f}" for d in found]),
        ("an epoch, min", [f"{d.epoch_s / 60:.1f}" for d in found]),
        ("to the workers, GB/s", [f"{d.feed_bytes_per_s / 1e9:.1f}" for d in found]),
        ("from the store, GB/s", [f"{d.store_bytes_per_s / 1e9:.1f}" for d in found]),
        ("into a node of 8 GPUs, GB/s", [f"{d.node_bytes_per_s / 1e9:.1f}" for d in found]),
        ("from the store, requests/s", [f"{d.store_requests_per_s:,.0f}" for d in found]),
        ("CPUs that read", [f"{d.readers:,.0f}" for d in found]),
        ("of tasks that run at a time, GB in flight", [f"{d.in_flight_bytes / 1e9:,.0f}" for d in found]),
        ("a block, MB", [f"{d.block_bytes / 1e6:,.0f}" for d in found]),
        ("blocks/s to be dealt out", [f"{d.blocks_per_s:,.0f}" for d in found]),
        (f"blocks/s that {found[0].dealers} processes deal out", [f"{d.blocks_dealt_per_s:,.0f}" for d in found]),
        ("so of full speed, at least", [f"{d.dealt_share:.0%}" for d in found]),
        ("rows found, before the first step, CPU s", [f"{d.rows_s:.0f}" for d in found]),
        ("read tasks of an epoch", [f"{d.tasks:,}" for d in found]),
        ("its part of them planned, CPU s of each process", [f"{d.plan_s:.1f}" for d in found]),
        ("and put, CPU s", [f"{d.put_s:.1f}" for d in found]),
        ("planning and putting, of an epoch at full speed", [f"{d.start_share:.0%}" for d in found]),
        ("memory of the driver at its peak, GB", [f"{d.driver_bytes / 1e9:.1f}" for d in found]),
        ("of each process that deals out, GB", [f"{d.dealer_bytes / 1e9:.1f}" for d in found]),
        ("features gathered, MB per GPU and step", [f"{d.gathered_bytes / 1e6:.0f}" for d in found]),
        ("gradients of weights, GB", [f"{d.gradient_bytes / 1e9:.2f}" for d in found]),
        ("sent by a GPU per step, GB", [f"{d.exchanged_bytes / 1e9:.2f}" for d in found]),
        *(
            (f"that takes, ms, at {name}", [f"{d.exchanged_bytes / 1e6 / gb_s:.0f}" for d in found])
            for name, gb_s in FABRIC_GB_S.items()
        ),
        ("checkpoint, GB", [f"{d.checkpoint_bytes / 1e9:.1f}" for d in found]),
        ("for which training stops, s", [f"{d.stall_s:.1f}" for d in found]),
        ("its upload at 0.1 GB/s, meanwhile, s", [f"{d.checkpoint_bytes / 1e8:.0f}" for d in found]),
    ]  # fmt: skip
    head = ["64 GPUs, 100 M chips", *(f"`{size}`, K = {k}, {px} px" for size, k, px in cases)]
    lines = [head, ["---"] * len(head), *([title, *cells] for title, cells in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _num_patches(config: CromaConfig) -> int:
    return (CROP_PX // config.patch_px) ** 2


def _crop_core_s(crops_per_chip: int, window_px: int) -> float:
    """Decoding is shared by K crops, cutting goes by area; both follow from the two that were seen."""
    decode = (FEED_CORE_MS[1] - FEED_CORE_MS[4]) / (1 - 1 / 4)
    cut = (FEED_CORE_MS[1] - decode) * (window_px / CROP_PX) ** 2
    return (decode / crops_per_chip + cut) * 1e-3


def _trained(config: CromaConfig) -> int:
    """Parameters that are trained."""
    memory = training_memory(config, image_px=CROP_PX, batch=1)
    return memory.optimizer // 8
