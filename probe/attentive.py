"""Attentive probes: a learned query attends over the frames of one layer, and what it gathers goes into a linear map.

Where the linear probe sees the mean over time, this one can look for the frames that matter. With query q, frames x_t
and weights W: a = softmax over t of q . x_t / sqrt(D), logits = W (sum of a_t x_t) + b. Channels are standardised on
the frames of the training clips. Minimised is `strength * sum of losses + |W|^2 / 2 + |q|^2 / 2`, with the same loss as
the linear probe's, by Adam on all clips at once for a fixed number of steps: nothing is drawn at random. All folds of
a group of layers are trained together and share one copy of the frames.

G layers, n clips, T frames, D channels, F folds, K classes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from whisper_at_cli.extract.errors import UsageError, WhisperATError
from whisper_at_cli.probe import job as shared
from whisper_at_cli.probe.job import Job, Prediction

WRONG_STRENGTH = "strength of an attentive probe must be a positive number; it is {}"
COPIES = 3  # of the frames of a layer that lie in memory at once


@dataclass(frozen=True)
class AttentiveProbe:
    strength: float = 1.0
    steps: int = 80
    learning_rate: float = 0.4  # of W and b, divided by sqrt(D), so that logits move as fast whatever D is
    query_rate: float = 0.1

    def __post_init__(self) -> None:
        if not (np.isfinite(self.strength) and self.strength > 0):
            raise UsageError(WRONG_STRENGTH.format(self.strength))

    def run(self, job: Job, layers: list[int]) -> Iterator[Prediction]:
        """Predictions of each layer in order. Raises WhisperATError where a layer's frames do not fit in memory."""
        spec = job.cache.spec
        size = 4 * len(job.rows) * spec.frames * spec.dim
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if COPIES * size > memory:
            raise WhisperATError(
                f"the frames of one layer take {size / 1e9:.0f} GB, {COPIES} times that is needed, and this machine "
                f"has {memory / 1e9:.0f} GB; use --kind linear, which needs the time means alone"
            )
        at_once = 1 if job.device.type == "cpu" else max(1, shared.BATCH_BYTES // (COPIES * size))
        groups = [layers[i : i + at_once] for i in range(0, len(layers), at_once)]
        fitting = min(len(groups), max(1, memory // (2 * COPIES * size)))
        with job.threads_for(fitting) as workers, ThreadPoolExecutor(workers) as pool:
            for predictions in pool.map(lambda group: self._probe(job, group), groups):
                yield from predictions

    def _probe(self, job: Job, layers: list[int]) -> list[Prediction]:
        x_GnTD = torch.from_numpy(np.stack([job.frames(layer) for layer in layers])).to(job.device)
        train_nF = torch.from_numpy(job.train).to(job.device)
        frames = _Frames.standardised(x_GnTD, train_nF)
        labels_nK = torch.from_numpy(job.labels).to(job.device, torch.float32)
        logits_GFnK = self._train(frames, labels_nK, train_nF, job.loss).cpu().numpy()
        found = [Prediction(layer, job.blank_logits()) for layer in layers]
        for fold, clips in enumerate(job.held_out.tests.values()):
            for at, prediction in enumerate(found):
                prediction.logits[clips[:, None], job.known] = logits_GFnK[at, fold][clips]
        return found

    def _train(self, frames: _Frames, labels_nK: Tensor, train_nF: Tensor, loss: str) -> Tensor:
        """(G, F, n, K): logits of every clip by the model of every fold."""
        (G, _, _, D), F, K = frames.x.shape, train_nF.shape[1], labels_nK.shape[1]
        shapes = ((G, F, D), (G, F, D, K), (G, F, 1, K))
        query, weight, bias = (frames.x.new_zeros(shape, requires_grad=True) for shape in shapes)
        optimizer = torch.optim.Adam(
            [
                {"params": [query], "lr": self.query_rate},
                {"params": [weight, bias], "lr": self.learning_rate / math.sqrt(D)},
            ]
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        each = train_nF.T[None].to(labels_nK).expand(G, F, -1)
        with torch.enable_grad():
            for _ in range(self.steps):
                logits = frames.logits(query, weight, bias)
                lost = _losses(logits, labels_nK, loss)
                penalty = (query.square().sum() + weight.square().sum()) / 2
                optimizer.zero_grad()
                (self.strength * (each * lost).sum() + penalty).backward()
                optimizer.step()
                schedule.step()
        with torch.no_grad():
            return frames.logits(query, weight, bias)


def _losses(logits_GFnK: Tensor, labels_nK: Tensor, loss: str) -> Tensor:
    """(G, F, n)."""
    G, F, n, K = logits_GFnK.shape
    if loss == "softmax":
        truth = labels_nK.argmax(1).expand(G, F, n).flatten()
        return cross_entropy(logits_GFnK.reshape(-1, K), truth, reduction="none").view(G, F, n)
    truth = labels_nK.expand(G, F, n, K)
    return binary_cross_entropy_with_logits(logits_GFnK, truth, reduction="none").sum(3)


@dataclass(frozen=True, eq=False)
class _Frames:
    """Frames of some layers, standardised for each fold without a copy."""

    x: Tensor  # (G, n, T, D), standardised on all clips that train in some fold
    shift: Tensor  # (G, F, D): what is left to do for each fold
    scale: Tensor

    @classmethod
    def standardised(cls, x_GnTD: Tensor, train_nF: Tensor) -> _Frames:
        mean, std = _moments(x_GnTD, train_nF.any(dim=1))
        x = x_GnTD.sub_(mean[:, None, None]).div_(std[:, None, None])
        shift, scale = zip(*(_moments(x, train) for train in train_nF.T), strict=True)
        return cls(x, torch.stack(shift, 1), torch.stack(scale, 1))

    def logits(self, query_GFD: Tensor, weight_GFDK: Tensor, bias_GF1K: Tensor) -> Tensor:
        """(G, F, n, K)."""
        G, n, T, D = self.x.shape
        match = torch.bmm(self.x.view(G, n * T, D), (query_GFD / self.scale).mT / math.sqrt(D))  # shifts cancel out
        attention_GnFT = match.view(G, n, T, -1).softmax(dim=2).mT
        gathered = torch.matmul(attention_GnFT, self.x).transpose(1, 2)  # (G, F, n, D)
        return torch.matmul((gathered - self.shift[:, :, None]) / self.scale[:, :, None], weight_GFDK) + bias_GF1K


def _moments(x_GnTD: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation (G, D) over frames of some clips; a channel that hardly varies has deviation 1."""
    each = x_GnTD.mean(dim=2)[:, rows].double()
    mean = each.mean(dim=1)
    square = (x_GnTD - mean[:, None, None].float()).square().mean(dim=2)[:, rows].double().mean(dim=1)
    std = square.sqrt()
    std = torch.where(std <= torch.finfo(x_GnTD.dtype).eps * mean.abs(), 1.0, std)
    return mean.to(x_GnTD), std.to(x_GnTD)
