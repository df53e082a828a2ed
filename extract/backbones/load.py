"""Frozen encoders behind one small interface, and the weights that go into them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from whisper_at_cli.extract.audio import SAMPLE_RATE
from whisper_at_cli.extract.backbones import custom
from whisper_at_cli.extract.backbones.controls import LOG_MEL, LogMelBackbone, is_control, random_weights
from whisper_at_cli.extract.backbones.encoder import WhisperEncoder, clip_samples, encoder_from_state
from whisper_at_cli.extract.backbones.huggingface import download_folder, is_hub_name
from whisper_at_cli.extract.backbones.mel import as_float32, filters_and_window, log_mel
from whisper_at_cli.extract.backbones.precision import resolved, use_true_float32
from whisper_at_cli.extract.backbones.recognise import backbone_kind
from whisper_at_cli.extract.backbones.weights import WhisperWeights, read_weights, whisper_names
from whisper_at_cli.extract.devices import choose_device, with_index
from whisper_at_cli.extract.errors import UsageError, WeightsError

if TYPE_CHECKING:
    from whisper.model import Whisper


class EncoderFacts(Protocol):
    """What a cache records of the encoder that fills it. A Backbone says it of itself."""

    @property
    def name(self) -> str: ...
    @property
    def weights_sha256(self) -> str: ...
    @property
    def layers(self) -> int: ...
    @property
    def dim(self) -> int: ...
    @property
    def precision(self) -> str: ...
    @property
    def device(self) -> object: ...


class Backbone(Protocol):
    """A frozen encoder. `encode` may be called from several threads at once.

    A backbone may also have `clip_samples(clip_seconds)`, which raises UsageError for a length that it cannot take,
    `in_float32()`, the same encoder in float32 or None, `takes_int16 = True` if `encode` also takes int16 samples, and
    `compile(batch_size)`. docs/backbones.md shows how to add one.
    """

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

    takes_int16 = True

    def __init__(
        self, encoder: WhisperEncoder, *, name: str, weights_sha256: str, device: torch.device, precision: str,
        reload: Callable[[], WhisperWeights] | None = None,
    ):  # fmt: skip
        device = with_index(device)
        self.name, self.weights_sha256, self.device = name, weights_sha256, device
        self.precision = resolved(precision, device)
        if self.precision == "float32":
            use_true_float32(device)
        self.layers, self.dim = len(encoder.blocks), encoder.dim
        self.encoder = encoder.prepare(precision=self.precision, device=device)
        self._reload, self._loading = reload, threading.Lock()
        self._twin: WhisperBackbone | None = None
        self._compiled: tuple[int, Callable[[Tensor], Tensor]] | None = None
        filters_and_window(encoder.mels, device)
        if device.type == "cuda":  # batches run in streams that do not wait for the one that did this
            torch.cuda.synchronize(device)

    @classmethod
    def from_weights(
        cls, weights: WhisperWeights, *, device: torch.device, precision: str,
        reload: Callable[[], WhisperWeights] | None = None,
    ) -> WhisperBackbone:  # fmt: skip
        """The encoder of these weights; `reload` reads them again, should a clip need `in_float32`."""
        encoder = encoder_from_state(weights.state, heads=weights.dims["n_audio_head"])
        sha256 = weights.encoder_sha256()
        return cls(encoder, name=weights.name, weights_sha256=sha256, device=device, precision=precision, reload=reload)

    def in_float32(self) -> WhisperBackbone | None:
        """The same encoder in float32, loaded when it is first asked for; None if its weights cannot be read again.

        Raises WeightsError if they have changed meanwhile.
        """
        if self.precision == "float32":
            return self
        with self._loading:
            if self._twin is None and self._reload is not None:
                weights = self._reload()
                twin = WhisperBackbone.from_weights(weights, device=self.device, precision="float32")
                if twin.weights_sha256 != self.weights_sha256:
                    raise WeightsError(f"the weights of {self.name} have changed on disk since they were loaded")
                self._twin = twin
        return self._twin

    clip_samples = staticmethod(clip_samples)

    def compile(self, batch_size: int) -> None:
        """Let torch.compile fuse what lies between the matrix products, for batches of this size: the first one takes
        a minute. Other batches, such as the last of a dataset, are computed as without.

        Raises UsageError on a CPU, where the weights are laid out for oneDNN already and nothing is left to gain.
        """
        if self.device.type == "cpu":
            raise UsageError("--compile is for GPUs; on a CPU the encoder is laid out for oneDNN already. Leave it out")
        if self._compiled is None or self._compiled[0] != batch_size:
            self._compiled = batch_size, torch.compile(self.encoder, dynamic=False)

    @torch.inference_mode()
    def encode(self, waveforms: Tensor) -> Tensor:
        """As Backbone.encode; samples may be int16 too."""
        mel = log_mel(as_float32(waveforms, self.device), self.encoder.mels)
        if self._compiled is not None and self._compiled[0] == len(mel):
            return self._compiled[1](mel)
        return self.encoder(mel)


def load_backbone(model: str | Path, *, device: str = "auto", precision: str = "float32") -> Backbone:
    """A frozen encoder ready to encode.

    model is an OpenAI name (`tiny.en`), a `.pt` file, a CTranslate2 or Hugging Face folder, `module:function` or an
    entry point that makes a backbone, a name on the Hugging Face hub, or a control, `random:tiny.en` or `log-mel`;
    precision float32, bfloat16,
    float16 or auto: float16 on CUDA, float32 elsewhere. Raises UsageError for an unknown model, device or precision,
    WeightsError for weights that cannot be read.
    """
    chosen = choose_device(device)
    precision = resolved(precision, chosen)
    path = Path(model)
    if path.is_dir():
        return _from_folder(path, None, device=chosen, precision=precision)
    if not path.is_file() and is_control(str(model)):
        if str(model) == LOG_MEL:
            return LogMelBackbone(chosen)
        return _whisper(lambda: random_weights(str(model)), device=chosen, precision=precision)
    if not path.is_file() and str(model) not in whisper_names():
        if loader := custom.find_loader(str(model)):
            return custom.load_custom(loader, str(model), device=chosen, precision=precision)
        if is_hub_name(model):
            return _from_folder(download_folder(str(model)), str(model), device=chosen, precision=precision)
    return _whisper(lambda: read_weights(model), device=chosen, precision=precision)


def _whisper(read: Callable[[], WhisperWeights], *, device: torch.device, precision: str) -> Backbone:
    return WhisperBackbone.from_weights(read(), device=device, precision=precision, reload=read)


def _from_folder(folder: Path, name: str | None, *, device: torch.device, precision: str) -> Backbone:
    """The backbone whose weights a folder holds, told by its content."""
    kind = backbone_kind(folder)
    if kind not in ("whisper", "ctranslate2"):
        from whisper_at_cli.extract.backbones.speech import SpeechBackbone

        name = name or folder.resolve().name
        return SpeechBackbone.from_folder(folder, kind, name=name, device=device, precision=precision)
    return _whisper(lambda: read_weights(folder, name=name), device=device, precision=precision)


def load_whisper(model: str | Path | WhisperWeights, *, device: str = "auto") -> Whisper:
    """An `openai-whisper` model with these weights, ready to `transcribe`. Takes Whisper in all of its forms, and
    weights that were read already. Raises UsageError where they are an encoder alone."""
    from whisper.model import ModelDimensions, Whisper

    weights = model if isinstance(model, WhisperWeights) else read_weights(model)
    weights.check_decoder()
    whisper_model = Whisper(ModelDimensions(**weights.dims))
    whisper_model.load_state_dict(weights.state)
    heads = torch.zeros(weights.dims["n_text_layer"], weights.dims["n_text_head"], dtype=torch.bool)
    for layer, head in weights.alignment_heads or ():
        if 0 <= layer < heads.shape[0] and 0 <= head < heads.shape[1]:
            heads[layer, head] = True
    if heads.any():
        whisper_model.register_buffer("alignment_heads", heads.to_sparse(), persistent=False)
    return whisper_model.to(choose_device(device)).eval()
