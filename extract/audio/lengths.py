"""How long an audio file is without decoding it, and whether it holds as much as its own header promises."""

from __future__ import annotations

from typing import TYPE_CHECKING

from whisper_at_cli.extract.audio.mp3 import Mp3Index, Unindexable, mp3_index
from whisper_at_cli.extract.audio.opened import AudioFile, audio_stream
from whisper_at_cli.extract.errors import AudioError

if TYPE_CHECKING:
    from av.audio.stream import AudioStream
    from av.container import InputContainer

COUNTED = frozenset(("w64", "flac", "aiff", "au", "caf"))  # containers whose header counts the samples
TIMED = frozenset(("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "ogg"))  # whose header says a length, a little rounded
COUNTED_TOLERANCE_SECONDS = 0.05
TIMED_TOLERANCE_SECONDS = 0.5  # an encoder's delay and padding, and lengths rounded to a packet
OGG_PAGE_BYTES = 65307  # at most


def refuse_truncated(file: AudioFile, container: InputContainer, seconds: float) -> None:
    """Raise AudioError where the file's own header promises more audio than the `seconds` it holds."""
    form = container.format.name
    if form == "ogg" and not _ends_on_ogg_page(file):
        raise AudioError(f"it is truncated: it ends within an Ogg page, after {seconds:.2f} s")
    refuse_lacking(file)
    promised, tolerance = _promised_seconds(file, container)
    if promised is not None and seconds < promised - tolerance:
        raise AudioError(f"it is truncated: its header promises {promised:.2f} s, it holds {seconds:.2f} s")


def refuse_lacking(file: AudioFile) -> None:
    """Raise AudioError where a WAV file is shorter than its header says. FFmpeg takes what is there for the whole."""
    if file.riff and file.riff.lacking:
        raise AudioError(f"it is truncated: {file.riff.lacking} bytes of what its header promises are missing")


def seconds_of(file: AudioFile, container: InputContainer) -> tuple[float, bool]:
    """The length of an open file, and whether that is exact: from a header that can be trusted, else by its packets."""
    form, stream = container.format.name, audio_stream(container)
    if form == "mp3":
        try:
            index = _mp3_index(file, container)
            return index.total_samples() / index.rate, True
        except Unindexable:
            return _packet_seconds(container), False
    counted = form in COUNTED or (form == "wav" and stream.codec_context.name.startswith("pcm_"))
    if (counted or form in TIMED) and stream.duration and stream.duration > 0:
        return _seconds(stream.duration, stream), counted
    return _packet_seconds(container), False


def _promised_seconds(file: AudioFile, container: InputContainer) -> tuple[float | None, float]:
    """What the header says, None where it says nothing that must hold; and how far the audio may fall short of it."""
    form, stream = container.format.name, audio_stream(container)
    if form in COUNTED and stream.duration:
        return _seconds(stream.duration, stream), COUNTED_TOLERANCE_SECONDS
    if form in TIMED - {"ogg"} and len(container.streams) == 1:  # a picture may last longer than its sound
        if stream.duration:
            return _seconds(stream.duration, stream), TIMED_TOLERANCE_SECONDS
        return (container.duration or 0) / 1e6, TIMED_TOLERANCE_SECONDS
    if form == "mp3":
        try:
            index = _mp3_index(file, container)
        except Unindexable:
            return None, 0.0
        if index.tagged_frames is not None:
            return index.kept_samples / index.rate, TIMED_TOLERANCE_SECONDS
    return None, 0.0


def _seconds(ticks: int, stream: AudioStream) -> float:
    assert stream.time_base is not None, "FFmpeg gives a stream that it has opened a time base"
    return float(ticks * stream.time_base)


def _mp3_index(file: AudioFile, container: InputContainer) -> Mp3Index:
    """The index of an open MP3 file. Raises Unindexable."""
    stream = audio_stream(container)
    container.seek(0)
    packet = next(container.demux(stream), None)
    if packet is None or packet.pos is None:
        raise Unindexable
    return mp3_index(file, packet.pos)


def _packet_seconds(container: InputContainer) -> float:
    """The length by what each packet says of itself."""
    stream = audio_stream(container)
    container.seek(0)
    spans = [
        (packet.pts, packet.pts + (packet.duration or 0))
        for packet in container.demux(stream)
        if packet.pts is not None
    ]
    return _seconds(max(end for _, end in spans) - min(start for start, _ in spans), stream) if spans else 0.0


def _ends_on_ogg_page(file: AudioFile) -> bool:
    """Whether the last Ogg page in the file is whole."""
    tail = file.read(max(0, file.size - 2 * OGG_PAGE_BYTES), 2 * OGG_PAGE_BYTES)
    page = tail.rfind(b"OggS")
    if page < 0 or len(tail) < page + 27:
        return False
    segments = tail[page + 27 : page + 27 + tail[page + 26]]
    return len(segments) == tail[page + 26] and page + 27 + len(segments) + sum(segments) <= len(tail)
