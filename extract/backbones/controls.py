"""Backbones that know nothing of sounds, for comparison: an encoder with random weights, and the log-mel spectrogram.

    random:tiny.en    Whisper's encoder of that size as it is before training; random:tiny.en:3 with another seed than 0
    log-mel           mean, standard deviation and maximum of each mel band in each of the 25 frames, as one layer

What a probe finds in these is due to the shape of the network, or to the spectrogram, and not to what Whisper learned.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from whisper_at_cli.extract.audio import SAMPLE_RATE
from whisper_at_cli.extract.backbones.encoder import clip_samples
from whisper_at_cli.extract.backbones.mel import as_float32, log_mel
from whisper_at_cli.extract.backbones.sizes import MAX_POSITIONS, WHISPER_SIZES
from whisper_at_cli.extract.backbones.weights import WhisperWeights
from whisper_at_cli.extract.cache.schema import FRAMES
from whisper_at_cli.extract.devices import random_numbers, with_index
from whisper_at_cli.extract.errors import UsageError

RANDOM = "random:"
LOG_MEL = "log-mel"
MELS = 80


def is_control(model: str) -> bool:
    """Whether --model stands for one of these. Raises UsageError for random weights of no known size, or a bad seed."""
    if model.startswith(RANDOM):
        _size_and_seed(model)
        return True
    return model == LOG_MEL


def with_seed(model: str, seed: int) -> str:
    """The name of random weights with this seed. Raises UsageError where it is no such name, or has another seed."""
    if not model.startswith(RANDOM):
        raise UsageError(f"--seed is for --model random:SIZE; {model} has weights of its own. Leave it out")
    size, own = _size_and_seed(model)
    if model.count(":") > 1 and own != seed:
        raise UsageError(f"--model {model} has the seed {own} and --seed is {seed}; give one of them")
    return f"{RANDOM}{size}:{seed}"


def _size_and_seed(model: str) -> tuple[str, int]:
    size, _, seed = model.removeprefix(RANDOM).partition(":")
    if size not in WHISPER_SIZES:
        known = ", ".join(WHISPER_SIZES)
        raise UsageError(f"--model {model}: there is no Whisper of size {size!r}; choose from {known}")
    if seed and not seed.isdecimal():
        raise UsageError(f"--model {model}: the seed must be a whole number from 0 (got {seed!r})")
    return size, int(seed or 0)


def random_weights(model: str) -> WhisperWeights:
    """An encoder as it is before training: torch's initialisation and Whisper's sinusoids, decided by the seed."""
    from whisper.model import AudioEncoder

    name, seed = _size_and_seed(model)
    size = WHISPER_SIZES[name]
    with random_numbers(seed):
        encoder = AudioEncoder(size.mels, MAX_POSITIONS, size.dim, size.heads, size.layers)
    dims = {
        "n_mels": size.mels, "n_audio_ctx": MAX_POSITIONS, "n_audio_state": size.dim, "n_audio_head": size.heads,
        "n_audio_layer": size.layers, "n_vocab": 0, "n_text_ctx": 0, "n_text_state": 0, "n_text_head": 0,
        "n_text_layer": 0,
    }  # fmt: skip
    state = {f"encoder.{key}": value for key, value in encoder.state_dict().items()}
    return WhisperWeights(f"{RANDOM}{name}:{seed}", model, dims, state)


class LogMelBackbone:
    """The spectrogram that Whisper's encoder is given, as if it were a layer: (B, samples) -> (B, 1, 25, 240)."""

    name = LOG_MEL
    weights_sha256 = hashlib.sha256(b"log-mel: mean, std, max").hexdigest()  # it has no weights
    layers, dim = 1, 3 * MELS
    sample_rate = SAMPLE_RATE
    precision = "float32"
    takes_int16 = True

    def __init__(self, device: torch.device):
        self.device = with_index(device)

    clip_samples = staticmethod(clip_samples)

    def in_float32(self) -> LogMelBackbone:
        return self

    @torch.inference_mode()
    def encode(self, waveforms: Tensor) -> Tensor:
        """As Backbone.encode; samples may be int16 too."""
        mel_BMTn = log_mel(as_float32(waveforms, self.device), MELS).unflatten(2, (FRAMES, -1))
        parts = (mel_BMTn.mean(dim=3), mel_BMTn.std(dim=3, correction=0), mel_BMTn.amax(dim=3))
        return torch.cat(parts, dim=1).transpose(1, 2)[:, None].contiguous()
