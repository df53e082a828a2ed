"""Blocks of shards: memory laid out as the file, and how it goes to disk."""

import errno
import os

import numpy as np
import pytest
import torch

from whisper_at_cli.extract.cache import CacheSpec, CacheWriter, ClipTable, FeatureCache, Status, direct, store
from whisper_at_cli.extract.cache.shards import ShardImage, shard_buffers
from whisper_at_cli.extract.cache.storage import to_storage
from whisper_at_cli.extract.cache.store import LocalStore
from whisper_at_cli.extract.pipeline.blocks import Block

DTYPES = ("float16", "float32", "int8")


def spec_of(dtype: str) -> CacheSpec:
    return CacheSpec(backbone="planted", weights_sha256="0" * 64, layers=3, dim=10, clip_seconds=5.0, dtype=dtype)


def filled(clips: int, dtype: str, of: int | None = None) -> Block:
    """A block for `of` clips whose first so many hold numbers."""
    spec = spec_of(dtype)
    block = Block.empty(of or clips, spec, pinned=False).first(clips)
    values = torch.randn(clips, spec.layers, spec.frames, spec.dim, generator=torch.Generator().manual_seed(clips))
    to_storage(values, dtype, block.tensors)
    block.arrays.valid_frames[:], block.arrays.status[:] = 25, Status.DONE
    return block


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("clips", [1, 3, 4])
def test_an_image_is_the_file_that_is_gathered_from_its_chunks(dtype, clips):
    block = filled(clips, dtype, of=4)
    chunks = np.ascontiguousarray(block.arrays.features).reshape(clips * 3, -1)
    present = np.arange(4 * 3) < len(chunks)
    image = block.arrays.image.finished(len(chunks))
    assert image.tobytes() == b"".join(bytes(part) for part in shard_buffers(chunks, present))
    assert np.shares_memory(image, block.arrays.features)


def test_an_image_needs_the_bytes_that_its_file_has():
    memory = np.zeros(ShardImage.size(6, 40), np.uint8)
    assert len(ShardImage(memory, 6, 40).finished(6)) == len(memory) == 6 * 44 + 6 * 16 + 4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("failed", [None, 0])
def test_a_block_in_memory_of_its_own_and_one_laid_out_as_the_file_write_the_same(tmp_path, dtype, failed):
    written, shard_mb = [], 2 * 3 * 25 * 10 * np.dtype(dtype).itemsize / 1e6  # two clips
    for name in ("plain", "image"):
        names, nothing = np.array(["a", "b", "c", "d", "e"]), np.zeros(5, np.int16)
        clips = ClipTable(names, names, nothing, np.full(5, ""), np.zeros((5, 0), np.uint8))
        with CacheWriter.create(tmp_path / name, spec_of(dtype), clips, shard_mb=shard_mb) as writer:
            for shard in range(-(-5 // writer.clips_per_shard)):
                block = filled(len(writer.rows(shard)), dtype, of=writer.clips_per_shard).arrays
                if failed is not None:
                    block.status[failed], block.errors[failed] = Status.FAILED, "broken"
                if name == "plain":
                    block.features, block.image = block.features.copy(), None
                writer.write(shard, block)
        files = sorted(file for file in (tmp_path / name / "features").rglob("*") if file.is_file())
        written.append([file.read_bytes() for file in files])
        cache = FeatureCache.open(tmp_path / name)
        assert cache.done.sum() == (5 if failed is None else 2)
    assert written[0] == written[1]


@pytest.fixture
def small_direct(monkeypatch):
    """Direct writing of files of a few pages."""
    monkeypatch.setattr(store, "DIRECT_BYTES", 3 * 4096)
    monkeypatch.setattr(direct, "DIRECT_PIECE", 2 * 4096)
    monkeypatch.setattr(LocalStore, "_in_memory", False)


def pages(size: int, offset: int = 0) -> np.ndarray:
    """(size,) uint8 that begin so many bytes after a page's begin."""
    memory = np.zeros(size + 2 * 4096, np.uint8)
    start = -memory.ctypes.data % 4096 + offset
    memory[start : start + size] = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    return memory[start : start + size]


@pytest.mark.parametrize("size", [3 * 4096, 5 * 4096, 5 * 4096 + 1, 6 * 4096 - 1])
@pytest.mark.parametrize("offset", [0, 100])
def test_what_is_written_past_the_page_cache_is_all_there(tmp_path, small_direct, size, offset):
    data = pages(size, offset)
    LocalStore(tmp_path).write_whole("f", [data])
    assert (tmp_path / "f").read_bytes() == data.tobytes()


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="no direct writing on this system")
@pytest.mark.parametrize("code", direct.NOT_DIRECT)
@pytest.mark.parametrize("after", [0, 1])
def test_what_cannot_be_written_directly_goes_through_the_page_cache(tmp_path, small_direct, monkeypatch, code, after):
    data, calls, write = pages(7 * 4096 + 5), [], os.write

    def refuse(file: int, part: memoryview) -> int:
        calls.append(len(part))
        if len(calls) > after:
            raise OSError(code, os.strerror(code))
        return write(file, part)

    monkeypatch.setattr(os, "write", refuse)
    LocalStore(tmp_path).write_whole("f", [data])
    assert (tmp_path / "f").read_bytes() == data.tobytes()
    assert calls == [2 * 4096] * (after + 1)


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="no direct writing on this system")
def test_a_full_disk_is_said_and_nothing_is_left(tmp_path, small_direct, monkeypatch):
    def full(_file: int, _part: memoryview) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space"):
        LocalStore(tmp_path).write_whole("f", [pages(5 * 4096)])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", DTYPES)
def test_room_on_a_device_is_laid_out_as_the_block_and_copied_in_one_piece(dtype):
    block = filled(3, dtype)
    for rows in (slice(0, 3), slice(1, 2)):
        ours = block.tensors.rows(rows)
        room = ours.on(torch.device("cpu"))
        assert room.features.stride() == ours.features.stride()
        wanted = [None if tensor is None else tensor.clone() for tensor in ours]
        room.copy_(ours)
        ours.features.zero_()
        ours.copy_(room)
        for got, want in zip(ours, wanted, strict=True):
            assert got is None or torch.equal(got, want)
