"""The files of a cache: written whole however the system takes them, read in parts, and listed."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest

from planted import planted_cache
from whisper_at_cli.extract.cache import reader, shards, store
from whisper_at_cli.extract.cache.shards import ShardFile, chunk_buffers, crc32c, read_chunk, shard_buffers
from whisper_at_cli.extract.cache.store import BucketFile, LocalFile, LocalStore, location
from whisper_at_cli.extract.errors import CacheError, UsageError


def test_a_file_is_written_over_whole_and_nothing_lies_beside_it(tmp_path):
    here = LocalStore(tmp_path)
    assert here.read("deep/er/a") is None and not here.exists("deep/er/a")
    here.write_whole("deep/er/a", [b"first, and long"])
    (tmp_path / "deep/er/.a.partial").write_bytes(b"what a killed run left, longer than what comes")
    here.write_whole("deep/er/a", [b"se", bytearray(b"co"), np.frombuffer(b"nd", np.uint8)])
    assert here.read("deep/er/a") == b"second" and here.exists("deep/er/a")
    assert here.sizes() == {"deep/er/a": 6} and here.zarr() == here.path == here.address == tmp_path
    assert str(here) == str(tmp_path)


def test_a_file_appears_only_when_all_of_it_is_safe(tmp_path, monkeypatch):
    """Its bytes are on disk before it has its name, and its name before the call returns."""
    synced, fsync, replace = [], os.fsync, os.replace

    def note(file):
        synced.append(str(Path(f"/proc/self/fd/{file}").readlink()))
        fsync(file)

    monkeypatch.setattr(store.os, "fsync", note)
    monkeypatch.setattr(store.os, "replace", lambda a, b: synced.append("renamed") or replace(a, b))
    LocalStore(tmp_path).write_whole("status/c/0", [b"done"])
    folder = tmp_path / "status/c"
    assert synced == [str(folder / ".0.partial"), "renamed", str(folder)]


def test_files_written_together_wait_for_the_disk_once_and_appear_in_order(tmp_path, monkeypatch):
    done, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(store.os, "fsync", lambda file: done.append("sync") or fsync(file))
    monkeypatch.setattr(store.os, "replace", lambda a, b: done.append(Path(b).name) or replace(a, b))
    LocalStore(tmp_path).write_together({"x/b": [b"1"], "x/a": [b"2"], "y/c": [b"3"]})
    assert done == ["sync"] * 3 + ["b", "a", "c"] + ["sync"] * 2
    assert LocalStore(tmp_path).sizes() == {"x/b": 1, "x/a": 1, "y/c": 1}


@pytest.mark.parametrize("error", [OSError(28, "full"), KeyboardInterrupt()])
def test_what_cannot_be_written_keeps_what_was_there(tmp_path, monkeypatch, error):
    here = LocalStore(tmp_path)
    here.write_whole("a", [b"old"])

    def fail(*_):
        raise error

    monkeypatch.setattr(store.os, "writev", fail)
    with pytest.raises(type(error)):
        here.write_whole("a", [b"new"])
    assert here.read("a") == b"old"
    assert here.sizes().keys() == ({"a"} if isinstance(error, OSError) else {"a", ".a.partial"})


def _open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_files_and_folders_are_closed_again(tmp_path):
    here, before = LocalStore(tmp_path), _open_files()
    for at in range(3):
        here.write_whole(f"{at}", [b"x"])
        file = here.open(f"{at}")
        assert _open_files() == before + 1
        del file
    assert _open_files() == before


@pytest.mark.parametrize("most", [1, 3, 7, 8, 1000])
def test_the_system_may_take_any_part_of_what_it_is_given(tmp_path, monkeypatch, most):
    """A disk that takes a few bytes a call gets the same file, also from more buffers than one call takes."""
    writev, write = os.writev, os.write

    def few(file, buffers):
        left, some = most, []
        for buffer in buffers:
            some.append(memoryview(buffer).cast("B")[:left])
            left -= len(some[-1])
        return writev(file, [part for part in some if len(part)])

    monkeypatch.setattr(store, "BUFFERS", 4)
    monkeypatch.setattr(store.os, "writev", few)
    monkeypatch.setattr(store.os, "write", lambda file, data: write(file, data[:2]))
    buffers = [b"a", b"", np.arange(3, dtype="<u2"), b"bcdefgh", b"i", bytearray(b"jk"), b"l", b"m", b"no", b"p"]
    LocalStore(tmp_path).write_whole("a", buffers)
    assert (tmp_path / "a").read_bytes() == b"a\0\0\1\0\2\0bcdefghijklmnop"


def test_more_buffers_than_the_system_takes_at_once_come_back(tmp_path):
    buffers = [number.to_bytes(2, "little") for number in range(3 * os.sysconf("SC_IOV_MAX") + 1)]
    LocalStore(tmp_path).write_whole("a", buffers)
    assert (tmp_path / "a").read_bytes() == b"".join(buffers)


@pytest.mark.parametrize("vectored", [True, False])
def test_a_part_of_a_file_fills_buffers_one_after_another(tmp_path, monkeypatch, vectored):
    """With the system's own call, and on systems that have none."""
    if not vectored:
        monkeypatch.delattr(os, "preadv")
        monkeypatch.delattr(os, "posix_fadvise")
    (tmp_path / "a").write_bytes(bytes(range(20)))
    file = LocalFile(tmp_path / "a")
    assert file.size == 20
    one, two, three = bytearray(3), np.zeros(2, "<u2"), bytearray(5)
    assert file.readv([one, two, three], 6) == 12
    assert list(one) == [6, 7, 8] and two.tobytes() == bytes([9, 10, 11, 12]) and list(three) == [13, 14, 15, 16, 17]
    assert file.readv([one, three], 16) == 4, "a file that ends says so"
    assert list(one) == [16, 17, 18] and list(three) == [19, 14, 15, 16, 17]
    with pytest.raises(FileNotFoundError):
        LocalFile(tmp_path / "absent")


def test_a_store_is_found_by_its_address(tmp_path, monkeypatch):
    assert location(tmp_path).path == tmp_path and location(str(tmp_path)).path == tmp_path
    assert location("a:/b").path == Path("a:/b") and location(Path("C:/b")).path == Path("C:/b")
    for scheme in ("s3", "gs", "az"):
        with pytest.raises(UsageError, match=f"before it became a Path; give it as text: '{scheme}://...'"):
            location(Path(f"{scheme}://bucket/a.zarr"))
    assert LocalStore(tmp_path).map(lambda number: number + 1, iter((3, 1))) == [4, 2]
    with LocalStore(tmp_path).asking("a"):
        pass


def test_checksums_are_crc32c_in_four_little_endian_bytes():
    assert crc32c(b"123456789") == bytes.fromhex("839206e3")  # 0xe3069283, of every list of checksums
    assert chunk_buffers(np.array([[1], [2]], "<u2")) == [b"\1\0\2\0", crc32c(b"\1\0\2\0")]
    assert chunk_buffers(np.arange(6, dtype=np.uint8).reshape(2, 3).T)[0] == bytes([0, 3, 1, 4, 2, 5])


def test_a_chunk_file_is_read_if_it_is_whole(tmp_path):
    here = LocalStore(tmp_path)
    assert read_chunk(here, "c/0", 3) is None
    here.write_whole("c/0", chunk_buffers(np.array([7, 8, 9], np.uint8)))
    assert read_chunk(here, "c/0", 3).tolist() == [7, 8, 9]
    for count, data in ((2, [7, 8, 9]), (4, [7, 8, 9]), (3, [])):
        here.write_whole("c/0", chunk_buffers(np.array(data, np.uint8)))
        with pytest.raises(CacheError, match=f"{tmp_path}/c/0 is damaged.*; run: whisper-at-cli verify$"):
            read_chunk(here, "c/0", count)
    here.write_whole("c/0", [bytes([7, 8, 8]), crc32c(bytes([7, 8, 9]))])
    with pytest.raises(CacheError, match="its CRC-32C does not match"):
        read_chunk(here, "c/0", 3)


CHUNKS = np.arange(60, dtype="<u2").reshape(10, 6)


def shard(folder, present=range(10), *, compressed=False, count=10):
    """A shard of ten chunks of six numbers, and its file."""
    there = np.zeros(count, dtype=bool)
    there[list(present)] = True
    LocalStore(folder).write_whole("s", shard_buffers(CHUNKS, there, compressed=compressed))
    return ShardFile(LocalStore(folder), "s", chunk_count=count, chunk_bytes=12)


def test_a_shard_is_its_chunks_their_checksums_and_an_index(tmp_path):
    shard(tmp_path, [1, 4], count=11)
    first, second = CHUNKS[1].tobytes(), CHUNKS[4].tobytes()
    index = np.full((11, 2), 2**64 - 1, dtype="<u8")
    index[1], index[4] = (0, 16), (16, 16)
    parts = [first, crc32c(first), second, crc32c(second), index.tobytes(), crc32c(index.tobytes())]
    assert (tmp_path / "s").read_bytes() == b"".join(parts)


def reads_of(file, monkeypatch) -> list[tuple[int, int]]:
    """Start and number of buffers of every read of this shard's chunks."""
    file.read([0], np.empty((1, 6), "<u2"))  # the index
    asked, readv = [], file._file.readv
    monkeypatch.setattr(
        file._file, "readv", lambda buffers, start: asked.append((start, len(buffers) // 2)) or readv(buffers, start)
    )
    return asked


@pytest.mark.parametrize(
    "chunks, reads",
    [
        ([0], [(0, 1)]),
        ([3, 4, 5], [(48, 3)]),
        ([0, 1, 3, 4, 9], [(0, 2), (48, 2), (144, 1)]),
        ([2, 1, 0], [(32, 1), (16, 1), (0, 1)]),
        ([5, 5, 6], [(80, 1), (80, 2)]),
        (list(range(10)), [(0, 4), (64, 4), (128, 2)]),
        ([9, 0, 1], [(144, 1), (0, 2)]),
    ],
)
def test_chunks_side_by_side_are_one_read_of_at_most_so_many(tmp_path, monkeypatch, chunks, reads):
    monkeypatch.setattr(LocalFile, "run", 4)
    file, out = shard(tmp_path), np.zeros((len(chunks), 6), "<u2")
    asked = reads_of(file, monkeypatch)
    file.read(chunks, out)
    assert asked == reads
    np.testing.assert_array_equal(out, CHUNKS[chunks])


def test_reads_of_a_folder_are_of_sixteen_chunks_and_of_a_bucket_of_many():
    assert LocalFile.run == 16 and BucketFile.run == 256


@pytest.mark.parametrize("compressed", [False, True])
def test_a_shard_names_each_chunk_that_it_cannot_give(tmp_path, compressed):
    def reader(file):
        return file.read_compressed if compressed else file.read

    out = np.zeros((1, 6), "<u2")
    file = shard(tmp_path, [0, 1, 3], compressed=compressed)
    reader(file)([3], out)
    np.testing.assert_array_equal(out[0], CHUNKS[3])
    with pytest.raises(CacheError, match=f"{tmp_path}/s has no chunk 2 although its clip is marked done; run: whisper"):
        reader(file)([2], out)
    data = bytearray((tmp_path / "s").read_bytes())
    lengths = np.frombuffer(bytes(data[-164:-4]), "<u8").reshape(10, 2)[:, 1]
    for at in (0, int(lengths[0]) - 5, int(lengths[0]) - 1):  # the values and their checksum
        data[at] ^= 4
        (tmp_path / "s").write_bytes(data)
        file = ShardFile(LocalStore(tmp_path), "s", chunk_count=10, chunk_bytes=12)
        with pytest.raises(CacheError, match="chunk 0 of .*/s is damaged: its CRC-32C does not match"):
            reader(file)([0], out)
        reader(file)([1], out)
        data[at] ^= 4


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("wrong", [(0, 10**6), (10**6, 16), (2**63 - 1, 16), (-8, 16)])
def test_an_index_that_points_past_the_end_is_no_chunk(tmp_path, compressed, wrong):
    file = shard(tmp_path, compressed=compressed)
    data = (tmp_path / "s").read_bytes()
    index = np.frombuffer(data[-164:-4], "<u8").reshape(10, 2).copy()
    index[5] = (wrong[0] if wrong[0] >= 0 else len(data) + wrong[0], wrong[1])
    (tmp_path / "s").write_bytes(data[:-164] + index.tobytes() + crc32c(index.tobytes()))
    with pytest.raises(CacheError, match="/s is damaged: its index names more bytes than it holds"):
        (file.read_compressed if compressed else file.read)([5], np.zeros((1, 6), "<u2"))


def test_a_shard_file_that_is_not_whole_is_named(tmp_path):
    file, out = shard(tmp_path), np.zeros((1, 6), "<u2")
    data = (tmp_path / "s").read_bytes()
    cases = {
        b"": "/s is empty", data[:163]: "/s is truncated to 163 bytes", data[-164:]: "names more bytes than it holds",
        data[:-1]: "truncated or its index is damaged", data[:-4] + b"crc!": "truncated or its index is damaged",
    }  # fmt: skip
    for content, said in cases.items():
        (tmp_path / "s").write_bytes(content)
        with pytest.raises(CacheError, match=said):
            ShardFile(LocalStore(tmp_path), "s", chunk_count=10, chunk_bytes=12).read([0], out)
    (tmp_path / "s").unlink()
    with pytest.raises(CacheError, match="/s is missing although its clips are marked done"):
        file.read([0], out)
    (tmp_path / "s").write_bytes(data)
    file.read([0], out)  # it was mended: the same reader goes on
    np.testing.assert_array_equal(out[0], CHUNKS[0])
    os.truncate(tmp_path / "s", 10)
    with pytest.raises(CacheError, match="ended while it was read"):
        file.read([0], out)


def test_a_shard_is_opened_once(tmp_path, monkeypatch):
    opened, whole = [], LocalStore.open
    monkeypatch.setattr(LocalStore, "open", lambda self, name: opened.append(name) or whole(self, name))
    file = shard(tmp_path)
    assert not opened
    for chunk in (3, 1, 3):
        file.read([chunk], np.zeros((1, 6), "<u2"))
    assert opened == ["s"]


def test_scales_take_less_room_than_their_values(tmp_path):
    zeros = np.zeros((4, 1000), np.float16)
    sizes = [
        sum(memoryview(part).nbytes for part in shard_buffers(zeros, np.ones(4, bool), compressed=compressed))
        for compressed in (False, True)
    ]
    assert sizes[0] == 4 * 2004 + 68 and sizes[1] < 400
    assert np.iinfo(np.uint64).max == shards.ABSENT and sys.byteorder == "little"


def test_the_index_of_a_shard_that_was_closed_is_not_read_again(tmp_path, monkeypatch):
    values = np.arange(11 * 3 * 25 * 8, dtype=np.float32).reshape(11, 3, 25, 8)
    cache = planted_cache(
        tmp_path / "a.zarr", values, np.arange(11) % 2, shard_mb=4.2 * values[0].nbytes / 1e6, failed=(1, 6)
    )
    monkeypatch.setattr(reader, "OPEN_SHARDS", 1)
    indexes, whole = [], ShardFile._read_index
    monkeypatch.setattr(ShardFile, "_read_index", lambda self, file: indexes.append(self.path) or whole(self, file))
    for _ in range(3):
        for row in (0, 5, 9, 3):
            assert (cache.features([row])[0] == values[row]).all()
    assert len(indexes) == 3 and len(set(indexes)) == 3
    with pytest.raises(CacheError, match="no features: it is failed"):
        cache.features([1])
