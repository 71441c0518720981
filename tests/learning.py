"""Train a tiny CROMA without Ray and probe it; `test_learning` and `ablation` do it seed by seed, in processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jobs.support.pretraining import pooled_statistics
from jobs.support.windows import window_corners
from model.croma import TINY, Croma, CromaPretraining, Objective
from model.normalisation import Normalisation, from_statistics
from model.preprocessing import prepare
from model.probes import fit_linear_probe, knn_scores
from model.training import StepSettings, build_optimizer, learning_rate, train_step
from pipeline.epochs import crop_windows
from pipeline.store import Store
from pipeline.versions import latest_sealed

CROP_PX = 48
WINDOW_PX = 72
BATCH = 64
STEPS = 200
PEAK = 5e-4
"""Learning rate."""

KINDS = ("optical", "radar", "joint")

_STEP_OF = {"b10": 1, "b20": 2, "b60": 6, "radar": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """Chips to train on, and windows of them to probe with."""

    chips: list[Any]
    split: np.ndarray
    """(chip,) train, val or test."""

    normalisation: Normalisation
    windows: dict[str, np.ndarray]
    """As `labelled_windows` has them."""

    @property
    def train_chips(self) -> list[Any]:
        """Chips of the training split."""
        return [chip for chip, name in zip(self.chips, self.split, strict=True) if name == "train"]


def read_ground(url: str) -> Ground:
    """A store's chips, how they are scaled, and the same windows each time."""
    store, version = Store.open(url), latest_sealed(url)
    rows = [row for row in version.chips().to_pylist() if row["status"] == "written"]
    chips = [store.read_chip(row["row"]) for row in rows]
    split = np.array([row["split"] for row in rows])
    mean, std = pooled_statistics(version.chips())
    return Ground(
        chips=chips,
        split=split,
        normalisation=from_statistics(mean.tolist(), std.tolist(), source="training chips"),
        windows=labelled_windows(chips, split, np.random.default_rng(0)),
    )


def new_model(seed: int, objective: Objective | None = None) -> CromaPretraining:
    """With weights that the seed decides, whatever the objective."""
    torch.manual_seed(seed)
    return CromaPretraining(TINY, objective)


def accuracies(url: str, seed: int) -> dict[str, float]:
    """Accuracy on held-out blocks, by features and probe: `trained joint knn`, `statistics both linear`, …"""
    torch.set_num_threads(1)
    ground = read_ground(url)
    model = new_model(seed)
    untrained = features_of(model.croma, ground)
    train(model, ground, seed)
    trained = features_of(model.croma, ground)
    features = {
        **{f"trained {kind}": trained[f"{kind}_embedding"] for kind in KINDS},
        **{f"untrained {kind}": untrained[f"{kind}_embedding"] for kind in KINDS},
        "statistics both": statistics_of(ground),
    }
    return {
        f"{name} {probe}": value
        for name, values in features.items()
        for probe, value in probe_all(values, ground.windows).items()
    }


def train(model: CromaPretraining, ground: Ground, seed: int) -> dict[str, float]:
    """A short pretraining, with crops, masks and turns as in the real one; returns what the last step reports.

    The samples, their masks and turns follow from the seed alone.
    """
    chips = ground.train_chips
    reported: dict[str, float] = {}
    optimizer = build_optimizer(model)
    settings = StepSettings(seed=seed)
    rng = np.random.default_rng(seed)
    model.train()
    for step in range(STEPS):
        chosen = rng.choice(len(chips), BATCH, replace=False)
        samples = np.stack([chosen, np.full(BATCH, step)], axis=1)
        corners = crop_windows(samples, seed=seed, epoch=0, side_px=264, crop_px=CROP_PX)
        batch = cut([chips[i] for i in chosen], corners, CROP_PX)
        batch |= {"row": torch.from_numpy(samples[:, 0]), "k": torch.from_numpy(samples[:, 1])}
        batch["epoch"] = torch.zeros_like(batch["row"])
        rate = learning_rate(step * BATCH, peak=PEAK, warmup_samples=STEPS * BATCH // 10, total_samples=STEPS * BATCH)
        reported = train_step(
            model, batch, optimizer, normalisation=ground.normalisation, settings=settings, learning_rate=rate
        )
    return reported


def labelled_windows(chips: list[Any], split: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Up to 250 windows per split with a class that covers most of them: chip, y_px, x_px, label, split."""
    found = []
    for index, chip in enumerate(chips):
        for y_px, x_px in window_corners(264, WINDOW_PX):
            codes, counts = np.unique(
                chip["label_worldcover"][y_px : y_px + WINDOW_PX, x_px : x_px + WINDOW_PX], return_counts=True
            )
            if counts.max() > 0.5 * WINDOW_PX**2:
                found.append((index, y_px, x_px, codes[counts.argmax()], split[index]))
    order = rng.permutation(len(found))
    kept = [found[i] for name in ("train", "val", "test") for i in [j for j in order if found[j][4] == name][:250]]
    index, y_px, x_px, codes, names = zip(*kept, strict=True)
    label = np.unique(codes, return_inverse=True)[1]
    columns = {"chip": index, "y_px": y_px, "x_px": x_px, "label": label, "split": names}
    return {name: np.array(values) for name, values in columns.items()}


@torch.no_grad()
def features_of(croma: Croma, ground: Ground) -> dict[str, Tensor]:
    """Of every window, (M, D) each: `…_embedding` of optical, radar and joint, and `…_mean` of their encodings."""
    croma.eval()
    windows = ground.windows
    parts: dict[str, list[Tensor]] = {}
    for start in range(0, len(windows["chip"]), 64):
        part = slice(start, start + 64)
        corners = np.stack([windows["y_px"][part], windows["x_px"][part]], axis=1)
        images = cut([ground.chips[i] for i in windows["chip"][part]], corners, WINDOW_PX)
        outputs = croma(*prepare(images, ground.normalisation))
        for kind in KINDS:
            parts.setdefault(f"{kind}_embedding", []).append(outputs[f"{kind}_embedding"])
            parts.setdefault(f"{kind}_mean", []).append(outputs[f"{kind}_encodings"].mean(dim=1))
    return {name: torch.cat(values) for name, values in parts.items()}


def statistics_of(ground: Ground) -> Tensor:
    """Mean and deviation of every band of every window (M, 28), standardised."""
    rows = []
    for index, y_px, x_px in zip(*[ground.windows[name] for name in ("chip", "y_px", "x_px")], strict=True):
        images = cut([ground.chips[index]], np.array([[y_px, x_px]]), WINDOW_PX)
        pixels = [images[name][0].double() for name in _STEP_OF]
        rows.append(torch.cat([torch.cat([each.mean((1, 2)), each.std((1, 2))]) for each in pixels]))
    values = torch.stack(rows)
    return ((values - values.mean(0)) / values.std(0)).float()


def probe_all(values: Tensor, windows: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Accuracy of both probes on the test windows."""
    label = torch.from_numpy(windows["label"])
    train_, val, test = (torch.from_numpy(windows["split"] == name) for name in ("train", "val", "test"))
    num_classes = int(label.max()) + 1
    linear = fit_linear_probe(
        values[train_], label[train_], values[val], label[val], num_classes=num_classes, strengths=(1e-3, 1e-2, 1e-1)
    ).predict(values[test])
    nearest = knn_scores(values[train_], label[train_], values[test], num_classes=num_classes).argmax(dim=1)
    return {
        "linear": (linear == label[test]).float().mean().item(),
        "knn": (nearest == label[test]).float().mean().item(),
    }


def cut(chips: list[Any], corners: np.ndarray, size_px: int) -> dict[str, Tensor]:
    """Windows of chips as a batch, every array on its own grid."""
    batch = {}
    for name, step in _STEP_OF.items():
        windows = [
            chip[name][:, y // step : (y + size_px) // step, x // step : (x + size_px) // step]
            for chip, (y, x) in zip(chips, corners, strict=True)
        ]
        batch[name] = torch.from_numpy(np.stack(windows).astype(np.int32))
    return batch
