"""Shuffled crops into a training process, ways interleaved: medians of rates and CPU time, and ratios.

All read the same made-up chips, on the sensors' own grids, from this machine's memory: what they do with it differs.
litdata runs in an environment that is made for it, and is left out with its reason where that cannot be made.

Example:
    python -m tests.bench_feed                  # all of them
    BENCH_BATCH=256 python -m tests.bench_feed lz4 ray-lz4      # some, in other batches than of 64
"""

from __future__ import annotations

import json
import os
import site
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.layout import Layout
from tests.conftest import ROOT
from tests.feed_data import make_chips, write_long_store
from tests.feed_ways import WAYS

NUM_CHIPS, NUM_ROWS = 512, 16384
ROUNDS = 5
CROPS_PX = (120, 180)
LITDATA = ("litdata==0.2.76", "lightning-utilities", "tifffile", "boto3", "botocore", "s3transfer", "jmespath",
           "python-dateutil")  # fmt: skip
"""What it needs and is not here already; torchvision, which it asks for, it does without."""

THROUGH_RAY = {"ray-none": "none", "ray-lz4": "lz4", "ray-lz4-K4": "lz4-K4"}
"""Each is compared with the same within the process."""

AIMS = (
    ("none", "litdata", 2.0),
    ("none", "memmap", 1.0),
    ("lz4", "litdata", 0.8),
    ("lz4", "memmap", 0.6),
    ("lz4-K4", "litdata", 3.0),
    *((name, other, 0.6) for name, other in THROUGH_RAY.items()),
)


def litdata_python(folder: Path) -> Path | None:
    """A Python with litdata, in an environment of its own over this one; None where there is no network for it."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    ask = "import site; print(site.getsitepackages()[0])"
    own = subprocess.run([python, "-c", ask], check=True, capture_output=True, text=True).stdout.strip()
    # torch, numpy and the like are the ones of this environment.
    Path(own, "shared.pth").write_text(f"{site.getsitepackages()[0]}\n")
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check", *LITDATA]
    ran = subprocess.run(install, capture_output=True, text=True)
    if ran.returncode:
        sys.stdout.write(f"no litdata to compare with: {(ran.stderr.strip().splitlines() or ['pip failed'])[-1]}\n")
        return None
    return python


@contextmanager
def answering(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A process that says that it is ready, and then answers line by line; ended at the end."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        # Some libraries say more than they were asked.
        while (said := process.stdout.readline()) != "ready\n":
            assert said, f"{command} ended"
        yield process
    finally:
        process.stdin.close()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def ask(process: subprocess.Popen[str], line: str) -> dict[str, Any]:
    """Its answer."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{line}\n")
    process.stdin.flush()
    while not (said := process.stdout.readline()).startswith("{"):
        assert said, "a feed ended"
    answer: dict[str, Any] = json.loads(said)
    return answer


def against_others(folder: Path, names: list[str]) -> None:
    """Measure every way, in turns, and print a table for each side of crops: first those without Ray."""
    layout = Layout(has_classes=False)
    chips = make_chips(NUM_CHIPS, layout)
    for name, pixels in chips.items():
        np.save(folder / f"{name}.npy", pixels)
    ratio = write_long_store(str(folder / "lz4.zarr"), layout, chips, NUM_ROWS)
    write_long_store(str(folder / "none.zarr"), Layout(has_classes=False, codec="none"), chips, NUM_ROWS)
    del chips
    sys.stdout.write(f"{NUM_CHIPS} chips of 264 px, compressed {ratio:.2f} to 1 with lz4\n")
    wanted = [name for name in (*WAYS, "litdata") if not names or name in names]
    commands = {name: [sys.executable, "-m", "tests.feed_ways", name, str(folder), str(NUM_ROWS)] for name in WAYS}
    if "litdata" in wanted and (python := litdata_python(folder / "litdata-environment")):
        commands["litdata"] = [str(python), str(ROOT / "tests/litdata_feed.py"), str(folder), str(NUM_ROWS)]
    of_ray = [name for name in wanted if name in THROUGH_RAY]
    # Clusters that wait for their turn are not idle: what has none is measured without them beside it.
    for together in ([name for name in wanted if name not in of_ray], [THROUGH_RAY[name] for name in of_ray] + of_ray):
        seen = in_turns({name: commands[name] for name in together if name in commands})
        for crop_px, runs in seen.items():
            show(crop_px, runs)


def in_turns(commands: dict[str, list[str]]) -> dict[int, dict[str, list[dict[str, float]]]]:
    """What each way answered in every round but the first, by the side of the crops and by its name."""
    if not commands:
        return {}
    seen: dict[int, dict[str, list[dict[str, float]]]] = {side: {name: [] for name in commands} for side in CROPS_PX}
    rng = np.random.default_rng(0)
    with ExitStack() as stack:
        running = {name: stack.enter_context(answering(command)) for name, command in commands.items()}
        for number in range(ROUNDS + 1):
            for crop_px, name in product(CROPS_PX, rng.permutation(list(running)).tolist()):
                answer = ask(running[name], str(crop_px))
                sys.stderr.write(f"round {number}: {name}, {crop_px} px: {answer}\n")
                # The first time processes start and memory is filled.
                if number:
                    seen[crop_px][name].append(answer | {"load": os.getloadavg()[0]})
    return seen


def show(crop_px: int, seen: dict[str, list[dict[str, float]]]) -> None:
    """A table in Markdown: medians, and what was aimed at."""
    sys.stdout.write(
        f"\n| {crop_px} px | crops/s | slowest to fastest | CPU ms per crop | peak MiB above start |\n"
        "|---|---|---|---|---|\n"
    )
    rate: dict[str, float] = {}
    busy: dict[str, float] = {}
    loads = [run["load"] for runs in seen.values() for run in runs]
    for name, runs in seen.items():
        rates = sorted(run["crops"] / run["s"] for run in runs)
        rate[name] = statistics.median(rates)
        busy[name] = statistics.median(1000 * run["cpu_s"] / run["crops"] for run in runs)
        held = f"{max(run['mib'] for run in runs):.0f}" if "mib" in runs[0] else ""
        sys.stdout.write(
            f"| {name} | {rate[name]:.0f} | {rates[0]:.0f} to {rates[-1]:.0f} | {busy[name]:.2f} | {held} |\n"
        )
    sys.stdout.write(f"\nload {min(loads):.1f} to {max(loads):.1f} on {os.cpu_count()} cores\n")
    for name, other, aim in AIMS:
        if name in rate and other in rate:
            # Of one round, for what else the machine does is then about the same.
            pairs = zip(seen[name], seen[other], strict=True)
            by_round = statistics.median(a["crops"] / a["s"] / (b["crops"] / b["s"]) for a, b in pairs)
            sys.stdout.write(
                f"{name} / {other}: {rate[name] / rate[other]:.2f} (round by round {by_round:.2f}), by CPU "
                f"{busy[other] / busy[name]:.2f}; aim {aim}\n"
            )


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        against_others(Path(folder), sys.argv[1:])


if __name__ == "__main__":
    main()
