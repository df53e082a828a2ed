"""Decoding: any container FFmpeg reads -> 16 kHz mono float32, cut or zero-padded to the clip's length.

Decoding and resampling are FFmpeg's own, through its libraries and in this process, with the settings of Whisper's
loader (`ffmpeg -ac 1 -acodec pcm_s16le -ar 16000`), so that the samples are the same without a process per file.
A part of a file has the samples that the whole file has there; `segments` says how that is done without decoding all.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from whisper_at_cli.extract.audio import SAMPLE_RATE
from whisper_at_cli.extract.audio.lengths import loss_note, seconds_of
from whisper_at_cli.extract.audio.opened import AudioFile, Source
from whisper_at_cli.extract.audio.resample import RESAMPLER_SECONDS, Resampler, decode_frames, form_of
from whisper_at_cli.extract.audio.segments import decode_span
from whisper_at_cli.extract.audio.track import Track
from whisper_at_cli.extract.errors import AudioError

SUFFIXES = frozenset(  # of files that a folder is searched for
    ".wav .flac .ogg .oga .opus .mp3 .m4a .aac .mp4 .webm .mka .mkv .aif .aiff .aifc .au .wma .amr .caf .w64".split()
)


class ClipAudio(NamedTuple):
    """One clip's audio as it was read."""

    samples: np.ndarray  # (samples,) int16 at 16 kHz, cut or zero-padded
    real: int  # how many of them are audio
    note: str = ""  # what a user should know of this file though it was read, in one line


def decode(source: str | Source, *, start: float = 0.0, max_seconds: float | None = None) -> np.ndarray:
    """The samples of an audio file: (samples,) float32 in [-1, 1) at 16 kHz, channels mixed to one.

    Options and errors are those of `decode_int16`.
    """
    return as_float(decode_int16(source, start=start, max_seconds=max_seconds))


def as_float(samples: np.ndarray) -> np.ndarray:
    """int16 samples as float32 in [-1, 1)."""
    return samples.astype(np.float32) / 32768.0


def decode_int16(source: str | Source, *, start: float = 0.0, max_seconds: float | None = None) -> np.ndarray:
    """The samples of an audio file: (samples,) int16 at 16 kHz, channels mixed to one.

    With `start` in seconds, decoding begins there; with `max_seconds`, it stops so much later or a little after that.
    What FFmpeg's program passes over is passed over. Raises AudioError for what is no readable audio file and where
    more than a tenth is lost of what the file promises; MissingAudioError (a kind of it) where there is no such file.
    """
    return _decoded(source, start, math.inf if max_seconds is None else max_seconds)[0]


def load_clip(source: str | Source, samples: int, *, start: float | None = None, end: float | None = None) -> ClipAudio:
    """A clip of exactly `samples` samples, cut or zero-padded, with a note of what is lost of it.

    With `start` or `end`, in seconds, it is cut from that part of the file. Errors are those of `decode_int16`.
    """
    start = start or 0.0
    wanted = samples if end is None else min(samples, max(1, round(end * SAMPLE_RATE) - round(start * SAMPLE_RATE)))
    decoded, note = _decoded(source, start, wanted / SAMPLE_RATE)
    decoded = decoded[:wanted]
    return ClipAudio(_padded(decoded, samples), len(decoded), note)


def _decoded(source: str | Source, start: float, most: float) -> tuple[np.ndarray, str]:
    """Samples from `start` on, of `most` seconds or a little more, and a note of what is lost of them."""
    with _decoding_errors(), AudioFile(Path(source) if isinstance(source, str) else source) as file:
        if start > 0 or (file.riff and file.riff.plain):
            samples, track = decode_span(file, start, most)
        else:
            with file.container() as container:
                track = Track(container)
                samples = decode_frames(track.codec, track.frames(), most)
        note = loss_note(file, track, start, len(samples) / SAMPLE_RATE, most)
    if not len(samples):
        reason = f"cannot be decoded: {track.reason}" if track and track.reason else "holds no samples"
        raise AudioError(f"it {reason} from {start:g} s on" if start > 0 else f"it {reason}")
    return samples, note


def clip_from_samples(waveform: np.ndarray, rate: int, samples: int) -> ClipAudio:
    """`load_clip` for a waveform in memory: (n,) int16 or float32 at `rate`. Raises AudioError for NaN."""
    import av

    needed = math.ceil((samples / SAMPLE_RATE + RESAMPLER_SECONDS) * rate)
    waveform = np.ascontiguousarray(waveform[:needed])
    if not len(waveform):
        raise AudioError("it holds no samples")
    frame = av.AudioFrame.from_ndarray(
        waveform[None], format="s16" if waveform.dtype == np.int16 else "flt", layout="mono"
    )
    frame.sample_rate = rate
    with _decoding_errors():
        resampler = Resampler(form_of(frame), frame.layout.name, checked=waveform.dtype != np.int16)
        resampler.push(frame)
        decoded = np.concatenate(resampler.finish())[:samples]
    return ClipAudio(_padded(decoded, samples), len(decoded))


def _padded(decoded: np.ndarray, samples: int) -> np.ndarray:
    clip = np.zeros(samples, dtype=np.int16)
    clip[: len(decoded)] = decoded
    return clip


def audio_seconds(source: str | Source) -> tuple[float, bool]:
    """How long an audio file is, without decoding it, and whether that is exact to the sample (else to some 50 ms).

    From its header where that can be trusted, else from counting packets. Raises AudioError for what cannot be read.
    """
    with _decoding_errors(), AudioFile(Path(source) if isinstance(source, str) else source) as file:
        return seconds_of(file)


@contextlib.contextmanager
def _decoding_errors() -> Iterator[None]:
    """What FFmpeg says of a file, as AudioError."""
    import av

    try:
        yield
    except av.EOFError as error:
        raise AudioError("it is truncated: it ends before its audio does") from error
    except av.FFmpegError as error:
        raise AudioError(f"it cannot be decoded: {error.strerror or error}") from error
    except (ValueError, IndexError, MemoryError, OverflowError, OSError) as error:
        raise AudioError(f"it cannot be decoded: {error}") from error
