"""What fuzzing found in feature caches: each stays a clear refusal, without much time or memory."""

import json
import struct
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
from numcodecs import zstd
from numcodecs.vlen import VLenUTF8

from planted import planted_cache
from whisper_at_cli.extract.cache import CacheWriter, FeatureCache
from whisper_at_cli.extract.cache.store import location
from whisper_at_cli.extract.cache.summary import summarise
from whisper_at_cli.extract.cache.verify import verify
from whisper_at_cli.extract.errors import CacheError


def change_json(path: Path, change) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def small_cache(path, dtype="float32", **options):
    """Six clips in shards of two: 2 layers, 4 frames, 3 channels."""
    features = np.arange(6 * 2 * 4 * 3).reshape(6, 2, 4, 3)
    scale = np.ones((6, 2, 3), np.float16) if dtype == "int8" else None
    size = np.dtype(dtype).itemsize
    return planted_cache(
        path, features, np.arange(6) % 2, dtype=dtype, shard_mb=2 * 24 * size / 1e6, scale=scale, **options
    ).path


def seal(path: Path, data: bytes, *, before: bytes = b"") -> None:
    """Write bytes with the checksum that they should have, behind others."""
    path.write_bytes(before + data + google_crc32c.value(data).to_bytes(4, "little"))


COLUMNS = {"id": "ids", "path": "paths", "split": "split", "error": "errors", "fold": "fold", "labels": "labels"}
WRONG_ARRAYS = {
    "no JSON": lambda path: path.write_text("{"),
    "gone": lambda path: path.unlink(),
    "another node": lambda path: change_json(path, lambda meta: meta.update(node_type="group")),
    "no codecs": lambda path: change_json(path, lambda meta: meta.update(codecs=[])),
    "a codec that is none": lambda path: change_json(path, lambda meta: meta["codecs"].append({"name": "none"})),
    "extra": lambda path: change_json(path, lambda meta: meta.update(extra=[])),
    "huge": lambda path: change_json(path, lambda meta: meta.update(shape=[2**62, *meta["shape"][1:]])),
    "one more": lambda path: change_json(path, lambda meta: meta.update(shape=[7, *meta["shape"][1:]])),
    "huge chunks": lambda path: change_json(
        path, lambda meta: meta["chunk_grid"]["configuration"].update(chunk_shape=[2**40] * len(meta["shape"]))
    ),
    "another type": lambda path: change_json(path, lambda meta: meta.update(data_type="float64", fill_value=0.0)),
}


@pytest.mark.parametrize("wrong", WRONG_ARRAYS)
def test_wrong_metadata_of_a_column_are_an_error_that_names_it_and_are_found_by_verify(tmp_path, wrong):
    for name, attribute in COLUMNS.items():
        path = small_cache(tmp_path / f"{name}.zarr")
        WRONG_ARRAYS[wrong](path / name / "zarr.json")
        assert not verify(path).ok
        if name == "error":  # our reader has it from the log
            assert set(FeatureCache.open(path).errors) == {""}
            path = small_cache(tmp_path / "before" / f"{name}.zarr", version=1)
            WRONG_ARRAYS[wrong](path / name / "zarr.json")
        with pytest.raises(CacheError, match=f"{name}.zarr/{name} is missing or damaged") as raised:
            getattr(FeatureCache.open(path), attribute)
        assert "\n" not in str(raised.value) and len(str(raised.value)) < 500
        assert not verify(path).ok


@pytest.mark.parametrize("wrong", sorted(WRONG_ARRAYS.keys() - {"one more"}))
def test_a_cache_whose_features_are_not_laid_out_as_designed_is_not_opened(tmp_path, wrong):
    path = small_cache(tmp_path / "a.zarr")
    WRONG_ARRAYS[wrong](path / "features" / "zarr.json")
    with pytest.raises(CacheError, match="a.zarr/features is missing or damaged"):
        FeatureCache.open(path)


@pytest.mark.parametrize(
    "wrong",
    [
        {"layers": 2.0}, {"layers": "2"}, {"layers": True}, {"dim": 2**40}, {"frames": None}, {"clip_seconds": "5"},
        {"clip_seconds": float("nan")}, {"backbone": 3}, {"dtype": "float64"}, {"dtype": []}, {"class_names": [1, 2]},
        {"class_names": 5},
    ],
)  # fmt: skip
def test_an_attribute_of_another_type_is_an_error_that_names_the_cache(tmp_path, wrong):
    path = small_cache(tmp_path / "a.zarr")
    change_json(path / "zarr.json", lambda meta: meta["attributes"].update(wrong))
    with pytest.raises(CacheError, match="a.zarr"):
        FeatureCache.open(path)


@pytest.mark.parametrize("text", ['{"attributes": []}', '{"attributes": "a"}', "[" * 100_000])
def test_attributes_that_are_none_are_an_error_that_names_the_cache(tmp_path, text):
    path = small_cache(tmp_path / "a.zarr")
    (path / "zarr.json").write_text(text)
    with pytest.raises(CacheError, match="a.zarr/zarr.json is damaged"):
        FeatureCache.open(path)


@pytest.mark.parametrize("packed", [
    zstd.compress(struct.pack("<I", 2**28), 1),
    bytes.fromhex("28b52ffde0") + struct.pack("<Q", 2**40) + b"\x01\0\0",
    bytes.fromhex("28b52ffd00580100" "00"),
    b"", b"no frame at all",
    zstd.compress(struct.pack("<I", 6) + struct.pack("<I", 2**31) + b"a", 1),
])  # fmt: skip
def test_text_that_says_that_it_is_huge_is_damage_and_takes_no_memory(tmp_path, packed):
    path = small_cache(tmp_path / "a.zarr")
    seal(path / "id/c.0", packed)
    with pytest.raises(CacheError, match="a.zarr/id is missing or damaged"):
        list(FeatureCache.open(path).ids)


def test_a_text_that_would_make_all_others_as_long_is_damage(tmp_path):
    path = small_cache(tmp_path / "a.zarr")
    texts = VLenUTF8().encode(np.array(["a", "b", "c", "d", "e", "f" * 70_000], dtype=object))
    seal(path / "id/c.0", zstd.compress(texts, 1))
    with pytest.raises(CacheError, match="a text of 70000 characters"):
        list(FeatureCache.open(path).ids)


def test_labels_of_another_size_are_damage(tmp_path):
    path = small_cache(tmp_path / "a.zarr")
    seal(path / "labels/c.0.0", zstd.compress(bytes(1 << 20), 1))
    with pytest.raises(CacheError, match="a chunk is 1048576 bytes unpacked, not 12"):
        list(FeatureCache.open(path).labels)


def test_ids_that_are_gone_are_missed(tmp_path):
    path = small_cache(tmp_path / "a.zarr")
    (path / "id/c.0").unlink()
    with pytest.raises(CacheError, match="chunk 0 is missing"):
        list(FeatureCache.open(path).ids)


def test_clips_that_have_no_id_are_not_believed(tmp_path):
    """Else each of their shards would be looked for."""
    path = small_cache(tmp_path / "a.zarr")
    change_json(path / "features" / "zarr.json", lambda meta: meta.update(shape=[10**12, 2, 4, 3]))
    with pytest.raises(CacheError, match="1000000000000 clips, which have no id"):
        FeatureCache.open(path)


def test_a_status_that_is_none_counts_as_damage(tmp_path):
    path = small_cache(tmp_path / "a.zarr", version=1)
    seal(path / "status" / "c" / "1", bytes([1, 9]))
    cache = FeatureCache.open(path)
    assert cache.status.tolist() == [1, 1, 0, 0, 1, 1]
    assert [damage.clips for damage in verify(path).damaged] == [("clip2", "clip3")]
    with pytest.raises(CacheError, match="'clip3' .* is pending"):
        cache.features([3])


def test_more_valid_frames_than_frames_count_as_damage(tmp_path):
    path = small_cache(tmp_path / "a.zarr", version=1)
    seal(path / "valid_frames" / "c" / "0", bytes([4, 200]))
    assert [damage.shard for damage in verify(path).damaged] == [0]


FOUR, THREE = b"\4" * 2, b"\3" * 2  # valid frames


@pytest.mark.parametrize("packed", [
    zstd.compress(bytes([1, 9]) + FOUR), zstd.compress(bytes([1, 1, 4, 5])), zstd.compress(b"\1\1\4"), b"",
    zstd.compress(b"\1\1" + FOUR + b"{"), zstd.compress(b"\1\1" + FOUR + b"[]"), b"no frame at all",
    zstd.compress(b"\1\1" + FOUR + b'{"2": "x"}'), zstd.compress(b"\1\1" + FOUR + b'{"0": 1}'),
    zstd.compress(b"\1\1" + FOUR + b'{"a": "x"}'), zstd.compress(b"\1\1" + FOUR + b'{"0": "\xff"}'),
    zstd.compress(b"\1\1" + FOUR + b"[" * 100_000),
    bytes.fromhex("28b52ffde0") + struct.pack("<Q", 2**40) + b"\x01\0\0",
])  # fmt: skip
@pytest.mark.parametrize("name", ["merged", "1-of-1.crafted"])
def test_a_record_that_says_what_cannot_be_is_damage_and_the_arrays_say_what_is(tmp_path, packed, name):
    path = small_cache(tmp_path / "a.zarr")
    (path / "status/log" / name).open("ab").write(crafted_record(1, 5, packed))
    cache = FeatureCache.open(path)
    assert cache.status.tolist() == [1] * 6 and set(cache.errors) == {""}
    found = verify(path).damaged
    assert [(damage.shard, damage.clips) for damage in found] == [(-1, ())]
    assert found[0].problem.startswith(f"status/log/{name} is damaged at byte")


@pytest.mark.parametrize("shard, generation", [(3, 5), (2**32 - 2, 5), (1, 2**32 - 1)])
def test_a_record_of_no_shard_or_of_no_end_of_writes_is_damage(tmp_path, shard, generation):
    path = small_cache(tmp_path / "a.zarr")
    with (path / "status/log/merged").open("ab") as file:
        file.write(crafted_record(shard, generation, zstd.compress(b"\2\2" + THREE)))
    assert FeatureCache.open(path).status.tolist() == [1] * 6 and not verify(path).ok
    with CacheWriter(location(path), (1, 1)) as writer:
        writer.mark(1, np.array([4, 4], np.uint8), np.array([2, 2], np.uint8), {})
    assert FeatureCache.open(path).status.tolist() == [1, 1, 2, 2, 1, 1]


def test_a_record_that_is_whole_counts(tmp_path):
    """Else the tests of crafted ones show nothing."""
    path = small_cache(tmp_path / "a.zarr")
    said = zstd.compress(b"\1\2\3\0" + b'{"1": "broken"}')
    (path / "status/log/1-of-1.crafted").write_bytes(crafted_record(1, 5, said))
    cache = FeatureCache.open(path)
    assert cache.status.tolist() == [1, 1, 1, 2, 1, 1] and cache.errors[3] == "broken"
    assert cache.valid_frames.tolist() == [4, 4, 3, 0, 4, 4]


def crafted_record(shard: int, generation: int, packed: bytes) -> bytes:
    body = struct.pack("<III", shard, generation, len(packed)) + packed
    return b"\x89SHARD\r\n" + body + google_crc32c.value(body).to_bytes(4, "little")


@pytest.mark.parametrize(
    "start, length", [(2**63, 52), (0, 2**63), (0, 5000), (2**64 - 1, 52), (2**64 - 52, 2**64 - 1)]
)
def test_an_index_that_names_bytes_that_are_not_there_is_damage(tmp_path, start, length):
    path = small_cache(tmp_path / "a.zarr")
    shard = path / "features/c.0.0.0.0"
    data = shard.read_bytes()
    seal(shard, struct.pack("<QQ", start, length) + data[-3 * 16 - 4 : -4], before=data[: -4 * 16 - 4])
    with pytest.raises(CacheError, match="is damaged: its index"):
        FeatureCache.open(path).features([0])


def test_chunks_that_share_their_bytes_are_damage(tmp_path):
    """A small file could else stand for any number of clips."""
    path = small_cache(tmp_path / "a.zarr")
    shard = path / "features/c.0.0.0.0"
    data = shard.read_bytes()
    seal(shard, struct.pack("<QQ", 0, 52) * 4, before=data[:52])
    with pytest.raises(CacheError, match="its index names more bytes than it holds"):
        FeatureCache.open(path).features([0])


@pytest.mark.parametrize("frame", [b"", b"no zstd", bytes.fromhex("28b52ffde0ffffffffffffff7f010000")])
def test_a_scale_that_cannot_be_unpacked_is_damage(tmp_path, frame):
    """The last frame says that it holds 2**63 bytes."""
    path = small_cache(tmp_path / "a.zarr", "int8")
    chunk = frame + google_crc32c.value(frame).to_bytes(4, "little")
    index = struct.pack("<QQQQ", 0, len(chunk), 2**64 - 1, 2**64 - 1)
    seal(path / "scale/c.0.0.0", index, before=chunk)
    with pytest.raises(CacheError, match="is damaged"):
        FeatureCache.open(path).scale([0])


def test_locks_that_are_none_of_ours_do_not_keep_info_from_its_work(tmp_path):
    path = small_cache(tmp_path / "a.zarr")
    locks = path / "status" / ".locks"
    (locks / "door").unlink()  # of a cache that was copied in part
    for name in ("3-of-99999999999", "5-of-2", "0-of-4", "٣-of-٤"):
        (locks / name).touch()
    assert len(summarise(path)["slots"]) == 1
