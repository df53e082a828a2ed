"""Sounds of benchmarks: files of noise in several containers, and noise that needs no decoding.

Decoding processes import this module for `NoiseClip`, so it imports neither torch nor zarr.
"""

from __future__ import annotations

import wave
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from whisper_at_cli.extract.audio import SAMPLE_RATE
from whisper_at_cli.extract.audio.decode import ClipAudio

NOISES = 64  # different waveforms in memory
FORMATS = {  # suffix -> FFmpeg's encoder, its channels, and the sample rate; wav is written without FFmpeg
    "wav": ("", "mono", 16000),
    "flac": ("flac", "mono", 16000),
    "mp3": ("libmp3lame", "mono", 44100),
    "m4a": ("aac", "mono", 44100),
    "ogg": ("vorbis", "stereo", 44100),  # FFmpeg's own Vorbis encoder knows nothing but stereo
}
CHUNK = 4096  # samples in a frame for encoders that take any number


@dataclass(frozen=True, slots=True)
class NoiseClip:
    """A clip whose 16-bit audio is in the memory of whoever reads it: one of a few waveforms of noise."""

    number: int

    def read(self, samples: int) -> ClipAudio:
        return ClipAudio(_noises(samples)[self.number % NOISES], samples)


@lru_cache(maxsize=1)
def _noises(samples: int) -> np.ndarray:
    return np.random.default_rng(0).integers(-8192, 8192, size=(NOISES, samples), dtype=np.int16)


def noise(rng: np.random.Generator, seconds: float, rate: int = SAMPLE_RATE) -> np.ndarray:
    """Noise with a spectrum of its own, int16."""
    samples = np.convolve(rng.normal(size=round(seconds * rate)), rng.normal(size=32), mode="same")
    return (samples / np.abs(samples).max() * 20000).astype("<i2")


def write_sound(path: Path, rng: np.random.Generator, seconds: float) -> None:
    """A file of noise; its suffix says in which format."""
    codec, layout, rate = FORMATS[path.suffix.removeprefix(".")]
    samples = noise(rng, seconds, rate)
    if codec:
        _encode(path, samples, codec, layout, rate)
        return
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", ""))
        file.writeframes(samples.tobytes())


def _encode(path: Path, samples: np.ndarray, codec: str, layout: str, rate: int) -> None:
    import av

    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=rate, layout=layout, options={"strict": "experimental"})
        stream.codec_context.open()
        size = stream.codec_context.frame_size or CHUNK
        resampler = av.AudioResampler(format=stream.format, layout=layout, rate=rate, frame_size=size)
        whole = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
        whole.sample_rate = rate
        for frame in [*resampler.resample(whole), *resampler.resample(None)]:
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
