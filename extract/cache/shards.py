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
RUN = 256  # chunks that one call reads at most; the system limits a call to 1024 buffers
VERIFY = "run: whisper-at-cli verify"


def crc32c(data: np.ndarray | bytes) -> bytes:
    """CRC-32C of contiguous bytes, as the four little-endian bytes that Zarr appends."""
    return google_crc32c.value(data).to_bytes(CRC_BYTES, "little")


def encode_shard(chunks: np.ndarray, present: np.ndarray) -> bytearray:
    """A shard file's bytes.

    chunks   (K, ...) one row per chunk, in the order of the shard's chunk grid (C order), C-contiguous
    present  (K,) bool; an absent chunk takes no space and reads as the array's fill value
    """
    rows = chunks.reshape(len(chunks), -1).view(np.uint8)
    size = rows.shape[1]
    stride = size + CRC_BYTES
    count = int(present.sum())
    index = np.full((len(chunks), 2), ABSENT, dtype="<u8")
    index[present, 0] = np.arange(count, dtype=np.uint64) * np.uint64(stride)
    index[present, 1] = stride
    out = bytearray(count * stride + index.nbytes + CRC_BYTES)
    body = np.frombuffer(out, dtype=np.uint8, count=count * stride).reshape(count, stride)
    for slot, row in enumerate(np.flatnonzero(present)):
        body[slot, :size] = rows[row]
        body[slot, size:] = np.frombuffer(crc32c(rows[row]), dtype=np.uint8)
    index_bytes = index.tobytes()
    out[count * stride : -CRC_BYTES] = index_bytes
    out[-CRC_BYTES:] = crc32c(index_bytes)
    del body  # releases the view, so that the caller may resize or hand over the buffer
    return out


def encode_chunk(chunk: np.ndarray) -> bytes:
    """A chunk file's bytes: the values, then their CRC-32C."""
    data = np.ascontiguousarray(chunk).tobytes()
    return data + crc32c(data)


def write_whole(path: Path, data) -> None:
    """Write a file so that it appears whole or not at all, and is on disk when this returns. One writer per file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")  # what a killed run left is written over
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
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
        checksums = np.empty((len(chunks), CRC_BYTES), dtype=np.uint8)
        first = 0
        while first < len(chunks):
            start = self._starts[chunks[first]]
            last = first + 1
            while (
                last < len(chunks)
                and last - first < RUN
                and self._starts[chunks[last]] == start + (last - first) * stride
            ):
                last += 1
            buffers = [buffer for at in range(first, last) for buffer in (rows[at], checksums[at])]
            if _readv(self._file, buffers, start) != (last - first) * stride:
                raise CacheError(f"{self.path} ended while it was read; {VERIFY}")
            first = last
        for at, chunk in enumerate(chunks):
            if crc32c(rows[at]) != checksums[at].tobytes():
                raise CacheError(f"chunk {chunk} of {self.path} is damaged: its CRC-32C does not match; {VERIFY}")
