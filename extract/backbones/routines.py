"""Fast routines for the encoder, each compared once with the plain one in float32 before it is used.

A routine that runs is not always right: oneDNN's AMX kernel for a grouped convolution in bfloat16 was found wrong by
110 %. So every routine here has an `is_right` for a type and a shape, which runs it on random numbers. The verdict is
kept for the process; where it is no, the plain routine is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Largest relative error of any row or column: two roundings of the type. Wrong routines are off by several per cent.
ALLOWED_ERROR = {torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}
LONGEST_UNFUSED = 512  # positions; above it the scores of all heads are too large to keep
PERIOD = 10007  # a prime: no two rows of a matrix are alike
COMPARED_EVERY = 7  # rows; shares no factor with a kernel's tile sizes, so that every row of a tile is looked at


def agrees(routine: Callable[[], Tensor], expected: Tensor, dtype: torch.dtype) -> bool:
    """Whether a routine runs and gives `expected`, float32 (rows, columns), as far as `dtype` can round."""
    try:
        return is_close(routine(), expected, dtype)
    except (AttributeError, RuntimeError, NotImplementedError):
        return False


def is_close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Whether every row and every column of a result is `expected`, float32, as far as `dtype` can round."""
    if found.shape != expected.shape:
        return False
    wrong = found.to(expected.device, torch.float32) - expected
    errors = [wrong.norm(dim=dim) / expected.norm(dim=dim) for dim in (0, 1)]
    return all(bool((error <= ALLOWED_ERROR[dtype]).all()) for error in errors)  # NaN is not


def draw(*shape: int, seed: int) -> Tensor:
    """Numbers between -1 and 1, float32, that repeat after a prime number of them: drawing millions would take longer
    than the comparison. The same for the same seed; torch's own generator is left alone."""
    numbers = torch.rand(PERIOD, generator=torch.Generator().manual_seed(seed)).mul_(2).sub_(1)
    count = math.prod(shape)
    return numbers.repeat(-(-count // PERIOD))[:count].view(shape)


class PackedLinear(nn.Module):
    """A linear layer, optionally with GELU, by oneDNN with its weights laid out for it in advance. CPU, inference only.

    Measured on an AMD EPYC (Zen 5) in float32: 240 GFLOP/s a core, where the MKL that torch calls by itself reaches 75
    to 105; GELU costs no pass of its own. See benchmarks/README.md.
    """

    ROWS = 1000  # what the layout is chosen for; any other number of rows works too

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), self.ROWS)
        self.bias = linear.bias.detach()

    def forward(self, x: Tensor, *, gelu: bool = False) -> Tensor:
        post, algorithm = ("gelu", "none") if gelu else ("none", "")
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, post, [], algorithm)

    @classmethod
    def is_right(cls, inputs: int, outputs: int, dtype: torch.dtype, *, gelu: bool = False) -> bool:
        """Whether this build of torch and this processor have it, and compute a layer of this shape correctly."""
        return dtype in (torch.float32, torch.bfloat16) and _packed_is_right(inputs, outputs, dtype, gelu)


@cache
@torch.inference_mode()
def _packed_is_right(inputs: int, outputs: int, dtype: torch.dtype, gelu: bool) -> bool:
    x, linear = draw(PackedLinear.ROWS, inputs, seed=0).to(dtype), nn.Linear(1, 1)
    linear.weight = nn.Parameter(draw(outputs, inputs, seed=1).mul_(inputs**-0.5).to(dtype))
    linear.bias = nn.Parameter(draw(outputs, seed=2).to(dtype))
    expected = F.linear(x[::COMPARED_EVERY].float(), linear.weight.float(), linear.bias.float())
    expected = F.gelu(expected) if gelu else expected
    return agrees(lambda: PackedLinear(linear)(x, gelu=gelu)[::COMPARED_EVERY], expected, dtype)


class PlainLinear(nn.Linear):
    """A linear layer, optionally with GELU."""

    def forward(self, x: Tensor, *, gelu: bool = False) -> Tensor:
        y = super().forward(x)
        return F.gelu(y) if gelu else y


def set_precision(module: nn.Module, layers: dict[str, bool], dtype: torch.dtype, device: torch.device) -> None:
    """Cast linear layers of a module, given as name -> whether GELU follows; on a CPU lay out their weights for oneDNN
    where that is right."""
    for name, gelu in layers.items():
        linear = getattr(module, name).to(dtype)
        pack = device.type == "cpu" and PackedLinear.is_right(linear.in_features, linear.out_features, dtype, gelu=gelu)
        setattr(module, name, PackedLinear(linear) if pack else linear)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention, (B, H, P, E) each -> (B, H, P, E).

    On a CPU in bfloat16 by products of its own, where they are right: torch's fused kernel took twice the time there
    (6.9 against 3.1 ms for 4 clips of 250 positions and 8 heads on one Zen 5 core).
    """
    B, H, P, E = q.shape
    if q.device.type != "cpu" or q.dtype != torch.bfloat16 or P > LONGEST_UNFUSED or not _products_are_right(H, P, E):
        return F.scaled_dot_product_attention(q, k, v)
    return attention_by_products(q, k, v)


def attention_by_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`attention` in bfloat16, two batched products a clip with a float32 softmax between them."""
    B, H, P, E = q.shape
    q, k, v = (part.reshape(B, H, P, E) for part in (q, k, v))
    mixed, scores, weights = torch.empty_like(q), q.new_empty(H, P, P), torch.empty(H, P, P)
    for clip in range(B):  # the scores of one clip stay in the processor's cache; those of a batch would not
        torch.baddbmm(scores, q[clip], k[clip].transpose(1, 2), beta=0, alpha=E**-0.5, out=scores)
        torch.softmax(weights.copy_(scores), dim=-1, out=weights)
        torch.bmm(scores.copy_(weights), v[clip], out=mixed[clip])
    return mixed


@cache
@torch.inference_mode()
def _products_are_right(H: int, P: int, E: int) -> bool:
    q, k, v = (draw(1, H, P, E, seed=seed).to(torch.bfloat16) for seed in range(3))
    expected = F.scaled_dot_product_attention(q.float(), k.float(), v.float()).flatten(0, 2)
    return agrees(lambda: attention_by_products(q, k, v).flatten(0, 2), expected, torch.bfloat16)


def has_instructions(dtype: torch.dtype) -> bool:
    """Whether this processor computes convolutions in bfloat16 or float16 by itself. Emulating them is slow: the second
    convolution of wav2vec 2.0 took 37 s in bfloat16 where it takes 0.56 s in float32 (one Zen core without them)."""
    name = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}[dtype]
    try:
        return bool(getattr(torch.ops.mkldnn, name)())
    except (AttributeError, RuntimeError):  # a build without oneDNN
        return False


def conv_is_right(conv: nn.Conv1d, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a convolution of this shape comes out right in `dtype` on a device."""
    shape = (conv.in_channels, conv.out_channels, conv.kernel_size[0], conv.stride[0], conv.groups)
    return _conv_is_right(*shape, dtype, device)


@cache
@torch.inference_mode()
def _conv_is_right(
    inputs: int, outputs: int, kernel: int, stride: int, groups: int, dtype: torch.dtype, device: torch.device
) -> bool:
    x = draw(inputs, kernel + 63 * stride, seed=0).to(dtype)
    weight = draw(outputs, inputs // groups, kernel, seed=1).to(dtype)
    expected = F.conv1d(x.float(), weight.float(), stride=stride, groups=groups)
    return agrees(lambda: F.conv1d(x.to(device), weight.to(device), stride=stride, groups=groups), expected, dtype)
