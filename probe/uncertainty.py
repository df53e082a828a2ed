"""How sure a probe's result is: intervals of each layer, a band of all, and which layers differ from the best.

All of it comes from the held-out predictions, by `extract/evaluation`. n clips, C classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from whisper_at_cli.extract.evaluation.bootstrap import bootstrap, bootstrap_classes
from whisper_at_cli.extract.evaluation.classes import best_layers, class_intervals
from whisper_at_cli.extract.evaluation.intervals import interval, intervals
from whisper_at_cli.extract.evaluation.predictions import Predictions
from whisper_at_cli.extract.evaluation.summary import bounds, how_made, number
from whisper_at_cli.probe.job import Job, Prediction
from whisper_at_cli.probe.scores import LayerAccuracy, LayerPrecision

Score = LayerAccuracy | LayerPrecision


def held_out_predictions(job: Job, found: Sequence[Prediction]) -> Predictions:
    """The tested clips, with the scores of each layer under the name layer-N."""
    tested, cache = job.held_out.tested, job.cache
    return Predictions(
        ids=cache.ids[job.rows[tested]],
        recordings=job.sources()[tested],
        labels=job.held_out.labels[tested],
        class_names=tuple(cache.spec.class_names),
        folds=job.held_out.folds,
        names=tuple(f"layer-{each.layer}" for each in found),
        seeds=np.full(len(found), job.seed),
        scores=np.stack([each.logits[tested] for each in found]),
        source=f"probe {cache.path} ({cache.spec.backbone})",
    )


def chance(job: Job) -> float | None:
    """The metric of models that say the same of every clip: the share of each class among their training clips."""
    constant = np.empty(job.held_out.labels.shape)
    for fold, clips in enumerate(job.held_out.tests.values()):
        constant[clips] = job.held_out.labels[job.train[:, fold]].mean(axis=0)
    score = job.held_out.accuracy if job.metric == "accuracy" else job.held_out.precision
    return getattr(score(0, constant), job.metric)


def with_bits(scores: list[Score], predictions: Predictions, *, seed: int) -> list[Score]:
    """The layers' scores with the bits of the label that their probes read."""
    drawn = bootstrap(predictions, metric="bits", seed=seed)
    found = interval(drawn)
    return [
        dataclasses.replace(score, bits=float(drawn.estimate[at]), bits_ci95=bounds(found[at]))
        if isinstance(score, LayerAccuracy)
        else score
        for at, score in enumerate(scores)
    ]


def with_intervals(
    scores: list[Score], predictions: Predictions, metric: str, *, seed: int
) -> tuple[list[Score], dict[str, Any]]:
    """The layers' scores with their intervals, and the fields of a ProbeResult that say what is certain."""
    drawn = bootstrap(predictions, metric=metric, seed=seed)
    judged = intervals(drawn)
    of_classes = bootstrap_classes(predictions, seed=seed)
    class_ci, best = class_intervals(of_classes), best_layers(of_classes)
    names = predictions.class_names
    judged_scores = [
        dataclasses.replace(
            score,
            ci95=bounds(judged.ci[at]),
            band95=bounds(judged.band[at]),
            differs_from_best=bool(judged.differs[at]),
            class_ci95={name: bounds(class_ci[at, c]) for c, name in enumerate(names)},
        )
        for at, score in enumerate(scores)
    ]
    layers = [score.layer for score in scores]
    return judged_scores, {
        "not_distinguishable_from_best": [
            layer for layer, differs in zip(layers, judged.differs.tolist(), strict=True) if not differs
        ],
        "best_layer_counts": [
            {"layer": layer, "classes": int(best.counts[at]), "ci95": bounds(best.counts_ci[at])}
            for at, layer in enumerate(layers)
        ],
        "best_layer_per_class_kept": {name: number(best.kept[c]) for c, name in enumerate(names)},
        "intervals": how_made(drawn)
        | {
            "band": "simultaneous, max-t over layers",
            "differences": "max-t over all pairs of layers",
            "class_draws": len(of_classes.draws),
        },
    }
