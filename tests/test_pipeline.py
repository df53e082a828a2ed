"""Extraction from sounds to cache: nothing lost, nothing invented, and the same bytes however it is run."""

import os
from itertools import chain

import numpy as np
import pytest
import torch

from conftest import array_bytes, make_backbone, noise, write_wav
from planted import forget
from whisper_at_cli.extract import FeatureCache, extract, extract_on_devices
from whisper_at_cli.extract.audio.decode import as_float, load_clip
from whisper_at_cli.extract.cache import Status
from whisper_at_cli.extract.cache.verify import verify
from whisper_at_cli.extract.errors import CacheError, UsageError, WhisperATError
from whisper_at_cli.extract.pipeline import blocks, prepare, shard_run
from whisper_at_cli.extract.pipeline.several_devices import slots_of

SHARD_MB = 5 * 3 * 25 * 64 * 2 / 1e6  # at most five clips of the random backbone in float16


def test_features_are_those_of_each_clip_alone(noise_folder, tmp_path, random_backbone):
    report = extract(noise_folder, tmp_path / "a.zarr", model=random_backbone, clip_seconds=2.0, shard_mb=SHARD_MB)
    assert (report.clips, report.written, report.skipped, report.failed) == (12, 12, 0, 0)
    assert 0 < report.encoder_busy <= 1
    cache = FeatureCache.open(tmp_path / "a.zarr")
    assert cache.complete and cache.clips_per_shard == 4, "three shards, equally full"
    for row in range(12):
        clip, real, _ = load_clip(noise_folder / cache.paths[row], 32000)
        alone = random_backbone.encode(torch.from_numpy(as_float(clip))[None])[0].numpy()
        np.testing.assert_allclose(cache.features([row])[0], alone, rtol=2e-3, atol=2e-3)
        np.testing.assert_allclose(cache.mean(rows=[row])[0], alone.mean(axis=1), rtol=2e-3, atol=2e-3)
        assert cache.valid_frames[row] == -(-real * 25 // 32000)
        assert cache.spec.class_names[cache.labels[row].argmax()] == cache.paths[row].split("/")[0]


def test_a_stopped_run_continues_to_the_same_bytes(noise_folder, tmp_path, random_backbone, monkeypatch):
    options = dict(model=random_backbone, clip_seconds=1.0, shard_mb=SHARD_MB, batch_size=2)
    extract(noise_folder, tmp_path / "whole.zarr", **options)

    class Stopped(Exception):
        pass

    def fail_at_second(self, shard, block, count=[]):  # noqa: B006 - counts the calls
        count.append(shard)
        if len(count) == 2:
            raise Stopped
        return original(self, shard, block)

    original = shard_run.CacheWriter.write
    with monkeypatch.context() as patch:
        patch.setattr(shard_run.CacheWriter, "write", fail_at_second)
        with pytest.raises(Stopped):
            extract(noise_folder, tmp_path / "stopped.zarr", **options)
    assert (FeatureCache.open(tmp_path / "stopped.zarr").status == Status.PENDING).sum() > 0
    report = extract(noise_folder, tmp_path / "stopped.zarr", **options)
    assert report.written + report.skipped == 12 and report.written < 12
    assert array_bytes(tmp_path / "stopped.zarr") == array_bytes(tmp_path / "whole.zarr")


def test_three_slots_fill_one_cache_with_the_same_bytes(noise_folder, tmp_path, random_backbone):
    options = dict(model=random_backbone, clip_seconds=1.0, shard_mb=SHARD_MB)
    extract(noise_folder, tmp_path / "whole.zarr", **options)
    reports = [extract(noise_folder, tmp_path / "parts.zarr", shard=(i, 3), **options) for i in (3, 1, 2)]
    assert [report.clips for report in reports] == [4, 4, 4]
    assert array_bytes(tmp_path / "parts.zarr") == array_bytes(tmp_path / "whole.zarr")


def test_running_again_does_nothing(noise_folder, tmp_path, random_backbone):
    extract(noise_folder, tmp_path / "a.zarr", model=random_backbone)
    before = array_bytes(tmp_path / "a.zarr")
    report = extract(noise_folder, tmp_path / "a.zarr", model=random_backbone)
    assert (report.written, report.skipped) == (0, 12)
    assert array_bytes(tmp_path / "a.zarr") == before


def test_bad_clips_are_reported_and_the_good_ones_extracted(noise_folder, tmp_path, random_backbone):
    (noise_folder / "low" / "00.wav").write_text("not a sound")
    (noise_folder / "high" / "07.wav").write_bytes(b"")
    whole = (noise_folder / "low" / "04.wav").read_bytes()
    (noise_folder / "low" / "04.wav").write_bytes(whole[: len(whole) // 2])
    seen = []
    report = extract(
        noise_folder, tmp_path / "a.zarr", model=random_backbone, shard_mb=SHARD_MB,
        progress=lambda done, total, message="": seen.append((done, total, message)),
    )  # fmt: skip
    assert (report.clips, report.written, report.failed) == (12, 9, 3)
    assert {failure.path: failure.error.split(":")[0] for failure in report.failures} == {
        "low/00.wav": "it cannot be decoded",
        "high/07.wav": "it is empty (0 bytes)",
        "low/04.wav": "it is truncated",
    }
    assert seen[0] == (0, 12, "") and seen[-1] == (12, 12, "3 failed")
    cache = FeatureCache.open(tmp_path / "a.zarr")
    assert cache.complete and cache.done.sum() == 9
    assert cache.valid_frames[~cache.done].tolist() == [0, 0, 0]
    again = extract(noise_folder, tmp_path / "a.zarr", model=random_backbone)
    assert (again.written, again.skipped, again.failed) == (0, 9, 3)
    assert again.failures == report.failures


def test_a_clip_beside_a_bad_one_is_stored_as_if_nothing_had_failed(noise_folder, tmp_path, random_backbone):
    class SizeMatters:
        """Adds to every number what depends on how many clips are encoded together."""

        def __getattr__(self, name):
            return getattr(random_backbone, name)

        def encode(self, waveforms):
            return random_backbone.encode(waveforms) + len(waveforms) / 8

    options = dict(model=SizeMatters(), clip_seconds=1.0, batch_size=4)
    extract(noise_folder, tmp_path / "whole.zarr", **options)
    broken = sorted(noise_folder.rglob("*.wav"))[5]
    broken.write_bytes(b"RIFF and nothing else")
    assert extract(noise_folder, tmp_path / "holed.zarr", **options).failed == 1
    whole, holed = FeatureCache.open(tmp_path / "whole.zarr"), FeatureCache.open(tmp_path / "holed.zarr")
    rows = np.flatnonzero(holed.done)
    assert len(rows) == 11
    np.testing.assert_array_equal(holed.features(rows), whole.features(rows))
    np.testing.assert_array_equal(holed.mean(rows=rows), whole.mean(rows=rows))


def test_a_file_that_vanished_is_a_failed_clip(noise_folder, tmp_path, random_backbone):
    from whisper_at_cli.extract.datasets import open_dataset

    dataset = open_dataset(noise_folder)
    (noise_folder / "low" / "00.wav").unlink()
    report = extract(dataset, tmp_path / "a.zarr", model=random_backbone)
    assert report.failures[0].error == "missing: No such file or directory"


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_what_the_storage_type_cannot_hold_is_an_error_not_a_number(noise_folder, tmp_path, dtype):
    backbone = make_backbone(seed=1)
    backbone.encoder.blocks[1].contract.bias.data[3] = 1e8
    report = extract(noise_folder, tmp_path / "a.zarr", model=backbone, dtype=dtype)
    assert report.failed == 12 and report.written == 0
    assert (
        report.failures[0].error == f"layer 2 holds a value that is not finite in {dtype}; extract with --dtype float32"
    )
    assert extract(noise_folder, tmp_path / "b.zarr", model=backbone, dtype="float32").written == 12


@pytest.mark.parametrize("dtype, bound", [("float32", 1e-6), ("float16", 1e-3), ("int8", 1e-2)])
def test_storage_types_keep_their_precision(noise_folder, tmp_path, random_backbone, dtype, bound):
    extract(noise_folder, tmp_path / "exact.zarr", model=random_backbone, dtype="float32")
    extract(noise_folder, tmp_path / "a.zarr", model=random_backbone, dtype=dtype)
    exact, cache = FeatureCache.open(tmp_path / "exact.zarr"), FeatureCache.open(tmp_path / "a.zarr")
    rows = np.arange(12)
    for layer in (1, 2, 3):
        expected, found = exact.layer(layer), cache.layer(layer)
        assert np.linalg.norm(found - expected) <= bound * np.linalg.norm(expected)
        np.testing.assert_array_equal(cache.features(rows)[:, layer - 1].astype(np.float32), found)


def test_a_cache_of_another_length_or_model_is_not_continued(noise_folder, tmp_path, random_backbone):
    extract(noise_folder, tmp_path / "a.zarr", model=random_backbone, clip_seconds=1.0)
    with pytest.raises(CacheError, match="clip_seconds: 1.0, not 2.0"):
        extract(noise_folder, tmp_path / "a.zarr", model=random_backbone, clip_seconds=2.0)
    with pytest.raises(CacheError, match="backbone: random0, not random5"):
        extract(noise_folder, tmp_path / "a.zarr", model=make_backbone(seed=5), clip_seconds=1.0)


@pytest.mark.parametrize("seconds", [0, -1, 0.3, 4.75, 30.5, 1e9, float("nan")])
def test_a_length_that_does_not_divide_into_frames_is_refused(noise_folder, tmp_path, random_backbone, seconds):
    with pytest.raises(UsageError, match="does not divide into 25 frames"):
        extract(noise_folder, tmp_path / "a.zarr", model=random_backbone, clip_seconds=seconds)
    assert not (tmp_path / "a.zarr").exists()


def test_a_slow_disk_holds_extraction_back(tmp_path, random_backbone, monkeypatch):
    """No more than a few shards are ever in memory, however slow the disk."""
    for index in range(30):
        write_wav(tmp_path / "sounds" / f"{index:02d}.wav", noise(index, 0.5))
    made, counts = [], []
    original, empty, prepare = shard_run.CacheWriter.write, blocks.Block.empty, shard_run.Blocks.__init__

    def slow_write(self, shard, block):
        import time

        time.sleep(0.1)
        original(self, shard, block)

    def counted(self, count, *arguments, **options):
        counts.append(count)
        prepare(self, count, *arguments, **options)

    monkeypatch.setattr(blocks.Block, "empty", lambda *all, **options: made.append(1) or empty(*all, **options))
    monkeypatch.setattr(shard_run.Blocks, "__init__", counted)
    monkeypatch.setattr(shard_run.CacheWriter, "write", slow_write)
    report = extract(
        tmp_path / "sounds", tmp_path / "a.zarr", model=random_backbone, clip_seconds=0.5, shard_mb=0.001, batch_size=1
    )
    assert report.written == 30
    assert report.disk_wait_seconds > 0.5 and report.encoder_busy < 0.9
    most = os.cpu_count() + 1 + shard_run.BATCHES_AHEAD + shard_run.MOST_WRITERS
    assert len(made) <= counts[0] <= most, "blocks are used again, and their number is bounded"


@pytest.mark.parametrize(
    "dtype, flips", [("float16", 40), ("int8", 20), pytest.param("float16", 200, marks=pytest.mark.slow)]
)
def test_every_flipped_byte_is_found_by_name_and_mended_to_the_same_bytes(
    noise_folder, tmp_path, random_backbone, dtype, flips
):
    """Random single-byte flips, one after another, in any file that holds data."""
    path = tmp_path / "a.zarr"
    options = dict(model=random_backbone, clip_seconds=1.0, shard_mb=SHARD_MB, dtype=dtype)
    extract(noise_folder, path, **options)
    whole = array_bytes(path)
    names = sorted(name for name in whole if name.split("/")[0] in ("features", "mean", "scale") and "/c." in name)
    rng = np.random.default_rng(0)
    for _ in range(flips):
        name = names[rng.integers(len(names))]
        data = bytearray(whole[name])
        data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        (path / name).write_bytes(data)
        report = verify(path)
        shard = int(name.split(".")[1])
        assert not report.ok and {damage.shard for damage in report.damaged} == {shard}, name
        assert report.damaged[0].clips
        repaired = extract(noise_folder, path, repair=True, **options)
        assert repaired.written == len({clip for damage in report.damaged for clip in damage.clips})
        assert array_bytes(path) == whole


def test_repair_brings_back_shards_that_are_gone_and_clips_that_were_mended(noise_folder, tmp_path, random_backbone):
    options = dict(model=random_backbone, clip_seconds=1.0, shard_mb=SHARD_MB, batch_size=2)
    extract(noise_folder, tmp_path / "whole.zarr", **options)
    good = (noise_folder / "low" / "04.wav").read_bytes()
    (noise_folder / "low" / "04.wav").write_bytes(good[:1000])
    path = tmp_path / "a.zarr"
    assert extract(noise_folder, path, **options).failed == 1
    (noise_folder / "low" / "04.wav").write_bytes(good)
    assert extract(noise_folder, path, **options).failed == 1, "without --repair nothing is redone"
    (path / "features/c.0.0.0.0").unlink()
    forget(path, 2)
    report = extract(noise_folder, path, repair=True, **options)
    assert (report.failed, report.written, report.skipped) == (0, 5 + 1 + 2, 4)
    found, whole = array_bytes(path), array_bytes(tmp_path / "whole.zarr")
    different = {name for name in found if found[name] != whole.get(name)}
    # the clip that shared a batch with the failed one was then encoded alone: the same but for rounding
    assert found.keys() == whole.keys() and different <= {"features/c.1.0.0.0", "mean/c.1.0.0"}
    caches = FeatureCache.open(path), FeatureCache.open(tmp_path / "whole.zarr")
    np.testing.assert_allclose(*(cache.features(range(12)) for cache in caches), rtol=2e-3, atol=1e-4)
    assert not FeatureCache.open(path).errors.any()


def test_repair_with_a_slot_reads_and_mends_only_what_the_slot_holds(
    noise_folder, tmp_path, random_backbone, monkeypatch
):
    path = tmp_path / "a.zarr"
    options = dict(model=random_backbone, clip_seconds=1.0, shard_mb=SHARD_MB)
    extract(noise_folder, path, **options)
    whole = array_bytes(path)
    for shard in (0, 1):
        file = path / f"features/c.{shard}.0.0.0"
        file.write_bytes(file.read_bytes()[:100])
    read = []
    monkeypatch.setattr(prepare, "verify", lambda *args, **how: read.append(verify(*args, **how)) or read[-1])
    report = extract(noise_folder, path, repair=True, shard=(2, 3), **options)
    assert report.written == 4 and [damage.shard for damage in read[0].damaged] == [1] and read[0].clips_read == 4
    assert {damage.shard for damage in verify(path).damaged} == {0}
    extract(noise_folder, path, repair=True, shard=(1, 3), **options)
    assert array_bytes(path) == whole


class SmallDevice:
    """A backbone on a device that holds only so many clips at a time."""

    def __init__(self, backbone, room: int):
        self.backbone, self.room = backbone, room
        self.weights_sha256 = f"room for {room}"  # what is learnt of its memory is not learnt of the other's

    def __getattr__(self, name):
        return getattr(self.backbone, name)

    def encode(self, waveforms):
        if len(waveforms) > self.room:
            raise torch.OutOfMemoryError("out of memory")
        return self.backbone.encode(waveforms)


def test_a_batch_that_does_not_fit_is_split_and_the_user_told_once(noise_folder, tmp_path, random_backbone):
    extract(noise_folder, tmp_path / "a.zarr", model=random_backbone, batch_size=4)
    report = extract(noise_folder, tmp_path / "b.zarr", model=SmallDevice(random_backbone, 2), batch_size=4)
    assert [note[:38] for note in report.notes[-1:]] == ["batches of 4 clips did not fit in the "]
    found, expected = (FeatureCache.open(tmp_path / name).features(range(12)) for name in ("b.zarr", "a.zarr"))
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=1e-4)
    with pytest.raises(WhisperATError, match="one clip of 10 s does not fit in the memory of cpu"):
        extract(noise_folder, tmp_path / "c.zarr", model=SmallDevice(random_backbone, 0), batch_size=4)


def test_a_batch_size_found_on_another_kind_of_device_does_not_bind():
    made = {"device": "cpu", "batch_size": 2}
    size, note = prepare.batch_size_of(made, torch.device("cuda", 0), 64)
    assert size == 64
    assert note == (
        "the cache was begun on cpu with --batch-size 2; this run, on cuda:0, uses 64. Features from the two devices "
        "differ in their last bits"
    )
    for device, of_before in (("cpu", made), ("cuda:1", {"device": "cuda:0", "batch_size": 32})):
        assert prepare.batch_size_of(of_before, torch.device(device), 64) == (of_before["batch_size"], None)
    assert prepare.batch_size_of({}, torch.device("cpu"), 2) == (2, None), "a cache that says nothing of it"


def test_auto_continues_a_cache_in_the_precision_it_was_made_with(noise_folder, tmp_path, tiny_en):
    path = tmp_path / "a.zarr"
    assert prepare.precision_of(path, "auto") == "auto", "a new cache"
    report = extract(noise_folder, path, model=tiny_en, device="cpu", precision="float16", shard=(1, 6), shard_mb=0.1)
    assert report.written and prepare.precision_of(path, "auto") == "float16"
    assert prepare.precision_of(path, "bfloat16") == "bfloat16", "what is asked for is compared with the cache"
    extract(noise_folder, path, model=tiny_en, device="cpu", shard_mb=0.1)
    assert FeatureCache.open(path).complete
    with pytest.raises(CacheError, match="precision: float16, not float32"):
        extract(noise_folder, path, model=tiny_en, device="cpu", precision="float32")
    extract(noise_folder, tmp_path / "b.zarr", model=tiny_en, device="cpu")
    assert FeatureCache.open(tmp_path / "b.zarr").spec.precision == "float32", "auto on a CPU"


def test_two_devices_fill_one_cache_with_the_same_bytes(noise_folder, tmp_path, tiny_en):
    options = dict(model=tiny_en, clip_seconds=0.5, shard_mb=0.2, batch_size=2)
    extract(noise_folder, tmp_path / "one.zarr", device="cpu", **options)
    seen = []
    report = extract_on_devices(
        noise_folder, tmp_path / "two.zarr", devices=["cpu", "cpu"],
        progress=lambda done, total, message="": seen.append((done, total)), **options,
    )  # fmt: skip
    assert (report.clips, report.written, report.failed) == (12, 12, 0) and seen[-1] == (12, 12)
    assert array_bytes(tmp_path / "two.zarr") == array_bytes(tmp_path / "one.zarr")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="holds no audio files"):
        extract_on_devices(tmp_path / "empty", tmp_path / "three.zarr", devices=["cpu", "cpu"], **options)


def test_slots_of_several_devices_cover_each_shard_once():
    for shard in ((1, 1), (2, 3)):
        slots = slots_of(shard, 4)
        taken = [[number for number in range(60) if number % of == index - 1] for index, of in slots]
        assert sorted(chain.from_iterable(taken)) == [
            number for number in range(60) if number % shard[1] == shard[0] - 1
        ]
