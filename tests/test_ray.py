"""Extraction on Ray: the same bytes as the local engine, whatever is lost on the way."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_bucket import bucket, needs_server, server  # noqa: F401 - fixtures

from conftest import array_bytes, noise, write_wav
from whisper_at_cli.extract import FeatureCache, extract
from whisper_at_cli.extract.cache.store import BucketStore
from whisper_at_cli.extract.cache.summary import summarise
from whisper_at_cli.extract.errors import UsageError
from whisper_at_cli.extract.pipeline.ray_engine import SHARDS_EACH, extract_on_ray

ray = pytest.importorskip("ray", reason="needs the extra ray")
OPTIONS = dict(model="tiny.en", clip_seconds=2.0, shard_mb=0.4)  # five clips a shard


@pytest.fixture(scope="module")
def sounds(tmp_path_factory, tiny_en) -> Path:
    folder = tmp_path_factory.mktemp("ray") / "sounds"
    for index in range(60):
        write_wav(folder / ("low", "high")[index % 2] / f"{index:02d}.wav", noise(index, 2.0))
    (folder / "low" / "10.wav").write_bytes(b"no sound at all")
    return folder


@pytest.fixture(scope="module")
def local(sounds) -> dict[str, bytes]:
    """What the local engine writes."""
    report = extract(sounds, sounds.parent / "local.zarr", **OPTIONS)
    assert (report.written, report.failed) == (59, 1)
    return array_bytes(sounds.parent / "local.zarr")


@pytest.fixture(scope="module")
def cluster():
    """Three nodes of one core each, on this machine."""
    from ray.cluster_utils import Cluster

    os.environ |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}  # the nodes' own keys
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    yield cluster
    cluster.shutdown()
    del os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"]


def test_without_a_cluster_at_the_address_there_is_one_clear_line(sounds, tmp_path):
    with pytest.raises(UsageError, match="no Ray cluster answers"):
        extract_on_ray(sounds, tmp_path / "a.zarr", address="127.0.0.1:1", **OPTIONS)
    assert not (tmp_path / "a.zarr").exists()


@pytest.mark.parametrize(
    "in_tasks",
    [
        pytest.param(None, id="decoded by the encoders"),
        pytest.param(True, id="decoded in tasks", marks=pytest.mark.slow),  # minutes, where two cores do it all
    ],
)
def test_three_nodes_write_the_bytes_of_one_process(cluster, sounds, local, tmp_path, in_tasks):
    seen = []
    report = extract_on_ray(
        sounds, tmp_path / "a.zarr", address=cluster.address, decode_in_tasks=in_tasks,
        progress=lambda *step: seen.append(step), **OPTIONS,
    )  # fmt: skip
    assert (report.clips, report.written, report.skipped, report.failed) == (60, 59, 0, 1)
    assert report.failures[0].id == "10" and report.lost == 0
    assert sum(node["clips"] for node in report.nodes) == 59 and len(report.nodes) >= 2
    assert seen[-1][:2] == (60, 60) and "1 failed" in seen[-1][2]
    assert array_bytes(tmp_path / "a.zarr") == local


def drive(cluster, sounds: Path, cache: Path) -> subprocess.Popen:
    """The command in a process of its own."""
    command = [sys.executable, "-m", "whisper_at_cli.cli", "--quiet", "extract", sounds, cache, "--json"]
    command += ["--engine", "ray", "--address", cluster.address]
    command += [f"--{name.replace('_', '-')}={value}" for name, value in OPTIONS.items()]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for_clips(cache: Path, count: int, process: subprocess.Popen) -> None:
    for _ in range(600):
        if process.poll() is not None:
            raise AssertionError(f"ended early: {process.communicate()}")
        if cache.exists() and FeatureCache.open(cache).done.sum() >= count:
            return
        time.sleep(0.1)
    raise AssertionError("no progress")


def test_a_lost_node_and_a_lost_driver_lose_nothing(cluster, sounds, local, tmp_path):
    """One node is killed in the middle, then the driver; the same command ends in the same bytes."""
    cache = tmp_path / "a.zarr"
    first = drive(cluster, sounds, cache)
    wait_for_clips(cache, 5, first)
    cluster.remove_node(cluster.list_all_nodes()[-1], allow_graceful=False)
    wait_for_clips(cache, int(FeatureCache.open(cache).done.sum()) + 5, first)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    before = summarise(cache)
    assert 10 <= before["done"] < 59, "killed in the middle"
    cluster.add_node(num_cpus=1)
    second = drive(cluster, sounds, cache)
    out, err = second.communicate(timeout=300)
    assert second.returncode == 1, err  # the clip that is no sound
    assert out, err
    report = json.loads(out)
    assert report["written"] + report["skipped"] == 59 and report["skipped"] >= before["done"] > 0
    assert array_bytes(cache) == local


def test_decoded_audio_never_piles_up(cluster, sounds, tmp_path, monkeypatch):
    from whisper_at_cli.extract.pipeline import ray_engine

    most = []
    original = ray_engine._Drive._hand_out

    def watched(self):
        original(self)
        most.append(len(self.in_flight))

    monkeypatch.setattr(ray_engine._Drive, "_hand_out", watched)
    report = extract_on_ray(
        sounds, tmp_path / "a.zarr", address=cluster.address, encoders=1, decode_in_tasks=True, **OPTIONS
    )
    assert report.written == 59 and max(most) == SHARDS_EACH


@needs_server
def test_dataset_and_cache_in_a_bucket_work_from_every_worker(cluster, sounds, local, bucket):  # noqa: F811 - the fixture of above
    store = BucketStore(f"{bucket}/sounds")
    for path in sounds.rglob("*.wav"):
        store.write_whole(path.relative_to(sounds).as_posix(), [path.read_bytes()])
    cache = f"{bucket}/a.zarr"
    for in_tasks in (False, True):
        address = f"{cache}-{in_tasks}"
        report = extract_on_ray(
            f"{bucket}/sounds", address, address=cluster.address, decode_in_tasks=in_tasks, **OPTIONS
        )
        assert (report.written, report.failed, report.lost) == (59, 1, 0)
        there = BucketStore(address)
        assert {name: there.read(name) for name in local} == local
