"""Decoding: any container FFmpeg reads -> 16 kHz mono float32, cut or zero-padded to the clip's length.

Decoding and resampling are FFmpeg's own, through its libraries and in this process, with the settings of Whisper's
loader (`ffmpeg -ac 1 -acodec pcm_s16le -ar 16000`), so that the samples are the same without a process per file.
A part of a file has the samples that the whole file has there; `segments` says how that is done without decoding all.
"""

from __future__ import annotations

import contextlib
import io
import math
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import numpy as np

from whisper_at_cli.extract.audio import SAMPLE_RATE
from whisper_at_cli.extract.audio.lengths import refuse_huge_chunks, refuse_truncated, seconds_of
from whisper_at_cli.extract.audio.resample import RESAMPLER_SECONDS, Resampler, decode_stream, form_of
from whisper_at_cli.extract.audio.segments import decode_span
from whisper_at_cli.extract.errors import AudioError, MissingAudioError

if TYPE_CHECKING:
    from av.container import InputContainer

SUFFIXES = frozenset(  # of files that a folder is searched for
    ".wav .flac .ogg .oga .opus .mp3 .m4a .aac .mp4 .webm .mka .mkv .aif .aiff .aifc .au .wma .amr .caf .w64".split()
)
WAV_PROBE_BYTES = 16384  # enough to tell what is in a WAV file; FFmpeg's own 5 MB cost more than decoding 5 s
HEAD_BYTES = 1024
PLAYLISTS = (b"#EXTM3U", b"ffconcat", b"<MPD")  # FFmpeg would open whatever files these name

Source = Path | bytes  # a file, or what one holds


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

    With `start` in seconds, decoding begins there; with `max_seconds`, it stops so much later. Raises AudioError for
    whatever is not a whole, readable audio file, MissingAudioError (a kind of it) where there is no such file.
    """
    source = Path(source) if isinstance(source, str) else source
    most = math.inf if max_seconds is None else max_seconds
    options = _options(source, _head(source))
    with _decoding_errors():
        if start > 0:
            first = round(start * SAMPLE_RATE)
            samples = decode_span(lambda: _opened(source, options), source, first, round(most * SAMPLE_RATE))
        else:
            with _opened(source, options) as container:
                samples = decode_stream(container, most)
                if len(samples) < most * SAMPLE_RATE - 1:
                    refuse_truncated(source, container, len(samples) / SAMPLE_RATE)
    if not len(samples):
        raise AudioError(f"it holds no samples from {start:g} s on" if start > 0 else "it holds no samples")
    return samples


def load_clip(source: str | Source, samples: int, *, start: float | None = None, end: float | None = None) -> ClipAudio:
    """A clip of exactly `samples` samples, cut or zero-padded.

    With `start` or `end`, in seconds, it is cut from that part of the file.
    """
    start = start or 0.0
    wanted = samples if end is None else min(samples, max(1, round(end * SAMPLE_RATE) - round(start * SAMPLE_RATE)))
    decoded = decode_int16(source, start=start, max_seconds=wanted / SAMPLE_RATE)[:wanted]
    return ClipAudio(_padded(decoded, samples), len(decoded))


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
    source = Path(source) if isinstance(source, str) else source
    options = _options(source, _head(source))
    with _decoding_errors(), _opened(source, options) as container:
        return seconds_of(source, container)


def _head(source: Source) -> bytes:
    """The first bytes of a file. Looked at before FFmpeg opens it: a FIFO would hang, and FFmpeg names no reasons.

    Raises AudioError, or MissingAudioError where there is no such file.
    """
    if isinstance(source, bytes):
        if not source:
            raise AudioError("it is empty (0 bytes)")
        return source[:HEAD_BYTES]
    try:
        status = source.stat()
        if not stat.S_ISREG(status.st_mode):
            raise AudioError("it is not a file")
        if status.st_size == 0:
            raise AudioError("it is empty (0 bytes)")
        with open(source, "rb", buffering=0) as file:
            return file.read(HEAD_BYTES)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MissingAudioError(error.strerror or str(error)) from error
    except OSError as error:
        raise AudioError(f"it cannot be read: {error.strerror}") from error
    except ValueError as error:  # a NUL or half a character
        raise AudioError(f"its name cannot be that of a file ({error})") from error


def _options(source: Source, head: bytes) -> dict[str, str]:
    """For FFmpeg's demuxer: nothing but this file is opened, and no long look into plain PCM."""
    if any(mark in head for mark in PLAYLISTS):
        raise AudioError("it is a playlist, not audio")
    if head[:4] == b"RIFF":
        refuse_huge_chunks(source)
    look = {"probesize": str(WAV_PROBE_BYTES)} if head[:4] == b"RIFF" else {}
    return {"protocol_whitelist": "file"} | look


@contextlib.contextmanager
def _opened(source: Source, options: dict[str, str]) -> Iterator[InputContainer]:
    """FFmpeg's container of a file that holds audio."""
    import av

    with contextlib.ExitStack() as stack:
        if isinstance(source, bytes):
            file: str | BinaryIO = io.BytesIO(source)
        elif (name := str(source)).isprintable() or name.encode("utf-8", "ignore").decode() == name:
            file = f"file:{source}"  # "file:" so that no name is taken for a protocol
        else:  # a name that is not text
            file = stack.enter_context(open(source, "rb"))
        container = stack.enter_context(av.open(file, mode="r", metadata_errors="ignore", options=options))
        if not container.streams.audio:
            raise AudioError("it holds no audio")
        if container.streams.audio[0].codec_context is None:
            raise AudioError("it cannot be decoded: its audio has a codec that FFmpeg does not know")
        yield container


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
