"""Reading a cache: features, means and labels into NumPy, each chunk's checksum checked on the way."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from whisper_at_cli.extract.cache import schema
from whisper_at_cli.extract.cache.columns import read_column
from whisper_at_cli.extract.cache.layout import Layout
from whisper_at_cli.extract.cache.schema import CacheSpec, Status
from whisper_at_cli.extract.cache.shards import ShardFile
from whisper_at_cli.extract.cache.status import ClipStatus, Geometry, StatusChunks
from whisper_at_cli.extract.cache.status_log import StatusLog
from whisper_at_cli.extract.cache.store import BucketStore, LocalStore, files_of_one_reader, location
from whisper_at_cli.extract.errors import CacheError, UsageError

if TYPE_CHECKING:
    import zarr

Rows = Sequence[int] | np.ndarray  # of a cache, from 0

OPEN_SHARDS = files_of_one_reader()  # files kept open per array


class FeatureCache:
    """Time-pooled output of every encoder block for one dataset, in a Zarr v3 group.

    Safe between threads; each process opens its own. Any number of readers, also while a writer is at work: what is
    done is read when the cache is opened. Only `status` says that a row is real; rows that are not done are refused.

    N clips, L layers, T frames, D channels, C classes; rows count from 0, layers from 1 as in the
    encoder, also where a cache has but some of them.
    """

    def __init__(self, store: LocalStore | BucketStore, spec: CacheSpec, attributes: dict):
        import zarr

        self.store, self.path, self.spec, self.attributes = store, store.address, spec, attributes
        self.layout = Layout(attributes["format_version"])
        with schema.readable(store, "features"):
            self._group = zarr.open_group(store.zarr(), mode="r", zarr_format=3)
            clips, self.clips_per_shard = schema.check_features(self._array("features"), spec, store, self.layout)
        geometry = Geometry(clips, self.clips_per_shard, spec.frames)
        self.clip_status: ClipStatus = (StatusChunks if self.layout.version == 1 else StatusLog)(store, geometry)
        self._files: dict[str, dict[int, ShardFile]] = {}  # by array: every shard that was read
        self._used: dict[str, OrderedDict[int, None]] = {}  # by array: those whose files are open, least used first
        self._guard = threading.Lock()

    @classmethod
    def open(cls, path: str | Path) -> FeatureCache:
        """The cache at `path`, a folder or a bucket's address such as `s3://bucket/esc50.zarr`.

        Raises UsageError where there is none, CacheError where it is damaged or its bucket cannot be reached.
        """
        store = location(path)
        attributes = schema.read_attributes(store)
        return cls(store, schema.spec_from_attributes(attributes, store), attributes)

    def __len__(self) -> int:
        return len(self.status)

    def __repr__(self) -> str:
        return f"FeatureCache({str(self.path)!r}: {len(self)} clips, {self.spec.backbone}, {self.spec.dtype})"

    @property
    def status(self) -> np.ndarray:
        """(N,) uint8 of `Status`."""
        return self.clip_status.status

    @property
    def done(self) -> np.ndarray:
        """(N,) bool: rows whose features are real."""
        return self.status == Status.DONE

    @property
    def complete(self) -> bool:
        """Whether no clip is pending. Failed clips were tried and count as dealt with."""
        return not (self.status == Status.PENDING).any()

    @property
    def dataset(self) -> str:
        """The name of the dataset that it was made from."""
        return self.spec.dataset

    @cached_property
    def ids(self) -> np.ndarray:
        """(N,) of Python strings, unique."""
        return self._column("id")

    @cached_property
    def paths(self) -> np.ndarray:
        """(N,) of Python strings, relative to the dataset."""
        return self._column("path")

    @cached_property
    def split(self) -> np.ndarray:
        """(N,) of Python strings, empty where the dataset names none."""
        return self._column("split")

    @cached_property
    def errors(self) -> np.ndarray:
        """(N,) of Python strings: why a clip failed; of one that is done, a note on it. Mostly empty."""
        return self._column("error") if self.layout.version == 1 else self.clip_status.errors()

    @cached_property
    def fold(self) -> np.ndarray:
        """(N,) int16: official folds from 1, 0 where there is none."""
        return self._column("fold")

    @cached_property
    def labels(self) -> np.ndarray:
        """(N, C) uint8; C is 0 for an unlabelled dataset."""
        if not self.spec.class_names:
            return np.zeros((len(self), 0), dtype=np.uint8)
        return self._column("labels")

    @cached_property
    def digests(self) -> np.ndarray | None:
        """(N,) uint64 of each clip's file, part, size and time when the cache was made; 0 where unknown.

        None in a cache of before, which has none.
        """
        return self._column("digest") if self.has_digests else None

    @property
    def has_digests(self) -> bool:
        return self.layout.version > 1 or self.attributes.get(schema.DIGESTS) is True

    @property
    def valid_frames(self) -> np.ndarray:
        """(N,) uint8: how many of a clip's frames are real audio rather than padding."""
        return self.clip_status.valid_frames

    def _array(self, name: str) -> zarr.Array:
        import zarr

        array = self._group[name]
        if not isinstance(array, zarr.Array):
            raise CacheError(f"{self.store} is damaged ({name} is no array); restore it or extract again elsewhere")
        return array

    def _column(self, name: str) -> np.ndarray:
        return read_column(self.store, self.layout, self._group, name, self.spec, len(self))

    def check_axis(self, name: str) -> None:
        """Raise CacheError unless the array `layer` or `class` holds the cache's layers or classes."""
        expected = schema.named_axes(self.spec)[name]
        with schema.readable(self.store, name):
            if not np.array_equal(np.asarray(self._array(name)[:], dtype=expected.dtype), expected):
                raise ValueError("it is not what the cache's attributes say")

    def features(self, rows: Rows) -> np.ndarray:
        """All layers of some clips: (n, L, T, D), float16 or float32 as stored; int8 is decoded to float32."""
        out = self.stored_features(rows)
        if self.spec.dtype == "int8":
            return out.astype(np.float32) * self.scale(rows)[:, :, None, :]
        return out

    def scale(self, rows: Rows | None = None) -> np.ndarray:
        """With int8: what stored features are multiplied by, (n, L, D) float32."""
        return self._per_layer("scale", self._real_rows(rows), range(self.spec.layers))

    def stored_features(self, rows: Rows) -> np.ndarray:
        """All layers of some clips as they lie on disk: (n, L, T, D) float16, float32 or int8."""
        rows = self._real_rows(rows)
        L, T, D = self.spec.layers, self.spec.frames, self.spec.dim
        self._check_first("features", rows, L, range(L))
        out = np.empty((len(rows), L, T, D), dtype=self._stored)

        def read(at: int) -> None:
            shard, slot = divmod(int(rows[at]), self.clips_per_shard)
            self._shard("features", shard).read(range(slot * L, (slot + 1) * L), out[at])

        self.store.each(read, range(len(rows)), out.nbytes)
        return out

    def layer(self, layer: int, rows: Rows | None = None, *, dtype: str = "float32") -> np.ndarray:
        """One layer of some clips (all that are done by default): (n, T, D). Reads that layer's bytes only.

        With the stored type as `dtype` nothing is converted, which is faster.
        """
        index = self._layer_index(layer)
        rows = self._real_rows(rows)
        L, S = self.spec.layers, self.clips_per_shard
        self._check_first("features", rows, L, [index])
        out = np.empty((len(rows), self.spec.frames, self.spec.dim), dtype=self._stored)
        shard_of = rows // S
        edges = [0, *(np.flatnonzero(np.diff(shard_of)) + 1).tolist(), len(rows)] if len(rows) else []

        def read(edge: tuple[int, int]) -> None:  # a run of rows in one shard
            first, last = edge
            chunks = (rows[first:last] % S * L + index).tolist()
            self._shard("features", int(shard_of[first])).read(chunks, out[first:last])

        self.store.each(read, list(pairwise(edges)), out.nbytes)
        if self.spec.dtype == "int8":
            return (out * self._per_layer("scale", rows, [index])[:, 0, None, :]).astype(dtype, copy=False)
        return out.astype(dtype, copy=False)

    def mean(self, layer: int | None = None, rows: Rows | None = None) -> np.ndarray:
        """Mean over frames of some clips (all that are done by default): (n, L, D) float32, or (n, D) for one layer."""
        rows = self._real_rows(rows)
        if layer is not None:
            return self._per_layer("mean", rows, [self._layer_index(layer)])[:, 0]
        return self._per_layer("mean", rows, range(self.spec.layers))

    def _per_layer(self, name: str, rows: np.ndarray, layers: Sequence[int]) -> np.ndarray:
        """(n, len(layers), D) float32 of `mean` or `scale`, whose chunks are one layer of a whole shard."""
        if name == "mean":
            self._check_first(name, rows, 0, layers)
        out = np.empty((len(rows), len(layers), self.spec.dim), dtype=np.float32)
        shard_of, slot_of = np.divmod(rows, self.clips_per_shard)

        def read(shard: int) -> None:
            whole = np.empty((len(layers), self.clips_per_shard, self.spec.dim), dtype=self._per_layer_dtype(name))
            here = np.flatnonzero(shard_of == shard)
            file = self._shard(name, shard)
            (file.read_compressed if name == "scale" else file.read)(layers, whole)
            out[here] = whole[:, slot_of[here]].swapaxes(0, 1)

        self.store.each(read, np.unique(shard_of).tolist(), out.nbytes)
        return out

    def _check_first(self, name: str, rows: np.ndarray, chunks_per_clip: int, chunks: Sequence[int]) -> None:
        """Raise CacheError unless the first row's chunks are there: room is made only for what is."""
        if len(rows):
            shard, slot = divmod(int(rows[0]), self.clips_per_shard)
            self._shard(name, shard).check([slot * chunks_per_clip + chunk for chunk in chunks])

    @property
    def _stored(self) -> np.dtype:
        return np.dtype(self.spec.dtype).newbyteorder("<")

    def _per_layer_dtype(self, name: str) -> np.dtype:
        return np.dtype(self.spec.mean_dtype if name == "mean" else "float16").newbyteorder("<")

    def _real_rows(self, rows: Rows | None) -> np.ndarray:
        if rows is None:
            return np.flatnonzero(self.done)
        rows = np.asarray(rows, dtype=np.int64).reshape(-1)
        if len(rows) and not (rows.min() >= 0 and rows.max() < len(self)):
            raise UsageError(
                f"{self.path} has rows 0 to {len(self) - 1}; row {rows.min()} to {rows.max()} was asked for"
            )
        unreal = rows[~self.done[rows]]
        if len(unreal):
            state = Status(int(self.status[unreal[0]])).name.lower()
            raise CacheError(f"clip {str(self.ids[unreal[0]])!r} of {self.path} has no features: it is {state}")
        return rows

    @property
    def layer_numbers(self) -> tuple[int, ...]:
        """The encoder's layers that it holds, from 1 as in the paper: all, unless `select` left some out."""
        return self.spec.numbered_layers

    def _layer_index(self, layer: int) -> int:
        self.spec.refuse_layer(layer, str(self.path))
        return self.layer_numbers.index(layer)

    def _shard(self, name: str, shard: int) -> ShardFile:
        with self._guard:
            files, used = self._files.setdefault(name, {}), self._used.setdefault(name, OrderedDict())
            file = files.get(shard)
            if file is None:
                file = files[shard] = self._shard_file(name, shard)
            used[shard] = None
            used.move_to_end(shard)
            if len(used) > OPEN_SHARDS:
                files[used.popitem(last=False)[0]].release()
            return file

    def _shard_file(self, name: str, shard: int) -> ShardFile:
        L, T, D, S = self.spec.layers, self.spec.frames, self.spec.dim, self.clips_per_shard
        file = self.layout.file(name, shard)
        if name == "features":
            return ShardFile(self.store, file, chunk_count=S * L, chunk_bytes=T * D * self._stored.itemsize)
        size = S * D * self._per_layer_dtype(name).itemsize
        return ShardFile(self.store, file, chunk_count=L, chunk_bytes=size)

    def __getstate__(self) -> dict:
        return {"path": self.path}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(FeatureCache.open(state["path"]).__dict__)
