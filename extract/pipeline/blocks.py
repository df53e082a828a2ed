"""Blocks of shards that are being filled or written: made once, used in turn, on a GPU in pinned memory."""

from __future__ import annotations

import contextlib
import mmap
from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from whisper_at_cli.extract.cache.schema import CacheSpec
from whisper_at_cli.extract.cache.shards import CRC_BYTES, ShardImage
from whisper_at_cli.extract.cache.storage import Stored
from whisper_at_cli.extract.cache.writer import ShardBlock

HUGE_PAGE = 1 << 21  # bytes


@dataclass(frozen=True, eq=False)
class Block:
    """Room for one shard: the arrays that are written, and the same memory as tensors that features are copied into."""

    tensors: Stored  # (clips, ...) each
    arrays: ShardBlock

    @classmethod
    def empty(cls, clips: int, spec: CacheSpec, *, pinned: bool) -> Block:
        def tensor(*shape: int, dtype: str) -> Tensor:
            return torch.empty(shape, dtype=getattr(torch, dtype), pin_memory=pinned)

        L, D = spec.layers, spec.dim
        features, image = _features(clips, spec, pinned=pinned)
        tensors = Stored(
            features,
            tensor(clips, L, D, dtype=spec.mean_dtype),
            tensor(clips, L, dtype="bool"),
            tensor(clips, L, D, dtype="float16") if spec.dtype == "int8" else None,
        )
        small = np.zeros((2, clips), dtype=np.uint8)
        arrays = ShardBlock(
            tensors.features.numpy(), tensors.mean.numpy(), small[0], small[1],
            scale=None if tensors.scale is None else tensors.scale.numpy(), image=image,
        )  # fmt: skip
        return cls(tensors, arrays)

    def first(self, clips: int) -> Block:
        """The first rows of it alone, for a shard that has fewer; nothing is in it yet."""
        arrays = self.arrays.first(clips)
        arrays.clear()
        return Block(self.tensors.map(lambda tensor: tensor[:clips]), arrays)


def _features(clips: int, spec: CacheSpec, *, pinned: bool) -> tuple[Tensor, ShardImage]:
    """Room for a shard's features, (clips, L, T, D), in memory that is laid out as the shard's file."""
    L, T, D, dtype = spec.layers, spec.frames, spec.dim, getattr(torch, spec.dtype)
    chunk_bytes = T * D * dtype.itemsize
    size = ShardImage.size(clips * L, chunk_bytes)
    memory = _pages(size, pinned=pinned)[: -(-size // dtype.itemsize) * dtype.itemsize]
    stride = (chunk_bytes + CRC_BYTES) // dtype.itemsize
    features = memory.view(dtype).as_strided((clips, L, T, D), (L * stride, stride, D, 1))
    return features, ShardImage(memory.numpy(), clips * L, chunk_bytes)


def _pages(size: int, *, pinned: bool) -> Tensor:
    """(at least `size`,) uint8 that begins with a page. Huge pages, where the system has them, are written faster."""
    size = -(-size // HUGE_PAGE) * HUGE_PAGE
    if pinned:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.from_numpy(np.frombuffer(mmap.mmap(-1, size), np.uint8))
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.from_numpy(np.frombuffer(pages, np.uint8))


class Blocks:
    """A bounded number of blocks. `take` and `give` are for one thread."""

    def __init__(self, count: int, clips: int, spec: CacheSpec, *, pinned: bool):
        self._left, self._clips, self._spec, self._pinned = count, clips, spec, pinned
        self._free: deque[Block] = deque()

    def available(self) -> bool:
        return bool(self._free or self._left)

    def take(self) -> Block:
        """A block that nobody else has."""
        if not self._free:
            self._left -= 1
            self._free.append(Block.empty(self._clips, self._spec, pinned=self._pinned))
        return self._free.pop()

    def give(self, block: Block) -> None:
        """Take a block back, whole."""
        self._free.append(block)
