"""What a bootstrap says of classes: intervals of their scores, and how sure it is in which layer each is best.

M layers, C classes, B draws.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from whisper_at_cli.extract.evaluation.bootstrap import ClassBootstrap
from whisper_at_cli.extract.evaluation.intervals import LEVEL

TIED = 1e-12  # relative


@dataclass(frozen=True, eq=False)
class BestLayers:
    """For each class the layer that recognises it best (of several that tie the lowest), counted over classes."""

    best: np.ndarray  # (C,) from 0; -1 where a class has no score
    counts: np.ndarray  # (M,) classes that are best in each layer
    counts_ci: np.ndarray  # (M, 2) of these counts over draws
    kept: np.ndarray  # (C,) share of the draws in which a class keeps its layer; NaN without a score


def best_layers(found: ClassBootstrap) -> BestLayers:
    best, drawn = _best(found.estimate[None])[0], _best(found.draws)
    layers = np.arange(len(found.systems))
    counts = (drawn[:, :, None] == layers).sum(axis=1)
    low, high = np.quantile(counts, _tails(), axis=0)
    defined = drawn >= 0
    with np.errstate(invalid="ignore"):
        kept = ((drawn == best) & defined).sum(axis=0) / defined.sum(axis=0)
    kept[best < 0] = np.nan
    return BestLayers(best, (best[:, None] == layers).sum(axis=0), np.stack([low, high], axis=1), kept)


def _best(values: np.ndarray) -> np.ndarray:
    """(B, C) of values (B, M, C): the lowest of the best layers, -1 where none has a value."""
    filled = np.where(np.isnan(values), -1, values)
    best = (filled >= filled.max(axis=1, keepdims=True) * (1 - TIED)).argmax(axis=1)
    best[(filled < 0).all(axis=1)] = -1
    return best


def class_intervals(found: ClassBootstrap) -> np.ndarray:
    """(M, C, 2): percentiles of the draws in which a class has a score; NaN where these do not vary."""
    ordered = np.sort(found.draws, axis=0)  # NaN comes last
    last = (~np.isnan(ordered)).sum(axis=0) - 1
    bounds = []
    for share in _tails():
        place = share * np.maximum(last, 0)
        below = np.floor(place).astype(int)
        above = np.minimum(below + 1, np.maximum(last, 0))
        lower, upper = (np.take_along_axis(ordered, at[None], axis=0)[0] for at in (below, above))
        bounds.append(lower + (place - below) * (upper - lower))
    undefined = (last < 0) | (bounds[0] == bounds[1])
    return np.where(undefined[..., None], np.nan, np.stack(bounds, axis=-1))


def _tails() -> tuple[float, float]:
    return (1 - LEVEL) / 2, (1 + LEVEL) / 2
