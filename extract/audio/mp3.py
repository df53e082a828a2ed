"""Where the frames of an MP3 file lie: found by going from header to header, without decoding.

An MP3 file says nowhere exactly at which byte a second begins: a Xing header's table is good to a 256th of the file,
and without one there is only an average. Its frames say how long they are, and an hour is walked in some 15 ms.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from whisper_at_cli.extract.audio.opened import AudioFile

STRIDE = 32  # frames between positions that are kept
STRIDE_BYTES = STRIDE * 1441  # at most
BLOCK_BYTES = 1 << 19  # read at a time
HEADER_BYTES = 2048  # before the first frame of audio, in which a Xing header would be
KEPT_INDEXES = 64  # of files, for the segments and windows that lie in them
BIT_RATES = (  # kbit/s of layer III
    (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 0),  # MPEG 1
    (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160, 0),  # MPEG 2 and 2.5
)
RATES = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}  # by version
ENDS = (b"TAG", b"APETAGEX", b"LYRICSBEGIN", b"3DI")  # tags that follow the last frame
ENCODERS = (b"LAME", b"Lavf", b"Lavc")  # whose word on padding FFmpeg takes


class Unindexable(Exception):
    """Not a plain run of layer III frames: nothing can be said without decoding."""


class Mp3Index:
    """The frames of one MP3 file, counted as far as anyone asked. Safe between threads.

    `read(at, length)` gives bytes of the file; `first` is the byte at which FFmpeg finds the first frame of audio.
    """

    def __init__(self, read: Callable[[int, int], bytes], first: int):
        self._read = read
        header = read(first, 4)
        if len(header) < 4 or header[0] != 0xFF or header[1] < 0xE0:
            raise Unindexable
        version, layer, rate = (header[1] >> 3) & 3, (header[1] >> 1) & 3, (header[2] >> 2) & 3
        if version not in RATES or layer != 1 or rate == 3:
            raise Unindexable
        self.rate = RATES[version][rate]
        self.samples = 1152 if version == 3 else 576  # per frame
        self._sizes = _frame_sizes(header[1], version, rate)
        self._guard = threading.Lock()
        self._kept = [first]  # position of every STRIDE-th frame
        self._at, self.frames, self.ended = first, 0, False  # of the next frame; counted so far; all counted
        before = max(0, first - HEADER_BYTES)
        head = read(before, first - before)
        self.kept_samples, self.tagged_frames = _padding(head, self.samples)
        tagged = _tagged_bytes(head)  # FFmpeg does not believe in them where the file is a sixteenth larger
        self._trusted = not tagged or not read(before + tagged + tagged // 16 + HEADER_BYTES, 1)

    def count(self, most: int) -> int:
        """How many frames there are, or `most` if there are at least that many. Raises Unindexable."""
        with self._guard:
            if self.frames < most and not self.ended:
                self._walk(most)
            return min(self.frames, most)

    def _walk(self, most: int) -> None:
        """Count until there are `most` frames, by whole strides, so that each one's start is kept."""
        sizes, begin, block, at = self._sizes, self._at, b"", 0  # `at` is within the block
        while self.frames < most:
            if at + STRIDE_BYTES > len(block):
                begin, at, block = begin + at, 0, self._read(begin + at, BLOCK_BYTES)
            start = at
            try:
                for _ in range(STRIDE):
                    at += sizes[block[at : at + 3]]
            except KeyError:
                self._finish(block, start)
                return
            if at > len(block):
                self._finish(block, start)
                return
            self.frames += STRIDE
            self._at = begin + at
            self._kept.append(self._at)

    def _finish(self, block: bytes, at: int) -> None:
        """Count the last frames, fewer than a stride. Raises Unindexable where they do not end the file."""
        frames = 0
        while (size := self._sizes.get(block[at : at + 3], 0)) and at + size <= len(block):
            at += size
            frames += 1
        rest = block[at : at + 16]
        if rest.strip(b"\0") and not rest.startswith(ENDS):  # a frame cut short, or something else
            raise Unindexable
        self.frames += frames
        self.ended = True

    def packets(self, first: int, count: int) -> Iterator[bytes]:
        """The bytes of `count` frames from frame number `first` on, fewer at the end. Raises Unindexable."""
        last = self.count(first + count)
        for stride in range(first // STRIDE, -(-last // STRIDE)):
            block, at = self._read(self._kept[stride], STRIDE_BYTES), 0
            for frame in range(stride * STRIDE, min(last, (stride + 1) * STRIDE)):
                size = self._sizes[block[at : at + 3]]
                if frame >= first:
                    yield block[at : at + size]
                at += size

    def total_samples(self) -> int:
        """Samples of the whole file, without an encoder's padding. Raises Unindexable."""
        frames = self.count(1 << 62)
        if self.tagged_frames is not None and frames == self.tagged_frames and self._trusted:
            return self.kept_samples
        if self.tagged_frames is not None:
            raise Unindexable  # the file's own header speaks of another file
        return frames * self.samples


def _frame_sizes(second: int, version: int, rate: int) -> dict[bytes, int]:
    """Bytes of a frame by the first three bytes of its header, for all headers that this stream may have."""
    sizes = {}
    for third in range(256):
        bits = BIT_RATES[version != 3][third >> 4] * 1000
        if not bits or (third >> 2) & 3 != rate:
            continue
        size = (144 if version == 3 else 72) * bits // RATES[version][rate] + ((third >> 1) & 1)
        for checksum in (0, 1):  # the last bit of the second byte says whether one follows
            sizes[bytes((0xFF, second & 0xFE | checksum, third))] = size
    return sizes


def _padding(head: bytes, samples: int) -> tuple[int, int | None]:
    """Samples between an encoder's padding, and how many frames the file's own header counts; (0, None) without one."""
    at = max(head.rfind(b"Xing"), head.rfind(b"Info"))
    if at < 0 or len(head) < at + 12:
        return 0, None
    flags = int.from_bytes(head[at + 4 : at + 8], "big")
    if not flags & 1:
        return 0, None
    frames = int.from_bytes(head[at + 8 : at + 12], "big")
    tag = at + 8 + 4 * (flags & 1) + 4 * (flags >> 1 & 1) + 100 * (flags >> 2 & 1) + 4 * (flags >> 3 & 1)
    if head[tag : tag + 4] not in ENCODERS:
        return frames * samples, frames
    delays = int.from_bytes(head[tag + 21 : tag + 24], "big")
    return frames * samples - (delays >> 12) - (delays & 4095), frames


def _tagged_bytes(head: bytes) -> int:
    """The size of the file by its own header; 0 without one."""
    at = max(head.rfind(b"Xing"), head.rfind(b"Info"))
    if at < 0 or head[at + 7 : at + 8] not in (b"\x03", b"\x07", b"\x0b", b"\x0f"):  # frames and bytes are there
        return 0
    return int.from_bytes(head[at + 12 : at + 16], "big")


def tagged_seconds(file: AudioFile, first: int) -> float | None:
    """The length that a file's own header gives, without an encoder's padding; None where it has none."""
    try:
        index = Mp3Index(file.read, first)
    except Unindexable:
        return None
    return None if index.tagged_frames is None else index.kept_samples / index.rate


_indexes: OrderedDict[tuple, Mp3Index] = OrderedDict()
_guard = threading.Lock()


def mp3_index(file: AudioFile, first: int) -> Mp3Index:
    """The index of a file, kept for whoever asks next. Raises Unindexable, OSError."""
    if file.path is None:
        return Mp3Index(file.read, first)
    key = (*file.key, first)
    with _guard:
        if key not in _indexes:
            _indexes[key] = Mp3Index(partial(_read_from, file.path), first)
            if len(_indexes) > KEPT_INDEXES:
                _indexes.popitem(last=False)
        _indexes.move_to_end(key)
        return _indexes[key]


def _read_from(path: Path, at: int, length: int) -> bytes:
    """For an index that outlives the open file. Read, not mapped: a file that shrinks meanwhile must do no harm."""
    with open(path, "rb", buffering=0) as file:
        file.seek(at)
        return file.read(length)
