"""What a bucket's store does with an object store, shown on one in memory: no server, no network."""

import os
import threading

import numpy as np
import pytest

from planted import planted_cache
from whisper_at_cli.extract.cache import FeatureCache, store, writer
from whisper_at_cli.extract.cache.store import BucketFile, BucketStore
from whisper_at_cli.extract.errors import StoreError, UsageError

obstore = pytest.importorskip("obstore", reason="needs obstore: pip install 'whisper-at-cli[cloud]'")
ADDRESS = "s3://bucket/deep/a.zarr"


@pytest.fixture
def bucket(monkeypatch) -> BucketStore:
    """A bucket whose objects are in memory, whoever opens it."""
    from obstore.store import MemoryStore

    memory = MemoryStore()
    monkeypatch.setattr(obstore.store, "from_url", lambda *args, **options: memory)
    return BucketStore(ADDRESS)


def test_objects_come_back_and_are_listed(bucket):
    assert bucket.read("a") is None and not bucket.exists("a") and bucket.size("a") is None and bucket.sizes() == {}
    bucket.write_whole("c/0", [b"one", bytearray(b"two"), np.array([7], "<u2")])
    assert bucket.read("c/0") == b"onetwo\7\0" and type(bucket.read("c/0")) is bytes
    assert bucket.exists("c/0") and bucket.size("c/0") == 8
    bucket.write_whole("c/0", [b"over"])
    bucket.write_first("c/0", b"late")
    bucket.write_first("c/1", b"first")
    assert bucket.read("c/0") == b"over" and bucket.sizes() == {"c/0": 4, "c/1": 5}
    assert bytes(bucket.read_range("c/1", 1, 3)) == b"irs"
    assert str(bucket) == bucket.address == ADDRESS and str(BucketStore(ADDRESS + "/")) == ADDRESS


def test_many_pages_of_objects_are_all_listed(bucket):
    for number in range(120):
        bucket.write_whole(f"c/{number}", [b"x" * number])
    assert bucket.sizes() == {f"c/{number}": number for number in range(120)}


@pytest.mark.parametrize("size, parts", [(99, False), (100, False), (101, True)])
def test_large_objects_go_in_parts(bucket, monkeypatch, size, parts):
    asked, put = [], obstore.put
    monkeypatch.setattr(store, "PART_BYTES", 100)
    monkeypatch.setattr(obstore, "put", lambda *args, **options: asked.append(options) or put(*args, **options))
    bucket.write_whole("a", [b"x" * (size - 2), np.array([1, 0], np.uint8)])
    assert asked == ([{"chunk_size": 100, "max_concurrency": store.PARTS}] if parts else [{}])
    assert bucket.read("a") == b"x" * (size - 2) + b"\1\0"


def test_a_part_of_an_object_fills_buffers_one_after_another(bucket):
    bucket.write_whole("a", [bytes(range(20))])
    file, one, two = bucket.open("a"), bytearray(3), np.zeros(2, "<u2")
    assert isinstance(file, BucketFile) and file.size == 20
    assert file.readv([one, two], 6) == 7
    assert list(one) == [6, 7, 8] and two.tobytes() == bytes([9, 10, 11, 12])
    with pytest.raises(FileNotFoundError):
        bucket.open("absent")


def test_calls_run_side_by_side_from_two_on_and_never_within_each_other(bucket):
    together = threading.Barrier(2)
    assert bucket.map(lambda number: together.wait(20) * 0 + number, [4, 5]) == [4, 5]
    here = threading.get_ident()
    assert bucket.map(lambda _: threading.get_ident(), iter([1])) == [here], "a single call needs no thread"
    inner = bucket.map(
        lambda _: (threading.get_ident(), set(bucket.map(lambda _: threading.get_ident(), range(5)))), "ab"
    )
    assert all(within == {outer} and outer != here for outer, within in inner)
    assert bucket.map(str, ()) == []
    assert {name.rpartition("_")[0] for name in bucket.map(lambda _: threading.current_thread().name, "ab")} == {
        "bucket"
    }
    assert bucket._threads is bucket._threads


def test_what_the_store_is_asked_to_bear(monkeypatch):
    asked = {}
    monkeypatch.setattr(obstore.store, "from_url", lambda address, **options: asked.update(options, address=address))
    BucketStore(ADDRESS + "//")
    assert asked["address"] == ADDRESS and asked["client_options"]["allow_http"] is True
    assert set(asked["client_options"]) == {"allow_http", "connect_timeout", "timeout"}
    assert set(asked["retry_config"]) == {"max_retries", "retry_timeout", "backoff"}
    assert set(asked["retry_config"]["backoff"]) == {"init_backoff", "max_backoff", "base"}


@pytest.mark.parametrize("address", ["s3://", "s3:///a", "ftp://a/b", "://a", "s3x://a"])
def test_an_address_needs_a_kind_of_bucket_and_its_name(address):
    with pytest.raises(
        UsageError, match=f"{address} is no address of a cache; give a path, or a bucket and a name after s3:"
    ):
        BucketStore(address)
    for scheme in ("s3", "gs", "az"):
        assert scheme in store.KEYS


def test_an_address_that_the_library_refuses_is_one_clear_line(monkeypatch):
    def refuse(*args, **options):
        raise ValueError("not a bucket's name")

    monkeypatch.setattr(obstore.store, "from_url", refuse)
    with pytest.raises(StoreError, match="cannot reach s3://b/a: not a bucket's name; what was finished is kept"):
        BucketStore("s3://b/a")


@pytest.mark.parametrize(
    "error, kind, said",
    [
        (OSError("NoSuchBucket"), None, ""),
        (
            FileNotFoundError("<Code>NoSuchBucket</Code>"),
            UsageError,
            r"/f: there is no bucket 'bucket'; create it, or mend",
        ),
        (FileNotFoundError("ContainerNotFound"), UsageError, "there is no bucket 'bucket'"),
        (FileNotFoundError("The specified bucket does not exist"), UsageError, "there is no bucket 'bucket'"),
        (FileNotFoundError("f"), None, ""),
        (
            "PermissionDeniedError: <Message>No.</Message>",
            StoreError,
            r"access is denied \(No\.\); check what these keys",
        ),
        (
            "UnauthenticatedError: gone",
            StoreError,
            r"access is denied \(gone\); check what these keys may do: AWS_ACCESS",
        ),
        (
            "GenericError: at 169.254.169.254",
            StoreError,
            "no credentials were found; set AWS_ACCESS_KEY_ID and AWS_SECRET",
        ),
        (
            "GenericError: HTTP error: x\n\nDebug source:\nlong",
            StoreError,
            r"does not answer \(HTTP error: x\); check the ne",
        ),
        ("GenericError: <Message>full\nup</Message>", StoreError, "/f: full\nup; what was finished is kept: mend this"),
    ],
)
def test_what_fails_is_said_in_words(bucket, error, kind, said):
    if isinstance(error, str):
        name, _, text = error.partition(": ")
        error = getattr(obstore.exceptions, name)(text)
    match = f"^cannot reach {ADDRESS}.*{said}" if kind else str(error)
    with pytest.raises(kind or type(error), match=match) as raised, bucket.asking("f"):
        raise error
    assert kind is None or raised.value.__cause__ is error


@pytest.mark.parametrize(
    "address, key",
    [
        ("gs://b/a", "GOOGLE_APPLICATION_CREDENTIALS"),
        ("az://b/a", "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY"),
    ],
)
def test_each_kind_of_bucket_has_its_own_keys(monkeypatch, address, key):
    monkeypatch.setattr(obstore.store, "from_url", lambda *args, **options: None)
    said = f"cannot reach {address}: no credentials were found; set {key}$"
    with pytest.raises(StoreError, match=said), BucketStore(address).asking(""):
        raise obstore.exceptions.GenericError("http://169.254.169.254")


def test_a_missing_bucket_is_not_a_missing_object(bucket, monkeypatch):
    def gone(*args):
        raise FileNotFoundError("NoSuchBucket")

    monkeypatch.setattr(obstore, "get", gone)
    with pytest.raises(UsageError, match="there is no bucket"):
        bucket.read("a")


def test_a_forked_process_is_refused_at_whatever_it_asks(bucket, monkeypatch):
    bucket.write_whole("a", [b"x"])
    monkeypatch.setattr(store, "_used_by", [os.getpid() + 1])
    for ask in (lambda: bucket.read("a"), lambda: bucket.map(str, [1, 2]), lambda: BucketStore(ADDRESS)):
        with pytest.raises(StoreError, match=f"cannot use {ADDRESS} in a process that was forked"):
            ask()
    monkeypatch.setattr(store, "_used_by", [])
    assert bucket.read("a") == b"x" and store._used_by == [os.getpid()]


def test_a_cache_in_a_bucket_is_whole_and_its_metadata_come_last(bucket, monkeypatch, tmp_path):
    names, put = [], obstore.put
    monkeypatch.setattr(obstore, "put", lambda *args, **options: names.append(args[1]) or put(*args, **options))
    features = np.random.default_rng(0).normal(size=(5, 2, 25, 4)).astype(np.float32)
    options = dict(shard_mb=2.5 * features[0].nbytes / 1e6, failed=(3,))
    there = planted_cache(ADDRESS, features, [0, 1, 0, 1, 0], **options)
    here = planted_cache(tmp_path / "a.zarr", features, [0, 1, 0, 1, 0], **options)
    first = names.index("zarr.json")
    assert all(
        "/c." not in name or name.split("/")[0] in ("id", "path", "split", "fold", "digest", "labels", "layer", "class")
        for name in names[:first]
    )
    assert {name.split("/")[0] for name in names[first + 1 :]} <= {
        "features",
        "mean",
        "valid_frames",
        "status",
        "error",
    }
    rows = [4, 0, 2]
    np.testing.assert_array_equal(there.features(rows), here.features(rows))
    np.testing.assert_array_equal(there.mean(), here.mean())
    assert there.errors.tolist() == here.errors.tolist() and there.path == ADDRESS
    assert writer.CacheWriter(there.store, (1, 1))._lock is None
    assert FeatureCache.open(ADDRESS).status.tolist() == [1, 1, 1, 2, 1]


def test_a_bucket_that_holds_something_else_is_left_as_it_is(bucket):
    bucket.write_whole("photo", [b"x"])
    bucket.write_whole("video", [b"x"])
    with pytest.raises(
        UsageError, match=rf"{ADDRESS} holds 2 objects that are no cache \(photo, \.\.\.\); choose another"
    ):
        planted_cache(ADDRESS, np.ones((1, 1, 25, 1)), [0])
    assert bucket.sizes() == {"photo": 1, "video": 1}


def test_an_outage_says_which_array_was_asked_for(bucket, monkeypatch):
    import zarr

    cache = planted_cache(ADDRESS, np.ones((2, 1, 25, 1)), [0, 0])
    ours, none = writer.CacheWriter.join(ADDRESS), np.array([], int)

    def outage(*args, **options):
        raise obstore.exceptions.GenericError("gone")

    monkeypatch.setattr(zarr, "open_array", outage)
    monkeypatch.setattr(zarr, "open_group", outage)
    monkeypatch.setattr(zarr.Group, "__getitem__", outage)
    for name, ask in {
        "features": lambda: FeatureCache.open(ADDRESS), "fold": lambda: cache.fold, "split": lambda: cache.split,
        "path": lambda: ours.update_paths(none, []), "digest": lambda: ours.update_digests(none),
    }.items():  # fmt: skip
        with pytest.raises(StoreError, match=f"cannot reach {ADDRESS}/{name}: gone"):
            ask()
    monkeypatch.setattr(obstore, "put", outage)
    with pytest.raises(StoreError, match=rf"cannot reach {ADDRESS}/status/log/1-of-1\.\w+: gone"):
        ours.mark(0, np.zeros(2, np.uint8), np.ones(2, np.uint8), {})
    assert ours.cache.status.tolist() == [1, 1]
    monkeypatch.setattr(obstore, "list", outage)
    with pytest.raises(StoreError, match=f"cannot reach {ADDRESS}/status/log: gone"):
        ours.cache.clip_status.reload()
