"""A part of an audio file: the samples that decoding the whole file gives there, without decoding all before it.

Three things make them the same. Decoding begins early enough for a decoder that carries something over from what came
before. The resampler begins at a sample of the source that falls on a sample of the output, so that both grids lie as
in the whole file, and early enough to have its history. And where a frame lies is never guessed: FFmpeg's time stamps
are used only in containers where they count samples; MP3 frames are counted one by one; all else is decoded from its
start, which is slower and as right.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np

from whisper_at_cli.extract.audio import SAMPLE_RATE
from whisper_at_cli.extract.audio.lengths import has_gaps, ogg_of
from whisper_at_cli.extract.audio.mp3 import Mp3Index, Unindexable, mp3_index
from whisper_at_cli.extract.audio.opened import AudioFile
from whisper_at_cli.extract.audio.resample import (
    RESAMPLER_SECONDS,
    FormChangesError,
    decode_frames,
    form_of,
    resampler_of,
)
from whisper_at_cli.extract.audio.track import MP4, Track, cut
from whisper_at_cli.extract.audio.wav import Plain, Read

if TYPE_CHECKING:
    from fractions import Fraction

    from av import AudioFrame
    from av.audio.codeccontext import AudioCodecContext

COUNTED = frozenset(("wav", "w64", "flac", "aiff", "au", "caf", "ogg", "mov,mp4,m4a,3gp,3g2,mj2"))  # time stamps do
STATELESS = ("pcm_", "flac", "alac")  # codecs whose packets stand alone
DECODER_SECONDS = 1.0  # decoded before, for codecs that carry something over
MP3_FRAMES_BEFORE = 96  # looked at: a frame may lean on 511 bytes of those before it, which can be as short as 24
MP3_BYTES_BEFORE, MP3_FRAME_OVERHEAD, MP3_OVERLAP = 512, 40, 4  # of them decoded: so many bytes, and a few frames more

LONGEST_SECONDS = 1e7  # what "all of it" is taken for
HOLE_SECONDS = 0.05  # between time stamps and samples: more than single time stamps are off
PLAIN_BLOCK = 1 << 14  # samples that go to the resampler at a time

Numbered = Iterator[tuple[int, "AudioFrame"]]  # number of its first sample within the whole file, and a frame


class _Inexact(Exception):
    """What was tried cannot say exactly where it is in the file."""


class _Span(NamedTuple):
    """Samples `first` to `first + wanted` at 16 kHz, and those of the source that they are made from."""

    first: int
    wanted: int
    rate: int  # of the source

    @property
    def begin(self) -> int:
        """A sample of the source that falls on a sample of the output, early enough for the resampler's history."""
        step = self.rate // math.gcd(self.rate, SAMPLE_RATE)
        return max(0, int((self.first / SAMPLE_RATE - RESAMPLER_SECONDS) * self.rate)) // step * step

    @property
    def enough(self) -> float:
        return ((self.first + self.wanted) / SAMPLE_RATE + RESAMPLER_SECONDS) * self.rate


def decode_span(file: AudioFile, start: float, most: float) -> tuple[np.ndarray, Track | None]:
    """int16 samples at 16 kHz of the whole file, from `start` on and at most `most` seconds; fewer at its end.

    And what decoded them, for its account of damage; None where nothing could be damaged.
    """
    first, count = round(start * SAMPLE_RATE), round(min(most, LONGEST_SECONDS) * SAMPLE_RATE)
    if file.riff and (plain := file.riff.plain):
        if (plain.rate, plain.channels) == (SAMPLE_RATE, 1):
            return plain.samples(file.read, first, count)[:, 0], None
        span = _Span(first, count, plain.rate)
        return _resampled(_plain_frames(file.read, plain, span.begin), span, "pcm_s16le"), None
    for frames_from in (_by_count, _from_start):
        with file.container() as container:
            track = Track(container)
            try:
                span = _Span(first, count, track.stream.codec_context.sample_rate or SAMPLE_RATE)
                samples = _resampled(frames_from(file, track, span), span, track.codec)
                if frames_from is _by_count and (track.passed_over or track.gap_seconds > HOLE_SECONDS):
                    continue  # time stamps count what is not there
                return samples, track  # noqa: TRY300
            except (_Inexact, Unindexable):
                continue
    samples, track = decode_whole(file, start + most, changing=True)
    return samples[first : first + count], track


def decode_whole(file: AudioFile, most: float, *, changing: bool = False) -> tuple[np.ndarray, Track]:
    """int16 samples at 16 kHz of `most` seconds from the start on or a little more, and what decoded them."""
    try:
        with file.container() as container:
            track = Track(container)
            return decode_frames(track.codec, track.frames(), most, changing=changing), track
    except FormChangesError:
        return decode_whole(file, most, changing=True)


def _resampled(frames: Numbered, span: _Span, codec: str) -> np.ndarray:
    """The samples of a span, from frames that begin before it without a gap. Raises _Inexact for others."""
    resampler, form, following, begin = None, None, 0, span.begin
    for number, frame in frames:
        if resampler is None:
            if number > begin or frame.rate != span.rate:
                raise _Inexact
            resampler, form = resampler_of(frame, codec, skip=begin - number), form_of(frame)
        elif form_of(frame) != form or number != following:
            raise _Inexact
        resampler.push(frame)
        following = number + frame.samples
        if following >= span.enough:
            break
    pieces = resampler.finish() if resampler else []
    offset = span.first - begin * SAMPLE_RATE // span.rate
    return np.concatenate(pieces)[offset : offset + span.wanted] if pieces else np.zeros(0, dtype=np.int16)


def _plain_frames(read: Read, plain: Plain, begin: int) -> Numbered:
    import av

    layout = ("mono", "stereo")[plain.channels - 1]
    for number in range(begin, plain.length, PLAIN_BLOCK):
        samples = plain.samples(read, number, PLAIN_BLOCK)
        if not len(samples):
            return
        frame = av.AudioFrame.from_ndarray(samples.reshape(1, -1), format="s16", layout=layout)
        frame.sample_rate = plain.rate
        yield number, frame


def _by_count(file: AudioFile, track: Track, span: _Span) -> Numbered:
    """Frames from `begin` on or a little before, found without decoding the file up to there."""
    if track.form == "mp3":
        return _mp3_frames(file, track, span)
    if track.form not in COUNTED or (track.form == MP4 and has_gaps(track)):
        raise _Inexact
    if track.form == "ogg" and ((ogg := ogg_of(file)) is None or ogg.links > 1 or ogg.damaged):
        raise _Inexact  # its time stamps begin anew, or go further than its samples
    return _sought_frames(track, span.begin)


def _sought_frames(track: Track, begin: int) -> Numbered:
    """Frames from FFmpeg's seek. Where block sizes vary (Vorbis), single time stamps are off: most of them decide."""
    import av

    stream = track.stream
    rate, tick = stream.codec_context.sample_rate, stream.time_base
    start = next(track.frames(), None)
    origin = None if start is None else start.pts
    before = 0 if stream.codec_context.name.startswith(STATELESS) else round(DECODER_SECONDS * rate)
    if origin is None or tick is None or (1 / tick) % rate or begin <= before:
        raise _Inexact  # its time stamps do not count samples; or it is near enough to the start
    try:
        track.container.seek(origin + int((begin - before) / rate / tick), stream=stream, backward=True)
    except av.FFmpegError as error:  # its end lies elsewhere than its header says
        raise _Inexact from error
    waiting: list[tuple[int, AudioFrame]] = []
    offsets: Counter[Fraction] = Counter()
    counted = 0
    track.forget()
    frames = track.frames()
    for frame in frames:
        if frame.pts is None:
            raise _Inexact
        offsets[(frame.pts - origin) * tick * rate - counted] += 1
        waiting.append((counted, frame))
        counted += frame.samples
        if offsets.most_common(1)[0][0] + counted > begin + before:
            break
    if not waiting:
        return
    offset, votes = offsets.most_common(1)[0]
    if offset.denominator != 1 or votes <= len(waiting) / 2:
        raise _Inexact
    yield from ((int(offset) + at, frame) for at, frame in waiting if offset + at + frame.samples > begin)
    for frame in frames:
        yield int(offset) + counted, frame
        counted += frame.samples


def _mp3_frames(file: AudioFile, track: Track, span: _Span) -> Numbered:
    import av

    stream = track.stream
    next(track.packets())
    if track.first_byte is None:
        raise _Inexact
    index, begin = mp3_index(file, track.first_byte), span.begin
    ahead = round(
        (stream.start_time or 0) * (stream.time_base or 0) * index.rate
    )  # the encoder's delay, which FFmpeg leaves off
    if index.rate != stream.codec_context.sample_rate:
        raise _Inexact
    target = (begin + ahead) // index.samples
    number = max(0, target - MP3_FRAMES_BEFORE)
    last = math.ceil((span.enough + ahead) / index.samples) + 1
    codec = cast("AudioCodecContext", av.CodecContext.create(stream.codec_context.name, "r"))
    end = _mp3_end(index, last)
    packets = list(index.packets(number, last - number))
    skipped = _not_leant_on(packets[: target - number])
    for at, data in enumerate(packets[skipped:], start=number + skipped):
        first = at * index.samples - ahead
        if first >= end:
            return
        try:
            frames = codec.decode(av.Packet(data))
        except av.FFmpegError as error:
            if first + index.samples > begin:
                raise _Inexact from error
            continue  # it leans on frames that lie before the first that was read
        if first + index.samples <= begin:
            continue
        if first < 0 or len(frames) != 1:
            raise _Inexact  # it begins within a frame
        yield first, frames[0] if first + index.samples <= end else cut(frames[0], int(end) - first)


def _not_leant_on(packets: list[bytes]) -> int:
    """How many of the first of these frames the frame after them has no need of."""
    lent = 0
    for before, packet in enumerate(reversed(packets), start=1):
        lent += max(0, len(packet) - MP3_FRAME_OVERHEAD)
        if lent >= MP3_BYTES_BEFORE:
            return max(0, len(packets) - before - MP3_OVERLAP)
    return 0


def _mp3_end(index: Mp3Index, last: int) -> float:
    """Samples after which the file ends, where that is before frame `last`."""
    if index.count(last) < last or (index.tagged_frames is not None and last > index.tagged_frames):
        return index.total_samples()
    return math.inf


def _from_start(_file: AudioFile, track: Track, span: _Span) -> Numbered:
    """Frames that hold where a span begins and what follows it; all before it are decoded too."""
    number, form = 0, None
    for frame in track.frames():
        if form not in (None, form := form_of(frame)):
            raise _Inexact
        if number + frame.samples > span.begin:
            yield number, frame
        else:
            track.forget()
        number += frame.samples
