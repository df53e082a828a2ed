"""What the encoder computes in: `auto`, and what float32 means on a GPU."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch

from whisper_at_cli.extract import notes
from whisper_at_cli.extract.backbones.encoder import PRECISIONS
from whisper_at_cli.extract.backbones.routines import agrees, draw
from whisper_at_cli.extract.errors import UsageError

if TYPE_CHECKING:
    from whisper_at_cli.extract.backbones.load import Backbone

AUTO = "auto"
TENSOR_CORES = (7, 0)  # compute capability from which on float16 is the faster one


def resolved(precision: str, device: torch.device) -> str:
    """The precision that is meant on a device; `auto` is the fastest one that keeps the features to about 1e-3.

    That is float16 on CUDA (bfloat16 where float16 does not come out right there) and float32 elsewhere. Raises
    UsageError for a precision that does not exist.
    """
    if precision == AUTO:
        return _best(device) if device.type == "cuda" else "float32"
    if precision not in PRECISIONS:
        raise UsageError(f"precision {precision!r} is not known; choose from {', '.join(PRECISIONS)} or {AUTO}")
    return precision


@cache
def _best(device: torch.device) -> str:
    if torch.cuda.get_device_capability(device) < TENSOR_CORES:
        return "float32"
    return next((name for name in ("float16", "bfloat16") if product_is_right(PRECISIONS[name], device)), "float32")


@torch.inference_mode()
def product_is_right(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a matrix product in `dtype` on a device is what a CPU computes in float32."""
    x, weight = draw(256, 1024, seed=0).to(dtype), draw(512, 1024, seed=1).to(dtype)
    expected = x.float() @ weight.float().t()
    return agrees(lambda: x.to(device) @ weight.to(device).t(), expected, dtype)


def use_true_float32(device: torch.device) -> None:
    """Products and convolutions in float32 on CUDA without TF32, which rounds their inputs to ten bits."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False


def cost_note(backbone: Backbone) -> str | None:
    """For the user, where something makes a GPU slower than it could be."""
    if backbone.device.type != "cuda":
        return None
    if backbone.precision == "float32":
        return notes.FLOAT32_SLOW()
    reason = getattr(getattr(backbone, "encoder", None), "not_fused", "")
    return notes.KERNELS_UNUSED(reason=reason) if reason else None
