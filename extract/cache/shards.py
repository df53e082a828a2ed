"""The bytes of one file of a cache: Zarr v3 shards and chunks with CRC-32C, written whole and in one piece.

A shard file is its chunks one after another, each followed by its CRC-32C, then an index with offset and length of
every chunk (uint64, little-endian; both 2**64 - 1 where a chunk is absent) and the index's own CRC-32C. That is the
`sharding_indexed` codec of the Zarr v3 specification; zarr-python reads and writes the same bytes, only slower.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import google_crc32c
import numpy as np

from whisper_at_cli.extract.errors import CacheError

ABSENT = np.uint64(2**64 - 1)
CRC_BYTES = 4
BUFFERS = 1024  # that the system takes in one call
RUN = (
    16  # chunks that one call reads at most: about a megabyte, whose checksums are then taken while it is in the cache
)
VERIFY = "run: whisper-at-cli verify"


def crc32c(data: np.ndarray | bytes) -> bytes:
    """CRC-32C of contiguous bytes, as the four little-endian bytes that Zarr appends."""
    return google_crc32c.value(data).to_bytes(CRC_BYTES, "little")


def shard_buffers(chunks: np.ndarray, present: np.ndarray) -> list:
    """A shard file as a list of buffers to be written one after another; the chunks' own bytes are not copied.

    chunks   (K, ...) C-contiguous, one row per chunk in the order of the shard's chunk grid (C order)
    present  (K or more,) bool; an absent chunk takes no space and reads as the array's fill value
    """
    rows = chunks.reshape(len(chunks), -1).view(np.uint8)
    stride = rows.shape[1] + CRC_BYTES
    written = np.flatnonzero(present)
    index = np.full((len(present), 2), ABSENT, dtype="<u8")
    index[written, 0] = np.arange(len(written), dtype=np.uint64) * np.uint64(stride)
    index[written, 1] = stride
    index_bytes = index.tobytes()
    buffers = [buffer for row in written.tolist() for buffer in (rows[row], crc32c(rows[row]))]
    return [*buffers, index_bytes, crc32c(index_bytes)]


def chunk_buffers(chunk: np.ndarray) -> list:
    """A chunk file as buffers: the values, then their CRC-32C."""
    data = np.ascontiguousarray(chunk).tobytes()
    return [data, crc32c(data)]


def write_whole(path: Path, buffers: list) -> None:
    """Write a file so that it appears whole or not at all, and is on disk when this returns. One writer per file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")  # what a killed run left is written over
    try:
        with open(temporary, "wb", buffering=0) as file:
            for first in range(0, len(buffers), BUFFERS):
                _writev(file.fileno(), buffers[first : first + BUFFERS])
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _writev(file: int, buffers: list) -> None:
    """Write all of these buffers, however many calls the system takes for it."""
    written = os.writev(file, buffers)
    for buffer in buffers:
        size = memoryview(buffer).nbytes
        if written < size:
            rest = memoryview(buffer).cast("B")[written:]
            while len(rest):
                rest = rest[os.write(file, rest) :]
        written = max(0, written - size)


def read_chunk(path: Path, count: int) -> np.ndarray | None:
    """A chunk file of `count` bytes, (count,) uint8; None where there is none. Raises CacheError if it is damaged."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    if len(data) != count + CRC_BYTES or crc32c(data[:-CRC_BYTES]) != data[-CRC_BYTES:]:
        raise CacheError(f"{path} is damaged: its CRC-32C does not match; {VERIFY}")
    return np.frombuffer(data, dtype=np.uint8, count=count)


def _readv(file: int, buffers: list, start: int) -> int:
    """Fill buffers one after another from byte `start` of a file; returns how many bytes were read."""
    if hasattr(os, "preadv"):
        return os.preadv(file, buffers, start)
    views = [memoryview(buffer).cast("B") for buffer in buffers]  # macOS has no preadv
    data = os.pread(file, sum(map(len, views)), start)
    at = 0
    for view in views:
        part = data[at : at + len(view)]
        view[: len(part)] = part
        at += len(part)
    return len(data)


class ShardFile:
    """Read access to the chunks of one shard file, straight into the caller's arrays; every CRC-32C is checked.

    Safe between threads. Chunks that lie side by side are read by one call, and nothing but them is read.
    """

    def __init__(self, path: Path, *, chunk_count: int, chunk_bytes: int):
        self.path, self.chunk_bytes = path, chunk_bytes
        try:
            self._file = os.open(path, os.O_RDONLY)
        except FileNotFoundError as error:
            raise CacheError(f"{path} is missing although its clips are marked done; {VERIFY}") from error
        if hasattr(os, "posix_fadvise"):  # the kernel's reading ahead would read other layers
            os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_RANDOM)
        self.size = os.fstat(self._file).st_size
        index = np.empty((chunk_count, 2), dtype="<u8")
        checksum = bytearray(CRC_BYTES)
        start = self.size - index.nbytes - CRC_BYTES
        if start < 0 or _readv(self._file, [index, checksum], start) != index.nbytes + CRC_BYTES:
            raise CacheError(f"{path} is {f'truncated to {self.size} bytes' if self.size else 'empty'}; {VERIFY}")
        if crc32c(index.reshape(-1).view(np.uint8)) != bytes(checksum):
            raise CacheError(f"{path} is truncated or its index is damaged; {VERIFY}")
        self._starts: list[int] = index[:, 0].tolist()
        self._lengths: list[int] = index[:, 1].tolist()

    def __del__(self):
        if hasattr(self, "_file"):
            os.close(self._file)

    def read(self, chunks: Sequence[int], out: np.ndarray) -> None:
        """Read chunks into the rows of `out`, (len(chunks), ...), each row C-contiguous and of a chunk's bytes.

        Raises CacheError if one is absent, cut off, or its checksum is wrong.
        """
        rows = out.reshape(len(chunks), -1).view(np.uint8)
        stride = self.chunk_bytes + CRC_BYTES
        for chunk in chunks:
            if self._lengths[chunk] != stride or self._starts[chunk] + stride > self.size:
                raise CacheError(f"{self.path} has no chunk {chunk} although its clip is marked done; {VERIFY}")
        checksums = np.empty((RUN, CRC_BYTES), dtype=np.uint8)
        first = 0
        while first < len(chunks):
            start, last = self._starts[chunks[first]], first + 1
            while (
                last < min(len(chunks), first + RUN) and self._starts[chunks[last]] == start + (last - first) * stride
            ):
                last += 1
            buffers = [buffer for at in range(first, last) for buffer in (rows[at], checksums[at - first])]
            if _readv(self._file, buffers, start) != (last - first) * stride:
                raise CacheError(f"{self.path} ended while it was read; {VERIFY}")
            for at in range(first, last):
                if crc32c(rows[at]) != checksums[at - first].tobytes():
                    raise CacheError(
                        f"chunk {chunks[at]} of {self.path} is damaged: its CRC-32C does not match; {VERIFY}"
                    )
            first = last
