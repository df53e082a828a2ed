"""From float32 features to what the cache stores of them, on the device that has them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

INT8_MAX = 127


class Stored(NamedTuple):
    """One batch in storage types, on the device that encoded it."""

    features: Tensor  # (B, L, T, D) float16, float32 or int8
    mean: Tensor  # (B, L, D) float16 or float32
    finite: Tensor  # (B, L) bool: whether all that a clip's layer stores is finite
    scale: Tensor | None  # (B, L, D) float16, with int8 features

    def map(self, function: Callable[[Tensor], Tensor]) -> Stored:
        scale = None if self.scale is None else function(self.scale)
        return Stored(function(self.features), function(self.mean), function(self.finite), scale)


def to_storage(features_BLTD: Tensor, dtype: str) -> Stored:
    """Cast or quantise a batch of float32 features, and find what storage type cannot hold.

    int8 has a scale per clip, layer and channel: stored = round(feature / scale), scale = largest magnitude / 127.
    """
    mean = features_BLTD.mean(dim=2)
    if dtype == "float32":
        stored, scale = features_BLTD, None
    elif dtype == "float16":
        stored, scale, mean = features_BLTD.to(torch.float16), None, mean.to(torch.float16)
    else:
        scale = (features_BLTD.abs().amax(dim=2) / INT8_MAX).to(torch.float16)
        divisor = scale.to(torch.float32).unsqueeze(2)  # as it is stored, also where that is subnormal
        divisor.masked_fill_(divisor == 0, 1)
        stored = (features_BLTD / divisor).round_().clamp_(-INT8_MAX, INT8_MAX).to(torch.int8)
        mean = mean.to(torch.float16)
    checked = scale if scale is not None else stored
    finite = checked.isfinite().flatten(2).all(dim=2) & mean.isfinite().all(dim=2)
    return Stored(stored, mean, finite, scale)
