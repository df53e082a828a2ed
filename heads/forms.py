"""The heads of the paper: cached features of every layer in, one logit per class out.

B clips in a batch, L layers, T frames, D channels of the encoder, d channels inside a head, C classes.
Parameters carry the names of the original project's state dicts (`time_tr.attn.query.weight`, ...), so that heads can
be exchanged with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from whisper_at_cli.extract.errors import UsageError

if TYPE_CHECKING:
    from whisper_at_cli.heads.checkpoint import HeadDescription

TEMPORAL_ATTENTION_HEADS = 1
LAYER_ATTENTION_HEADS = 8


class Attention(nn.Module):
    """Self-attention as in Whisper: no bias on the key. (B, S, d) -> (B, S, d) for sequences of S."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        if dim % heads:
            raise UsageError(f"{dim} channels cannot be shared by {heads} attention heads: choose a multiple")
        self.heads = heads
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x_BSd: Tensor) -> Tensor:
        query, key, value = (self._split(part(x_BSd)) for part in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def probabilities(self, x_BSd: Tensor) -> Tensor:
        """(B, heads, S, S): how much each place (third) attends to each other (fourth), 1 in all."""
        query, key = self._split(self.query(x_BSd)), self._split(self.key(x_BSd))
        return (query @ key.transpose(2, 3) / query.shape[3] ** 0.5).softmax(dim=3)

    def _split(self, y_BSd: Tensor) -> Tensor:
        return y_BSd.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class Block(nn.Module):
    """Whisper's Transformer block, without positions: pre-norm attention, then a GELU MLP four times as wide."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.attn = Attention(dim, heads)
        self.attn_ln = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.mlp_ln = nn.LayerNorm(dim)

    def forward(self, x_BSd: Tensor) -> Tensor:
        x_BSd = x_BSd + self.attn(self.attn_ln(x_BSd))
        return x_BSd + self.mlp(self.mlp_ln(x_BSd))


def normed_linear(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(inputs), nn.Linear(inputs, outputs))


class Head(nn.Module):
    """What every head has: what it `reads` of a cache and, once it was loaded from a folder, its `description`."""

    reads: ClassVar[str]
    solved: ClassVar[bool] = False  # its weights are the solution of one convex problem, without epochs
    description: HeadDescription


class LastMLP(Head):
    """Last-MLP: mean over time of the last layer, linear. features (B, L, T, D) -> logits (B, C)."""

    reads = "last mean"

    def __init__(self, *, layers: int, dim: int, classes: int):
        super().__init__()
        self.mlp_layer = normed_linear(dim, classes)

    def forward(self, features_BLTD: Tensor) -> Tensor:
        return self.mlp_layer(features_BLTD[:, -1].mean(dim=1))


class WAMLP(Head):
    """WA-MLP: mean over time, learned average over layers, linear. features (B, L, T, D) -> logits (B, C)."""

    reads = "mean"

    def __init__(self, *, layers: int, dim: int, classes: int):
        super().__init__()
        self.layer_weight = nn.Parameter(torch.full((layers,), 1 / layers))
        self.mlp_layer = normed_linear(dim, classes)

    def forward(self, features_BLTD: Tensor) -> Tensor:
        weight_L = self.layer_weight / self.layer_weight.sum()
        mixed_BD = torch.einsum("bld,l->bd", features_BLTD.mean(dim=2), weight_L)
        return self.mlp_layer(mixed_BD)


class LastTr(Head):
    """Last-Tr: a block over time on the last layer, mean, linear. features (B, L, T, D) -> logits (B, C).

    What the paper's end-to-end rows put on the encoder."""

    reads = "features"

    def __init__(self, *, layers: int, dim: int, classes: int):
        super().__init__()
        self.time_tr = Block(dim, TEMPORAL_ATTENTION_HEADS)
        self.mlp_layer = normed_linear(dim, classes)

    def forward(self, features_BLTD: Tensor) -> Tensor:
        return self.mlp_layer(self.time_tr(features_BLTD[:, -1]).mean(dim=1))


class WATr(Head):
    """WA-Tr: learned average over layers, a block over time, mean, linear. features (B, L, T, D) -> logits (B, C)."""

    reads = "features"

    def __init__(self, *, layers: int, dim: int, classes: int):
        super().__init__()
        self.layer_weight = nn.Parameter(torch.full((layers,), 1 / layers))
        self.time_tr = Block(dim, TEMPORAL_ATTENTION_HEADS)
        self.mlp_layer = normed_linear(dim, classes)

    def forward(self, features_BLTD: Tensor) -> Tensor:
        weight_L = self.layer_weight / self.layer_weight.sum()
        mixed_BTD = (features_BLTD * weight_L[:, None, None]).sum(dim=1)  # in float32 under autocast too, unlike einsum
        return self.mlp_layer(self.time_tr(mixed_BTD).mean(dim=1))


class TLTr(Head):
    """TL-Tr: a block over time shared by all layers, mean, a block over layers, mean, linear. features (B, L, T, D) ->
    logits (B, C). With `width`, features are first projected to that many channels."""

    reads = "features"

    def __init__(self, *, layers: int, dim: int, classes: int, width: int | None = None):
        super().__init__()
        inner = width or dim
        self.down_layer = normed_linear(dim, width) if width else nn.Identity()
        self.time_tr = Block(inner, TEMPORAL_ATTENTION_HEADS)
        self.layer_tr = Block(inner, LAYER_ATTENTION_HEADS)
        self.mlp_layer = normed_linear(inner, classes)

    def forward(self, features_BLTD: Tensor) -> Tensor:
        return self.mlp_layer(self.layer_tr(self._layers(features_BLTD)).mean(dim=1))

    def _layers(self, features_BLTD: Tensor) -> Tensor:
        """(B, L, d): each layer's mean over time, after the block over time."""
        narrow_BLTd = self.down_layer(features_BLTD)
        in_time = self.time_tr(narrow_BLTd.flatten(0, 1))  # every layer of every clip is one sequence of frames
        return in_time.mean(dim=1).unflatten(0, narrow_BLTd.shape[:2])

    def layer_attention(self, features_BLTD: Tensor) -> Tensor:
        """(B, L): the share of its attention that the block over layers gives to each layer, 1 in all, as a mean over
        attention heads and over the layers that attend."""
        normed_BLd = self.layer_tr.attn_ln(self._layers(features_BLTD))
        return self.layer_tr.attn.probabilities(normed_BLd).mean(dim=(1, 2))


class ConcatLinear(Head):
    """Concat-linear, the baseline: one linear map of the standardised time means of all layers, side by side. features
    (B, L, T, D) -> logits (B, C). Standardised by the mean and deviation of the clips that it was fitted to."""

    reads = "mean"
    solved = True
    statistics = 1  # of each layer and channel

    def __init__(self, *, layers: int, dim: int, classes: int):
        super().__init__()
        inputs = layers * dim * self.statistics
        self.center: Tensor
        self.scale: Tensor
        self.register_buffer("center", torch.zeros(inputs))
        self.register_buffer("scale", torch.ones(inputs))
        self.linear = nn.Linear(inputs, classes)

    def forward(self, features_BLTD: Tensor) -> Tensor:
        return self.linear((self.pooled(features_BLTD) - self.center) / self.scale)

    def pooled(self, features_BLTD: Tensor) -> Tensor:
        """(B, L D): what is standardised."""
        return features_BLTD.mean(dim=2).flatten(1)


class ConcatLinearStats(ConcatLinear):
    """Concat-linear on the mean, standard deviation and maximum over time of all layers."""

    reads = "features"
    statistics = 3

    def pooled(self, features_BLTD: Tensor) -> Tensor:
        """(B, 3 L D): all means, then all deviations, then all maxima."""
        std_BLD, mean_BLD = torch.std_mean(features_BLTD, dim=2, correction=0)
        return torch.stack([mean_BLD, std_BLD, features_BLTD.amax(dim=2)], dim=1).flatten(1)


FORMS: dict[str, type[Head]] = {
    "last-mlp": LastMLP, "wa-mlp": WAMLP, "last-tr": LastTr, "wa-tr": WATr, "tl-tr": TLTr,
    "concat-linear": ConcatLinear, "concat-linear-stats": ConcatLinearStats,
}  # fmt: skip


def head_form(head: str, width: int | None = None) -> type[Head]:
    """The class of the head of this name. Raises UsageError for an unknown one, or one that cannot have this width."""
    if head not in FORMS:
        raise UsageError(f"head {head!r} is not known; choose from {', '.join(FORMS)}")
    if width is not None and head != "tl-tr":
        raise UsageError(f"{head} has no projection, so it takes no width (--dim, {width} was given); only tl-tr does")
    if width is not None and (width < 1 or width % LAYER_ATTENTION_HEADS):
        raise UsageError(f"tl-tr cannot project to {width} channels; choose a multiple of {LAYER_ATTENTION_HEADS}")
    return FORMS[head]


def build_head(head: str, *, layers: int, dim: int, classes: int, width: int | None = None) -> Head:
    """A new head with random weights: features (B, layers, T, dim) float32 -> logits (B, classes).

    `width` is the number of channels that tl-tr projects to first; None is no projection. Raises UsageError.
    """
    form = head_form(head, width)
    if min(layers, dim, classes) < 1:
        raise UsageError(f"a head needs layers, channels and classes; found {layers}, {dim} and {classes}")
    options = {"width": width} if width else {}
    return form(layers=layers, dim=dim, classes=classes, **options)
