"""What a probe found in one layer: scores of the predictions for clips that its models had not trained on.

The metrics are those of `extract/evaluation/metrics.py`. n clips, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from math import isclose

import numpy as np

from whisper_at_cli.extract.evaluation.metrics import class_ap, class_f1, mean_of_defined


@dataclass(frozen=True)
class LayerAccuracy:
    """One layer of a dataset whose clips have one label each. An undefined score is None and left out of means."""

    layer: int
    accuracy: float  # mean over folds
    accuracy_std: float  # over folds (divided by their number)
    folds: list[dict]  # fold, accuracy, clips
    macro_f1: float
    class_f1: dict[str, float | None]  # from the predictions of all folds together; None without a tested clip
    confusion: dict[str, dict[str, int]]  # true class -> predicted class -> clips of all folds; what is 0 is left out
    ci95: list[float] | None = None
    band95: list[float] | None = None  # of all layers at once
    differs_from_best: bool | None = None
    class_ci95: dict[str, list[float] | None] | None = None  # of class_f1
    bits: float | None = None  # of the label that the probe reads; None of a kind that gives no probabilities
    bits_ci95: list[float] | None = None


@dataclass(frozen=True)
class LayerPrecision:
    """One layer of a dataset whose clips have any number of labels. A class with no positives has no precision."""

    layer: int
    mAP: float | None  # mean of class_ap
    mAP_std: float | None  # over folds, of each fold's mAP
    folds: list[dict]  # fold, mAP, clips, classes_without_positives
    class_ap: dict[str, float | None]  # mean over its positives, each ranked within its fold
    classes_without_positives: int  # in all folds together
    ci95: list[float] | None = None
    band95: list[float] | None = None  # of all layers at once
    differs_from_best: bool | None = None
    class_ci95: dict[str, list[float] | None] | None = None  # of class_ap


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Which clips are tested in which fold, and what is true of them."""

    class_names: tuple[str, ...]
    labels: np.ndarray  # (n, C) 0/1
    tests: dict[int, np.ndarray]  # fold number -> clips; no clip in two of them

    @property
    def tested(self) -> np.ndarray:
        return np.concatenate(list(self.tests.values()))

    @property
    def folds(self) -> np.ndarray:
        """The fold of each clip in `tested`."""
        return np.repeat(list(self.tests), [len(clips) for clips in self.tests.values()])

    def accuracy(self, layer: int, logits: np.ndarray) -> LayerAccuracy:
        truth, predicted = self.labels.argmax(axis=1), logits.argmax(axis=1)
        right = truth == predicted
        folds = [
            {"fold": number, "accuracy": float(right[clips].mean()), "clips": len(clips)}
            for number, clips in self.tests.items()
        ]
        f1 = class_f1(truth[self.tested], predicted[self.tested], len(self.class_names))
        accuracies = [fold["accuracy"] for fold in folds]
        return LayerAccuracy(
            layer=layer,
            accuracy=float(np.mean(accuracies)),
            accuracy_std=float(np.std(accuracies)),
            folds=folds,
            macro_f1=float(np.nanmean(f1)),
            class_f1=self._by_name(f1),
            confusion=self._confusion(truth[self.tested], predicted[self.tested]),
        )

    def _confusion(self, truth: np.ndarray, predicted: np.ndarray) -> dict[str, dict[str, int]]:
        found: dict[str, dict[str, int]] = {self.class_names[c]: {} for c in np.unique(truth)}
        pairs, clips = np.unique(np.stack([truth, predicted]), axis=1, return_counts=True)
        for true, claimed, count in zip(*pairs.tolist(), clips.tolist(), strict=True):
            found[self.class_names[true]][self.class_names[claimed]] = count
        return found

    def precision(self, layer: int, logits: np.ndarray) -> LayerPrecision:
        folds = []
        for number, clips in self.tests.items():
            ap = class_ap(self.labels[clips], logits[clips])
            without = int(np.isnan(ap).sum())
            folds.append({"fold": number, "mAP": _mean(ap), "clips": len(clips), "classes_without_positives": without})
        ap = class_ap(self.labels[self.tested], logits[self.tested], self.folds)
        of_folds = [fold["mAP"] for fold in folds if fold["mAP"] is not None]
        return LayerPrecision(
            layer=layer,
            mAP=_mean(ap),
            mAP_std=float(np.std(of_folds)) if of_folds else None,
            folds=folds,
            class_ap=self._by_name(ap),
            classes_without_positives=int(np.isnan(ap).sum()),
        )

    def _by_name(self, values: np.ndarray) -> dict[str, float | None]:
        pairs = zip(self.class_names, values.tolist(), strict=True)
        return {name: None if np.isnan(value) else value for name, value in pairs}


def best_layers(layers: Sequence[int], values: Sequence[float | None]) -> list[int]:
    """The layers with the greatest value, in order; more than one where they tie. None where no value is defined."""
    defined = [(layer, value) for layer, value in zip(layers, values, strict=True) if value is not None]
    greatest = max((value for _, value in defined), default=0.0)
    return [layer for layer, value in defined if isclose(value, greatest, rel_tol=1e-12)]


def _mean(values: np.ndarray) -> float | None:
    mean = mean_of_defined(values)
    return None if math.isnan(mean) else mean
