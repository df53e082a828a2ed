"""Heads of one form that train side by side: all their numbers in one tensor, one optimiser, one average of weights.

A single head is a fleet of one. The MLP heads spend most of a step on starting operations; M of them in one model start
as many as one does, and are faster together while their numbers stay in the processor's cache. Heads with Transformer
blocks train one by one: `vmap` over five of them was slower on two cores (0.83), since their products fill the machine.
Nothing that a head computes depends on its neighbours.

M heads, P numbers in each, B clips in a batch, L layers, D channels, C classes.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from whisper_at_cli.heads.forms import WAMLP, Head, LastMLP
from whisper_at_cli.heads.training.loader import Batch
from whisper_at_cli.heads.training.ranks import Ranks
from whisper_at_cli.heads.training.recipe import Recipe

EPSILON = 1e-8  # Adam's
ASYMMETRIC_MARGIN, ASYMMETRIC_FOCUS = 0.05, 4  # the loss's, as its authors set them; present classes count as in bce
STACKABLE = (LastMLP, WAMLP)
MLP_LAYER = ("0.weight", "0.bias", "1.weight", "1.bias")  # of `mlp_layer`: its norm, then its linear map


class Fleet:
    """M heads with their optimiser and averages, on one device. `recipe` holds what they share; learning rates, and
    the statistics of standardised heads, are each head's own. A head that does not take a step keeps its weights and
    its running means."""

    def __init__(self, modules: list[Head], recipe: Recipe, device: torch.device):
        self.module = copy.deepcopy(modules[0]).to(device)
        self.stacked = isinstance(self.module, STACKABLE)
        assert self.stacked or len(modules) == 1, "only MLP heads train side by side"
        self.module.mlp_layer.dropout = recipe.dropout
        self.recipe, self.device = recipe, device
        self.statistics = None
        if self.stacked and self.module.standard_mean is not None:  # of a module that is called, its own
            both = [(module.standard_mean, module.standard_deviation) for module in modules]
            self.statistics = tuple(torch.stack(each).to(device) for each in zip(*both, strict=True))  # (M, L or 1, D)
        own = [nn.utils.parameters_to_vector(module.parameters()).detach() for module in modules]
        self.weights = torch.stack(own).to(device)  # (M, P)
        self.first, self.second = torch.zeros_like(self.weights), torch.zeros_like(self.weights)  # Adam's means
        self.average = torch.zeros_like(self.weights)
        self.best = self.weights.clone() if recipe.patience else None  # at the epoch of the best validation
        self.averaged = np.zeros(len(modules), dtype=np.int64)  # (M,) how many weights each average is of
        self.steps = np.zeros(len(modules), dtype=np.int64)  # (M,) that Adam took
        self.parameters = self._views()
        self.optimizer = None if self.stacked else self._torchs_optimizer()

    def __len__(self) -> int:
        return len(self.weights)

    def _views(self) -> dict[str, Tensor]:
        """Every parameter of all heads, (M, ...), as a view into `weights`; of a module that is called, its own."""
        views, start = {}, 0
        for name, parameter in self.module.named_parameters():
            end = start + parameter.numel()
            view = self.weights[:, start:end].view(len(self), *parameter.shape)
            if self.stacked:
                views[name] = view.requires_grad_()
            else:
                parameter.data, views[name] = view[0], parameter
            start = end
        return views

    def _torchs_optimizer(self) -> torch.optim.Optimizer:
        """torch's own, in one kernel, over the numbers and running means here: for a head that trains alone. It is 1.5
        to 2.5 times as fast as several operations from 100,000 numbers on, and half as fast for an MLP head's few."""
        own = nn.Parameter(self.weights)
        form = torch.optim.AdamW if self.recipe.optimizer == "adamw" else torch.optim.Adam
        optimizer = form(
            [own], lr=self.recipe.lr, betas=self.recipe.betas, eps=EPSILON, weight_decay=self.recipe.weight_decay,
            fused=True,
        )  # fmt: skip
        steps = torch.zeros((), dtype=torch.float32, device=self.device)
        optimizer.state[own] = {"step": steps, "exp_avg": self.first, "exp_avg_sq": self.second}
        return optimizer

    def logits(self, inputs: Tensor) -> Tensor:
        """(M, B, C) of inputs (M, B, L, T, D), each head on its own."""
        if self.stacked:
            return stacked_mlp(self.parameters, inputs, self.statistics, self.recipe.dropout)
        return self.module(inputs[0])[None]

    def step(self, batch: Batch, lr: np.ndarray, ranks: Ranks) -> Tensor:
        """One step of Adam with the learning rates `lr` (M,). Gives this process's part of each head's loss, (M,)."""
        self.module.train()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.precision == "bfloat16"):
            logits = self.logits(batch.inputs)
        losses = (clip_losses(logits.float(), batch.targets, self.recipe.loss) * batch.weight).sum(dim=1)
        parts = torch.autograd.grad(losses.sum(), list(self.parameters.values()))
        gradient = torch.cat([part.reshape(len(self), -1) for part in parts], dim=1)
        self._adam(ranks.sum_(gradient), lr, batch.active)
        return losses.detach()

    @torch.no_grad()
    def _adam(self, gradient: Tensor, lr: np.ndarray, active: np.ndarray) -> None:
        """Adam as Kingma and Ba have it, with an L2 penalty in the gradient, or AdamW; `active` (M,) heads move."""
        self.steps += active
        if self.optimizer is not None:
            (group,) = self.optimizer.param_groups
            group["lr"], group["params"][0].grad = float(lr[0]), gradient
            self.optimizer.step()
            return
        (beta1, beta2), taken = self.recipe.betas, np.maximum(self.steps, 1)
        if self.recipe.optimizer == "adamw":
            kept = torch.tensor(1 - lr * active * self.recipe.weight_decay, dtype=torch.float32)
            self.weights.mul_(kept.to(self.device)[:, None])
        else:
            gradient.add_(self.weights, alpha=self.recipe.weight_decay)
        scale = lr * active / (1 - beta1**taken)
        root = 1 / np.sqrt(1 - beta2**taken)
        if len(self) == 1:
            self.first.lerp_(gradient, 1 - beta1)
            self.second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            denominator = self.second.sqrt().mul_(float(root[0])).add_(EPSILON)
            self.weights.addcdiv_(self.first, denominator, value=-float(scale[0]))
            return
        moves = torch.tensor(np.stack([active, root, scale]), dtype=torch.float32, device=self.device)[:, :, None]
        self.first.lerp_(gradient, moves[0] * (1 - beta1))
        self.second.lerp_(gradient.square_(), moves[0] * (1 - beta2))
        denominator = self.second.sqrt().mul_(moves[1]).add_(EPSILON)
        self.weights.sub_(self.first.div(denominator).mul_(moves[2]))

    @torch.no_grad()
    def take_into_average(self, which: np.ndarray) -> None:
        """The weights of the heads `which` (M,) bool, as they are now, count in their averages."""
        self.averaged += which
        share = torch.tensor(which / np.maximum(self.averaged, 1), dtype=torch.float32, device=self.device)
        self.average.lerp_(self.weights, share[:, None])

    @torch.no_grad()
    def keep_as_best(self, which: np.ndarray) -> None:
        """The weights of the heads `which` (M,) bool, as they are now, are those of their best epoch so far."""
        assert self.best is not None, "only recipes with patience ask for it"
        mask = torch.from_numpy(which).to(self.device)
        self.best[mask] = self.weights[mask]

    def head(self, index: int, *, final: bool = True) -> Head:
        """A head by itself: as it is now, or finally with its averaged weights, else those of its best epoch where
        training stops early."""
        own = self.weights
        if final and self.averaged[index]:
            own = self.average
        elif final and self.best is not None:
            own = self.best
        module = copy.deepcopy(self.module)
        if self.statistics is not None:
            module.standardise(*(each[index].clone() for each in self.statistics))
        nn.utils.vector_to_parameters(own[index].detach().clone(), module.parameters())
        return module

    def state(self) -> dict[str, Tensor]:
        """All that changes in training, on the CPU."""
        tensors = {name: getattr(self, name).detach().cpu() for name in self._kept()}
        return tensors | {name: torch.from_numpy(getattr(self, name).copy()) for name in ("steps", "averaged")}

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        for name in self._kept():
            getattr(self, name).copy_(state[name])
        self.steps, self.averaged = state["steps"].numpy().copy(), state["averaged"].numpy().copy()
        if self.optimizer is not None:
            (kept,) = self.optimizer.state.values()
            kept["step"].fill_(float(self.steps[0]))

    def _kept(self) -> tuple[str, ...]:
        return ("weights", "first", "second", "average", *["best"] * (self.best is not None))


def stacked_mlp(
    parameters: dict[str, Tensor], inputs_MBLTD: Tensor, statistics: tuple[Tensor, ...] | None = None,
    dropout: float = 0.0,
) -> Tensor:  # fmt: skip
    """Logits (M, B, C) of M MLP heads in training, whose parameters are stacked; Last-MLP's are given one layer.

    `statistics` are mean and deviation (M, L, D) of standardised heads.
    """
    mean_MBLD = inputs_MBLTD.squeeze(3) if inputs_MBLTD.shape[3] == 1 else inputs_MBLTD.mean(dim=3)
    if statistics is not None:
        mean_MBLD = (mean_MBLD - statistics[0][:, None]) / statistics[1][:, None]
    if "layer_weight" in parameters:
        weight_ML = parameters["layer_weight"] / parameters["layer_weight"].sum(dim=1, keepdim=True)
        mixed_MBD = (weight_ML[:, None, None, :] @ mean_MBLD).squeeze(2)
    else:
        mixed_MBD = mean_MBLD[:, :, -1]
    norm, norm_bias, matrix, bias = (parameters[f"mlp_layer.{part}"] for part in MLP_LAYER)
    normed_MBD = F.layer_norm(mixed_MBD, mixed_MBD.shape[-1:]) * norm[:, None] + norm_bias[:, None]
    return torch.baddbmm(bias[:, None], F.dropout(normed_MBD, dropout), matrix.transpose(1, 2))


def clip_losses(logits: Tensor, targets: Tensor, loss: str) -> Tensor:
    """(M, B) losses of logits and targets (M, B, C)."""
    if loss == "ce":
        return -(targets * logits.log_softmax(dim=-1)).sum(dim=-1)
    if loss == "asymmetric":
        return asymmetric(logits, targets).mean(dim=-1)
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(dim=-1)


def asymmetric(logits: Tensor, targets: Tensor) -> Tensor:
    """The asymmetric loss of each logit (Ridnik et al. 2021): bce in which an absent class counts (p - margin)^focus,
    so that those that the head is sure of hardly count. Targets between 0 and 1 are shares of present and absent."""
    absent = (logits.sigmoid() - ASYMMETRIC_MARGIN).clamp(min=0)
    return -targets * F.logsigmoid(logits) - (1 - targets) * absent.pow(ASYMMETRIC_FOCUS) * torch.log1p(-absent)
