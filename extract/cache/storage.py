"""From float32 features to what the cache stores of them, on the device that has them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

INT8_MAX = 127


class Stored(NamedTuple):
    """One batch in storage types, on the device that encoded it or on the host."""

    features: Tensor  # (B, L, T, D) float16, float32 or int8
    mean: Tensor  # (B, L, D) float16 or float32
    finite: Tensor  # (B, L) bool: whether all that a clip's layer stores is finite
    scale: Tensor | None = None  # (B, L, D) float16, with int8 features
    redone: Tensor | None = None  # (B,) bool, on the host: clips encoded again in float32; None if no clip was

    def map(self, function: Callable[[Tensor], Tensor]) -> Stored:
        scale, redone = (None if tensor is None else function(tensor) for tensor in (self.scale, self.redone))
        return Stored(function(self.features), function(self.mean), function(self.finite), scale, redone)

    def rows(self, rows: slice) -> Stored:
        """Views of some clips."""
        return self.map(lambda tensor: tensor[rows])

    def copy_(self, other: Stored, *, non_blocking: bool = False) -> Stored:
        """Copy another batch of as many clips into this one, all but `redone`.

        Features of two batches with the same gaps between their layers are copied in one piece, gaps included.
        """
        for ours, theirs in zip(self[:4], other[:4], strict=True):
            if ours is not None and theirs is not None:
                if ours.stride() == theirs.stride():
                    ours, theirs = _with_gaps(ours), _with_gaps(theirs)  # noqa: PLW2901
                ours.copy_(theirs, non_blocking=non_blocking)
        return self

    def on(self, device: torch.device) -> Stored:
        """Room for as many clips on another device, laid out alike: with the same gaps between layers."""
        return self.map(lambda tensor: _room_like(tensor, device))


def _with_gaps(tensor: Tensor) -> Tensor:
    """(B, L, ...) with a gap after each layer, as (B, L, values and gap); other tensors as they are."""
    if tensor.is_contiguous() or not tensor.numel():
        return tensor
    layers, stride = tensor.shape[1], tensor.stride(1)
    return tensor.as_strided((len(tensor), layers, stride), (layers * stride, stride, 1))


def _room_like(tensor: Tensor, device: torch.device) -> Tensor:
    whole = torch.empty(_with_gaps(tensor).shape, dtype=tensor.dtype, device=device)
    return whole if tensor.is_contiguous() else whole.as_strided(tensor.shape, tensor.stride())


def to_storage(features_BLTD: Tensor, dtype: str, out: Stored | None = None) -> Stored:
    """Cast or quantise a batch of float32 features, and find what storage type cannot hold.

    int8 has a scale per clip, layer and channel: stored = round(feature / scale), scale = largest magnitude / 127.
    With `out`, tensors on the same device, results are written there and nothing else is allocated for them.
    """
    into = out or Stored(None, None, None)  # type: ignore[arg-type]
    mean = features_BLTD.mean(dim=2)
    scale = None
    if dtype == "int8":
        scale = _cast(features_BLTD.abs().amax(dim=2) / INT8_MAX, torch.float16, into.scale)
        divisor = scale.to(torch.float32).unsqueeze(2)  # as it is stored, also where that is subnormal
        divisor.masked_fill_(divisor == 0, 1)
        whole = (features_BLTD / divisor).round_().clamp_(-INT8_MAX, INT8_MAX)
        stored = _cast(whole, torch.int8, into.features)
    else:
        stored = _cast(features_BLTD, getattr(torch, dtype), into.features)
    mean = _cast(mean, torch.float32 if dtype == "float32" else torch.float16, into.mean)
    checked = scale if scale is not None else stored
    finite = checked.isfinite().flatten(2).all(dim=2) & mean.isfinite().all(dim=2)
    return Stored(stored, mean, _cast(finite, torch.bool, into.finite), scale)


def _cast(values: Tensor, dtype: torch.dtype, out: Tensor | None) -> Tensor:
    """`values` as `dtype`, in `out` if there is one."""
    return values.to(dtype) if out is None else out.copy_(values)
