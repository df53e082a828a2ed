"""Where the frames of a FLAC file end, told from its last bytes: each frame has a number and two checksums.

A file that was cut by copying its frames (`ffmpeg -t 2 -c copy`) keeps the header of the file it was cut from, which
promises all of that; it ends with a whole frame. One that was cut off in a download or on a full disk ends within one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

TAIL_BYTES = 1 << 18  # that hold the last frame: of 8 channels, 24 bits and 4608 samples it has 110 kB
MOST_HEADERS = 3  # that are tried: bytes of audio may look like one
SYNC = (b"\xff\xf8", b"\xff\xf9")  # blocks of one size; of several
TAG = b"TAG"  # ID3v1, behind the frames
TAG_BYTES = 128
SIZES = {1: 192, **{code: 576 << (code - 2) for code in range(2, 6)}, **{code: 1 << code for code in range(8, 16)}}
EXTRA_BYTES = {0b1100: 1, 0b1101: 2, 0b1110: 2}  # of the header, for sample rates that have no code

Read = Callable[[int, int], bytes]  # bytes of a file by position and length


def end_of_frames(read: Read, size: int, block: int) -> int | None:
    """The sample behind the last frame, if that frame is whole and ends the file; None otherwise.

    `block` is the number of samples of every frame but the last, where frames are numbered and not samples.
    """
    begin = max(0, size - TAIL_BYTES)
    tail = read(begin, size - begin)
    if tail[-TAG_BYTES:].startswith(TAG):
        tail = tail[:-TAG_BYTES]
    at, tried = len(tail), 0
    while tried < MOST_HEADERS and (at := max(tail.rfind(sync, 0, at) for sync in SYNC)) >= 0:
        header = _header(tail[at : at + 16])
        if header is None:
            continue
        tried += 1
        if _remainder(tail[at:], 0x8005, 16) == 0:
            number, samples = header
            return (number if tail[at + 1] & 1 else number * block) + samples
    return None


def _header(data: bytes) -> tuple[int, int] | None:
    """The number in a frame's header and its samples; None where it is no header by its own checksum."""
    if len(data) < 6 or data[3] & 1:
        return None
    size, rate = data[2] >> 4, data[2] & 15
    number, at = _coded(data, 4)
    if number < 0:
        return None
    if size in (6, 7):
        extra = size - 5
        samples, at = int.from_bytes(data[at : at + extra], "big") + 1, at + extra
    else:
        samples = SIZES.get(size, 0)
    at += EXTRA_BYTES.get(rate, 0)
    if not samples or at >= len(data) or _remainder(data[: at + 1], 0x07, 8):
        return None
    return number, samples


def _coded(data: bytes, at: int) -> tuple[int, int]:
    """A number as UTF-8 codes it, of up to 36 bits, and the byte behind it; -1 for what is none."""
    first = data[at]
    ones = 8 - (first ^ 0xFF).bit_length()
    if ones == 1 or ones > 7 or at + max(ones, 1) > len(data):
        return -1, at
    value = first & (0x7F >> ones) if ones else first
    for byte in data[at + 1 : at + ones]:
        if byte >> 6 != 0b10:
            return -1, at
        value = value << 6 | byte & 0x3F
    return value, at + max(ones, 1)


@cache
def _table(polynomial: int, bits: int) -> tuple[int, ...]:
    top, mask = 1 << (bits - 1), (1 << bits) - 1
    table = []
    for byte in range(256):
        value = byte << (bits - 8)
        for _ in range(8):
            value = (value << 1 ^ polynomial if value & top else value << 1) & mask
        table.append(value)
    return tuple(table)


def _remainder(data: bytes, polynomial: int, bits: int) -> int:
    """The CRC of bytes, most significant bit first, from 0; 0 for data that its own CRC follows."""
    table, shift, mask, value = _table(polynomial, bits), bits - 8, (1 << bits) - 1, 0
    for byte in data:
        value = (value << 8 & mask) ^ table[value >> shift ^ byte]
    return value
