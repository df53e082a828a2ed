"""A batch through the encoder, on its device, into what the cache stores, on the host."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from whisper_at_cli.extract.backbones.custom import checked_features
from whisper_at_cli.extract.backbones.load import Backbone
from whisper_at_cli.extract.cache.storage import Stored, to_storage
from whisper_at_cli.extract.errors import WhisperATError


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
