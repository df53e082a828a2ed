"""Bootstrap over recordings: a metric of every system under 10,000 draws that all systems share.

Recordings are drawn, not clips, since clips of one recording sound alike. All that is concluded about intervals and
differences is in `intervals.py`.

M systems, N clips, G recordings, C classes, B draws.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from whisper_at_cli.extract.ahead import in_order
from whisper_at_cli.extract.errors import UsageError
from whisper_at_cli.extract.evaluation.predictions import Predictions
from whisper_at_cli.extract.evaluation.statistics import Accuracy, Bits, ClassAP, ClassF1, Statistic, mean_over_classes

DRAWS = 10_000
CLASS_DRAWS = 2_000  # of what is kept for every class and system
LEAST_DRAWS = 1_000
AP_BUDGET = 4e10  # clips times classes times runs times draws; beyond it mAP has fewer draws, at least LEAST_DRAWS
CHUNK = 1 << 21  # weights or values held at once
METRICS: dict[str, Callable[[Predictions, np.ndarray, int], Statistic]]
METRICS = {"accuracy": Accuracy, "mAP": ClassAP, "bits": Bits}
JACKKNIFE_BLOCKS = {"accuracy": 1_000, "mAP": 200, "bits": 1_000}  # at most
DIGITS = 12  # after the point: values that are equal but for rounding have to be ties


@dataclass(frozen=True, eq=False)
class Bootstrap:
    """A metric of each system as measured, under every draw, and with each block of recordings left out."""

    metric: str  # accuracy, mAP or bits
    systems: tuple[str, ...]  # (M,)
    estimate: np.ndarray  # (M,)
    draws: np.ndarray  # (B, M)
    jackknife: np.ndarray  # (blocks, M); NaN with one recording
    recordings: int
    clips: int

    def of(self, *systems: int) -> Bootstrap:
        """Some of the systems, by number."""
        at = list(systems)
        return Bootstrap(
            self.metric, tuple(self.systems[i] for i in at), self.estimate[at], self.draws[:, at],
            self.jackknife[:, at], self.recordings, self.clips,
        )  # fmt: skip

    @property
    def standard_error(self) -> np.ndarray:
        """(M,) deviation over draws, larger by sqrt(G / (G - 1)) since draws vary less than new recordings would."""
        return self.widening * np.nanstd(self.draws, axis=0)

    @property
    def widening(self) -> float:
        return float(np.sqrt(self.recordings / (self.recordings - 1))) if self.recordings > 1 else 1.0


def bootstrap(
    predictions: Predictions, *, metric: str | None = None, draws: int | None = None, seed: int = 0
) -> Bootstrap:
    """`metric` is accuracy, mAP or bits, by default accuracy or mAP as the labels allow; `draws` 10,000, of mAP fewer
    on very large data.

    Raises UsageError for accuracy and bits where a clip has not exactly one label.
    """
    return bootstrap_together([predictions], metric=metric, draws=draws, seed=seed)


def bootstrap_together(
    several: list[Predictions], *, metric: str | None = None, draws: int | None = None, seed: int = 0
) -> Bootstrap:
    """Of several predictions for the same clips in the same order, under the same draws; systems one after another."""
    metric = metric or several[0].metric
    if metric not in METRICS:
        raise UsageError(f"metric {metric!r} is not known; choose from {', '.join(METRICS)}")
    if metric != "mAP" and not several[0].single_label:
        raise UsageError(f"{metric} needs exactly one label on every clip; choose mAP")
    names, recording_N = np.unique(several[0].recordings, return_inverse=True)
    G, N = len(names), len(recording_N)
    kind = METRICS[metric]
    statistics: list[Statistic] = [kind(each, recording_N, G) for each in several]
    if draws is None:
        draws = affordable_draws(several) if metric == "mAP" else DRAWS
    width = max(G, sum(each.scores.shape[0] * each.scores.shape[2] for each in several))

    def values(weights_bG: np.ndarray) -> np.ndarray:
        return np.hstack([statistic.values(weights_bG) for statistic in statistics]).round(DIGITS)

    with ThreadPoolExecutor(1) as pool:  # the next weights are drawn meanwhile
        drawn = np.concatenate(list(in_order(pool, values, draw_weights(G, draws, seed, width), ahead=1)))
    return Bootstrap(
        metric=metric,
        systems=tuple(system for each in statistics for system in each.systems),
        estimate=values(np.ones((1, G)))[0],
        draws=drawn,
        jackknife=np.concatenate([values(left) for left in blocks_left_out(G, JACKKNIFE_BLOCKS[metric], width)]),
        recordings=G,
        clips=N,
    )


def affordable_draws(several: list[Predictions]) -> int:
    """Draws of mAP within AP_BUDGET, from LEAST_DRAWS to DRAWS."""
    work = sum(each.scores.size for each in several)
    return int(min(DRAWS, max(LEAST_DRAWS, AP_BUDGET / work)))


def draw_weights(recordings: int, draws: int, seed: int, width: int = 0) -> Iterator[np.ndarray]:
    """(b, G) whole numbers: how often each recording is drawn, G in all in every draw. A few draws at a time."""
    rng = np.random.default_rng(seed)
    for b in _pieces(draws, max(recordings, width)):
        drawn = rng.integers(0, recordings, size=(b, recordings))
        drawn += np.arange(b)[:, None] * recordings
        yield np.bincount(drawn.reshape(-1), minlength=b * recordings).reshape(b, recordings)


def blocks_left_out(recordings: int, most: int, width: int = 0) -> Iterator[np.ndarray]:
    """(b, G) float64: 1, or 0 for the recordings of one block. Up to `most` recordings each is a block of its own."""
    block_of = np.arange(recordings) * min(recordings, most) // recordings
    first = 0
    for b in _pieces(int(block_of[-1]) + 1, max(recordings, width)):
        yield (block_of != np.arange(first, first + b)[:, None]).astype(np.float64)
        first += b


def _pieces(count: int, width: int) -> list[int]:
    size = max(1, min(count, CHUNK // width))
    return [min(size, count - first) for first in range(0, count, size)]


@dataclass(frozen=True, eq=False)
class ClassBootstrap:
    """The score of every class (F1, or average precision) as measured and under every draw."""

    systems: tuple[str, ...]
    estimate: np.ndarray  # (M, C), NaN where undefined
    draws: np.ndarray  # (B, M, C) float32


def bootstrap_classes(predictions: Predictions, *, draws: int = CLASS_DRAWS, seed: int = 0) -> ClassBootstrap:
    """F1 where every clip has one label, else average precision."""
    names, recording_N = np.unique(predictions.recordings, return_inverse=True)
    kind = ClassF1 if predictions.single_label else ClassAP
    statistic = kind(predictions, recording_N, len(names))
    width = max(len(names), predictions.scores.shape[0] * predictions.scores.shape[2])
    return ClassBootstrap(
        statistic.systems,
        statistic.class_values(np.ones((1, len(names))))[0],
        np.concatenate(
            [statistic.class_values(w).astype(np.float32) for w in draw_weights(len(names), draws, seed, width)]
        ),
    )


def macro(found: ClassBootstrap) -> tuple[np.ndarray, np.ndarray]:
    """(M,) and (B, M): the mean over classes that are defined."""
    return mean_over_classes(found.estimate), mean_over_classes(found.draws)
