"""Clips in memory are those of the cache, and what cannot be trained on is refused."""

import numpy as np
import pytest
import torch

from planted import planted_cache
from whisper_at_cli.extract.errors import UsageError, WhisperATError
from whisper_at_cli.heads.training import data
from whisper_at_cli.heads.training.data import every_clip_has_one_label, load_clips, why_not_accuracy

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["float32", "float16"])
def cache(request, tmp_path_factory):
    features = np.random.default_rng(0).normal(size=(40, 3, 25, 8)).astype(np.float32)
    path = tmp_path_factory.mktemp("data") / "planted.zarr"
    return planted_cache(path, features, np.arange(40) % 4, dtype=request.param, failed=(7, 23))


@pytest.mark.parametrize("read_bytes", [1, 5000, 1 << 28])
def test_loaded_features_are_the_caches_and_keep_its_type(cache, read_bytes, monkeypatch):
    monkeypatch.setattr(data, "READ_BYTES", read_bytes)
    rows = np.flatnonzero(cache.done)[3:31]
    clips = load_clips(cache, rows, "features", CPU)
    assert str(clips.features.dtype) == f"torch.{cache.spec.dtype}"
    np.testing.assert_array_equal(clips.features.numpy(), cache.features(rows))
    np.testing.assert_array_equal(load_clips(cache, rows, "mean", CPU).features[:, :, 0].numpy(), cache.mean(rows=rows))
    last = load_clips(cache, rows, "last mean", CPU).features
    np.testing.assert_array_equal(last[:, 0, 0].numpy(), cache.mean(layer=3, rows=rows))
    np.testing.assert_array_equal(clips.labels.numpy(), cache.labels[rows])


def test_positions_find_rows_among_those_that_were_loaded(cache):
    rows = np.flatnonzero(cache.done)
    clips = load_clips(cache, rows, "mean", CPU)
    wanted = np.array([0, 8, 24, 39])
    batch = clips.batch(torch.from_numpy(clips.positions(wanted)))
    np.testing.assert_array_equal(batch[:, :, 0].numpy(), cache.mean(rows=wanted))


def test_features_that_do_not_fit_are_streamed_or_refused_where_memory_was_asked_for(cache, monkeypatch):
    rows = np.flatnonzero(cache.done)
    size = load_clips(cache, rows, "features", CPU).features.nbytes
    monkeypatch.setattr(data, "free_bytes", lambda device: 2 * size)
    assert load_clips(cache, rows, "features", CPU).tier == "memory"
    monkeypatch.setattr(data, "free_bytes", lambda device: 2 * size - 1)
    streamed = load_clips(cache, rows, "features", CPU)
    assert streamed.tier == "stream" and streamed.features.shape == (len(rows), 3, 25, 8)
    assert load_clips(cache, rows, "mean", CPU).tier == "memory"
    assert load_clips(cache, rows, "features", CPU, "memory").tier == "memory"  # all of it, if asked for
    monkeypatch.setattr(data, "free_bytes", lambda device: size - 1)
    for tier in ("memory", "device"):
        with pytest.raises(WhisperATError, match="memory are free: leave out --tier"):
            load_clips(cache, rows, "features", CPU, tier)
    with pytest.raises(UsageError, match="tier 'disk' is not known; choose from auto, device, memory, stream"):
        load_clips(cache, rows, "features", CPU, "disk")


def test_processes_of_one_machine_share_its_memory(cache, monkeypatch):
    rows = np.flatnonzero(cache.done)
    size = load_clips(cache, rows, "features", CPU).features.nbytes
    monkeypatch.setattr(data, "free_bytes", lambda device: 4 * size)
    assert load_clips(cache, rows, "features", CPU, processes=2).tier == "memory"
    assert load_clips(cache, rows, "features", CPU, processes=3).tier == "stream"


def test_the_accelerator_is_taken_first_then_main_memory(cache, monkeypatch):
    rows = np.flatnonzero(cache.done)
    size = load_clips(cache, rows, "features", CPU).features.nbytes
    free = {"meta": 1.3 * size, "cpu": 1 << 40}
    monkeypatch.setattr(data, "free_bytes", lambda device: free[device.type])
    assert load_clips(cache, rows, "features", torch.device("meta")).tier == "device"
    free["meta"] = 1.2 * size
    clips = load_clips(cache, rows, "features", torch.device("meta"))
    assert clips.tier == "memory" and clips.features.device == CPU and clips.device.type == "meta"
    assert clips.batch(torch.arange(2)).device.type == "meta"


def test_a_limit_of_a_container_counts(monkeypatch, tmp_path):
    (tmp_path / "memory.max").write_text("3000\n")
    (tmp_path / "memory.current").write_text("1000\n")
    monkeypatch.setattr(data, "CONTROL_GROUP", tmp_path)
    assert data.free_bytes(CPU) in (2000, None)
    (tmp_path / "memory.max").write_text("max\n")
    assert data.free_bytes(CPU) is None or data.free_bytes(CPU) > 1 << 20


def test_the_reason_against_accuracy_names_the_clips():
    labels = np.array([[1, 0], [1, 1], [0, 0], [0, 1], [0, 0]])
    ids = np.array(list("abcde"))
    assert why_not_accuracy(labels, ids) == (
        "the metric is mAP and not accuracy: 1 of 5 clips have several labels (b) and 2 of 5 clips have no label (c, e)"
    )


def test_free_memory_is_known_here():
    free = data.free_bytes(CPU)
    assert free is None or free > 1 << 20


def test_single_label_data_are_told_from_multi_label():
    one = np.eye(3, dtype=np.uint8)[[0, 1, 2, 0]]
    several, none = one.copy(), one.copy()
    several[0, 1], none[0, 0] = 1, 0
    assert every_clip_has_one_label(one)
    assert not every_clip_has_one_label(several) and not every_clip_has_one_label(none)
    assert not every_clip_has_one_label(np.array([[1], [0]]))  # one class, present or not


@pytest.mark.parametrize("labels", [np.ones((4, 1)), np.zeros((4, 3)), np.zeros((4, 0)), np.eye(3)[[1, 1]]])
def test_labels_that_leave_nothing_to_tell_apart_are_refused(labels):
    with pytest.raises(UsageError, match="nothing to tell apart"):
        every_clip_has_one_label(labels.astype(np.uint8))
