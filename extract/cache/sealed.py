"""Small files and chunks packed by zstd, with a CRC-32C behind: as Zarr's codecs `zstd` and `crc32c` write them."""

from __future__ import annotations

import numpy as np
from numcodecs import zstd

from whisper_at_cli.extract.cache.shards import CRC_BYTES, ZSTD_LEVEL, crc32c
from whisper_at_cli.extract.errors import CacheError

ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"


def sealed(data: bytes | np.ndarray, level: int = ZSTD_LEVEL) -> list:
    """Buffers of the file that holds this."""
    packed = zstd.compress(data, level)
    return [packed, crc32c(packed)]


def unsealed(data: bytes, name: str, most: int) -> bytes:
    """What a file holds. Raises CacheError, which names it, where it is damaged or holds more than `most` bytes."""
    if crc32c(data[:-CRC_BYTES]) != data[-CRC_BYTES:]:
        raise CacheError(f"{name} is damaged: its CRC-32C does not match")
    try:
        return unpacked(data[:-CRC_BYTES], most)
    except (ValueError, RuntimeError) as error:
        raise CacheError(f"{name} is damaged: {error}") from error


def unpacked(packed: bytes, most: int) -> bytes:
    """What a Zstandard frame holds. Raises ValueError or RuntimeError where it is none, or more than `most` bytes."""
    size = unpacked_bytes(packed)
    if size > most:
        raise ValueError(f"a chunk is {size} bytes unpacked")
    return zstd.decompress(packed) if size else b""


def unpacked_bytes(packed: bytes) -> int:
    """How many bytes a Zstandard frame holds, by its own header. Raises ValueError where it does not say."""
    if packed[:4] != ZSTD_MAGIC or len(packed) < 6:
        raise ValueError("a chunk is no Zstandard frame")
    flags = packed[4]
    single = flags >> 5 & 1
    width = (single, 2, 4, 8)[flags >> 6]
    at = 5 + (1 - single) + (0, 1, 2, 4)[flags & 3]
    if not width:
        raise ValueError("a chunk does not say how large it is")
    return int.from_bytes(packed[at : at + width], "little") + (256 if width == 2 else 0)
