"""Whisper's own transcription of one file, with the encoder run once a window and every layer's frames handed on.

The text comes from openai-whisper's `transcribe`, run as it is. Only three names that it uses are other ones here: the
encoder, which remembers its last answer; `log_mel_spectrogram`, which works in pieces; and `pad_or_trim`, which sees
where each window lies. They stand in a copy of the function's globals, so that nothing outside is changed.
"""

from __future__ import annotations

import copy
import inspect
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch
import whisper
from torch import Tensor, nn
from whisper.audio import N_FRAMES, N_SAMPLES, pad_or_trim
from whisper.decoding import DecodingOptions
from whisper.model import AudioEncoder, MultiHeadAttention, Whisper

from whisper_at_cli.extract.audio import SAMPLE_RATE
from whisper_at_cli.extract.backbones.mel import HOP, MEL_FRAMES_PER_SECOND, N_FFT, filters_and_window
from whisper_at_cli.extract.errors import UsageError, WhisperATError
from whisper_at_cli.extract.progress import Progress
from whisper_at_cli.heads.tagging.windows import EncodedWindow, Span

PIECE_FRAMES = 6000  # of mel, computed at a time
DECODE_OPTIONS = tuple(field.name for field in fields(DecodingOptions))


class Receiver(Protocol):
    """Is told, in Whisper's order, of each window of the file that the encoder has run on."""

    def begin(self, position: int) -> None:
        """A window that begins at this encoder position of the file comes next."""

    def add(self, window: EncodedWindow) -> None: ...


@dataclass(frozen=True)
class Transcription:
    """What `whisper.transcribe` returned, and how often the encoder ran for it."""

    result: dict
    encoder_passes: int


def transcribe_once(
    model: Whisper, samples: np.ndarray, *, receiver: Receiver | None = None, frame_positions: int = 1,
    progress: Progress | None = None, **options: Any,
) -> Transcription:  # fmt: skip
    """`whisper.transcribe(model, samples, **options)` with the encoder run once a window; its layers go to `receiver`.

    Language detection and temperature fallback ask the encoder for a window it has just seen. Word timestamps ask for
    it through another attention kernel, whose last digits differ; that is computed again, so that words are the same
    too. Not for two threads at once on one model: Whisper keeps its key-value cache on the decoder's modules. Raises
    UsageError for options that Whisper refuses.
    """
    options = _checked(options, model)
    parts = stretches(options.get("clip_timestamps", "0"), len(samples))
    follower = _Follower(model, receiver, frame_positions, parts, options["fp16"], progress)
    transcribe = _with_names(log_mel_spectrogram=follower.log_mel, pad_or_trim=follower.pad_or_trim)
    with follower.listening():
        try:
            result = transcribe(follower.model, np.asarray(samples, dtype=np.float32), **options)
        except ValueError as error:
            raise UsageError(f"Whisper refuses these options: {error}") from error
        follower.finish()
    return Transcription(result, follower.encoder.passes)


def stretches(clip_timestamps: str | list[float], samples: int) -> list[tuple[int, int]]:
    """The parts of the file that Whisper will go through, in mel frames. Raises UsageError."""
    content = samples // HOP
    try:
        times = [float(time) for time in clip_timestamps.split(",") if clip_timestamps] if isinstance(
            clip_timestamps, str) else [float(time) for time in clip_timestamps]  # fmt: skip
        points = [round(time * MEL_FRAMES_PER_SECOND) for time in times] or [0]
    except (ValueError, OverflowError) as error:
        raise UsageError(
            f"clip timestamps {clip_timestamps!r} are not times in seconds: start,end,start,end"
        ) from error
    if len(points) % 2:
        points.append(max(content, points[-1]))
    pairs = list(zip(points[::2], points[1::2], strict=True))
    wrong = [pair for pair in pairs if not 0 <= pair[0] <= pair[1]]
    if wrong or max(points) > max(content, 1) + MEL_FRAMES_PER_SECOND:  # beyond it Whisper may go on for ever
        raise UsageError(
            f"clip timestamps {clip_timestamps!r} do not lie in order within the audio, which lasts "
            f"{samples / SAMPLE_RATE:.2f} s"
        )
    return [(start, min(end, content)) for start, end in pairs if start < content]


def log_mel_in_pieces(audio: np.ndarray, n_mels: int, padding: int) -> Tensor:
    """`whisper.log_mel_spectrogram`, (n_mels, frames) float32, with the same numbers and no copy of the file.

    `padding` zeros follow the audio, at least half a window of the transform."""
    edge = N_FFT // 2
    samples, frames = torch.from_numpy(audio), (len(audio) + padding) // HOP
    filters, window = filters_and_window(n_mels, samples.device)
    first = samples[: edge + 1]
    mirrored = torch.nn.functional.pad(first, (0, edge + 1 - len(first)))[1:].flip(0)  # as torch.stft pads by itself
    log = torch.empty(n_mels, frames)
    for start in range(0, frames, PIECE_FRAMES):
        end = min(start + PIECE_FRAMES, frames)
        a, b = start * HOP - edge, (end - 1) * HOP + N_FFT - edge
        piece = samples[max(a, 0) : b] if a >= 0 else torch.cat([mirrored, samples[:b]])
        piece = torch.nn.functional.pad(piece, (0, b - a - len(piece)))
        spectrum = torch.stft(piece, N_FFT, HOP, window=window, center=False, return_complex=True)
        log[:, start:end] = (filters @ spectrum.abs() ** 2).clamp_(min=1e-10).log10_()
    return torch.maximum(log, log.max() - 8.0, out=log).add_(4.0).div_(4.0)


def _checked(options: dict, model: Whisper) -> dict:
    """Options with `fp16` settled. Raises UsageError for a name that `whisper.transcribe` does not have."""
    known = set(inspect.signature(whisper.transcribe).parameters) | set(DECODE_OPTIONS)
    unknown = set(options) - known | {"model", "audio", "prompt"} & set(options)
    if unknown:
        raise UsageError(f"whisper.transcribe has no option {', '.join(sorted(unknown))}")
    on_cpu = model.device.type == "cpu"  # where Whisper computes in float32 in any case, and warns
    return options | {"fp16": bool(options.get("fp16", True)) and not on_cpu}


def _with_names(**names: object) -> Callable:
    """A copy of `whisper.transcribe` in which these names mean something else."""
    function = whisper.transcribe
    its_globals = vars(sys.modules[function.__module__])
    missing = [name for name in names if name not in its_globals or name not in function.__code__.co_names]
    if missing:
        raise WhisperATError(
            f"openai-whisper {whisper.__version__} works otherwise than the version that this needs (its transcribe "
            f"does not use {', '.join(missing)}); install openai-whisper==20250625"
        )
    made = types.FunctionType(function.__code__, its_globals | names, function.__name__, function.__defaults__)
    made.__kwdefaults__ = function.__kwdefaults__
    return made


class EncoderOnce(nn.Module):
    """Whisper's encoder, which answers from memory what it was asked last, as long as it was the same to the bit."""

    def __init__(self, encoder: AudioEncoder):
        super().__init__()
        self.encoder = encoder
        self.passes = 0
        self.listened = False  # set by who wants to see this pass, even of a window that looks like the last one
        self._asked: tuple[Tensor, bool] | None = None
        self._answer: Tensor | None = None

    def forward(self, mel: Tensor) -> Tensor:
        if self.listened or not self._remembers(mel):
            self._asked = self._answer = None
            self._answer = self.encoder(mel)
            self._asked = (mel, MultiHeadAttention.use_sdpa)
            self.passes += 1
        assert self._answer is not None
        return self._answer

    def _remembers(self, mel: Tensor) -> bool:
        if self._asked is None or self._asked[1] != MultiHeadAttention.use_sdpa:
            return False
        last = self._asked[0]
        return last.dtype == mel.dtype and last.device == mel.device and torch.equal(last, mel)


class _Follower:
    """Goes along with one transcription: knows where each window lies, hands on what the blocks put out."""

    def __init__(
        self, model: Whisper, receiver: Receiver | None, frame_positions: int, parts: list[tuple[int, int]],
        fp16: bool, progress: Progress | None,
    ):  # fmt: skip
        self.receiver, self.frame_positions, self.parts, self.progress = receiver, frame_positions, parts, progress
        self.dtype = torch.float16 if fp16 else torch.float32
        self.encoder = EncoderOnce(model.encoder)
        self.model = copy.copy(model)  # the same decoder and weights; the caller's own model stays as it is
        self.model._modules = model._modules | {"encoder": self.encoder}
        self.in_order = all(before[1] <= after[0] for before, after in pairwise(parts))
        self.mel: Tensor  # of the file, as soon as Whisper asks for it
        self.heard = 0  # mel frames of the file up to here have been through the encoder
        self.span: Span | None = None  # of the window whose layers are wanted next
        self.last_span: Span | None = None
        self.layers: list[tuple[Tensor, Tensor, Tensor]] = []

    def log_mel(self, audio: np.ndarray, n_mels: int, padding: int) -> Tensor:
        assert padding == N_SAMPLES
        self.mel = log_mel_in_pieces(audio, n_mels, padding)
        return self.mel

    def pad_or_trim(self, mel: Tensor, length: int) -> Tensor:
        """What Whisper calls right before it asks the encoder."""
        content = self.mel.shape[1] - N_FRAMES
        if mel is self.mel:  # to detect the language, in what is the first window too if it is full
            if self.parts and self.parts[0][0] == 0 and self.parts[0][1] >= N_FRAMES:
                self._expect(0, N_FRAMES)
        else:
            seek, size = int(mel.storage_offset() - self.mel.storage_offset()), mel.shape[1]
            self._catch_up(seek)
            self._expect(seek, size)
            if self.progress:
                self.progress(seek // MEL_FRAMES_PER_SECOND, -(-content // MEL_FRAMES_PER_SECOND))
        return pad_or_trim(mel, length)

    def finish(self) -> None:
        self._catch_up(self.mel.shape[1])
        if self.progress:
            seconds = -(-(self.mel.shape[1] - N_FRAMES) // MEL_FRAMES_PER_SECOND)
            self.progress(seconds, seconds)

    def _expect(self, seek: int, size: int) -> None:
        """A window of `size` mel frames from `seek` comes next."""
        self.heard = max(self.heard, seek + size)
        span = Span((seek + 1) // 2, size // 2, self.frame_positions)  # from the first position that begins in it
        if self.receiver is None or span == self.last_span:
            return
        if self.in_order:
            self.receiver.begin(span.start)
        self.span, self.layers, self.encoder.listened = span, [], True

    def _catch_up(self, seek: int) -> None:
        """Run the encoder on what Whisper skipped before `seek`: it may leave out an end that it takes for silence."""
        if self.receiver is None or not self.in_order:
            return
        for start, end in self.parts:
            while (at := max(start, self.heard)) < min(end, seek):
                size = min(N_FRAMES, end - at)
                self._expect(at, size)
                window = pad_or_trim(self.mel[:, at : at + size], N_FRAMES)
                with torch.no_grad():
                    self.encoder(window.to(self.model.device).to(self.dtype)[None])

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Collects the output of the encoder's blocks while the transcription runs."""
        blocks = self.encoder.encoder.blocks
        hooks = [block.register_forward_hook(self._after_block) for block in blocks]
        hooks.append(self.encoder.encoder.register_forward_hook(self._after_encoder))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _after_block(self, block: nn.Module, inputs: tuple, output: Tensor) -> None:
        if self.span is not None:
            self.layers.append(self.span.pool(output[0]))

    def _after_encoder(self, encoder: nn.Module, inputs: tuple, output: Tensor) -> None:
        if self.span is not None and self.receiver is not None:
            window = self.span.gather(self.layers)
            self.last_span, self.span, self.layers, self.encoder.listened = self.span, None, [], False
            self.receiver.add(window)
