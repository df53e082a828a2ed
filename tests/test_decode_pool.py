"""Decoding processes: what one of them does to itself costs one clip, and none outlives its parent."""

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import planted_sources
from conftest import array_bytes, noise, write_wav
from loaded_modules import loaded_modules
from planted_sources import Bug, Crash, Hang, HangOnce, Noise, Noted, PlantedDataset, SlowNoise, planted
from whisper_at_cli.cli import cli as main
from whisper_at_cli.extract import FeatureCache, extract
from whisper_at_cli.extract.cache import CacheSpec, CacheWriter, ClipTable
from whisper_at_cli.extract.cache.summary import summarise
from whisper_at_cli.extract.datasets import Clip, open_dataset
from whisper_at_cli.extract.errors import UsageError, WhisperATError
from whisper_at_cli.extract.pipeline import decode_pool, ray_worker, shard_run
from whisper_at_cli.extract.pipeline.audio_batches import AudioBatches, Batch
from whisper_at_cli.extract.pipeline.decode_pool import DecodePool
from whisper_at_cli.extract.pipeline.decode_worker import DONE, FAILED, Heard
from whisper_at_cli.extract.pipeline.report import ClipNote

SAMPLES = 800
OPTIONS = dict(clip_seconds=0.5, batch_size=2, shard_mb=5 * 3 * 25 * 64 * 2 / 1e6)


class Sources:
    def __init__(self, sources):
        self.sources = sources

    def source(self, row):
        return self.sources[row]


def decoded(pool, sources):
    """Waveforms and outcomes of one batch."""
    feed = AudioBatches(pool, Sources(sources), samples=SAMPLES, batch_size=len(sources), count=2)
    feed.start(Batch(0, range(len(sources))), range(len(sources)))
    while not (batch := feed.take()):
        feed.wait()
    return batch.waveforms.copy(), batch.outcomes


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pool") / "sounds"
    for index in range(40):
        write_wav(folder / "ab"[index % 2] / f"{index:02d}.wav", noise(index, 0.5))
    return folder


@pytest.fixture(scope="module")
def whole(sounds, random_backbone):
    """The bytes of a run that nothing disturbs."""
    path = sounds.parent / "whole.zarr"
    assert extract(sounds, path, model=random_backbone, workers=2, **OPTIONS).written == 40
    return array_bytes(path)


def test_batches_hold_what_their_sources_give():
    with DecodePool(2) as pool:
        waveforms, outcomes = decoded(pool, [Noise(number) for number in range(20)])
    for number, waveform in enumerate(waveforms):
        np.testing.assert_array_equal(waveform, Noise(number).read(SAMPLES).samples)
    assert outcomes == [(DONE, Heard(SAMPLES, ""))] * 20


def test_requests_are_answered_in_order_by_several_processes():
    with DecodePool(3) as pool:
        pids = [value for _, value in pool.map(planted_sources.process_of, range(60))]
        assert set(pids) <= set(pool.pids()) and os.getpid() not in pids
        assert pool.map(planted_sources.process_of, []) == []


@pytest.mark.parametrize(
    "source, reason",
    [
        (Crash(), r"crashed \(SIGSEGV\) whenever it was read"),
        (Crash(signal.SIGABRT), r"crashed \(SIGABRT\)"),
        (Crash(signal.SIGKILL), "was killed .*memory is short"),
    ],
)
def test_a_crash_costs_one_clip(source, reason):
    sources = [Noise(number) for number in range(16)]
    sources[5] = source
    with DecodePool(2) as pool:
        waveforms, outcomes = decoded(pool, sources)
    kinds = [kind for kind, _ in outcomes]
    assert kinds == [DONE] * 5 + [FAILED] + [DONE] * 10
    assert re.search(reason, outcomes[5][1]), outcomes[5][1]
    assert not waveforms[5].any(), "silence in its place"
    for number in (4, 6, 15):
        np.testing.assert_array_equal(waveforms[number], Noise(number).read(SAMPLES).samples)


def test_a_hang_costs_one_clip(monkeypatch, tmp_path):
    monkeypatch.setattr("whisper_at_cli.extract.pipeline.audio_batches.STILL_SECONDS", 1.0)
    sources = [Noise(number) for number in range(8)]
    sources[2], sources[6] = Hang(), HangOnce(str(tmp_path / "hung"))
    with DecodePool(2) as pool:
        waveforms, outcomes = decoded(pool, sources)
        assert len(pool.pids()) == 1, "eight clips are worth one process, and it was replaced"
    assert [kind for kind, _ in outcomes] == [DONE] * 2 + [FAILED] + [DONE] * 5
    assert outcomes[2][1] == "it cannot be decoded: decoding did not end within 1 s"
    np.testing.assert_array_equal(waveforms[7], Noise(7).read(SAMPLES).samples)


def test_the_time_allowed_grows_with_how_deep_in_its_file_a_clip_lies():
    sources = [planted_sources.FileClip("a.opus", 3600.0, 3610.0)]
    with DecodePool(1) as pool:
        feed = AudioBatches(pool, Sources(sources), samples=SAMPLES, batch_size=1, count=1)
        feed.start(Batch(0, range(1)), range(1))
        (job,) = feed._at_work
    assert job.seconds == decode_pool.STILL_SECONDS + 361.0


def test_an_error_that_is_no_clips_fault_reaches_the_caller():
    with DecodePool(1) as pool, pytest.raises(ZeroDivisionError, match="division of nothing"):
        decoded(pool, [Noise(0), Bug()])


def test_a_source_that_cannot_be_imported_is_said():
    class Local:
        def read(self, samples):
            raise AssertionError

    Local.__qualname__, Local.__module__ = "Local", "planted_sources"
    planted_sources.Local = Local  # here, and in no other process
    try:
        with DecodePool(1) as pool, pytest.raises(UsageError, match=r"cannot be loaded in a decoding process .*Local"):
            decoded(pool, [Local()])
    finally:
        del planted_sources.Local


def test_processes_that_cannot_start_end_the_run(monkeypatch):
    monkeypatch.setattr(decode_pool.sys, "executable", "/bin/false")
    with DecodePool(2) as pool, pytest.raises(WhisperATError, match=r"end as they start \(.*status 1\)"):
        decoded(pool, [Noise(0)])
    monkeypatch.setattr(decode_pool.sys, "executable", "/no/such/python")
    with DecodePool(2) as pool, pytest.raises(WhisperATError, match="cannot start a decoding process"):
        decoded(pool, [Noise(0)])


def test_clips_that_crash_or_hang_fail_alone_in_a_cache(sounds, whole, tmp_path, random_backbone, monkeypatch):
    monkeypatch.setattr("whisper_at_cli.extract.pipeline.audio_batches.STILL_SECONDS", 2.0)
    path = tmp_path / "a.zarr"
    bad = planted(open_dataset(sounds), row_7=Crash(), row_30=Hang())
    report = extract(bad, path, model=random_backbone, workers=2, **OPTIONS)
    assert report.written == 38 and [failure.id for failure in report.failures] == [
        bad.clips[7].id, bad.clips[30].id,
    ]  # fmt: skip
    cache = FeatureCache.open(path)
    assert (cache.status != 1).nonzero()[0].tolist() == [7, 30]
    assert extract(sounds, path, model=random_backbone, repair=True, **OPTIONS).written == 2
    names = [name for name in whole if not name.startswith("error/")]
    mended = array_bytes(path)
    assert [name for name in names if mended[name] != whole[name]] == []


def test_what_is_lost_of_a_clip_is_noted_in_report_cache_and_info(sounds, tmp_path, random_backbone, capsys):
    path = tmp_path / "a.zarr"
    dataset = planted(open_dataset(sounds), row_3=Noted())
    report = extract(dataset, path, model=random_backbone, **OPTIONS)
    name, file = dataset.clips[3].id, dataset.clips[3].path
    assert report.ok and report.clip_notes == (ClipNote(name, file, "0.4 s of 10 s were lost"),)
    assert FeatureCache.open(path).errors[3] == "0.4 s of 10 s were lost" and FeatureCache.open(path).done.all()
    assert summarise(path)["notes"] == [{"id": name, "path": file, "note": "0.4 s of 10 s were lost"}]
    main(["info", str(path)], standalone_mode=False)
    assert f"note: {file}: 0.4 s of 10 s were lost" in capsys.readouterr().out
    (path / "mean/c.0.0.0").unlink()  # the shard is written again, and keeps the note of a clip that is kept
    again = extract(planted(open_dataset(sounds), row_3=Noted()), path, model=random_backbone, repair=True, **OPTIONS)
    assert again.clip_notes == report.clip_notes


@pytest.mark.parametrize("kills, clips", [(15, 60), pytest.param(200, 900, marks=pytest.mark.slow)])
def test_killed_processes_lose_no_clip(tmp_path, random_backbone, monkeypatch, kills, clips):
    """Random processes are killed at random moments of one run, as often as they can be replaced."""
    names = tuple(Clip(id=str(at), path=str(at)) for at in range(clips))
    dataset = PlantedDataset("slow", tmp_path, names, planted=tuple((at, SlowNoise(at)) for at in range(clips)))
    options = dict(model=random_backbone, clip_seconds=0.5, batch_size=2, workers=2)
    pools, killed, done, rng = [], [], threading.Event(), random.Random(0)
    original = decode_pool.DecodePool.__init__
    quick = PlantedDataset("slow", tmp_path, names, planted=tuple((at, Noise(at)) for at in range(clips)))
    extract(quick, tmp_path / "whole.zarr", **options)

    def kill():
        while len(killed) < kills and not done.is_set():
            time.sleep(rng.uniform(0.1, 0.5))
            if pids := pools[0].pids() if pools else []:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rng.choice(pids), signal.SIGKILL)
                    killed.append(1)

    monkeypatch.setattr(decode_pool.DecodePool, "__init__", lambda self, n: (original(self, n), pools.append(self))[0])
    killer = threading.Thread(target=kill)
    killer.start()
    try:
        report = extract(dataset, tmp_path / "a.zarr", **options)
    finally:
        done.set()
        killer.join()
    print(f"{len(killed)} kills in {report.seconds} s")
    assert len(killed) == kills, "the run was over too soon"
    assert (report.written, report.failed) == (clips, 0), report.failures
    assert array_bytes(tmp_path / "a.zarr") == array_bytes(tmp_path / "whole.zarr")


PARENT = """
import sys, time
from whisper_at_cli.extract.pipeline.decode_pool import DecodePool, Job
from whisper_at_cli.extract.pipeline.decode_worker import read_into_memory, Request
from planted_sources import Hang, Noise, process_of
pool = DecodePool(2)
pool.share(1 << 20)
pool.start(16)
pool.map(process_of, range(16))
if sys.argv[1] == "busy":
    pool.submit(Job(read_into_memory, [Request(Hang(), 100, 0)]))
print(*pool.pids(), flush=True)
with pool:
    time.sleep(60)
"""


def alive(pid):
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("state", ["idle", "busy"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_process_and_no_memory_outlive_the_parent(state, number):
    before = set(Path("/dev/shm").iterdir())
    path = os.pathsep.join(entry for entry in sys.path if entry)
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, state], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip
    pids = [int(word) for word in parent.stdout.readline().split()]
    assert len(pids) == 2 and all(map(alive, pids))
    parent.send_signal(number)
    parent.wait()
    end = time.monotonic() + 5
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(map(alive, pids))
    assert set(Path("/dev/shm").iterdir()) <= before


def test_processes_import_little():
    with DecodePool(1) as pool:
        ((kind, modules),) = pool.map(loaded_modules, [None])
        assert kind == DONE and {"numpy", "av"} <= modules
        assert not modules & {"torch", "sklearn", "zarr", "scipy", "numcodecs", "whisper", "h5py", "pyarrow"}
        status = Path(f"/proc/{pool.pids()[0]}/status").read_text()
        resident = int(status.split("VmRSS:")[1].split()[0]) / 1024
        assert resident <= 80, f"{resident:.0f} MB"


class Sluggish(ray_worker._DecodedClips):
    """A feed whose caller is held up when it is woken, and hears several calls as one, as from a pipe."""

    def wait(self):
        super().wait()
        time.sleep(0.002)
        while self.woken.acquire(blocking=False):
            pass


def test_no_order_of_events_leaves_a_run_waiting(tmp_path, random_backbone, monkeypatch):
    """Clips that are there at once, an encoder that takes no time or a little, a disk as well: hundreds of orders."""
    rng = random.Random(0)
    row = ray_worker.Decoded(tuple(range(40)), np.zeros((40, SAMPLES), np.int16), [(DONE, Heard(SAMPLES, ""))] * 40)

    def encode(backbone, waveforms, dtype, out):
        time.sleep(rng.choice((0, 0, 0.0005, 0.001)))
        out.features.zero_(), out.mean.zero_(), out.finite.fill_(True)
        return out

    def run_once(path):
        with created_for(path, random_backbone, 40) as writer:
            run = shard_run.ShardRun(
                random_backbone, writer, np.ones(40, dtype=bool), samples=SAMPLES, batch_size=1,
                streams=rng.choice((1, 2, 4)),
            )  # fmt: skip
            run.all_shards(Sluggish((row,)), rng.choice((3, 6, 12)))
            assert run.done == 40

    monkeypatch.setattr(shard_run, "encode_to_host", encode)
    for number in range(60):
        thread = threading.Thread(target=run_once, args=(tmp_path / f"{number}.zarr",), daemon=True)
        thread.start()
        thread.join(60)
        assert not thread.is_alive(), f"run {number} waits for ever"
        assert FeatureCache.open(tmp_path / f"{number}.zarr").complete


def created_for(path, backbone, clips):
    spec = CacheSpec(
        backbone="r", weights_sha256="w", layers=backbone.layers, dim=backbone.dim, clip_seconds=SAMPLES / 16000
    )
    names = np.array([str(at) for at in range(clips)], dtype=object)
    table = ClipTable(
        ids=names, paths=names, fold=np.zeros(clips, np.int16), split=np.full(clips, "", dtype=object),
        labels=np.zeros((clips, 0), np.uint8),
    )  # fmt: skip
    return CacheWriter.create(path, spec, table, shard_mb=7 * spec.clip_bytes / 1e6)
