"""From the encoder's float32 output to what the cache stores, on the device."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from whisper_at_cli.extract.backbones.custom import checked_features
from whisper_at_cli.extract.backbones.load import Backbone
from whisper_at_cli.extract.errors import WhisperATError

INT8_MAX = 127
SMALLEST_SCALE = 2.0**-24  # above 0 that float16 holds


class Stored(NamedTuple):
    """One batch in storage types, on the device that encoded it."""

    features: Tensor  # (B, L, T, D) float16, float32 or int8
    mean: Tensor  # (B, L, D) float16 or float32
    finite: Tensor  # (B, L) bool: whether all that a clip's layer stores is finite
    scale: Tensor | None  # (B, L, D) float16, with int8 features

    def map(self, function: Callable[[Tensor], Tensor]) -> Stored:
        return Stored(*(None if tensor is None else function(tensor) for tensor in self))


@torch.inference_mode()
def encode_to_host(backbone: Backbone, waveforms: Tensor, dtype: str) -> Stored:
    """Encode a batch, waveforms (B, samples) float32, and bring what is stored of it to the host.

    On CUDA each thread works in a stream of its own, so that one batch is copied while another is computed. A batch
    that does not fit in the device's memory is encoded in two halves; raises WhisperATError if those do not fit either.
    """
    try:
        return _encode_to_host(backbone, waveforms, dtype)
    except torch.OutOfMemoryError:
        if backbone.device.type == "cuda":
            torch.cuda.empty_cache()
    try:
        halves = [_encode_to_host(backbone, half, dtype) for half in waveforms.tensor_split(min(2, len(waveforms)))]
    except torch.OutOfMemoryError as error:
        raise WhisperATError(
            f"half a batch of {len(waveforms)} clips does not fit in the memory of {backbone.device}; "
            f"give --batch-size {max(1, len(waveforms) // 4)} or free some memory, and run the same command again"
        ) from error
    parts = zip(*halves, strict=True)
    return Stored(*(None if part[0] is None else torch.cat(part) for part in parts))


def _encode_to_host(backbone: Backbone, waveforms: Tensor, dtype: str) -> Stored:
    if backbone.device.type != "cuda":
        return to_storage(_features(backbone, waveforms), dtype).map(Tensor.cpu)
    with torch.cuda.stream(_stream(backbone.device)):
        stored = to_storage(_features(backbone, waveforms.pin_memory()), dtype)
        on_host = stored.map(lambda tensor: torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, True))
        torch.cuda.current_stream().synchronize()
        return on_host


def _features(backbone: Backbone, waveforms: Tensor) -> Tensor:
    return checked_features(backbone, backbone.encode(waveforms), len(waveforms))


_streams = threading.local()


def _stream(device: torch.device) -> torch.cuda.Stream:
    """This thread's own stream on a device."""
    if not hasattr(_streams, "stream") or _streams.stream.device != device:
        _streams.stream = torch.cuda.Stream(device)
    return _streams.stream


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
        divisor = scale.to(torch.float32).clamp_(min=SMALLEST_SCALE).unsqueeze(2)  # not 0; else the scale itself
        stored = (features_BLTD / divisor).round_().clamp_(-INT8_MAX, INT8_MAX).to(torch.int8)
        mean = mean.to(torch.float16)
    checked = scale if scale is not None else stored
    finite = checked.isfinite().flatten(2).all(dim=2) & mean.isfinite().all(dim=2)
    return Stored(stored, mean, finite, scale)
