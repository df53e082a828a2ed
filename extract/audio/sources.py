"""Where one clip's audio lies, and how it is read: small picklable values that a decoding process is sent.

Reading imports what a kind of source needs (h5py, pyarrow, obstore) and neither torch nor zarr.
"""

from __future__ import annotations

import os
import posixpath
import threading
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from whisper_at_cli.extract.audio import SAMPLE_RATE
from whisper_at_cli.extract.audio.decode import ClipAudio, clip_from_samples, load_clip
from whisper_at_cli.extract.errors import AudioError, MissingAudioError

if TYPE_CHECKING:
    import h5py
    import pyarrow

    from whisper_at_cli.extract.cache.store import BucketStore

OPEN_TABLES = 64  # Arrow files that a process keeps open
OPEN_SHARDS = 64  # tar files likewise


class ClipSource(Protocol):
    """One clip's audio. Picklable; may be read by any process and from several threads."""

    def read(self, samples: int) -> ClipAudio:
        """(samples,) int16 at 16 kHz, cut or zero-padded, how many samples are real, and a note.

        Raises AudioError for what cannot be read, MissingAudioError for what is not there.
        """
        ...


@dataclass(frozen=True, slots=True)
class FileClip:
    """A file, or the part of it between `start` and `end`, in seconds."""

    path: str
    start: float | None = None
    end: float | None = None

    def read(self, samples: int) -> ClipAudio:
        return load_clip(Path(self.path), samples, start=self.start, end=self.end)


@dataclass(frozen=True, slots=True)
class PackClip:
    """A row of `waveform` in an HDF5 pack, at `rate` Hz."""

    path: str
    row: int
    rate: int

    def read(self, samples: int) -> ClipAudio:
        needed = -(-(samples + SAMPLE_RATE) * self.rate // SAMPLE_RATE)
        try:
            with _hdf5:
                values = _pack(self.path, Path(self.path).stat().st_mtime_ns)["waveform"][self.row, :needed]
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            raise AudioError(f"it cannot be read from {Path(self.path).name}: {error}") from error
        if values.dtype != np.int16:
            if not np.isfinite(values).all():
                raise AudioError("it holds samples that are not finite (NaN or infinity)")
            values = values.astype(np.float32)
        return clip_from_samples(values, self.rate, samples)


_hdf5 = threading.Lock()


@lru_cache(maxsize=4)
def _pack(path: str, _written: int) -> h5py.File:
    import h5py

    return h5py.File(path, "r")


@dataclass(frozen=True, slots=True)
class TableClip:
    """A row of an Arrow file that Hugging Face `datasets` wrote: the bytes of an audio file, or a path below `root`."""

    table: str
    row: int
    column: str
    root: str

    def read(self, samples: int) -> ClipAudio:
        data, path = self.content()
        if data is not None:
            return load_clip(data, samples)
        if not path:
            raise MissingAudioError("the table holds neither bytes nor a path")
        return load_clip(Path(self.root) / path, samples)

    def content(self) -> tuple[bytes | None, str | None]:
        """The audio file's bytes, and its path; either may be absent. Raises AudioError."""
        try:
            value = _arrow(self.table, Path(self.table).stat().st_mtime_ns)[self.column][self.row].as_py()
        except (OSError, ValueError, LookupError) as error:
            raise AudioError(f"its row cannot be read: {error}") from error
        if isinstance(value, dict):
            return value.get("bytes"), value.get("path")
        if isinstance(value, bytes):
            return value, None
        if value is None:
            raise MissingAudioError("the table holds no audio here")
        return None, str(value)

    def is_there(self) -> bool:
        try:
            data, path = self.content()
        except AudioError:
            return False
        return data is not None or (bool(path) and (Path(self.root) / str(path)).exists())


@lru_cache(maxsize=OPEN_TABLES)
def _arrow(path: str, _written: int) -> pyarrow.Table:
    """An Arrow stream file, mapped into memory: nothing of it is read yet."""
    import pyarrow as arrow

    with arrow.memory_map(path) as file:
        return arrow.ipc.open_stream(file).read_all()


def arrow_rows(path: str) -> int:
    """How many rows an Arrow file holds."""
    return _arrow(path, Path(path).stat().st_mtime_ns).num_rows


@dataclass(frozen=True, slots=True)
class TarClip:
    """A member of a tar file, not compressed: `size` bytes of an audio file from byte `offset` on."""

    path: str
    offset: int
    size: int

    def read(self, samples: int) -> ClipAudio:
        try:
            shard = _opened(self.path)  # kept while it is read, whoever closes it
            data = os.pread(shard.file, self.size, self.offset)
        except FileNotFoundError as error:
            raise MissingAudioError(f"no shard {Path(self.path).name}") from error
        except OSError as error:
            raise AudioError(f"it cannot be read from {Path(self.path).name}: {error.strerror}") from error
        if len(data) < self.size:
            raise AudioError(f"{Path(self.path).name} ends within it: {len(data)} of {self.size} bytes are there")
        return load_clip(data, samples)


class _Opened:
    """A file that is open as long as this is kept; its descriptor may be read from several threads."""

    def __init__(self, path: str):
        self.file = -1
        self.file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self.file >= 0:
            os.close(self.file)


@lru_cache(maxsize=OPEN_SHARDS)
def _opened(path: str) -> _Opened:
    return _Opened(path)


@dataclass(frozen=True, slots=True)
class ObjectClip:
    """An object of a bucket below `address`, fetched whole, or the part of it between `start` and `end`, in seconds."""

    address: str
    name: str
    start: float | None = None
    end: float | None = None

    def read(self, samples: int) -> ClipAudio:
        data = _bucket(self.address).read(posixpath.normpath(self.name)) if self.name else None
        if data is None:
            raise MissingAudioError(f"no object {self.name} in {self.address}")
        return load_clip(data, samples, start=self.start, end=self.end)

    def is_there(self) -> bool:
        return _bucket(self.address).size(posixpath.normpath(self.name)) is not None


@lru_cache(maxsize=4)
def _bucket(address: str) -> BucketStore:
    from whisper_at_cli.extract.cache.store import BucketStore

    return BucketStore(address)
