"""A batch through the encoder, on its device, into what the cache stores, on the host."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from whisper_at_cli.extract.backbones.custom import checked_features
from whisper_at_cli.extract.backbones.load import Backbone
from whisper_at_cli.extract.backbones.mel import as_float32
from whisper_at_cli.extract.cache.storage import Stored, to_storage
from whisper_at_cli.extract.devices import FITTING, with_index


@torch.inference_mode()
def encode_to_host(backbone: Backbone, waveforms: Tensor, dtype: str, out: Stored | None = None) -> Stored:
    """Encode a batch and bring what is stored of it, in the storage type `dtype`, to the host.

    waveforms is (B, samples) on the host, pinned or not: int16, or float32 in [-1, 1]. With `out`, tensors on the host
    for exactly B clips, results are written there, and what is returned are its tensors (pinned memory is faster on
    CUDA); without, tensors are new.

    A clip whose features are not finite is encoded again by itself in float32, if the backbone computes in less and has
    `in_float32`; `redone` of the result says which those were. `finite` says what is still not finite then.

    On CUDA each thread works in a stream of its own, so that one batch is copied while another is computed. A batch
    that does not fit in the device's memory is encoded in halves, as are later ones at once: `FITTING.note` has a line
    on it for the user. Raises WhisperATError if one clip does not fit.
    """
    samples, done, parts = waveforms.shape[1], 0, []
    while done < len(waveforms):
        clips = min(len(waveforms) - done, FITTING.most(backbone, samples) or len(waveforms))
        rows = slice(done, done + clips)
        try:
            parts.append(_encode_to_host(backbone, waveforms[rows], dtype, out.rows(rows) if out else None))
        except torch.OutOfMemoryError:
            if backbone.device.type == "cuda":
                torch.cuda.empty_cache()
            FITTING.failed(backbone, samples, clips)
        else:
            done += clips
    return parts[0] if len(parts) == 1 else _joined(parts, out)


def _joined(parts: list[Stored], out: Stored | None) -> Stored:
    marks = [
        torch.zeros(len(part.features), dtype=torch.bool) if part.redone is None else part.redone for part in parts
    ]
    redone = torch.cat(marks) if any(mark.any() for mark in marks) else None
    if out is None:
        features, mean, finite = (torch.cat(tensors) for tensors in zip(*(part[:3] for part in parts), strict=True))
        scales = [part.scale for part in parts if part.scale is not None]
        out = Stored(features, mean, finite, torch.cat(scales) if scales else None)
    return out._replace(redone=redone)


def _encode_to_host(backbone: Backbone, waveforms: Tensor, dtype: str, out: Stored | None) -> Stored:
    if backbone.device.type != "cuda":
        features = _features(backbone, waveforms)
        if backbone.device.type == "cpu":
            stored = to_storage(features, dtype, out)
        else:
            on_device = to_storage(features, dtype)
            stored = on_device.map(Tensor.cpu) if out is None else out.copy_(on_device)
        return _redo(backbone, waveforms, features, stored, dtype)
    with torch.cuda.stream(_stream(backbone.device)):
        features = _features(backbone, waveforms)
        on_device = to_storage(features, dtype, out and out.on(backbone.device))
        stored = on_device.map(_pinned_like) if out is None else out
        stored.copy_(on_device, non_blocking=True)
        torch.cuda.current_stream().synchronize()
        return _redo(backbone, waveforms, features, stored, dtype)


def _features(backbone: Backbone, waveforms: Tensor) -> Tensor:
    """(B, L, T, D) float32 on the device. Only backbones that say so are given int16."""
    if waveforms.dtype == torch.int16 and not getattr(backbone, "takes_int16", False):
        waveforms = as_float32(waveforms, waveforms.device)
    if backbone.device.type == "cuda":
        waveforms = waveforms.pin_memory()  # as it is, if it is pinned
    return checked_features(backbone, backbone.encode(waveforms), len(waveforms))


def _pinned_like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="cpu", pin_memory=True)


def _redo(backbone: Backbone, waveforms: Tensor, features: Tensor, stored: Stored, dtype: str) -> Stored:
    """Encode in float32 what came out as NaN or infinity in less; where only storage overflows, it would not help."""
    if backbone.precision == "float32" or bool(stored.finite.all()) or not hasattr(backbone, "in_float32"):
        return stored
    suspects = (~stored.finite.all(dim=1)).nonzero().flatten().tolist()
    clips = [clip for clip in suspects if not features[clip].isfinite().all()]
    with torch.inference_mode(False):  # its weights are for whoever asks for it next, too
        twin = backbone.in_float32() if clips else None
    if twin is None:
        return stored
    redone = torch.zeros(len(waveforms), dtype=torch.bool)
    for clip in clips:
        row = slice(clip, clip + 1)
        stored.rows(row).copy_(to_storage(_features(twin, waveforms[row]), dtype))
        redone[clip] = True
    return stored._replace(redone=redone)


_thread = threading.local()


def _stream(device: torch.device) -> torch.cuda.Stream:
    """This thread's own stream on a device, the same each time."""
    device, streams = with_index(device), _thread.__dict__.setdefault("streams", {})
    if device not in streams:
        streams[device] = torch.cuda.Stream(device)
    return streams[device]
