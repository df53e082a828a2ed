"""Linear probes: the time mean of one layer, standardised on the training clips, into a logistic regression.

Multinomial where a clip has one label, else one binary regression per class. On an accelerator as many layers as fit
are solved as one batch. On a CPU layers are solved side by side, each in one thread: on two idle cores that takes as
long as one batch whose products are shared between threads (0.19 s for ESC-10 and tiny.en), but such threads wait for
each other, which took 55 s when other programs kept the cores busy, against 0.6 s.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from whisper_at_cli.extract.errors import UsageError
from whisper_at_cli.probe import job as shared
from whisper_at_cli.probe.job import Job, Prediction
from whisper_at_cli.probe.solver import solve
from whisper_at_cli.probe.strength import AUTO, GRID, Inner, best_strengths, inner_divisions


@dataclass(frozen=True)
class LinearProbe:
    """`strength` is scikit-learn's C, or "auto": chosen for each layer and fold on the fold's training clips alone."""

    strength: float | str = 1.0
    inner: Inner | None = None  # predictions then have the scores by which a layer may be chosen

    def __post_init__(self) -> None:
        if self.strength == AUTO:
            return
        if isinstance(self.strength, str) or not (np.isfinite(self.strength) and self.strength > 0):
            raise UsageError(f"strength must be a positive number or '{AUTO}'; it is {self.strength}")

    def run(self, job: Job, layers: list[int]) -> Iterator[Prediction]:
        """Predictions of each layer in order."""
        inner = self.inner or (inner_divisions(job) if self.strength == AUTO else None)
        at_once, folds_at_once = self.batch_size(job)
        groups = [layers[i : i + at_once] for i in range(0, len(layers), at_once)]
        with job.threads_for(len(groups)) as workers, ThreadPoolExecutor(workers) as pool:
            for predictions in pool.map(lambda group: self._probe(job, group, folds_at_once, inner), groups):
                yield from predictions

    def batch_size(self, job: Job) -> tuple[int, int]:
        """How many layers and how many folds to solve together, so that a batch stays within BATCH_BYTES."""
        clips, folds = job.train.shape
        dim = job.cache.spec.dim
        per_layer = 4 * (6 * clips * dim + 3 * dim * dim)
        per_fold = 4 * len(job.known) * (8 * clips + 8 * dim)
        folds_at_once = max(1, (shared.BATCH_BYTES - per_layer) // per_fold)
        if self.strength != AUTO and self.inner is None:
            folds_at_once = min(folds, folds_at_once)
        if job.device.type == "cpu":
            return 1, folds_at_once
        return max(1, shared.BATCH_BYTES // (per_layer + folds * per_fold)), folds_at_once

    def _probe(self, job: Job, layers: list[int], folds_at_once: int, inner: Inner | None) -> list[Prediction]:
        x_GND = torch.from_numpy(np.stack([job.mean(layer) for layer in layers]))
        if inner is None:
            return self._fit(job, layers, x_GND, folds_at_once, None)
        grid = GRID if isinstance(self.strength, str) else (self.strength,)
        strength_GF, inner_GFnK = best_strengths(job, x_GND, inner, folds_at_once, grid)
        found = self._fit(job, layers, x_GND, folds_at_once, strength_GF if self.strength == AUTO else None)
        if self.inner is not None:
            found = [replace(each, inner_FnK=inner_FnK) for each, inner_FnK in zip(found, inner_GFnK, strict=True)]
        return found

    def _fit(
        self, job: Job, layers: list[int], x_GND: Tensor, folds_at_once: int, strength_GF: Tensor | None
    ) -> list[Prediction]:
        y_NK = torch.from_numpy(job.labels)
        found = [Prediction(layer, job.blank_logits()) for layer in layers]
        tests = list(job.held_out.tests.items())
        for first in range(0, len(tests), folds_at_once):
            folds = slice(first, first + folds_at_once)
            if strength_GF is None:
                assert not isinstance(self.strength, str), "what 'auto' stands for was found before"
                strength: float | Tensor = self.strength
            else:
                strength = strength_GF[:, folds]
            train_NF = torch.from_numpy(job.train[:, folds])
            solution = solve(x_GND, y_NK, train_NF, loss=job.loss, strength=strength, device=job.device)
            for fold, (number, clips) in enumerate(tests[folds]):
                logits_GNK = solution.logits(x_GND[:, clips], fold).numpy()
                for at, prediction in enumerate(found):
                    prediction.logits[clips[:, None], job.known] = logits_GNK[at]
                    if not solution.converged_GF[at, fold]:
                        prediction.unconverged.append(number)
                    if strength_GF is not None:
                        prediction.strengths[number] = float(strength_GF[at, first + fold])
        return found
