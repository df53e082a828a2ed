"""Reading a cache: features, means and labels into NumPy, each chunk's checksum checked on the way."""

from __future__ import annotations

import threading
from collections import OrderedDict
from functools import cached_property
from pathlib import Path

import numpy as np

from whisper_at_cli.extract.cache import schema
from whisper_at_cli.extract.cache.schema import CacheSpec, Status
from whisper_at_cli.extract.cache.shards import ShardFile
from whisper_at_cli.extract.errors import CacheError, UsageError

OPEN_SHARDS = 128  # memory maps kept per array


class FeatureCache:
    """Time-pooled output of every encoder block for one dataset, in a Zarr v3 group.

    Safe between threads; each process opens its own. Any number of readers, also while a writer is at work: what is
    done is read when the cache is opened. Only `status` says that a row is real; rows that are not done are refused.

    N clips, L layers, T frames, D channels, C classes; rows count from 0, layers from 1.
    """

    def __init__(self, path: Path, spec: CacheSpec, attributes: dict):
        import zarr

        self.path, self.spec, self.attributes = path, spec, attributes
        try:
            self._group = zarr.open_group(path, mode="r")
            self._features = self._group["features"]
            self.status = self._group["status"][:]
        except (KeyError, ValueError, OSError, TypeError) as error:
            raise CacheError(f"{path} is damaged ({error}); restore it or extract again to another path") from error
        self.clips_per_shard = self._features.shards[0]
        self._open: dict[str, OrderedDict[int, ShardFile]] = {}
        self._guard = threading.Lock()

    @classmethod
    def open(cls, path: str | Path) -> FeatureCache:
        """The cache at `path`. Raises UsageError where there is none, CacheError where it is damaged."""
        path = Path(path)
        attributes = schema.read_attributes(path)
        return cls(path, schema.spec_from_attributes(attributes, path), attributes)

    def __len__(self) -> int:
        return len(self.status)

    def __repr__(self) -> str:
        return f"FeatureCache({str(self.path)!r}: {len(self)} clips, {self.spec.backbone}, {self.spec.dtype})"

    @property
    def done(self) -> np.ndarray:
        """(N,) bool: rows whose features are real."""
        return self.status == Status.DONE

    @property
    def complete(self) -> bool:
        """Whether no clip is pending. Failed clips were tried and count as dealt with."""
        return not (self.status == Status.PENDING).any()

    @cached_property
    def ids(self) -> np.ndarray:
        """(N,) str, unique."""
        return self._strings("id")

    @cached_property
    def paths(self) -> np.ndarray:
        """(N,) str, relative to the dataset."""
        return self._strings("path")

    @cached_property
    def split(self) -> np.ndarray:
        """(N,) str, empty where the dataset names none."""
        return self._strings("split")

    @cached_property
    def errors(self) -> np.ndarray:
        """(N,) str: why a clip failed, empty otherwise."""
        return self._strings("error")

    @cached_property
    def fold(self) -> np.ndarray:
        """(N,) int16: official folds from 1, 0 where there is none."""
        return self._group["fold"][:]

    @cached_property
    def labels(self) -> np.ndarray:
        """(N, C) uint8; C is 0 for an unlabelled dataset."""
        if not self.spec.class_names:
            return np.zeros((len(self), 0), dtype=np.uint8)
        return self._group["labels"][:]

    @cached_property
    def valid_frames(self) -> np.ndarray:
        """(N,) uint8: how many of a clip's frames are real audio rather than padding."""
        return self._group["valid_frames"][:]

    def _strings(self, name: str) -> np.ndarray:
        return np.asarray(self._group[name][:]).astype(object).astype(str)

    def features(self, rows) -> np.ndarray:
        """All layers of some clips: (n, L, T, D), float16 or float32 as stored; int8 is decoded to float32."""
        rows = self._real_rows(rows)
        L, T, D = self.spec.layers, self.spec.frames, self.spec.dim
        out = np.empty((len(rows), L, T, D), dtype=self.spec.dtype)
        for at, row in enumerate(rows.tolist()):
            shard, slot = divmod(row, self.clips_per_shard)
            file = self._shard("features", shard)
            for layer in range(L):
                out[at, layer] = file.read(slot * L + layer)
        if self.spec.dtype == "int8":
            return out.astype(np.float32) * self._per_layer("scale", rows, range(L))[:, :, None, :]
        return out

    def layer(self, layer: int, rows=None) -> np.ndarray:
        """One layer of some clips (all that are done by default): (n, T, D) float32. Reads that layer's bytes only."""
        index = self._layer_index(layer)
        rows = self._real_rows(rows)
        L = self.spec.layers
        out = np.empty((len(rows), self.spec.frames, self.spec.dim), dtype=np.float32)
        for at, row in enumerate(rows.tolist()):
            shard, slot = divmod(row, self.clips_per_shard)
            out[at] = self._shard("features", shard).read(slot * L + index)
        if self.spec.dtype == "int8":
            out *= self._per_layer("scale", rows, [index])[:, 0, None, :]
        return out

    def mean(self, layer: int | None = None, rows=None) -> np.ndarray:
        """Mean over frames of some clips (all that are done by default): (n, L, D) float32, or (n, D) for one layer."""
        rows = self._real_rows(rows)
        if layer is not None:
            return self._per_layer("mean", rows, [self._layer_index(layer)])[:, 0]
        return self._per_layer("mean", rows, range(self.spec.layers))

    def _per_layer(self, name: str, rows: np.ndarray, layers) -> np.ndarray:
        """(n, len(layers), D) float32 of `mean` or `scale`, whose chunks are one layer of a whole shard."""
        out = np.empty((len(rows), len(layers), self.spec.dim), dtype=np.float32)
        shard_of, slot_of = np.divmod(rows, self.clips_per_shard)
        for shard in np.unique(shard_of).tolist():
            here = np.flatnonzero(shard_of == shard)
            file = self._shard(name, shard)
            for at, layer in enumerate(layers):
                out[here, at] = file.read(layer)[slot_of[here], 0]
        return out

    def _real_rows(self, rows) -> np.ndarray:
        if rows is None:
            return np.flatnonzero(self.done)
        rows = np.asarray(rows, dtype=np.int64).reshape(-1)
        if len(rows) and not (0 <= rows.min() and rows.max() < len(self)):
            raise UsageError(
                f"{self.path} has rows 0 to {len(self) - 1}; row {rows.min()} to {rows.max()} was asked for"
            )
        unreal = rows[~self.done[rows]]
        if len(unreal):
            state = Status(int(self.status[unreal[0]])).name.lower()
            raise CacheError(f"clip {str(self.ids[unreal[0]])!r} of {self.path} has no features: it is {state}")
        return rows

    def _layer_index(self, layer: int) -> int:
        if not 1 <= layer <= self.spec.layers:
            raise UsageError(
                f"{self.path} ({self.spec.backbone}) has layers 1 to {self.spec.layers}; layer {layer} was asked for"
            )
        return layer - 1

    def _shard(self, name: str, shard: int) -> ShardFile:
        with self._guard:
            files = self._open.setdefault(name, OrderedDict())
            if shard in files:
                files.move_to_end(shard)
                return files[shard]
            files[shard] = self._open_shard(name, shard)
            if len(files) > OPEN_SHARDS:
                files.popitem(last=False)  # its map is closed when the last view of it goes
            return files[shard]

    def _open_shard(self, name: str, shard: int) -> ShardFile:
        L, T, D, S = self.spec.layers, self.spec.frames, self.spec.dim, self.clips_per_shard
        if name == "features":
            path, count, shape, dtype = self.path / name / "c" / str(shard) / "0/0/0", S * L, (T, D), self.spec.dtype
        else:
            path, count, shape = self.path / name / "c" / str(shard) / "0/0", L, (S, 1, D)
            dtype = self.spec.mean_dtype if name == "mean" else "float16"
        return ShardFile(path, chunk_count=count, chunk_shape=shape, dtype=np.dtype(dtype).newbyteorder("<"))

    def __getstate__(self) -> dict:
        return {"path": self.path}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(FeatureCache.open(state["path"]).__dict__)
