"""Nearest neighbours: what do the most similar training clips say? No model is fitted, so nothing but features count.

Similar means: cosine between time means, standardised on the training clips. Where clips have one label, each of the k
neighbours votes for its class, and of classes with equally many votes the one whose neighbours are more similar wins.
Where they have several, a class's score is the similarity-weighted share of neighbours that have it.

G layers, n clips, D channels, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from whisper_at_cli.extract.errors import UsageError
from whisper_at_cli.probe import job as shared
from whisper_at_cli.probe.job import Job, Prediction
from whisper_at_cli.probe.solver import statistics


@dataclass(frozen=True)
class NeighbourProbe:
    neighbours: int = 10

    def __post_init__(self) -> None:
        if self.neighbours < 1:
            raise UsageError(f"neighbours is {self.neighbours}; at least 1 has to vote")

    def run(self, job: Job, layers: list[int]) -> Iterator[Prediction]:
        """Predictions of each layer in order."""
        fewest = int(job.train.sum(axis=0).min())
        if self.neighbours > fewest:
            raise UsageError(f"{self.neighbours} neighbours were asked for, and a fold trains on {fewest} clips")
        at_once = 1
        if job.device.type != "cpu":
            at_once = max(1, shared.BATCH_BYTES // (16 * len(job.rows) * job.cache.spec.dim))
        groups = [layers[i : i + at_once] for i in range(0, len(layers), at_once)]
        with job.threads_for(len(groups)) as workers, ThreadPoolExecutor(workers) as pool:
            for predictions in pool.map(lambda group: self._probe(job, group), groups):
                yield from predictions

    def _probe(self, job: Job, layers: list[int]) -> list[Prediction]:
        x_GND = torch.from_numpy(np.stack([job.mean(layer) for layer in layers]))
        mean_GFD, std_GFD = statistics(x_GND, torch.from_numpy(job.train))
        labels = torch.from_numpy(job.labels).to(job.device, torch.float32)
        found = [Prediction(layer, job.blank_logits()) for layer in layers]
        for fold, clips in enumerate(job.held_out.tests.values()):
            mean, std = mean_GFD[:, fold, None], std_GFD[:, fold, None]
            unit = torch.nn.functional.normalize(((x_GND - mean) / std).float().to(job.device), dim=2)
            train = np.flatnonzero(job.train[:, fold])
            logits = self._scores(unit[:, clips], unit[:, train], labels[train], job.metric).cpu().numpy()
            for at, prediction in enumerate(found):
                prediction.logits[clips[:, None], job.known] = logits[at]
        return found

    def _scores(self, test_GnD: Tensor, train_GnD: Tensor, labels_nK: Tensor, metric: str) -> Tensor:
        """(G, n, K) for the tested clips, a few of them at a time."""
        G, _, K = *train_GnD.shape[:2], labels_nK.shape[1]
        at_once = max(1, shared.BATCH_BYTES // (4 * G * (2 * train_GnD.shape[1] + self.neighbours * K)))
        return torch.cat([self._votes(some, train_GnD, labels_nK, metric) for some in test_GnD.split(at_once, 1)], 1)

    def _votes(self, test_GnD: Tensor, train_GnD: Tensor, labels_nK: Tensor, metric: str) -> Tensor:
        near, who = torch.bmm(test_GnD, train_GnD.mT).topk(self.neighbours, dim=2)
        votes = labels_nK[who]  # (G, n, neighbours, K)
        weight = (near + 1) / 2  # a cosine from 0 to 1, so that it can weigh
        similarity = torch.einsum("gnk,gnkc->gnc", weight, votes) / self.neighbours
        if metric != "accuracy":
            return similarity / weight.mean(dim=2, keepdim=True).clamp(min=1e-6)
        return votes.sum(dim=2) + similarity / 2  # less than one vote
