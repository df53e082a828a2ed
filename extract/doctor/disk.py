"""How a folder's disk does what a cache asks of it: whole files written, read back, small chunks at random, locks.

Measured in a file without a name where the system has such, so that nothing is left behind even by a kill. Every
measurement stops after a time limit. Needs nothing but Python.
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from whisper_at_cli.extract.folders import take_lock
from whisper_at_cli.extract.machine import IN_MEMORY, file_system

PREFIX = ".whisper-at-cli-doctor-"
PIECE_BYTES = 16 << 20  # written and synchronised in one go; a slow disk is stopped after one
MOST_BYTES = 512 << 20
CHUNK_BYTES = 64_000  # of a cache of a large Whisper: one clip, one layer, 25 frames of 1280 channels in float16
SECONDS = 1.0  # for each measurement


@dataclass(frozen=True)
class DiskSpeed:
    """Rates in one folder. `reads_from` is disk, or memory where the system's cache could not be emptied first."""

    write_mb_per_second: float
    write_piece_bytes: int  # after each of which the disk was waited for
    read_mb_per_second: float
    random_chunk_bytes: int
    random_chunks_per_second: float
    random_mb_per_second: float
    reads_from: str
    measured_mb: float


@dataclass(frozen=True)
class Folder:
    """A folder that results could go to. `locks` says whether the file system knows them; None where none was tried."""

    folder: str
    file_system: str | None
    free_bytes: int | None
    writable: bool
    locks: bool | None
    error: str = ""


def examine_folder(folder: Path) -> Folder:
    """What can be said of a folder without measuring. Raises nothing: what is refused is in `error`."""
    try:
        free = shutil.disk_usage(folder).free
    except OSError:
        free = None
    try:
        locks = _locks_work(folder)
    except OSError as error:
        reason = error.strerror or str(error)
        return Folder(str(folder), file_system(folder), free, False, None, reason)
    return Folder(str(folder), file_system(folder), free, True, locks)


def _locks_work(folder: Path) -> bool:
    """Whether a lock on a file in this folder keeps a second one out. Raises OSError where no file can be made."""
    with tempfile.NamedTemporaryFile(prefix=PREFIX, dir=folder) as first, open(first.name, "rb+") as second:
        return take_lock(first) and not take_lock(second)


def measure_disk(folder: Path, *, seconds: float = SECONDS) -> DiskSpeed:
    """Write, read back and read at random, each for at most `seconds`. Raises OSError where the disk refuses."""
    most = min(MOST_BYTES, shutil.disk_usage(folder).free // 4)
    with tempfile.TemporaryFile(prefix=PREFIX, dir=folder, buffering=0) as file:
        written, write_rate = _write(file.fileno(), most, seconds)
        from_disk = _forget(file.fileno()) and file_system(folder) not in IN_MEMORY
        read_rate = _read(file.fileno(), written, seconds)
        _forget(file.fileno())
        chunks_per_second = _read_chunks(file.fileno(), written, seconds)
    return DiskSpeed(
        write_mb_per_second=write_rate / 1e6,
        write_piece_bytes=PIECE_BYTES,
        read_mb_per_second=read_rate / 1e6,
        random_chunk_bytes=CHUNK_BYTES,
        random_chunks_per_second=chunks_per_second,
        random_mb_per_second=chunks_per_second * CHUNK_BYTES / 1e6,
        reads_from="disk" if from_disk else "memory",
        measured_mb=written / 1e6,
    )


def _write(descriptor: int, most: int, seconds: float) -> tuple[int, float]:
    """Bytes written, each piece on the disk before the next, and bytes per second."""
    piece = os.urandom(max(CHUNK_BYTES, min(PIECE_BYTES, most)))  # nothing that a file system could compress
    written, started = 0, time.perf_counter()
    while True:
        view = memoryview(piece)
        while view:
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
        written += len(piece)
        spent = time.perf_counter() - started
        if spent > seconds or written + len(piece) > most:
            return written, written / spent


def _forget(descriptor: int) -> bool:
    """Drop a file from the system's cache; False where the system cannot."""
    if not hasattr(os, "posix_fadvise"):
        return False
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    except OSError:
        return False
    return True


def _read(descriptor: int, size: int, seconds: float) -> float:
    """Bytes per second of one pass through the file."""
    piece, at, started = 4 << 20, 0, time.perf_counter()
    while at < size and time.perf_counter() - started < seconds:
        at += len(os.pread(descriptor, piece, at))
    return at / (time.perf_counter() - started)


def _read_chunks(descriptor: int, size: int, seconds: float) -> float:
    """Chunks per second, one after another by one thread, in random order and none of them twice."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)  # no reading ahead
    places = [at * CHUNK_BYTES for at in range(size // CHUNK_BYTES)]
    random.Random(0).shuffle(places)  # noqa: S311 - places on a disk
    done, started = 0, time.perf_counter()
    while done < len(places) and time.perf_counter() - started < seconds:
        os.pread(descriptor, CHUNK_BYTES, places[done])
        done += 1
    return done / (time.perf_counter() - started)
