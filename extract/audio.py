"""Decoding: any container FFmpeg reads -> 16 kHz mono float32, cut or zero-padded to the clip's length.

Decoding and resampling are FFmpeg's own, through its libraries and in this process, with the settings of Whisper's
loader (`ffmpeg -ac 1 -acodec pcm_s16le -ar 16000`), so that the samples are the same without a process per file.
"""

from __future__ import annotations

import math
import os
import stat
import struct
from fractions import Fraction
from pathlib import Path

import numpy as np

from whisper_at_cli.extract.errors import AudioError
from whisper_at_cli.extract.mel import SAMPLE_RATE

SUFFIXES = frozenset(  # of files that a folder is searched for
    ".wav .flac .ogg .oga .opus .mp3 .m4a .aac .mp4 .webm .mka .mkv .aif .aiff .aifc .au .wma .amr .caf .w64".split()
)
EXACT_LENGTH = frozenset(("w64", "flac", "aiff", "au", "caf"))  # containers whose header counts the samples
LENGTH_TOLERANCE_SECONDS = 0.05
RESAMPLER_SECONDS = 0.25  # decoded beyond what is asked for, so that the resampler's end lies behind it
WAV_PROBE_BYTES = 16384  # enough to tell what is in a WAV file; FFmpeg's own 5 MB cost more than decoding 5 s


def decode(path: str | Path, *, max_seconds: float | None = None) -> np.ndarray:
    """The samples of an audio file: (samples,) float32 in [-1, 1) at 16 kHz, channels mixed to one.

    With `max_seconds`, decoding stops there. Raises AudioError for whatever is not a whole, readable audio file.
    """
    path = Path(path)
    _refuse_what_is_no_file(path)
    import av

    try:
        # "file:" so that no name is taken for a protocol
        with av.open(f"file:{path}", metadata_errors="ignore", options=_options(path)) as container:
            if not container.streams.audio:
                raise AudioError("it holds no audio")
            samples = _decode_stream(container, math.inf if max_seconds is None else max_seconds)
            if max_seconds is None or len(samples) < round(max_seconds * SAMPLE_RATE):
                _refuse_truncated(path, container, len(samples) / SAMPLE_RATE)
    except av.EOFError as error:
        raise AudioError("it is truncated: it ends before its audio does") from error
    except av.FFmpegError as error:
        raise AudioError(f"it cannot be decoded: {error.strerror or error}") from error
    except (ValueError, IndexError, MemoryError) as error:
        raise AudioError(f"it cannot be decoded: {error}") from error
    if not len(samples):
        raise AudioError("it holds no samples")
    return samples.astype(np.float32) / 32768.0


def _options(path: Path) -> dict[str, str]:
    """For FFmpeg's demuxer: nothing but files for what a playlist names, and no long look into plain PCM."""
    look = {"probesize": str(WAV_PROBE_BYTES)} if path.suffix.lower() == ".wav" else {}
    return {"protocol_whitelist": "file"} | look


def load_clip(path: str | Path, samples: int) -> tuple[np.ndarray, int]:
    """A clip of exactly `samples` samples, (samples,) float32, cut or zero-padded; and how many of them are real."""
    decoded = decode(path, max_seconds=samples / SAMPLE_RATE)[:samples]
    if len(decoded) == samples:
        return decoded, samples
    clip = np.zeros(samples, dtype=np.float32)
    clip[: len(decoded)] = decoded
    return clip, len(decoded)


def _refuse_what_is_no_file(path: Path) -> None:
    """Looked at before FFmpeg opens it: a FIFO would hang, and its own messages name none of these."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise AudioError(f"it cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        raise AudioError("it is not a file")
    if status.st_size == 0:
        raise AudioError("it is empty (0 bytes)")
    if not os.access(path, os.R_OK):
        raise AudioError("it cannot be read: Permission denied")


def _decode_stream(container, max_seconds: float) -> np.ndarray:
    """int16 samples at 16 kHz mono, of all of the stream or of a little more than `max_seconds`."""
    pieces, resampler, seconds = [], None, 0.0
    for frame in container.decode(audio=0):
        form = (frame.format.name, frame.layout.nb_channels, frame.rate)
        if resampler is None or resampler.form != form:  # a stream may change its form on the way
            pieces += resampler.finish() if resampler else []
            resampler = _Resampler(frame, form)
        resampler.push(frame)
        seconds += frame.samples / frame.rate
        if seconds > max_seconds + RESAMPLER_SECONDS:
            break
    pieces += resampler.finish() if resampler else []
    return np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int16)


class _Resampler:
    """FFmpeg's resampler and mixer for frames of one form, with large pieces coming out."""

    def __init__(self, frame, form: tuple[str, int, int]):
        import av

        self.form = form
        layout = frame.layout.name
        if layout.endswith(" channels"):  # the file does not say which; FFmpeg's default for their number
            try:
                layout = av.AudioLayout(f"{form[1]}c").name
            except ValueError as error:
                raise AudioError(f"it has {form[1]} channels and does not say what they are") from error
        self.graph = graph = av.filter.Graph()  # kept: what it holds goes with it
        self.source = graph.add_abuffer(
            sample_rate=form[2], format=form[0], layout=layout, time_base=Fraction(1, form[2])
        )
        self.sink = graph.add("abuffersink")
        last = self.source
        for name, arguments in (
            ("aresample", str(SAMPLE_RATE)),
            ("aformat", "sample_fmts=s16:channel_layouts=mono"),
            ("asetnsamples", f"n={SAMPLE_RATE}:p=0"),
        ):
            following = graph.add(name, arguments)
            last.link_to(following)
            last = following
        last.link_to(self.sink)
        graph.configure()

    def push(self, frame) -> None:
        self.source.push(frame)

    def finish(self) -> list[np.ndarray]:
        """All that was resampled."""
        import av

        self.source.push(None)
        pieces = []
        while True:
            try:
                pieces.append(self.sink.pull().to_ndarray()[0])
            except (av.EOFError, av.BlockingIOError):
                return pieces


def _refuse_truncated(path: Path, container, seconds: float) -> None:
    """Raise AudioError where the file's own header promises more audio than it holds."""
    form = container.format.name
    if form == "ogg" and not _ends_on_ogg_page(path):
        raise AudioError(f"it is truncated: it ends within an Ogg page, after {seconds:.2f} s")
    if form == "wav" and (lacking := _lacking_wav_bytes(path)):
        raise AudioError(f"it is truncated: {lacking} bytes of what its header promises are missing")
    stream = container.streams.audio[0]
    if form in EXACT_LENGTH and stream.duration:
        promised = float(stream.duration * stream.time_base)
        if seconds < promised - LENGTH_TOLERANCE_SECONDS:
            raise AudioError(f"it is truncated: its header promises {promised:.2f} s, it holds {seconds:.2f} s")


def _lacking_wav_bytes(path: Path) -> int:
    """How many bytes the data chunk of a RIFF file lacks. FFmpeg takes what is there for the whole."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        if file.read(4) != b"RIFF":
            return 0
        at = 12
        while at + 8 <= size:
            file.seek(at)
            name, length = struct.unpack("<4sI", file.read(8))
            if name == b"data":
                unknown = length in (0, 0xFFFFFFFF)  # written to a pipe: the header never learned the length
                return 0 if unknown else max(0, at + 8 + length - size)
            at += 8 + length + length % 2
    return 0


def _ends_on_ogg_page(path: Path) -> bool:
    """Whether the last Ogg page in the file is whole."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        file.seek(max(0, size - 131072))  # a page is at most 65307 bytes
        tail = file.read()
    page = tail.rfind(b"OggS")
    if page < 0 or len(tail) < page + 27:
        return False
    segments = tail[page + 27 : page + 27 + tail[page + 26]]
    return len(segments) == tail[page + 26] and page + 27 + len(segments) + sum(segments) <= len(tail)
