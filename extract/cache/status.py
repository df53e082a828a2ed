"""What is known of each clip: its status, how many of its frames are real, and why it failed or a note on it.

In version 1 of the format these are arrays with a chunk file for each shard; from version 2 on, a log (`status_log`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from whisper_at_cli.extract.cache.layout import Layout
from whisper_at_cli.extract.cache.schema import Status, readable, shard_count, shard_rows
from whisper_at_cli.extract.cache.shards import chunk_buffers, read_chunk
from whisper_at_cli.extract.cache.store import BucketStore, LocalStore
from whisper_at_cli.extract.errors import CacheError


@dataclass
class ShardStatus:
    """What is known of the n clips of one shard."""

    status: np.ndarray  # (n,) uint8
    valid_frames: np.ndarray  # (n,) uint8
    errors: dict[int, str] = field(default_factory=dict)  # row within the shard -> why it failed, or a note


@dataclass(frozen=True)
class Geometry:
    """How many clips a cache has, and how they lie."""

    clips: int
    clips_per_shard: int
    frames: int

    def rows(self, shard: int) -> range:
        """Rows of a shard; none where there is no such shard."""
        return shard_rows(shard, self.clips_per_shard, self.clips)


class ClipStatus(ABC):
    """Status of every clip of a cache, read and written.

    `problems` lists what is damaged as (shard, what was found); the shard is -1 where it is not known, or not one.
    A clip of which nothing is known any more is pending: what is not known to be done counts as not done.
    """

    slot = (1, 1)  # of the process, if it writes

    def __init__(self, store: LocalStore | BucketStore, geometry: Geometry):
        self.store, self.geometry = store, geometry
        self.problems: list[tuple[int, str]] = []

    def all_problems(self) -> list[tuple[int, str]]:
        """`problems` when all is read, and those of arrays that only other readers of Zarr read."""
        self.valid_frames  # noqa: B018 - reading it finds its damage
        return [*self.problems, *((-1, problem) for problem in self.array_problems())]

    @property
    @abstractmethod
    def status(self) -> np.ndarray:
        """(N,) uint8, kept up to date with what this process writes."""

    @property
    @abstractmethod
    def valid_frames(self) -> np.ndarray:
        """(N,) uint8."""

    @abstractmethod
    def errors(self, rows: range | None = None) -> np.ndarray:
        """Why clips failed, or notes on them, as it is on disk now: (N,) of text, or of a run of rows."""

    def array_problems(self) -> list[str]:
        """What is wrong with arrays that only other readers of Zarr read."""
        return []

    @abstractmethod
    def write(self, shard: int, said: ShardStatus) -> None:
        """Say what is known of a shard whose features are safe. What it says is safe when this returns."""

    @abstractmethod
    def reload(self) -> None:
        """Take in what other processes have written since."""

    @abstractmethod
    def finish(self, *, rewrite: bool = False) -> None:
        """This process writes no more. With `rewrite`, all that can be made from what is known is made again."""


class StatusChunks(ClipStatus):
    """Version 1: arrays `valid_frames`, `error` and `status` with a chunk for each shard, written in this order."""

    layout = Layout(1)

    @cached_property
    def status(self) -> np.ndarray:
        return self._bytes_per_clip("status", max(Status))

    @cached_property
    def valid_frames(self) -> np.ndarray:
        return self._bytes_per_clip("valid_frames", self.geometry.frames)

    def _bytes_per_clip(self, name: str, most: int) -> np.ndarray:
        """(N,) uint8, 0 where there is no chunk yet, or one that is damaged or holds more than `most`."""
        S, out = self.geometry.clips_per_shard, np.zeros(self.geometry.clips, dtype=np.uint8)

        def read(shard: int) -> None:
            file = self.layout.file(name, shard)
            try:
                chunk = read_chunk(self.store, file, S)
            except CacheError:
                self.problems.append((shard, f"{file} is damaged: its CRC-32C does not match"))
                return
            if chunk is not None and chunk.max() > most:
                self.problems.append((shard, f"{file} is damaged: it holds {chunk.max()}, and {most} is the most"))
            elif chunk is not None:
                rows = self.geometry.rows(shard)
                out[rows.start : rows.stop] = chunk[: len(rows)]

        self.store.map(read, range(shard_count(self.geometry.clips, self.geometry.clips_per_shard)))
        self.problems.sort()
        return out

    def reload(self) -> None:
        for name in ("status", "valid_frames"):
            self.__dict__.pop(name, None)
        self.problems = []

    def errors(self, rows: range | None = None) -> np.ndarray:
        import zarr

        with readable(self.store, "error"):
            array = zarr.open_array(self.store.zarr(), path="error", mode="r", zarr_format=3)
            return np.asarray(array[:] if rows is None else array[rows.start : rows.stop], dtype=object)

    def write(self, shard: int, said: ShardStatus) -> None:
        self.store.write_whole(self.layout.file("valid_frames", shard), self._chunk(said.valid_frames))
        if said.errors or self.store.exists(self.layout.file("error", shard)):
            self._write_errors(shard, said.errors)
        self.store.write_whole(self.layout.file("status", shard), self._chunk(said.status))
        rows = self.geometry.rows(shard)
        self.status[rows.start : rows.stop] = said.status

    def _chunk(self, values: np.ndarray) -> list:
        chunk = np.zeros(self.geometry.clips_per_shard, dtype=np.uint8)
        chunk[: len(values)] = values
        return chunk_buffers(chunk)

    def _write_errors(self, shard: int, errors: dict[int, str]) -> None:
        import zarr

        rows = self.geometry.rows(shard)
        texts = np.array([errors.get(slot, "") for slot in range(len(rows))], dtype=object)
        with self.store.asking("error"):
            array = zarr.open_array(self.store.zarr(), path="error", mode="r+", zarr_format=3)
            array[rows.start : rows.stop] = texts
        self.store.sync(self.layout.file("error", shard))

    def finish(self, *, rewrite: bool = False) -> None:
        """Nothing: every chunk is in its place."""
