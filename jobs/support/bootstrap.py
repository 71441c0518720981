"""How far a score could be off: resampling whole groups of neighbouring windows, because neighbours are alike."""

# G groups, R resamples, C classes, M windows

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]
Values = NDArray[np.float64]


def group_confusions(
    truth: NDArray[np.int64], predicted: NDArray[np.int64], groups: NDArray[np.int64], num_classes: int
) -> Counts:
    """Confusion matrix of each group.

    Args:
        truth: (M,) classes.
        predicted: (M,) classes.
        groups: (M,) number of each window's group, 0 to G - 1.
        num_classes: C.

    Returns:
        (G, C, C): group, true class, predicted class.
    """
    flat = (groups * num_classes + truth) * num_classes + predicted
    num_groups = int(groups.max()) + 1
    return np.bincount(flat, minlength=num_groups * num_classes**2).reshape(num_groups, num_classes, num_classes)


def draw_groups(num_groups: int, num_resamples: int, rng: np.random.Generator) -> Counts:
    """(R, G): how often each group is in each resample, G draws with replacement."""
    return rng.multinomial(num_groups, np.full(num_groups, 1 / num_groups), size=num_resamples)


def scores_of(confusions: NDArray[Any]) -> dict[str, Values]:
    """Accuracy, balanced accuracy and macro-F1 of many confusion matrices, (..., C, C) -> (...) each.

    As `model.probes.scores` defines them: balanced accuracy over the classes in the truth, macro-F1 over those in
    truth or predictions.
    """
    confusions = confusions.astype(np.float64)
    right = np.diagonal(confusions, axis1=-2, axis2=-1)
    true, predicted = confusions.sum(axis=-1), confusions.sum(axis=-2)
    recall = right / np.where(true > 0, true, 1)
    f1 = 2 * right / np.where(true + predicted > 0, true + predicted, 1)
    return {
        "accuracy": right.sum(axis=-1) / true.sum(axis=-1),
        "balanced_accuracy": recall.sum(axis=-1) / (true > 0).sum(axis=-1),
        "macro_f1": f1.sum(axis=-1) / (true + predicted > 0).sum(axis=-1),
    }


def resampled_scores(confusions: Counts, draws: Counts) -> dict[str, Values]:
    """Scores of every resample: (G, C, C) and (R, G) -> (R,) each."""
    return scores_of(np.tensordot(draws, confusions, axes=1))


def interval(values: Values, *, level: float = 0.95) -> tuple[float, float]:
    """The middle `level` of resampled values (R,)."""
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
