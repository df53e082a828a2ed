"""Caches of format version 1: read, continued, verified, mended, and brought up to date.

`before/version-1-*.tar.gz` were written by commit 50193c6, `before/version-1-digests-*.tar.gz` by f06fe34: seven clips
in shards of three, the last of them pending; clip 4 failed, clip 0 has a note.
"""

import tarfile
from pathlib import Path

import numpy as np
import pytest

from conftest import array_bytes
from whisper_at_cli.extract.cache import CacheWriter, ClipTable, FeatureCache, ShardBlock, Status
from whisper_at_cli.extract.cache.changes import changes
from whisper_at_cli.extract.cache.mend import mend_columns
from whisper_at_cli.extract.cache.metadata import restore_metadata
from whisper_at_cli.extract.cache.rebuild import Plan, rebuild
from whisper_at_cli.extract.cache.store import LocalStore
from whisper_at_cli.extract.cache.verify import column_problems, verify

BEFORE = Path(__file__).parent / "before"
N, L, T, D = 7, 2, 25, 4


@pytest.fixture(params=[f"{kind}{dtype}" for kind in ("", "digests-") for dtype in ("float16", "float32", "int8")])
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
    assert verify(old).ok
    digests = FeatureCache.open(old).digests
    assert digests is None or digests.tolist() == list(range(1, N + 1))
    before = array_bytes(old)
    finish(old)
    check(FeatureCache.open(old), [0, 1, 2, 3, 5, 6])
    assert verify(old).ok
    after = array_bytes(old)
    assert {name for name in after if after[name] != before.get(name)} == {
        "features/c/2/0/0/0", "mean/c/2/0/0", "valid_frames/c/2", "status/c/2",
        *(["scale/c/2/0/0"] if (old / "scale").exists() else []),
    }, "nothing but the last shard was written"  # fmt: skip
    assert not (old / "status/log").exists() and not (old / "status/metadata.zst").exists()
    assert not list(old.rglob("c.*"))


def test_any_changed_byte_of_what_is_known_of_its_clips_is_found_and_mended(old):
    whole, spec = array_bytes(old), FeatureCache.open(old).spec
    for name in ("status/c/1", "valid_frames/c/0", "error/c/1", "id/c/0", "fold/c/0", "labels/c/0/0", "path/c/0"):
        data = bytearray((old / name).read_bytes())
        data[len(data) // 2] ^= 0x10
        (old / name).write_bytes(data)
        assert not verify(old).ok, name
        cache = FeatureCache.open(old)
        if name.startswith(("status", "valid_frames")):
            shard = int(name[-1])
            assert cache.status[3 * shard :].tolist() == ([0, 0, 0, 0] if "status" in name else cache.status.tolist())
            errors = {slot: text for slot, text in enumerate(cache.errors[3 * shard : 3 * shard + 3]) if text}
            known = [Status.FAILED if row == 4 else Status.DONE for row in range(3 * shard, 3 * shard + 3)]
            frames = [0 if row == 4 else 20 + row % 5 for row in range(3 * shard, 3 * shard + 3)]
            with CacheWriter.join(old) as writer:
                writer.mark(shard, np.array(frames, np.uint8), np.array(known, np.uint8), errors)
        else:
            column = name.split("/")[0]
            assert set(column_problems(cache)) == {column}
            mend_columns(old, [column], spec, table())
            if column == "error":  # nobody knows its texts any more
                assert not FeatureCache.open(old).errors.any()
                (old / "error/c").mkdir()
                for shard in "01":
                    (old / "error/c" / shard).write_bytes(whole[f"error/c/{shard}"])
        assert verify(old).ok, name
        assert {file: data for file, data in array_bytes(old).items() if not file.endswith("zarr.json")} == {
            file: data for file, data in whole.items() if not file.endswith("zarr.json")
        }, name
    assert restore_metadata(LocalStore(old)) == [], "it keeps no copy of them"


def test_it_is_brought_up_to_date_with_the_same_content(old):
    cache = FeatureCache.open(old)
    found = changes(cache, cache.spec, table())
    assert found.described() == "" and found.digests == found.any == (not cache.has_digests)
    rebuild(old, Plan(cache.spec, table(), found.rows, found.audio), {"tool_version": "0.1.0"})
    check(FeatureCache.open(old), [0, 1, 2, 3, 5])
    assert FeatureCache.open(old).digests.tolist() == list(range(1, N + 1))
    assert FeatureCache.open(old).layout.version == 2 and verify(old).ok
    assert not list(old.rglob("c")) and [file.name for file in (old / "status/log").iterdir()] == ["merged"]
    finish(old)
    check(FeatureCache.open(old), [0, 1, 2, 3, 5, 6])
    assert verify(old).ok
