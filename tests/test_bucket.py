"""A cache in a bucket is written, read and mended as in a folder; shown on an S3-compatible server that runs here."""

import importlib.util
import itertools
import json
import pickle
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import array_bytes, make_backbone
from planted import planted_cache
from whisper_at_cli.cli import main
from whisper_at_cli.extract import FeatureCache, extract
from whisper_at_cli.extract.cache import CacheSpec, CacheWriter, ClipTable
from whisper_at_cli.extract.cache.export import export_npz
from whisper_at_cli.extract.cache.import_npz import import_npz
from whisper_at_cli.extract.cache.schema import array_shapes
from whisper_at_cli.extract.cache.status import ShardStatus
from whisper_at_cli.extract.cache.status_log import LOG, MERGED, _record
from whisper_at_cli.extract.cache.store import BucketStore, LocalStore, location
from whisper_at_cli.extract.cache.stream import FeatureDataset
from whisper_at_cli.extract.cache.summary import summarise
from whisper_at_cli.extract.cache.verify import verify
from whisper_at_cli.extract.datasets import open_dataset
from whisper_at_cli.extract.errors import CacheError, StoreError, UsageError

needs_server = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("obstore", "moto", "flask")),
    reason="needs obstore and moto[server]: pip install 'whisper-at-cli[test]'",
)
START_SECONDS = 60
BUCKETS = itertools.count(1)
LAYERS, DIM = 3, 64
OPTIONS = dict(clip_seconds=0.5, batch_size=2, shard_mb=4 * LAYERS * 25 * DIM * 2 / 1e6)  # three shards of four clips


@pytest.fixture(scope="module")
def server():
    """Address of an S3-compatible server, in a process of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_SECONDS
        while not _answers(address):
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail("the S3-compatible server did not start")
            time.sleep(0.05)
        yield address
    finally:
        process.terminate()
        process.wait()


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5):
            return True
    except OSError:
        return False


@pytest.fixture
def bucket(server, monkeypatch):
    """Address of an empty bucket, and the environment that reaches it."""
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
        monkeypatch.setenv(f"AWS_{name}", "planted")
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    name = f"bucket-{next(BUCKETS)}"
    urllib.request.urlopen(urllib.request.Request(f"{server}/{name}", method="PUT")).close()
    return f"s3://{name}"


def planted(path, **options):
    features = np.random.default_rng(0).normal(size=(11, 3, 25, 8)).astype(np.float32)
    size = 4 * features[0].nbytes / 1e6
    return planted_cache(path, features, np.arange(11) % 2, shard_mb=size, fold=np.arange(11) % 2 + 1, **options)


def flip(address: str, name: str, at: int) -> None:
    """Change one bit of one byte of an object."""
    store = BucketStore(address)
    data = bytearray(store.read(name))
    data[at] ^= 1
    store.write_whole(name, [data])


@needs_server
@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_a_bucket_gets_the_bytes_that_a_folder_gets(bucket, noise_folder, tmp_path, dtype):
    (noise_folder / "low" / "broken.wav").write_bytes(b"no audio")
    for place in (tmp_path / "a.zarr", f"{bucket}/deep/a.zarr"):
        report = extract(noise_folder, place, model=make_backbone(), dtype=dtype, **OPTIONS)
        assert (report.clips, report.written, report.failed) == (13, 12, 1) and report.cache == str(place)
    assert array_bytes(f"{bucket}/deep/a.zarr") == array_bytes(tmp_path / "a.zarr")


@needs_server
def test_a_stopped_run_continues_and_skips_what_is_there(bucket, noise_folder, tmp_path, monkeypatch):
    address, whole, one_at_a_time = f"{bucket}/a.zarr", CacheWriter.write, threading.Lock()

    def stop_at_second_shard(writer, shard, block):
        with one_at_a_time:  # shards may come in any order, from several threads
            if FeatureCache.open(address).done.any():
                raise KeyboardInterrupt
            whole(writer, shard, block)

    with monkeypatch.context() as patch:
        patch.setattr(CacheWriter, "write", stop_at_second_shard)
        with pytest.raises(KeyboardInterrupt):
            extract(noise_folder, address, model=make_backbone(), **OPTIONS)
    assert FeatureCache.open(address).done.sum() == 4
    report = extract(noise_folder, address, model=make_backbone(), **OPTIONS)
    assert (report.written, report.skipped) == (8, 4)
    extract(noise_folder, tmp_path / "a.zarr", model=make_backbone(), **OPTIONS)
    assert array_bytes(address) == array_bytes(tmp_path / "a.zarr")
    with pytest.raises(CacheError, match="made with other settings .*random0, not random1"):
        extract(noise_folder, address, model=make_backbone(1), **OPTIONS)


@needs_server
def test_writers_with_shards_of_their_own_fill_one_cache(bucket, noise_folder, tmp_path):
    for index in (2, 1):
        extract(noise_folder, f"{bucket}/a.zarr", model=make_backbone(), shard=(index, 2), **OPTIONS)
    extract(noise_folder, tmp_path / "a.zarr", model=make_backbone(), **OPTIONS)
    assert array_bytes(f"{bucket}/a.zarr") == array_bytes(tmp_path / "a.zarr")


@needs_server
def test_reading_equals_reading_a_folder(bucket, tmp_path):
    ours, theirs = planted(f"{bucket}/a.zarr", failed=(2,)), planted(tmp_path / "a.zarr", failed=(2,))
    rows = [9, 0, 4, 4, 10, 3]
    for cache in (ours, pickle.loads(pickle.dumps(ours))):
        np.testing.assert_array_equal(cache.features(rows), theirs.features(rows))
        np.testing.assert_array_equal(cache.layer(2), theirs.layer(2))
        np.testing.assert_array_equal(cache.layer(3, rows), theirs.layer(3, rows))
        np.testing.assert_array_equal(cache.mean(), theirs.mean())
        for name in ("ids", "paths", "split", "errors", "fold", "labels", "valid_frames", "status"):
            np.testing.assert_array_equal(getattr(cache, name), getattr(theirs, name))
    with pytest.raises(CacheError, match="clip 'clip2' of s3://.*failed"):
        ours.features([2])
    assert repr(ours).startswith(f"FeatureCache('{bucket}/a.zarr'")
    there, here = summarise(f"{bucket}/a.zarr"), summarise(tmp_path / "a.zarr")
    assert there["bytes"] == here["bytes"] and there["files"] == here["files"] - 2  # here are two files for locks


class Counting(BaseHTTPRequestHandler):
    """Hands requests on to the server, and counts them."""

    protocol_version = "HTTP/1.1"
    address, requests = "", []

    def do_GET(self):
        self.requests.append(f"{self.command} {self.path}")
        headers = {name: value for name, value in self.headers.items() if name.lower() != "accept-encoding"}
        asked = urllib.request.Request(self.address + self.path, headers=headers, method=self.command)
        try:
            answer = urllib.request.urlopen(asked)
        except urllib.error.HTTPError as error:
            answer = error
        with answer:
            data = answer.read()
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                    self.send_header(name, value)
            size = len(data) if self.command == "GET" else answer.headers.get("Content-Length", 0)
            self.send_header("Content-Length", str(size))
            self.end_headers()
            self.wfile.write(data)

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def counted(server):
    """Address of a server that counts the requests that it hands on, and the list of them."""
    handler = type("Handler", (Counting,), {"address": server, "requests": []})
    here = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=here.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{here.server_port}", handler.requests
    here.shutdown()
    here.server_close()
    thread.join()


@needs_server
@pytest.mark.parametrize("at_work", [0, 8])
def test_a_cache_of_32000_shards_is_opened_by_at_most_40_requests(bucket, counted, monkeypatch, at_work):
    N, address = 32_000, f"{bucket}/a.zarr"
    names = np.array([f"clip{row}" for row in range(N)], dtype=object)
    spec = CacheSpec("b", "0", 2, 4, 5.0)
    clips = ClipTable(names, names, np.zeros(N, np.int16), np.full(N, ""), np.zeros((N, 0), np.uint8))
    with CacheWriter.create(address, spec, clips, shard_mb=1e-9) as writer:
        assert writer.clips_per_shard == 1
    done = ShardStatus(np.ones(1, np.uint8), np.full(1, 25, np.uint8))
    failed = ShardStatus(np.full(1, 2, np.uint8), np.zeros(1, np.uint8), {0: "broken"})
    store = BucketStore(address)
    store.write_whole(MERGED, [b"".join(_record(shard, 1, done) for shard in range(N))])
    for index in range(1, at_work + 1):
        mine = range(index - 1, N, at_work * 100)
        store.write_whole(f"{LOG}/{index}-of-8.0", [b"".join(_record(shard, 2, failed) for shard in mine)])
    proxy, requests = counted
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy)
    cache = FeatureCache.open(address)
    assert cache.done.sum() == N - at_work * 40 and cache.clip_status.problems == []
    assert (cache.errors == "broken").sum() == at_work * 40 and cache.valid_frames.any()
    assert 0 < len(requests) <= 40, requests


@needs_server
def test_one_layer_is_read_by_ranged_requests_for_its_bytes(bucket, monkeypatch):
    planted(f"{bucket}/a.zarr")
    cache = FeatureCache.open(f"{bucket}/a.zarr")
    cache.features([0, 4, 8])  # the indices of the three shards
    asked, read_range = [], BucketStore.read_range
    monkeypatch.setattr(BucketStore, "read", None)
    monkeypatch.setattr(
        BucketStore, "read_range", lambda *args: asked.append((args[1], len(data := read_range(*args)))) or data
    )
    cache.layer(2)
    assert sum(length for _, length in asked) == 11 * (25 * 8 * 4 + 4)
    asked.clear()
    cache.features([5, 6])
    assert asked == [("features/c.1.0.0.0", 3 * (25 * 8 * 4 + 4))] * 2


@needs_server
def test_a_flipped_byte_is_found_named_and_mended(bucket, noise_folder):
    address = f"{bucket}/a.zarr"
    extract(noise_folder, address, model=make_backbone(), **OPTIONS)
    whole = array_bytes(address)
    assert verify(address).ok
    flip(address, "features/c.1.0.0.0", LAYERS * (25 * DIM * 2 + 4) + 5)  # of the shard's second clip
    report = verify(address)
    cache = FeatureCache.open(address)
    assert [damage.clips for damage in report.damaged] == [(cache.ids[5],)]
    assert f"{address}/features/c.1.0.0.0" in report.damaged[0].problem and "CRC-32C" in report.damaged[0].problem
    flip(address, "status/log/merged", -9)
    assert verify(address).damaged[0].problem.startswith("status/log/merged is damaged at byte")
    flip(address, "status/c.0", 1)
    assert {damage.clips for damage in verify(address).damaged} == {(cache.ids[5],), ()}
    assert FeatureCache.open(address).status.tolist() == [1] * 8 + [0] * 4
    report = extract(noise_folder, address, model=make_backbone(), repair=True, **OPTIONS)
    assert report.written == 5 and array_bytes(address) == whole


@needs_server
def test_missing_and_truncated_objects_are_damage(bucket):
    address = f"{bucket}/a.zarr"
    planted(address)
    store = BucketStore(address)
    store.write_whole("features/c.0.0.0.0", [store.read("features/c.0.0.0.0")[:300]])
    store.write_whole("mean/zarr.json", [b"{"])
    store._obs.delete(store._store, "features/c.2.0.0.0")
    problems = " ".join(damage.problem for damage in verify(address).damaged)
    assert "truncated" in problems and "missing although" in problems and "mean/zarr.json is not what" in problems
    store._obs.delete(store._store, "mean/zarr.json")
    assert "mean/zarr.json is missing" in verify(address).damaged[0].problem
    store.write_whole("zarr.json", [store.read("zarr.json")[:50]])
    with pytest.raises(CacheError, match="s3://.*/zarr.json is damaged"):
        FeatureCache.open(address)


@needs_server
def test_export_and_import_take_buckets(bucket, tmp_path):
    cache = planted(f"{bucket}/a.zarr")
    assert export_npz(f"{bucket}/a.zarr", tmp_path / "npz").written == 11
    assert import_npz(tmp_path / "npz", f"{bucket}/b.zarr").cache == f"{bucket}/b.zarr"
    np.testing.assert_array_equal(FeatureCache.open(f"{bucket}/b.zarr").features([1, 7]), cache.features([1, 7]))


@needs_server
def test_commands_take_buckets(bucket, capsys):
    address = f"{bucket}/a.zarr"
    planted(address)
    for command in (["probe", address, "--layer", "2", "--json"], ["info", address, "--json"], ["verify", address]):
        with pytest.raises(SystemExit) as end:
            main(command)
        out = capsys.readouterr().out
        assert end.value.code == 0, command
        if command[0] == "probe":
            assert json.loads(out)["layers"][0]["layer"] == 2
        elif command[0] == "info":
            assert json.loads(out)["cache"] == address
        else:
            assert out == f"{address}: 11 clips read, all whole\n"


def spec_and_clips() -> tuple[CacheSpec, ClipTable]:
    names = np.array(["a", "b", "c"])
    clips = ClipTable(names, names, np.zeros(3, np.int16), np.array([""] * 3), np.zeros((3, 0), np.uint8))
    return CacheSpec(backbone="b", weights_sha256="0", layers=2, dim=4, clip_seconds=5.0), clips


@needs_server
def test_a_half_made_cache_is_none_and_is_made_whole(bucket, monkeypatch):
    address, (spec, clips) = f"{bucket}/a.zarr", spec_and_clips()
    with monkeypatch.context() as patch:
        patch.setattr(BucketStore, "write_first", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            CacheWriter.create(address, spec, clips)
    assert "features/zarr.json" in BucketStore(address).sizes()
    with pytest.raises(UsageError, match="does not exist"):
        FeatureCache.open(address)
    CacheWriter.create(address, spec, clips).close()
    assert set(array_shapes(spec, 3)) == {name.split("/")[0] for name in BucketStore(address).sizes()} - {"zarr.json"}


@needs_server
def test_the_first_of_two_that_create_a_cache_at_once_decides(bucket, monkeypatch):
    address, (spec, clips) = f"{bucket}/a.zarr", spec_and_clips()
    CacheWriter.create(address, spec, clips, provenance={"by": "first"}).close()
    store = BucketStore(address)
    store.write_first("zarr.json", b"second")
    assert FeatureCache.open(address).attributes["made"] == {"by": "first"}


@needs_server
def test_what_is_no_cache_is_left_as_it_is(bucket):
    spec, clips = spec_and_clips()
    store = BucketStore(f"{bucket}/photos")
    store.write_whole("status/c/0", [b"holiday"])
    with pytest.raises(UsageError, match=r"holds 1 objects that are no cache \(status/c/0"):
        CacheWriter.create(f"{bucket}/photos", spec, clips)
    assert store.sizes() == {"status/c/0": 7}


@needs_server
def test_a_file_of_many_parts_comes_back(bucket):
    store, rows = BucketStore(f"{bucket}/a"), np.random.default_rng(0).integers(0, 256, (40, 1 << 19), dtype=np.uint8)
    store.write_whole("large", [part for row in rows for part in (row, b"crc!")])
    data = store.read("large")
    assert data == b"".join(row.tobytes() + b"crc!" for row in rows)
    assert bytes(store.read_range("large", len(data) - 6, 4)) == data[-6:-2]


@needs_server
def test_what_cannot_be_reached_is_one_clear_line(bucket, server, monkeypatch, capsys, tmp_path):
    def error_of(*command: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as end:
            main([str(part) for part in command])
        text = capsys.readouterr().err
        assert text.count("\n") == 1 and "Traceback" not in text and "this should not happen" not in text, text
        return end.value.code, text

    assert error_of("info", f"{bucket}/a.zarr") == (
        2,
        f"error: {bucket}/a.zarr does not exist; make a cache with: whisper-at-cli extract DATASET {bucket}/a.zarr\n",
    )
    for command in ("info", "verify", "probe"):
        status, text = error_of(command, "s3://no-such-bucket/a.zarr")
        assert status == 2 and "there is no bucket 'no-such-bucket'; create it" in text
    planted(tmp_path / "a.zarr")
    export_npz(tmp_path / "a.zarr", tmp_path / "npz")
    status, text = error_of("import", tmp_path / "npz", "s3://no-such-bucket/a.zarr")
    assert status == 2 and "there is no bucket" in text

    cache = planted(f"{bucket}/a.zarr")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free.getsockname()[1]}")
        started = time.monotonic()
        status, text = error_of("verify", f"{bucket}/a.zarr")
        assert status == 1 and f"cannot reach {bucket}/a.zarr/zarr.json: the server does not answer" in text
        assert time.monotonic() - started < 30
        cache.store._store = BucketStore(cache.path)._store  # the server goes away while a cache is open
        with pytest.raises(StoreError, match="does not answer"):
            cache.features([0])


@needs_server
def test_refused_and_absent_keys_are_one_clear_line(bucket):
    from obstore.exceptions import GenericError, PermissionDeniedError

    store = BucketStore(f"{bucket}/a.zarr")
    metadata_server = "Error performing PUT http://169.254.169.254/latest/api/token in 2 s\n\nDebug source:\nGeneric"
    no_keys = r"^cannot reach s3://.*/zarr.json: no credentials were found; set AWS_ACC"
    with pytest.raises(StoreError, match=no_keys), store.asking("zarr.json"):
        raise GenericError(metadata_server)
    denied = "403 Forbidden: <Error><Code>AccessDenied</Code><Message>Not yours.</Message></Error>\n\nDebug source:\n"
    refused = r"access is denied \(Not yours\.\); check what these keys may do: AWS_ACC"
    with pytest.raises(StoreError, match=refused), store.asking("zarr.json"):
        raise PermissionDeniedError(denied)


@needs_server
def test_an_outage_is_not_taken_for_damage(bucket, monkeypatch):
    planted(f"{bucket}/a.zarr")

    def outage(store, name, start, length):
        raise StoreError("gone")

    monkeypatch.setattr(BucketStore, "read_range", outage)
    with pytest.raises(StoreError, match="gone"):
        verify(f"{bucket}/a.zarr")


@needs_server
def test_spawned_workers_read_and_forked_ones_are_refused(bucket):
    dataset = FeatureDataset(planted(f"{bucket}/a.zarr"))
    options = dict(batch_size=4, num_workers=1, timeout=60)
    batches = list(torch.utils.data.DataLoader(dataset, multiprocessing_context="spawn", **options))
    np.testing.assert_array_equal(torch.cat([features for features, _ in batches]), dataset.cache.features(range(11)))
    with pytest.raises(StoreError, match="multiprocessing_context='spawn'"):
        list(torch.utils.data.DataLoader(dataset, multiprocessing_context="fork", **options))


@needs_server
def test_calls_side_by_side_never_wait_for_themselves(bucket):
    store = BucketStore(bucket)
    assert store.map(lambda a: store.map(lambda b: 100 * a + b, range(50)), range(50))[49][49] == 4949


def test_an_address_says_where_a_cache_lies():
    assert isinstance(location("esc50.zarr"), LocalStore) and isinstance(location(Path("a/b.zarr")), LocalStore)
    with pytest.raises(UsageError, match="give it as text: 's3://...'"):
        location(Path("s3://bucket/a.zarr"))
    for address in ("ftp://host/a.zarr", "s3://", "s3:///a.zarr"):
        with pytest.raises(UsageError, match="a bucket and a name after s3://, gs://, az://"):
            location(address)


def test_without_obstore_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(UsageError, match=r"pip install 'whisper-at-cli\[cloud\]'"):
        location("s3://bucket/a.zarr")


@needs_server
@pytest.mark.parametrize("layout", ["folder", "esc50", "manifest"])
def test_a_dataset_in_a_bucket_gives_the_features_of_the_same_on_disk(bucket, noise_folder, tmp_path, layout):
    """Its lists are copied, its audio is fetched clip by clip, also where a part of it was sent to another process."""
    here = noise_folder
    if layout != "folder":
        here = tmp_path / "set"
        shutil.copytree(noise_folder, here / "audio")
        names = sorted(path.relative_to(here / "audio").as_posix() for path in here.rglob("*.wav"))
        rows = [f"{name},{1 + at % 5},{int(name < 'i')},{name.split('/')[0]}" for at, name in enumerate(names)]
        if layout == "esc50":
            (here / "meta").mkdir()
            (here / "meta" / "esc50.csv").write_text("\n".join(["filename,fold,target,category", *rows]) + "\n")
        else:
            rows = [f"audio/{name},{name.split('/')[0]}" for name in names]
            (here / "clips.csv").write_text("\n".join(["audio,label", *rows]) + "\n")
    store = BucketStore(f"{bucket}/sounds")
    for path in here.rglob("*"):
        if path.is_file():
            store.write_whole(path.relative_to(here).as_posix(), [path.read_bytes()])
    name = "/clips.csv" if layout == "manifest" else ""
    there = open_dataset(f"{bucket}/sounds{name}")
    model = make_backbone()
    assert extract(there, tmp_path / "there.zarr", model=model, **OPTIONS).written == 12
    assert extract(f"{here}{name}", tmp_path / "here.zarr", model=model, **OPTIONS).written == 12
    assert array_bytes(tmp_path / "there.zarr") == array_bytes(tmp_path / "here.zarr")
    part = pickle.loads(pickle.dumps(there.part([7, 3])))
    for row, of in enumerate((7, 3)):
        np.testing.assert_array_equal(part.waveform(row, 16000)[0], there.waveform(of, 16000)[0])


@needs_server
def test_an_object_that_is_gone_is_a_missing_clip_and_an_empty_address_one_clear_line(bucket, noise_folder, tmp_path):
    store = BucketStore(f"{bucket}/sounds")
    names = [path.relative_to(noise_folder).as_posix() for path in sorted(noise_folder.rglob("*.wav"))]
    for name in names[1:]:
        store.write_whole(name, [(noise_folder / name).read_bytes()])
    store.write_whole("clips.csv", ["\n".join(["audio", *names]).encode()])
    report = extract(f"{bucket}/sounds/clips.csv", tmp_path / "a.zarr", model=make_backbone(), **OPTIONS)
    assert (report.written, report.failed, report.missing) == (11, 1, 1)
    store.write_whole(names[0], [(noise_folder / names[0]).read_bytes()])
    assert extract(f"{bucket}/sounds/clips.csv", tmp_path / "a.zarr", model=make_backbone(), **OPTIONS).written == 1
    with pytest.raises(UsageError, match="holds no objects"):
        open_dataset(f"{bucket}/nothing")
