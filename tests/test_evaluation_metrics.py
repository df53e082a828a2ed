"""Metrics equal scikit-learn's where both are defined, and are NaN, not a number, where they are not."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm
from sklearn.metrics import accuracy_score, average_precision_score, confusion_matrix, roc_auc_score

from whisper_at_cli.extract.errors import WhisperATError
from whisper_at_cli.extract.evaluation import metrics
from whisper_at_cli.extract.evaluation.metrics import d_prime, evaluate_scores


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
    assert (empty.classes_without_positives, empty.classes_without_negatives) == (3, 0)


def test_d_prime_is_the_distance_of_two_normals_with_that_auc():
    distance = 1.7
    auc = 0.5 * (1 + math.erf(distance / 2))  # P(x + distance > y) for unit normals x and y
    assert d_prime(auc) == pytest.approx(distance)
    assert d_prime(0.5) == 0 and d_prime(1.0) == math.inf and d_prime(0.0) == -math.inf
    assert all(math.isnan(d_prime(auc)) for auc in (math.nan, -0.5, 1.5))


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


def unequal_classes(clips: int = 5000, classes: int = 50) -> tuple[np.ndarray, np.ndarray]:
    """Multi-label clips whose classes are in 0.1 to 60 % of them, and scores of unequal quality, many of them tied."""
    rng = np.random.default_rng(7)
    labels = rng.random((clips, classes)) < np.geomspace(0.001, 0.6, classes)
    scores = rng.normal(size=(clips, classes)) + labels * np.linspace(0, 3, classes)
    scores[:, ::3] = scores[:, ::3].round(1)
    return scores, labels


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_metric_equals_scikit_learns_on_classes_of_very_unequal_frequency(dtype):
    scores, labels = unequal_classes()
    scores = scores.astype(dtype)
    assert labels.sum(axis=0).min() < 10 and labels.sum(axis=0).max() > 2500
    found = evaluate_scores(torch.from_numpy(scores), torch.from_numpy(labels))
    ap = average_precision_score(labels, scores, average=None)
    auc = roc_auc_score(labels, scores, average=None)
    np.testing.assert_allclose(found.class_ap, ap, rtol=1e-12)
    np.testing.assert_allclose(found.class_auc, auc, rtol=1e-12)
    assert found.mAP == pytest.approx(ap.mean(), rel=1e-12) and found.mAUC == pytest.approx(auc.mean(), rel=1e-12)
    assert found.d_prime == pytest.approx(math.sqrt(2) * norm.ppf(auc.mean()))
    assert math.isnan(found.accuracy) and found.confusion is None and "exactly one label" in found.notes[-1]


def test_accuracy_and_confusion_equal_scikit_learns_on_classes_of_very_unequal_frequency():
    scores, labels = unequal_classes()
    classes = labels.argmax(axis=1)
    found = evaluate_scores(scores, np.eye(50)[classes])
    np.testing.assert_array_equal(
        found.confusion, confusion_matrix(classes, scores.argmax(axis=1), labels=np.arange(50))
    )
    assert found.accuracy == accuracy_score(classes, scores.argmax(axis=1)) == np.trace(found.confusion) / 5000


def test_a_class_that_is_everywhere_or_nowhere_is_counted_and_named_and_never_zero():
    scores, labels = unequal_classes(200, 6)
    labels[:, 0], labels[:, 1], labels[:, 2] = False, True, False
    found = evaluate_scores(scores, labels)
    assert (found.classes_without_positives, found.classes_without_negatives) == (2, 1)
    assert np.isnan(found.class_ap[[0, 2]]).all() and found.class_ap[1] == 1
    assert np.isnan(found.class_auc[:3]).all()
    assert found.mAP == pytest.approx(average_precision_score(labels[:, [1, 3, 4, 5]], scores[:, [1, 3, 4, 5]]))
    assert found.mAUC == pytest.approx(roc_auc_score(labels[:, 3:], scores[:, 3:]))
    assert found.notes[0].startswith("2 of 6 classes are in none") and found.notes[1].startswith("1 of 6 classes")


def test_one_clip_has_a_precision_and_an_accuracy_but_no_auc():
    found = evaluate_scores(np.array([[0.1, 0.9, 0.3]]), np.array([[0, 1, 0]]))
    np.testing.assert_array_equal(found.class_ap, [np.nan, 1, np.nan])
    assert found.accuracy == 1 and found.mAP == 1
    assert (found.classes_without_positives, found.classes_without_negatives) == (2, 1)
    assert np.isnan(found.class_auc).all() and math.isnan(found.mAUC) and math.isnan(found.d_prime)


def test_ranking_in_chunks_changes_nothing_and_the_scores_stay_as_they_were(monkeypatch):
    scores, labels = unequal_classes(300, 20)
    given = torch.from_numpy(scores.copy())
    whole = evaluate_scores(given, labels)
    assert (given.numpy() == scores).all()
    monkeypatch.setattr(metrics, "CHUNK_SCORES", 700)
    chunked = evaluate_scores(given, labels)
    np.testing.assert_allclose(whole.class_ap, chunked.class_ap, rtol=1e-14)  # sums of other lengths round otherwise
    np.testing.assert_allclose(whole.class_auc, chunked.class_auc, rtol=1e-14)


def test_perfect_scores_have_an_infinite_d_prime_and_a_note_says_so():
    found = evaluate_scores(np.eye(4), np.eye(4))
    assert (found.mAP, found.mAUC, found.d_prime, found.accuracy) == (1, 1, math.inf, 1)
    assert any("d-prime is infinite" in note for note in found.notes)


def test_half_precision_logits_are_ranked_as_their_exact_values():
    scores, labels = unequal_classes(200, 4)
    labels[0] = True
    half = torch.from_numpy(scores).to(torch.bfloat16)
    found = evaluate_scores(half, labels)
    np.testing.assert_allclose(found.class_ap, average_precision_score(labels, half.double().numpy(), average=None))


def test_whole_numbers_are_ranked_exactly():
    scores = np.array([[2**24], [2**24 + 1]])  # the same in float32
    assert evaluate_scores(scores, np.array([[0], [1]])).mAUC == 1


@pytest.mark.parametrize("scores, labels", [((4, 3), (4, 2)), ((4, 3), (3, 4)), ((2, 2, 2), (2, 2, 2)), ((4,), (4,))])
def test_scores_and_labels_of_other_shapes_than_clips_and_classes_are_refused(scores, labels):
    with pytest.raises(ValueError, match=r"must both be \(clips, classes\)"):
        evaluate_scores(np.zeros(scores), np.zeros(labels))


def test_classes_are_ranked_in_runs_of_like_and_bounded_size():
    positives = np.array([7, 100, 50, 49, 3, 99, 100, 1])
    order = np.argsort(-positives, kind="stable")
    runs = list(metrics._alike(order, positives, most=3))
    assert [positives[run].tolist() for run in runs] == [[100, 100, 99], [50, 49], [7], [3], [1]]
    runs = list(metrics._alike(order, positives, most=8))
    assert [positives[run].tolist() for run in runs] == [[100, 100, 99, 50], [49], [7], [3], [1]]


def test_scores_on_another_device_stay_there_while_they_are_sorted():
    assert metrics._ascending(torch.empty(2, 3, device="meta")).device.type == "meta"


def test_the_notes_say_what_the_means_leave_out_and_nothing_else():
    assert evaluate_scores(np.array([[1, 0], [0, 1], [0.4, 0.3]]), np.array([[0, 1], [0, 1], [1, 0]])).notes == []
    nothing = evaluate_scores(np.zeros((3, 2)), np.zeros((3, 2)))
    assert nothing.notes == [
        "2 of 2 classes are in none of the clips and do not count in mAP and mAUC",
        "accuracy is undefined: it needs exactly one label on every clip",
    ]
    wrong = evaluate_scores(np.array([[0, 1], [1, 0]]), np.eye(2))
    assert wrong.notes == ["mAUC is exactly 0, for which d-prime is infinite"] and wrong.d_prime == -math.inf


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_metrics_on_a_gpu_are_those_on_the_cpu():
    scores, labels = unequal_classes()
    here, there = evaluate_scores(scores, labels), evaluate_scores(torch.from_numpy(scores).cuda(), labels)
    np.testing.assert_allclose(here.class_ap, there.class_ap, rtol=1e-12)
    np.testing.assert_allclose(here.class_auc, there.class_auc, rtol=1e-12)
