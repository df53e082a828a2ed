"""Streaming: each clip once an epoch, in an order that only the seed decides, and nothing left running."""

import inspect
import itertools
import pickle
import threading
import time

import numpy as np
import pytest
import torch

from planted import planted_cache
from whisper_at_cli.extract.cache import FeatureCache, stream
from whisper_at_cli.extract.cache.stream import FeatureDataset, stream_batches
from whisper_at_cli.extract.errors import CacheError, UsageError

N, L, T, D = 61, 2, 25, 8
CLIP_MB = L * T * D * 4 / 1e6
FEATURES = np.random.default_rng(0).normal(size=(N, L, T, D)).astype(np.float32)
LABELS = np.arange(N) % 3
FAILED = (5, 60)
DONE = [row for row in range(N) if row not in FAILED]


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> FeatureCache:
    """Sixty-one clips in shards of four, two of them failed."""
    path = tmp_path_factory.mktemp("stream") / "a.zarr"
    return planted_cache(path, FEATURES, LABELS, failed=FAILED, shard_mb=4.5 * CLIP_MB)


def order(batches) -> list[int]:
    return [row for rows, _, _ in batches for row in rows.tolist()]


def streaming_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "stream batches"]


@pytest.mark.parametrize("batch_size", [1, 7, 59, 100])
@pytest.mark.parametrize("buffer_mb", [CLIP_MB / 10, 13 * CLIP_MB, 1024])
def test_an_epoch_has_each_finished_clip_once_with_its_own_content(cache, batch_size, buffer_mb):
    batches = list(stream_batches(cache, batch_size, buffer_mb=buffer_mb))
    assert sorted(order(batches)) == DONE
    sizes = [len(rows) for rows, _, _ in batches]
    assert set(sizes[:-1]) <= {batch_size} and sizes[-1] == (len(DONE) - 1) % batch_size + 1
    for rows, features, labels in batches:
        assert features.dtype == labels.dtype == torch.float32
        np.testing.assert_array_equal(features.numpy(), FEATURES[rows])
        np.testing.assert_array_equal(labels.numpy(), np.eye(3)[LABELS[rows]])
    assert not streaming_threads()


def test_the_seed_alone_decides_the_order(cache):
    def epoch(seed, pause=0.0, **options):
        batches = []
        for batch in stream_batches(cache, 4, seed=seed, buffer_mb=12 * CLIP_MB, **options):
            time.sleep(pause)
            batches.append(batch)
        return order(batches)

    first = epoch(1)
    assert epoch(1) == epoch(1, pause=0.003, prefetch=1) == epoch(1, prefetch=9) == first
    assert epoch(2) != first and epoch((1, 1)) != epoch((1, 2))


def test_what_an_epoch_is_when_nothing_is_said(cache):
    assert order(stream_batches(cache, 4)) == order(stream_batches(cache, 4, seed=0, buffer_mb=1024))
    options = inspect.signature(stream_batches).parameters
    assert options["pin"].default is False and options["prefetch"].default == 2


def test_batches_mix_several_shards(cache):
    """Three shards fit in the buffer: neighbours in a shard should seldom be neighbours in a batch."""
    mixed = order(stream_batches(cache, 4, buffer_mb=16 * CLIP_MB))
    same_shard = sum(a // 4 == b // 4 for a, b in itertools.pairwise(mixed))
    assert same_shard < len(mixed) / 2  # 3 of 4 when shards are read one after another


def test_rows_can_be_chosen(cache):
    rows = [60 - 3 * i for i in range(1, 15)]
    assert sorted(order(stream_batches(cache, 3, rows=rows, buffer_mb=CLIP_MB))) == sorted(rows)
    assert list(stream_batches(cache, 3, rows=[])) == []
    with pytest.raises(CacheError, match="'clip5'.*failed"):
        stream_batches(cache, 3, rows=[4, 5])
    with pytest.raises(UsageError, match="twice"):
        stream_batches(cache, 3, rows=[4, 4])
    for wrong in ({"batch_size": 0}, {"batch_size": 2, "prefetch": 0}, {"batch_size": 2, "buffer_mb": 0}):
        with pytest.raises(UsageError, match="more than 0"):
            stream_batches(cache, **wrong)


def test_a_shard_is_read_whole_and_once(cache, monkeypatch):
    read, features = [], FeatureCache.features
    monkeypatch.setattr(FeatureCache, "features", lambda self, rows: read.append(list(rows)) or features(self, rows))
    list(stream_batches(cache, 4, buffer_mb=12 * CLIP_MB))
    assert sorted(itertools.chain(*read)) == DONE
    assert all(rows == sorted(rows) and len({row // 4 for row in rows}) == 1 for rows in read)
    shards = [rows[0] // 4 for rows in read]
    assert len(shards) == len(set(shards)) == 16 - 1 and shards != sorted(shards)


@pytest.mark.parametrize("taken", [0, 1, 3])
def test_an_early_stop_leaves_no_thread_behind(cache, taken):
    batches = stream_batches(cache, 2, buffer_mb=CLIP_MB)
    for _ in itertools.islice(batches, taken):
        assert streaming_threads()
    batches.close()
    assert not streaming_threads()
    for _ in stream_batches(cache, 2, buffer_mb=CLIP_MB):
        break
    assert not streaming_threads()


def test_an_error_while_reading_is_raised_where_batches_are_taken(tmp_path):
    cache = planted_cache(tmp_path / "a.zarr", FEATURES, LABELS, shard_mb=4.5 * CLIP_MB)
    shard = cache.path / "features/c.3.0.0.0"
    shard.write_bytes(shard.read_bytes()[:-50])
    seen = []
    with pytest.raises(CacheError, match="truncated"):
        for rows, _, _ in stream_batches(cache, 4, buffer_mb=12 * CLIP_MB):
            seen += rows.tolist()
    assert not streaming_threads() and not {12, 13, 14, 15} & set(seen)


@pytest.mark.parametrize("dtype, decoded", [("float16", torch.float16), ("int8", torch.float32)])
def test_features_come_in_the_type_that_the_cache_decodes(tmp_path, dtype, decoded):
    features = np.round(FEATURES) if dtype == "int8" else FEATURES
    cache = planted_cache(tmp_path / "a.zarr", features, LABELS, dtype=dtype)
    if dtype == "int8":
        cache.scale = lambda rows: np.full((len(rows), L, D), 0.5, np.float32)  # what planted caches leave out
    for rows, batch, _ in stream_batches(cache, 16):
        assert batch.dtype == decoded
        np.testing.assert_array_equal(batch.numpy(), cache.features(rows))
    assert FeatureDataset(cache)[0][0].dtype == decoded


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> FeatureCache:
    """Eleven clips of int8 with scales, in shards of four."""
    rng = np.random.default_rng(5)
    values, scale = rng.integers(-99, 99, (11, L, T, D)), rng.uniform(0.5, 2, (11, L, D)).astype(np.float16)
    path = tmp_path_factory.mktemp("stored") / "a.zarr"
    return planted_cache(path, values, np.arange(11) % 3, dtype="int8", scale=scale, shard_mb=4.2 * L * T * D / 1e6)


def test_features_can_be_taken_as_they_lie_on_disk_with_their_scales(stored):
    seen = []
    for rows, features, labels, scale in stream_batches(stored, 3, reads="stored"):
        assert (features.dtype, scale.dtype, labels.dtype) == (torch.int8, torch.float16, torch.float32)
        np.testing.assert_array_equal(features.numpy(), stored.stored_features(rows))
        np.testing.assert_array_equal(scale.numpy(), stored.scale(rows).astype(np.float16))
        np.testing.assert_array_equal(labels.numpy(), np.eye(3)[rows % 3])
        seen += rows.tolist()
    assert sorted(seen) == list(range(11))


def test_of_other_types_the_stored_features_are_the_features(cache):
    for rows, features, _ in stream_batches(cache, 16, reads="stored"):
        np.testing.assert_array_equal(features.numpy(), FEATURES[rows])


@pytest.mark.parametrize("reads, layers", [("mean", [0, 1]), ("last mean", [1])])
def test_means_can_be_taken_instead_of_features(cache, stored, reads, layers):
    for source, dtype in ((cache, torch.float32), (stored, torch.float16)):
        seen = []
        for rows, means, _ in stream_batches(source, 5, reads=reads):
            assert means.shape == (len(rows), len(layers), 1, D) and means.dtype == dtype
            np.testing.assert_array_equal(means[:, :, 0].float().numpy(), source.mean(rows=rows)[:, layers])
            seen += rows.tolist()
        assert sorted(seen) == np.flatnonzero(source.done).tolist()


@pytest.mark.parametrize("reads, clip_bytes", [("features", 4 * L * T * D), ("stored", L * T * D + 2 * L * D),
                                               ("mean", 2 * L * D), ("last mean", 2 * D)])  # fmt: skip
def test_a_buffer_holds_the_megabytes_it_was_given(stored, monkeypatch, reads, clip_bytes):
    made, whole = [], stream._ShuffleBuffer.__init__
    monkeypatch.setattr(
        stream._ShuffleBuffer,
        "__init__",
        lambda self, cache, most, reads: made.append(most) or whole(self, cache, most, reads),
    )
    for room, expected in ((9.5, 9), (5.5, 6), (10**6, 11)):  # a shard of four and a batch of two at least
        list(stream_batches(stored, 2, reads=reads, buffer_mb=room * clip_bytes / 1e6))
        assert made.pop() == expected


def test_large_shards_are_read_some_clips_at_a_time(cache, monkeypatch):
    monkeypatch.setattr(stream, "READ_BYTES", 3 * L * T * D * 4 + 1)
    read, features = [], FeatureCache.features
    monkeypatch.setattr(FeatureCache, "features", lambda self, rows: read.append(list(rows)) or features(self, rows))
    for rows, batch, _ in stream_batches(cache, 8, rows=range(8, 12)):
        np.testing.assert_array_equal(batch.numpy(), FEATURES[rows])
    assert read == [[8, 9, 10], [11]]
    monkeypatch.setattr(stream, "READ_BYTES", 1)
    assert len(order(stream_batches(cache, 8, rows=range(8, 12)))) == 4 and read[2:] == [[8], [9], [10], [11]]


def test_clips_that_come_several_times_are_dealt_to_passes_that_follow_on_each_other(cache):
    rows = np.repeat([0, 8, 17, 30], [1, 3, 8, 20])
    drawn = order(stream_batches(cache, 4, rows=rows, repeats=True))
    assert sorted(drawn) == sorted(rows.tolist())
    passes = stream._passes(rows, np.random.default_rng(0))
    assert len(passes) == 8 and sorted(np.concatenate(passes).tolist()) == sorted(rows.tolist())
    for some in passes:
        counts = dict(zip(*(each.tolist() for each in np.unique(some, return_counts=True)), strict=True))
        assert counts[17] == 1 and counts[30] in (2, 3) and counts.get(8, 0) <= 1 and counts.get(0, 0) <= 1
    first = {int(some[0]): at for at, some in enumerate(passes) if some[0] == 0}
    others = [stream._passes(rows, np.random.default_rng(seed)) for seed in range(20)]
    places = {next(at for at, some in enumerate(each) if 0 in some) for each in others} | set(first.values())
    assert len(places) > 3, "a clip's turns begin in any pass"
    assert [each.tolist() for each in stream._passes(np.array([5, 3, 9]), np.random.default_rng(0))] == [[5, 3, 9]]
    assert [each.tolist() for each in stream._passes(np.array([], int), np.random.default_rng(0))] == [[]]
    two = stream._passes(np.array([4, 4, 6]), np.random.default_rng(0))
    assert len(two) == 2 and all(4 in some for some in two)


def test_rows_are_split_by_shard_in_order():
    split = stream._by_shard(np.array([9, 3, 4, 0, 11, 8]), 4)
    assert [rows.tolist() for rows in split] == [[0, 3], [4], [8, 9, 11]]
    assert stream._by_shard(np.array([], int), 4) == []


def test_batches_are_held_back_until_they_are_taken(cache):
    """At most `ahead` wait, and one more is in the hands of the thread."""
    made, stop = [], threading.Event()
    batches = stream.in_thread((made.append(number) or number for number in range(50)), 3, stop)
    assert next(batches) == 0
    deadline = time.monotonic() + 5
    while len(made) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert made == [0, 1, 2, 3, 4] and not stop.is_set()
    batches.close()
    assert stop.is_set() and len(made) <= 6 and not streaming_threads()


def test_what_is_yielded_in_a_thread_arrives_in_order_and_stop_is_set_at_the_end():
    stop = threading.Event()
    assert list(stream.in_thread(iter(range(20)), 2, stop)) == list(range(20)) and stop.is_set()

    def failing():
        yield 1
        raise KeyError("gone")

    batches = stream.in_thread(failing(), 2, threading.Event())
    assert next(batches) == 1
    with pytest.raises(KeyError, match="gone"):
        next(batches)
    assert not streaming_threads()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned memory needs CUDA")
def test_pinned_batches_are_pinned(cache):
    for _, features, labels in stream_batches(cache, 16, pin=True):
        assert features.is_pinned() and labels.is_pinned()


def test_pin_without_cuda_changes_nothing(cache):
    assert order(stream_batches(cache, 16, pin=True)) == order(stream_batches(cache, 16))


def test_a_dataset_gives_the_finished_clips(cache):
    dataset = FeatureDataset(cache.path)
    assert len(dataset) == len(DONE)
    features, labels = dataset[5]  # row 5 failed
    assert features.shape == (L, T, D) and labels.dtype == torch.float32
    np.testing.assert_array_equal(features.numpy(), FEATURES[6])
    np.testing.assert_array_equal(labels.numpy(), np.eye(3)[LABELS[6]])
    np.testing.assert_array_equal(dataset[-1][0].numpy(), FEATURES[59])
    assert sum(1 for _ in dataset) == len(DONE), "iteration ends by IndexError"
    chosen = FeatureDataset(cache, rows=[9, 2])
    np.testing.assert_array_equal(chosen[0][0].numpy(), FEATURES[9])
    with pytest.raises(CacheError, match="failed"):
        FeatureDataset(cache, rows=[5])


def test_a_batch_of_a_dataset_is_one_read(cache, monkeypatch):
    read, features = [], FeatureCache.features
    monkeypatch.setattr(FeatureCache, "features", lambda self, rows: read.append(len(rows)) or features(self, rows))
    loader = torch.utils.data.DataLoader(FeatureDataset(cache), batch_size=20)
    assert [len(batch) for batch, _ in loader] == read == [20, 20, 19]


def test_spawned_workers_give_what_direct_reading_gives(cache):
    dataset = FeatureDataset(cache)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(dataset))[3][0].numpy(), FEATURES[3])
    loader = torch.utils.data.DataLoader(dataset, batch_size=16, num_workers=2, multiprocessing_context="spawn")
    batches = list(loader)
    np.testing.assert_array_equal(torch.cat([features for features, _ in batches]).numpy(), FEATURES[DONE])
    np.testing.assert_array_equal(torch.cat([labels for _, labels in batches]).numpy(), cache.labels[DONE])


def test_a_dataset_serves_threads(cache):
    dataset, wrong = FeatureDataset(cache), []

    def read(seed):
        for index in np.random.default_rng(seed).integers(0, len(dataset), 100).tolist():
            if not np.array_equal(dataset[index][0].numpy(), FEATURES[DONE[index]]):
                wrong.append(index)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
