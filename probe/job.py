"""What every kind of probe shares: which clips of a cache train and which are tested, and the features of a layer.

n clips in use, F folds, C classes, K classes that some clip in use has, D channels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from whisper_at_cli.extract.cache import FeatureCache
from whisper_at_cli.extract.cache.folds import cache_folds, untrained_classes, valid_split
from whisper_at_cli.extract.cache.sources import source_recordings
from whisper_at_cli.extract.devices import choose_device
from whisper_at_cli.extract.errors import CacheError, UsageError
from whisper_at_cli.extract.evaluation.permutation import permuted_by_recording
from whisper_at_cli.probe.scores import HeldOut
from whisper_at_cli.probe.transfer import TransferCaches

PERMUTED = (
    "labels were permuted by recording: whatever a probe scores beyond chance here comes from the probe, not from the "
    "features"
)
BATCH_BYTES = 1 << 30  # of memory that one batch of problems may take


@dataclass(frozen=True, eq=False)
class Prediction:
    """What the probes of one layer say of every clip, each clip by the model of the fold that tests it."""

    layer: int
    logits: np.ndarray  # (n, C); -inf for a class that no clip in use has
    unconverged: list[int] = field(default_factory=list)  # numbers of the folds whose fit was stopped early
    strengths: dict[int, float] = field(default_factory=dict)  # fold number -> the strength that was chosen for it
    inner_FnK: np.ndarray | None = None  # (F, n, K) logits by models of inner divisions, NaN for other clips


@dataclass(frozen=True, eq=False)
class Job:
    """All that is the same for every layer."""

    cache: FeatureCache | TransferCaches
    rows: np.ndarray  # (n,) ascending rows of the cache
    known: np.ndarray  # (K,) the classes' columns in the cache
    train: np.ndarray  # (n, F) bool
    valid: np.ndarray  # (n,) bool: clips of a valid split, which neither train nor are tested, but choose
    held_out: HeldOut
    metric: str  # accuracy where every clip has one label, else mAP
    seed: int
    device: torch.device
    warnings: list[str]

    @classmethod
    def plan(
        cls, cache: FeatureCache | TransferCaches, *, device: str, seed: int, permute_labels: bool = False,
        selects: bool = False,
    ) -> Job:  # fmt: skip
        """With `permute_labels` recordings trade their labels at random; with `selects` clips of a valid split are
        there to choose by. Raises UsageError where there is nothing to tell apart."""
        folds, warnings = cache_folds(cache, seed=seed)
        valid = np.empty(0, dtype=np.int64)
        if selects:
            valid, warnings = valid_split(cache.split, cache.done, folds, warnings)
        rows = np.unique(np.concatenate([valid, *(side for fold in folds for side in (fold.train, fold.test))]))
        labels = cache.labels[rows]
        if permute_labels:
            labels = labels[permuted_by_recording(_recordings(cache, rows), seed)]
            warnings = [*warnings, PERMUTED]
        known = np.flatnonzero(labels.any(axis=0))
        told_apart = len(known) > 1 or (len(known) == 1 and not labels[:, known].all())
        if not told_apart:
            raise UsageError(
                f"the {len(rows)} finished clips of {cache.path} have {len(known)} of {labels.shape[1]} classes among "
                "them, which leaves nothing to tell apart; extract a labelled dataset"
            )
        lacking = [] if permute_labels else untrained_classes(cache.labels, folds)
        train = np.stack([np.isin(rows, fold.train) for fold in folds], axis=1)
        tests = {fold.number: np.searchsorted(rows, fold.test) for fold in folds}
        one_label = (labels.sum(axis=1) == 1).all()
        return cls(
            cache=cache,
            rows=rows,
            known=known,
            train=train,
            valid=np.isin(rows, valid),
            held_out=HeldOut(cache.spec.class_names, labels, tests),
            metric="accuracy" if one_label else "mAP",
            seed=seed,
            device=_choose_device(device),
            warnings=warnings + _warnings(labels, known) + lacking,
        )

    @property
    def labels(self) -> np.ndarray:
        """(n, K) 0/1."""
        return self.held_out.labels[:, self.known]

    @property
    def loss(self) -> str:
        return "softmax" if self.metric == "accuracy" else "sigmoid"

    def sources(self) -> np.ndarray:
        """(n,) str: which recording a clip was cut from."""
        return _recordings(self.cache, self.rows)

    def blank_logits(self) -> np.ndarray:
        """(n, C) to be filled in where a class is known."""
        return np.full(self.held_out.labels.shape, -np.inf, dtype=np.float32)

    def mean(self, layer: int) -> np.ndarray:
        """(n, D) float32: the time means of one layer. Raises CacheError where they are not finite."""
        return self._finite(layer, self.cache.mean(layer=layer, rows=self.rows))

    def frames(self, layer: int) -> np.ndarray:
        """(n, T, D) float32: every frame of one layer. Raises CacheError where they are not finite."""
        return self._finite(layer, self.cache.layer(layer, rows=self.rows))

    def _finite(self, layer: int, features: np.ndarray) -> np.ndarray:
        finite = np.isfinite(features).all(axis=tuple(range(1, features.ndim)))
        if not finite.all():
            clip = self.cache.ids[self.rows[np.argmin(finite)]]
            raise CacheError(
                f"layer {layer} of clip {str(clip)!r} in {self.cache.path} is not finite; find what else is damaged "
                f"with: whisper-at-cli verify {self.cache.path}"
            )
        return features

    @contextlib.contextmanager
    def threads_for(self, tasks: int) -> Iterator[int]:
        """How many tasks to run side by side; meanwhile each of them uses its share of torch's threads."""
        threads = torch.get_num_threads()
        workers = min(tasks, threads) if self.device.type == "cpu" else 1
        torch.set_num_threads(max(1, threads // workers))  # threads started from now on take this over
        try:
            yield workers
        finally:
            torch.set_num_threads(threads)


def _recordings(cache: FeatureCache | TransferCaches, rows: np.ndarray) -> np.ndarray:
    if isinstance(cache, TransferCaches):
        return cache.sources(rows)
    return source_recordings(cache.ids[rows], cache.paths[rows], cache.dataset)


def _choose_device(device: str) -> torch.device:
    """`auto` is CUDA or the CPU. MPS has to be asked for by name: the solver has not been tried there."""
    if device == "auto" and not torch.cuda.is_available():
        device = "cpu"
    return choose_device(device)


def _warnings(labels: np.ndarray, known: np.ndarray) -> list[str]:
    found = []
    labels_per_clip = labels.sum(axis=1)
    none, several = int((labels_per_clip == 0).sum()), int((labels_per_clip > 1).sum())
    if none or several:
        counts = [f"{none} clips have no label"] * bool(none) + [f"{several} have several"] * bool(several)
        found.append(
            f"of {len(labels)} clips {' and '.join(counts)}, so classes are scored one by one, with average precision "
            "(mAP), and not with accuracy; for accuracy leave such clips out"
        )
    if len(known) < labels.shape[1]:
        found.append(f"{labels.shape[1] - len(known)} of {labels.shape[1]} classes have no clip and were left out")
    return found
