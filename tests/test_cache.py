"""The cache: what is written comes back, through our reader and through zarr, and damage is found."""

import json
import pickle
import threading

import numpy as np
import pytest
import zarr

from planted import forget, planted_cache
from whisper_at_cli.extract.cache import CacheSpec, CacheWriter, ClipTable, FeatureCache, Status, reader
from whisper_at_cli.extract.cache.shards import ShardFile, shard_buffers
from whisper_at_cli.extract.cache.store import LocalStore
from whisper_at_cli.extract.cache.verify import Damage, VerifyReport, verify
from whisper_at_cli.extract.errors import CacheError, UsageError

N, L, T, D = 11, 3, 25, 8
FEATURES = np.random.default_rng(0).normal(size=(N, L, T, D)).astype(np.float32) * np.logspace(-3, 3, D)
LABELS = np.arange(N) % 2
SHARD_MB = {"float32": 4 * L * T * D * 4 / 1e6, "float16": 4 * L * T * D * 2 / 1e6, "int8": 4 * L * T * D / 1e6}


def small_cache(path, dtype="float32", **options):
    """Eleven clips in shards of four."""
    return planted_cache(path, FEATURES, LABELS, dtype=dtype, shard_mb=SHARD_MB[dtype], **options)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_is_written_comes_back_through_us_and_through_zarr(tmp_path, dtype):
    cache = small_cache(tmp_path / "a.zarr", dtype, failed=(2, 10))
    stored = FEATURES.astype(dtype)
    rows = np.flatnonzero(cache.done)
    assert cache.clips_per_shard == 4 and rows.tolist() == [0, 1, 3, 4, 5, 6, 7, 8, 9]
    np.testing.assert_array_equal(cache.features(rows[::-1]), stored[rows[::-1]])
    assert cache.features(rows).dtype == dtype
    np.testing.assert_array_equal(cache.layer(2), stored[rows, 1].astype(np.float32))
    np.testing.assert_array_equal(cache.mean(3, rows=[4, 9, 4]), cache.mean(rows=[4, 9, 4])[:, 2])
    np.testing.assert_allclose(cache.mean(), FEATURES[rows].mean(axis=2), rtol=1e-3, atol=1e-3)

    group = zarr.open_group(tmp_path / "a.zarr", mode="r")
    features = group["features"]
    assert features.metadata.dimension_names == ("clip", "layer", "frame", "channel")
    np.testing.assert_array_equal(features[:][rows], stored[rows])
    assert np.isnan(features[2]).all(), "a failed clip must not read as numbers"
    np.testing.assert_array_equal(group["mean"][:][rows].astype(np.float32), cache.mean())
    assert group["status"][:].tolist() == [1, 1, 2, 1, 1, 1, 1, 1, 1, 1, 2]
    assert group["error"][2] == "planted failure" and group["id"][10] == "clip10"


def test_int8_is_read_by_zarr_and_takes_at_most_027_of_float32(tmp_path):
    """Features and scale of realistic shape: 120 clips of 2 layers and 384 channels."""
    features = np.random.default_rng(0).normal(size=(120, 2, 25, 384)) * np.random.default_rng(1).gamma(1, size=384)
    exact = planted_cache(tmp_path / "f.zarr", features, np.arange(120) % 2)
    scale = (np.abs(features).max(axis=2) / 127).astype(np.float16)
    stored = np.round(features / scale[:, :, None].astype(np.float32)).clip(-127, 127).astype(np.int8)
    cache = planted_cache(tmp_path / "i.zarr", stored, np.arange(120) % 2, dtype="int8", scale=scale)
    np.testing.assert_allclose(cache.features(range(120)), features, atol=np.abs(features).max() / 127)
    group = zarr.open_group(tmp_path / "i.zarr", mode="r")
    np.testing.assert_array_equal(group["scale"][:], scale)
    np.testing.assert_array_equal(cache.scale(), scale.astype(np.float32))
    small, large = (
        sum(size for name, size in each.store.sizes().items() if name.startswith(("features/c", "scale/c")))
        for each in (cache, exact)
    )
    assert small <= 0.27 * large


def test_our_shard_bytes_are_those_of_zarr(tmp_path):
    """The same values written by zarr-python give the same chunks and checksums."""
    cache = small_cache(tmp_path / "a.zarr")
    group = zarr.open_group(tmp_path / "a.zarr", mode="r")
    theirs = zarr.create_array(
        tmp_path / "b.zarr", shape=(N, L, T, D), chunks=(1, 1, T, D), shards=(4, L, T, D), dtype="float32",
        compressors=zarr.codecs.Crc32cCodec(), fill_value=np.nan,
    )  # fmt: skip
    theirs[:] = group["features"][:]
    for shard in range(3):
        ours = (cache.path / f"features/c.{shard}.0.0.0").read_bytes()
        other = (tmp_path / "b.zarr" / "c" / str(shard) / "0/0/0").read_bytes()
        assert len(ours) == len(other)
        if shard < 2:  # in the last shard, zarr-python orders the chunks of absent clips as it likes
            assert sorted(_chunks(ours, 4 * L)) == sorted(_chunks(other, 4 * L))


def _chunks(data: bytes, count: int) -> list[bytes]:
    index = np.frombuffer(data[-16 * count - 4 : -4], dtype="<u8").reshape(count, 2)
    return [data[start : start + length] for start, length in index.tolist()]


def test_an_absent_chunk_takes_no_space():
    chunks = np.ones((4, 10), dtype=np.float32)
    buffers = shard_buffers(chunks, np.array([True, False, True, False]))
    assert sum(memoryview(buffer).nbytes for buffer in buffers) == 2 * 44 + 4 * 16 + 4


def test_rows_that_are_not_real_are_refused(tmp_path):
    cache = small_cache(tmp_path / "a.zarr", failed=(2,))
    with pytest.raises(CacheError, match="clip 'clip2' of .*failed"):
        cache.features([1, 2])
    with pytest.raises(UsageError, match="rows 0 to 10"):
        cache.mean(rows=[11])
    with pytest.raises(UsageError, match=r"layers 1 to 3; layer 4 was asked for"):
        cache.layer(4)
    with pytest.raises(UsageError, match="layer 0"):
        cache.mean(0)


def test_a_reader_pickles_and_serves_threads(tmp_path):
    cache = pickle.loads(pickle.dumps(small_cache(tmp_path / "a.zarr")))
    wrong = []

    def read(seed):
        rows = np.random.default_rng(seed).integers(0, N, 200)
        if not (cache.features(rows) == FEATURES.astype(np.float32)[rows]).all():
            wrong.append(seed)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_one_layer_comes_in_the_type_asked_for_and_in_the_order_of_the_rows(tmp_path):
    for dtype in ("float16", "float32", "int8"):
        scale = np.random.default_rng(3).uniform(0.5, 2, (N, L, D)).astype(np.float16) if dtype == "int8" else None
        values = np.round(FEATURES).clip(-99, 99) if dtype == "int8" else FEATURES
        cache = planted_cache(
            tmp_path / f"{dtype}.zarr", values, LABELS, dtype=dtype, shard_mb=SHARD_MB[dtype], scale=scale
        )
        expected = values.astype(dtype).astype(np.float32) * (
            1 if scale is None else scale[:, :, None].astype(np.float32)
        )
        for rows in (None, [10, 0, 7, 4, 4, 5], [8], [], range(11), 3):
            at = range(N) if rows is None else np.atleast_1d(np.asarray(rows, dtype=int))
            for layer in (1, 2, 3):
                found = cache.layer(layer, rows)
                assert found.dtype == np.float32 and found.shape == (len(at), T, D)
                np.testing.assert_array_equal(found, expected[at, layer - 1])
                assert cache.layer(layer, rows, dtype="float16").dtype == np.float16
            if rows is not None:
                np.testing.assert_array_equal(cache.features(rows).astype(np.float32), expected[at])
                np.testing.assert_array_equal(cache.stored_features(rows), values.astype(dtype)[at])
            mean = cache.mean(rows=rows)
            assert mean.shape == (len(at), L, D) and mean.dtype == np.float32
            np.testing.assert_array_equal(cache.mean(2, rows), mean[:, 1])
            if scale is not None:
                np.testing.assert_array_equal(cache.scale(rows), scale.astype(np.float32)[at])


def test_one_layer_is_one_read_per_shard_of_that_layers_bytes_alone(tmp_path, monkeypatch):
    cache = small_cache(tmp_path / "a.zarr")
    read, whole = [], ShardFile.read
    monkeypatch.setattr(
        ShardFile, "read", lambda self, chunks, out: read.append((self.path, list(chunks))) or whole(self, chunks, out)
    )
    cache.layer(2, [1, 3, 4, 6, 2])
    first, second = (f"{cache.path}/features/c.{shard}.0.0.0" for shard in (0, 1))
    assert read == [(first, [1 * L + 1, 3 * L + 1]), (second, [0 * L + 1, 2 * L + 1]), (first, [2 * L + 1])]
    read.clear()
    cache.mean(3, [0, 9, 3, 8])
    assert read == [(f"{cache.path}/mean/c.{shard}.0.0", [2]) for shard in (0, 2)]


def test_few_shard_files_are_open_at_once_and_the_least_used_is_closed(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "OPEN_SHARDS", 2)
    opened, whole = [], LocalStore.open
    monkeypatch.setattr(LocalStore, "open", lambda self, name: opened.append(name.split(".")[1]) or whole(self, name))
    cache = small_cache(tmp_path / "a.zarr")
    opened.clear()
    for row in (0, 5, 1, 9, 2, 6):
        cache.features([row])
    assert opened == ["0", "1", "2", "1"], "shard 0 was in use all the time, 1 the longest unused when 2 came"
    assert reader.OPEN_SHARDS == 2 and {name: list(files) for name, files in cache._used.items()} == {
        "features": [0, 1]
    }
    assert [file._file is None for file in cache._files["features"].values()] == [False, False, True]


def test_what_a_reader_says_of_its_clips(tmp_path):
    cache = small_cache(tmp_path / "a.zarr", failed=(2,), fold=np.arange(N) % 3, split=["train", ""] * 5 + ["eval"])
    assert len(cache) == N and cache.complete and cache.done.sum() == N - 1
    assert {column.dtype for column in (cache.ids, cache.paths, cache.split, cache.errors)} == {np.dtype(object)}
    assert cache.ids.tolist() == [f"clip{i}" for i in range(N)]
    assert cache.paths.tolist() == [f"audio/clip{i}.wav" for i in range(N)]
    assert cache.fold.tolist() == [i % 3 for i in range(N)] and cache.split.tolist() == ["train", ""] * 5 + ["eval"]
    assert cache.errors.tolist() == ["", "", "planted failure"] + [""] * 8
    assert cache.labels.tolist() == np.eye(2)[LABELS].tolist() and cache.valid_frames.tolist() == [T] * N
    forget(cache.path, 0)
    pending = FeatureCache.open(cache.path)
    assert pending.status.tolist() == [0] * 4 + [1] * 7 and not pending.complete
    assert pending.valid_frames.tolist() == [0] * 4 + [T] * 7 and set(pending.errors) == {""}
    with pytest.raises(CacheError, match="clip 'clip3' of .* has no features: it is pending"):
        pending.mean(rows=[4, 3])
    one_of_each = small_cache(tmp_path / "c.zarr", failed=(2,))
    forget(one_of_each.path, 2)
    with pytest.raises(CacheError, match="clip 'clip2' of .* has no features: it is failed"):
        FeatureCache.open(one_of_each.path).features([1, 2, 9])
    with pytest.raises(UsageError, match="rows 0 to 10; row -1 to 4 was asked for"):
        pending.features([4, -1])
    names = np.array(["a"])
    bare = ClipTable(names, names, np.zeros(1, np.int16), np.array([""]), np.zeros((1, 0)))
    with CacheWriter.create(tmp_path / "b.zarr", spec_and_clips(class_names=())[0], bare) as writer:
        assert writer.cache.labels.shape == (1, 0) and writer.cache.labels.dtype == np.uint8


def flip(path, at):
    """Change one bit of one byte of a file."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_every_kind_of_damage_is_found_and_named(tmp_path):
    def damaged(name, change):
        cache = small_cache(tmp_path / f"{name}.zarr")
        change(cache.path)
        return verify(cache.path)

    shard = "features/c.1.0.0.0"
    assert verify(small_cache(tmp_path / "whole.zarr").path).ok
    one = damaged("flip", lambda path: flip(path / shard, 3 * (T * D * 4 + 4) + 5))
    assert not one.ok and [damage.clips for damage in one.damaged] == [("clip5",)]
    assert "CRC-32C" in one.damaged[0].problem
    index = damaged("index", lambda path: flip(path / shard, -20))
    assert [damage.clips for damage in index.damaged] == [("clip4", "clip5", "clip6", "clip7")]
    gone = damaged("gone", lambda path: (path / shard).unlink())
    assert "missing" in gone.damaged[0].problem and gone.damaged[0].shard == 1
    short = damaged("short", lambda path: (path / shard).write_bytes((path / shard).read_bytes()[:500]))
    assert "truncated" in short.damaged[0].problem
    empty = damaged("empty", lambda path: (path / shard).write_bytes(b""))
    assert "empty" in empty.damaged[0].problem
    mean = damaged("mean", lambda path: flip(path / "mean/c.0.0.0", 9))
    assert mean.damaged[0].shard == 0


def test_damaged_status_and_metadata_are_found(tmp_path):
    cache = small_cache(tmp_path / "a.zarr")
    for name in ("status", "valid_frames"):
        flip(cache.path / name / "c.0", 2)
        report = verify(cache.path)
        assert [(damage.shard, damage.clips) for damage in report.damaged] == [(-1, ())]
        assert f"{name}/c.0 is damaged" in report.damaged[0].problem
        assert FeatureCache.open(cache.path).done.all(), "the log is whole"
        flip(cache.path / name / "c.0", 2)
    flip(cache.path / "status/log/merged", 30)
    assert "status/log/merged is damaged at byte 0" in verify(cache.path).damaged[0].problem
    assert FeatureCache.open(cache.path).done.all(), "the arrays are whole"
    flip(cache.path / "status/c.0", 2)
    assert FeatureCache.open(cache.path).done.tolist() == [False] * 4 + [True] * 7
    flip(cache.path / "status/c.0", 2)
    flip(cache.path / "status/log/merged", 30)
    (cache.path / "mean" / "zarr.json").write_text("{")
    assert verify(cache.path).damaged[0].problem == "mean/zarr.json is not what status/metadata.zst says"
    (cache.path / "features" / "zarr.json").write_text("{")
    with pytest.raises(CacheError, match=r"features is missing or damaged \(.*\); extract with --repair restores it"):
        verify(cache.path)


def test_values_that_are_not_finite_are_damage_although_their_checksums_are_right(tmp_path):
    cache = small_cache(tmp_path / "a.zarr")
    group = zarr.open_group(cache.path, mode="r+")
    group["features"][6, 1, 3, 2] = np.inf
    assert verify(cache.path).damaged == (Damage(1, ("clip6",), "features hold a value that is not finite"),)
    group["mean"][9, 2, 1] = np.nan
    found = verify(cache.path)
    assert not found.ok and found.clips_read == N
    assert found.damaged[1] == Damage(2, ("clip8", "clip9", "clip10"), "mean holds a value that is not finite")


def test_a_damage_that_hits_all_clips_of_a_shard_is_named_once(tmp_path):
    cache = small_cache(tmp_path / "a.zarr")
    group = zarr.open_group(cache.path, mode="r+")
    group["features"][4:8, 0, 0, 0] = np.nan
    whole = ("clip4", "clip5", "clip6", "clip7")
    assert verify(cache.path).damaged == (Damage(1, whole, "features hold a value that is not finite"),)
    some = np.isin(np.arange(N), [0, 5, 7])
    report = verify(cache.path, rows=some)
    assert report.damaged == (Damage(1, ("clip5", "clip7"), "features hold a value that is not finite"),)
    assert report.clips_read == 3
    group["features"][7, 0, 0, 0] = 0
    assert [damage.clips for damage in verify(cache.path).damaged] == [("clip4",), ("clip5",), ("clip6",)]
    assert verify(cache.path, rows=np.isin(np.arange(N), [5])).damaged[0].clips == ("clip5",)
    flip(cache.path / "features/c.0.0.0.0", 3)
    flip(cache.path / "features/c.0.0.0.0", L * (T * D * 4 + 4) + 3)
    of_first = [damage for damage in verify(cache.path).damaged if damage.shard == 0]
    assert [damage.clips for damage in of_first] == [("clip0",), ("clip1",)], "two chunks are two damages"


def test_verify_says_how_far_it_is_and_leaves_out_what_is_not_done(tmp_path):
    cache, said = small_cache(tmp_path / "a.zarr", failed=(3, 8)), []
    assert verify(cache.path, progress=lambda *words: said.append(words)) == VerifyReport(True, 9, (), 9)
    assert said == [(3, 9, ""), (7, 9, ""), (9, 9, "")]
    flip(cache.path / "features/c.1.0.0.0", 3)
    said.clear()
    verify(cache.path, progress=lambda *words: said.append(words))
    assert said == [(3, 9, ""), (7, 9, "1 damaged"), (9, 9, "1 damaged")]
    said.clear()
    assert verify(cache.path, rows=np.arange(N) < 3, progress=lambda *words: said.append(words)).clips_read == 3
    assert said == [(3, 3, "")]


def test_what_is_no_cache_is_refused_in_one_line(tmp_path):
    for name, make in {
        "absent": lambda path: None,
        "file": lambda path: path.touch(),
        "empty": lambda path: path.mkdir(),
        "other": lambda path: zarr.create_group(path, zarr_format=3),
    }.items():
        make(tmp_path / name)
        with pytest.raises(UsageError, match=name):
            FeatureCache.open(tmp_path / name)
    cache = small_cache(tmp_path / "a.zarr")
    metadata = cache.path / "zarr.json"
    whole = json.loads(metadata.read_text())
    whole["attributes"]["format_version"] = 99
    metadata.write_text(json.dumps(whole))
    with pytest.raises(CacheError, match="format version 99"):
        FeatureCache.open(cache.path)
    metadata.write_text(metadata.read_text()[:40])
    with pytest.raises(CacheError, match="damaged"):
        FeatureCache.open(cache.path)
    (cache.path / "zarr.json").write_text(
        json.dumps({**whole, "attributes": {"format": "whisper-at-cli feature cache"}})
    )
    with pytest.raises(CacheError):
        FeatureCache.open(cache.path)


def spec_and_clips(**changes):
    spec = dict(backbone="b", weights_sha256="0", layers=2, dim=4, clip_seconds=5.0, class_names=("x",)) | changes
    names = np.array(["a", "b", "c"])
    clips = ClipTable(names, names, np.zeros(3, np.int16), np.array([""] * 3), np.ones((3, 1), np.uint8))
    return CacheSpec(**spec), clips


@pytest.mark.parametrize(
    "change, named",
    [
        ({"backbone": "other"}, "backbone: b, not other"),
        ({"weights_sha256": "1"}, "weights_sha256: 0, not 1"),
        ({"clip_seconds": 10.0}, "clip_seconds: 5.0, not 10.0"),
        ({"dtype": "float32"}, "dtype: float16, not float32"),
        ({"precision": "bfloat16"}, "precision: float32, not bfloat16"),
    ],
)
def test_a_changed_setting_is_refused_by_name(tmp_path, change, named):
    spec, clips = spec_and_clips()
    CacheWriter.create(tmp_path / "a.zarr", spec, clips).close()
    CacheWriter.create(tmp_path / "a.zarr", spec, clips).close()
    other, _ = spec_and_clips(**change)
    with pytest.raises(CacheError, match=named):
        CacheWriter.create(tmp_path / "a.zarr", other, clips)


def test_changed_clips_are_refused(tmp_path):
    spec, clips = spec_and_clips()
    CacheWriter.create(tmp_path / "a.zarr", spec, clips).close()
    names = np.array(["a", "b", "d"])
    other = ClipTable(names, names, clips.fold, clips.split, clips.labels)
    with pytest.raises(CacheError, match="differ from clip 3 on"):
        CacheWriter.create(tmp_path / "a.zarr", spec, other)
    with pytest.raises(UsageError, match="'a'; ids must be unique"):
        ClipTable(np.array(["a", "a", "b"]), names, clips.fold, clips.split, clips.labels)


def test_writers_are_kept_apart(tmp_path):
    spec, clips = spec_and_clips()
    path = tmp_path / "a.zarr"
    with CacheWriter.create(path, spec, clips, slot=(1, 2)):
        with CacheWriter.create(path, spec, clips, slot=(2, 2)):
            pass
        for slot in ((1, 1), (1, 2), (2, 3)):
            with pytest.raises(CacheError, match="another process is writing"):
                CacheWriter.create(path, spec, clips, slot=slot)
    CacheWriter.create(path, spec, clips, slot=(1, 1)).close()
    with pytest.raises(UsageError, match="out of range"):
        CacheWriter.create(path, spec, clips, slot=(3, 2))


def test_a_full_disk_is_a_clear_error_and_damages_nothing(tmp_path, monkeypatch):
    import os

    from whisper_at_cli.extract.cache import ShardBlock, store

    spec, clips = spec_and_clips()
    with CacheWriter.create(tmp_path / "a.zarr", spec, clips) as writer:
        block = ShardBlock.empty(3, spec)
        block.status[:] = Status.DONE

        def full(file):
            raise OSError(28, os.strerror(28))

        with monkeypatch.context() as patch:
            patch.setattr(store.os, "fsync", full)
            with pytest.raises(CacheError, match="No space left on device.*run the same command again"):
                writer.write(0, block)
        assert not list((tmp_path / "a.zarr").rglob("*.partial"))
        assert writer.pending_shards() == [0]
        writer.write(0, block)
    assert FeatureCache.open(tmp_path / "a.zarr").complete


def test_a_spec_that_cannot_be_is_refused():
    with pytest.raises(UsageError, match="choose from float16, float32, int8"):
        spec_and_clips(dtype="float64")
    with pytest.raises(ValueError, match="at least one layer"):
        spec_and_clips(layers=0)


def test_shards_hold_about_the_bytes_asked_for():
    large, _ = spec_and_clips(layers=32, dim=1280)
    assert large.clip_bytes == 32 * 25 * 1280 * 2 and large.clips_per_shard(128, 64 * 9) == 64
    assert large.clips_per_shard(0.001, 9) == 1 and large.clips_per_shard(128, 0) == 64
    assert large.clips_per_shard(128, 257) == 52 and large.clips_per_shard(128, 2_000_000) == 64
    assert large.clips_per_shard(128, 10) == 10 and large.clips_per_shard(128, 63) == 64
    assert large.clips_per_shard(31, 150) == 15 and large.clips_per_shard(31, 154) == 14, "equally full"
    tiny, _ = spec_and_clips(layers=4, dim=384)
    assert tiny.clips_per_shard(128, 10**6) == 256


def test_int8_moves_no_probe_on_real_sounds(esc10_cache, tmp_path):
    """ESC-10 through int8 and back: a percent of error in each layer, and accuracies within 0.005."""
    import torch

    from whisper_at_cli.extract.cache.storage import to_storage
    from whisper_at_cli.probe import probe_layers

    rows = np.arange(len(esc10_cache))
    exact = esc10_cache.features(rows).astype(np.float32)
    stored = to_storage(torch.from_numpy(exact), "int8")
    decoded = (stored.features.float() * stored.scale.float().unsqueeze(2)).numpy()
    for layer in range(4):
        error = np.linalg.norm(decoded[:, layer] - exact[:, layer]) / np.linalg.norm(exact[:, layer])
        assert error <= 0.01
    quantised = planted_cache(tmp_path / "a.zarr", decoded, esc10_cache.labels, fold=esc10_cache.fold)
    before, after = probe_layers(esc10_cache), probe_layers(quantised)
    for one, other in zip(before.layers, after.layers, strict=True):
        assert abs(one.accuracy - other.accuracy) <= 0.005


@pytest.mark.parametrize("largest", [1e-5, 1e-3, 5e-3, 7e-3])
def test_int8_holds_channels_of_small_numbers_too(largest):
    """A scale below float16's smallest normal number is divided by as it is, not as that number."""
    import torch

    from whisper_at_cli.extract.cache.storage import to_storage

    exact = torch.linspace(-largest, largest, 25).reshape(1, 1, 25, 1)
    stored = to_storage(exact, "int8")
    decoded = stored.features.float() * stored.scale.float().unsqueeze(2)
    assert (decoded - exact).abs().max() <= 0.5 * largest / 127 + 127 * 2**-25


@pytest.mark.parametrize("name", ["id", "path", "split", "error", "fold", "labels"])
def test_what_the_dataset_says_of_a_clip_carries_a_checksum_too(tmp_path, name):
    cache = small_cache(tmp_path / "a.zarr", failed=(2,), split=["train"] * N, fold=np.arange(N) + 1)
    chunk = next((cache.path / name).glob("c.0*"))
    for at in (0, chunk.stat().st_size // 2, chunk.stat().st_size - 1):
        flip(chunk, at)
        report = verify(cache.path)
        assert [damage.shard for damage in report.damaged] == [-1] and name in report.damaged[0].problem
        flip(chunk, at)
    assert verify(cache.path).ok


def test_a_damaged_index_of_a_shard_that_holds_no_features_is_found(tmp_path):
    """Zarr could read nothing of the array any more."""
    cache = small_cache(tmp_path / "a.zarr", failed=(4, 5, 6, 7))
    assert verify(cache.path).ok
    flip(cache.path / "features/c.1.0.0.0", 3)
    assert [damage.clips for damage in verify(cache.path).damaged] == [("clip4", "clip5", "clip6", "clip7")]


def test_a_cache_of_before_whose_text_and_labels_have_no_checksum_is_read(tmp_path):
    """Format version 1 as it was written at first."""
    cache = small_cache(tmp_path / "a.zarr", failed=(2,), split=["train"] * N, version=1)
    ids, labels, errors = cache.ids, cache.labels, cache.errors
    for name in ("id", "path", "split", "error", "labels"):
        metadata = json.loads((cache.path / name / "zarr.json").read_text())
        assert metadata["codecs"].pop()["name"] == "crc32c"
        (cache.path / name / "zarr.json").write_text(json.dumps(metadata))
        for chunk in (cache.path / name / "c").rglob("*"):
            if chunk.is_file():
                chunk.write_bytes(chunk.read_bytes()[:-4])
    cache = FeatureCache.open(cache.path)
    assert (cache.ids == ids).all() and (cache.labels == labels).all() and (cache.errors == errors).all()
    assert zarr.open_group(cache.path, mode="r")["id"][:].tolist() == ids.tolist()
    assert verify(cache.path).ok
