"""What the headers of W64, CAF, AIFF, AU, VOC, ASF and AVI files promise; FFmpeg goes by what is there."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple

from whisper_at_cli.extract.audio.wav import MOST_CHUNKS, never_written

W64_DATA = b"data\xf3\xac\xd3\x11\x8c\xd1\x00\xc0\x4f\x8e\xdb\x8a"
VOC_HEADS = {1: 2, 2: 0, 9: 12}  # types of blocks with sound, and the bytes before it
VOC_END = 0
ASF_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")
ASF_BROADCAST = 1  # flag of a stream that did not know its length
ASF_TICKS = 10_000_000  # a second

Read = Callable[[int, int], bytes]  # bytes of a file by position and length


class Data(NamedTuple):
    """Bytes of audio."""

    promised: int
    held: int


def data_of(form: str, read: Read, size: int) -> Data | None:
    """The audio of a W64, CAF, AIFF, AU or VOC file; None where the header never learned how much there is."""
    if form == "voc":
        return _voc_data(read, size)
    if form == "au":
        return _au_data(read, size)
    for name, length, at in _chunks(form, read, size):
        if name in (W64_DATA, b"data", b"SSND"):
            before = {"caf": 4, "aiff": 8}.get(form, 0)  # bytes of the chunk that are no audio
            if length <= before or never_written(length):
                return None
            return Data(length - before, max(0, min(length, size - at) - before))
    return None


def _au_data(read: Read, size: int) -> Data:
    """FFmpeg reads on to the end of the file, whatever the header says."""
    offset, length = struct.unpack(">II", read(4, 8).ljust(8, b"\0"))
    held = max(0, size - offset)
    return Data(held if never_written(length) else length, held)


class _Chunks(NamedTuple):
    """How the chunks of a form are written."""

    begin: int  # byte of the first one
    head: str  # struct of a chunk's name and length
    counted: bool  # whether the length is that of head and content, instead of the content alone
    align: int  # bytes to a multiple of which the content is filled up


CHUNKS = {
    "w64": _Chunks(40, "<16sq", True, 8), "caf": _Chunks(8, ">4sq", False, 1), "aiff": _Chunks(12, ">4sI", False, 2),
}  # fmt: skip


def _chunks(form: str, read: Read, size: int) -> Iterator[tuple[bytes, int, int]]:
    """Name of each chunk, length of its content, and the byte at which that begins."""
    at, head, counted, align = CHUNKS[form]
    taken = struct.calcsize(head)
    for _ in range(MOST_CHUNKS):
        if at >= size or len(data := read(at, taken)) < taken:
            return
        name, length = struct.unpack(head, data)
        length -= taken if counted else 0
        yield name, length, at + taken
        at += taken + max(0, length + -length % align)


def _voc_data(read: Read, size: int) -> Data:
    promised = held = 0
    at = int.from_bytes(read(20, 2), "little")
    for _ in range(MOST_CHUNKS):
        head = read(at, 4)
        if len(head) < 4 or head[0] == VOC_END:
            break
        length = int.from_bytes(head[1:], "little")
        if head[0] in VOC_HEADS:
            sound = max(0, length - VOC_HEADS[head[0]])
            promised += sound
            held += max(0, min(sound, size - at - 4 - VOC_HEADS[head[0]]))
        at += 4 + length
    return Data(promised, held)


def avi_seconds(head: bytes, stream: int) -> float | None:
    """How long a stream of an AVI file is, by its own header; None where that never learned it. FFmpeg goes by what the
    index of the file's end counts, or by what is there."""
    at = -1
    for _ in range(stream + 1):
        if (at := head.find(b"strh", at + 1)) < 0:
            return None
    fields = head[at + 28 : at + 44]
    if len(fields) < 16:
        return None
    scale, rate, start, length = struct.unpack("<IIII", fields)
    return (start + length) * scale / rate if rate and length and not never_written(length) else None


def asf_seconds(head: bytes) -> float | None:
    """How long an ASF (WMA) file is to be played, by its header; None where that never learned it.

    FFmpeg believes in it only if the file has about the size that the header says.
    """
    at = head.find(ASF_PROPERTIES)
    if at < 0 or len(head) < at + 96:
        return None
    played, _, preroll, flags = struct.unpack("<QQQI", head[at + 64 : at + 92])
    seconds = played / ASF_TICKS - preroll / 1000
    return None if flags & ASF_BROADCAST or seconds <= 0 else seconds
