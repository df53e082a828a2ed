"""Scores of held-out predictions against scikit-learn's, and what is said of classes that have no score."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, confusion_matrix, f1_score

from whisper_at_cli.extract.evaluation.metrics import class_f1
from whisper_at_cli.probe.scores import HeldOut, best_layers

NAMES = ("a", "b", "c", "d")
TESTS = {1: np.arange(0, 30), 4: np.arange(30, 80)}


@pytest.fixture
def logits():
    return np.random.default_rng(0).normal(size=(100, 4))


def test_accuracy_is_the_mean_over_folds_and_f1_pools_them(logits):
    y = np.random.default_rng(1).integers(0, 4, 100)
    score = HeldOut(NAMES, np.eye(4)[y], TESTS).accuracy(3, logits)
    right, predicted = logits.argmax(1) == y, logits.argmax(1)
    assert score.folds == [
        {"fold": 1, "accuracy": right[:30].mean(), "clips": 30},
        {"fold": 4, "accuracy": right[30:80].mean(), "clips": 50},
    ]
    assert score.accuracy == pytest.approx((right[:30].mean() + right[30:80].mean()) / 2)
    assert score.accuracy_std == pytest.approx(abs(right[:30].mean() - right[30:80].mean()) / 2)
    assert list(score.class_f1.values()) == pytest.approx(f1_score(y[:80], predicted[:80], average=None).tolist())
    assert score.macro_f1 == pytest.approx(f1_score(y[:80], predicted[:80], average="macro"))


def test_a_class_without_tested_clips_has_no_f1_and_is_left_out_of_the_mean(logits):
    y = np.random.default_rng(1).integers(0, 3, 100)
    score = HeldOut(NAMES, np.eye(4)[y], TESTS).accuracy(1, logits)
    assert score.class_f1["d"] is None
    assert score.macro_f1 == pytest.approx(np.mean([score.class_f1[name] for name in "abc"]))


def test_a_class_that_is_never_predicted_has_an_f1_of_zero():
    y = np.arange(100) % 4
    score = HeldOut(NAMES, np.eye(4)[y], TESTS).accuracy(1, np.eye(4)[np.where(y == 2, 1, y)])
    assert score.class_f1["c"] == 0 and score.class_f1["a"] == 1


def test_a_class_of_one_clip_has_an_f1():
    with np.errstate(all="raise"):
        f1 = class_f1(np.array([0, 1, 1, 2]), np.array([0, 1, 2, 2]), 4)
    np.testing.assert_allclose(f1, [1, 2 / 3, 2 / 3, np.nan])


def test_the_confusion_matrix_counts_every_tested_clip_once(logits):
    y = np.random.default_rng(1).integers(0, 3, 100)
    confusion = HeldOut(NAMES, np.eye(4)[y], TESTS).accuracy(1, logits).confusion
    expected = confusion_matrix(y[:80], logits.argmax(1)[:80], labels=range(4))
    found = [[confusion.get(true, {}).get(predicted, 0) for predicted in NAMES] for true in NAMES]
    assert found == expected.tolist() and set(confusion) == {"a", "b", "c"}


@pytest.mark.parametrize(
    "values, best",
    [([0.1, 0.5, 0.5], [2, 3]), ([None, 0.0, None], [2]), ([None] * 3, []), ([1 / 3, 1 - 2 / 3, 0.3], [1, 2])],
)
def test_best_layers_are_all_that_tie_in_order(values, best):
    assert best_layers([1, 2, 3], values) == best


def test_map_is_the_mean_over_classes_with_positives_each_ranked_within_its_fold(logits):
    labels = np.random.default_rng(2).integers(0, 2, (100, 4))
    labels[:, 3] = 0
    labels[:30, 2] = 0
    score = HeldOut(NAMES, labels, TESTS).precision(2, logits)

    def ap(clips, c):
        return average_precision_score(labels[clips, c], logits[clips, c])

    def positives(clips, c):
        return labels[clips, c].sum()

    first, second = TESTS[1], TESTS[4]
    of_class = {
        c: (ap(first, c) * positives(first, c) + ap(second, c) * positives(second, c))
        / (positives(first, c) + positives(second, c))
        for c in (0, 1)
    } | {2: ap(second, 2)}
    assert list(score.class_ap.values()) == [*(pytest.approx(of_class[c]) for c in range(3)), None]
    assert score.mAP == pytest.approx(np.mean(list(of_class.values())))
    of_folds = [np.mean([ap(first, c) for c in (0, 1)]), np.mean([ap(second, c) for c in (0, 1, 2)])]
    assert [fold["mAP"] for fold in score.folds] == pytest.approx(of_folds)
    assert [fold["classes_without_positives"] for fold in score.folds] == [2, 1]
    assert [(fold["fold"], fold["clips"]) for fold in score.folds] == [(1, 30), (4, 50)] and score.layer == 2
    assert score.mAP_std == pytest.approx(np.std(of_folds)) and score.classes_without_positives == 1


def test_without_any_positives_map_is_undefined_and_not_zero(logits):
    score = HeldOut(NAMES, np.zeros((100, 4)), TESTS).precision(2, logits)
    assert score.mAP is None and score.mAP_std is None
