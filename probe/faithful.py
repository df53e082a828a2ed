"""The original project's probe, for comparison: scikit-learn's MLPClassifier without a hidden layer, for each layer and
fold on its own.

Its settings are those of the published script: Adam on batches of 200 with a rate of 0.001, until the training loss has
not improved by 1e-4 for ten epochs. That is far from the optimum of the (hardly) penalised loss, so its accuracy
depends on when it stops. The script standardises the features; without `standardise` they are taken as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from whisper_at_cli.probe.job import Job, Prediction

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline

SETTINGS = {
    "hidden_layer_sizes": (),
    "learning_rate": "adaptive",
    "learning_rate_init": 0.001,
    "max_iter": 5000,
    "random_state": 0,
}


@dataclass(frozen=True)
class FaithfulProbe:
    standardise: bool = True

    @property
    def settings(self) -> dict:
        return {"classifier": "MLPClassifier", **SETTINGS}

    def run(self, job: Job, layers: list[int]) -> Iterator[Prediction]:
        """Predictions of each layer in order."""
        with job.threads_for(len(layers)) as workers, ThreadPoolExecutor(workers) as pool:
            yield from pool.map(lambda layer: self._probe(job, layer), layers)

    def _probe(self, job: Job, layer: int) -> Prediction:
        features, labels = job.mean(layer).astype(np.float64), job.labels
        found = Prediction(layer, job.blank_logits())
        for fold, (number, clips) in enumerate(job.held_out.tests.items()):
            train = job.train[:, fold]
            truth = labels[train]
            if job.metric == "accuracy":
                truth = truth.argmax(axis=1)
            elif len(job.known) == 1:
                truth = truth[:, 0]
            model, converged = fit(features[train], truth, standardise=self.standardise)
            odds = model.predict_proba(features[clips])[:, -len(job.known) :]
            seen = model[-1].classes_ if job.metric == "accuracy" else np.arange(len(job.known))
            found.logits[clips[:, None], job.known[seen]] = np.log(np.maximum(odds, 1e-30))
            if not converged:
                found.unconverged.append(number)
        return found


def fit(features: np.ndarray, truth: np.ndarray, *, standardise: bool = True) -> tuple[Pipeline, bool]:
    """A fitted pipeline, and whether it stopped by itself."""
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    steps = [StandardScaler()] if standardise else []
    model = make_pipeline(*steps, MLPClassifier(**SETTINGS))
    model.fit(features, truth)
    return model, model[-1].n_iter_ < SETTINGS["max_iter"]
