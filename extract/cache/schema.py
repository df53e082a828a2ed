"""The cache's schema: which arrays and attributes a cache has, and how they are created and recognised.

N clips, L layers, T frames, D channels, C classes, S clips per shard.

features      (N, L, T, D)  one shard file per S clips, one chunk per clip and layer, CRC-32C on each
scale         (N, L, D)     only with int8: features = stored * scale; laid out as mean is, and compressed by zstd
mean          (N, L, D)     mean over frames; one shard file per S clips, one chunk per layer
status, valid_frames  (N,)  uint8; see `status`, which also says how they are kept while a run goes on
error         (N,)          why a clip failed; of one that is done, a note on it; mostly empty
id, path, fold, split, labels   what the dataset says of each clip; written when the cache is created
digest        (N,)          uint64, of a clip's file, part, size and time; 0 where unknown
layer, class  (L,), (C,)    numbers of the layers and names of the classes, as other readers of Zarr look for them

Caches of version 1 have a chunk of status, valid_frames and error for each shard, and no `layer` and `class`; those of
before digests no `digest`.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from enum import IntEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from whisper_at_cli.extract.cache.column_files import COLUMN_LEVEL, write_column
from whisper_at_cli.extract.cache.layout import NEWEST, VERSIONS, Layout
from whisper_at_cli.extract.cache.metadata import COPY, METADATA, keep_copy
from whisper_at_cli.extract.cache.shards import ZSTD_LEVEL
from whisper_at_cli.extract.cache.store import BucketStore, LocalStore
from whisper_at_cli.extract.errors import CacheError, UsageError, WhisperATError
from whisper_at_cli.extract.sparse import SparseLabels
from whisper_at_cli.extract.texts import first_repeated, text_column

if TYPE_CHECKING:
    import zarr

LAYOUT = Layout()
FORMAT_NAME = "whisper-at-cli feature cache"
FRAMES = 25
DTYPES = ("float16", "float32", "int8")
DEFAULT_SHARD_MB = 128
MAX_CLIPS_PER_SHARD = 256  # so that a killed run of a small model loses little
BATCH_STEPS = (32, 16)  # that the clips of a large shard are a multiple of
DIGESTS = "source_digests"  # the attribute of a cache that has them
COORDINATES = "id path split fold digest status valid_frames error"  # of a clip, to xarray
DIMENSIONS = {
    "features": ("clip", "layer", "frame", "channel"),
    **dict.fromkeys(("mean", "scale"), ("clip", "layer", "channel")),
    "labels": ("clip", "class"),
    **{name: (name,) for name in ("layer", "class")},
    **dict.fromkeys(("id", "path", "split", "fold", "digest", "status", "valid_frames", "error"), ("clip",)),
}
LABEL_BYTES = 1 << 25  # of a chunk of labels, before it is packed
ROWS_PER_CHUNK = 65536  # of what the dataset says of each clip
MAX_CLIP_BYTES = 1 << 28  # of features; 64 times a clip of the largest Whisper in float32
FIELD_TYPES = {
    int: ("layers", "dim", "frames"),
    float: ("clip_seconds",),
    str: ("backbone", "weights_sha256", "dtype", "precision", "dataset"),
}


class Status(IntEnum):
    """What is known of a clip's features."""

    PENDING = 0
    DONE = 1
    FAILED = 2


@dataclass(frozen=True)
class CacheSpec:
    """What made a cache. A cache that is continued must agree with it."""

    backbone: str
    weights_sha256: str
    layers: int
    dim: int
    clip_seconds: float
    dtype: str = "float16"
    precision: str = "float32"
    dataset: str = ""
    class_names: tuple[str, ...] = ()
    frames: int = FRAMES
    layer_numbers: tuple[int, ...] = ()  # of the encoder, from 1, where a cache has but some; empty for all

    def __post_init__(self) -> None:
        object.__setattr__(self, "class_names", tuple(self.class_names))
        object.__setattr__(self, "layer_numbers", tuple(self.layer_numbers))
        if self.dtype not in DTYPES:
            raise UsageError(f"storage type {self.dtype!r} is not known; choose from {', '.join(DTYPES)}")
        if min(self.layers, self.dim, self.frames) < 1 or self.clip_seconds <= 0:
            raise ValueError(f"a cache needs at least one layer, channel, frame and sample: {self}")
        if self.layer_numbers and (
            len(self.layer_numbers) != self.layers or list(self.layer_numbers) != sorted(set(self.layer_numbers))
        ):
            raise ValueError(f"layer_numbers {self.layer_numbers} of {self.layers} layers")

    @property
    def numbered_layers(self) -> tuple[int, ...]:
        """The numbers of its layers in the encoder, from 1."""
        return self.layer_numbers or tuple(range(1, self.layers + 1))

    def refuse_layer(self, layer: int, path: str) -> None:
        """Raise UsageError where the cache at `path` has no such layer."""
        if layer not in self.numbered_layers:
            some = ", ".join(map(str, self.layer_numbers))
            held = f"layers {some}" if some else f"layers 1 to {self.layers}"
            raise UsageError(f"{path} ({self.backbone}) has {held}; layer {layer} was asked for")

    @property
    def mean_dtype(self) -> str:
        return "float32" if self.dtype == "float32" else "float16"

    @property
    def clip_bytes(self) -> int:
        """Bytes of one clip's features."""
        return self.layers * self.frames * self.dim * np.dtype(self.dtype).itemsize

    def clips_per_shard(self, shard_mb: float, clips: int) -> int:
        """How many of `clips` clips make a shard of about `shard_mb` megabytes: at least one, at most 256.

        All shards are equally full, so that none is padded to the length of the others. Batches end with their shard,
        so large shards are rounded to what batches on a GPU divide: 64 clips of large-v1, where 62 would be 127 MB.
        """
        fitting = int(shard_mb * 1e6 // self.clip_bytes)
        most = max(1, min(MAX_CLIPS_PER_SHARD, fitting))
        step = 1 if fitting > MAX_CLIPS_PER_SHARD else next((step for step in BATCH_STEPS if fitting >= step), 1)
        most = round(most / step) * step
        equal = math.ceil(clips / math.ceil(clips / most)) if clips else most
        rounded = math.ceil(equal / BATCH_STEPS[-1]) * BATCH_STEPS[-1]
        return rounded if step > 1 and rounded - equal <= equal // 16 else equal

    def differences(self, other: CacheSpec) -> list[str]:
        """Each field in which two specs differ, as `field: ours, not theirs`."""
        ours, theirs = asdict(self), asdict(other)
        del ours["dataset"], theirs["dataset"]  # a moved folder is the same dataset: its clips are compared instead
        return [
            f"{name}: {brief(ours[name])}, not {brief(theirs[name])}" for name in ours if ours[name] != theirs[name]
        ]


def brief(value: object) -> str:
    """A setting in an error message."""
    if isinstance(value, tuple):
        return f"{len(value)} classes ({', '.join(value[:3])}{', ...' if len(value) > 3 else ''})"
    return f"{value[:12]}..." if isinstance(value, str) and len(value) > 40 else str(value)


@dataclass(frozen=True)
class ClipTable:
    """What the dataset says of each clip, as columns of one length. Text may be given in any array of strings."""

    ids: np.ndarray  # (N,) TEXT, unique
    paths: np.ndarray  # (N,) TEXT, relative to the dataset
    fold: np.ndarray  # (N,) int16, 1-based, 0 where there is none
    split: np.ndarray  # (N,) str, empty where there is none
    labels: np.ndarray | SparseLabels  # (N, C) uint8, of which rows are indexed alike
    digests: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))  # (N,) of each clip's file, or 0

    def __post_init__(self) -> None:
        for name in ("ids", "paths"):
            object.__setattr__(self, name, text_column(getattr(self, name)))
        if not len(self.digests):
            object.__setattr__(self, "digests", np.zeros(len(self.ids), np.uint64))
        columns = (self.ids, self.paths, self.fold, self.split, self.labels, self.digests)
        lengths = {len(column) for column in columns}
        if len(lengths) != 1:
            raise ValueError(f"columns differ in length: {sorted(lengths)}")
        if twice := first_repeated(self.ids):
            raise UsageError(f"the dataset names two clips {self.ids[twice[1]]!r}; ids must be unique")

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: np.ndarray) -> ClipTable:
        """These clips, in this order."""
        labels = self.labels.take(rows) if isinstance(self.labels, SparseLabels) else self.labels[rows]
        ids, paths, fold, split = (column[rows] for column in (self.ids, self.paths, self.fold, self.split))
        return ClipTable(ids, paths, fold, split, labels, self.digests[rows])


def create_arrays(
    path: Path, spec: CacheSpec, clips: ClipTable, *, clips_per_shard: int, provenance: dict, layout: Layout = LAYOUT
) -> None:
    """Lay out an empty cache at `path`: every array's metadata, and what the dataset says of each clip."""
    import zarr

    attributes = {"format": FORMAT_NAME, "format_version": layout.version, **asdict(spec), "made": provenance}
    attributes["class_names"] = list(spec.class_names)
    attributes["coordinates"] = COORDINATES
    group = zarr.create_group(path, zarr_format=3, attributes=attributes)
    N, S = len(clips), clips_per_shard
    create = partial(_create_array, group, layout)
    _create_features(create, spec, N, S)
    rows = rows_per_chunk(N)
    for name in ("status", "valid_frames"):
        create(name, (N,), "uint8", (S if layout.version == 1 else max(1, N),), packed=layout.version > 1)
    create("error", (N,), "str", (S if layout.version == 1 else rows,))
    columns = [("id", "str", clips.ids), ("path", "str", clips.paths), ("split", "str", clips.split)]
    columns += [("fold", "int16", clips.fold), ("digest", "uint64", clips.digests)]
    for name, dtype, column in columns:
        create(name, (N,), dtype, (rows,))
        write_column(path, layout, name, column, rows, dtype)
    for name, names in named_axes(spec).items() if layout.version > 1 else ():
        create(name, names.shape, "str" if name == "class" else "uint16", names.shape)[:] = names
    if spec.class_names:
        rows = label_rows(N, len(spec.class_names))
        create("labels", clips.labels.shape, "uint8", (rows, len(spec.class_names)), packed=True)
        write_column(path, layout, "labels", clips.labels, rows, "uint8")
    if layout.version > 1:
        keep_copy(LocalStore(path), list(array_shapes(spec, N)))


def _create_features(create: Callable[..., zarr.Array], spec: CacheSpec, N: int, S: int) -> None:
    """The arrays that have a shard for every S clips."""
    L, T, D = spec.layers, spec.frames, spec.dim
    features = create(
        "features", (N, L, T, D), spec.dtype, (1, 1, T, D), shards=(S, L, T, D),
        fill_value=0 if spec.dtype == "int8" else np.nan,
    )  # fmt: skip
    for name, dtype in [("mean", spec.mean_dtype)] + ([("scale", "float16")] if spec.dtype == "int8" else []):
        create(name, (N, L, D), dtype, (S, 1, D), shards=(S, L, D), fill_value=np.nan, packed=name == "scale")
    if spec.dtype == "int8":
        features.attrs["ancillary_variables"] = "scale"
        features.attrs["comment"] = "value = features * scale, by clip, layer and channel"


def _create_array(
    group: zarr.Group, layout: Layout, name: str, shape: tuple[int, ...], dtype: str, chunks: tuple[int, ...], *,
    shards: tuple[int, ...] | None = None, fill_value: float = 0, packed: bool = False,
) -> zarr.Array:  # fmt: skip
    """An array of a cache: checksums on all chunks, zstd before them where it is text or `packed`."""
    from zarr.codecs import Crc32cCodec, ZstdCodec

    level = ZSTD_LEVEL if shards or name in ("status", "valid_frames", "error") else COLUMN_LEVEL
    text = dtype == "str"
    return group.create_array(
        name, shape=shape, dtype=str if text else dtype, chunks=chunks, shards=shards, dimension_names=DIMENSIONS[name],
        compressors=[ZstdCodec(level=level), Crc32cCodec()] if packed or text else Crc32cCodec(),
        fill_value="" if text else fill_value,
        chunk_key_encoding={"name": "default", "separator": layout.separator},
    )  # fmt: skip


def named_axes(spec: CacheSpec) -> dict[str, np.ndarray]:
    """What the arrays `layer` (L,) uint16 and `class` (C,) of text hold."""
    axes = {"layer": np.array(spec.numbered_layers, dtype=np.uint16)}
    return axes | ({"class": np.array(spec.class_names, dtype=object)} if spec.class_names else {})


def rows_per_chunk(clips: int) -> int:
    """Rows in a chunk of what the dataset says of each clip."""
    return max(1, min(clips, ROWS_PER_CHUNK))


def label_rows(clips: int, classes: int) -> int:
    """Rows in a chunk of labels."""
    return max(1, min(rows_per_chunk(clips), LABEL_BYTES // max(1, classes)))


def array_shapes(
    spec: CacheSpec, clips: int, *, version: int = NEWEST, digests: bool = True
) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and type of every array of a cache; no type for strings."""
    N, L, T, D = clips, spec.layers, spec.frames, spec.dim
    shapes = {
        "features": ((N, L, T, D), spec.dtype),
        "mean": ((N, L, D), spec.mean_dtype),
        "valid_frames": ((N,), "uint8"),
        "status": ((N,), "uint8"),
        "fold": ((N,), "int16"),
    }
    shapes |= dict.fromkeys(("id", "path", "split", "error"), ((N,), ""))
    if digests:
        shapes["digest"] = ((N,), "uint64")
    if spec.dtype == "int8":
        shapes["scale"] = ((N, L, D), "float16")
    if spec.class_names:
        shapes["labels"] = ((N, len(spec.class_names)), "uint8")
    if version > 1:
        shapes |= {name: (axis.shape, "" if name == "class" else "uint16") for name, axis in named_axes(spec).items()}
    return shapes


def read_attributes(store: LocalStore | BucketStore) -> dict:
    """Group attributes of the cache in `store`.

    Raises UsageError where there is no cache, CacheError where it is damaged or of another format version.
    """
    path = store.address
    if isinstance(path, Path) and path.exists() and not (path.is_dir() and store.exists(METADATA)):
        raise UsageError(f"{path} is not a feature cache (no zarr.json in it); give the folder that `extract` wrote")
    try:
        metadata = store.read(METADATA)
        if metadata is None:
            raise UsageError(f"{path} does not exist; make a cache with: whisper-at-cli extract DATASET {path}")
        attributes = json.loads(metadata)["attributes"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged_metadata(store, str(error)) from error
    if not isinstance(attributes, dict):
        raise _damaged_metadata(store, "its attributes are no JSON object")
    if attributes.get("format") != FORMAT_NAME:
        raise UsageError(f"{path} is a Zarr group but not a feature cache; give the folder that `extract` wrote")
    version = attributes.get("format_version")
    if type(version) is not int or version not in VERSIONS:
        raise CacheError(
            f"{path} has cache format version {version}; this version of whisper-at-cli reads versions "
            f"{', '.join(map(str, VERSIONS))}"
        )
    return attributes


def spec_from_attributes(attributes: dict, store: LocalStore | BucketStore) -> CacheSpec:
    """The spec that a cache's own attributes hold."""
    try:
        known = {"layer_numbers": ()} | attributes  # which version 1 has not
        spec = CacheSpec(**{name: known[name] for name in CacheSpec.__dataclass_fields__})
        _check_fields(spec, attributes)
    except (KeyError, TypeError, ValueError, OverflowError, UsageError) as error:
        raise _damaged_metadata(store, f"attribute {error} is missing or wrong") from error
    if spec.clip_bytes > MAX_CLIP_BYTES:
        raise _damaged_metadata(store, f"a clip would have {spec.clip_bytes} bytes of features")
    return spec


def _check_fields(spec: CacheSpec, attributes: dict) -> None:
    """Raise TypeError or ValueError where a field is of another type, or no length of a clip."""
    for kind, names in FIELD_TYPES.items():
        for name in names:
            if type(getattr(spec, name)) not in (kind, int if kind is float else kind):
                raise TypeError(name)
    if any(type(number) is not int or number < 1 for number in spec.layer_numbers):
        raise TypeError("layer_numbers")
    if not math.isfinite(spec.clip_seconds) or not all(isinstance(name, str) for name in attributes["class_names"]):
        raise ValueError("clip_seconds or class_names")


@contextlib.contextmanager
def readable(store: LocalStore | BucketStore, name: str) -> Iterator[None]:
    """A context in which whatever damaged bytes bring zarr to becomes a CacheError that names the array."""
    try:
        with store.asking(name):
            yield
    except WhisperATError:
        raise
    except Exception as error:  # of its codecs and of its metadata, any kind
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise CacheError(f"{store}/{name} is missing or damaged ({reason}); {_how_to_restore(store)}") from error


def check_features(
    features: zarr.Array, spec: CacheSpec, store: LocalStore | BucketStore, layout: Layout
) -> tuple[int, int]:
    """Clips, and clips per shard, of the array of features. Raises ValueError where it is not laid out as designed.

    Nothing is believed that would cost memory or time beyond what is really there.
    """
    clips, per_shard = int(features.shape[0]), int((features.shards or ())[0])
    clip = (spec.layers, spec.frames, spec.dim)
    if (features.shape, features.chunks, features.shards) != ((clips, *clip), (1, 1, *clip[1:]), (per_shard, *clip)):
        raise ValueError(f"its metadata say {features.shape} in shards of {features.shards}, not {clip} a clip")
    if features.dtype != spec.dtype or not 1 <= per_shard <= max(clips, MAX_CLIPS_PER_SHARD):
        raise ValueError(f"its metadata say {features.dtype}, {per_shard} clips a shard")
    separator = getattr(getattr(features.metadata, "chunk_key_encoding", None), "separator", "")
    if separator != layout.separator:
        raise ValueError(f"its files have names with {separator!r}, not {layout.separator!r}")
    last = layout.file("id", (clips - 1) // ROWS_PER_CHUNK)
    if clips > ROWS_PER_CHUNK and len(store.names(last.rpartition("/")[0])) < clips // ROWS_PER_CHUNK:
        raise ValueError(f"its metadata say {clips} clips, which have no id")
    return clips, per_shard


def _damaged_metadata(store: LocalStore | BucketStore, problem: str) -> CacheError:
    return CacheError(f"{store}/{METADATA} is damaged ({problem}); {_how_to_restore(store)}")


def _how_to_restore(store: LocalStore | BucketStore) -> str:
    if store.exists(COPY):
        return "extract with --repair restores it"
    return "restore it or extract again to another path"


def shard_rows(shard: int, clips_per_shard: int, clips: int) -> range:
    """Rows that shard number `shard` (from 0) holds."""
    return range(shard * clips_per_shard, min((shard + 1) * clips_per_shard, clips))


def shard_count(clips: int, clips_per_shard: int) -> int:
    return math.ceil(clips / clips_per_shard)
