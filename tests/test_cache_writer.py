"""A writer's hold on a cache: which shards are its own, what it keeps of them, and who is kept out."""

import os
import threading
import time

import numpy as np
import pytest
import zarr

from planted import forget, planted_cache
from whisper_at_cli.extract.cache import (
    CacheSpec,
    CacheWriter,
    ClipTable,
    FeatureCache,
    ShardBlock,
    Status,
    locks,
    writer,
)
from whisper_at_cli.extract.cache.summary import summarise
from whisper_at_cli.extract.errors import CacheError, UsageError

N, L, T, D = 11, 2, 25, 4
CLIP_BYTES = {"float16": L * T * D * 2, "int8": L * T * D}


def spec(**changes):
    return CacheSpec(**(dict(backbone="b", weights_sha256="0", layers=L, dim=D, clip_seconds=5.0) | changes))


def table(count=N):
    ids = np.array([f"clip{i}" for i in range(count)])
    return ClipTable(ids, ids, np.zeros(count, np.int16), np.full(count, ""), np.zeros((count, 0), np.uint8))


def created(path, *, dtype="float16", **options) -> CacheWriter:
    """Eleven clips in shards of four, four and three."""
    return CacheWriter.create(path, spec(dtype=dtype), table(), shard_mb=4.2 * CLIP_BYTES[dtype] / 1e6, **options)


def filled(rows, dtype="float16", failed=()) -> ShardBlock:
    """A shard whose clips hold their own row, in several ways."""
    block = ShardBlock.empty(len(rows), spec(dtype=dtype))
    for slot, row in enumerate(rows):
        if row in failed:
            block.errors[slot] = f"clip {row} is broken"
            continue
        block.features[slot], block.mean[slot], block.valid_frames[slot] = row, row + 0.5, row + 10
        block.status[slot] = Status.DONE
        if block.scale is not None:
            block.scale[slot] = row / 2
    return block


def test_room_for_clips_holds_none_yet():
    for dtype, mean in (("float32", "float32"), ("float16", "float16"), ("int8", "float16")):
        block = ShardBlock.empty(3, spec(dtype=dtype))
        assert block.features.shape == (3, L, T, D) and block.features.dtype == dtype and not block.features.any()
        assert block.mean.shape == (3, L, D) and block.mean.dtype == mean and not block.mean.any()
        assert block.valid_frames.tolist() == [0, 0, 0] and block.valid_frames.dtype == block.status.dtype == np.uint8
        assert block.status.tolist() == [Status.FAILED] * 3 and block.errors == {}
        assert block.scale is None if dtype != "int8" else (block.scale.shape, block.scale.dtype) == ((3, L, D), "f2")
        assert dtype != "int8" or not block.scale.any()


def test_each_slot_has_every_nth_shard(tmp_path):
    with created(tmp_path / "a.zarr") as one:
        assert one.slot == (1, 1) and one.clips_per_shard == 4 and one.mine().all()
        assert one.pending_shards() == [0, 1, 2]
        assert [one.rows(shard) for shard in range(3)] == [range(4), range(4, 8), range(8, 11)]
    with created(tmp_path / "a.zarr", slot=(1, 2)) as odd, created(tmp_path / "a.zarr", slot=(2, 2)) as even:
        assert odd.pending_shards() == [0, 2] and even.pending_shards() == [1]
        assert np.flatnonzero(even.mine()).tolist() == [4, 5, 6, 7]
        wanted = np.isin(np.arange(N), [3, 5, 10])
        assert odd.shards_of(wanted) == [0, 2] and even.shards_of(wanted) == [1]
        assert odd.shards_of(np.isin(np.arange(N), [4])) == []
        odd.write(2, filled(range(8, 11)))
        assert odd.pending_shards() == [0]


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_a_shard_that_is_redone_in_part_keeps_the_rest(tmp_path, dtype):
    with created(tmp_path / "a.zarr", dtype=dtype) as first:
        for shard in range(3):
            first.write(shard, filled(first.rows(shard), dtype, failed=(5, 6)))
        redo = np.isin(np.arange(N), [4, 6])
        block = first.block(1, redo)
        assert block.status.tolist() == [2, 2, 2, 1]
        assert block.errors == {1: "clip 5 is broken"}
        assert block.features[:, 0, 0, 0].tolist() == [0, 0, 0, 7] and block.mean[:, 1, 3].tolist() == [0, 0, 0, 7.5]
        assert block.valid_frames.tolist() == [0, 0, 0, 17]
        assert block.scale is None or block.scale[:, 1, 2].tolist() == [0, 0, 0, 3.5]
        again = filled(range(4, 7), dtype)
        for name in ("features", "mean", "valid_frames", "status", *(("scale",) if dtype == "int8" else ())):
            getattr(block, name)[[0, 2]] = getattr(again, name)[[0, 2]]
        first.write(1, block)
        assert first.block(2, redo).features[:, 0, 0, 0].tolist() == [8, 9, 10]
    cache = FeatureCache.open(tmp_path / "a.zarr")
    assert np.flatnonzero(~cache.done).tolist() == [5] and cache.errors[5] == "clip 5 is broken"
    done = np.flatnonzero(cache.done)
    assert cache.mean()[:, 0, 0].tolist() == [row + 0.5 for row in done]
    assert cache.stored_features(done)[:, 1, 24, 3].tolist() == done.tolist()
    assert cache.valid_frames.tolist() == [row + 10 if row != 5 else 0 for row in range(N)]
    if dtype == "int8":
        assert cache.features([9])[0, 0, 0, 0] == 9 * 4.5 and cache.scale([9, 4])[:, 0, 0].tolist() == [4.5, 2]


def test_a_shard_without_failures_writes_no_errors_and_one_that_is_mended_takes_them_back(tmp_path):
    path = tmp_path / "a.zarr"
    with created(path) as first:
        first.write(0, filled(range(4)))
    assert [file.name for file in (path / "error").iterdir()] == ["zarr.json"]
    with created(path) as first:
        status = first.cache.clip_status
        assert set(status.errors()) == {""}
        first.write(2, filled(range(8, 11), failed=(9,)))
        assert status.errors().tolist() == [""] * 9 + ["clip 9 is broken", ""]
        assert status.errors(range(9, 11)).tolist() == ["clip 9 is broken", ""]
        assert status.errors(range(8, 9)).tolist() == [""]
        assert first.cache.status.tolist() == [1] * 4 + [0] * 4 + [1, 2, 1]
    assert (path / "error/c.0").exists()
    with created(path) as again:
        assert again.cache.clip_status.errors().tolist() == [""] * 9 + ["clip 9 is broken", ""]
        again.write(2, filled(range(8, 11)))
        assert set(again.cache.clip_status.errors()) == {""}
    assert [file.name for file in (path / "error").iterdir()] == ["zarr.json"]
    assert set(FeatureCache.open(path).errors) == {""}


def test_a_block_of_another_length_than_its_shard_is_refused(tmp_path):
    with created(tmp_path / "a.zarr") as first:
        with pytest.raises(ValueError, match="shard 2 has 3 clips, the block 4"):
            first.write(2, filled(range(8, 12)))
        assert first.pending_shards() == [0, 1, 2]


def test_a_shard_of_failed_clips_alone_has_no_means(tmp_path):
    with created(tmp_path / "a.zarr", dtype="int8") as first:
        first.write(0, filled(range(4), "int8", failed=range(4)))
        first.write(1, filled(range(4, 8), "int8", failed=(4, 5, 7)))
    group = zarr.open_group(tmp_path / "a.zarr", mode="r")
    means = group["mean"][:, 0, 0]
    assert np.isnan(means).tolist() == [True] * 6 + [False] + [True] * 4 and means[6] == 6.5
    assert np.isnan(group["scale"][:, 0, 0]).tolist() == [True] * 6 + [False] + [True] * 4
    assert (tmp_path / "a.zarr/mean/c.0.0.0").stat().st_size == L * 16 + 4, "an index and no chunk"


def test_files_of_a_shard_are_written_status_last(tmp_path, monkeypatch):
    from whisper_at_cli.extract.cache.store import LocalStore

    names, write, append = [], LocalStore.write_together, LocalStore.append
    with created(tmp_path / "a.zarr", dtype="int8") as first:
        with monkeypatch.context() as patch:
            patch.setattr(LocalStore, "write_together", lambda *args: names.extend(args[1]) or write(*args))
            patch.setattr(LocalStore, "append", lambda *args: names.append(args[1]) or append(*args))
            first.write(1, filled(range(4, 8), "int8"))
        log = next((tmp_path / "a.zarr/status/log").iterdir())
    assert log.name.startswith("1-of-1.")
    assert names == ["features/c.1.0.0.0", "mean/c.1.0.0", "scale/c.1.0.0", f"status/log/{log.name}"]


def test_paths_are_mended_across_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(writer.schema, "ROWS_PER_CHUNK", 4)
    with created(tmp_path / "a.zarr") as first:
        first.update_paths(np.array([9, 3, 4, 0]), ["nine", "three", "four", "nought"])
    expected = [f"clip{i}" for i in range(N)]
    expected[9], expected[3], expected[4], expected[0] = "nine", "three", "four", "nought"
    assert FeatureCache.open(tmp_path / "a.zarr").paths.tolist() == expected


def test_a_refused_writer_leaves_no_lock_behind(tmp_path):
    created(tmp_path / "a.zarr").close()
    for wrong, clips, error in ((spec(layers=3), table(), CacheError), (spec(), table(10), CacheError)):
        with pytest.raises(error):
            CacheWriter.create(tmp_path / "a.zarr", wrong, clips)
        assert locks.running_slots(tmp_path / "a.zarr") == set()
    (tmp_path / "a.zarr/zarr.json").rename(tmp_path / "kept.json")
    with pytest.raises(UsageError):
        CacheWriter(writer.location(tmp_path / "a.zarr"), (1, 1))
    assert locks.running_slots(tmp_path / "a.zarr") == set()


def test_clips_that_differ_are_named_by_where_they_begin_to(tmp_path):
    created(tmp_path / "a.zarr").close()
    for count, row in ((10, 11), (14, 12)):
        with pytest.raises(
            CacheError, match=f"holds 11 clips and the dataset names {count}; they differ from clip {row} "
        ):
            CacheWriter.create(tmp_path / "a.zarr", spec(), table(count))
    swapped = table()
    swapped.ids[[0, 1]] = swapped.ids[[1, 0]]
    with pytest.raises(CacheError, match="differ from clip 1 on"):
        CacheWriter.create(tmp_path / "a.zarr", spec(), swapped)


def test_what_is_no_cache_gets_no_lock_and_nothing_else(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").touch()
    with pytest.raises(UsageError, match="not a feature cache"):
        CacheWriter.create(tmp_path / "photos", spec(), table())
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["a.jpg"]


def test_a_cache_appears_whole_and_what_a_killed_run_left_is_cleared(tmp_path):
    left, at_work = (tmp_path / "deep" / f".a.zarr.{name}.partial" for name in ("1", "2"))
    (left / "cache" / "features").mkdir(parents=True)
    at_work.mkdir()
    yesterday = time.time() - 25 * 3600
    os.utime(left, (yesterday, yesterday))
    created(tmp_path / "deep" / "a.zarr", provenance={"by": "us"}).close()
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == [at_work.name, "a.zarr"]
    assert FeatureCache.open(tmp_path / "deep" / "a.zarr").attributes["made"] == {"by": "us"}
    created(tmp_path / "deep" / "b.zarr").close()
    assert FeatureCache.open(tmp_path / "deep" / "b.zarr").attributes["made"] == {}


def test_processes_of_one_number_in_two_containers_lay_out_their_own(tmp_path, monkeypatch):
    create_arrays, places = writer.schema.create_arrays, []

    def remember(path, *args, **options):
        places.append(path)
        create_arrays(path, *args, **options)
        if len(places) == 1:
            created(tmp_path / "a.zarr", provenance={"by": "second"}).close()

    monkeypatch.setattr(os, "getpid", lambda: 1)
    monkeypatch.setattr(writer.schema, "create_arrays", remember)
    created(tmp_path / "a.zarr", provenance={"by": "first"}).close()
    assert len(set(places)) == 2
    assert FeatureCache.open(tmp_path / "a.zarr").attributes["made"] == {"by": "second"}


def test_why_a_cache_cannot_be_made_is_said(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"cannot make .*/file/a\.zarr: File exists; choose another path"):
        created(tmp_path / "file" / "a.zarr")

    def full(*_args, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer.schema, "create_arrays", full)
    with pytest.raises(CacheError, match=r"cannot make .*a\.zarr: No space left on device; make room"):
        created(tmp_path / "a.zarr")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_cache_of_who_came_first_is_continued(tmp_path, monkeypatch):
    """Two processes of one job create the cache at once: the second finds it there when it renames its own."""
    create_arrays = writer.schema.create_arrays

    def meanwhile(path, *args, **options):
        create_arrays(path, *args, **options)
        if not (tmp_path / "a.zarr").exists():
            create_arrays(tmp_path / "a.zarr", *args, **(options | {"provenance": {"by": "first"}}))

    monkeypatch.setattr(writer.schema, "create_arrays", meanwhile)
    created(tmp_path / "a.zarr", provenance={"by": "second"}).close()
    assert FeatureCache.open(tmp_path / "a.zarr").attributes["made"] == {"by": "first"}
    assert [path.name for path in tmp_path.iterdir()] == ["a.zarr"]


@pytest.mark.parametrize("slot", [(0, 1), (2, 1), (-1, 3), (4, 3), (0, 0)])
def test_slots_run_from_1_to_n(tmp_path, slot):
    with pytest.raises(UsageError, match=f"--shard {slot[0]}/{slot[1]} is out of range; I runs from 1 to N"):
        created(tmp_path / "a.zarr", slot=slot)
    assert not (tmp_path / "a.zarr").exists()


def test_a_worker_that_joins_takes_no_lock(tmp_path):
    with created(tmp_path / "a.zarr"):
        joined = CacheWriter.join(tmp_path / "a.zarr")
        assert joined.pending_shards() == [0, 1, 2]
        joined.write(1, filled(range(4, 8)))
        joined.close()
        assert locks.running_slots(tmp_path / "a.zarr") == {(1, 1)}
    assert FeatureCache.open(tmp_path / "a.zarr").done.sum() == 4


def test_locks_say_who_is_at_work_and_go_with_the_writer(tmp_path):
    path = tmp_path / "a.zarr"
    assert locks.running_slots(path) == set() and locks.lock_files(path) == {}
    with created(path, slot=(1, 3)):
        with created(path, slot=(3, 3)):
            assert locks.running_slots(path) == {(1, 3), (3, 3)}
            with pytest.raises(
                CacheError, match="writing to .*a.zarr as --shard 3/3; wait for it, or give every process"
            ):
                created(path, slot=(3, 3))
            with pytest.raises(CacheError, match="--shard [13]/3"):
                created(path, slot=(1, 2))
        assert locks.running_slots(path) == {(1, 3)}
        created(path, slot=(2, 3)).close()
    assert locks.running_slots(path) == set()
    folder = locks.lock_folder(path)
    assert folder == path / "status" / ".locks"
    assert locks.lock_files(path) == {(i, 3): folder / f"{i}-of-3" for i in (1, 2, 3)}
    for name in ("a-of-3", "1-of-b", "1-of-", "-of-"):
        (folder / name).touch()
    assert set(locks.lock_files(path)) == {(1, 3), (2, 3), (3, 3)}


@pytest.mark.parametrize("look", [locks.running_slots, lambda path: created(path, slot=(2, 2)).close()])
def test_who_looks_at_the_locks_waits_for_who_does_already(tmp_path, look):
    path = tmp_path / "a.zarr"
    created(path, slot=(1, 2)).close()
    with open(locks.lock_folder(path) / "door") as door:
        assert locks.take_lock(door)
        looking = threading.Thread(target=look, args=(path,))
        looking.start()
        looking.join(0.2)
        assert looking.is_alive()
    looking.join(20)
    assert not looking.is_alive()


def test_looking_at_the_locks_writes_nothing(tmp_path, monkeypatch):
    """A cache may lie where this user can only read."""
    created(tmp_path / "a.zarr", slot=(1, 2)).close()
    opened, whole = [], open
    monkeypatch.setattr("builtins.open", lambda file, mode="r", *more: opened.append(mode) or whole(file, mode, *more))
    assert locks.running_slots(tmp_path / "a.zarr") == set()
    assert opened and set(opened) == {"r"}


def test_a_file_system_without_room_for_a_shard_is_said_in_words(tmp_path, monkeypatch):
    with created(tmp_path / "a.zarr") as first:

        def refuse(*_):
            raise OSError("a library's own words")

        monkeypatch.setattr(writer.LocalStore, "write_together", refuse)
        with pytest.raises(
            CacheError, match="cannot write to .*a.zarr: a library's own words. What was finished is kept"
        ):
            first.write(0, filled(range(4)))
        assert first.cache.status.tolist() == [0] * N


def test_info_says_everything_of_a_cache(tmp_path):
    path = tmp_path / "a.zarr"
    cache = planted_cache(
        path, np.ones((N, L, T, D)), np.arange(N) % 2, fold=np.arange(N) % 3, failed=(3,),
        split=np.array(["", "b", "a"])[np.arange(N) % 3], class_names=["dog", "cat"],
        shard_mb=4.2 * L * T * D * 4 / 1e6,
    )  # fmt: skip
    forget(path, 2)
    files = [file for file in path.rglob("*") if file.is_file()]
    assert summarise(path) == {
        "cache": str(path), "complete": False, "clips": N, "done": 7, "failed": 1, "pending": 3, "backbone": "planted",
        "weights_sha256": "0" * 64, "layers": L, "frames": T, "dim": D, "dtype": "float32", "precision": "float32",
        "clip_seconds": 5.0, "dataset": "", "classes": 2, "class_names": ["dog", "cat"], "folds": [1, 2],
        "splits": ["a", "b"], "shards": 3, "clips_per_shard": 4, "files": len(files),
        "bytes": sum(file.stat().st_size for file in files), "made": {},
        "slots": [{"shard": "1/1", "clips": N, "pending": 3, "done": 7, "failed": 1, "running": False}],
        "failures": [{"id": "clip3", "path": "audio/clip3.wav", "error": "planted failure"}],
        "notes": [],
    }  # fmt: skip
    assert cache.complete and list(summarise(path))[:6] == ["cache", "complete", "clips", "done", "failed", "pending"]


def test_info_says_what_each_task_of_the_last_division_has_to_do(tmp_path):
    path = tmp_path / "a.zarr"
    created(path, provenance={"by": "us"}).close()
    assert summarise(path)["made"] == {"by": "us"}
    os.utime(locks.lock_folder(path) / "1-of-1", (1, 1))  # long ago
    with created(path, slot=(2, 2), provenance={}) as second, created(path, slot=(1, 2)) as one:
        second.write(1, filled(range(4, 8), failed=(5,)))
        one.write(2, filled(range(8, 11)))
        one.close()
        assert summarise(path)["slots"] == [
            {"shard": "1/2", "clips": 7, "pending": 4, "done": 3, "failed": 0, "running": False},
            {"shard": "2/2", "clips": 4, "pending": 0, "done": 3, "failed": 1, "running": True},
        ]
    os.utime(locks.lock_folder(path) / "1-of-1")
    for name in ("1-of-2", "2-of-2"):
        os.utime(locks.lock_folder(path) / name, (1, 1))
    assert [slot["shard"] for slot in summarise(path)["slots"]] == ["1/1"]
    for file in locks.lock_files(path).values():
        file.unlink()
    assert summarise(path)["slots"] == []
