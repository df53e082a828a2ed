"""FLV and MPEG-TS: whether nothing is broken in a file.

A gap between its timestamps is a pause of the recorder in a file that is whole, and lost audio in one that is not.
"""

from __future__ import annotations

from collections.abc import Callable

MOST_TAGS = 2_000_000
TS_BYTES = 188  # of an MPEG-TS packet
TS_SYNC = 0x47
TS_BLOCK = TS_BYTES * 2048  # bytes that are read at a time
TS_PADDING = 0x1FFF  # the stream of packets without content, whose counters mean nothing

Read = Callable[[int, int], bytes]  # bytes of a file by position and length


def flv_is_whole(read: Read, size: int) -> bool:
    """Whether tag follows tag up to the end, each with its own length behind it."""
    at = int.from_bytes(read(5, 4), "big") + 4
    for _ in range(MOST_TAGS):
        if at >= size:
            return at == size
        length = 11 + int.from_bytes(read(at + 1, 3), "big")
        if int.from_bytes(read(at + length, 4), "big") != length:
            return False
        at += length + 4
    return False


def mpegts_is_whole(read: Read, size: int) -> bool:
    """Whether packet follows packet, each counted on from the last one of its stream."""
    counters: dict[int, int] = {}
    for at in range(0, size - TS_BYTES + 1, TS_BLOCK):
        block = read(at, TS_BLOCK)
        for start in range(0, len(block) - TS_BYTES + 1, TS_BYTES):
            if block[start] != TS_SYNC:
                return False
            stream, flags = (block[start + 1] & 0x1F) << 8 | block[start + 2], block[start + 3]
            if not flags & 0x10 or stream == TS_PADDING:  # without content, and not counted
                continue
            if stream in counters and flags & 15 not in (counters[stream], (counters[stream] + 1) & 15):
                return False
            counters[stream] = flags & 15
    return True
