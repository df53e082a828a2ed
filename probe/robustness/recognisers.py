"""Frozen speech recognisers behind one small interface: Whisper here, wav2vec 2.0 and its kin in `ctc`."""

from __future__ import annotations

import copy
import json
import threading
import zlib
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from whisper_at_cli.extract.backbones.encoder import WhisperEncoder, encoder_from_state, windows
from whisper_at_cli.extract.backbones.mel import HOP
from whisper_at_cli.extract.devices import choose_device
from whisper_at_cli.extract.errors import UsageError

if TYPE_CHECKING:
    from torch import nn
    from whisper.decoding import DecodingResult
    from whisper.model import Whisper

WINDOW_FRAMES = 3000  # of log-mel in 30 s
PADDING = 800  # zeros after the audio, so that its last frames see silence and not their own reflection
CPU_BATCH_BYTES, GPU_SHARE = 300 << 20, 0.4  # for keys and values of the cross-attention
LARGEST_BATCH = 64
WHISPER_FILES = ("model.bin",)  # what a CTranslate2 folder holds


class Recogniser(Protocol):
    """A frozen speech recogniser. `transcribe` may be called from as many threads at once as `streams` says."""

    name: str
    weights_sha256: str  # of the encoder, as in a feature cache
    parameters: int  # of the whole recogniser
    settings: dict  # whatever else decides what it writes
    reads_int16: bool  # whether in the paper's experiment it read clipped 16-bit samples
    batch_size: int  # utterances that suit it
    streams: int
    device: torch.device

    def transcribe(self, waveforms: list[np.ndarray]) -> list[str]:
        """The text of each waveform (samples,) float32 at 16 kHz; the same whatever else is in the list."""
        ...


class WhisperRecogniser:
    """Whisper with timestamps: the text that `whisper.transcribe` gives, many utterances at once.

    As by default there and in the paper, a window whose text is too repetitive or too improbable is decoded again at
    rising temperatures. With `greedy` it is not: `transcribe(temperature=0)`. Windows that fall back, utterances over
    30 s, and the few that Whisper would go on with in a second window, go through `transcribe` itself.
    """

    reads_int16 = True

    def __init__(
        self, model: Whisper, *, name: str, weights_sha256: str, decoder_sha256: str = "", language: str = "en",
        greedy: bool = False,
    ):  # fmt: skip
        check_language(language, multilingual=model.is_multilingual, name=name)
        self.model, self.name, self.weights_sha256 = model, name, weights_sha256
        self.language, self.greedy, self.device = language, greedy, model.device
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        decoding = "greedy" if greedy else "greedy, temperature fallback"
        self.settings = {"decoding": decoding, "language": language, "decoder_sha256": decoder_sha256}
        self.encoder = _fast_encoder(model) if self.device.type == "cpu" else None
        self.batch_size = self._fitting_batch_size()
        self.streams = default_streams(self.device)
        self._local = threading.local()
        self._generator = threading.Lock()  # torch has one for all threads: each utterance that is drawn has it alone

    def transcribe(self, waveforms: list[np.ndarray]) -> list[str]:
        texts: list[str | None] = [None] * len(waveforms)
        short = [at for at, samples in enumerate(waveforms) if len(samples) // HOP <= WINDOW_FRAMES]
        if short:
            mels = torch.stack([self.log_mel(waveforms[at]) for at in short])
            for at, result in zip(short, self.decode(mels), strict=True):
                texts[at] = self._text(result)
        return [self._transcribe_alone(waveforms[at]) if text is None else text for at, text in enumerate(texts)]

    def log_mel(self, samples: np.ndarray) -> Tensor:
        """(mels, 3000) of at most 30 s as `whisper.transcribe` makes it: its own maximum, zeros after the audio."""
        from whisper.audio import log_mel_spectrogram, pad_or_trim

        mel = log_mel_spectrogram(torch.from_numpy(samples), self.model.dims.n_mels, padding=PADDING)
        return pad_or_trim(mel[:, : len(samples) // HOP], WINDOW_FRAMES)

    @torch.inference_mode()
    def decode(self, mels: Tensor) -> list[DecodingResult]:
        """What `whisper.decode` gives for each of these windows (B, mels, 3000)."""
        from whisper_at_cli.probe.robustness.greedy import decode_greedily

        return decode_greedily(self._own_model(), self._encode(mels.to(self.device)), self.language)

    def _encode(self, mels: Tensor) -> Tensor:
        if self.encoder is None:
            return self.model.encoder(mels)
        # two at a time: on a CPU the activations of more fall out of the processor's cache
        return torch.cat([_encode(self.encoder, self.model.encoder.ln_post, pair) for pair in mels.split(2)])

    def _text(self, result: DecodingResult) -> str | None:
        """The text that `transcribe` makes of a first window; None where it would decode more."""
        probable = result.avg_logprob > -1.0
        silent = result.no_speech_prob > 0.6 and not probable
        if not (self.greedy or silent) and (result.compression_ratio > 2.4 or result.avg_logprob < -1.0):
            return None
        if silent:
            return ""
        begin = self._timestamp_begin()
        stamps = [token >= begin for token in result.tokens]
        goes_on = any(a and b for a, b in pairwise(stamps)) and stamps[-2:] != [False, True]
        return None if goes_on else result.text

    def _transcribe_alone(self, samples: np.ndarray) -> str:
        temperatures = 0.0 if self.greedy else (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
        with nullcontext() if self.greedy else self._generator:
            torch.manual_seed(zlib.crc32(samples.tobytes()))  # the same draws whenever this utterance comes
            result = self._own_model().transcribe(samples, language=self.language, temperature=temperatures, fp16=False)
        return result["text"].strip()

    def _timestamp_begin(self) -> int:
        from whisper.tokenizer import get_tokenizer

        multilingual, languages = self.model.is_multilingual, self.model.num_languages
        return get_tokenizer(multilingual, num_languages=languages, language=self.language).timestamp_begin

    def _own_model(self) -> Whisper:
        """This thread's own modules over the same weights: decoding hangs hooks on them."""
        if not hasattr(self._local, "model"):
            shared = {id(tensor): tensor for tensor in (*self.model.parameters(), *self.model.buffers())}
            self._local.model = copy.deepcopy(self.model, shared)
        return self._local.model

    def _fitting_batch_size(self) -> int:
        dims = self.model.dims
        row = 2 * dims.n_text_layer * dims.n_audio_ctx * dims.n_text_state * 4
        budget: float = CPU_BATCH_BYTES
        if self.device.type == "cuda":
            budget = torch.cuda.mem_get_info(self.device)[0] * GPU_SHARE / default_streams(self.device)
        return int(max(1, min(LARGEST_BATCH, budget // row)))


def default_streams(device: torch.device) -> int:
    """Batches side by side: one per core with one thread each, or two on an accelerator, which then never waits."""
    from whisper_at_cli.extract.devices import streams_of

    return min(streams_of(device), 16)


def check_language(language: str, *, multilingual: bool = True, name: str = "") -> None:
    """Raises UsageError for a language that nobody knows, or that this Whisper model does not know."""
    from whisper.tokenizer import LANGUAGES

    if language not in LANGUAGES:
        raise UsageError(f"language {language!r} is not known to Whisper; give its code, such as en or de")
    if not multilingual and language != "en":
        raise UsageError(f"{name} knows English alone; leave out --language {language}, or take a multilingual model")


def _fast_encoder(model: Whisper) -> WhisperEncoder:
    """The same encoder with its layers laid out for oneDNN: 0.26 against 0.41 s for 30 s of `tiny.en` on a core."""
    encoder = encoder_from_state(model.state_dict(), heads=model.dims.n_audio_head)
    return encoder.prepare(precision="float32", device=torch.device("cpu"))


def _encode(encoder: WhisperEncoder, ln_post: nn.Module, mel_BMF: Tensor) -> Tensor:
    """Whole windows to what the decoder attends to, (B, 1500, D): nothing pooled, the final norm applied."""
    x_BPD = encoder.stem2(windows(encoder.stem1(windows(mel_BMF.transpose(1, 2), 1), gelu=True), 2), gelu=True)
    x_BPD = x_BPD + encoder.positions
    for block in encoder.blocks:
        block(x_BPD)
    return ln_post(x_BPD)


def load_recogniser(
    model: str | Path, *, device: str = "auto", language: str = "en", greedy: bool = False
) -> Recogniser:
    """A recogniser for whatever `load_whisper` takes, or for a CTC model of `transformers` (folder or hub name).

    Raises UsageError where there is no such model, or where it recognises no speech.
    """
    choose_device(device)  # refused before gigabytes are read
    if is_transformers(model):
        from whisper_at_cli.probe.robustness.ctc import load_ctc

        if greedy:
            raise UsageError(f"--greedy is for Whisper models; {model} is a CTC model. Leave it out")
        return load_ctc(model, device=device, language=language)
    from whisper_at_cli.extract.backbones.load import load_whisper
    from whisper_at_cli.extract.backbones.weights import read_weights, state_sha256

    weights = read_weights(model)
    decoder = {name: tensor for name, tensor in weights.state.items() if name.startswith("decoder.")}
    known = {
        "name": weights.name,
        "weights_sha256": weights.encoder_sha256(),
        "decoder_sha256": state_sha256(decoder),
    }
    check_language(language, multilingual=weights.dims["n_vocab"] >= 51865, name=weights.name)
    return WhisperRecogniser(load_whisper(weights, device=device), **known, language=language, greedy=greedy)


def is_transformers(model: str | Path) -> bool:
    """Whether a model is one for `ctc`: a folder of `transformers` that is no Whisper, or a name on the hub."""
    path = Path(model)
    config = path / "config.json"
    if path.is_dir():
        if not config.is_file() or any((path / name).exists() for name in WHISPER_FILES):
            return False
        try:
            kind = json.loads(config.read_text(encoding="utf-8")).get("model_type")
        except (ValueError, AttributeError) as error:
            raise UsageError(f"{config} is not a readable configuration: {error}") from error
        return kind is not None and kind != "whisper"
    # OWNER/NAME; Whisper's own are left to load_whisper
    parts = str(model).split("/")
    hub_name = len(parts) == 2 and all(parts) and parts[0][0] not in ".~" and path.suffix != ".pt"
    return hub_name and not path.exists() and "whisper" not in str(model).lower()
