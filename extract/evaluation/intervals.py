"""Intervals of a bootstrap, a band that holds for all systems at once, and which systems differ.

- The interval of one system is BCa (Efron, 1987): percentiles of the draws, moved for bias and skewness.
- The simultaneous band holds every system's true value at once. In each draw the largest deviation over systems is
  taken, each as a normal score (max-t), and the 95 % quantile of these takes the place of 1.96 in all the systems' BCa
  intervals; a little more with few recordings, as Student's t has it (Hesterberg, 2015).
- Differences between systems are paired, since all share a draw. Which system is best was chosen on the same clips, so
  two systems are called different only where their difference stands out from the largest of *all* pairs (max-t).
- The exact test swaps the predictions of two systems in whole recordings. With one clip a recording it is McNemar's.

M systems, G recordings, B draws, P pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy import stats

from whisper_at_cli.extract.evaluation.bootstrap import DIGITS, Bootstrap
from whisper_at_cli.extract.evaluation.predictions import Predictions
from whisper_at_cli.extract.evaluation.statistics import right

LEVEL = 0.95


@dataclass(frozen=True, eq=False)
class Intervals:
    """What a bootstrap says of each system. `best` is the first of several that are equally good."""

    ci: np.ndarray  # (M, 2)
    band: np.ndarray  # (M, 2)
    best: int
    p: np.ndarray  # (M,) that the difference from the best is chance, adjusted for all pairs; 1 for the best

    @property
    def differs(self) -> np.ndarray:
        """(M,) bool: whether a system is worse than the best, of all pairs at once at 5 %."""
        return self.p < 1 - LEVEL


def intervals(found: Bootstrap) -> Intervals:
    """NaN where a system has no value, or there is one recording only."""
    best = int(np.nanargmax(found.estimate)) if not np.isnan(found.estimate).all() else 0
    pairs = [(best, other) for other in range(len(found.systems))]
    _, p = pair_p(found, pairs, among=list(combinations(range(len(found.systems)), 2)))
    p[best] = 1.0
    return Intervals(interval(found), band(found), best, p)


def interval(found: Bootstrap, level: float = LEVEL) -> np.ndarray:
    """(M, 2) BCa. Where all clips are right or none is, the draws do not vary: then the exact binomial bound."""
    if found.recordings < 2:
        return np.full((len(found.systems), 2), np.nan)
    return _bounds(found, (1 - level) / 2, (1 - level) / 2)


def _bounds(found: Bootstrap, tail: float, binomial_tail: float) -> np.ndarray:
    """(M, 2) BCa bounds with this probability below and above; the other one where draws do not vary."""
    bounds = [
        _bca(estimate, draws, jackknife, tail)
        for estimate, draws, jackknife in zip(found.estimate, found.draws.T, found.jackknife.T, strict=True)
    ]
    return _without_variation(found, np.array(bounds), binomial_tail)


def _bca(estimate: float, draws: np.ndarray, jackknife: np.ndarray, tail: float) -> tuple[float, float]:
    draws = draws[~np.isnan(draws)]
    if np.isnan(estimate) or not len(draws):
        return np.nan, np.nan
    below = ((draws < estimate).mean() + (draws <= estimate).mean()) / 2
    if not 0 < below < 1:
        return float(draws.min()), float(draws.max())
    left_out = np.nanmean(jackknife) - jackknife[~np.isnan(jackknife)]
    spread = (left_out**2).sum() ** 1.5
    acceleration = (left_out**3).sum() / (6 * spread) if spread > 0 else 0.0
    bias = stats.norm.ppf(below)
    z = bias + stats.norm.ppf([tail, 1 - tail])
    low, high = np.quantile(draws, stats.norm.cdf(bias + z / (1 - acceleration * z)))
    return float(low), float(high)


def _without_variation(found: Bootstrap, bounds: np.ndarray, tail: float) -> np.ndarray:
    """The same bounds (M, 2), but of an accuracy of 0 or 1 that of as many trials as recordings; of mAP undefined."""
    constant = np.nanstd(found.draws, axis=0) == 0 if len(found.draws) else np.zeros(len(bounds), dtype=bool)
    bounds[constant] = np.nan
    if found.metric == "accuracy":
        least = tail ** (1 / found.recordings)
        bounds[constant & (found.estimate == 1)] = least, 1.0
        bounds[constant & (found.estimate == 0)] = 0.0, 1 - least
    return bounds


def band(found: Bootstrap, level: float = LEVEL) -> np.ndarray:
    """(M, 2) the simultaneous band; NaN where a system has no value."""
    systems = len(found.systems)
    if found.recordings < 2:
        return np.full((systems, 2), np.nan)
    least = 0.5 / len(found.draws)
    ranks = stats.rankdata(found.draws, axis=0, nan_policy="omit")  # the mean rank where draws are equal
    scores = np.abs(stats.norm.ppf(((ranks - 0.5) / len(found.draws)).clip(least, 1 - least)))
    largest = np.nanmax(np.nan_to_num(scores), axis=1)
    reach = found.widening * stats.t.isf(stats.norm.sf(np.quantile(largest, level)), found.recordings - 1)
    tail = float(stats.norm.sf(reach))
    return _bounds(found, tail, (1 - level) / 2 / systems)


def pair_p(
    found: Bootstrap, pairs: list[tuple[int, int]], among: list[tuple[int, int]] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Two p-values (P,) of each pair: that of the pair alone, and that adjusted for all of `among` (the pairs).

    How often is a draw's deviation from the measured difference, in standard errors, as large as the difference itself?
    """
    among = pairs if among is None else among
    deviations = np.zeros(len(found.draws))
    for pair in among:
        t, _ = _t(found, pair)
        np.fmax(deviations, t, out=deviations)
    alone, adjusted = np.ones(len(pairs)), np.ones(len(pairs))
    for at, pair in enumerate(pairs):
        t, measured = _t(found, pair)
        if np.isnan(measured):
            alone[at] = adjusted[at] = np.nan
            continue
        alone[at], adjusted[at] = ((1 + (of >= measured - 1e-9).sum()) / (1 + len(of)) for of in (t, deviations))
    return alone, np.maximum(alone, adjusted)


def _t(found: Bootstrap, pair: tuple[int, int]) -> tuple[np.ndarray, float]:
    """Of a difference: (B,) deviations of the draws from what was measured, in standard errors; and what was measured,
    in the larger standard errors that new recordings would have."""
    a, b = pair
    draws, estimate = found.draws[:, a] - found.draws[:, b], found.estimate[a] - found.estimate[b]
    deviation = np.abs(draws - estimate)
    if np.isnan(deviation).any():
        error, deviation = np.nanstd(draws), np.nan_to_num(deviation)
    else:
        error = np.std(draws)
    if np.isnan(estimate) or found.recordings < 2:
        return np.zeros(len(draws)), np.nan
    if error <= 1e-12:
        return np.zeros(len(draws)), 0.0 if abs(estimate) < 1e-12 else np.inf
    return deviation / error, abs(estimate) / (found.widening * error)


def difference(found: Bootstrap, pair: tuple[int, int], level: float = LEVEL) -> tuple[float, tuple[float, float]]:
    """The first system's value minus the second's, and its BCa interval."""
    a, b = pair
    estimate = round(float(found.estimate[a] - found.estimate[b]), DIGITS - 1)
    draws, jackknife = ((values[:, a] - values[:, b]).round(DIGITS - 1) for values in (found.draws, found.jackknife))
    if found.recordings < 2:
        return estimate, (np.nan, np.nan)
    return estimate, _bca(estimate, draws, jackknife, (1 - level) / 2)


@dataclass(frozen=True)
class ExactTest:
    """An exact test of two accuracies."""

    p: float
    only_first: float  # clips that the first alone recognised (mean over seeds)
    only_second: float
    mcnemar: bool  # each recording has one clip and each system one seed


def exact_test(first: Predictions, second: Predictions) -> ExactTest:
    """Of two systems on the same clips in the same order: would their difference in clips recognised be as large if
    which of them said what were a coin's toss for each recording? With several seeds, the sum over seeds counts."""
    _, recording_N = np.unique(first.recordings, return_inverse=True)
    correct = [right(each).astype(np.int64) for each in (first, second)]
    seeds = [len(each) for each in correct]
    per_clip = correct[0].sum(axis=0) * seeds[1] - correct[1].sum(axis=0) * seeds[0]  # in units of 1 / all pairs
    total = seeds[0] * seeds[1]
    per_recording = np.bincount(recording_N, per_clip).round().astype(np.int64)
    share = [each.mean(axis=0) for each in correct]
    return ExactTest(
        p=_sign_flips(per_recording // np.gcd.reduce([total, *np.abs(per_recording).tolist()])),
        only_first=float((share[0] * (1 - share[1])).sum()),
        only_second=float((share[1] * (1 - share[0])).sum()),
        mcnemar=total == 1 and len(per_recording) == len(recording_N),
    )


def _sign_flips(differences: np.ndarray) -> float:
    """Probability that the sum of these whole numbers, with signs drawn at random, is at least as far from 0."""
    sizes, counts = np.unique(np.abs(differences[differences != 0]), return_counts=True)
    probability = np.ones(1)  # of the sums -reach to reach
    for size, count in zip(sizes.tolist(), counts.tolist(), strict=True):
        steps = np.zeros(2 * size * count + 1)
        steps[:: 2 * size] = stats.binom.pmf(np.arange(count + 1), count, 0.5)
        probability = np.convolve(probability, steps)
    reach = len(probability) // 2
    extreme = np.abs(np.arange(-reach, reach + 1)) >= abs(int(differences.sum()))
    return float(min(1.0, probability[extreme].sum()))
