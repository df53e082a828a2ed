"""Metrics of resampled clips: what accuracy, F1 and average precision become when recordings are drawn again.

A draw gives each recording a whole number, how often it was drawn, and every clip counts as often as its recording.
Counts are sums over recordings, so that for all draws they are one matrix product of weights and sums per recording.

K runs (a head's seeds count one by one), M systems (seeds averaged), N clips, G recordings, C classes, b draws at once.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
from scipy import sparse

from whisper_at_cli.extract.devices import cores
from whisper_at_cli.extract.evaluation.metrics import fold_weights
from whisper_at_cli.extract.evaluation.predictions import Predictions

WORST_BITS = -40.0  # log2 of a probability
FEW_POSITIVES = 40  # a class and fold: up to here a dense product is faster (measured with 50 classes of 400 clips)


class Statistic(Protocol):
    """A metric of every system as a function of how often each recording counts."""

    systems: tuple[str, ...]

    def values(self, weights_bG: np.ndarray) -> np.ndarray:
        """(b, M); NaN where a draw leaves it undefined."""
        ...


class _ClipMean:
    """The mean over clips of what each clip gives, every fold counting the same; mean over seeds."""

    def __init__(self, predictions: Predictions, recording_N: np.ndarray, recordings: int):
        self.systems = predictions.systems
        share_N = fold_weights(predictions.folds)
        given_MN = _mean_over_seeds(self.of_clips(predictions), predictions)
        self.sum_GM = np.stack([np.bincount(recording_N, share_N * of, recordings) for of in given_MN], axis=1)
        self.clips_G = np.bincount(recording_N, share_N, recordings)

    @staticmethod
    def of_clips(predictions: Predictions) -> np.ndarray:
        """(K, N) float64."""
        raise NotImplementedError

    def values(self, weights_bG: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore"):
            return (weights_bG @ self.sum_GM) / (weights_bG @ self.clips_G)[:, None]


class Accuracy(_ClipMean):
    """Share of clips whose highest score is their label's."""

    @staticmethod
    def of_clips(predictions: Predictions) -> np.ndarray:
        return right(predictions).astype(np.float64)


class Bits(_ClipMean):
    """How many bits of its label a model reads from a clip: by how much it finds the label more likely than a model
    that does not look (usable information, Xu et al. 2020). Scores have to be logits of a softmax."""

    @staticmethod
    def of_clips(predictions: Predictions) -> np.ndarray:
        return bits(predictions)


class ClassF1:
    """F1 of every class and system from the predictions of all folds together; mean over seeds."""

    def __init__(self, predictions: Predictions, recording_N: np.ndarray, recordings: int):
        self.predictions, self.systems = predictions, predictions.systems
        self.classes = C = len(predictions.class_names)
        truth_N, claimed_KN = predictions.labels.argmax(axis=1), predictions.scores.argmax(axis=2)
        self.true = _counts(truth_N, recording_N, (C, recordings))
        self.claimed = [_counts(of, recording_N, (C, recordings)) for of in claimed_KN]
        self.hits = [_counts(truth_N[of == truth_N], recording_N[of == truth_N], (C, recordings)) for of in claimed_KN]

    def class_values(self, weights_bG: np.ndarray) -> np.ndarray:
        """(b, M, C); NaN for a class of which no clip was drawn."""
        weights_Gb = np.ascontiguousarray(weights_bG.T)
        true_Cb = self.true @ weights_Gb
        found = np.empty((len(self.claimed), *true_Cb.shape))
        for run, (hits, claimed) in enumerate(zip(self.hits, self.claimed, strict=True)):
            with np.errstate(invalid="ignore"):
                found[run] = 2 * (hits @ weights_Gb) / (true_Cb + claimed @ weights_Gb)
        found[:, true_Cb == 0] = np.nan
        return _mean_over_seeds(found, self.predictions).transpose(2, 0, 1)


class ClassAP:
    """Average precision of every class and system, each positive ranked within its fold; mean over seeds.

    Clips with the same score pass together. A drawn clip counts as often as it was drawn, as a positive and among the
    clips that are ranked above others.
    """

    def __init__(self, predictions: Predictions, recording_N: np.ndarray, recordings: int):
        self.predictions, self.systems, self.recording_N = predictions, predictions.systems, recording_N
        self.classes = len(predictions.class_names)
        folds = [np.flatnonzero(predictions.folds == number) for number in np.unique(predictions.folds)]
        self.folds = [rows for rows in folds if predictions.labels[rows].any()]  # others rank nothing
        self.rankings = [
            [_ranking(predictions.labels[rows], scores[rows]) for rows in self.folds] for scores in predictions.scores
        ]

    def class_values(self, weights_bG: np.ndarray) -> np.ndarray:
        """(b, M, C); NaN for a class of which no positive was drawn."""
        weights_Gb = np.ascontiguousarray(weights_bG.T, dtype=np.float32)
        weights = [weights_Gb[self.recording_N[rows]] for rows in self.folds]
        with ThreadPoolExecutor(max(1, min(cores(), len(self.rankings)))) as pool:
            draws = len(weights_bG)
            found = np.stack(list(pool.map(lambda rankings: self._class_ap(rankings, weights, draws), self.rankings)))
        return _mean_over_seeds(found, self.predictions).transpose(2, 0, 1)

    def values(self, weights_bG: np.ndarray) -> np.ndarray:
        """(b, M): the mean over classes of which a positive was drawn."""
        return mean_over_classes(self.class_values(weights_bG))

    def _class_ap(self, rankings: list[_Ranking], weights: list[np.ndarray], draws: int) -> np.ndarray:
        """(C, b) of one run; `weights` are those of the clips (n, b) of each fold, for b draws."""
        total, positives = np.zeros((2, self.classes, draws))
        for ranking, weights_nb in zip(rankings, weights, strict=True):
            of_classes, summed, drawn = ranking.precisions(weights_nb)
            total[of_classes] += summed
            positives[of_classes] += drawn
        with np.errstate(invalid="ignore"):
            return total / positives


class _Ranking(Protocol):
    """The clips of one fold, sorted for each class by one run. n clips, P positives, c classes that have any."""

    def precisions(self, weights_nb: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Classes (c,), the sum of the precision at each drawn positive (c, b), and how many were drawn (c, b)."""
        ...


def _ranking(labels_nC: np.ndarray, scores_nC: np.ndarray) -> _Ranking:
    few = labels_nC.sum() <= FEW_POSITIVES * max(1, labels_nC.any(axis=0).sum())
    return (_FewPositives if few else _ManyPositives)(labels_nC, scores_nC)


class _FewPositives:
    """What lies above each positive, of all classes at once, as one dense matrix product."""

    def __init__(self, labels_nC: np.ndarray, scores_nC: np.ndarray):
        of_class, self.clip_P = np.nonzero(labels_nC.T)
        self.classes, class_P = np.unique(of_class, return_inverse=True)
        own_P = scores_nC[self.clip_P, of_class]
        self.above_Pn = (scores_nC.T[of_class] >= own_P[:, None]).astype(np.float32)
        places = np.arange(len(of_class))
        self.class_cP = _counts(class_P, places, (len(self.classes), len(places)))
        beside = [
            (first + a, first + b)
            for first, own in ((here[0], own_P[here]) for here in map(np.flatnonzero, self.class_cP.toarray()))
            for a, b in [np.nonzero(own[None, :] >= own[:, None])]
        ]
        rows, columns = (np.concatenate(side) for side in zip(*beside, strict=True))
        self.reached_PP = _counts(rows, columns, (len(places), len(places)))

    def precisions(self, weights_nb: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        drawn_Pb = weights_nb[self.clip_P]
        precision = self.reached_PP @ drawn_Pb
        precision /= np.maximum(self.above_Pn @ weights_nb, 1)  # 0 only where the positive itself was not drawn
        precision *= drawn_Pb
        return self.classes, self.class_cP @ precision, self.class_cP @ drawn_Pb


class _ManyPositives:
    """How many clips lie between two positives that follow each other, by a sparse product, and sums of these.

    U places: the different scores of positives, class by class.
    """

    def __init__(self, labels_nC: np.ndarray, scores_nC: np.ndarray):
        n = len(labels_nC)
        self.classes = np.flatnonzero(labels_nC.any(axis=0))
        self.blocks: list[tuple[int, int]] = []  # first place, last place + 1
        clips, hits, places = [], [], 0
        for c in self.classes:
            order = np.argsort(-scores_nC[:, c], kind="stable")
            falling, positive = -scores_nC[order, c], np.flatnonzero(labels_nC[order, c])
            ends, place = np.unique(np.searchsorted(falling, falling[positive], side="right"), return_inverse=True)
            at = np.searchsorted(ends, np.arange(ends[-1]), side="right")
            clips.append((places + at, order[: ends[-1]]))
            hits.append((places + place, order[positive]))
            self.blocks.append((places, places + len(ends)))
            places += len(ends)
        self.clips_Un, self.hits_Un = (
            _counts(
                np.concatenate([place for place, _ in pairs]), np.concatenate([clip for _, clip in pairs]), (places, n)
            )
            for pairs in (clips, hits)
        )

    def precisions(self, weights_nb: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        clips_Ub, hits_Ub = self.clips_Un @ weights_nb, self.hits_Un @ weights_nb
        summed, drawn = np.empty((2, len(self.blocks), weights_nb.shape[1]))
        for at, (first, last) in enumerate(self.blocks):
            here = hits_Ub[first:last]
            reached, above = here.cumsum(axis=0), clips_Ub[first:last].cumsum(axis=0)
            drawn[at] = reached[-1]
            np.divide(reached, np.maximum(above, 1), out=reached)
            summed[at] = np.einsum("ub,ub->b", reached, here)
        return self.classes, summed, drawn


def right(predictions: Predictions) -> np.ndarray:
    """(K, N) bool: whether a clip's highest score is its label's, the first of several that are equal."""
    return predictions.scores.argmax(axis=2) == predictions.labels.argmax(axis=1)


def bits(predictions: Predictions) -> np.ndarray:
    """(K, N) log2 of the probability of a clip's label, minus that under the shares of classes among the clips of the
    other folds (of all clips, where there is one fold), each class counted once more than it is there.

    A probability counts as WORST_BITS at least: a class that was not trained on has none.
    """
    label_N = predictions.labels.argmax(axis=1)
    scores = predictions.scores.astype(np.float64)
    scores -= scores.max(axis=2, keepdims=True)
    log_KN = np.take_along_axis(scores, label_N[None, :, None], axis=2)[:, :, 0] - np.log(np.exp(scores).sum(axis=2))
    prior_N = np.empty(len(label_N))
    for number in np.unique(predictions.folds):
        here = predictions.folds == number
        others = predictions.labels[~here] if not here.all() else predictions.labels
        shares = (others.sum(axis=0) + 1) / (len(others) + others.shape[1])
        prior_N[here] = np.log(shares[label_N[here]])
    return (np.maximum(log_KN / np.log(2), WORST_BITS) - prior_N / np.log(2)).astype(np.float64)


def mean_over_classes(values: np.ndarray) -> np.ndarray:
    """Over the last axis; classes that are undefined are left out, and without any the mean is NaN."""
    defined = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(defined, values, 0).sum(axis=-1) / defined.sum(axis=-1)


def _counts(row: np.ndarray, column: np.ndarray, shape: tuple[int, int]) -> sparse.csr_matrix:
    """How often each pair of row and column occurs."""
    return sparse.csr_matrix((np.ones(len(row), dtype=np.float32), (row, column)), shape=shape)


def _mean_over_seeds(values: np.ndarray, predictions: Predictions) -> np.ndarray:
    """(K, ...) to (M, ...)."""
    if len(predictions.systems) == len(values):
        return values
    return np.stack([values[predictions.runs(system)].mean(axis=0) for system in predictions.systems])
