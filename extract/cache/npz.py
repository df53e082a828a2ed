"""One npz file of features: what its header declares is checked before anything is unpacked.

A few packed kilobytes may unpack to gigabytes, of numbers or of the header itself.
"""

from __future__ import annotations

import contextlib
import io
import math
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

from whisper_at_cli.extract.cache.export import KEY
from whisper_at_cli.extract.cache.schema import FRAMES, MAX_CLIP_BYTES
from whisper_at_cli.extract.errors import CacheError

MAGIC = b"\x93NUMPY"
LENGTH_BYTES = {1: 2, 2: 4, 3: 4}  # of the header's length, by the format's version
HEADER_BYTES = 10_000  # at most, as numpy has it
NAMES_SHOWN = 5
READ_BYTES = 1 << 20
FAULTS = (zipfile.BadZipFile, zlib.error, ValueError, OSError, EOFError, RuntimeError, MemoryError, NotImplementedError)


@contextlib.contextmanager
def features_file(path: Path) -> Iterator[tuple[IO[bytes], tuple[int, int, int], np.dtype, bool]]:
    """An open file at the first byte of features, their shape (L, T, D), their type, and whether in Fortran's order.

    Raises CacheError for what is no such file, and turns what reading it brings about into one.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if f"{KEY}.npy" not in names:
                shown = ", ".join(names[:NAMES_SHOWN]) + (", ..." if len(names) > NAMES_SHOWN else "")
                raise CacheError(f"it holds {shown or 'nothing'}, not an array {KEY}")
            with archive.open(f"{KEY}.npy") as file:
                yield file, *_checked_header(file)
    except FAULTS as error:
        raise CacheError(f"not a whole npz file: {error}") from error


def _checked_header(file: IO[bytes]) -> tuple[tuple[int, int, int], np.dtype, bool]:
    start = file.read(len(MAGIC) + 2)
    width = LENGTH_BYTES.get(start[-2], 0) if start[:-2] == MAGIC else 0
    length = file.read(width)
    size = int.from_bytes(length, "little")
    if not width or size > HEADER_BYTES:
        raise ValueError(f"{KEY} does not begin as an array of NumPy does")
    header = io.BytesIO(length + file.read(size))
    read = np.lib.format.read_array_header_1_0 if width == 2 else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(header)
    if len(shape) != 3 or shape[1] != FRAMES or not math.prod(shape) or dtype.kind != "f":
        raise CacheError(f"{KEY} is {shape} {dtype}, not (layers, {FRAMES}, channels) of floating-point numbers")
    if math.prod(shape) * dtype.itemsize > MAX_CLIP_BYTES:
        raise CacheError(f"{KEY} is {shape} {dtype}, more than a clip's features can take ({MAX_CLIP_BYTES >> 20} MiB)")
    return (shape[0], shape[1], shape[2]), dtype, fortran


def read_features(path: Path, expected: tuple[int, ...]) -> np.ndarray:
    """Features (L, T, D) of one npz file. Raises CacheError with what is wrong with it, as another shape."""
    with features_file(path) as (file, shape, dtype, fortran):
        if shape != expected:
            raise CacheError(f"its shape is {shape}, most others' {expected}")
        features = np.empty(shape, dtype)
        buffer, at = features.reshape(-1).view(np.uint8).data, 0
        while at < len(buffer) and (got := file.readinto(buffer[at : at + READ_BYTES])):  # type: ignore[attr-defined]
            at += got
        if at < len(buffer) or file.read(1):
            raise ValueError(f"{KEY} has {at} bytes or more where {len(buffer)} belong")
        return features.reshape(shape[::-1]).transpose() if fortran else features
