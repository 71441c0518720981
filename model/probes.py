"""What frozen embeddings know: nearest neighbours, a linear probe, and how they score.

Hyper-parameters are chosen on validation data only. Everything stays on the device of its inputs.
"""

# T train rows, V validation rows, M rows to predict, D width, C classes

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

STRENGTHS: Final = tuple(10.0**power for power in range(-5, 4))
"""C of the linear probe to choose from: how much the data weighs against the penalty."""


def knn_scores(
    train: Tensor,
    labels: Tensor,
    queries: Tensor,
    *,
    num_classes: int,
    k: int = 20,
    temperature: float = 0.07,
    chunk_rows: int = 4096,
) -> Tensor:
    """Classes of the nearest train rows by cosine, each voting exp(similarity / temperature).

    Args:
        train: (T, D) embeddings.
        labels: (T,) integers below C.
        queries: (M, D) embeddings.
        num_classes: C.
        k: Neighbours that vote; all T where there are fewer.
        temperature: The smaller, the more the nearest decide.
        chunk_rows: Queries compared with all of `train` at a time, which bounds memory.

    Returns:
        (M, C) shares of the votes, each row summing to 1; argmax is the prediction.
    """
    train = functional.normalize(train.float(), dim=1)
    scores = []
    for chunk in torch.split(functional.normalize(queries.float(), dim=1), chunk_rows):
        similarity, nearest = (chunk @ train.T).topk(min(k, len(train)), dim=1)
        votes = (similarity / temperature).softmax(dim=1)
        scores.append(votes.new_zeros(len(chunk), num_classes).scatter_add_(1, labels[nearest], votes))
    return torch.cat(scores)


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearProbe:
    """A multinomial logistic regression on standardised embeddings."""

    mean: Tensor
    """(D,) of the train rows."""

    std: Tensor
    """(D,) of the train rows, 1 where a feature is constant."""

    weight: Tensor
    """(D, C)."""

    bias: Tensor
    """(C,)."""

    strength: float
    """The C that was chosen."""

    accuracy_by_strength: dict[float, float]
    """Validation accuracy of every C that was tried."""

    converged: bool
    """Whether the chosen fit ended with a gradient near 0."""

    def logits(self, embeddings: Tensor) -> Tensor:
        """(M, D) -> (M, C)."""
        return (embeddings.float() - self.mean) / self.std @ self.weight + self.bias

    def predict(self, embeddings: Tensor) -> Tensor:
        """(M, D) -> (M,) class of each row."""
        return self.logits(embeddings).argmax(dim=1)


def fit_linear_probe(
    train: Tensor,
    labels: Tensor,
    validation: Tensor,
    validation_labels: Tensor,
    *,
    num_classes: int,
    strengths: Sequence[float] = STRENGTHS,
    max_iterations: int = 500,
) -> LinearProbe:
    """Fit on the train rows for each strength, and keep the fit that is best on the validation rows.

    Each fit minimises strength * (summed cross-entropy) + (squared weights) / 2, bias unpenalised, as scikit-learn's
    LogisticRegression does. Of equals the weakest is kept. It is not fitted again on train and validation together.

    Args:
        train: (T, D) embeddings.
        labels: (T,) integers below C.
        validation: (V, D) embeddings.
        validation_labels: (V,).
        num_classes: C.
        strengths: To choose from, tried in rising order, each fit starting from the one before.
        max_iterations: Of L-BFGS per fit.
    """
    train = train.float()
    mean, std = train.mean(dim=0), train.std(dim=0, correction=0)
    std = torch.where(std > 0, std, torch.ones_like(std))
    features = (train - mean) / std
    parameters = torch.zeros(train.shape[1] + 1, num_classes, device=train.device)
    best: LinearProbe | None = None
    accuracies: dict[float, float] = {}
    for strength in sorted(strengths):
        parameters, converged = _fit(features, labels, parameters, strength, max_iterations)
        probe = LinearProbe(
            mean=mean,
            std=std,
            weight=parameters[:-1],
            bias=parameters[-1],
            strength=strength,
            accuracy_by_strength=accuracies,
            converged=converged,
        )
        accuracies[strength] = (probe.predict(validation) == validation_labels).float().mean().item()
        if best is None or accuracies[strength] > accuracies[best.strength]:
            best = probe
    if best is None:
        raise ValueError("strengths is empty: there is nothing to choose from")
    return best


def confusion_matrix(truth: Tensor, predicted: Tensor, num_classes: int) -> Tensor:
    """Truth (M,) and predicted (M,) -> (C, C) counts, a row per true class, a column per predicted one."""
    return torch.bincount(truth * num_classes + predicted, minlength=num_classes**2).view(num_classes, num_classes)


def scores(confusion: Tensor) -> dict[str, float]:
    """Scores of a confusion matrix (C, C).

    Returns:
        accuracy; balanced_accuracy, the mean recall over the classes that occur in the truth; macro_f1, the mean F1
        over the classes that occur in the truth or in the predictions.
    """
    confusion = confusion.double()
    right, true, predicted = confusion.diagonal(), confusion.sum(dim=1), confusion.sum(dim=0)
    seen = (true + predicted) > 0
    return {
        "accuracy": (right.sum() / confusion.sum()).item(),
        "balanced_accuracy": (right[true > 0] / true[true > 0]).mean().item(),
        "macro_f1": (2 * right[seen] / (true + predicted)[seen]).mean().item(),
    }


@torch.enable_grad()
def _fit(features: Tensor, labels: Tensor, start: Tensor, strength: float, max_iterations: int) -> tuple[Tensor, bool]:
    """Weights and, as the last row, the bias (D + 1, C) that minimise the penalised loss; and whether they do."""
    parameters = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [parameters], max_iter=max_iterations, history_size=10, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        weight, bias = parameters[:-1], parameters[-1]
        penalty = weight.square().sum() / (2 * strength * len(features))
        loss = functional.cross_entropy(features @ weight + bias, labels) + penalty
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    closure()
    assert parameters.grad is not None
    return parameters.detach(), parameters.grad.abs().max().item() < 1e-4
