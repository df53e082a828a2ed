"""Many logistic regressions at once: all folds of a group of layers as one batched problem.

Each problem is scikit-learn's: minimise `strength * sum of losses + |W|^2 / 2` over the training clips, channels
standardised on those clips, the bias free of the penalty. `softmax` is multinomial cross-entropy (one class a clip),
`sigmoid` one binary cross-entropy per class (any number of classes a clip).

A layer's features are stored once and shared by its folds: a fold is a weight of 0 or 1 per clip, and its
standardisation is moved from the features to the weights. The method is nonlinear conjugate gradients (Polak-Ribiere)
with a step length of its own for each problem. Logits are linear in the step, so steps are tried without touching the
features, and an iteration costs two matrix products. After a few iterations the curvature shows which clips still
matter, and its inverse, one matrix per layer, preconditions the rest. benchmarks/ has the comparison with L-BFGS, which
needs as many iterations as conjugate gradients without the preconditioner, and a history besides.

Shapes: G layers solved together, N clips, D channels (a last one, always 1, carries the bias), F folds, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

TOLERANCE = 1e-5
MAX_ITERATIONS = 1000
PRECONDITION_AT = 10  # iteration; the curvature before says little about the curvature at the optimum
PRECONDITION_MAX_DIM = 4096  # channels; beyond, the inverse costs more than the iterations it saves
SLOPE_LEFT = 0.3  # a step is long enough when at most this share of the slope is left
STEP_TRIALS = 30


@dataclass(frozen=True, eq=False)
class Solution:
    """Models for G layers and F folds, on the CPU, and how each problem ended."""

    weight_GDFC: Tensor  # for standardised channels; D here does not count the bias
    bias_GFC: Tensor  # -inf for a class that the softmax of this fold never saw
    mean_GFD: Tensor  # float64, as is std
    std_GFD: Tensor
    objective_GF: Tensor
    iterations_GF: Tensor
    converged_GF: Tensor

    def logits(self, x_GND: Tensor, fold: int) -> Tensor:
        """(G, N, C) for clips as they were given to `solve`, by the models of one fold (counted from 0)."""
        standard_GND = (x_GND - self.mean_GFD[:, fold, None]) / self.std_GFD[:, fold, None]
        return standard_GND.to(x_GND.dtype) @ self.weight_GDFC[:, :, fold] + self.bias_GFC[:, fold, None]

    def for_unstandardised(self, fold: int) -> tuple[Tensor, Tensor]:
        """Of the first layer, float64: weights (D, C) and bias (C,) that take channels as they are."""
        weight_DC = self.weight_GDFC[0, :, fold] / self.std_GFD[0, fold, :, None]
        return weight_DC, self.bias_GFC[0, fold] - self.mean_GFD[0, fold] @ weight_DC


def solve(
    x_GND: Tensor,
    y_NC: Tensor,
    train_NF: Tensor,
    *,
    loss: str = "softmax",
    strength: float = 1.0,
    tolerance: float = TOLERANCE,
    max_iterations: int = MAX_ITERATIONS,
    device: str | torch.device = "cpu",
) -> Solution:
    """Fit every layer of x on every fold, in the dtype of x.

    x, y (0/1) and train (bool: does the clip train in this fold?) are on the CPU. A problem has converged when half
    its squared gradient is at most `tolerance` times its objective: the penalty curves the objective by 1 in every
    direction but the bias, so it then lies about that share above its minimum, or less.
    """
    features = Features(x_GND, train_NF, device)
    y_NC, train_NF = (t.to(device=device, dtype=x_GND.dtype) for t in (y_NC, train_NF))
    loss = LOSSES[loss](y_NC, train_NF, strength)
    penalty = torch.full_like(features.x[0, 0, :, None, None], loss.penalty)
    penalty[-1] = 0

    w = features.x.new_zeros(len(x_GND), len(penalty), *loss.offset.shape[2:])
    z = features.logits(w)
    p = loss.probability(z)
    iterations = torch.zeros_like(w[:, :1, :, :1], dtype=torch.long)
    inverse, previous = None, None
    for iteration in range(max_iterations + 1):
        gradient = features.transposed(loss.residual(p)) + penalty * w
        objective = loss.total(z) + dot(penalty * w, w) / 2
        active = dot(gradient, gradient) / 2 > tolerance * objective
        if iteration == max_iterations or not active.any():
            break
        if iteration == PRECONDITION_AT and len(penalty) <= PRECONDITION_MAX_DIM:
            inverse, previous = inverse_curvature(features, loss, p, penalty), None
        direction, previous = conjugate(gradient, inverse, previous)
        direction = torch.where(active, direction, 0)
        step, z, p = line_search(features.logits(direction), z, p, w, direction, gradient, loss, penalty, active)
        w += step * direction
        iterations += active

    w, objective, iterations, active = (t.cpu() for t in (w, objective, iterations, active))
    return Solution(
        weight_GDFC=w[:, :-1],
        bias_GFC=w[:, -1] + loss.offset.cpu()[:, 0],
        mean_GFD=features.mean_GFD,
        std_GFD=features.std_GFD,
        objective_GF=objective[:, 0, :, 0],
        iterations_GF=iterations[:, 0, :, 0],
        converged_GF=~active[:, 0, :, 0],
    )


def conjugate(gradient: Tensor, inverse: Tensor | None, previous: tuple | None) -> tuple[Tensor, tuple]:
    """Polak-Ribiere direction, started afresh where it would not lead down; and what the next call needs."""
    if inverse is None:
        downhill = gradient
    else:
        downhill = torch.bmm(inverse, gradient.flatten(2)).unflatten(2, gradient.shape[2:])
    decrease = dot(downhill, gradient)
    direction = -downhill
    if previous is not None:
        last_direction, last_gradient, last_decrease = previous
        turn = (decrease - dot(downhill, last_gradient)) / last_decrease
        conjugated = direction + turn.clamp(min=0) * last_direction
        direction = torch.where(dot(conjugated, gradient) < 0, conjugated, direction)
    return direction, (direction, gradient, decrease)


def line_search(dz, z, p, w, direction, gradient, loss, penalty, active) -> tuple[Tensor, Tensor, Tensor]:
    """Step length per problem, with the logits and probabilities there: where the slope has all but vanished.

    Newton steps, bisected every second time and wherever they leave the bracket; the first is nearly always enough.
    Slopes keep their digits near the optimum, where differences of the objective are lost in rounding.
    """
    slope = dot(direction, gradient)
    pull, bend = dot(penalty * w, direction), dot(penalty * direction, direction)
    step = torch.where(active, -slope / (loss.curvature(p, dz) + bend), 0)
    low, high = torch.zeros_like(step), torch.full_like(step, torch.inf)
    for trial in range(STEP_TRIALS):
        z_there = z + step * dz
        p_there = loss.probability(z_there)
        slope_there = dot(loss.residual(p_there), dz) + pull + step * bend
        searching = active & (slope_there.abs() > SLOPE_LEFT * slope.abs())
        if not searching.any():
            break
        low, high = torch.where(slope_there < 0, step, low), torch.where(slope_there < 0, high, step)
        newton = step - slope_there / (loss.curvature(p_there, dz) + bend)
        trusted = (low < newton) & (newton < high) & (high.isinf() | (trial % 2 == 0))
        middle = torch.where(high.isinf(), 2 * step, (low + high) / 2)
        step = torch.where(searching, torch.where(trusted, newton, middle), step)
    return step, z_there, p_there


def inverse_curvature(features: Features, loss: Softmax | Sigmoid, p: Tensor, penalty: Tensor) -> Tensor:
    """(G, D, D) inverse of the second derivative, averaged over folds and classes."""
    clips = loss.clips.expand_as(p)
    per_clip = (clips * p * (1 - p)).sum((2, 3)) / (clips > 0).sum((2, 3)).clamp(min=1)
    curvature = torch.bmm(features.x.mT * per_clip[:, None], features.x)
    curvature.diagonal(dim1=1, dim2=2).add_(penalty[:, 0, 0])
    curvature[:, -1, -1] *= 1.001  # the bias has no penalty to keep the matrix positive definite in rounding
    return torch.cholesky_inverse(torch.linalg.cholesky(curvature))


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product for each problem, (G, 1, F, 1)."""
    return (a * b).sum(1, keepdim=True).sum(3, keepdim=True)


class Features:
    """Features of G layers, standardised for each fold without a copy: a linear map of weights, and its transpose."""

    def __init__(self, x_GND: Tensor, train_NF: Tensor, device: str | torch.device):
        self.mean_GFD, self.std_GFD = statistics(x_GND, train_NF)
        mean_G1D, std_G1D = statistics(x_GND, train_NF.any(dim=1, keepdim=True))
        standard_GND = ((x_GND - mean_G1D) / std_G1D).to(x_GND.dtype)
        self.x = torch.nn.functional.pad(standard_GND, (0, 1), value=1.0).to(device)
        shift, scale = (self.mean_GFD - mean_G1D) / std_G1D, self.std_GFD / std_G1D  # what is left to do for each fold
        self.shift = torch.nn.functional.pad(shift, (0, 1), value=0.0).mT[..., None].to(self.x)
        self.scale = torch.nn.functional.pad(scale, (0, 1), value=1.0).mT[..., None].to(self.x)

    def logits(self, w_GDFC: Tensor) -> Tensor:
        w = w_GDFC / self.scale
        w[:, -1:] -= (self.shift * w).sum(1, keepdim=True)
        return torch.bmm(self.x, w.flatten(2)).unflatten(2, w.shape[2:])

    def transposed(self, r_GNFC: Tensor) -> Tensor:
        r = torch.bmm(self.x.mT, r_GNFC.flatten(2)).unflatten(2, r_GNFC.shape[2:])
        return (r - self.shift * r[:, -1:]) / self.scale


def statistics(x_GND: Tensor, train_NF: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation (G, F, D) in float64; a channel that varies less than its type resolves has deviation 1."""
    folds = [x_GND[:, rows].double() for rows in train_NF.T]
    mean = torch.stack([x.mean(1) for x in folds], dim=1)
    std = torch.stack([x.std(1, correction=0) for x in folds], dim=1)
    return mean, torch.where(std <= torch.finfo(x_GND.dtype).eps * mean.abs(), 1.0, std)


class Softmax:
    """Multinomial cross-entropy. A class without a training clip takes no part in that fold."""

    def __init__(self, y_NC: Tensor, train_NF: Tensor, strength: float):
        absent_FC = train_NF.T @ y_NC == 0
        self.y = y_NC[None, :, None]
        self.clips = strength * train_NF[None, :, :, None]
        self.offset = torch.zeros_like(y_NC[:1]).masked_fill(absent_FC, -torch.inf)[None, None]
        # scikit-learn gives two classes one column of weights; two mirrored columns at twice the penalty cost the same
        self.penalty = 2.0 if y_NC.shape[1] == 2 else 1.0

    def probability(self, z: Tensor) -> Tensor:
        z = z + self.offset
        return (z - z.logsumexp(3, keepdim=True)).exp()  # torch's softmax is four times slower on few classes

    def residual(self, p: Tensor) -> Tensor:
        return self.clips * (p - self.y)

    def total(self, z: Tensor) -> Tensor:
        value = (z + self.offset).logsumexp(3, keepdim=True) - (z * self.y).sum(3, keepdim=True)
        return (self.clips * value).sum(1, keepdim=True)

    def curvature(self, p: Tensor, dz: Tensor) -> Tensor:
        """Second derivative of the total along dz."""
        pdz = p * dz
        variance = (pdz * dz).sum(3, keepdim=True) - pdz.sum(3, keepdim=True).square()
        return (self.clips * variance).sum(1, keepdim=True)


class Sigmoid:
    """Binary cross-entropy per class. A class that all training clips of a fold have, or none, is not learned there."""

    penalty = 1.0

    def __init__(self, y_NC: Tensor, train_NF: Tensor, strength: float):
        positive_FC, clips_F1 = train_NF.T @ y_NC, train_NF.sum(0)[:, None]
        learned_FC = (positive_FC > 0) & (positive_FC < clips_F1)
        self.y = y_NC[None, :, None]
        self.clips = strength * train_NF[None, :, :, None] * learned_FC
        self.offset = torch.zeros_like(learned_FC, dtype=y_NC.dtype)[None, None]

    def probability(self, z: Tensor) -> Tensor:
        return z.sigmoid()

    def residual(self, p: Tensor) -> Tensor:
        return self.clips * (p - self.y)

    def total(self, z: Tensor) -> Tensor:
        return dot(self.clips, softplus(z) - z * self.y)

    def curvature(self, p: Tensor, dz: Tensor) -> Tensor:
        return dot(self.clips * p * (1 - p), dz.square())


LOSSES = {"softmax": Softmax, "sigmoid": Sigmoid}
