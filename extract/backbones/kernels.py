"""Whisper's blocks on CUDA in float16 or bfloat16: what lies between their products in two Triton kernels.

Measured on an H200 with large-v1, 128 clips of 10 s together, bfloat16: 792 clips/s with GELU in the product before it
and 735 without, where plain operations reach 648 and torch.compile 688; the products alone would reach 975. Importing
this needs Triton, which torch for CUDA brings along; `problem` says whether the kernels can be compiled here and agree
with plain operations.

B clips, P positions, T pooled frames (25), D channels, L layers; R = B * P rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn

from whisper_at_cli.extract.backbones.routines import PlainLinear, attention, draw, is_close
from whisper_at_cli.extract.cache.schema import FRAMES

if TYPE_CHECKING:
    from whisper_at_cli.extract.backbones.encoder import EncoderBlock

CHANNELS_A_WARP = 256
MOST_WARPS = 8


@triton.jit
def _norm_row(
    x: tl.tensor, inside: tl.tensor, weight: tl.tensor, bias: tl.tensor, eps: tl.tensor, D: tl.constexpr
) -> tl.tensor:
    """Layer norm of one row, (BLOCK,) float32, of whose numbers the first D count."""
    centred = tl.where(inside, x - tl.sum(x, 0) / D, 0.0)
    return centred * tl.rsqrt(tl.sum(centred * centred, 0) / D + eps) * weight + bias


@triton.jit
def _add_norm_kernel(
    x_ptr: tl.tensor,
    added_ptr: tl.tensor,
    y_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    eps: tl.tensor,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
) -> None:
    """One row a program. Rows count in 64 bits, so that no batch is too large for an offset."""
    row, channel = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside, at = channel < D, row * D + channel
    x = tl.load(x_ptr + at, mask=inside, other=0.0)
    if ADD:
        x += tl.load(added_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(x_ptr + at, x, mask=inside)
    weight = tl.load(weight_ptr + channel, mask=inside, other=0.0)
    bias = tl.load(bias_ptr + channel, mask=inside, other=0.0)
    y = _norm_row(x, inside, weight, bias, eps, D)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _add_pool_norm_kernel(
    x_ptr: tl.tensor,
    added_ptr: tl.tensor,
    y_ptr: tl.tensor,
    pooled_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    eps: tl.tensor,
    frames: tl.tensor,
    rows_a_frame: tl.tensor,
    clip_stride: tl.tensor,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    NORM: tl.constexpr,
) -> None:
    """One frame of one clip a program: its rows one after the other, their sum in float32."""
    frame, channel = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = channel < D
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    weight = tl.load(weight_ptr + channel, mask=inside, other=0.0)
    bias = tl.load(bias_ptr + channel, mask=inside, other=0.0)
    for number in range(rows_a_frame):
        at = (frame * rows_a_frame + number) * D + channel
        x = tl.load(x_ptr + at, mask=inside, other=0.0) + tl.load(added_ptr + at, mask=inside, other=0.0).to(tl.float32)
        total += x
        if NORM:
            tl.store(x_ptr + at, x, mask=inside)
            y = _norm_row(x, inside, weight, bias, eps, D)
            tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)
    clip, frame_of_clip = frame // frames, frame % frames
    tl.store(pooled_ptr + clip * clip_stride + frame_of_clip * D + channel, total / rows_a_frame, mask=inside)


def add_norm(x_RD: Tensor, added_RD: Tensor | None, norm: nn.LayerNorm, y_RD: Tensor) -> None:
    """x += added, where there is something to add, and y = norm(x) in y's type; x in float32, all contiguous."""
    rows, D = x_RD.shape
    with _on(x_RD.device):
        _add_norm_kernel[(rows,)](
            x_RD, x_RD if added_RD is None else added_RD, y_RD, norm.weight, norm.bias, norm.eps,
            D=D, ADD=added_RD is not None, **_launch(D),
        )  # fmt: skip


def add_pool_norm(x_RD: Tensor, added_RD: Tensor, norm: nn.LayerNorm | None, pooled_BTD: Tensor, y_RD: Tensor) -> None:
    """x += added, pooled = the mean of each frame's rows of x, and y = norm(x). Without `norm`, x and y are left as
    they are. pooled may be a view with any stride from clip to clip."""
    rows, D = x_RD.shape
    B, T, _ = pooled_BTD.shape
    assert rows % (B * T) == 0 and pooled_BTD.stride()[1:] == (D, 1)
    scaled_by = (norm.weight, norm.bias, norm.eps) if norm else (x_RD, x_RD, 0.0)  # loaded and not used without
    with _on(x_RD.device):
        _add_pool_norm_kernel[(B * T,)](
            x_RD, added_RD, y_RD, pooled_BTD, *scaled_by, T, rows // (B * T), pooled_BTD.stride(0),
            D=D, NORM=norm is not None, **_launch(D),
        )  # fmt: skip


def expand(linear: PlainLinear, y_RD: Tensor) -> Tensor:
    """GELU(linear(y)). In bfloat16 by cuBLAS in one pass, which has GELU's tanh form alone.

    bfloat16 rounds away how the two forms differ. float16 does not: with real weights (tiny.en, ESC-10) the tanh form
    takes the error of the last layer's mean from 2.9e-4 to 1.7e-3. So GELU is exact there, in a pass of its own.
    """
    if y_RD.dtype != torch.bfloat16:
        return linear(y_RD, gelu=True)
    return torch._addmm_activation(linear.bias, y_RD, linear.weight.t(), use_gelu=True)


def run_blocks(blocks: Sequence[EncoderBlock], x_BPD: Tensor) -> Tensor:
    """Every block's output, pooled: (B, P, D) float32, which is overwritten, -> (B, L, T, D) float32. T divides P."""
    B, P, D = x_BPD.shape
    x_RD = x_BPD.view(B * P, D)
    y_RD = x_RD.new_empty(B * P, D, dtype=blocks[0].qkv.weight.dtype)
    pooled = x_RD.new_empty(B, len(blocks), FRAMES, D)
    add_norm(x_RD, None, blocks[0].attention_norm, y_RD)
    for layer, block in enumerate(blocks):
        qkv = block.qkv(y_RD).view(B, P, 3, block.heads, D // block.heads)
        mixed = attention(*qkv.permute(2, 0, 3, 1, 4)).transpose(1, 2).reshape(B * P, D)
        add_norm(x_RD, block.out(mixed), block.mlp_norm, y_RD)
        following = blocks[layer + 1].attention_norm if layer + 1 < len(blocks) else None
        add_pool_norm(x_RD, block.contract(expand(block.expand, y_RD)), following, pooled[:, layer], y_RD)
    return pooled


@cache
def problem(dim: int, dtype: torch.dtype, device: torch.device) -> str:
    """Why the kernels cannot be used here; nothing if they compile, and agree with plain operations on rows of `dim`
    channels."""
    try:
        return "" if _agree(dim, dtype, device) else "their results differ from those of plain operations"
    except Exception as error:  # noqa: BLE001 - no compiler, no driver, a Triton of another version
        reason = " ".join(str(error).split()) or type(error).__name__
        return f"they cannot be compiled: {reason[:160]}"


def is_right(dim: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernels can be used here, without `problem`."""
    return not problem(dim, dtype, device)


@torch.inference_mode()
def _agree(dim: int, dtype: torch.dtype, device: torch.device) -> bool:
    clips, rows = 2, 4 * FRAMES  # two rows a frame
    x, added = draw(rows, dim, seed=0), draw(rows, dim, seed=1).to(dtype)
    norm = nn.LayerNorm(dim)
    norm.weight, norm.bias = (nn.Parameter(draw(dim, seed=seed) + 1) for seed in (2, 3))
    total = x + added.float()
    normed, pooled = norm(total), total.view(clips * FRAMES, -1, dim).mean(dim=1)
    norm, added = norm.to(device), added.to(device)
    for frames in (None, torch.full((clips, 2, FRAMES, dim), torch.nan, device=device)):
        x_RD, y_RD = x.to(device, copy=True), torch.full((rows, dim), torch.nan, device=device, dtype=dtype)
        if frames is None:
            add_norm(x_RD, added, norm, y_RD)
        else:
            add_pool_norm(x_RD, added, norm, frames[:, 1], y_RD)
            if not is_close(frames[:, 1].flatten(0, 1), pooled, torch.float32):
                return False
        if not (is_close(x_RD, total, torch.float32) and is_close(y_RD, normed, dtype)):
            return False
    linear = PlainLinear(dim, 4 * dim)
    linear.weight = nn.Parameter(draw(4 * dim, dim, seed=4).mul_(dim**-0.5).to(dtype))
    linear.bias = nn.Parameter(draw(4 * dim, seed=5).to(dtype))
    given = normed.to(dtype)
    product = F.linear(given.float(), linear.weight.float(), linear.bias.float())
    found = expand(linear.to(device), given.to(device))
    return any(is_close(found, F.gelu(product, approximate=form), dtype) for form in ("none", "tanh"))


def _launch(D: int) -> dict[str, int]:
    block = triton.next_power_of_2(D)
    return {"BLOCK": block, "num_warps": max(1, min(MOST_WARPS, block // CHANNELS_A_WARP))}


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, wherever its arguments lie."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
