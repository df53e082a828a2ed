"""Description length of the labels given a layer, by online codes (Voita & Titov, 2020, section 2.2).

The clips that train come in one random order, recording by recording. Labels of the first block are sent with equal
probabilities for all classes; those of each following block with the probabilities of a linear probe that trained on
all blocks before it. The blocks end at 0.1, 0.2, 0.4, ... 100 % of the clips, each moved to the end of a recording.
How many bits that takes says both how well a probe ends up and how few clips it needs to get there.

A code has to have a probability for every class, those too that no clip before had: a probe's probabilities p after t
clips count as (t p + 1) / (t + K), each class once more than it was there.

n clips, K classes, F blocks after the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from whisper_at_cli.extract.errors import UsageError
from whisper_at_cli.probe.job import Job
from whisper_at_cli.probe.linear import LinearProbe
from whisper_at_cli.probe.solver import solve

PERCENT = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.25, 12.5, 25, 50, 100)


@dataclass(frozen=True)
class Description:
    """Codelengths of the labels of some clips, in bits."""

    clips: int
    blocks: list[int]  # clips up to the end of each
    uniform_bits: float  # all labels with equal probabilities: clips * log2(K)
    layers: list[dict]  # layer, codelength_bits, compression (uniform_bits / codelength_bits)


def description_length(job: Job, layers: Sequence[int], *, strength: float) -> Description:
    """Of every layer. Raises UsageError where a clip has not exactly one label, or clips are too few for two blocks."""
    if job.metric != "accuracy":
        raise UsageError("--mdl needs exactly one label on every clip")
    order = _in_order(job)
    ends = _block_ends(job.sources()[order])
    if len(ends) < 2:
        raise UsageError(f"--mdl needs at least two blocks of clips; the {len(order)} that train are of one recording")
    uniform = len(order) * float(np.log2(len(job.known)))
    with job.threads_for(len(layers)) as workers, ThreadPoolExecutor(workers) as pool:
        bits = list(pool.map(lambda layer: _codelength(job, layer, order, ends, strength), layers))
    return Description(
        len(order), ends, uniform,
        [
            {"layer": layer, "codelength_bits": found, "compression": uniform / found}
            for layer, found in zip(layers, bits, strict=True)
        ],
    )  # fmt: skip


def _in_order(job: Job) -> np.ndarray:
    """(n,) clips that train in some fold, recordings at random and each as a whole."""
    clips = np.flatnonzero(job.train.any(axis=1))
    _, recording = np.unique(job.sources()[clips], return_inverse=True)
    place = np.random.default_rng(job.seed).permutation(recording.max() + 1)
    return clips[np.argsort(place[recording], kind="stable")]


def _block_ends(recordings: np.ndarray) -> list[int]:
    """How many clips (n,) lie before the end of each block."""
    n = len(recordings)
    whole = np.append(np.flatnonzero(recordings[1:] != recordings[:-1]) + 1, n)  # ends of recordings
    wanted = np.ceil(n * np.array(PERCENT) / 100 - 1e-9).astype(int)
    return np.unique(whole[np.searchsorted(whole, wanted)]).tolist()


def _codelength(job: Job, layer: int, order: np.ndarray, ends: list[int], strength: float) -> float:
    x_1nD, y_nK = torch.from_numpy(job.mean(layer)[order])[None], torch.from_numpy(job.labels[order])
    n, K = y_nK.shape
    bits = ends[0] * np.log2(K)
    folds_at_once = LinearProbe(strength).batch_size(job)[1]
    blocks = list(pairwise(ends))
    for first in range(0, len(blocks), folds_at_once):
        some = blocks[first : first + folds_at_once]
        train_nF = torch.arange(n)[:, None] < torch.tensor([begin for begin, _ in some])
        solution = solve(x_1nD, y_nK, train_nF, strength=strength, device=job.device)
        for fold, (begin, end) in enumerate(some):
            p = solution.logits(x_1nD[:, begin:end], fold)[0].double().softmax(dim=1)
            p = p[torch.arange(end - begin), y_nK[begin:end].argmax(dim=1)]
            bits -= float(torch.log2((begin * p + 1) / (begin + K)).sum())
    return float(bits)
