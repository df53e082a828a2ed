"""The bytes of one file of a cache: Zarr v3 shards and chunks with CRC-32C, written whole and in one piece.

A shard file is its chunks one after another, each followed by its CRC-32C, then an index with offset and length of
every chunk (uint64, little-endian; both 2**64 - 1 where a chunk is absent) and the index's own CRC-32C. That is the
`sharding_indexed` codec of the Zarr v3 specification; zarr-python reads and writes the same bytes, only slower.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import google_crc32c
import numpy as np
from numcodecs import zstd

from whisper_at_cli.extract.cache.store import BucketFile, BucketStore, InMemory, LocalFile, LocalStore
from whisper_at_cli.extract.errors import CacheError

ABSENT = np.uint64(2**64 - 1)
CRC_BYTES = 4
INDEX_BYTES = 16  # of a shard's index, for each chunk
ZSTD_LEVEL = 1  # scales compress to 0.8 of their size at any level
VERIFY = "run: whisper-at-cli verify"


def crc32c(data: np.ndarray | bytes) -> bytes:
    """CRC-32C of contiguous bytes, as the four little-endian bytes that Zarr appends."""
    return google_crc32c.value(data).to_bytes(CRC_BYTES, "little")


def _unlocked_crc32c() -> Callable[[int, int], int] | None:
    """google-crc32c's own C routine, of an address and a number of bytes; None where it cannot be had.

    Called this way it leaves the interpreter's lock to other threads meanwhile, which the package's function does not.
    """
    try:
        from google_crc32c import _crc32c

        function = ctypes.CDLL(_crc32c.__file__).crc32c_value
    except (ImportError, OSError, AttributeError):
        return None
    function.restype, function.argtypes = ctypes.c_uint32, (ctypes.c_void_p, ctypes.c_size_t)
    probe = np.arange(250, dtype=np.uint8)
    return function if function(probe.ctypes.data, len(probe)) == google_crc32c.value(probe) else None


_crc32c_at = _unlocked_crc32c()


def row_checksums(rows: np.ndarray, wanted: Sequence[int]) -> np.ndarray:
    """CRC-32C of these rows of (n, bytes) uint8, each contiguous -> little-endian uint32."""
    if _crc32c_at is None:
        return np.array([google_crc32c.value(rows[row]) for row in wanted], dtype="<u4")
    first, stride, length = rows.ctypes.data, rows.strides[0], rows.shape[1]
    return np.array([_crc32c_at(first + row * stride, length) for row in wanted], dtype="<u4")


def shard_buffers(chunks: np.ndarray, present: np.ndarray, *, compressed: bool = False) -> list:
    """A shard file as a list of buffers to be written one after another; plain chunks' own bytes are not copied.

    chunks      (K, ...) C-contiguous, one row per chunk in the order of the shard's chunk grid (C order)
    present     (K or more,) bool; an absent chunk takes no space and reads as the array's fill value
    compressed  by zstd, each chunk before its checksum is taken
    """
    rows = chunks.reshape(len(chunks), -1).view(np.uint8)
    written = np.flatnonzero(present).tolist()
    if compressed:
        data = [zstd.compress(rows[row], ZSTD_LEVEL) for row in written]
        checksums = np.array([google_crc32c.value(part) for part in data], dtype="<u4")
    else:
        data = [rows[row] for row in written]
        checksums = row_checksums(rows, written)
    lengths = np.array([len(part) + CRC_BYTES for part in data], dtype=np.uint64)
    index = np.full((len(present), 2), ABSENT, dtype="<u8")
    index[written, 0] = np.cumsum(lengths) - lengths
    index[written, 1] = lengths
    index_bytes = index.tobytes()
    trailers = memoryview(checksums.tobytes())
    buffers: list = []
    for at, part in enumerate(data):
        buffers += (part, trailers[CRC_BYTES * at : CRC_BYTES * (at + 1)])
    return [*buffers, index_bytes, crc32c(index_bytes)]


class ShardImage:
    """Memory laid out as a shard file whose chunks are all present, so that it is written as it is, in one piece.

    Every chunk is followed by room for its checksum, and the last one by room for the index.

    memory  (at least `ShardImage.size(...)`,) uint8
    """

    def __init__(self, memory: np.ndarray, chunk_count: int, chunk_bytes: int):
        self._memory, self._chunk_count, self._chunk_bytes = memory, chunk_count, chunk_bytes

    @staticmethod
    def size(chunk_count: int, chunk_bytes: int) -> int:
        """Bytes of the file."""
        return chunk_count * (chunk_bytes + CRC_BYTES + INDEX_BYTES) + CRC_BYTES

    def finished(self, chunks: int) -> np.ndarray:
        """The file with its first so many chunks, all others absent: checksums and index are put into the memory."""
        stride = self._chunk_bytes + CRC_BYTES
        framed = self._memory[: chunks * stride].reshape(chunks, stride)
        checksums = row_checksums(framed[:, : self._chunk_bytes], range(chunks))
        framed[:, self._chunk_bytes :] = checksums.view(np.uint8).reshape(chunks, CRC_BYTES)
        index = np.full((self._chunk_count, 2), ABSENT, dtype="<u8")
        index[:chunks, 0] = np.arange(chunks, dtype=np.uint64) * np.uint64(stride)
        index[:chunks, 1] = stride
        index_bytes = index.tobytes()
        end = np.frombuffer(index_bytes + crc32c(index_bytes), np.uint8)
        size = chunks * stride + len(end)
        self._memory[chunks * stride : size] = end
        return self._memory[:size]


def chunk_buffers(chunk: np.ndarray) -> list:
    """A chunk file as buffers: the values, then their CRC-32C."""
    data = np.ascontiguousarray(chunk).tobytes()
    return [data, crc32c(data)]


def read_chunk(store: LocalStore | BucketStore, name: str, count: int) -> np.ndarray | None:
    """A chunk file of `count` bytes, (count,) uint8; None where there is none. Raises CacheError if it is damaged."""
    data = store.read(name)
    if data is None:
        return None
    if len(data) != count + CRC_BYTES or crc32c(data[:-CRC_BYTES]) != data[-CRC_BYTES:]:
        raise CacheError(f"{store}/{name} is damaged: its CRC-32C does not match; {VERIFY}")
    return np.frombuffer(data, dtype=np.uint8, count=count)


class FileLike(Protocol):
    """A file that parts are read of."""

    size: int

    def readv(self, buffers: list, start: int, /) -> int: ...


def read_index(file: FileLike, chunk_count: int, path: str) -> np.ndarray:
    """(chunks, 2) uint64: offset and length of every chunk of a shard file, both ABSENT where there is none.

    Raises CacheError where the file is cut off, or its index damaged.
    """
    start = file.size - INDEX_BYTES * chunk_count - CRC_BYTES
    index = np.empty((chunk_count if start >= 0 else 0, 2), dtype="<u8")
    checksum = bytearray(CRC_BYTES)
    if start < 0 or file.readv([index, checksum], start) != index.nbytes + CRC_BYTES:
        raise CacheError(f"{path} is {f'truncated to {file.size} bytes' if file.size else 'empty'}; {VERIFY}")
    if crc32c(index.reshape(-1).view(np.uint8)) != bytes(checksum):
        raise CacheError(f"{path} is truncated or its index is damaged; {VERIFY}")
    held = index[(index != ABSENT).any(axis=1)]
    if (held > start).any() or held[:, 1].sum(dtype=np.float64) > start or (held.sum(axis=1) > start).any():
        raise CacheError(f"{path} is damaged: its index names more bytes than it holds; {VERIFY}")
    return index


def check_shard(data: bytes, chunk_count: int, path: str) -> None:
    """Raise CacheError where the bytes of a whole shard file are not those that its checksums are of."""
    index = read_index(InMemory(data), chunk_count, path)
    whole = np.frombuffer(data, np.uint8)
    for chunk in np.flatnonzero((index != ABSENT).any(axis=1)).tolist():
        offset, length = index[chunk].tolist()
        part = whole[offset : offset + length]
        if length <= CRC_BYTES or row_checksums(part[None, :-CRC_BYTES], [0]).tobytes() != part[-CRC_BYTES:].tobytes():
            raise CacheError(f"chunk {chunk} of {path} is damaged: its CRC-32C does not match; {VERIFY}")


class ShardFile:
    """Read access to the chunks of one shard file, straight into the caller's arrays; every CRC-32C is checked.

    Safe between threads. Opened by the first read. Chunks that lie side by side are read by one call, and nothing but
    them is read.
    """

    def __init__(self, store: LocalStore | BucketStore, name: str, *, chunk_count: int, chunk_bytes: int):
        self.path, self.chunk_bytes = f"{store}/{name}", chunk_bytes
        self._store, self._name, self._chunk_count = store, name, chunk_count
        self._file: LocalFile | BucketFile | None = None
        self._size = -1
        self._ranks: Sequence[int] | np.ndarray = range(0)  # of each chunk among those that are there, -1 if it is not
        self._listed: tuple[list[int], list[int]] | None = None  # starts and lengths, where chunks lie otherwise
        self._opening = threading.Lock()

    def release(self) -> None:
        """Close the file when the last thread is done with it. What its index said is kept."""
        self._file = None

    def _open(self) -> LocalFile | BucketFile:
        """The file, its index read and checked, unless it was before and the file is as long as then."""
        with self._opening:
            if self._file is None:
                try:
                    file = self._store.open(self._name)
                except FileNotFoundError as error:
                    raise CacheError(f"{self.path} is missing although its clips are marked done; {VERIFY}") from error
                if file.size != self._size:
                    self._read_index(file)
                    self._size = file.size
                self._file = file
            return self._file

    def _read_index(self, file: LocalFile | BucketFile) -> None:
        index = read_index(file, self._chunk_count, self.path)
        stride, present = self.chunk_bytes + CRC_BYTES, (index != ABSENT).any(axis=1)
        held = index[present]
        self._ranks, self._listed = range(len(held)), None
        if not present[: len(held)].all():
            self._ranks = np.where(present, np.cumsum(present) - 1, -1).astype(np.int32)
        if (held[:, 0] != np.arange(len(held)) * stride).any() or (held[:, 1] != stride).any():
            self._listed = index[:, 0].tolist(), index[:, 1].tolist()

    def check(self, chunks: Sequence[int]) -> LocalFile | BucketFile:
        """The open file. Raises CacheError unless it has these chunks."""
        file = self._file or self._open()
        stride = self.chunk_bytes + CRC_BYTES
        if len(chunks) and not self._listed and isinstance(self._ranks, range):
            chunks = [max(chunks)]
        for chunk in chunks:
            start, length = self._place(chunk)
            if length != stride or start + stride > file.size:
                raise self._absent(chunk)
        return file

    def _place(self, chunk: int) -> tuple[int, int]:
        """Where a chunk begins, and its bytes; none of a chunk that is not there."""
        if self._listed:
            return self._listed[0][chunk], self._listed[1][chunk]
        stride, rank = self.chunk_bytes + CRC_BYTES, int(self._ranks[chunk]) if chunk < len(self._ranks) else -1
        return rank * stride, stride if rank >= 0 else 0

    def _absent(self, chunk: int) -> CacheError:
        return CacheError(f"{self.path} has no chunk {chunk} although its clip is marked done; {VERIFY}")

    def read(self, chunks: Sequence[int], out: np.ndarray) -> None:
        """Read chunks into the rows of `out`, (len(chunks), ...), each row C-contiguous and of a chunk's bytes.

        Raises CacheError if one is absent, cut off, or its checksum is wrong.
        """
        file = self.check(chunks)
        rows = out.reshape(len(chunks), -1).view(np.uint8)
        stride = self.chunk_bytes + CRC_BYTES
        readv, starts = file.readv, [self._place(chunk)[0] for chunk in chunks]
        checksums = np.empty((len(chunks), CRC_BYTES), dtype=np.uint8)

        def read_run(run: tuple[int, int]) -> None:
            first, last = run
            buffers = [buffer for at in range(first, last) for buffer in (rows[at], checksums[at])]
            if readv(buffers, starts[first]) != (last - first) * stride:
                raise CacheError(f"{self.path} ended while it was read; {VERIFY}")

        runs = list(_runs(starts, stride, file.run))
        file.expect([(starts[first], (last - first) * stride) for first, last in runs])
        for some in _together(runs, file.run):
            self._store.map(read_run, some)
            read = range(some[0][0], some[-1][1])
            found = row_checksums(rows, read).view(np.uint8).reshape(-1, CRC_BYTES)
            wrong = np.flatnonzero((found != checksums[read.start : read.stop]).any(axis=1))
            if len(wrong):
                chunk = chunks[read[int(wrong[0])]]
                raise CacheError(f"chunk {chunk} of {self.path} is damaged: its CRC-32C does not match; {VERIFY}")

    def read_compressed(self, chunks: Sequence[int], out: np.ndarray) -> None:
        """`read` for chunks that were compressed by zstd."""
        file = self._file or self._open()
        rows = out.reshape(len(chunks), -1).view(np.uint8)
        for row, chunk in zip(rows, chunks, strict=True):
            start, length = self._place(chunk)
            if not length or start + length > file.size:
                raise self._absent(chunk)
            data = bytearray(length)
            if file.readv([data], start) != length or crc32c(bytes(data[:-CRC_BYTES])) != data[-CRC_BYTES:]:
                raise CacheError(f"chunk {chunk} of {self.path} is damaged: its CRC-32C does not match; {VERIFY}")
            row[:] = 0xFF  # NaN, should it hold fewer numbers
            try:
                zstd.decompress(bytes(data[:-CRC_BYTES]), row)
            except (RuntimeError, ValueError) as error:
                raise CacheError(f"chunk {chunk} of {self.path} is damaged ({error}); {VERIFY}") from error


def _runs(starts: list[int], stride: int, longest: int) -> Iterator[tuple[int, int]]:
    """First and last (exclusive) of chunks that lie side by side, at most so many of them."""
    first = 0
    while first < len(starts):
        start, last, end = starts[first], first + 1, min(len(starts), first + longest)
        while last < end and starts[last] == start + (last - first) * stride:
            last += 1
        yield first, last
        first = last


def _together(runs: list[tuple[int, int]], chunks: int) -> Iterator[list[tuple[int, int]]]:
    """Runs whose checksums are taken together: as few chunks as are still in the processor's cache then."""
    some: list[tuple[int, int]] = []
    for first, last in runs:
        if some and last - some[0][0] > chunks:
            yield some
            some = []
        some.append((first, last))
    if some:
        yield some
