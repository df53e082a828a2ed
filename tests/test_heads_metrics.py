"""Metrics equal scikit-learn's where both are defined, and are NaN, not a number, where they are not."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, average_precision_score, roc_auc_score

from whisper_at_cli.extract.errors import WhisperATError
from whisper_at_cli.heads.metrics import d_prime, evaluate_scores


@pytest.mark.parametrize("ties", ["none", "some", "all"])
@pytest.mark.parametrize("seed", range(4))
def test_average_precision_and_auc_equal_scikit_learns(seed, ties):
    rng = np.random.default_rng(seed)
    labels = rng.random((200, 12)) < rng.random(12) * 0.5 + 0.02
    labels[0], labels[1] = True, False
    scores = rng.normal(size=labels.shape) + labels
    scores = {"none": scores, "some": scores.round(), "all": np.zeros_like(scores)}[ties]
    found = evaluate_scores(scores, labels)
    ap = [average_precision_score(labels[:, c], scores[:, c]) for c in range(12)]
    auc = [roc_auc_score(labels[:, c], scores[:, c]) for c in range(12)]
    np.testing.assert_allclose(found.class_ap, ap, rtol=1e-12)
    np.testing.assert_allclose(found.class_auc, auc, rtol=1e-12)
    assert found.mAP == pytest.approx(np.mean(ap)) and found.mAUC == pytest.approx(np.mean(auc))


def test_accuracy_equals_scikit_learns():
    rng = np.random.default_rng(0)
    scores, classes = rng.normal(size=(300, 10)), rng.integers(0, 10, 300)
    found = evaluate_scores(scores, np.eye(10)[classes])
    assert found.accuracy == accuracy_score(classes, scores.argmax(axis=1))


def test_a_class_without_positives_is_left_out_and_counted():
    labels = np.array([[1, 0, 1], [0, 0, 1], [1, 0, 1]])
    scores = np.array([[0.9, 0.5, 0.1], [0.1, 0.6, 0.2], [0.8, 0.7, 0.3]])
    found = evaluate_scores(scores, labels)
    assert found.classes_without_positives == 1
    np.testing.assert_array_equal(found.class_ap, [1, np.nan, 1])
    np.testing.assert_array_equal(found.class_auc, [1, np.nan, np.nan])  # the last has no negatives
    assert (found.mAP, found.mAUC) == (1, 1)


def test_what_is_undefined_is_nan():
    nothing = evaluate_scores(np.zeros((5, 2)), np.zeros((5, 2)))
    assert all(math.isnan(value) for value in (nothing.mAP, nothing.mAUC, nothing.d_prime, nothing.accuracy))
    assert math.isnan(evaluate_scores(np.zeros((2, 2)), np.array([[1, 1], [1, 0]])).accuracy)
    empty = evaluate_scores(np.zeros((0, 3)), np.zeros((0, 3)))
    assert math.isnan(empty.mAP) and math.isnan(empty.accuracy) and empty.class_ap.shape == (3,)


def test_d_prime_is_the_distance_of_two_normals_with_that_auc():
    distance = 1.7
    auc = 0.5 * (1 + math.erf(distance / 2))  # P(x + distance > y) for unit normals x and y
    assert d_prime(auc) == pytest.approx(distance)
    assert d_prime(0.5) == 0 and d_prime(1.0) == math.inf and d_prime(0.0) == -math.inf
    assert math.isnan(d_prime(math.nan))


def test_logits_and_probabilities_give_the_same_metrics_from_tensors_and_arrays():
    logits = torch.randn(50, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.eye(4)[torch.arange(50) % 4]
    one, other = evaluate_scores(logits, labels), evaluate_scores(logits.sigmoid().numpy(), labels.numpy())
    np.testing.assert_array_equal(one.class_ap, other.class_ap)
    assert (one.accuracy, one.mAUC) == (other.accuracy, other.mAUC)


def test_scores_that_are_not_finite_are_refused():
    scores = np.zeros((3, 2))
    scores[2, 1] = np.nan
    with pytest.raises(WhisperATError, match="1 of 6 scores are not finite, the first for clip 2"):
        evaluate_scores(scores, np.ones((3, 2)))
