"""Chunk files of what the dataset says of each clip, as zarr-python would write them, in a tenth of its time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numcodecs.vlen import VLenUTF8

from whisper_at_cli.extract.cache.layout import Layout
from whisper_at_cli.extract.cache.sealed import sealed
from whisper_at_cli.extract.cache.shards import chunk_buffers
from whisper_at_cli.extract.sparse import SparseLabels

COLUMN_LEVEL = 0  # of zstd: its own default


def write_column(
    cache: Path, layout: Layout, name: str, column: np.ndarray | SparseLabels, rows: int, dtype: str
) -> None:
    """Write every chunk, of so many rows, of a column: text where `dtype` is `str`, else numbers (N,) or (N, C)."""
    packed = {"str": _texts, "uint8": _labels}.get(dtype, _numbers)(column, rows, dtype)
    for number, buffers in enumerate(packed):
        path = cache / layout.file(name, number)
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            file.writelines(buffers)


def _texts(column: np.ndarray | SparseLabels, rows: int, _dtype: str) -> Iterator[list]:
    for first in range(0, len(column), rows):
        texts = np.full(rows, "", dtype=object)
        some = np.asarray(column[first : first + rows], dtype=object)
        texts[: len(some)] = some
        yield sealed(VLenUTF8().encode(texts), COLUMN_LEVEL)


def _numbers(column: np.ndarray | SparseLabels, rows: int, dtype: str) -> Iterator[list]:
    for first in range(0, len(column), rows):
        chunk = np.zeros(rows, dtype=np.dtype(dtype).newbyteorder("<"))
        some = column[first : first + rows]
        chunk[: len(some)] = some
        yield chunk_buffers(chunk)


def _labels(column: np.ndarray | SparseLabels, rows: int, _dtype: str) -> Iterator[list]:
    chunk = np.zeros((rows, column.shape[1]), dtype=np.uint8)
    for first in range(0, len(column), rows):
        if isinstance(column, SparseLabels):
            some = column.take(np.arange(first, min(first + rows, len(column))))
            places = np.repeat(np.arange(len(some)), some.counts), some.numbers
            chunk[places] = 1
            yield sealed(chunk, COLUMN_LEVEL)
            chunk[places] = 0
        else:
            part = column[first : first + rows]
            chunk[: len(part)], chunk[len(part) :] = part, 0
            yield sealed(chunk, COLUMN_LEVEL)
