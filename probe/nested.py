"""The best layer by nested selection: for each fold it is chosen on clips that this fold does not test.

The best of several measured layers is too good: the same clips chose it and measure it. Here each fold chooses its
layer on the inner divisions of its training clips (`strength.py`), or on the dataset's own valid split, and the chosen
layers' scores of the tested clips are measured together.

n clips, F folds, K classes, C classes of the cache.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from whisper_at_cli.extract.evaluation.metrics import class_ap, mean_of_defined
from whisper_at_cli.extract.evaluation.predictions import Predictions
from whisper_at_cli.extract.evaluation.summary import value_and_interval
from whisper_at_cli.probe.job import Job, Prediction
from whisper_at_cli.probe.strength import Inner


def nested_best(job: Job, inner: Inner, found: Sequence[Prediction], held_out: Predictions) -> dict:
    """The value of the layers that the folds choose, with its 95 % interval, the layers, and which clips chose them.

    `found` have `inner` scores; `held_out` are the scores of the tested clips by the same layers.
    """
    chosen = {
        number: int(np.argmax([_inner_value(job, inner, fold, prediction) for prediction in found]))
        for fold, number in enumerate(job.held_out.tests)
    }
    scores = np.empty_like(held_out.scores[:1])
    for number, at in chosen.items():
        here = held_out.folds == number
        scores[0, here] = held_out.scores[at, here]
    of_chosen = dataclasses.replace(held_out, names=("nested",), seeds=held_out.seeds[:1], scores=scores)
    value, ci95, _ = value_and_interval(of_chosen, job.metric, seed=job.seed)
    return {
        "value": value, "ci95": ci95, "chosen_on": inner.clips,
        "layers": [{"fold": number, "layer": found[at].layer} for number, at in chosen.items()],
    }  # fmt: skip


def _inner_value(job: Job, inner: Inner, fold: int, prediction: Prediction) -> float:
    """The metric of a layer on the clips that may choose for a fold, every inner division counting the same."""
    assert prediction.inner_FnK is not None, "a nested selection was asked for"
    logits, values = prediction.inner_FnK[fold], []
    for _, outer, clips in inner.checks:
        if outer != fold:
            continue
        if job.metric == "accuracy":
            values.append(float((logits[clips].argmax(axis=1) == job.labels[clips].argmax(axis=1)).mean()))
        else:
            values.append(mean_of_defined(class_ap(job.labels[clips], logits[clips])))
    return float(np.nanmean(values)) if not np.isnan(values).all() else -1.0
