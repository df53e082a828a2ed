"""How long an audio file is without decoding it, and whether it holds as much as its own header promises."""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from whisper_at_cli.extract.audio.mp3 import Mp3Index, Unindexable, mp3_index
from whisper_at_cli.extract.errors import AudioError

if TYPE_CHECKING:
    from av.audio.stream import AudioStream
    from av.container import InputContainer

COUNTED = frozenset(("w64", "flac", "aiff", "au", "caf"))  # containers whose header counts the samples
TIMED = frozenset(("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "ogg"))  # whose header says a length, a little rounded
COUNTED_TOLERANCE_SECONDS = 0.05
TIMED_TOLERANCE_SECONDS = 0.5  # an encoder's delay and padding, and lengths rounded to a packet
OGG_PAGE_BYTES = 65307  # at most
MOST_CHUNKS = 10_000  # of a RIFF file that are looked at
MOST_LACKING = 1 << 24  # bytes that a chunk other than the audio may lack

Source = Path | bytes


def refuse_truncated(source: Source, container: InputContainer, seconds: float) -> None:
    """Raise AudioError where the file's own header promises more audio than the `seconds` it holds."""
    form = container.format.name
    if form == "ogg" and not _ends_on_ogg_page(source):
        raise AudioError(f"it is truncated: it ends within an Ogg page, after {seconds:.2f} s")
    if form == "wav" and (lacking := _lacking_wav_bytes(source)):
        raise AudioError(f"it is truncated: {lacking} bytes of what its header promises are missing")
    promised, tolerance = _promised_seconds(source, container)
    if promised is not None and seconds < promised - tolerance:
        raise AudioError(f"it is truncated: its header promises {promised:.2f} s, it holds {seconds:.2f} s")


def seconds_of(source: Source, container: InputContainer) -> tuple[float, bool]:
    """The length of an open file, and whether that is exact: from a header that can be trusted, else by its packets."""
    form, stream = container.format.name, container.streams.audio[0]
    if form == "mp3":
        try:
            index = _mp3_index(source, container)
            return index.total_samples() / index.rate, True
        except Unindexable:
            return _packet_seconds(container), False
    counted = form in COUNTED or (form == "wav" and stream.codec_context.name.startswith("pcm_"))
    if (counted or form in TIMED) and stream.duration and stream.duration > 0:
        return _seconds(stream.duration, stream), counted
    return _packet_seconds(container), False


def _promised_seconds(source: Source, container: InputContainer) -> tuple[float | None, float]:
    """What the header says, None where it says nothing that must hold; and how far the audio may fall short of it."""
    form, stream = container.format.name, container.streams.audio[0]
    if form in COUNTED and stream.duration:
        return _seconds(stream.duration, stream), COUNTED_TOLERANCE_SECONDS
    if form in TIMED - {"ogg"} and len(container.streams) == 1:  # a picture may last longer than its sound
        if stream.duration:
            return _seconds(stream.duration, stream), TIMED_TOLERANCE_SECONDS
        return (container.duration or 0) / 1e6, TIMED_TOLERANCE_SECONDS
    if form == "mp3":
        try:
            index = _mp3_index(source, container)
        except Unindexable:
            return None, 0.0
        if index.tagged_frames is not None:
            return index.kept_samples / index.rate, TIMED_TOLERANCE_SECONDS
    return None, 0.0


def _seconds(ticks: int, stream: AudioStream) -> float:
    assert stream.time_base is not None, "FFmpeg gives a stream that it has opened a time base"
    return float(ticks * stream.time_base)


def _mp3_index(source: Source, container: InputContainer) -> Mp3Index:
    """The index of an open MP3 file. Raises Unindexable."""
    stream = container.streams.audio[0]
    container.seek(0)
    packet = next(container.demux(stream), None)
    if packet is None or packet.pos is None:
        raise Unindexable
    return mp3_index(source, packet.pos)


def _packet_seconds(container: InputContainer) -> float:
    """The length by what each packet says of itself."""
    stream = container.streams.audio[0]
    container.seek(0)
    spans = [
        (packet.pts, packet.pts + (packet.duration or 0))
        for packet in container.demux(stream)
        if packet.pts is not None
    ]
    return _seconds(max(end for _, end in spans) - min(start for start, _ in spans), stream) if spans else 0.0


def _open(source: Source) -> BinaryIO:
    return io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb")


def _lacking_wav_bytes(source: Source) -> int:
    """How many bytes the data chunk of a RIFF file lacks. FFmpeg takes what is there for the whole."""
    for name, length, left in _riff_chunks(source):
        if name == b"data":
            unknown = length in (0, 0xFFFFFFFF)  # written to a pipe: the header never learned the length
            return 0 if unknown else max(0, length - left)
    return 0


def refuse_huge_chunks(source: Source) -> None:
    """Raise AudioError where a chunk of a RIFF file is far larger than the file, for which FFmpeg would make room, or
    where there are more chunks than any has."""
    for number, (name, length, left) in enumerate(_riff_chunks(source), start=1):
        if number == MOST_CHUNKS:
            raise AudioError(f"it is damaged: it has more than {MOST_CHUNKS - 1} chunks")
        if name != b"data" and length > left + MOST_LACKING:
            raise AudioError(f"it is damaged: its chunk {name!r} says {length} bytes, and {left} are left of the file")


def _riff_chunks(source: Source) -> Iterator[tuple[bytes, int, int]]:
    """Name and length of each chunk of a RIFF file, and how many bytes there are from its content on."""
    with _open(source) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        if file.read(4) != b"RIFF":
            return
        at, number = 12, 0
        while at + 8 <= size and number < MOST_CHUNKS:
            file.seek(at)
            name, length = struct.unpack("<4sI", file.read(8))
            yield name, length, size - at - 8
            at, number = at + 8 + length + length % 2, number + 1


def _ends_on_ogg_page(source: Source) -> bool:
    """Whether the last Ogg page in the file is whole."""
    with _open(source) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 2 * OGG_PAGE_BYTES))
        tail = file.read()
    page = tail.rfind(b"OggS")
    if page < 0 or len(tail) < page + 27:
        return False
    segments = tail[page + 27 : page + 27 + tail[page + 26]]
    return len(segments) == tail[page + 26] and page + 27 + len(segments) + sum(segments) <= len(tail)
