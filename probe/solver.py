"""Many logistic regressions at once: all folds of a group of layers as one batched problem.

Each problem is scikit-learn's: minimise `strength * sum of losses + |W|^2 / 2` over the training clips, channels
standardised on those clips, the bias free of the penalty. `softmax` is multinomial cross-entropy (one class a clip),
`sigmoid` one binary cross-entropy per class (any number of classes a clip).

A layer's features are stored once and shared by its folds: a fold is a weight of 0 or 1 per clip, and its
standardisation is moved from the features to the weights. The method is nonlinear conjugate gradients (Polak-Ribiere)
with a step of its own for each problem. Logits are linear in the step, so steps are tried without touching the
features: an iteration costs two matrix products, and a problem keeps no history but its last gradient and direction.
On the features of Whisper it needs as many iterations as L-BFGS with a memory of ten.

Shapes: G layers solved together, N clips, D channels (the last one always 1, for the bias), F folds, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TOLERANCE = 1e-5
MAX_ITERATIONS = 2000
MAX_STEP_TRIALS = 20
OVERSHOOT = 0.25  # a step may end where the slope rises, if it rises less than this share of the first fall


@dataclass(frozen=True, eq=False)
class Solution:
    """The models of G layers and F folds, for clips as they are (standardisation is in `mean` and `std`)."""

    weight_GDFC: Tensor  # for standardised channels; here D does not count the bias
    bias_GFC: Tensor  # -inf for a class that the softmax of this fold never saw
    mean_GFD: Tensor
    std_GFD: Tensor
    objective_GF: Tensor
    iterations_GF: Tensor
    converged_GF: Tensor

    def logits(self, x_GND: Tensor, fold: int) -> Tensor:
        """(G, N, C) by the models of one fold, counted from 0."""
        standard_GND = (x_GND - self.mean_GFD[:, fold, None]) / self.std_GFD[:, fold, None]
        return standard_GND @ self.weight_GDFC[:, :, fold] + self.bias_GFC[:, fold, None]


class Softmax:
    """Multinomial cross-entropy. A class without a training clip takes no part in that fold: its logit is -inf."""

    def __init__(self, y_NC: Tensor, train_NF: Tensor):
        absent_FC = train_NF.T @ y_NC == 0
        self.y = y_NC[None, :, None]
        self.clips = train_NF[None, :, :, None]
        self.offset = torch.zeros_like(absent_FC, dtype=y_NC.dtype).masked_fill(absent_FC, -torch.inf)[None, None]
        # scikit-learn gives two classes one column of weights; two mirrored columns at twice the penalty cost the same
        self.penalty = 2.0 if y_NC.shape[1] == 2 else 1.0

    def value(self, z: Tensor) -> Tensor:
        return (z + self.offset).logsumexp(-1, keepdim=True) - (z * self.y).sum(-1, keepdim=True)

    def probability(self, z: Tensor) -> Tensor:
        return (z + self.offset).softmax(-1)

    def curvature(self, p: Tensor, dz: Tensor) -> Tensor:
        pdz = p * dz
        return (pdz * dz).sum(-1, keepdim=True) - pdz.sum(-1, keepdim=True).square()


class Sigmoid:
    """Binary cross-entropy per class. A class with no positive or no negative clip is not learned: its logit stays 0."""

    def __init__(self, y_NC: Tensor, train_NF: Tensor):
        positive_FC, total_F1 = train_NF.T @ y_NC, train_NF.sum(0)[:, None]
        self.y = y_NC[None, :, None]
        self.clips = train_NF[None, :, :, None] * ((positive_FC > 0) & (positive_FC < total_F1))[None, None]
        self.offset = y_NC.new_zeros(1, 1, *positive_FC.shape)
        self.penalty = 1.0

    def value(self, z: Tensor) -> Tensor:
        return torch.nn.functional.softplus(z) - z * self.y

    def probability(self, z: Tensor) -> Tensor:
        return z.sigmoid()

    def curvature(self, p: Tensor, dz: Tensor) -> Tensor:
        return p * (1 - p) * dz.square()


LOSSES = {"softmax": Softmax, "sigmoid": Sigmoid}


class Features:
    """Features of G layers, standardised per fold without a copy per fold: a linear map and its transpose."""

    def __init__(self, x_GND: Tensor, train_NF: Tensor):
        """Statistics in float64, so that a channel far from zero keeps its small variation."""
        self.mean_GFD, self.std_GFD = _statistics(x_GND, train_NF)
        used = train_NF.any(dim=1)
        mean_G1D, std_G1D = _statistics(x_GND, used[:, None])
        shift, scale = (self.mean_GFD - mean_G1D) / std_G1D, self.std_GFD / std_G1D
        ones = x_GND.new_ones(*x_GND.shape[:2], 1)
        self.x = torch.cat([((x_GND - mean_G1D) / std_G1D).to(x_GND.dtype), ones], dim=2)
        last = torch.zeros_like(shift[..., :1])
        self.shift = torch.cat([shift, last], dim=2).to(x_GND.dtype).mT[..., None]
        self.scale = torch.cat([scale, last + 1], dim=2).to(x_GND.dtype).mT[..., None]

    def logits(self, w_GDFC: Tensor) -> Tensor:
        v = w_GDFC / self.scale
        v[:, -1:] -= (self.shift * v).sum(1, keepdim=True)
        return torch.bmm(self.x, v.flatten(2)).unflatten(2, w_GDFC.shape[2:])

    def transposed(self, r_GNFC: Tensor) -> Tensor:
        g = torch.bmm(self.x.mT, r_GNFC.flatten(2)).unflatten(2, r_GNFC.shape[2:])
        return (g - self.shift * g[:, -1:]) / self.scale


def _statistics(x_GND: Tensor, train_NF: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (G, F, D) in float64; a channel that varies less than its type resolves has 1."""
    folds = [x_GND[:, rows].double() for rows in train_NF.T]
    mean = torch.stack([x.mean(1) for x in folds], dim=1)
    std = torch.stack([x.std(1, correction=0) for x in folds], dim=1)
    return mean, torch.where(std <= torch.finfo(x_GND.dtype).eps * mean.abs(), 1.0, std)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product for each problem, (G, 1, F, 1)."""
    return (a * b).sum((1, 3), keepdim=True)


def solve(x, y_NC, train_NF, *, loss="softmax", strength=1.0, tolerance=TOLERANCE, max_iterations=MAX_ITERATIONS, stats=None):
    features = Features(x, train_NF)
    f = LOSSES[loss](y_NC.to(x.dtype), train_NF.to(x.dtype))
    clips, y = f.clips * strength, f.y
    G, N, D = features.x.shape
    F, C = train_NF.shape[1], y_NC.shape[1]
    penalty = torch.full((D, 1, 1), f.penalty, dtype=x.dtype); penalty[-1] = 0
    w = x.new_zeros(G, D, F, C); z = x.new_zeros(G, N, F, C); g_old = d = None
    iters = torch.zeros(G, F, dtype=torch.long)
    p = f.probability(z); evals = 1
    for it in range(max_iterations):
        r = clips * (p - y)
        g = features.transposed(r) + penalty * w
        gg = dot(g, g)
        obj = (clips * f.value(z)).sum((1, 3), keepdim=True) + dot(penalty * w, w) / 2
        active = gg / 2 > tolerance * obj
        if not active.any(): break
        iters[active[:, 0, :, 0]] = it + 1
        if d is None: d = -g
        else:
            beta = (dot(g, g - g_old) / gg_old).clamp(min=0)
            d = beta * d - g
            d = torch.where(dot(d, g) < 0, d, -g)
        dz = features.logits(d)
        slope = dot(d, g)
        bend = dot(penalty * d, d); pull = dot(penalty * w, d)
        curve = (clips * f.curvature(p, dz)).sum((1, 3), keepdim=True) + bend
        t = torch.where(active, -slope / curve, 0.)
        for trial in range(MAX_STEP_TRIALS):
            z_new = z + t * dz; p = f.probability(z_new); evals += 1
            end = (clips * (p - y) * dz).sum((1, 3), keepdim=True) + pull + t * bend
            over = active & (end > OVERSHOOT * -slope)
            if not over.any(): break
            t = torch.where(over, t * slope / (slope - end), t)
        z = z_new; w = w + t * d; g_old, gg_old = g, gg
    if stats is not None: stats.update(iters=iters, evals=evals, it=it)
    return Solution(w[:, :-1], w[:, -1] + f.offset[:, 0], features.mean_GFD.to(x.dtype) , features.std_GFD.to(x.dtype), obj[:, 0, :, 0], iters, ~active[:, 0, :, 0])
