"""Linear probes: how well does each layer of a cache tell the classes apart?

The time mean of one layer, standardised on the training clips, goes into a multinomial logistic regression (one label a
clip) or into one binary regression per class (any number of labels). On an accelerator as many layers as fit are solved
as one batch. On a CPU layers are solved side by side, each in one thread: on two idle cores that takes as long as one
batch whose products are shared between threads (0.19 s for ESC-10 and tiny.en), but such threads wait for each other,
which took 55 s when other programs kept the cores busy, against 0.6 s.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch

from whisper_at_cli.extract.cache import FeatureCache
from whisper_at_cli.extract.devices import choose_device
from whisper_at_cli.extract.errors import CacheError, UsageError
from whisper_at_cli.extract.folds import Fold, evaluation_folds
from whisper_at_cli.extract.progress import Progress
from whisper_at_cli.probe.scores import HeldOut, LayerAccuracy, LayerPrecision
from whisper_at_cli.probe.solver import solve

BATCH_BYTES = 1 << 30  # of memory that one batch of problems may take


@dataclass(frozen=True)
class ProbeResult:
    """Scores of every layer that was asked for, and what they came from. `asdict` of it is the command's JSON."""

    metric: str  # accuracy or mAP: what `layers` holds and what the best layers are best in
    layers: list[LayerAccuracy] | list[LayerPrecision]
    best_layer: int | None  # of several that are equally good, the lowest
    best_layer_per_class: dict[str, int | None]  # by F1 or average precision; None where that is undefined
    clips: int  # that were trained or tested on
    backbone: str
    strength: float
    seed: int
    device: str
    warnings: list[str] = field(default_factory=list)


def probe_layers(
    cache: FeatureCache,
    *,
    layers: str | Sequence[int] = "all",
    strength: float = 1.0,
    device: str = "auto",
    seed: int = 0,
    progress: Progress | None = None,
) -> ProbeResult:
    """Probe layers (1-based, or "all") on the official folds, else the split, else five random folds from `seed`.

    `strength` is scikit-learn's C: the smaller, the stronger the penalty. `progress` is told of layers. Raises
    UsageError where there is no such layer or nothing to tell apart, CacheError for features that are not finite.
    """
    numbers = _layer_numbers(cache, layers)
    if not (np.isfinite(strength) and strength > 0):
        raise UsageError(f"strength must be a positive number; it is {strength}")
    folds, warnings = evaluation_folds(cache.fold, cache.split, cache.labels, cache.done, seed=seed)
    job = _Job.plan(cache, folds, strength, _choose_device(device))

    scores, unconverged = [], []
    for score, open_folds in job.run(numbers):
        scores.append(score)
        unconverged += [f"layer {score.layer} fold {number}" for number in open_folds]
        if progress:
            progress(len(scores), len(numbers), f"layer {score.layer}")
    if unconverged:
        warnings.append(f"not converged, so approximate: {', '.join(unconverged)}; lower the strength {strength:g}")
    per_class = [score.class_f1 if job.metric == "accuracy" else score.class_ap for score in scores]
    return ProbeResult(
        metric=job.metric,
        layers=scores,
        best_layer=_best(numbers, [getattr(score, job.metric) for score in scores]),
        best_layer_per_class={name: _best(numbers, [values[name] for values in per_class]) for name in per_class[0]},
        clips=len(job.rows),
        backbone=cache.spec.backbone,
        strength=strength,
        seed=seed,
        device=str(job.device),
        warnings=warnings + job.warnings,
    )


def _layer_numbers(cache: FeatureCache, layers: str | Sequence[int]) -> list[int]:
    """Ascending, each once."""
    if isinstance(layers, str):
        if layers != "all":
            raise UsageError(f"layers are numbers from 1 or 'all'; {layers!r} was asked for")
        return list(range(1, cache.spec.layers + 1))
    numbers = sorted({operator.index(layer) for layer in layers})
    if not numbers:
        raise UsageError("no layer was asked for; give numbers from 1 or 'all'")
    for layer in numbers:
        if not 1 <= layer <= cache.spec.layers:
            raise UsageError(
                f"{cache.path} ({cache.spec.backbone}) has layers 1 to {cache.spec.layers}; "
                f"layer {layer} was asked for"
            )
    return numbers


def _choose_device(device: str) -> torch.device:
    """`auto` is CUDA or the CPU. MPS has to be asked for by name: the solver has not been tried there."""
    if device == "auto" and not torch.cuda.is_available():
        device = "cpu"
    return choose_device(device)


def _best(layers: list[int], values: list[float | None]) -> int | None:
    """The layer with the greatest value, the lowest of several."""
    defined = [(value, -layer) for layer, value in zip(layers, values, strict=True) if value is not None]
    return -max(defined)[1] if defined else None


@dataclass(frozen=True, eq=False)
class _Job:
    """All that is the same for every layer. n clips in use, F folds, K classes that some clip in use has."""

    cache: FeatureCache
    rows: np.ndarray  # (n,) ascending rows of the cache
    known: np.ndarray  # (K,) the classes' columns in the cache
    train: np.ndarray  # (n, F) bool
    held_out: HeldOut
    metric: str
    strength: float
    device: torch.device
    warnings: list[str]

    @classmethod
    def plan(cls, cache: FeatureCache, folds: list[Fold], strength: float, device: torch.device) -> _Job:
        rows = np.unique(np.concatenate([side for fold in folds for side in (fold.train, fold.test)]))
        labels = cache.labels[rows]
        known = np.flatnonzero(labels.any(axis=0))
        told_apart = len(known) > 1 or (len(known) == 1 and not labels[:, known].all())
        if not told_apart:
            raise UsageError(
                f"the {len(rows)} finished clips of {cache.path} have {len(known)} of {labels.shape[1]} classes among "
                "them, which leaves nothing to tell apart; extract a labelled dataset"
            )
        train = np.stack([np.isin(rows, fold.train) for fold in folds], axis=1)
        tests = {fold.number: np.searchsorted(rows, fold.test) for fold in folds}
        one_label = (labels.sum(axis=1) == 1).all()
        return cls(
            cache=cache,
            rows=rows,
            known=known,
            train=train,
            held_out=HeldOut(cache.spec.class_names, labels, tests),
            metric="accuracy" if one_label else "mAP",
            strength=strength,
            device=device,
            warnings=_warnings(labels, known, train),
        )

    def run(self, layers: list[int]) -> Iterator[tuple[LayerAccuracy | LayerPrecision, list[int]]]:
        """Score of each layer in order, and the numbers of the folds whose problem did not converge."""
        at_once, folds_at_once = self._batch_size()
        groups = [layers[i : i + at_once] for i in range(0, len(layers), at_once)]
        with _threads_for(len(groups), self.device) as workers, ThreadPoolExecutor(workers) as pool:
            for results in pool.map(lambda group: self._probe(group, folds_at_once), groups):
                yield from results

    def _batch_size(self) -> tuple[int, int]:
        """How many layers and how many folds to solve together, so that a batch stays within BATCH_BYTES."""
        clips, folds = self.train.shape
        dim = self.cache.spec.dim
        per_layer = 4 * (6 * clips * dim + 3 * dim * dim)
        per_fold = 4 * len(self.known) * (8 * clips + 8 * dim)
        folds_at_once = min(folds, max(1, (BATCH_BYTES - per_layer) // per_fold))
        if self.device.type == "cpu":
            return 1, folds_at_once
        return max(1, BATCH_BYTES // (per_layer + folds * per_fold)), folds_at_once

    def _probe(self, layers: list[int], folds_at_once: int) -> list[tuple[LayerAccuracy | LayerPrecision, list[int]]]:
        x_GND = torch.from_numpy(np.stack([self._features(layer) for layer in layers]))
        y = torch.from_numpy(self.held_out.labels[:, self.known])
        logits = np.full((len(layers), *self.held_out.labels.shape), -np.inf, dtype=np.float32)
        open_folds: list[list[int]] = [[] for _ in layers]
        tests = list(self.held_out.tests.items())
        for first in range(0, len(tests), folds_at_once):
            train = torch.from_numpy(self.train[:, first : first + folds_at_once])
            loss = "softmax" if self.metric == "accuracy" else "sigmoid"
            solution = solve(x_GND, y, train, loss=loss, strength=self.strength, device=self.device)
            for fold, (number, clips) in enumerate(tests[first : first + folds_at_once]):
                logits[:, clips[:, None], self.known] = solution.logits(x_GND[:, clips], fold).numpy()
                for index in torch.nonzero(~solution.converged_GF[:, fold]).flatten().tolist():
                    open_folds[index].append(number)
        score = self.held_out.accuracy if self.metric == "accuracy" else self.held_out.precision
        return [(score(layer, logits[i]), open_folds[i]) for i, layer in enumerate(layers)]

    def _features(self, layer: int) -> np.ndarray:
        """(n, D) float32."""
        mean = self.cache.mean(layer=layer, rows=self.rows)
        finite = np.isfinite(mean).all(axis=1)
        if not finite.all():
            clip = self.cache.ids[self.rows[np.argmin(finite)]]
            raise CacheError(
                f"layer {layer} of clip {str(clip)!r} in {self.cache.path} is not finite; find what else is damaged "
                f"with: whisper-at-cli verify {self.cache.path}"
            )
        return mean


def _warnings(labels: np.ndarray, known: np.ndarray, train: np.ndarray) -> list[str]:
    found = []
    labels_per_clip = labels.sum(axis=1)
    if labels_per_clip.max() == 1 and labels_per_clip.min() == 0:
        found.append(
            f"{(labels_per_clip == 0).sum()} clips have no label, so classes are scored one by one with average "
            "precision; leave those clips out for accuracy"
        )
    if len(known) < labels.shape[1]:
        found.append(f"{labels.shape[1] - len(known)} of {labels.shape[1]} classes have no clip and were left out")
    untrained = (train.T.astype(np.int64) @ labels[:, known] == 0).any(axis=0).sum()
    if untrained:
        found.append(f"{untrained} classes have no training clip in some fold and cannot be recognised there")
    return found


@contextlib.contextmanager
def _threads_for(tasks: int, device: torch.device) -> Iterator[int]:
    """How many tasks to run side by side; meanwhile each of them uses its share of torch's threads."""
    threads = torch.get_num_threads()
    workers = min(tasks, threads) if device.type == "cpu" else 1
    torch.set_num_threads(max(1, threads // workers))  # threads started from now on take this over
    try:
        yield workers
    finally:
        torch.set_num_threads(threads)
