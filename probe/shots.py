"""Few-shot curves: linear probes that train on 1, 2, 4, ... clips of each class.

For every draw and fold, clips of each class are drawn from the fold's training clips, none of a recording that the fold
tests; the clips of k shots are among those of more. All tested clips are scored in every draw, so that what a curve
shows is a mean over draws, and its interval one over recordings. (Eight shots and a linear model are the protocol of
MAEB.)

Problems of few clips are small if they are posed in the clips' own span: with m clips the Gram matrix of the
standardised channels has a factor of m columns, and logistic regression with an L2 penalty on that factor has the same
solution as on the channels. All draws and folds of a layer are one batched solve.

G problems (draws times folds), m training clips, n clips in use, D channels, K classes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from whisper_at_cli.extract.errors import UsageError
from whisper_at_cli.extract.evaluation.bootstrap import bootstrap
from whisper_at_cli.extract.evaluation.intervals import interval
from whisper_at_cli.extract.evaluation.predictions import Predictions
from whisper_at_cli.extract.evaluation.summary import bounds
from whisper_at_cli.probe import job as shared
from whisper_at_cli.probe.job import Job
from whisper_at_cli.probe.solver import solve, statistics

DRAWS = 10
TOLERANCE = 1e-4
JITTER = 1e-5  # of the mean of the Gram matrix's diagonal: more than float32 leaves of it below 0


@dataclass(frozen=True)
class Shots:
    """Every layer's accuracy with so many training clips of each class."""

    shots: int
    layers: list[dict]  # layer, accuracy, std_over_draws, ci95, draws (accuracy of each)
    fewer: list[str]  # classes of which some fold has fewer clips to train on; all of those were taken


def few_shot(job: Job, layers: Sequence[int], shots: Sequence[int], *, strength: float) -> Iterator[Shots]:
    """For each number of shots in turn. Raises UsageError where a clip has not exactly one label."""
    if job.metric != "accuracy":
        raise UsageError("--shots needs exactly one label on every clip")
    pools = _pools(job)
    for count in shots:
        drawn = _Draws.of(job, pools, count)
        with job.threads_for(len(layers)) as workers, ThreadPoolExecutor(workers) as pool:
            scores = list(pool.map(lambda layer, drawn=drawn: _scores(job, drawn, job.mean(layer), strength), layers))
        yield Shots(count, _judged(job, layers, scores), drawn.fewer)


def _pools(job: Job) -> list[list[list[np.ndarray]]]:
    """For each fold, draw and class the clips that may train, in the order in which they are taken."""
    recordings, label = job.sources(), job.labels.argmax(axis=1)
    pools = []
    for fold, tested in enumerate(job.held_out.tests.values()):
        free = np.flatnonzero(job.train[:, fold] & ~np.isin(recordings, recordings[tested]))
        of_draws = []
        for draw in range(DRAWS):
            order = np.random.default_rng((job.seed, fold, draw)).permutation(free)
            of_draws.append([order[label[order] == c] for c in range(len(job.known))])
        pools.append(of_draws)
    return pools


@dataclass(frozen=True, eq=False)
class _Draws:
    """Problems whose training clips have the same classes, side by side."""

    groups: list[tuple[np.ndarray, np.ndarray, list[tuple[int, int]]]]  # clips (G, m), labels (m, K), (fold, draw) of G
    fewer: list[str]

    @classmethod
    def of(cls, job: Job, pools: list[list[list[np.ndarray]]], shots: int) -> _Draws:
        groups: dict[tuple[int, ...], list[tuple[np.ndarray, tuple[int, int]]]] = defaultdict(list)
        for fold, of_draws in enumerate(pools):
            for draw, classes in enumerate(of_draws):
                taken = [clips[:shots] for clips in classes]
                groups[tuple(map(len, taken))].append((np.concatenate(taken), (fold, draw)))
        fewer = {c for counts in groups for c, count in enumerate(counts) if count < shots}
        eye = np.eye(len(job.known), dtype=np.uint8)
        return cls(
            [
                (np.stack([clips for clips, _ in found]), np.repeat(eye, counts, axis=0), [at for _, at in found])
                for counts, found in groups.items()
            ],
            [job.held_out.class_names[job.known[c]] for c in sorted(fewer)],
        )


def _scores(job: Job, drawn: _Draws, x_nD: np.ndarray, strength: float) -> np.ndarray:
    """(draws, n, C) float32; -inf for a class that was not trained on."""
    x, tests = torch.from_numpy(x_nD), list(job.held_out.tests.values())
    found = np.stack([job.blank_logits()] * DRAWS)
    for clips_Gm, y_mK, places in drawn.groups:
        m, D = clips_Gm.shape[1], x.shape[1]
        at_once = max(1, shared.BATCH_BYTES // (4 * m * (4 * D + 6 * m) * 4))
        for first in range(0, len(places), at_once):
            some = slice(first, first + at_once)
            weight_GDK, bias_G1K = _models(x[clips_Gm[some]], torch.from_numpy(y_mK), strength, job.device)
            for at, (fold, draw) in enumerate(places[some]):
                logits = x[tests[fold]] @ weight_GDK[at] + bias_G1K[at]
                found[draw][tests[fold][:, None], job.known] = logits.numpy()
    return found


def _models(x_GmD: Tensor, y_mK: Tensor, strength: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Weights (G, D, K) and biases (G, 1, K) that take channels as they are."""
    every = torch.ones(x_GmD.shape[1], 1, dtype=torch.bool)
    mean_G1D, std_G1D = statistics(x_GmD, every)
    standard, factor = ((x_GmD - mean_G1D) / std_G1D).to(x_GmD.dtype), None
    if standard.shape[1] < standard.shape[2]:
        gram = torch.bmm(standard, standard.mT).double()
        diagonal = gram.diagonal(dim1=1, dim2=2)
        diagonal += JITTER * diagonal.mean(dim=1, keepdim=True).clamp(min=1)
        factor = torch.linalg.cholesky(gram)
    posed = standard if factor is None else factor.to(x_GmD.dtype)
    solution = solve(posed, y_mK, every, strength=strength, tolerance=TOLERANCE, device=device, standardise=False)
    weight = solution.weight_GDFC[:, :, 0].double()
    if factor is not None:
        of_clips = torch.linalg.solve_triangular(factor.mT, weight, upper=True)
        weight = torch.bmm(standard.mT, of_clips.to(x_GmD.dtype)).double()
    weight = weight / std_G1D.mT
    return weight.to(x_GmD.dtype), (solution.bias_GFC[:, 0, None].double() - mean_G1D @ weight).to(x_GmD.dtype)


def _judged(job: Job, layers: Sequence[int], scores: list[np.ndarray]) -> list[dict]:
    tested = job.held_out.tested
    held_out = Predictions(
        ids=job.cache.ids[job.rows[tested]], recordings=job.sources()[tested], labels=job.held_out.labels[tested],
        class_names=tuple(job.held_out.class_names), folds=job.held_out.folds,
        names=tuple(f"layer-{layer}" for layer in layers for _ in range(DRAWS)),
        seeds=np.tile(np.arange(DRAWS), len(layers)), scores=np.concatenate(scores)[:, tested],
    )  # fmt: skip
    found = bootstrap(held_out, seed=job.seed)
    ci = interval(found)
    rows = []
    for at, layer in enumerate(layers):
        of_draws = [job.held_out.accuracy(layer, logits).accuracy for logits in scores[at]]
        rows.append(
            {
                "layer": layer, "accuracy": float(found.estimate[at]), "std_over_draws": float(np.std(of_draws)),
                "ci95": bounds(ci[at]), "draws": of_draws,
            }
        )  # fmt: skip
    return rows
