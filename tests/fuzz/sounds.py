"""Audio files: heads and bodies of WAV, FLAC, MP3, Ogg and MP4 through their length, a whole read and parts."""

from __future__ import annotations

import io
import random
import struct
from pathlib import Path

import av
import mutate
import numpy as np
from engine import Files, Reader

from whisper_at_cli.extract.audio.decode import audio_seconds, load_clip
from whisper_at_cli.extract.errors import AudioError

RATE, SECONDS = 16000, 0.4
ENCODERS = {"flac": "flac", "mp3": "libmp3lame", "ogg": "libopus", "mp4": "aac", "wav": "pcm_s16le"}


def seeds(folder: Path) -> list[Files]:
    tone = (np.sin(np.arange(round(RATE * SECONDS)) * 0.2) * 9000).astype(np.int16)
    found = [{f"a.{name}": _encoded(tone, name, codec)} for name, codec in ENCODERS.items()]
    return [*found, {"a.wav": _wav(tone.astype("<f4") / 32768, 3, 32)}, {"a.wav": _wav(tone.view(np.uint8), 1, 8)}]


def _encoded(tone: np.ndarray, name: str, codec: str) -> bytes:
    held = io.BytesIO()
    with av.open(held, "w", format=name) as container:
        stream = container.add_stream(codec, rate=RATE, layout="mono")
        frame = av.AudioFrame.from_ndarray(tone[None], format="s16", layout="mono")
        frame.sample_rate = RATE
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return held.getvalue()


def _wav(samples: np.ndarray, kind: int, bits: int) -> bytes:
    data, width = samples.tobytes(), bits // 8
    head = struct.pack("<4sIHHIIHH", b"fmt ", 16, kind, 1, RATE, RATE * width, width, bits)
    return b"RIFF" + struct.pack("<I", 36 + len(data)) + b"WAVE" + head + b"data" + struct.pack("<I", len(data)) + data


def change(files: Files, rng: random.Random, other: Files) -> Files:
    ((name, data),) = files.items()
    return {name: mutate.change_bytes(data, rng, next(iter(other.values())))}


def read(folder: Path) -> str:
    """Its length, a clip from its beginning, and one from its middle; each may be refused without the others."""
    (path,) = folder.iterdir()
    found, refused = [], None
    for ask in (
        lambda: audio_seconds(path), lambda: load_clip(path, RATE // 2), lambda: load_clip(path, RATE // 10, start=0.2),
    ):  # fmt: skip
        try:
            found.append(ask())
        except AudioError as error:
            refused = error
    for clip, real, _ in found[1:] if found and isinstance(found[0][0], float) else found:
        assert np.isfinite(clip).all() and 0 < real <= len(clip)
    if refused:
        raise refused
    return path.suffix


READER = Reader("sounds", seeds, change, read)
