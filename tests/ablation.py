"""The paper's claim in small: are both objectives together worth more than either alone?

Pretrains `tiny` on the simulated archive with both objectives, contrastive only and reconstruction only, over seeds, on
the same samples with the same masks from the same initial weights, and probes held-out blocks. An embedding that every
objective has is wanted for the comparison: the contrastive one trains no joint encoder, the reconstruction no heads. So
the vectors that are compared are the optical and the radar one side by side, each of length 1: once the `embeddings`
(through the heads) and once the `mean` of each sensor's encodings (before them). The joint embedding is shown where it
was trained. Untrained weights and the mean and deviation of every band are the floors.

Every run is a directory with a `result.json`; what is there already is not run again.

Example:
    nice -n 19 python -m tests.ablation runs/ablation 2
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from torch import Tensor
from torch.nn import functional

from model.croma import Objective
from tests.learning import BATCH, STEPS, Ground, features_of, new_model, probe_all, read_ground, statistics_of, train
from tests.learning_store import write_learning_store

OBJECTIVES: dict[str, Objective] = {
    "both": Objective(),
    "contrastive": Objective(reconstruction_weight=0.0),
    "reconstruction": Objective(contrastive_weight=0.0),
}
SEEDS = (0, 1, 2)
COMPARED = ("embeddings", "mean")
SHOWN = (*COMPARED, "joint", "optical", "radar", "bands")

Accuracies = dict[str, float]
"""Fraction of held-out windows by vectors and probe, such as `embeddings linear`."""


def vectors_of(features: Mapping[str, Tensor], objective: Objective | None) -> dict[str, Tensor]:
    """What is probed, (M, D) each; without an objective, of untrained weights."""
    vectors = {
        "embeddings": side_by_side(features["optical_embedding"], features["radar_embedding"]),
        "mean": side_by_side(features["optical_mean"], features["radar_mean"]),
        "optical": features["optical_embedding"],
        "radar": features["radar_embedding"],
    }
    if objective is None or objective.reconstruction_weight:
        vectors["joint"] = features["joint_embedding"]
    return vectors


def side_by_side(optical: Tensor, radar: Tensor) -> Tensor:
    """(M, D) each -> (M, 2 D), either half of length 1, so that neither sensor outweighs the other."""
    return torch.cat([functional.normalize(each, dim=1) for each in (optical, radar)], dim=1)


def probed(vectors: Mapping[str, Tensor], ground: Ground) -> Accuracies:
    """Both probes of all vectors."""
    return {
        f"{name} {probe}": accuracy
        for name, values in vectors.items()
        for probe, accuracy in probe_all(values, ground.windows).items()
    }


def run(url: str, folder: str, kind: str, seed: int) -> str:
    """One run, unless its result is there; `kind` is an objective, `untrained` or `bands`."""
    directory = Path(folder, "runs", f"{kind}-{seed}")
    if (directory / "result.json").exists():
        return f"{directory.name}: there already"
    torch.set_num_threads(1)
    start, ground = time.monotonic(), read_ground(url)
    reported: dict[str, float] = {}
    if kind == "bands":
        vectors = {"bands": statistics_of(ground)}
    else:
        objective = OBJECTIVES.get(kind)
        model = new_model(seed, objective)
        if objective:
            reported = train(model, ground, seed)
        vectors = vectors_of(features_of(model.croma, ground), objective)
    result = {"kind": kind, "seed": seed, "accuracies": probed(vectors, ground), "last_step": reported}
    directory.mkdir(parents=True, exist_ok=True)
    # Renamed when whole: a run that was killed is run again.
    (directory / "result.part").write_text(json.dumps(result, indent=1))
    (directory / "result.part").rename(directory / "result.json")
    return f"{directory.name}: {time.monotonic() - start:.0f} s"


def wanted_runs() -> list[tuple[str, int]]:
    """Kinds and seeds, every objective of a seed before the next seed."""
    return [("bands", 0), *((kind, seed) for seed, kind in product(SEEDS, ("untrained", *OBJECTIVES)))]


def store_in(folder: Path) -> str:
    """The dataset, built if it is not there; moved to its place when whole."""
    store = folder / "chips.zarr"
    if not store.exists():
        os.environ["RAY_AUTH_MODE"] = "disabled"
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
        try:
            with tempfile.TemporaryDirectory(dir=folder) as building:
                Path(write_learning_store(Path(building))).rename(store)
        finally:
            ray.shutdown()
    return str(store)


def table(results: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Mean ± deviation over the seeds in per cent, a Markdown row per kind and vectors; then pairs of runs by seed."""
    yield "| | linear probe | k-nearest neighbours |"
    yield "|---|---|---|"
    for kind, vectors in product(("both", *list(OBJECTIVES)[1:], "untrained", "bands"), SHOWN):
        cells = [_of(results, kind, f"{vectors} {probe}") for probe in ("linear", "knn")]
        if len(cells[0]):
            name = kind if vectors == kind else f"{kind}, {vectors}"
            yield f"| {name} | {' | '.join(f'{c.mean():.1f} ± {c.std():.1f}' for c in cells)} |"
    yield ""
    yield "By how much `both` is better than another of the same seed, percentage points:"
    for vectors, probe, other in product(COMPARED, ("linear", "knn"), ("contrastive", "reconstruction", "untrained")):
        ours, theirs = (_of(results, kind, f"{vectors} {probe}") for kind in ("both", other))
        if len(ours) == len(theirs) == len(SEEDS):
            yield f"{vectors}, {probe}, {other}: {', '.join(f'{d:+.1f}' for d in ours - theirs)}"


def _of(results: Sequence[Mapping[str, Any]], kind: str, name: str) -> np.ndarray:
    found = sorted((r["seed"], r["accuracies"][name]) for r in results if r["kind"] == kind and name in r["accuracies"])
    return np.array([100 * accuracy for _, accuracy in found])


def main() -> None:
    """Run what is missing, and print the table."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/ablation").resolve()
    processes = int(sys.argv[2]) if len(sys.argv) > 2 else 1
    folder.mkdir(parents=True, exist_ok=True)
    url = store_in(folder)
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        for said in [pool.submit(run, url, str(folder), *which) for which in wanted_runs()]:
            sys.stdout.write(said.result() + "\n")
            sys.stdout.flush()
    results = [json.loads(path.read_text()) for path in sorted((folder / "runs").glob("*/result.json"))]
    sys.stdout.write(f"\n{len(results)} runs of {STEPS * BATCH} samples, accuracy in per cent:\n")
    sys.stdout.write("\n".join(table(results)) + "\n")


if __name__ == "__main__":
    main()
