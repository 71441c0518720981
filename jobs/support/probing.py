"""Probes of many kinds of features on the same held-out windows, with intervals, and differences between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from jobs.support.bootstrap import Counts, Values, draw_groups, group_confusions, interval, resampled_scores, scores_of
from model.probes import fit_linear_probe, knn_scores

T = TypeVar("T", bound=np.generic)

TRAINED: Final = "trained"
UNTRAINED: Final = "untrained"
STATISTICS: Final = "band statistics"
MAJORITY: Final = "majority class"

PROBES: Final = ("knn", "linear")
SPLITS: Final = ("train", "val", "test")


@dataclass(frozen=True, kw_only=True)
class Samples:
    """The windows of an evaluation, without their features."""

    labels: NDArray[np.int64]
    """(M,) classes, 0 to num_classes - 1."""

    num_classes: int

    split: NDArray[np.str_]
    """(M,) train, val or test."""

    groups: NDArray[np.int64]
    """(test window,) number of the group of cells that is drawn as one, 0 to num_groups - 1."""

    def of(self, split: str, values: NDArray[T]) -> NDArray[T]:
        """The elements of one split."""
        return np.compress(self.split == split, values, axis=0)

    def counts(self, split: str) -> NDArray[np.int64]:
        """(C,) windows of each class in a split."""
        return np.bincount(self.of(split, self.labels), minlength=self.num_classes)


@dataclass(frozen=True, kw_only=True)
class Features:
    """Vectors of all windows, of one origin."""

    source: str
    """trained, untrained or band statistics."""

    kind: str
    """optical, radar, joint, or both where there are no embeddings."""

    vectors: NDArray[np.float32]
    """(M, D)."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one probe of one kind of features did on the test windows."""

    source: str
    kind: str
    probe: str

    predicted: NDArray[np.int64]
    """(test window,) classes."""

    details: Mapping[str, Any]
    """Of the linear probe: its strength, whether it converged."""

    @property
    def name(self) -> str:
        """Such as trained/joint/linear."""
        return f"{self.source}/{self.kind}/{self.probe}"


def run_probes(features: Features, samples: Samples, *, k: int) -> list[Result]:
    """Both probes: fitted on train, strength chosen on val, asked once for test.

    Band statistics mix reflectances with decibels and are standardised by the train windows before neighbours are
    sought among them; a band without any data counts as average.
    """
    vectors = features.vectors
    if features.source == STATISTICS:
        vectors = _standardised(vectors, samples)
    parts = {split: torch.from_numpy(samples.of(split, vectors)) for split in SPLITS}
    labels = {split: torch.from_numpy(samples.of(split, samples.labels)) for split in SPLITS}
    votes = knn_scores(parts["train"], labels["train"], parts["test"], num_classes=samples.num_classes, k=k)
    linear = fit_linear_probe(
        parts["train"], labels["train"], parts["val"], labels["val"], num_classes=samples.num_classes
    )
    details = {"strength": linear.strength, "converged": linear.converged}
    named = {"source": features.source, "kind": features.kind}
    return [
        Result(**named, probe="knn", predicted=votes.argmax(dim=1).numpy(), details={}),
        Result(**named, probe="linear", predicted=linear.predict(parts["test"]).numpy(), details=details),
    ]


def majority_result(samples: Samples) -> Result:
    """The class that is most frequent in train, whatever the window shows."""
    best = int(samples.counts("train").argmax())
    predicted = np.full(int(samples.counts("test").sum()), best)
    return Result(source=MAJORITY, kind="none", probe="none", predicted=predicted, details={})


class Scoreboard:
    """Scores of results on the same test windows, resampled with the same draws, so that differences are paired."""

    def __init__(self, samples: Samples, *, num_resamples: int, seed: int) -> None:
        self._samples = samples
        self._truth = samples.of("test", samples.labels)
        self.num_groups = int(samples.groups.max()) + 1
        self._draws = draw_groups(self.num_groups, num_resamples, np.random.default_rng(seed))

    def confusion(self, result: Result) -> Counts:
        """(C, C): a row per true class, a column per predicted one."""
        total: Counts = self._by_group(result).sum(axis=0)
        return total

    def row(self, result: Result) -> dict[str, Any]:
        """The scores of a result, each with its interval."""
        values = scores_of(self.confusion(result))
        resampled = resampled_scores(self._by_group(result), self._draws)
        names = {"source": result.source, "kind": result.kind, "probe": result.probe}
        return {**names, **result.details, **{s: self._with_interval(float(values[s]), resampled[s]) for s in values}}

    def difference(self, result: Result, other: Result) -> dict[str, Any]:
        """By how much a result is better than another one, each score with its interval."""
        values, others = (scores_of(self.confusion(each)) for each in (result, other))
        resampled, other_resampled = (resampled_scores(self._by_group(each), self._draws) for each in (result, other))
        names = {"source": result.source, "kind": result.kind, "probe": result.probe, "against": other.source}
        return {
            **names,
            **{s: self._with_interval(float(values[s] - others[s]), resampled[s] - other_resampled[s]) for s in values},
        }

    def _by_group(self, result: Result) -> Counts:
        return group_confusions(self._truth, result.predicted, self._samples.groups, self._samples.num_classes)

    def _with_interval(self, value: float, resampled: Values) -> dict[str, float | None]:
        # One group drawn again and again is always the same: it says nothing about what another place would give.
        low, high = interval(resampled) if self.num_groups > 1 else (None, None)
        return {"value": value, "low": low, "high": high}


def _standardised(vectors: NDArray[np.float32], samples: Samples) -> NDArray[np.float32]:
    train = samples.of("train", vectors).astype(np.float64)
    mean, std = np.nanmean(train, axis=0), np.nanstd(train, axis=0)
    standardised: NDArray[np.float32] = ((vectors - mean) / np.where(std > 0, std, 1)).astype(np.float32)
    return np.nan_to_num(standardised)
