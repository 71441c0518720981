"""Principal components of very many vectors, seen once: to paint encodings in three colours, for looking only."""

# N vectors, D width

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Moments:
    """Count, sum and products of vectors that come in parts; as large as D x D, however many there are."""

    def __init__(self, width: int) -> None:
        self.count = 0
        self._sum = np.zeros(width)
        self._products = np.zeros((width, width))

    def add(self, vectors: NDArray[np.floating[Any]]) -> None:
        """Take in (N, D)."""
        wide = vectors.astype(np.float64)
        self.count += len(wide)
        self._sum += wide.sum(axis=0)
        self._products += wide.T @ wide

    @property
    def mean(self) -> NDArray[np.float64]:
        """(D,)."""
        return self._sum / self.count

    @property
    def covariance(self) -> NDArray[np.float64]:
        """(D, D), of the population."""
        return self._products / self.count - np.outer(self.mean, self.mean)


@dataclass(frozen=True, slots=True, kw_only=True)
class Basis:
    """The first principal components of a run's encodings; the same for every tile, or tiles would show seams."""

    mean: NDArray[np.float64]
    """(D,)."""

    components: NDArray[np.float64]
    """(3, D) unit vectors, the largest element of each positive."""

    std: NDArray[np.float64]
    """(3,) along the components."""

    explained: NDArray[np.float64]
    """(3,) fractions of the total variance."""

    def colours(self, vectors: NDArray[np.floating[Any]]) -> NDArray[np.uint8]:
        """(N, D) -> (N, 3): mean - 2 σ to mean + 2 σ becomes 1 to 255, clipped; 0 stays free for no data."""
        along = (vectors.astype(np.float64) - self.mean) @ self.components.T
        unit = along / np.where(self.std > 0, 4 * self.std, 1) + 0.5
        return (1 + 254 * unit.clip(0, 1)).round().astype(np.uint8)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "mean": self.mean.tolist(),
            "components": self.components.tolist(),
            "std": self.std.tolist(),
            "explained_variance_ratio": self.explained.tolist(),
            "colours": "1 + 254 * clip((x - mean) . component / (4 * std) + 0.5, 0, 1); 0 is no data",
        }


def principal_basis(moments: Moments) -> Basis:
    """The three directions in which the vectors differ most; needs vectors of at least three numbers."""
    covariance = moments.covariance
    variances, directions = np.linalg.eigh(covariance)
    components = directions.T[::-1][:3]
    # Eigenvectors are given up to their sign: without a rule a rerun could swap colours.
    largest = np.abs(components).argmax(axis=1)
    components = components * np.sign(components[np.arange(3), largest])[:, np.newaxis]
    variance = variances[::-1][:3].clip(0)
    total = float(np.trace(covariance))
    return Basis(
        mean=moments.mean,
        components=components,
        std=np.sqrt(variance),
        explained=variance / total if total > 0 else np.zeros(3),
    )
