"""How long an audio file is without decoding it, and what it lacks of what its own header promises."""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict

from whisper_at_cli.extract import notes
from whisper_at_cli.extract.audio import matroska, whole
from whisper_at_cli.extract.audio.flac import end_of_frames
from whisper_at_cli.extract.audio.headers import asf_seconds, avi_seconds, data_of
from whisper_at_cli.extract.audio.mp3 import Unindexable, mp3_index, tagged_seconds
from whisper_at_cli.extract.audio.ogg import Ogg, read_ogg
from whisper_at_cli.extract.audio.opened import AudioFile
from whisper_at_cli.extract.audio.track import FROM_HEADER, MATROSKA, MP4, ONLY_PACKETS, WITHOUT_GAPS, Track
from whisper_at_cli.extract.errors import AudioError

UNSAID_SECONDS = 0.1  # that may be lost without a word: an encoder's delay and padding, lengths rounded to a packet
NOTED_SHARE = 0.1  # of what is promised; where more is lost, the clip fails
COUNTED = frozenset(("aiff", "au", "wv", "tta", "ape"))  # containers whose header counts the samples
GAP_SECONDS = 0.01  # between packets, more than times in milliseconds are rounded by
BY_DATA = ("w64", "caf", "voc")  # containers with a chunk of audio
ASF, AVI = "asf", "avi"
BY_TIME = (MATROSKA, ASF, *FROM_HEADER)  # containers that say when their audio ends, and whose packets have times
COUNTABLE = (  # containers whose packets say how long they are
    *BY_TIME, *ONLY_PACKETS, MP4, "ogg", "mp3", "flac", "wav", "amr", "mpegts", "mpeg", "aiff", "au", "caf", "w64",
    "voc", "wv", "tta", "ape", "sox", "nut", "nistsphere",
)  # fmt: skip
IS_WHOLE = {MATROSKA: matroska.is_whole, "flv": whole.flv_is_whole, "mpegts": whole.mpegts_is_whole}
KEPT_OGGS = 64  # files whose pages are remembered, for the parts of them


def loss_note(file: AudioFile, track: Track | None, start: float, held: float, wanted: float) -> str:
    """What is to be said of `held` seconds that were read from `start` on, where `wanted` were asked for.

    Raises AudioError where more than a tenth of what the file promises there is lost.
    """
    short = held < wanted - 1e-4
    end = _cut_end(file, track, start + held) if short and track and track.form == "flac" else None
    missing = _missing_at_end(file, track, start + held, end) if short else 0.0
    missing = min(missing, wanted - held)
    damaged, gap = _lost_on_the_way(file, track) if track else (0.0, 0.0)
    lost = max(missing, damaged)
    ogg = ogg_of(file) if short and track and track.form == "ogg" else None
    said = [notes.FLAC_CUT(promised=track.declared, end=end)] if track and end is not None else []
    if lost > UNSAID_SECONDS:
        promised = held + lost
        if track and track.passed_over and not held and damaged > lost / 2:
            raise AudioError(f"it cannot be decoded: {track.reason}")
        if lost > NOTED_SHARE * promised:
            what = "damaged" if damaged > lost / 2 or (ogg and ogg.damaged) else "truncated"
            where = f" from {start:g} s on" if start else ""
            holds = f"it holds {held:.2f} s" if held else f"it holds no samples{where}"
            why = f" ({track.stopped})" if track and track.stopped else ""
            raise AudioError(f"it is {what}: its header promises {promised:.2f} s{where}, {holds}{why}")
        said.append(notes.AUDIO_LOST(lost=lost, promised=promised))
    if track and track.passed_over:
        packets = "1 packet was" if track.passed_over == 1 else f"{track.passed_over} packets were"
        said.append(notes.PACKETS_SKIPPED(packets=packets))
    if gap > UNSAID_SECONDS:
        said.append(notes.AUDIO_GAP(gap=gap))
    if ogg and ogg.cut:
        said.append(notes.OGG_CUT())
    return "; ".join(said)


def _lost_on_the_way(file: AudioFile, track: Track) -> tuple[float, float]:
    """Seconds that were lost between the first frame and the last one; and those that may be, or be a pause."""
    lost = max(track.passed_seconds, track.skipped_seconds)
    if track.form == "mp3" and tagged_seconds(file, track.first_byte or 0) is not None:
        return 0.0, 0.0  # its header says how long it must be; what was passed over may well be no audio
    gap = max(0.0, track.gap_seconds - lost)
    pause = track.form not in WITHOUT_GAPS
    if gap > UNSAID_SECONDS and track.form in IS_WHOLE:
        pause = IS_WHOLE[track.form](file.read, file.size)
    return (lost, gap) if pause else (lost + gap, 0.0)


def seconds_of(file: AudioFile) -> tuple[float, bool]:
    """The length of a file, and whether that is exact: from a header that can be trusted, else by its packets.

    What a header promises and the file does not hold counts, so that it is missed.
    """
    lacking = file.riff.lacking if file.riff else 0.0
    lacking = lacking if lacking > UNSAID_SECONDS else 0.0
    if file.riff and (plain := file.riff.plain):
        return plain.length / plain.rate + lacking, True
    with file.container() as container:
        track = Track(container)
        seconds, exact = _seconds_by_form(file, track)
        return seconds + lacking, exact


def _seconds_by_form(file: AudioFile, track: Track) -> tuple[float, bool]:
    if track.form == "mp3":
        return _mp3_seconds(file, track)
    if track.form in BY_DATA and (data := _data_seconds(file, track)):
        return (data[0] if data[0] > data[1] + UNSAID_SECONDS else data[1]), True
    if track.form == "flac" and track.declared is not None:
        return _flac_seconds(file, track)
    if track.form in ("aiff", "au") and track.codec.startswith("pcm_") and (data := _data_seconds(file, track)):
        promised = max(data[0], track.declared or 0.0)
        return (promised if promised > data[1] + UNSAID_SECONDS else data[1]), True
    exact = track.form in COUNTED or (track.form == "wav" and track.codec.startswith("pcm_"))
    if track.declared is not None and exact:
        return track.declared, True
    return _seconds_by_packets(file, track), False


def _seconds_by_packets(file: AudioFile, track: Track) -> float:
    if track.form == "ogg":
        ogg = ogg_of(file)
        if ogg and (ogg.links > 1 or ogg.cut):
            return ogg.seconds
    told = track.form == "ogg" or (track.form == MP4 and not has_gaps(track) and not track.declared_is_short)
    if told and track.declared is not None:
        return track.declared
    if track.form not in COUNTABLE:
        return sum(frame.samples / frame.rate for frame in track.frames())
    held, end = _packets(track)
    lacking = (_declared(file, track) or 0.0) - end if track.form in BY_TIME else 0.0
    return held + (lacking if lacking > UNSAID_SECONDS else 0.0)


def _mp3_seconds(file: AudioFile, track: Track) -> tuple[float, bool]:
    next(track.packets())
    if track.first_byte is not None:
        with contextlib.suppress(Unindexable):
            index = mp3_index(file, track.first_byte)
            return index.total_samples() / index.rate, True
    track.container.seek(0)
    held = _packet_seconds(track) - (track.stream.start_time or 0) * track.tick  # the encoder's delay
    promised = tagged_seconds(file, track.first_byte or 0) or 0.0
    return (promised if promised > held + UNSAID_SECONDS else held), False


def _flac_seconds(file: AudioFile, track: Track) -> tuple[float, bool]:
    """By its header, if its last frame says the same; else by its packets, or the header of a file that was cut off."""
    assert track.declared is not None, "lengths that are not known are counted"
    end, promised = _flac_end(file, track), track.declared - _first_time(track)
    if end is not None and abs(end - track.declared) < track.tick:
        return promised, True
    track.container.seek(0)
    held = _packet_seconds(track)
    return (held if end is not None or held > promised else promised), False


def _cut_end(file: AudioFile, track: Track, reached: float) -> float | None:
    """Where the frames of a FLAC file end, if its header promises more and the last one is whole; else None."""
    if track.declared is None or track.declared - (track.begins or 0.0) - reached <= UNSAID_SECONDS:
        return None
    return _flac_end(file, track)


def _flac_end(file: AudioFile, track: Track) -> float | None:
    """Where the last frame of a FLAC file ends, in seconds, if it is whole."""
    at = file.head.find(b"fLaC")
    if at < 0 or not track.rate:
        return None
    end = end_of_frames(file.read, file.size, int.from_bytes(file.head[at + 8 : at + 10], "big"))
    return None if end is None else end / track.rate


def _first_time(track: Track) -> float:
    """The time stamp with which a stream begins: not 0 in one that was cut out of another."""
    packet = next(track.packets())
    return (packet.pts or 0) * track.tick if packet else 0.0


def has_gaps(track: Track) -> bool:
    """Whether an MP4 file's time stamps go further than its frames."""
    codec = track.stream.codec_context
    if not (codec.frame_size and codec.sample_rate and track.stream.frames and track.declared):
        return False
    return track.declared - track.stream.frames * codec.frame_size / codec.sample_rate > UNSAID_SECONDS


def _packet_seconds(track: Track) -> float:
    """The length by what each packet says of itself, without the gaps between them, in which no samples are."""
    return _packets(track)[0]


def _packets(track: Track) -> tuple[float, float]:
    """The length by what each packet says of itself, and the time at which the last one ends."""
    length, begin, end = 0.0, 0.0, -1e9
    for packet in track.packets():
        if packet is None or packet.pts is None:
            continue
        time = packet.pts * track.tick
        if not end - 0.5 < time < end + GAP_SECONDS:
            length += max(0.0, end - begin)
            begin = end = time
        end = max(end, time + (packet.duration or 0) * track.tick)
    return length + max(0.0, end - begin), max(0.0, end)


def _missing_at_end(file: AudioFile, track: Track | None, reached: float, end: float | None) -> float:
    """Seconds that a file promises behind the `reached` ones, at which its audio ends; those of FLAC up to `end`."""
    if file.riff and (track is None or track.form != AVI):
        return file.riff.lacking
    if track is None:
        return 0.0
    if track.form == MP4 or track.form in BY_TIME:  # by its time stamps, in which there may be gaps
        declared = _declared(file, track)
        if declared is None or track.begins is None:
            return declared or 0.0
        return declared - track.last_time + (0.0 if track.form in (MATROSKA, ASF) else track.begins)
    if track.form in BY_DATA:
        data = _data_seconds(file, track)
        return data[0] - data[1] if data else 0.0
    promised = _promised_seconds(file, track) if end is None else end - (track.begins or 0.0)
    return 0.0 if promised is None else promised - reached


def _promised_seconds(file: AudioFile, track: Track) -> float | None:
    """Of the whole file, where its header counts the samples."""
    if track.form == "mp3":
        return tagged_seconds(file, track.first_byte or 0)
    if track.form == "ogg" and (ogg := ogg_of(file)):
        begins = track.begins or 0.0
        return ogg.seconds - (begins if ogg.links == 1 and begins < ogg.first else 0.0)  # cut out of a longer one
    if track.declared and track.form == "flac":
        return track.declared - (track.begins or 0.0)
    return track.declared if track.form in COUNTED else None


def _data_seconds(file: AudioFile, track: Track) -> tuple[float, float] | None:
    """What a W64, CAF or VOC file promises and what it holds, in seconds; None where its header never learned that."""
    data = data_of(track.form, file.read, file.size)
    if data is None or not data.promised:
        return None
    if track.codec.startswith("pcm_") and track.bytes_a_second:
        return data.promised / track.bytes_a_second, data.held / track.bytes_a_second
    return None if track.declared is None else (track.declared, track.declared * data.held / data.promised)


def _declared(file: AudioFile, track: Track) -> float | None:
    """The length by the container's header, or the time at which its audio ends."""
    if track.form == ASF:
        return asf_seconds(file.head)
    return avi_seconds(file.head, track.index) if track.form == AVI else track.declared


_oggs: OrderedDict[tuple, Ogg | None] = OrderedDict()
_guard = threading.Lock()


def ogg_of(file: AudioFile) -> Ogg | None:
    """The pages of an Ogg file, walked once; None where it holds no audio that is known here."""
    if file.path is None:
        return read_ogg(file.read, file.size)
    with _guard:
        if file.key not in _oggs:
            _oggs[file.key] = read_ogg(file.read, file.size)
            if len(_oggs) > KEPT_OGGS:
                _oggs.popitem(last=False)
        return _oggs[file.key]
