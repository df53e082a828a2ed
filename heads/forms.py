"""The heads: cached features of every layer in, one logit per class out. Those of the paper, a pooling head, baselines.

B clips in a batch, L layers, T frames, D channels of the encoder, d channels inside a head, Q queries, C classes.
Parameters of the paper's heads carry the names of the original project's state dicts (`time_tr.attn.query.weight`,
...), so that heads can be exchanged with it.
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
POOL_ATTENTION_HEADS = 4
POOL_QUERIES = 16
POOL_WIDTH = 128


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


class NormedLinear(nn.Sequential):
    """A layer norm, dropout where a recipe asks for it, and a linear map. (..., inputs) -> (..., outputs)."""

    dropout = 0.0

    def __init__(self, inputs: int, outputs: int):
        super().__init__(nn.LayerNorm(inputs), nn.Linear(inputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return self[1](F.dropout(self[0](x), self.dropout, self.training))


class Head(nn.Module):
    """What every head has: what it `reads` of a cache and, once it was loaded from a folder, its `description`.

    A standardised head takes from each layer and channel its mean over the clips that the head was trained on, and
    divides by its standard deviation over them. Both are buffers of the head, (L, D), or (1, D) where it reads the last
    layer alone.
    """

    reads: ClassVar[str]
    solved: ClassVar[bool] = False  # its weights are the solution of one convex problem, without epochs
    last_layer: ClassVar[bool] = False  # whether it reads nothing else
    width_multiple: ClassVar[int | None] = None  # what the channels inside it must be a multiple of; None: no choice
    default_width: ClassVar[int | None] = None  # None: as many channels as the encoder has
    description: HeadDescription
    standard_mean: Tensor | None
    standard_deviation: Tensor | None
    mlp_layer: NormedLinear  # gives the logits

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("standard_mean", None)
        self.register_buffer("standard_deviation", None)

    def forward(self, features_BLTD: Tensor) -> Tensor:
        """Features (B, L, T, D) float32 -> logits (B, C)."""
        return self.logits(self.standardised(features_BLTD))

    def logits(self, features_BLTD: Tensor) -> Tensor:
        """`forward` of features that are standardised where the head is."""
        raise NotImplementedError

    def standardise(self, mean_LD: Tensor, deviation_LD: Tensor) -> None:
        """Make it a standardised head."""
        self.standard_mean, self.standard_deviation = mean_LD, deviation_LD

    def standardised(self, features_BLTD: Tensor) -> Tensor:
        if self.standard_mean is None or self.standard_deviation is None:
            return features_BLTD
        return (features_BLTD - self.standard_mean[:, None]) / self.standard_deviation[:, None]

    def layer_shares(self) -> Tensor | None:
        """(L,): what each layer counts in a head that averages them, 1 in all; None of another head."""
        return None


class LastMLP(Head):
    """Last-MLP: mean over time of the last layer, linear. features (B, L, T, D) -> logits (B, C)."""

    reads = "last mean"
    last_layer = True

    def __init__(self, *, layers: int, dim: int, classes: int):
        super().__init__()
        self.mlp_layer = NormedLinear(dim, classes)

    def logits(self, features_BLTD: Tensor) -> Tensor:
        return self.mlp_layer(features_BLTD[:, -1].mean(dim=1))


class LayerAverage(Head):
    """What heads have that average the layers with learned weights, which stand in proportion to their sum."""

    layer_weight: nn.Parameter

    def layer_shares(self) -> Tensor:
        return self.layer_weight / self.layer_weight.sum()


class WAMLP(LayerAverage):
    """WA-MLP: mean over time, learned average over layers, linear. features (B, L, T, D) -> logits (B, C)."""

    reads = "mean"

    def __init__(self, *, layers: int, dim: int, classes: int):
        super().__init__()
        self.layer_weight = nn.Parameter(torch.full((layers,), 1 / layers))
        self.mlp_layer = NormedLinear(dim, classes)

    def logits(self, features_BLTD: Tensor) -> Tensor:
        mixed_BD = torch.einsum("bld,l->bd", features_BLTD.mean(dim=2), self.layer_shares())
        return self.mlp_layer(mixed_BD)


class LastTr(Head):
    """Last-Tr: a block over time on the last layer, mean, linear. features (B, L, T, D) -> logits (B, C).

    What the paper's end-to-end rows put on the encoder."""

    reads = "features"
    last_layer = True

    def __init__(self, *, layers: int, dim: int, classes: int):
        super().__init__()
        self.time_tr = Block(dim, TEMPORAL_ATTENTION_HEADS)
        self.mlp_layer = NormedLinear(dim, classes)

    def logits(self, features_BLTD: Tensor) -> Tensor:
        return self.mlp_layer(self.time_tr(features_BLTD[:, -1]).mean(dim=1))


class WATr(LayerAverage):
    """WA-Tr: learned average over layers, a block over time, mean, linear. features (B, L, T, D) -> logits (B, C).

    With `width`, the average is first projected to that many channels, as TL-Tr projects each layer."""

    reads = "features"
    width_multiple = TEMPORAL_ATTENTION_HEADS

    def __init__(self, *, layers: int, dim: int, classes: int, width: int | None = None):
        super().__init__()
        self.layer_weight = nn.Parameter(torch.full((layers,), 1 / layers))
        self.down_layer = NormedLinear(dim, width) if width else nn.Identity()
        self.time_tr = Block(width or dim, TEMPORAL_ATTENTION_HEADS)
        self.mlp_layer = NormedLinear(width or dim, classes)

    def logits(self, features_BLTD: Tensor) -> Tensor:
        # the sum of a product stays in float32 under autocast, unlike einsum
        mixed_BTD = (features_BLTD * self.layer_shares()[:, None, None]).sum(dim=1)
        return self.mlp_layer(self.time_tr(self.down_layer(mixed_BTD)).mean(dim=1))


class TLTr(Head):
    """TL-Tr: a block over time shared by all layers, mean, a block over layers, mean, linear. features (B, L, T, D) ->
    logits (B, C). With `width`, features are first projected to that many channels."""

    reads = "features"
    width_multiple = LAYER_ATTENTION_HEADS

    def __init__(self, *, layers: int, dim: int, classes: int, width: int | None = None):
        super().__init__()
        inner = width or dim
        self.down_layer = NormedLinear(dim, width) if width else nn.Identity()
        self.time_tr = Block(inner, TEMPORAL_ATTENTION_HEADS)
        self.layer_tr = Block(inner, LAYER_ATTENTION_HEADS)
        self.mlp_layer = NormedLinear(inner, classes)

    def logits(self, features_BLTD: Tensor) -> Tensor:
        return self.mlp_layer(self.layer_tr(self._layers(features_BLTD)).mean(dim=1))

    def _layers(self, features_BLTD: Tensor) -> Tensor:
        """(B, L, d): each layer's mean over time, after the block over time."""
        narrow_BLTd = self.down_layer(features_BLTD)
        in_time = self.time_tr(narrow_BLTd.flatten(0, 1))  # every layer of every clip is one sequence of frames
        return in_time.mean(dim=1).unflatten(0, narrow_BLTd.shape[:2])

    def layer_attention(self, features_BLTD: Tensor) -> Tensor:
        """(B, L): the share of its attention that the block over layers gives to each layer, 1 in all, as a mean over
        attention heads and over the layers that attend."""
        normed_BLd = self.layer_tr.attn_ln(self._layers(self.standardised(features_BLTD)))
        return self.layer_tr.attn.probabilities(normed_BLd).mean(dim=(1, 2))


class WAPool(Head):
    """WA-Pool: each layer normed, a learned average over layers, a projection to d channels, a block over time where
    `block` is true, then pooled over time in several ways side by side, normed, and a linear map.

    z = norm(block(project(sum_l softmax(w)_l norm_l(x_l))));  logits = linear(norm([q_1 .. q_Q, max z, mean z])),
    where q_i is the mean of z weighted by softmax(query_i z / sqrt(d)) over time.

    features (B, L, T, D) -> logits (B, C).
    """

    reads = "features"
    width_multiple = POOL_ATTENTION_HEADS
    default_width = POOL_WIDTH
    queries: ClassVar[int] = POOL_QUERIES
    maximum: ClassVar[bool] = True  # whether it pools by the maximum too

    def __init__(self, *, layers: int, dim: int, classes: int, width: int | None = None, block: bool = True):
        super().__init__()
        d = width or POOL_WIDTH
        self.norm_weight = nn.Parameter(torch.ones(layers, dim))
        self.norm_bias = nn.Parameter(torch.zeros(layers, dim))
        self.layer_weight = nn.Parameter(torch.zeros(layers))
        self.project = nn.Linear(dim, d)
        self.block = Block(d, POOL_ATTENTION_HEADS) if block else nn.Identity()
        self.frame_norm = nn.LayerNorm(d)
        self.query = nn.Parameter(torch.randn(self.queries, d))
        self.mlp_layer = NormedLinear((self.queries + self.maximum + 1) * d, classes)

    def logits(self, features_BLTD: Tensor) -> Tensor:
        z_BTd = self._frames(features_BLTD)
        pooled = [(self._attention(z_BTd) @ z_BTd).flatten(1)]
        pooled += [z_BTd.amax(dim=1)] if self.maximum else []
        return self.mlp_layer(torch.cat([*pooled, z_BTd.mean(dim=1)], dim=1))

    def layer_shares(self) -> Tensor:
        return self.layer_weight.softmax(dim=0)

    def frame_attention(self, features_BLTD: Tensor) -> Tensor:
        """(B, T): the share of its queries' attention that each frame has, 1 in all, as a mean over queries."""
        return self._attention(self._frames(self.standardised(features_BLTD))).mean(dim=1)

    def _frames(self, features_BLTD: Tensor) -> Tensor:
        """z (B, T, d)."""
        normed_BLTD = F.layer_norm(features_BLTD, features_BLTD.shape[-1:])
        share_L = self.layer_shares()
        weight_LD, bias_LD = share_L[:, None] * self.norm_weight, share_L[:, None] * self.norm_bias
        mixed_BTD = (normed_BLTD * weight_LD[:, None]).sum(dim=1) + bias_LD.sum(dim=0)
        return self.frame_norm(self.block(self.project(mixed_BTD)))

    def _attention(self, z_BTd: Tensor) -> Tensor:
        """(B, Q, T): how much each query attends to each frame."""
        return (self.query @ z_BTd.transpose(1, 2) / z_BTd.shape[2] ** 0.5).softmax(dim=2)


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

    def logits(self, features_BLTD: Tensor) -> Tensor:
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
    "last-mlp": LastMLP, "wa-mlp": WAMLP, "last-tr": LastTr, "wa-tr": WATr, "tl-tr": TLTr, "wa-pool": WAPool,
    "concat-linear": ConcatLinear, "concat-linear-stats": ConcatLinearStats,
}  # fmt: skip


def head_form(head: str, width: int | None = None, block: bool = True) -> type[Head]:
    """The class of the head of this name. Raises UsageError for an unknown one, or one that cannot have this form."""
    if head not in FORMS:
        raise UsageError(f"head {head!r} is not known; choose from {', '.join(FORMS)}")
    form = FORMS[head]
    multiple = form.width_multiple
    if width is not None and multiple is None:
        others = ", ".join(name for name, other in FORMS.items() if other.width_multiple)
        raise UsageError(f"{head} has no projection, so it takes no width (--dim, {width} was given); {others} do")
    if width is not None and multiple is not None and (width < 1 or width % multiple):
        raise UsageError(f"{head} cannot project to {width} channels; choose a multiple of {multiple}")
    if not block and head != "wa-pool":
        raise UsageError(f"--no-block is for wa-pool, whose block can be left out; {head} has none to leave out")
    return form


def head_width(head: str, width: int | None) -> int | None:
    """Channels inside a head where they are not the encoder's: the width that was asked for, or the head's own."""
    return width or head_form(head).default_width


def head_name(head: str, width: int | None, block: bool = True) -> str:
    """What a head is called in tables and files: its form, with its width and without its block."""
    return head + (f"-{width}" if width else "") + ("" if block else "-no-block")


def build_head(
    head: str, *, layers: int, dim: int, classes: int, width: int | None = None, block: bool = True,
    standardised: bool = False,
) -> Head:  # fmt: skip
    """A new head with random weights: features (B, layers, T, dim) float32 -> logits (B, classes).

    `width` is the number of channels that tl-tr, wa-tr and wa-pool project to; None is no projection, of wa-pool 128.
    Without `block`, wa-pool has no block over time. A `standardised` head has room for the statistics, which are 0 and
    1 at first. Raises UsageError.
    """
    form = head_form(head, width, block)
    if min(layers, dim, classes) < 1:
        raise UsageError(f"a head needs layers, channels and classes; found {layers}, {dim} and {classes}")
    options = ({"width": width} if width else {}) | ({} if block else {"block": False})
    options |= {"layers": layers, "dim": dim, "classes": classes}
    module = form(**options)
    if standardised and not form.solved:
        shape = (1 if form.last_layer else layers, dim)
        module.standardise(torch.zeros(shape), torch.ones(shape))
    return module
