"""Matroska and WebM: whether a file's elements follow one another without a break.

A gap between time stamps is a pause of the recorder, or lost data: a pause where the elements are whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

OUTER = frozenset((0x18538067, 0x1F43B675))  # segment and cluster: their content is walked, in place
KNOWN = OUTER | frozenset((  # what may stand in a file, in its segment and in a cluster
    0x1A45DFA3, 0x114D9B74, 0x1549A966, 0x1654AE6B, 0x1C53BB6B, 0x1254C367, 0x1043A770, 0x1941A469, 0xEC, 0xBF,
    0xE7, 0xA7, 0xAB, 0xA3, 0xA0, 0x5854,
))  # fmt: skip
HEAD_BYTES = 12
MOST_ELEMENTS = 2_000_000

Read = Callable[[int, int], bytes]  # bytes of a file by position and length


def is_whole(read: Read, size: int) -> bool:
    """Whether known elements follow one another up to the end of the file."""
    at = 0
    for name, end in _elements(read):
        if name not in KNOWN or end > size:
            return False
        at = end
    return at == size


def _elements(read: Read) -> Iterator[tuple[int, int]]:
    """Name of each element, and the byte at which the next one begins."""
    at = 0
    for _ in range(MOST_ELEMENTS):
        if not (head := read(at, HEAD_BYTES)):
            return
        named = 9 - head[0].bit_length()
        sized = 9 - head[named].bit_length() if len(head) > named else 9
        if named > 4 or sized > 8 or len(head) < named + sized:
            yield 0, at
            return
        name = int.from_bytes(head[:named], "big")
        length = int.from_bytes(head[named : named + sized], "big") & ((1 << 7 * sized) - 1)
        at += named + sized + (0 if name in OUTER else length)
        yield name, at
