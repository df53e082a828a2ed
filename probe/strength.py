"""The strength of linear probes, chosen for each layer and fold on the clips that train in this fold, and no others.

Where the dataset has a valid split beside train and test, its clips choose. Else a fold's training clips are divided
again: where the dataset has three folds or more by its other folds, each tested on a model of the remaining ones, else
at random as `evaluation_folds` would. Of the strengths on a grid the one wins under
which the held-out clips are most likely, the smallest of several. A model that saw neither fold i nor fold j serves
twice: it is tested on j where i is the outer fold, and on i where j is. All strengths, inner divisions and layers of a
group are one solve.

n clips, P inner divisions, S strengths, G layers, F outer folds, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from whisper_at_cli.extract.cache.folds import evaluation_folds
from whisper_at_cli.extract.errors import UsageError
from whisper_at_cli.probe.job import Job
from whisper_at_cli.probe.solver import solve

AUTO = "auto"
GRID = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
WORST = -30.0  # log-likelihood
TOLERANCE = 1e-4  # choosing between powers of ten needs no more


@dataclass(frozen=True, eq=False)
class Inner:
    """Divisions of the training clips of every outer fold."""

    train: np.ndarray  # (n, P) bool
    checks: list[tuple[int, int, np.ndarray]]  # (division, outer fold from 0, clips that it is tested on for this fold)
    clips: str  # which clips choose


def inner_divisions(job: Job) -> Inner:
    tests = list(job.held_out.tests.values())
    if job.valid.any():
        return Inner(job.train, [(0, 0, np.flatnonzero(job.valid))], "the dataset's valid split")
    if len(tests) >= 3:
        return _by_outer_folds(job.train, tests)
    masks: list[np.ndarray] = []
    checks = []
    n = len(job.rows)
    for outer in range(job.train.shape[1]):
        if (count := int(job.train[:, outer].sum())) < 2:
            number = list(job.held_out.tests)[outer]
            raise UsageError(
                f"--strength auto and --nested need at least 2 training clips in every fold (fold {number} has "
                f"{count}); give a strength, without --nested"
            )
        divisions, _ = evaluation_folds(
            np.zeros(n, dtype=np.int64), np.full(n, ""), job.labels, job.train[:, outer], seed=job.seed,
            sources=job.sources,
        )  # fmt: skip
        for fold in divisions:
            checks.append((len(masks), outer, fold.test))
            masks.append(np.isin(np.arange(n), fold.train))
    return Inner(np.stack(masks, axis=1), checks, "random inner folds of each fold's training clips")


def _by_outer_folds(train: np.ndarray, tests: list[np.ndarray]) -> Inner:
    masks: list[np.ndarray] = []
    checks = []
    for i, j in combinations(range(len(tests)), 2):
        checks += [(len(masks), i, tests[j]), (len(masks), j, tests[i])]
        masks.append(train[:, i] & train[:, j])
    return Inner(np.stack(masks, axis=1), checks, "inner folds: the other folds of each fold's training clips")


def best_strengths(
    job: Job, x_GND: Tensor, inner: Inner, at_once: int, grid: Sequence[float] = GRID
) -> tuple[Tensor, np.ndarray]:
    """(G, F): for each layer and outer fold the strength of `grid` under which held-out clips are most likely; and the
    logits (G, F, n, K) of these clips with it, NaN for others."""
    G, S = len(x_GND), len(grid)
    y_NK = torch.from_numpy(job.labels)
    folds = job.train.shape[1]
    logits = np.full((folds, G * S, *job.labels.shape), np.nan, dtype=np.float32)
    step = max(1, at_once // S)
    for first in range(0, inner.train.shape[1], step):
        train_NP = torch.from_numpy(inner.train[:, first : first + step])
        solution = solve(
            x_GND, y_NK, train_NP, loss=job.loss, strength=torch.tensor(grid), tolerance=TOLERANCE, device=job.device
        )
        for division, outer, clips in inner.checks:
            if first <= division < first + step:
                x = x_GND[:, clips].repeat_interleave(S, dim=0)
                logits[outer][:, clips] = solution.logits(x, division - first).numpy()
    chosen_FG = np.stack([_fit(job, of_fold).reshape(G, S).argmax(axis=1) for of_fold in logits])
    of_chosen = logits[np.arange(folds)[:, None], np.arange(G) * S + chosen_FG]
    return torch.tensor(grid, dtype=torch.float64)[torch.from_numpy(chosen_FG.T.copy())], of_chosen.swapaxes(0, 1)


def _fit(job: Job, logits: np.ndarray) -> np.ndarray:
    """(problems,) mean log-likelihood of the clips that have logits (problems, n, K): what the probes themselves fit.

    Accuracy counts few clips and jumps between strengths: on ESC-10 it chose anything from 0.001 to 10 for the same
    layer, this 0.1 or 1. Clamped, since a class that an inner division never trained on has likelihood zero.
    """
    tested = ~np.isnan(logits[0, :, 0])
    z, y = torch.from_numpy(logits[:, tested]), torch.from_numpy(job.labels[tested])
    if job.loss == "softmax":
        likelihood = z.log_softmax(2).gather(2, y.argmax(1)[None, :, None].expand(len(z), -1, 1))
    else:
        likelihood = logsigmoid(torch.where(y > 0, z, -z))
    return likelihood.clamp(min=WORST).mean((1, 2)).numpy()
