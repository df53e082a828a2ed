"""wav2vec 2.0, HuBERT, WavLM and data2vec-audio through `transformers`, every layer pooled as it passes.

B clips, P positions (about 50 a second), T pooled frames (25), D channels, L layers.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from whisper_at_cli.extract.audio import SAMPLE_RATE
from whisper_at_cli.extract.backbones.encoder import PRECISIONS, pool_frames
from whisper_at_cli.extract.backbones.huggingface import read_json
from whisper_at_cli.extract.backbones.mel import as_float32
from whisper_at_cli.extract.backbones.precision import resolved, use_true_float32
from whisper_at_cli.extract.backbones.routines import PackedLinear, conv_is_right, has_instructions
from whisper_at_cli.extract.backbones.weights import check_finite, state_sha256
from whisper_at_cli.extract.cache.schema import FRAMES
from whisper_at_cli.extract.devices import with_index
from whisper_at_cli.extract.errors import UsageError, WeightsError

MODEL_CLASSES = {
    "wav2vec2": "Wav2Vec2Model",
    "hubert": "HubertModel",
    "wavlm": "WavLMModel",
    "data2vec-audio": "Data2VecAudioModel",
}
LONGEST_SECONDS = 600
NORM_EPSILON = 1e-7  # as in transformers' Wav2Vec2FeatureExtractor
UNUSED = ("masked_spec_embed", "adapter.")  # weights for training, or behind the last layer


if TYPE_CHECKING:
    from types import ModuleType

    from transformers import PretrainedConfig

    class SpeechEncoder(nn.Module):
        layers: nn.ModuleList
        pos_conv_embed: nn.Module

    class SpeechModel(nn.Module):
        """What transformers' classes of this family have in common."""

        config: PretrainedConfig
        encoder: SpeechEncoder
        feature_projection: nn.Module
        adapter: nn.Module | None


class SpeechBackbone:
    """A model of the wav2vec 2.0 family. Layer l is the output of its l-th Transformer block.

    Safe to call from several threads: what a thread's pass collects is its own.
    """

    sample_rate = SAMPLE_RATE
    takes_int16 = True

    def __init__(
        self, model: SpeechModel, *, name: str, weights_sha256: str, normalise: bool, device: torch.device,
        precision: str, reload: Callable[[], SpeechBackbone] | None = None,
    ):  # fmt: skip
        device = with_index(device)
        self.name, self.weights_sha256, self.device = name, weights_sha256, device
        self.precision = resolved(precision, device)
        self.layers, self.dim, self.normalise = len(model.encoder.layers), int(model.config.hidden_size), normalise
        self.model = _prepare(model, precision=self.precision, device=device)
        self._pass = threading.local()
        self._reload, self._loading = reload, threading.Lock()
        self._twin: SpeechBackbone | None = None
        for layer in self.model.encoder.layers:
            layer.register_forward_hook(self._pool)
        if device.type == "cuda":  # batches run in streams that do not wait for the one that did this
            torch.cuda.synchronize(device)

    @classmethod
    def from_folder(cls, folder: Path, kind: str, *, name: str, device: torch.device, precision: str) -> SpeechBackbone:
        """The model in a Hugging Face folder. Raises UsageError without `transformers`, WeightsError where the folder
        is damaged or is for another rate than 16 kHz."""
        normalise = _input_normalisation(folder)
        model = _load(folder, kind)
        used = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(UNUSED)}
        check_finite(folder, used)
        # what is done to the waveform decides the features as weights do
        sha256 = state_sha256(used | {"normalise": torch.tensor(float(normalise))})

        def in_float32() -> SpeechBackbone:
            return cls.from_folder(folder, kind, name=name, device=device, precision="float32")

        return cls(
            model, name=name, weights_sha256=sha256, normalise=normalise, device=device, precision=precision,
            reload=in_float32,
        )  # fmt: skip

    def in_float32(self) -> SpeechBackbone | None:
        """The same model in float32, loaded when it is first asked for; None if its weights cannot be read again.

        Raises WeightsError if they have changed meanwhile.
        """
        if self.precision == "float32":
            return self
        with self._loading:
            if self._twin is None and self._reload is not None:
                twin = self._reload()
                if twin.weights_sha256 != self.weights_sha256:
                    raise WeightsError(f"the weights of {self.name} have changed on disk since they were loaded")
                self._twin = twin
        return self._twin

    def positions(self, samples: int) -> int:
        """Encoder positions of a clip: what the convolutions leave of its samples."""
        for kernel, stride in zip(self.model.config.conv_kernel, self.model.config.conv_stride, strict=True):
            samples = (samples - kernel) // stride + 1
        return max(0, samples)

    def clip_samples(self, clip_seconds: float) -> int:
        """Samples of a clip. Raises UsageError for one with fewer positions than frames, or longer than ten minutes."""
        if not 0 < clip_seconds <= LONGEST_SECONDS:
            raise UsageError(f"a clip of {clip_seconds:g} s cannot be encoded; choose up to {LONGEST_SECONDS} s")
        samples = round(clip_seconds * SAMPLE_RATE)
        if (positions := self.positions(samples)) < FRAMES:
            shortest = FRAMES
            for kernel, stride in zip(
                reversed(self.model.config.conv_kernel), reversed(self.model.config.conv_stride), strict=True
            ):
                shortest = (shortest - 1) * stride + kernel
            raise UsageError(
                f"a clip of {clip_seconds:g} s has {positions} positions in {self.name}, and {FRAMES} frames need as "
                f"many; choose at least {-(-shortest * 1000 // SAMPLE_RATE) / 1000:g} s"
            )
        return samples

    @torch.inference_mode()
    def encode(self, waveforms: Tensor) -> Tensor:
        """As Backbone.encode; samples may be int16 too."""
        waveforms = as_float32(waveforms, self.device)
        if self.normalise:
            waveforms = normalise(waveforms)
        self._pass.pooled = []
        try:
            with self._arithmetic():
                self.model(waveforms)
            return torch.stack(self._pass.pooled, dim=1)
        finally:
            del self._pass.pooled

    def _arithmetic(self) -> contextlib.AbstractContextManager:
        """Matrix products in `precision`; layer norms and the residual stream stay float32."""
        if self.precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, PRECISIONS[self.precision])

    def _pool(self, layer: nn.Module, inputs: tuple, output: Tensor | tuple[Tensor, ...]) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        self._pass.pooled.append(pool_frames(hidden))


def normalise(waveforms: Tensor) -> Tensor:
    """Each clip at zero mean and unit variance, (B, samples): as transformers' feature extractor does to one clip."""
    variance, mean = torch.var_mean(waveforms, dim=1, correction=0, keepdim=True)
    return (waveforms - mean) / torch.sqrt(variance + NORM_EPSILON)


class _CastingLinear(PackedLinear):
    """A packed linear layer that takes activations of any type."""

    def forward(self, x: Tensor, *, gelu: bool = False) -> Tensor:
        return super().forward(x.to(self.bias.dtype), gelu=gelu)


def _input_normalisation(folder: Path) -> bool:
    """What the folder says of the input: in preprocessor_config.json, or in processor_config.json as transformers 5
    writes it beside a tokenizer. Where it says nothing, what transformers' default is."""
    settings = {}
    if (path := folder / "preprocessor_config.json").is_file():
        settings = read_json(path)
    elif (path := folder / "processor_config.json").is_file():
        settings = read_json(path).get("feature_extractor", {})
    if not isinstance(settings, dict):
        raise WeightsError(f"{path} is damaged: its feature_extractor is no JSON object")
    rate = settings.get("sampling_rate", SAMPLE_RATE)
    if rate != SAMPLE_RATE:
        raise WeightsError(f"{folder} asks for audio at {rate} Hz; clips are decoded at {SAMPLE_RATE} Hz")
    return bool(settings.get("do_normalize", True))


def _load(folder: Path, kind: str) -> SpeechModel:
    """The model, float32, with every weight that its layers use taken from the folder; never runs code from it."""
    try:
        import transformers
    except ImportError as error:
        raise UsageError(
            f"{folder} holds a {kind} model, which needs the extra hf: pip install 'whisper-at-cli[hf]'"
        ) from error
    model_class = getattr(transformers, MODEL_CLASSES[kind])
    try:
        with _quiet(transformers):
            model, found = model_class.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, output_loading_info=True, dtype=torch.float32,
                attn_implementation="sdpa" if model_class._supports_sdpa else "eager", weights_only=True,
            )  # fmt: skip
    except Exception as error:  # of transformers, safetensors or the unpickler: whatever a damaged folder brings about
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise WeightsError(f"{folder} could not be read as a {kind} model: {reason}") from error
    if missing := [name for name in found["missing_keys"] if not name.startswith(UNUSED)]:
        raise WeightsError(f"{folder} lacks {len(missing)} tensors of a {kind} model, such as {min(missing)}")
    return model


@contextlib.contextmanager
def _quiet(transformers: ModuleType) -> Iterator[None]:
    """Without transformers' progress bars, and its reports of weights that no layer here needs."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _prepare(model: SpeechModel, *, precision: str, device: torch.device) -> SpeechModel:
    """Everything random off, weights laid out and cast for `precision`; for inference from here on."""
    config = model.config
    config.layerdrop, config.apply_spec_augment = 0.0, False  # eval mode leaves both out as well
    config.output_hidden_states = config.output_attentions = False
    model.adapter = None
    for module in list(
        model.encoder.pos_conv_embed.modules()
    ):  # a weight that would be normalised anew for every batch
        if nn.utils.parametrize.is_parametrized(module, "weight"):
            nn.utils.parametrize.remove_parametrizations(module, "weight")
    model.requires_grad_(False).eval()
    dtype = PRECISIONS[precision]
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.to(dtype)
    _set_convolutions(model, dtype, device)
    model.feature_projection.register_forward_hook(_in_float32)
    if device.type == "cpu":
        for layer in model.encoder.layers:
            _pack(layer)
    if precision == "float32":
        use_true_float32(device)
    return model.to(device)


class _Float32Conv1d(nn.Conv1d):
    """A convolution that stays in float32 where autocast would not leave it there."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())


def _set_convolutions(model: SpeechModel, dtype: torch.dtype, device: torch.device) -> None:
    """Cast the convolutions; on a CPU those that are fast and come out right in `dtype`, and not the positional one.

    oneDNN's AMX kernel for a grouped convolution with few channels a group was found wrong by 110 % in bfloat16.
    """
    if dtype == torch.float32:
        return
    positional = set(model.encoder.pos_conv_embed.modules())
    for module in [module for module in model.modules() if isinstance(module, nn.Conv1d)]:
        cast = device.type != "cpu" or (
            module not in positional and has_instructions(dtype) and conv_is_right(module, dtype, device)
        )
        if cast:
            module.to(dtype)
        else:
            module.__class__ = _Float32Conv1d


def _in_float32(_module: nn.Module, _inputs: tuple, output: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
    """The residual stream begins here: what is added to it may be of a lower precision, the sum is not."""
    return (output[0].float(), *output[1:]) if isinstance(output, tuple) else output.float()


def _pack(module: nn.Module) -> None:
    """Lay out the linear layers of a block for oneDNN; those of WavLM's attention are read as bare weights instead."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear) and child.bias is not None:
            if PackedLinear.is_right(child.in_features, child.out_features, child.weight.dtype):
                setattr(module, name, _CastingLinear(child))
        elif not type(child).__name__.startswith("WavLMAttention"):
            _pack(child)
