"""Caches that the tool wrote before digests: read, continued, verified, and brought up to date.

`before/version-1-*.tar.gz` were written by commit 50193c6: seven clips in shards of three, the last of them pending;
clip 4 failed, clip 0 has a note.
"""

import tarfile
from pathlib import Path

import numpy as np
import pytest

from conftest import array_bytes
from whisper_at_cli.extract.cache import CacheWriter, ClipTable, FeatureCache, ShardBlock, Status
from whisper_at_cli.extract.cache.changes import changes
from whisper_at_cli.extract.cache.rebuild import Plan, rebuild
from whisper_at_cli.extract.cache.verify import verify

BEFORE = Path(__file__).parent / "before"
N, L, T, D = 7, 2, 25, 4


@pytest.fixture(params=["float16", "float32", "int8"])
def old(request, tmp_path) -> Path:
    with tarfile.open(BEFORE / f"version-1-{request.param}.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "a.zarr"


def features(row: int, dtype: str) -> np.ndarray:
    values = np.arange(L * T * D).reshape(L, T, D) % 100 + row
    return values * ((row + 1) / 4 if dtype == "int8" else 1)


def table() -> ClipTable:
    ids, rows = np.array([f"clip{i}" for i in range(N)]), np.arange(N)
    paths = np.array([f"audio/clip{i}.wav" for i in range(N)])
    return ClipTable(ids, paths, (rows % 3).astype(np.int16), np.array(["train"] * 4 + ["test"] * 3),
                     np.eye(2, dtype=np.uint8)[rows % 2], np.arange(1, N + 1, dtype=np.uint64))  # fmt: skip


def check(cache: FeatureCache, rows: list[int]) -> None:
    assert cache.ids.tolist() == table().ids.tolist() and cache.paths.tolist() == table().paths.tolist()
    assert cache.fold.tolist() == table().fold.tolist() and cache.split.tolist() == table().split.tolist()
    assert (cache.labels == table().labels).all() and cache.spec.class_names == ("dog", "rain")
    assert cache.errors.tolist() == ["a note", "", "", "", "planted failure", "", ""]
    assert np.flatnonzero(cache.done).tolist() == rows
    for row in rows:
        assert (cache.features([row])[0] == features(row, cache.spec.dtype)).all()
        assert (cache.mean(rows=[row]) == row + 0.5).all() and cache.valid_frames[row] == 20 + row % 5


def finish(path: Path) -> None:
    """Write the pending shard."""
    with CacheWriter.create(path, FeatureCache.open(path).spec, table()) as writer:
        assert writer.pending_shards() == [2] and writer.clips_per_shard == 3
        block = ShardBlock.empty(1, writer.spec)
        block.features[0] = np.arange(L * T * D).reshape(L, T, D) % 100 + 6
        block.mean[0], block.valid_frames[0], block.status[0] = 6.5, 21, Status.DONE
        if block.scale is not None:
            block.scale[0] = 7 / 4
        writer.write(2, block)


def test_it_is_read_verified_and_continued(old):
    check(FeatureCache.open(old), [0, 1, 2, 3, 5])
    assert verify(old).ok and FeatureCache.open(old).digests is None
    before = array_bytes(old)
    finish(old)
    check(FeatureCache.open(old), [0, 1, 2, 3, 5, 6])
    assert verify(old).ok
    after = array_bytes(old)
    assert {name for name in after if after[name] != before.get(name)} == {name for name in after if "/c/2" in name}, (
        "nothing but the last shard was written"
    )


def test_it_is_brought_up_to_date_with_the_same_content(old):
    cache = FeatureCache.open(old)
    found = changes(cache, cache.spec, table())
    assert found.any and found.described() == "" and found.digests
    rebuild(old, Plan(cache.spec, table(), found.rows, found.audio), {"tool_version": "0.1.0"})
    check(FeatureCache.open(old), [0, 1, 2, 3, 5])
    assert FeatureCache.open(old).digests.tolist() == list(range(1, N + 1))
    finish(old)
    check(FeatureCache.open(old), [0, 1, 2, 3, 5, 6])
    assert verify(old).ok
