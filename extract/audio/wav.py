"""WAV files: where their audio lies, by walking their chunks. Plain 16-bit samples are read without FFmpeg."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from whisper_at_cli.extract.errors import AudioError

MAGIC = (b"RIFF", b"RF64", b"BW64")
MOST_CHUNKS = 10_000  # that are looked at
MOST_LACKING = 1 << 24  # bytes that a chunk other than the audio may lack
PCM = 1  # format tag
UNKNOWN = (0x7EFF0000, 2**31 + 2**16, 2**32 - 2**16)  # lengths near 2 GiB (SoX: 0x7F000000), and just below 4 GiB
DISGUISES = (b"\x72\xf8\x1f\x4e", b"\xfe\x7f\x01\x80", b"\xff\x1f\x00\xe8", b"\x7f\xfe\x80\x01", b"\x1f\xff\xe8\x00")
DISGUISE_BYTES = 1 << 15  # in which FFmpeg looks for them: S/PDIF and DTS streams, written as if they were samples

Read = Callable[[int, int], bytes]  # bytes of a file by position and length


class Plain(NamedTuple):
    """16-bit samples, little-endian, one or two channels."""

    rate: int
    channels: int
    at: int  # byte of the first sample
    length: int  # samples of each channel

    def samples(self, read: Read, first: int, count: int) -> np.ndarray:
        """Samples `first` to `first + count`, (n, channels) int16; fewer at the end."""
        count = max(0, min(count, self.length - first))
        width = 2 * self.channels
        data = read(self.at + first * width, count * width) if count else b""
        whole = len(data) // width * width  # less where the file has become shorter
        return np.frombuffer(data[:whole] if whole < len(data) else data, "<i2").reshape(-1, self.channels)


class Riff(NamedTuple):
    """The audio of a WAV file."""

    lacking: float  # seconds that its header promises and the file does not hold
    plain: Plain | None  # None: FFmpeg must read it
    end: int  # byte at which FFmpeg shall see the file end: before what lies behind the audio and is damaged


def never_written(length: int) -> bool:
    """Whether a length in a header stands for "not known": a recorder or a pipe that never came back to write it."""
    return length == 0 or UNKNOWN[0] <= length <= UNKNOWN[1] or length >= UNKNOWN[2]


def read_riff(read: Read, size: int) -> Riff:
    """Walk the chunks of a WAV file of `size` bytes. Raises AudioError where a chunk before the audio is far larger
    than the file, for which FFmpeg would make room, or where there are more chunks than any has."""
    form, data, lacking, end, long, ordinary = b"", None, 0, size, 0, read(8, 4) == b"WAVE"
    for number, (name, length, at) in enumerate(_chunks(read, size), start=1):
        left = size - at
        if number == MOST_CHUNKS or (name != b"data" and length > left + MOST_LACKING):
            if data:  # of what lies behind the audio, FFmpeg shall see no chunk that lies, and may see bytes of no kind
                end = at - 8 if name.strip().isalnum() else size
                break
            if number == MOST_CHUNKS:
                raise AudioError(f"it is damaged: it has more than {MOST_CHUNKS - 1} chunks")
            raise AudioError(
                f"it is damaged: its chunk {name!r} says {length} bytes, but only {left} are left of the file"
            )
        if name == b"data":
            ordinary &= data is None and bool(form)
            promised = long if length == 0xFFFFFFFF and long else length
            if never_written(promised):  # the audio goes on to the end of the file, whatever is in it
                data = at, left
                break
            data, lacking = (at, min(promised, left)), max(0, promised - left)
        elif name == b"LIST" and read(at, 4) == b"movi":  # an AVI file
            data, ordinary = (at, left), False
        elif name == b"ds64":
            long = int.from_bytes(read(at + 8, 8), "little")
        elif name == b"fmt ":
            ordinary &= not form
            form = read(at, min(length, 18))
    speed = int.from_bytes(form[8:12], "little") or 1  # bytes a second
    return Riff(lacking / speed, _plain(read, form, *data) if ordinary and data else None, end)


def _chunks(read: Read, size: int) -> Iterator[tuple[bytes, int, int]]:
    """Name and length of each chunk, and the byte at which its content begins."""
    at, number = 12, 0
    while at + 8 <= size and number < MOST_CHUNKS and len(head := read(at, 8)) == 8:
        name, length = struct.unpack("<4sI", head)
        yield name, length, at + 8
        at, number = at + 8 + length + length % 2, number + 1


def _plain(read: Read, form: bytes, at: int, held: int) -> Plain | None:
    if len(form) < 16:
        return None
    tag, channels, rate, _, width, bits = struct.unpack("<HHIIHH", form[:16])
    if tag != PCM or bits != 16 or channels not in (1, 2) or width != 2 * channels or rate < 1000:
        return None
    if any(sign in read(at, DISGUISE_BYTES) for sign in DISGUISES):
        return None
    return Plain(rate, channels, at, held // width)
