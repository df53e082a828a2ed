"""Metrics for any scores and labels: scikit-learn's where defined, NaN where not, and nothing but order matters."""

import math
import warnings

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from properties import examples
from scipy.stats import norm
from sklearn.metrics import average_precision_score, confusion_matrix, roc_auc_score

from whisper_at_cli.extract.errors import WhisperATError
from whisper_at_cli.extract.evaluation import metrics
from whisper_at_cli.extract.evaluation.metrics import d_prime, evaluate_scores
from whisper_at_cli.probe.robustness.wer import Errors, count_errors, paper_normaliser

SHAPES = st.tuples(st.integers(1, 30), st.integers(1, 5))
TIED = st.integers(-3, 3).map(float)
ANY = st.floats(-1e300, 1e300)
SMALL = st.floats(-100, 100, width=32)


@st.composite
def evaluations(draw, elements=None, single_label=False):
    """Scores (N, C), with ties or without, and labels of any kind: classes in none of the clips and in all of them."""
    shape = draw(SHAPES)
    values = draw(st.sampled_from([TIED, ANY, SMALL])) if elements is None else elements
    scores = draw(arrays(np.float64, shape, elements=values))
    if single_label:
        labels = np.eye(shape[1], dtype=np.uint8)[
            draw(arrays(np.int64, shape[0], elements=st.integers(0, shape[1] - 1)))
        ]
    else:
        labels = draw(arrays(np.uint8, shape, elements=st.integers(0, 1)))
    return scores, labels


def expect_same(one, other) -> None:
    """The same but for the order of a sum, which moves the last bit."""
    np.testing.assert_allclose(one.class_ap, other.class_ap, rtol=1e-14)
    np.testing.assert_allclose(one.class_auc, other.class_auc, rtol=1e-14)
    means = ([each.mAP, each.mAUC, each.d_prime] for each in (one, other))
    np.testing.assert_allclose(*means, rtol=1e-12, atol=1e-12)


@examples(120)
@given(evaluations())
def test_ap_and_auc_are_scikit_learns_or_nan_where_undefined(made):
    scores, labels = made
    found = evaluate_scores(scores, labels)
    for c in range(labels.shape[1]):
        positives = labels[:, c].sum()
        if positives == 0:
            assert math.isnan(found.class_ap[c])
        else:
            assert found.class_ap[c] == pytest.approx(average_precision_score(labels[:, c], scores[:, c]), rel=1e-12)
        if positives in (0, len(labels)):
            assert math.isnan(found.class_auc[c])
        else:
            assert found.class_auc[c] == pytest.approx(roc_auc_score(labels[:, c], scores[:, c]), rel=1e-12, abs=1e-12)
    assert found.classes_without_positives == (labels.sum(axis=0) == 0).sum()
    assert found.classes_without_negatives == (labels.sum(axis=0) == len(labels)).sum()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the mean of nothing
        np.testing.assert_allclose(found.mAP, np.nanmean(found.class_ap), rtol=1e-12)
        np.testing.assert_allclose(found.mAUC, np.nanmean(found.class_auc), rtol=1e-12)


@examples(80)
@given(evaluations(single_label=True))
def test_accuracy_and_confusion_are_scikit_learns(made):
    scores, labels = made
    found, classes = evaluate_scores(scores, labels), labels.argmax(axis=1)
    everything = range(labels.shape[1])
    np.testing.assert_array_equal(found.confusion, confusion_matrix(classes, scores.argmax(axis=1), labels=everything))
    assert found.accuracy == (classes == scores.argmax(axis=1)).mean()


@examples(60)
@given(evaluations(), st.randoms(use_true_random=False))
def test_the_order_of_clips_and_of_classes_does_not_matter(made, rng):
    scores, labels = made
    clips, classes = list(range(scores.shape[0])), list(range(scores.shape[1]))
    rng.shuffle(clips)
    rng.shuffle(classes)
    found = evaluate_scores(scores, labels)
    expect_same(evaluate_scores(scores[clips], labels[clips]), found)
    other = evaluate_scores(scores[:, classes], labels[:, classes])
    np.testing.assert_allclose(other.class_ap, found.class_ap[classes], rtol=1e-14)
    np.testing.assert_allclose(other.class_auc, found.class_auc[classes], rtol=1e-14)
    np.testing.assert_allclose([other.mAP, other.mAUC], [found.mAP, found.mAUC], rtol=1e-12)


@examples(80)
@given(evaluations(elements=SMALL), st.sampled_from(["double", "cube", "rank", "bool"]))
def test_only_the_order_of_scores_matters(made, transform):
    scores, labels = made
    ranks = np.unique(scores, return_inverse=True)[1].reshape(scores.shape)
    other = {"double": scores * 2 + 0.0, "cube": ranks.astype(float) ** 3, "rank": ranks, "bool": ranks / 1000}[
        transform
    ]
    expect_same(evaluate_scores(other, labels), evaluate_scores(scores, labels))


@examples(40)
@given(evaluations(), st.integers(1, 40))
def test_how_many_classes_are_ranked_at_once_does_not_matter(made, chunk):
    scores, labels = made
    whole = evaluate_scores(scores, labels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "CHUNK_SCORES", chunk)
        expect_same(evaluate_scores(scores, labels), whole)


@examples(40)
@given(evaluations(elements=SMALL))
def test_scores_and_labels_are_left_as_they_are(made):
    scores, labels = made
    before = scores.tobytes(), labels.tobytes()
    evaluate_scores(scores, labels)
    assert (scores.tobytes(), labels.tobytes()) == before


@examples(40)
@given(evaluations(), st.sampled_from([np.nan, np.inf, -np.inf]), st.data())
def test_a_score_that_is_not_finite_is_refused(made, bad, data):
    scores, labels = made
    row, column = (data.draw(st.integers(0, length - 1)) for length in scores.shape)
    scores[row, column] = bad
    with pytest.raises(WhisperATError, match=f"1 of {scores.size} scores are not finite, the first for clip {row} "):
        evaluate_scores(scores, labels)


@examples(100)
@given(st.floats(0, 1))
def test_d_prime_is_its_formula_and_odd_around_one_half(auc):
    if auc in (0, 1):
        assert d_prime(auc) == math.copysign(math.inf, auc - 0.5)
    else:
        assert d_prime(auc) == pytest.approx(math.sqrt(2) * norm.ppf(auc), rel=1e-6, abs=1e-9)
    if 2**-20 < auc < 1 - 2**-20:
        assert d_prime(1 - auc) == pytest.approx(-d_prime(auc), rel=1e-6, abs=1e-9)


def edits(reference: list[str], hypothesis: list[str]) -> int:
    """The fewest substitutions, deletions and insertions: every way tried, row by row."""
    row = list(range(len(hypothesis) + 1))
    for i, word in enumerate(reference, start=1):
        before, row[0] = row[0], i
        for j, other in enumerate(hypothesis, start=1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (word != other))
    return row[-1]


SENTENCES = st.lists(st.lists(st.sampled_from(["a", "b", "c", "don't", "7"]), max_size=6), min_size=0, max_size=4)


@examples(100)
@given(SENTENCES, st.data())
def test_word_errors_are_the_fewest_edits_of_all_utterances(references, data):
    hypotheses = [data.draw(st.lists(st.sampled_from(["a", "b", "c", "don't", "8"]), max_size=6)) for _ in references]
    found = count_errors(map(" ".join, references), map(" ".join, hypotheses), str)
    wrong = sum(edits(*pair) for pair in zip(references, hypotheses, strict=True))
    words = sum(map(len, references))
    assert found == Errors(wrong, words)
    assert found.rate == (wrong / words if words else None)
    one_by_one = sum(
        (count_errors([" ".join(r)], [" ".join(h)], str) for r, h in zip(references, hypotheses, strict=True)), Errors()
    )
    assert one_by_one == found


@examples(60)
@given(st.text(max_size=30))
def test_a_text_has_no_errors_against_itself_and_only_insertions_against_nothing(text):
    normalise = paper_normaliser()
    words = len(normalise(text).split())
    assume(normalise(text).split() == normalise(text).split(" ") or not words)
    assert count_errors([text], [text], normalise) == Errors(0, words)
    assert count_errors([""], [text], normalise) == Errors(words, 0)
    assert count_errors([text], [""], normalise) == Errors(words, words)
