"""Frozen encoders behind one small interface, and the weights that go into them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from whisper_at_cli.extract.devices import choose_device
from whisper_at_cli.extract.encoder import PRECISIONS, WhisperEncoder, encoder_from_state
from whisper_at_cli.extract.errors import UsageError
from whisper_at_cli.extract.mel import SAMPLE_RATE, filters_and_window, log_mel
from whisper_at_cli.extract.weights import WhisperWeights, read_weights


@dataclass(frozen=True)
class WhisperSize:
    """The sizes of one Whisper encoder."""

    mels: int
    layers: int
    dim: int
    heads: int


_SIZES = {
    "tiny": WhisperSize(80, 4, 384, 6),
    "base": WhisperSize(80, 6, 512, 8),
    "small": WhisperSize(80, 12, 768, 12),
    "medium": WhisperSize(80, 24, 1024, 16),
}
_LARGE, _LARGE_V3 = WhisperSize(80, 32, 1280, 20), WhisperSize(128, 32, 1280, 20)
WHISPER_SIZES: dict[str, WhisperSize] = (
    _SIZES
    | {f"{name}.en": size for name, size in _SIZES.items()}
    | {"large-v1": _LARGE, "large-v2": _LARGE}
    | dict.fromkeys(("large", "large-v3", "large-v3-turbo", "turbo"), _LARGE_V3)
)


class Backbone(Protocol):
    """A frozen encoder. `encode` may be called from several threads at once."""

    name: str
    weights_sha256: str
    layers: int
    dim: int
    sample_rate: int
    precision: str
    device: torch.device

    def encode(self, waveforms: Tensor) -> Tensor:
        """Waveforms (B, samples) float32 in [-1, 1] -> (B, layers, 25, dim) float32 on the backbone's device."""
        ...


class WhisperBackbone:
    """Whisper's encoder on un-padded clips. Same features as OpenAI's blocks run one clip at a time in float32."""

    sample_rate = SAMPLE_RATE

    def __init__(
        self, encoder: WhisperEncoder, *, name: str, weights_sha256: str, device: torch.device, precision: str
    ):
        self.name, self.weights_sha256, self.precision, self.device = name, weights_sha256, precision, device
        self.layers, self.dim = len(encoder.blocks), encoder.dim
        self.encoder = encoder.prepare(precision=precision, device=device)
        filters_and_window(encoder.mels, device)
        if device.type == "cuda":  # batches run in streams that do not wait for the one that did this
            torch.cuda.synchronize(device)

    @classmethod
    def from_weights(cls, weights: WhisperWeights, *, device: torch.device, precision: str) -> WhisperBackbone:
        encoder = encoder_from_state(weights.state, heads=weights.dims["n_audio_head"])
        sha256 = weights.encoder_sha256()
        return cls(encoder, name=weights.name, weights_sha256=sha256, device=device, precision=precision)

    def compile(self) -> None:
        """Let torch.compile fuse what lies between the matrix products; the first batch of each size takes a minute.

        Raises UsageError on a CPU, where the weights are laid out for oneDNN already and nothing is left to gain.
        """
        if self.device.type == "cpu":
            raise UsageError("--compile is for GPUs; on a CPU the encoder is laid out for oneDNN already. Leave it out")
        self.encoder.compile(dynamic=False)

    @torch.inference_mode()
    def encode(self, waveforms: Tensor) -> Tensor:
        waveforms = waveforms.to(self.device, torch.float32, non_blocking=True)
        return self.encoder(log_mel(waveforms, self.encoder.mels))


def load_backbone(model: str | Path, *, device: str = "auto", precision: str = "float32") -> WhisperBackbone:
    """A frozen encoder ready to encode.

    model is an OpenAI name (`tiny.en`), a `.pt` file or a CTranslate2 folder; precision float32, bfloat16 or float16.
    Raises UsageError for an unknown model, device or precision, WeightsError for weights that cannot be read.
    """
    if precision not in PRECISIONS:
        raise UsageError(f"precision {precision!r} is not known; choose from {', '.join(PRECISIONS)}")
    chosen = choose_device(device)
    return WhisperBackbone.from_weights(read_weights(model), device=chosen, precision=precision)


def load_whisper(model: str | Path, *, device: str = "auto"):
    """An `openai-whisper` model with these weights, ready to `transcribe`. Takes what `load_backbone` takes."""
    from whisper.model import ModelDimensions, Whisper

    weights = read_weights(model)
    whisper_model = Whisper(ModelDimensions(**weights.dims))
    whisper_model.load_state_dict(weights.state, strict=False)  # alignment heads and the causal mask are not weights
    return whisper_model.to(choose_device(device)).eval()
