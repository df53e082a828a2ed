"""Held-out predictions with known content, and datasets whose true accuracies are known."""

import numpy as np

from whisper_at_cli.extract.evaluation.predictions import Predictions


def predictions(
    scores, labels, *, folds=None, recordings=None, names=None, seeds=None, source="planted"
) -> Predictions:
    """Of scores (K, N, C) and labels ((N, C) of 0 and 1, or (N,) class numbers)."""
    scores, labels = np.asarray(scores, dtype=np.float32), np.asarray(labels)
    K, N, C = scores.shape
    if labels.ndim == 1:
        labels = np.eye(C, dtype=np.uint8)[labels]
    return Predictions(
        ids=np.array([f"clip{i:05d}" for i in range(N)]),
        recordings=np.array([f"r{i:05d}" for i in (range(N) if recordings is None else recordings)]),
        labels=labels.astype(np.uint8),
        class_names=tuple(f"class{c}" for c in range(C)),
        folds=np.ones(N, dtype=int) if folds is None else np.asarray(folds),
        names=tuple(names or (f"layer-{k + 1}" for k in range(K))),
        seeds=np.zeros(K, dtype=int) if seeds is None else np.asarray(seeds),
        scores=scores,
        source=source,
    )


def planted(rng, *, true, clips=200, per_recording=1, classes=10, shared=0.5) -> Predictions:
    """Layers with these true accuracies (K,): each clip is recognised by layer k with probability true[k].

    Whether a clip is recognised goes by a normal number of which a share is the recording's, the same in all layers;
    with several clips a recording, these are alike. Wrong clips get a class drawn at random from the others.
    """
    from scipy.stats import norm

    K, recordings = len(true), clips // per_recording
    of = np.arange(clips) // per_recording
    easy = rng.normal(size=recordings)[of]
    own = rng.normal(size=(K, clips))
    right = np.sqrt(shared) * easy + np.sqrt(1 - shared) * own < norm.ppf(np.asarray(true))[:, None]
    y = rng.integers(0, classes, clips)
    claimed = np.where(right, y, (y + rng.integers(1, classes, (K, clips))) % classes)
    return predictions(np.eye(classes)[claimed], y, folds=of % 5 + 1, recordings=of)
