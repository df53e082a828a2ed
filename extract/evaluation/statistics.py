"""Metrics of resampled clips: what accuracy, F1 and average precision become when recordings are drawn again.

A draw gives each recording a whole number, how often it was drawn, and every clip counts as often as its recording.
Counts are sums over recordings, so that for all draws they are one matrix product of weights and sums per recording.

K runs (a head's seeds count one by one), M systems (seeds averaged), N clips, G recordings, C classes, b draws at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from scipy import sparse

from whisper_at_cli.extract.devices import cores
from whisper_at_cli.extract.evaluation.metrics import fold_weights
from whisper_at_cli.extract.evaluation.predictions import Predictions

WORST_BITS = -40.0  # log2 of a probability
FEW_POSITIVES = 40  # a class and fold: up to here a dense product is faster (measured with 50 classes of 400 clips)
SPARSE_SHARE = 0.1  # of the clips of a fold: a positive with fewer above it is quicker in a sparse product


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

    What is computed is how much precision is lost. A positive with nothing but positives above loses none under any
    draw, so that the better a model, the fewer of its positives are looked at.
    """

    def __init__(self, predictions: Predictions, recording_N: np.ndarray, recordings: int):
        self.predictions, self.systems, self.recording_N = predictions, predictions.systems, recording_N
        self.classes = len(predictions.class_names)
        folds = [np.flatnonzero(predictions.folds == number) for number in np.unique(predictions.folds)]
        self.folds = [rows for rows in folds if predictions.labels[rows].any()]  # others rank nothing
        with _pool(len(predictions.scores)) as pool:
            self.rankings = list(pool.map(self._rankings, predictions.scores))
        of_class, clip = np.nonzero(predictions.labels.T)
        self.positives_CG = _counts(of_class, recording_N[clip], (self.classes, recordings))

    def _rankings(self, scores_NC: np.ndarray) -> list[_Ranking]:
        return [_ranking(self.predictions.labels[rows], scores_NC[rows]) for rows in self.folds]

    def class_values(self, weights_bG: np.ndarray) -> np.ndarray:
        """(b, M, C); NaN for a class of which no positive was drawn."""
        found = 1 - np.stack(list(self._lost(weights_bG, lambda lost_Cb: lost_Cb)))
        return _mean_over_seeds(found, self.predictions).transpose(2, 0, 1)

    def values(self, weights_bG: np.ndarray) -> np.ndarray:
        """(b, M): the mean over classes of which a positive was drawn."""
        found = 1 - np.stack(list(self._lost(weights_bG, lambda lost_Cb: mean_over_classes(lost_Cb.T))))
        return _mean_over_seeds(found, self.predictions).T

    def _lost(self, weights_bG: np.ndarray, summary: Callable[[np.ndarray], np.ndarray]) -> Iterator[np.ndarray]:
        """`summary` of the precision (C, b) that each run loses, for b draws; NaN where no positive was drawn."""
        weights_Gb = np.ascontiguousarray(weights_bG.T, dtype=np.float32)
        drawn = [_Drawn.of(self.predictions.labels[rows], weights_Gb[self.recording_N[rows]]) for rows in self.folds]
        positives_Cb = (self.positives_CG @ weights_Gb).astype(np.float64)
        positives_Cb[positives_Cb == 0] = np.nan

        def of_run(rankings: list[_Ranking]) -> np.ndarray:
            lost_Cb = np.zeros(positives_Cb.shape)
            for ranking, of_fold in zip(rankings, drawn, strict=True):
                lost_Cb += ranking.lost(of_fold)
            return summary(lost_Cb / positives_Cb)

        with _pool(len(self.rankings)) as pool:
            yield from pool.map(of_run, self.rankings)


def _pool(tasks: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(1, min(cores(), tasks)))


@dataclass(frozen=True, eq=False)
class _Drawn:
    """How often the n clips of one fold were drawn, and below them the positives of each class and all clips."""

    weights_mb: np.ndarray  # m = n + C + 1
    clips: int  # n

    @classmethod
    def of(cls, labels_nC: np.ndarray, weights_nb: np.ndarray) -> _Drawn:
        positives_Cb = sparse.csr_matrix(labels_nC.T, dtype=np.float32) @ weights_nb
        return cls(np.concatenate([weights_nb, positives_Cb, weights_nb.sum(axis=0)[None]]), len(weights_nb))

    @property
    def weights_nb(self) -> np.ndarray:
        return self.weights_mb[: self.clips]


class _Ranking(Protocol):
    """The clips of one fold, sorted for each class by one run. n clips, U positives that have negatives above them."""

    def lost(self, drawn: _Drawn) -> np.ndarray:
        """(C, b): the sum over drawn positives of 1 - precision."""
        ...


def _ranking(labels_nC: np.ndarray, scores_nC: np.ndarray) -> _Ranking:
    few = labels_nC.sum() <= FEW_POSITIVES * max(1, labels_nC.any(axis=0).sum())
    return (_FewPositives if few else _ManyPositives)(labels_nC, scores_nC)


class _FewPositives:
    """What lies above each positive: of all classes at once as one dense product, or sparse where little lies above or
    below."""

    def __init__(self, labels_nC: np.ndarray, scores_nC: np.ndarray):
        (n, C), positive_Cn = labels_nC.shape, labels_nC.T > 0
        falls_C = np.where(labels_nC > 0, -np.inf, scores_nC).max(axis=0)  # the highest negative
        of_class, clip = np.nonzero(positive_Cn & (scores_nC <= falls_C).T)
        above_Un = scores_nC.T[of_class] >= scores_nC[clip, of_class][:, None]
        count = above_Un.sum(axis=1)
        order = np.argsort(np.minimum(count, n - count), kind="stable")
        of_class, self.clip_U, above_Un, count = of_class[order], clip[order], above_Un[order], count[order]
        little = int((np.minimum(count, n - count) <= n * SPARSE_SHARE).sum())
        self.much = above_Un[little:].astype(np.float32)
        some, most = above_Un[:little], count[:little, None] > n / 2
        self.little = _difference(np.hstack([some & ~most, np.zeros((little, C), bool), most]), ~some & most)
        of_own_U = np.arange(C) == of_class[:, None]
        self.reached = _difference(
            np.hstack([np.zeros_like(above_Un), of_own_U, np.zeros((len(order), 1), bool)]),
            positive_Cn[of_class] & ~above_Un,
        )
        self.class_CU = sparse.csr_matrix(of_own_U.T, dtype=np.float32)

    def lost(self, drawn: _Drawn) -> np.ndarray:
        lost_Ub = self.reached @ drawn.weights_mb
        above_Ub = np.concatenate([self.little @ drawn.weights_mb, self.much @ drawn.weights_nb])
        lost_Ub /= np.maximum(above_Ub, 1, out=above_Ub)  # 0 only where the positive itself was not drawn
        np.subtract(1, lost_Ub, out=lost_Ub)
        lost_Ub *= drawn.weights_nb[self.clip_U]
        return self.class_CU @ lost_Ub


class _ManyPositives:
    """How many clips lie between two positives that follow each other, by a sparse product, and sums of these.

    U places: the different scores of positives, class by class.
    """

    def __init__(self, labels_nC: np.ndarray, scores_nC: np.ndarray):
        n, self.classes = labels_nC.shape
        self.blocks: list[tuple[int, int, int]] = []  # class, first place, last place + 1
        clips, hits, places = [], [], 0
        for c in np.flatnonzero(labels_nC.any(axis=0)).tolist():
            order = np.argsort(-scores_nC[:, c], kind="stable")
            falling, positive = -scores_nC[order, c], np.flatnonzero(labels_nC[order, c])
            ends, place = np.unique(np.searchsorted(falling, falling[positive], side="right"), return_inverse=True)
            at = np.searchsorted(ends, np.arange(ends[-1]), side="right")
            clips.append((places + at, order[: ends[-1]]))
            hits.append((places + place, order[positive]))
            self.blocks.append((c, places, places + len(ends)))
            places += len(ends)
        self.clips_Un, self.hits_Un = (
            _counts(
                np.concatenate([place for place, _ in pairs]), np.concatenate([clip for _, clip in pairs]), (places, n)
            )
            for pairs in (clips, hits)
        )

    def lost(self, drawn: _Drawn) -> np.ndarray:
        clips_Ub, hits_Ub = self.clips_Un @ drawn.weights_nb, self.hits_Un @ drawn.weights_nb
        lost_Cb = np.zeros((self.classes, clips_Ub.shape[1]))
        for c, first, last in self.blocks:
            here = hits_Ub[first:last]
            reached, above = here.cumsum(axis=0), clips_Ub[first:last].cumsum(axis=0)
            np.divide(reached, np.maximum(above, 1), out=reached)
            lost_Cb[c] = np.einsum("ub,ub->b", 1 - reached, here)
        return lost_Cb


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


def _difference(more_Um: np.ndarray, less_Un: np.ndarray) -> sparse.csr_matrix:
    """(U, m): 1 where `more`, -1 where `less`, which has the first n columns."""
    found = more_Um.astype(np.float32)
    found[:, : less_Un.shape[1]] -= less_Un
    return sparse.csr_matrix(found)


def _counts(row: np.ndarray, column: np.ndarray, shape: tuple[int, int]) -> sparse.csr_matrix:
    """How often each pair of row and column occurs."""
    return sparse.csr_matrix((np.ones(len(row), dtype=np.float32), (row, column)), shape=shape)


def _mean_over_seeds(values: np.ndarray, predictions: Predictions) -> np.ndarray:
    """(K, ...) to (M, ...)."""
    if len(predictions.systems) == len(values):
        return values
    return np.stack([values[predictions.runs(system)].mean(axis=0) for system in predictions.systems])
