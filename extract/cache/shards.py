"""The bytes of one file of a cache: Zarr v3 shards and chunks with CRC-32C, written whole and in one piece.

A shard file is its chunks one after another, each followed by its CRC-32C, then an index with offset and length of
every chunk (uint64, little-endian; both 2**64 - 1 where a chunk is absent) and the index's own CRC-32C. That is the
`sharding_indexed` codec of the Zarr v3 specification; zarr-python reads and writes the same bytes, only slower.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import google_crc32c
import numpy as np

from whisper_at_cli.extract.errors import CacheError

ABSENT = np.uint64(2**64 - 1)
CRC_BYTES = 4


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
    """Write a file so that it appears whole or not at all, and is on disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
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


class ShardFile:
    """Read access to one shard file by memory map. Safe between threads; each chunk's CRC-32C is checked when read."""

    def __init__(self, path: Path, *, chunk_count: int, chunk_shape: tuple[int, ...], dtype: np.dtype):
        self.path, self.chunk_shape, self.dtype = path, chunk_shape, np.dtype(dtype)
        index_bytes = chunk_count * 16
        try:
            with open(path, "rb") as file:
                self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError as error:
            raise CacheError(f"{path} is missing although its clips are marked done; run: verify") from error
        except ValueError as error:  # an empty file cannot be mapped
            raise CacheError(f"{path} is empty; run: verify") from error
        self.bytes = np.frombuffer(self.data, dtype=np.uint8)
        end = len(self.bytes) - CRC_BYTES
        if end < index_bytes or crc32c(self.bytes[end - index_bytes : end]) != self.bytes[end:].tobytes():
            raise CacheError(f"{path} is truncated or its index is damaged; run: verify")
        self.index = self.bytes[end - index_bytes : end].copy().view("<u8").reshape(chunk_count, 2)
        self.size = int(np.prod(chunk_shape)) * self.dtype.itemsize

    def __contains__(self, chunk: int) -> bool:
        return bool(self.index[chunk, 0] != ABSENT)

    def read(self, chunk: int) -> np.ndarray:
        """One chunk, a read-only view in storage type. Raises CacheError if it is absent or its checksum is wrong."""
        start, length = int(self.index[chunk, 0]), int(self.index[chunk, 1])
        if chunk not in self or length != self.size + CRC_BYTES or start + length > len(self.bytes):
            raise CacheError(f"{self.path} has no chunk {chunk}, although its clip is marked done; run: verify")
        data = self.bytes[start : start + self.size]
        if crc32c(data) != self.bytes[start + self.size : start + length].tobytes():
            raise CacheError(f"chunk {chunk} of {self.path} is damaged: its CRC-32C does not match; run: verify")
        return np.frombuffer(self.data, dtype=self.dtype, count=self.size // self.dtype.itemsize, offset=start).reshape(
            self.chunk_shape
        )
