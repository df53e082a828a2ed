"""The audio track of a container, decoded as FFmpeg's program does: the same track, on past what cannot be decoded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from whisper_at_cli.extract.audio.wav import never_written
from whisper_at_cli.extract.errors import AudioError

if TYPE_CHECKING:
    from av import AudioFrame, Packet
    from av.audio.stream import AudioStream
    from av.container import InputContainer

DEFAULT_SCORE = 5_000_000  # what the program's choice adds to a track's number of channels
MP4 = "mov,mp4,m4a,3gp,3g2,mj2"
MATROSKA = "matroska,webm"
FROM_HEADER = ("avi", "flv")  # containers whose length FFmpeg never guesses
ONLY_PACKETS = ("aac", "ac3", "eac3", "dts")  # with nothing between them; MP3 files often have something
WITHOUT_GAPS = ("ogg", "flac", "asf")  # where every sample has its number, or nobody pauses
MOST_PADDING = 5  # frames of AAC that its encoder puts before and behind the sound
RESTART_SECONDS = 0.5  # a time stamp that goes back by so much begins another link of a chained file
MOST_RETRIES = 1000  # of a demuxer that says "try again"


class Track:
    """Decodes one container's audio, and keeps count. For one thread.

    Raises AudioError where there is no audio.
    """

    def __init__(self, container: InputContainer):
        self.container, self.stream = container, _chosen(container)
        if not self.stream.codec_context.is_open:
            self.stream.codec_context.thread_count = 1
        self.form = container.format.name
        self.codec = self.stream.codec_context.name
        self.tick = float(self.stream.time_base or 0)  # seconds; asked for once, since FFmpeg's fraction is slow
        # asked for while the container is open: what FFmpeg knows of a stream goes with it
        self.index, self.rate = self.stream.index, self.stream.codec_context.sample_rate or 0
        self.bytes_a_second = (self.stream.codec_context.bit_rate or 0) / 8
        self.declared = self._declared_seconds()
        self.first_byte: int | None = None  # of the first packet
        self.passed_over, self.passed_seconds = 0, 0.0  # packets that the decoder refused
        self.reason = ""  # for the first of them
        self.stopped = ""  # why the demuxer ended before the file did
        self.begins: float | None = None  # seconds, by the time stamp of the first frame that was decoded
        self.ends: float | None = None  # where the encoder's padding begins, if that is known
        self.last_time = 0.0  # where the last one ends
        self._since: float | None = None  # where the frames begin whose seconds are counted
        self._counted = 0.0
        self._skipped_bytes, self._packet_bytes, self._next_byte = 0, 0, 0

    @property
    def declared_is_short(self) -> bool:
        """Whether an MP4 file's header gives less than its frames are, beyond an encoder's padding."""
        codec = self.stream.codec_context
        if not (codec.frame_size and codec.sample_rate and self.stream.frames and self.declared):
            return False
        return (self.stream.frames - MOST_PADDING) * codec.frame_size / codec.sample_rate > self.declared

    def _declared_seconds(self) -> float | None:
        """The length that FFmpeg reads in the header; for Matroska the time at which the track ends."""
        if self.stream.duration and self.stream.duration > 0:
            seconds = self.stream.duration * self.tick
            speed = (self.stream.codec_context.bit_rate or 0) / 8 if self.codec.startswith("pcm_") else 0
            return None if speed and never_written(round(seconds * speed)) else seconds
        if self.form == MATROSKA or self.form in FROM_HEADER:
            if (tagged := _clock_seconds(self.stream.metadata.get("DURATION", ""))) is not None:
                return tagged
            if len(self.container.streams) == 1 and self.container.duration:  # a picture may last longer than its sound
                return self.container.duration / 1e6
        return None

    def packets(self) -> Iterator[Packet | None]:
        """The packets of the track, then None. An error of the demuxer ends them, as the end of the file does."""
        import av

        for _ in range(MOST_RETRIES):
            try:
                for packet in self.container.demux(self.stream):
                    if packet.size:
                        if self.first_byte is None:
                            self._look_at_first(packet)
                        yield packet
                break
            except av.BlockingIOError:
                continue
            except av.FFmpegError as error:
                self.stopped = error.strerror or str(error)
                self.reason = self.reason or self.stopped
                break
        yield None

    def _look_at_first(self, packet: Packet) -> None:
        self.first_byte = packet.pos
        edited = packet.pts is not None and packet.pts < 0  # an MP4 file with a list of edits: it says where audio ends
        if self.form == MP4 and edited and self.codec != "opus" and not self.declared_is_short:
            self.ends = self.declared

    def frames(self) -> Iterator[AudioFrame]:
        """All that can be decoded, from where the container stands."""
        import av

        decode = self.stream.codec_context.decode
        for packet in self.packets():
            try:
                frames = decode(packet)
            except av.EOFError:
                break
            except (av.FFmpegError, MemoryError) as error:
                self.passed_over += 1
                self.passed_seconds += (packet.duration or 0) * self.tick if packet else 0.0
                self.reason = self.reason or getattr(error, "strerror", "") or str(error)
                continue
            if packet and packet.pos is not None and self.form in ONLY_PACKETS:
                self._skipped_bytes += max(0, packet.pos - self._next_byte) if self._packet_bytes else 0
                self._packet_bytes += packet.size
                self._next_byte = packet.pos + packet.size
            for frame in frames:
                if timed := self._timed(frame):
                    yield timed

    def _timed(self, frame: AudioFrame) -> AudioFrame | None:
        """A frame without an encoder's padding; None where all of it is that."""
        pts, rate = frame.pts, frame.rate
        seconds = frame.samples / rate
        if pts is not None:
            begin = pts * self.tick
            if self.ends is not None and begin + seconds > self.ends:
                kept = round((self.ends - begin) * rate)
                if kept <= 0:
                    return None
                frame = cut(frame, kept) if kept < frame.samples else frame
                seconds = frame.samples / rate
            self.begins = begin if self.begins is None else self.begins
            if self._since is None or begin < self.last_time - RESTART_SECONDS:
                self._since, self._counted = begin, 0.0
            self.last_time = begin + seconds
        self._counted += seconds
        return frame

    @property
    def gap_seconds(self) -> float:
        """How much further the time stamps went than the samples."""
        return 0.0 if self._since is None else self.last_time - self._since - self._counted

    @property
    def skipped_seconds(self) -> float:
        """What the bytes between packets would have been, in containers that are nothing but packets."""
        return self._skipped_bytes * self._counted / self._packet_bytes if self._packet_bytes else 0.0

    def forget(self) -> None:
        """What was decoded until now is not part of what is asked for."""
        self.passed_over, self.passed_seconds, self._since, self._counted = 0, 0.0, None, 0.0
        self._skipped_bytes, self._packet_bytes = 0, 0


def _chosen(container: InputContainer) -> AudioStream:
    """The track that FFmpeg's program chooses where nobody chooses: a default one, of them one with most channels."""
    if not container.streams.audio:
        raise AudioError("it holds no audio")
    known = [stream for stream in container.streams.audio if _is_known(stream)]
    if not known:
        raise AudioError("it cannot be decoded: its audio has a codec that FFmpeg does not know")
    return max(known, key=lambda stream: DEFAULT_SCORE * bool(stream.disposition & 1) + stream.codec_context.channels)


def _is_known(stream: AudioStream) -> bool:
    return stream.codec_context is not None


def _clock_seconds(text: str) -> float | None:
    """ "00:01:02.5" in seconds; None for what is no such text."""
    try:
        hours, minutes, seconds = (float(part) for part in text.split(":"))
    except ValueError:
        return None
    return hours * 3600 + minutes * 60 + seconds


def cut(frame: AudioFrame, samples: int) -> AudioFrame:
    """The first samples of a frame."""
    import av

    width = samples * (frame.layout.nb_channels if frame.format.is_packed else 1)
    kept: np.ndarray = np.ascontiguousarray(frame.to_ndarray()[:, :width])
    shorter = av.AudioFrame.from_ndarray(kept, format=frame.format.name, layout=frame.layout.name)
    shorter.sample_rate, shorter.pts = frame.sample_rate, frame.pts
    return shorter
