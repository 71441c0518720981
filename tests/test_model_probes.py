"""Probes and scores, against scikit-learn."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score
from sklearn.metrics import confusion_matrix as sklearn_confusion_matrix
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from model.probes import confusion_matrix, fit_linear_probe, knn_scores, scores

NUM_CLASSES = 4


def blobs(rows: int, seed: int, spread: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Overlapping classes in 10 dimensions of unlike scale and offset, one of them constant."""
    centres = np.random.default_rng(99).normal(size=(NUM_CLASSES, 10)) * 2
    random = np.random.default_rng(seed)
    labels = random.integers(0, NUM_CLASSES, rows)
    points = (centres[labels] + spread * random.normal(size=(rows, 10))) * np.linspace(0.1, 20, 10) + 3
    points[:, 4] = 7
    return torch.from_numpy(points.astype(np.float32)), torch.from_numpy(labels)


def test_nearest_neighbours_vote_as_in_scikit_learn() -> None:
    train, labels = blobs(300, 0)
    queries, _ = blobs(101, 1)
    train, queries = train - 3, queries - 3
    # For unit vectors, cosine similarity is 1 minus half the squared distance.
    oracle = KNeighborsClassifier(
        n_neighbors=20, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / 0.07)
    )
    oracle.fit(train.numpy(), labels.numpy())
    for chunk_rows in (7, 4096):
        ours = knn_scores(train, labels, queries, num_classes=NUM_CLASSES, chunk_rows=chunk_rows)
        np.testing.assert_allclose(ours.numpy(), oracle.predict_proba(queries.numpy()), atol=2e-4)


def test_a_single_neighbour_gives_its_own_class_and_few_rows_all_vote() -> None:
    train, labels = blobs(50, 0)
    own = knn_scores(train, labels, train, num_classes=NUM_CLASSES, k=1)
    assert torch.equal(own.argmax(dim=1), labels)
    few = knn_scores(train[:3], labels[:3], train, num_classes=NUM_CLASSES, k=20)
    torch.testing.assert_close(few.sum(dim=1), torch.ones(50))


@pytest.mark.parametrize("strength", [1e-3, 1e-1, 10.0])
def test_the_linear_probe_is_scikit_learns_logistic_regression(strength: float) -> None:
    train, labels = blobs(400, 0)
    queries, truth = blobs(200, 1)
    ours = fit_linear_probe(train, labels, queries, truth, num_classes=NUM_CLASSES, strengths=[strength])
    scaler = StandardScaler().fit(train.numpy())
    oracle = LogisticRegression(C=strength, max_iter=2000, tol=1e-8).fit(
        scaler.transform(train.numpy()), labels.numpy()
    )
    expected = oracle.predict_proba(scaler.transform(queries.numpy()))
    np.testing.assert_allclose(ours.logits(queries).softmax(dim=1).numpy(), expected, atol=2e-3)
    np.testing.assert_allclose(ours.weight.T.numpy(), oracle.coef_, atol=2e-3)
    assert ours.converged
    assert ours.accuracy_by_strength == {
        strength: pytest.approx((ours.predict(queries) == truth).float().mean().item())
    }


def test_the_strength_is_the_weakest_of_the_best_on_validation() -> None:
    train, labels = blobs(60, 0, spread=3.0)
    validation, truth = blobs(300, 1, spread=3.0)
    probe = fit_linear_probe(train, labels, validation, truth, num_classes=NUM_CLASSES)
    best = max(probe.accuracy_by_strength.values())
    assert len(probe.accuracy_by_strength) == 9
    assert probe.strength == min(
        strength for strength, accuracy in probe.accuracy_by_strength.items() if accuracy == best
    )
    assert (probe.predict(validation) == truth).float().mean().item() == pytest.approx(best)


def test_starting_from_the_weaker_fit_ends_where_a_fresh_start_ends() -> None:
    train, labels = blobs(200, 0)
    grid = fit_linear_probe(train, labels, train, labels, num_classes=NUM_CLASSES, strengths=[1e-3, 1e-2])
    fresh = fit_linear_probe(train, labels, train, labels, num_classes=NUM_CLASSES, strengths=[grid.strength])
    torch.testing.assert_close(grid.weight, fresh.weight, atol=1e-3, rtol=1e-2)


def test_no_strengths_are_refused() -> None:
    train, labels = blobs(20, 0)
    with pytest.raises(ValueError, match="strengths is empty"):
        fit_linear_probe(train, labels, train, labels, num_classes=NUM_CLASSES, strengths=[])


def test_a_constant_feature_does_not_spoil_the_probe() -> None:
    train, labels = blobs(100, 0)
    probe = fit_linear_probe(train, labels, train, labels, num_classes=NUM_CLASSES)
    assert probe.logits(train).isfinite().all()


@given(st.lists(st.tuples(st.integers(0, NUM_CLASSES - 1), st.integers(0, NUM_CLASSES - 1)), min_size=1, max_size=40))
def test_scores_are_scikit_learns(pairs: list[tuple[int, int]]) -> None:
    truth, predicted = (np.array(each) for each in zip(*pairs, strict=True))
    confusion = confusion_matrix(torch.from_numpy(truth), torch.from_numpy(predicted), NUM_CLASSES)
    labels = list(range(NUM_CLASSES))
    np.testing.assert_array_equal(confusion.numpy(), sklearn_confusion_matrix(truth, predicted, labels=labels))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn warns of classes that were predicted but never true
        expected = {
            "accuracy": accuracy_score(truth, predicted),
            "balanced_accuracy": balanced_accuracy_score(truth, predicted),
            "macro_f1": f1_score(truth, predicted, average="macro"),
        }
    assert scores(confusion) == pytest.approx(expected)
