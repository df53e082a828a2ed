"""Fitting concat-linear: ridge regression on labels of -1 and 1, its strength chosen on inner folds of training clips.

In closed form: one eigenvalue problem gives the models of all strengths. With more inputs than clips it is solved in
coordinates of the clips: with K = X X' = U S U' over the training clips, whose span holds the solution, these are
U sqrt(S), and have the same inner products as inputs that may be 100,000 wide.

A regression's scores are no logits. Those of inner test clips, which the models had not seen, say by how much to
multiply them (and for bce what to add) so that the probabilities fit; that is folded into the weights.

n clips, F inputs, r coordinates, C classes, S strengths.
"""

from __future__ import annotations

import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from whisper_at_cli.extract.errors import WhisperATError
from whisper_at_cli.heads.evaluate import BATCH_BYTES
from whisper_at_cli.heads.forms import ConcatLinear
from whisper_at_cli.heads.training.data import Clips, free_bytes

Sides = tuple[np.ndarray, np.ndarray]  # clips that train, and that test

SHARES = tuple(10 ** (half / 2) for half in range(-10, 7))  # penalties that are tried, times the number of inputs
NO_CLIP = -1e4  # logit of a class without a training clip, which gives it a probability of 0 and stays finite
CHUNK = 4096  # inputs standardised and multiplied at once
COPIES = 3  # of the inputs, in float32, that a fit holds
NEWTON_STEPS = 50


def fit(
    module: ConcatLinear, clips: Clips, labels: np.ndarray, train: np.ndarray, inner: list[Sides], loss: str, *,
    standardise: bool = True,
) -> dict:  # fmt: skip
    """Fit a head to the clips `train` (positions), with the penalty under which the test clips of `inner` are most
    likely. labels (positions, C) 0/1; loss ce or bce. Inputs are standardised by the training clips, or only centred.

    Gives what to record: strength (the penalty), strengths, inner_log_likelihood of each, seconds. Raises
    WhisperATError where memory is too small.
    """
    started = time.monotonic()
    used = np.unique(np.concatenate([train, *(side for sides in inner for side in sides)]))
    inputs = _pooled(module, clips, used)
    own = np.searchsorted(used, train)
    module.center[:], module.scale[:] = _standardise(inputs, own, divide=standardise)
    coordinates, basis = _coordinates(inputs, own)
    y = torch.from_numpy(labels[used]).to(inputs.device)
    strengths = [share * inputs.shape[1] for share in SHARES]
    scores, truth = _inner_scores(coordinates, y, [_within(used, sides) for sides in inner], strengths)
    factors, offsets, likelihood = zip(*(_calibrated(each, truth, loss) for each in scores), strict=True)
    best = int(np.argmax(likelihood))
    weight_SrC, mean_r, bias_C = ridge(coordinates[own], y[own], [strengths[best]])
    bias_C = bias_C - mean_r @ weight_SrC[0]
    _set_weights(
        module, factors[best] * weight_SrC[0], factors[best] * bias_C + offsets[best], inputs[own], basis, y[own]
    )
    return {
        "strength": strengths[best], "strengths": strengths, "inner_log_likelihood": list(likelihood),
        "seconds": time.monotonic() - started,
    }  # fmt: skip


def ridge(x_nr: Tensor, y_nC: Tensor, strengths: list[float]) -> tuple[Tensor, Tensor, Tensor]:
    """Weights (S, r, C) float64 that minimise |(x - mean) W + bias - t|^2 + strength |W|^2 for targets t = 2 y - 1; the
    mean (r,) of x and the bias (C,), which has no penalty and so is the mean target."""
    x, target = x_nr.double(), 2 * y_nC.double() - 1
    mean, bias = x.mean(dim=0), target.mean(dim=0)
    x = x - mean
    values, vectors = torch.linalg.eigh(x.T @ x)
    projected = vectors.T @ (x.T @ (target - bias))
    return torch.stack([vectors @ (projected / (values + s)[:, None]) for s in strengths]), mean, bias


def _within(used: np.ndarray, sides: Sides) -> Sides:
    return np.searchsorted(used, sides[0]), np.searchsorted(used, sides[1])


@torch.no_grad()
def _pooled(module: ConcatLinear, clips: Clips, positions: np.ndarray) -> Tensor:
    """(n, F) float32 where heads compute (on the CPU for a device without float64)."""
    device = torch.device("cpu") if clips.device.type == "mps" else clips.device
    n, inputs = len(positions), len(module.center)
    needed, free = COPIES * (4 * n * inputs + 8 * min(n, inputs) ** 2), free_bytes(device)
    if free is not None and needed > free:
        raise WhisperATError(
            f"fitting {n} clips of {inputs} inputs takes {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB of memory are "
            "free: use fewer clips, or a head that is trained in batches, such as wa-mlp"
        )
    size = max(1, BATCH_BYTES // (4 * clips.features[0].numel()))
    batches = torch.from_numpy(positions).split(size)
    return torch.cat([module.pooled(clips.batch(batch)).to(device) for batch in batches])


def _standardise(inputs: Tensor, own: np.ndarray, *, divide: bool) -> tuple[Tensor, Tensor]:
    """Mean and deviation (F,) float32 of the rows `own`, by which the inputs are standardised in place. An input that
    varies less than float32 resolves has deviation 1, and all have where they are not to be divided."""
    rows = torch.from_numpy(own).to(inputs.device)
    center, scale = torch.empty(inputs.shape[1]), torch.empty(inputs.shape[1])
    for first in range(0, inputs.shape[1], CHUNK):
        part = inputs[:, first : first + CHUNK]
        std, mean = torch.std_mean(part[rows].double(), dim=0, correction=0)
        flat = std <= torch.finfo(torch.float32).eps * mean.abs()
        std = torch.where(flat, 1.0, std) if divide else torch.ones_like(std)
        mean, std = mean.float(), std.float()
        center[first : first + CHUNK], scale[first : first + CHUNK] = mean.cpu(), std.cpu()
        part.sub_(mean).div_(std)
    return center, scale


def _coordinates(inputs: Tensor, own: np.ndarray) -> tuple[Tensor, Tensor | None]:
    """(n, r) in which to solve, and the basis (own, r) float64 that leads back to the inputs; the inputs themselves and
    None where they are not wider than the rows `own` are many."""
    if inputs.shape[1] <= len(own):
        return inputs, None
    rows = torch.from_numpy(own).to(inputs.device)
    kernel = torch.zeros(len(inputs), len(own), dtype=torch.float64, device=inputs.device)
    for first in range(0, inputs.shape[1], CHUNK):
        part = inputs[:, first : first + CHUNK].double()
        kernel += part @ part[rows].T
    values, vectors = torch.linalg.eigh(kernel[rows])
    kept = values > values[-1] * len(own) * torch.finfo(torch.float64).eps
    basis = vectors[:, kept] / values[kept].sqrt()
    return kernel @ basis, basis


def _inner_scores(coordinates: Tensor, y: Tensor, inner: list[Sides], strengths: list[float]) -> tuple[Tensor, Tensor]:
    """(S, m, C) scores of the test clips of all divisions, by models of their training clips; and their labels."""
    scores, truth = [], []
    for train, test in inner:
        weight_SrC, mean_r, bias_C = ridge(coordinates[train], y[train], strengths)
        scores.append((coordinates[test].double() - mean_r) @ weight_SrC + bias_C)
        truth.append(y[test])
    return torch.cat(scores, dim=1), torch.cat(truth)


def _calibrated(scores_mC: Tensor, truth_mC: Tensor, loss: str) -> tuple[float, float, float]:
    """A factor and an offset with which scores are logits, and the mean log-likelihood of the labels under these.

    Labels are smoothed by one clip of each kind (Platt 1999), so that scores which are never wrong get no infinite
    factor. Newton's method on the logarithm of the factor, and on the offset, which means nothing to a softmax and is
    0 there.
    """
    m, C = truth_mC.shape
    share = C / (m + C) if loss == "ce" else 2 / (m + 2)
    target = truth_mC.double() * (1 - share) + share / (C if loss == "ce" else 2)
    at = np.zeros(2)
    now, gradient, curvature = _slopes(scores_mC, target, at, loss)
    for _ in range(NEWTON_STEPS):
        values, vectors = np.linalg.eigh(curvature)
        step = vectors @ ((vectors.T @ gradient) / np.maximum(np.abs(values), 1e-6))
        step /= max(1.0, np.abs(step).max())
        while (then := _slopes(scores_mC, target, at - step, loss))[0] > now and np.abs(step).max() > 1e-9:
            step /= 2
        if now - then[0] < 1e-12:
            break
        at, (now, gradient, curvature) = at - step, then
    return float(np.exp(at[0])), float(at[1]), -now


def _slopes(scores: Tensor, target: Tensor, at: np.ndarray, loss: str) -> tuple[float, np.ndarray, np.ndarray]:
    """Mean loss of logits exp(at[0]) scores + at[1], its gradient (2,) and its second derivative (2, 2)."""
    z = float(np.exp(at[0])) * scores
    if loss == "ce":
        p = z.softmax(dim=1)
        cost = z.logsumexp(dim=1) - (target * z).sum(dim=1)
        slope = ((p - target) * z).sum(dim=1)
        bend = (p * z.square()).sum(dim=1) - (p * z).sum(dim=1).square() + slope
        first, second = np.array([float(slope.mean()), 0]), np.array([[float(bend.mean()), 0], [0, 1]])
        return float(cost.mean()), first, second
    p = (z + float(at[1])).sigmoid()
    rest, spread = p - target, p * (1 - p)
    cost = F.binary_cross_entropy_with_logits(z + float(at[1]), target)
    first = np.array([float((rest * z).mean()), float(rest.mean())])
    cross = float((spread * z).mean())
    second = np.array([[float((spread * z.square() + rest * z).mean()), cross], [cross, float(spread.mean())]])
    return float(cost), first, second


def _set_weights(
    module: ConcatLinear, weight_rC: Tensor, bias_C: Tensor, inputs: Tensor, basis: Tensor | None, y: Tensor
) -> None:
    """Put a solution in coordinates into a head, for the standardised inputs (n, F) of its training clips."""
    weight_FC = weight_rC.float() if basis is None else inputs.T @ (basis @ weight_rC).float()
    known = (y > 0).any(dim=0)
    with torch.no_grad():
        module.linear.weight[:] = torch.where(known, weight_FC, 0).T.cpu()
        module.linear.bias[:] = torch.where(known, bias_C.float(), NO_CLIP).cpu()
