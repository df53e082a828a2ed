"""What the dataset said of each clip, read back: id, path, split, error, fold and labels.

Text and labels are packed, and a few packed bytes may say that they are gigabytes: how large a chunk becomes is looked
up before it is unpacked, and held against what can be.
"""

from __future__ import annotations

import math
import struct
from typing import TYPE_CHECKING

import numpy as np
from numcodecs import zstd
from numcodecs.vlen import VLenUTF8

from whisper_at_cli.extract.cache.layout import Layout
from whisper_at_cli.extract.cache.schema import MAX_CLIPS_PER_SHARD, CacheSpec, array_shapes, readable
from whisper_at_cli.extract.cache.sealed import unpacked, unpacked_bytes
from whisper_at_cli.extract.cache.shards import CRC_BYTES, crc32c
from whisper_at_cli.extract.cache.store import BucketStore, LocalStore

if TYPE_CHECKING:
    import zarr

PACKED = ("zstd", "zstd crc32c")  # caches of before had no checksum on text and labels
CODECS = {**dict.fromkeys(("fold", "digest"), ("bytes crc32c",)), "labels": tuple(f"bytes {rest}" for rest in PACKED)}
TEXT_CODECS = tuple(f"vlen-utf8 {rest}" for rest in PACKED)
TEXT_BYTES, TEXT_RATIO = 1 << 26, 100  # a chunk of text is at most so large, or so many times what it takes on disk
MAX_TEXT = 1 << 16  # characters of an id, a path or an error


def read_column(
    store: LocalStore | BucketStore, layout: Layout, group: zarr.Group, name: str, spec: CacheSpec, clips: int
) -> np.ndarray:
    """A column of `clips` entries: text as Python strings, fold int16, digest uint64, labels (clips, classes) uint8.

    Raises CacheError where it is missing, damaged or not laid out as designed.
    """
    import zarr

    with readable(store, name):
        array = group[name]
        if not isinstance(array, zarr.Array):
            raise TypeError("it is no array")
        _check_layout(array, name, spec, clips)
        whole = layout.version > 1  # a cache of version 1 has no chunks of what is empty throughout
        if name in ("fold", "digest"):
            if whole:
                _check_chunks(store, layout, name, math.ceil(clips / array.chunks[0]))
            return np.asarray(array[:])
        rows, checked = array.chunks[0], _codecs(array).endswith("crc32c")
        numbers = name == "labels"
        out = np.zeros(array.shape, dtype=np.uint8) if numbers else np.full(clips, "", dtype=object)
        known: dict[str, str] = {}  # of a column with few different texts, each once

        def read(number: int) -> None:
            data = store.read(layout.file(name, number))
            if data is None and (whole or name == "id"):
                raise ValueError(f"chunk {number} is missing")
            if data is not None:
                packed = _without_checksum(data) if checked else data
                if numbers:
                    _unpack_labels(packed, out, number * rows, array.chunks)
                    return
                part = _texts(packed, rows)
                if name == "split":
                    part = np.array(list(map(known.setdefault, part, part)), dtype=object)
                out[number * rows : (number + 1) * rows] = part[: clips - number * rows]

        store.map(read, range(math.ceil(clips / rows)))
        return out


def _check_chunks(store: LocalStore | BucketStore, layout: Layout, name: str, count: int) -> None:
    """Raise ValueError where one of the files of so many chunks is missing."""
    there = set(store.names(name))
    for number in range(count):
        if layout.file(name, number) not in there:
            raise ValueError(f"chunk {number} is missing")


def _codecs(array: zarr.Array) -> str:
    codecs = getattr(array.metadata, "codecs", ())  # Zarr v2 has none
    return " ".join(str(codec.to_dict()["name"]) for codec in codecs)


def _check_layout(array: zarr.Array, name: str, spec: CacheSpec, clips: int) -> None:
    """Raise ValueError where an array is not laid out as designed: nothing that it declares may cost memory or time."""
    shape, dtype = array_shapes(spec, clips)[name]
    if array.shape != shape or (array.dtype != dtype if dtype else array.dtype.kind not in "TO"):
        raise ValueError(f"its metadata say {array.shape} of {array.dtype}, not {shape} of {dtype or 'text'}")
    whole = array.chunks[1:] == shape[1:] and array.shards is None
    if not whole or array.chunks[0] > max(clips, MAX_CLIPS_PER_SHARD):
        raise ValueError(f"its metadata say chunks of {array.chunks}, for {shape}")
    if _codecs(array) not in CODECS.get(name, TEXT_CODECS):
        raise ValueError(f"its metadata say that it is coded by {_codecs(array)!r:.80}")


def _without_checksum(data: bytes) -> bytes:
    if crc32c(data[:-CRC_BYTES]) != data[-CRC_BYTES:]:
        raise ValueError("its CRC-32C does not match")
    return data[:-CRC_BYTES]


def _unpack_labels(packed: bytes, out: np.ndarray, first: int, chunk: tuple[int, ...]) -> None:
    """Put the labels of a chunk into `out` from row `first` on; only of a last chunk is there a copy."""
    size = math.prod(chunk)
    if unpacked_bytes(packed) != size:
        raise ValueError(f"a chunk is {unpacked_bytes(packed)} bytes unpacked, not {size}")
    there = out[first : first + chunk[0]]
    if there.nbytes == size:
        zstd.decompress(packed, there)
    else:
        there[:] = np.frombuffer(zstd.decompress(packed), dtype=np.uint8).reshape(chunk)[: len(there)]


def _texts(packed: bytes, count: int) -> np.ndarray:
    """The texts of a chunk: their number, then the length and UTF-8 bytes of each."""
    data = unpacked(packed, max(TEXT_BYTES, TEXT_RATIO * len(packed)))
    if data[:4] != struct.pack("<I", count):
        raise ValueError(f"a chunk is not of {count} texts")
    texts = VLenUTF8().decode(data)
    longest = max(map(len, texts), default=0)
    if longest > MAX_TEXT:
        raise ValueError(f"it holds a text of {longest} characters")
    return texts
