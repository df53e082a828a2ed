"""Whether FFmpeg's libraries decode what people have, and how fast: one synthetic sound through several containers."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, cast

import numpy as np

from whisper_at_cli.extract.audio import SAMPLE_RATE
from whisper_at_cli.extract.audio.decode import decode
from whisper_at_cli.extract.datasets.synthesis import SAMPLE_RATE as SOUND_RATE
from whisper_at_cli.extract.datasets.synthesis import synthesise_clip
from whisper_at_cli.extract.errors import AudioError

if TYPE_CHECKING:
    from av import AudioFormat, AudioStream

CLIP_SECONDS = 10.0
CONTAINERS = {  # name: FFmpeg's format, codec, rate; stereo, as most recordings come
    "wav": ("wav", "pcm_s16le", 44100),
    "flac": ("flac", "flac", 44100),
    "mp3": ("mp3", "libmp3lame", 44100),
    "m4a": ("ipod", "aac", 44100),
    "opus": ("ogg", "libopus", 48000),
}
LEVEL_KEPT = 0.7  # of the sound's level that must come back
PADDING_SECONDS = 0.15  # that a lossy codec may add or lose


@dataclass(frozen=True)
class Decoded:
    """One container: ok, not tried (this FFmpeg cannot write it, so there was nothing to read), or failed."""

    container: str
    state: str
    clips_per_second_per_core: float | None = None
    error: str = ""


@dataclass(frozen=True)
class Decoding:
    pyav: str
    ffmpeg: str
    libraries: dict[str, str]
    clip_seconds: float
    containers: tuple[Decoded, ...]


def check_decoding(*, seconds: float, progress: Callable[[str], None] | None = None) -> Decoding:
    """Decode a clip of 10 s in each container, over and over for `seconds`; 0 decodes each once, without a rate."""
    import av

    sound = synthesise_clip("rain", 0, seconds=CLIP_SECONDS)
    found = []
    for name in CONTAINERS:
        if progress:
            progress(f"decoding: {name}")
        found.append(_check(name, sound, seconds))
    return Decoding(
        pyav=av.__version__,
        ffmpeg=str(getattr(av, "ffmpeg_version_info", "unknown")),
        libraries={name: ".".join(map(str, version)) for name, version in av.library_versions.items()},
        clip_seconds=CLIP_SECONDS,
        containers=tuple(found),
    )


def _check(name: str, sound: np.ndarray, seconds: float) -> Decoded:
    import av

    try:
        encoded = _encoded(sound, *CONTAINERS[name])
    except (av.FFmpegError, ValueError) as error:
        return Decoded(name, "not tried", error=f"this FFmpeg cannot write it: {error}")
    try:
        if complaint := _complaint(decode(encoded), sound):
            return Decoded(name, "failed", error=complaint)
        count, started = 0, time.perf_counter()
        while time.perf_counter() - started < seconds:
            decode(encoded)
            count += 1
        rate = count / (time.perf_counter() - started) if count else None
    except AudioError as error:
        return Decoded(name, "failed", error=str(error))
    return Decoded(name, "ok", rate)


def _complaint(decoded: np.ndarray, sound: np.ndarray) -> str:
    """What is wrong with a decoded sound: its length or its level; empty where it is right."""
    heard = len(decoded) / SAMPLE_RATE
    if abs(heard - CLIP_SECONDS) > PADDING_SECONDS:
        return f"{heard:.2f} s came back of {CLIP_SECONDS:g} s"
    level = decoded.std() / (sound.std() / 32768)
    if not LEVEL_KEPT < level < 1 / LEVEL_KEPT:
        return f"the sound came back at {level:.2f} times its level"
    return ""


def _encoded(sound: np.ndarray, container: str, codec: str, rate: int) -> bytes:
    """What a file of this sound, (samples,) int16, holds."""
    import av

    file = io.BytesIO()
    with av.open(file, "w", format=container) as out:
        stream = cast("AudioStream", out.add_stream(codec, rate=rate, layout="stereo"))  # as each codec here makes
        sample_format = cast("AudioFormat | None", stream.codec_context.format)  # None where the codec takes any
        resampler = av.AudioResampler(
            format=sample_format or "s16", layout="stereo", rate=rate,
            frame_size=stream.codec_context.frame_size or None,
        )  # fmt: skip
        frame = av.AudioFrame.from_ndarray(np.stack([sound, sound], 1).reshape(1, -1), format="s16", layout="stereo")
        frame.sample_rate, frame.pts, frame.time_base = SOUND_RATE, 0, Fraction(1, SOUND_RATE)
        for part in (*resampler.resample(frame), *resampler.resample(None), None):
            out.mux(stream.encode(part))
    return file.getvalue()
