"""How good scores are: accuracy, average precision, AUC and d-prime.

Scores may be logits or probabilities: only their order within a class (and, for accuracy, within a clip) matters.
A metric that is undefined for a class (no positives; for AUC also no negatives) is NaN there, and such classes are left
out of the means and counted. N clips, C classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from whisper_at_cli.extract.errors import WhisperATError


@dataclass(frozen=True, eq=False)
class Metrics:
    """All metrics of one evaluation. Means are over the classes for which the metric is defined."""

    accuracy: float  # NaN unless every clip has exactly one label
    mAP: float
    mAUC: float
    d_prime: float
    class_ap: np.ndarray  # (C,)
    class_auc: np.ndarray  # (C,)
    classes_without_positives: int


def evaluate_scores(scores, labels) -> Metrics:
    """Metrics of scores (N, C) against labels (N, C) of 0 and 1; NumPy arrays or tensors.

    Raises WhisperATError where a score is not finite.
    """
    scores, labels = _checked(scores, labels)
    by_class = [_class_ap_and_auc(scores[:, c], labels[:, c]) for c in range(scores.shape[1])]
    class_ap, class_auc = np.array(by_class, dtype=float).reshape(-1, 2).T
    mAUC = _mean_of_defined(class_auc)
    return Metrics(
        accuracy=_accuracy(scores, labels),
        mAP=_mean_of_defined(class_ap),
        mAUC=mAUC,
        d_prime=d_prime(mAUC),
        class_ap=class_ap,
        class_auc=class_auc,
        classes_without_positives=int((~labels.any(axis=0)).sum()),
    )


def d_prime(auc: float) -> float:
    """Distance between two unit normals that an observer would tell apart with this AUC."""
    if auc in (0, 1):
        return math.copysign(math.inf, auc - 0.5)
    return math.sqrt(2) * NormalDist().inv_cdf(auc) if 0 < auc < 1 else math.nan


def _checked(scores, labels) -> tuple[np.ndarray, np.ndarray]:
    """As arrays of one shape (N, C): scores float, labels bool."""
    scores, labels = (np.asarray(a.detach().cpu() if hasattr(a, "detach") else a) for a in (scores, labels))
    if scores.ndim != 2 or scores.shape != labels.shape:
        raise ValueError(f"scores {scores.shape} and labels {labels.shape} must both be (clips, classes)")
    bad = ~np.isfinite(scores)
    if bad.any():
        raise WhisperATError(
            f"{bad.sum()} of {bad.size} scores are not finite, the first for clip {np.argwhere(bad)[0][0]} of these: "
            "verify the cache, or train the head again"
        )
    return scores, labels.astype(bool)


def _accuracy(scores: np.ndarray, labels: np.ndarray) -> float:
    if not len(labels) or (labels.sum(axis=1) != 1).any():
        return math.nan
    return float((scores.argmax(axis=1) == labels.argmax(axis=1)).mean())


def _class_ap_and_auc(scores: np.ndarray, positive: np.ndarray) -> tuple[float, float]:
    """Average precision (precision at each positive, averaged) and AUC (how often a positive outscores a negative, a
    tie counting half) of one class. Clips with the same score form a group that any threshold takes or leaves whole."""
    positives = int(positive.sum())
    negatives = len(positive) - positives
    if not positives:
        return math.nan, math.nan
    order = np.argsort(-scores, kind="stable")
    falls = np.diff(scores[order]) != 0
    group_ends = np.flatnonzero(np.append(falls, True))
    taken = group_ends + 1
    hits = positive[order].cumsum()[group_ends]
    misses = taken - hits
    group_hits, group_misses = np.diff(hits, prepend=0), np.diff(misses, prepend=0)
    ap = (group_hits * hits / taken).sum() / positives
    if not negatives:
        return float(ap), math.nan
    beaten = negatives - misses + group_misses / 2
    return float(ap), float((group_hits * beaten).sum() / (positives * negatives))


def _mean_of_defined(values: np.ndarray) -> float:
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else math.nan
