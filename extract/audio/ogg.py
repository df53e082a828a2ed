"""Ogg files: how long they promise to be, by walking their pages. FFmpeg knows only the last link of a chained file."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

MAGIC = b"OggS"
HEADER_BYTES = 27 + 255  # at most, before a page's body
BLOCK_BYTES = 1 << 18  # read at a time
BEGINS = 2  # flag of a stream's first page
LONGEST_PAGE_SECONDS = 600  # a page that says more than this is damaged
OPUS_RATE = 48000

Read = Callable[[int, int], bytes]  # bytes of a file by position and length


class Ogg(NamedTuple):
    """What the pages of an Ogg file say of its audio."""

    links: int  # streams one after the other; a chained file has several
    seconds: float  # of all of them, from the time stamp 0 of each
    damaged: bool  # pages are missing or changed, or there are bytes between them
    cut: bool  # the file ends within a page


class _Link:
    """One stream of audio, while its pages are counted."""

    def __init__(self, serial: int, first_packet: bytes):
        self.serial, self.rate, self.skipped, self.end, self.number = serial, 0, 0, 0, -1
        if first_packet.startswith(b"\x01vorbis") and len(first_packet) >= 16:
            (self.rate,) = struct.unpack("<I", first_packet[12:16])
        elif first_packet.startswith(b"OpusHead") and len(first_packet) >= 12:
            self.rate, (self.skipped,) = OPUS_RATE, struct.unpack("<H", first_packet[10:12])
        elif first_packet.startswith(b"\x7fFLAC") and len(first_packet) >= 30:
            self.rate = int.from_bytes(first_packet[27:30], "big") >> 4
        elif first_packet.startswith(b"Speex   ") and len(first_packet) >= 40:
            (self.rate,) = struct.unpack("<I", first_packet[36:40])

    def count(self, granule: int) -> None:
        """A page says that so many samples are complete."""
        if self.end < granule <= max(self.end, self.skipped) + LONGEST_PAGE_SECONDS * self.rate:
            self.end = granule

    @property
    def seconds(self) -> float:
        return max(0, self.end - self.skipped) / self.rate


_MIRRORED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def _checksum(page: bytes) -> int:
    """Ogg's CRC-32: zlib's with the bits of every byte, and of the result, in the other order."""
    mirrored = zlib.crc32(page.translate(_MIRRORED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int.from_bytes(mirrored.to_bytes(4, "little").translate(_MIRRORED), "big")


class _Page(NamedTuple):
    flags: int
    granule: int  # samples that are complete at its end, -1 for none
    serial: int
    number: int
    body: int  # byte at which its content begins
    sound: bool  # its checksum is right
    whole: bool  # it does not end behind the file


def read_ogg(read: Read, size: int) -> Ogg | None:
    """Walk the pages of an Ogg file; None where it holds no audio that is known here."""
    links: list[_Link] = []
    beginning, damaged, cut = False, False, False
    for page in _pages(read, size):
        damaged |= page is None or (page.whole and not page.sound)
        if page is None:
            continue
        cut = not page.whole
        if page.flags & BEGINS:
            link = _Link(page.serial, read(page.body, 64))
            if link.rate and not (beginning and links):  # of several at the same time, the first is taken
                links.append(link)
        beginning = bool(page.flags & BEGINS)
        if links and page.serial == links[-1].serial:
            damaged |= page.number != links[-1].number + 1
            links[-1].number = page.number
            links[-1].count(page.granule)
    return Ogg(len(links), sum(link.seconds for link in links), damaged, cut) if links else None


def _pages(read: Read, size: int) -> Iterator[_Page | None]:
    """Each page, and None for each run of bytes between pages."""
    at, start, block = 0, 0, b""
    while at < size:
        if at + HEADER_BYTES > start + len(block) and start + len(block) < size:
            start, block = at, read(at, BLOCK_BYTES)
        head = block[at - start : at - start + HEADER_BYTES]
        if not head.startswith(MAGIC):
            yield None
            found = block.find(MAGIC, at - start + 1)
            if found < 0 and start + len(block) >= size:
                return
            at = start + found if found >= 0 else max(at + 1, start + len(block) - 3)  # it may lie across two blocks
            continue
        if len(head) < 27 or len(head) < 27 + head[26]:
            yield _Page(0, -1, -1, 0, at, False, False)
            return
        granule, serial, number, stated = struct.unpack("<qIII", head[6:26])
        body = at + 27 + head[26]
        end = body + sum(head[27 : 27 + head[26]])
        if end > start + len(block) and end <= size:
            start, block = at, read(at, BLOCK_BYTES)
        page = block[at - start : end - start]
        sound = _checksum(page[:22] + bytes(4) + page[26:]) == stated
        yield _Page(head[5], granule, serial, number, body, sound, end <= size)
        at = end
