"""The log of what is known of each clip: damage, kills and processes side by side lose nothing that another copy has.

Eleven clips in shards of four, four and three; see `test_cache_writer`.
"""

import contextlib
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from test_cache_writer import created, filled

from conftest import array_bytes
from whisper_at_cli.extract.cache import CacheWriter, FeatureCache, store
from whisper_at_cli.extract.cache.status import Geometry, ShardStatus
from whisper_at_cli.extract.cache.status_log import LOG, MAGIC, MERGED, StatusLog
from whisper_at_cli.extract.cache.store import LocalStore
from whisper_at_cli.extract.cache.verify import verify
from whisper_at_cli.extract.errors import CacheError

FAILED = (2, 9)


class Stopped(BaseException):
    """The process is killed here."""


def write(writer: CacheWriter, *shards: int, failed=FAILED) -> None:
    for shard in shards:
        writer.write(shard, filled(writer.rows(shard), failed=failed))


def finished(path: Path) -> Path:
    with created(path) as writer:
        write(writer, 0, 1, 2)
    return path


def killed(path: Path, *shards: int, slot=(1, 1)) -> Path:
    """Write shards as a process that is killed before it finishes."""
    created(path).close()
    write(CacheWriter.join(path, slot), *shards)
    return path


def said(path: Path) -> tuple:
    cache = FeatureCache.open(path)
    return cache.status.tolist(), cache.valid_frames.tolist(), cache.errors.tolist()


def logs(path: Path) -> list[str]:
    """Files of the log; names of processes without what is drawn at random."""
    return sorted(file.name.partition(".")[0] for file in (path / LOG).iterdir())


def repair(path: Path) -> None:
    """What `extract --repair` does with what is known of the clips."""
    with CacheWriter(LocalStore(path), (1, 1)) as writer:
        writer.rewrites_status = True


def changed(data: bytes, at: int) -> bytes:
    """With another byte there, in one bit or in several."""
    return data[:at] + bytes([data[at] ^ (1 << at % 8 if at % 3 else 0xFF)]) + data[at + 1 :]


@pytest.mark.parametrize("name", [MERGED, "status/c.0", "valid_frames/c.0", "error/c.0"])
def test_any_changed_byte_is_found_loses_nothing_and_is_mended(tmp_path, name, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)
    path = finished(tmp_path / "a.zarr")
    whole, known, file = array_bytes(path), said(path), path / name
    data = file.read_bytes()
    for at in range(len(data)):
        file.write_bytes(changed(data, at))
        found = verify(path).damaged
        assert found and all(damage.problem.startswith(name) and not damage.clips for damage in found), at
        assert said(path) == known, at
        repair(path)
        assert file.read_bytes() == data if name != MERGED else said(path) == known
        assert at % 7 or verify(path).ok
    assert array_bytes(path) == whole


def test_where_all_copies_are_damaged_a_shard_is_pending_and_no_other(tmp_path):
    path = finished(tmp_path / "a.zarr")
    status, data, merged = path / "status/c.0", (path / MERGED).read_bytes(), path / MERGED
    second, third = data.index(MAGIC, 1), data.index(MAGIC, data.index(MAGIC, 1) + 1)
    for at in range(second, third, 3):
        merged.write_bytes(changed(data, at))
        arrays = status.read_bytes()
        status.write_bytes(changed(arrays, 5))
        cache = FeatureCache.open(path)
        assert cache.status.tolist() == [1, 1, 2, 1, 0, 0, 0, 0, 1, 2, 1]
        assert not cache.valid_frames[4:8].any() and cache.errors[9] == "clip 9 is broken"
        assert any(damage.problem.startswith(MERGED) for damage in verify(path).damaged)
        status.write_bytes(arrays)
    status.unlink()
    with created(path) as writer:
        assert writer.pending_shards() == [1]
        write(writer, 1)
    assert verify(path).ok and said(path)[0] == [1, 1, 2, 1, 1, 1, 1, 1, 1, 2, 1]


def test_a_merged_log_that_is_gone_is_missed_and_made_again_of_the_arrays(tmp_path):
    path = finished(tmp_path / "a.zarr")
    known = said(path)
    (path / MERGED).unlink()
    assert [damage.problem for damage in verify(path).damaged] == ["status/log/merged is missing"]
    assert said(path) == known
    created(path).close()
    with created(path):
        pass
    assert verify(path).ok and said(path) == known and logs(path) == ["merged"]


def test_arrays_that_say_something_else_are_damage_although_their_checksums_are_right(tmp_path):
    path, other = finished(tmp_path / "a.zarr"), tmp_path / "b.zarr"
    with created(other) as writer:
        write(writer, 0, 1, 2, failed=(3,))
    known = said(path)
    for name in ("status", "valid_frames", "error"):
        shutil.copy(other / name / "c.0", path / name / "c.0")
        assert [damage.problem for damage in verify(path).damaged] == [f"{name} is not what {MERGED} says"]
        assert said(path) == known
        repair(path)
        assert verify(path).ok


def test_a_record_that_is_cut_off_anywhere_is_not_there_and_no_damage(tmp_path):
    path = killed(tmp_path / "a.zarr", 0, 1, 2)
    (log,) = (path / LOG).iterdir()
    data = log.read_bytes()
    ends = [at for at in range(1, len(data)) if data.startswith(MAGIC, at)] + [len(data)]
    for size in range(len(data) + 1):
        log.write_bytes(data[:size])
        cache, shards = FeatureCache.open(path), sum(end <= size for end in ends)
        assert np.unique(np.flatnonzero(cache.status) // 4).tolist() == list(range(shards))
        assert cache.clip_status.problems == [] and (size % 9 or verify(path).ok)
    log.write_bytes(data[:-1])
    with created(path) as writer:
        assert writer.pending_shards() == [2]
        write(writer, 2)
    assert array_bytes(path) == array_bytes(finished(tmp_path / "whole.zarr")) and logs(path) == ["merged"]


def test_a_damaged_record_in_the_middle_of_a_log_loses_that_shard_alone(tmp_path):
    path = killed(tmp_path / "a.zarr", 0, 1, 2)
    (log,) = (path / LOG).iterdir()
    data = log.read_bytes()
    second = data.index(MAGIC, 1)
    for at in range(second, data.index(MAGIC, second + 1)):
        log.write_bytes(changed(data, at))
        assert said(path)[0] == [1, 1, 2, 1, 0, 0, 0, 0, 1, 2, 1], at
        assert any(f"{log.name} is damaged at byte {second}" in damage.problem for damage in verify(path).damaged)
    repair(path)
    assert verify(path).ok and said(path)[0] == [1, 1, 2, 1, 0, 0, 0, 0, 1, 2, 1] and logs(path) == ["merged"]


def test_processes_side_by_side_see_each_other_and_the_last_one_merges(tmp_path):
    path = tmp_path / "a.zarr"
    slots = [created(path, slot=(index, 3)) for index in (1, 2, 3)]
    for shard, writer in enumerate(slots):
        write(writer, shard)
        for other in slots:
            other.cache.clip_status.reload()
            assert (other.cache.status != 0).tolist() == [row < min(11, 4 * shard + 4) for row in range(11)]
    for writer in slots:
        assert logs(path) == ["1-of-3", "2-of-3", "3-of-3"] and verify(path).ok
        with writer:
            pass
    assert logs(path) == ["merged"]
    assert array_bytes(path) == array_bytes(finished(tmp_path / "whole.zarr"))


def test_the_log_of_a_process_at_work_stays_when_another_finishes(tmp_path):
    path = tmp_path / "a.zarr"
    with created(path, slot=(1, 2)) as one:
        write(one, 0)
        with created(path, slot=(2, 2)) as two:
            write(two, 1)
        assert logs(path) == ["1-of-2", "2-of-2"]
        write(one, 2)
    assert logs(path) == ["merged"] and FeatureCache.open(path).complete


@pytest.mark.parametrize("slot", [(1, 2), (1, 1), (1, 3)])
def test_the_log_of_a_killed_process_is_merged_by_whoever_takes_its_place(tmp_path, slot):
    path = killed(tmp_path / "a.zarr", 0, slot=(1, 2))
    with created(path, slot=(2, 2)) as two:
        write(two, 1)
    assert logs(path) == ["1-of-2", "2-of-2"], "nobody knows that it was killed"
    with created(path, slot=slot):
        pass
    assert logs(path) == ["merged"] and said(path)[0] == [1, 1, 2, 1, 1, 1, 1, 1, 0, 0, 0]


def test_of_several_writes_of_a_shard_the_last_counts_also_in_many_segments(tmp_path):
    path = tmp_path / "a.zarr"
    with created(path) as writer:
        for failed in ((0,), (1, 2), (), (3,)):
            writer.cache.clip_status._log = ""  # as when a log in a bucket is begun anew
            write(writer, 0, failed=failed)
        assert logs(path) == ["1-of-1"] * 4 and said(path)[0][:4] == [1, 1, 1, 2]
    assert said(path)[0][:4] == [1, 1, 1, 2] and said(path)[2][:4] == ["", "", "", "clip 3 is broken"]


@contextlib.contextmanager
def stopped_at(step: int, monkeypatch, *names: str):
    """Stop before the step-th call of these methods of a store."""
    passed = [0]

    def counted(function):
        def call(*args):
            if passed[0] == step:
                raise Stopped
            passed[0] += 1
            return function(*args)

        return call

    with monkeypatch.context() as patch:
        for name in names:
            patch.setattr(LocalStore, name, counted(getattr(LocalStore, name)))
        try:
            yield passed
        except Stopped:
            passed.append(-1)


def test_a_process_killed_at_any_step_of_merging_leaves_a_cache_that_reads_the_same(tmp_path, monkeypatch):
    """Before the log's end, merged, each array, each error chunk and each log's removal."""
    template = finished(tmp_path / "template.zarr")
    write(CacheWriter.join(template, (1, 2)), 0, failed=())
    write(CacheWriter.join(template, (2, 2)), 1, failed=(4,))
    last = filled(range(8, 11), failed=(8,))
    ends = set()
    for step in range(100):
        path = tmp_path / f"{step}.zarr"
        shutil.copytree(template, path)
        writer = CacheWriter(LocalStore(path), (1, 1))
        writer.write(2, last)
        with stopped_at(step, monkeypatch, "append", "write_whole", "remove") as passed:
            writer.finish()
        writer.close()
        known = said(path)
        assert known[0] == [1, 1, 1, 1, 2, 1, 1, 1, 2, 1, 1] and known[2][4] == "clip 4 is broken"
        assert verify(path).ok, step
        repair(path)
        assert said(path) == known and verify(path).ok and logs(path) == ["merged"]
        ends.add(tuple(sorted(array_bytes(path).items())))
        if passed[-1] != -1:
            break
    assert step == 8 and len(ends) == 1


def test_a_full_disk_leaves_no_part_of_a_record(tmp_path, monkeypatch):
    log = StatusLog(LocalStore(tmp_path), Geometry(11, 4, 25))
    one = ShardStatus(np.ones(4, np.uint8), np.full(4, 9, np.uint8))
    log.write(0, one)
    (file,) = (tmp_path / LOG).iterdir()
    data = file.read_bytes()

    def half(number, buffers):
        os.write(number, buffers[0][: len(buffers[0]) // 2])
        raise OSError(28, os.strerror(28))

    def refused(number):
        raise OSError(28, os.strerror(28))

    for name, fails in (("_writev", half), ("os.fsync", refused)):
        with monkeypatch.context() as patch:
            patch.setattr(f"{store.__name__}.{name}", fails)
            with pytest.raises(OSError, match="No space left"):
                log.write(1, one)
        assert file.read_bytes() == data and log.status.tolist() == [1] * 4 + [0] * 7
    log.write(1, one)
    again = StatusLog(LocalStore(tmp_path), Geometry(11, 4, 25))
    assert again.status.tolist() == [1] * 8 + [0] * 3 and again.problems == []


def test_a_disk_that_is_full_when_a_process_finishes_is_said_and_loses_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, os.strerror(28))

    path = tmp_path / "a.zarr"
    with monkeypatch.context() as patch, created(path) as writer:
        write(writer, 0)
        with patch.context() as refuse:
            refuse.setattr(LocalStore, "append", full)
            with pytest.raises(CacheError, match="cannot write to .*a.zarr: No space left on device"):
                write(writer, 1)
        assert writer.pending_shards() == [1, 2]
        with patch.context() as refuse:
            refuse.setattr(LocalStore, "write_whole", full)
            with pytest.raises(CacheError, match="cannot write to .*a.zarr: No space left on device"):
                writer.finish()
        assert (FeatureCache.open(path).status != 0).tolist() == [True] * 4 + [False] * 7
    assert verify(path).ok and logs(path) == ["merged"]


class Failing(LocalStore):
    """A folder whose process is killed at its so manieth change of a file; a record may be cut off then."""

    def __init__(self, path: Path, changes: int, cut: int):
        super().__init__(path)
        self.changes, self.cut = changes, cut

    def _count(self) -> None:
        if self.changes == 0:
            raise Stopped
        self.changes -= 1

    def append(self, name: str, data: bytes) -> None:
        if self.changes == 0 and self.cut:
            super().append(name, data[: self.cut % len(data)])
        self._count()
        super().append(name, data)

    def write_whole(self, name: str, buffers: list) -> None:
        self._count()
        super().write_whole(name, buffers)

    def remove(self, name: str) -> None:
        self._count()
        super().remove(name)


def test_of_a_thousand_random_lives_of_a_cache_each_ends_with_what_was_written_last(tmp_path, monkeypatch):
    """Writes by random slots of random divisions, with kills at any change of a file, and processes that finish."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    for seed in range(1000):
        rng, path = np.random.default_rng(seed), tmp_path / str(seed)
        clips = int(rng.integers(1, 20))
        geometry = Geometry(clips, int(rng.integers(1, min(clips, 5) + 1)), 25)
        model: dict[int, tuple] = {}
        for _ in range(rng.integers(1, 5)):
            live_together(rng, path, geometry, model)
            check(path, geometry, model)
        with contextlib.suppress(Stopped):
            StatusLog(LocalStore(path), geometry).finish(rewrite=True)
        check(path, geometry, model)
        assert [file.name for file in (path / LOG).iterdir()] == ["merged"]
        log = StatusLog(LocalStore(path), geometry)
        assert log.array_problems() == [] and log.problems == []
        shutil.rmtree(path)


def live_together(rng: np.random.Generator, path: Path, geometry: Geometry, model: dict[int, tuple]) -> None:
    """Processes of one division of the work write, finish or are killed, in any order; none is at work at the end."""
    of = int(rng.integers(1, 4))
    processes = {}
    for index in rng.permutation(of)[: rng.integers(1, of + 1)].tolist():
        kill = int(rng.integers(0, 12)) if rng.random() < 0.6 else -1
        processes[index] = StatusLog(Failing(path, kill, int(rng.integers(0, 40))), geometry)
        processes[index].slot = (index + 1, of)
    shards = -(-geometry.clips // geometry.clips_per_shard)
    while processes:
        index = int(rng.choice(list(processes)))
        mine = range(index, shards, of)
        try:
            if len(mine) == 0 or rng.random() < 0.25:
                processes.pop(index).finish()
                continue
            shard = int(rng.choice(mine))
            rows = geometry.rows(shard)
            status = rng.integers(0, 3, len(rows)).astype(np.uint8)
            frames = rng.integers(0, 26, len(rows)).astype(np.uint8)
            errors = {int(slot): f"é{rng.integers(99)}" for slot in np.flatnonzero(status == 2)}
            processes[index].write(shard, ShardStatus(status, frames, errors))
            model[shard] = status.tolist(), frames.tolist(), errors
        except Stopped:
            processes.pop(index, None)


def check(path: Path, geometry: Geometry, model: dict[int, tuple]) -> None:
    log = StatusLog(LocalStore(path), geometry)
    errors = log.errors()
    for shard in range(-(-geometry.clips // geometry.clips_per_shard)):
        rows = geometry.rows(shard)
        here = slice(rows.start, rows.stop)
        texts = {slot: text for slot, text in enumerate(errors[here]) if text}
        nothing = [0] * len(rows)
        assert (log.status[here].tolist(), log.valid_frames[here].tolist(), texts) == model.get(
            shard, (nothing, nothing, {})
        )


@pytest.mark.parametrize("dtype, files", [("float16", 2), ("int8", 3)])
def test_a_shard_is_two_files_or_three_with_int8_and_no_folder(tmp_path, dtype, files):
    path = tmp_path / "a.zarr"
    with created(path, dtype=dtype) as writer:
        for shard in range(2):
            before = set(path.rglob("*"))
            writer.write(shard, filled(writer.rows(shard), dtype, failed=FAILED))
            new = [file for file in set(path.rglob("*")) - before if LOG not in str(file)]
            assert len(new) == files and all(file.is_file() and f"c.{shard}." in file.name for file in new)
    folders = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_dir()}
    assert folders == {file.parent.name for file in path.glob("*/zarr.json")} | {"status/.locks", LOG}
