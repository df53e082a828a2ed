"""A batch through the encoder: int16 and float32, new tensors and a shard's own, memory that runs out, overflow."""

import sys
import threading

import numpy as np
import pytest
import torch

from conftest import make_backbone, noise, write_wav
from whisper_at_cli.extract import FeatureCache, devices, extract, load_backbone
from whisper_at_cli.extract.audio.decode import as_float
from whisper_at_cli.extract.backbones import encoder, precision
from whisper_at_cli.extract.backbones.encoder import encoder_from_state
from whisper_at_cli.extract.cache.storage import Stored
from whisper_at_cli.extract.devices import FittingBatches, with_index
from whisper_at_cli.extract.errors import WeightsError, WhisperATError
from whisper_at_cli.extract.pipeline import encode
from whisper_at_cli.extract.pipeline.encode import encode_to_host

DTYPES = ("float16", "float32", "int8")
SAMPLES = 16000


def samples_int16(clips: int) -> torch.Tensor:
    """(clips, SAMPLES) int16, with both ends of the range among them."""
    waves = np.stack([noise(seed, 1) for seed in range(clips)])
    whole = np.clip(np.round(waves * 32768), -32768, 32767).astype(np.int16)
    whole[0, :2] = -32768, 32767
    return torch.from_numpy(whole)


def shard_block(rows: int, dtype: str, layers: int = 3, dim: int = 64) -> Stored:
    """What a shard's block looks like: host tensors, full of what must be overwritten."""
    stored, small = getattr(torch, dtype), torch.float32 if dtype == "float32" else torch.float16
    return Stored(
        torch.full((rows, layers, 25, dim), 7, dtype=stored),
        torch.full((rows, layers, dim), 7, dtype=small),
        torch.zeros(rows, layers, dtype=torch.bool),
        torch.full((rows, layers, dim), 7, dtype=small) if dtype == "int8" else None,
    )


def assert_same(found: Stored, expected: Stored) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or (ours.dtype == theirs.dtype and torch.equal(ours, theirs))


@pytest.fixture(autouse=True)
def nothing_learnt(monkeypatch):
    monkeypatch.setattr(encode, "FITTING", FittingBatches())


@pytest.mark.parametrize("dtype", DTYPES)
def test_int16_gives_the_bits_that_float32_gives(random_backbone, dtype):
    whole = samples_int16(3)
    expected = encode_to_host(random_backbone, torch.from_numpy(as_float(whole.numpy())), dtype)
    assert_same(encode_to_host(random_backbone, whole, dtype), expected)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_results_are_written_into_rows_of_a_block_with_the_same_bits(dtype, precision):
    backbone, waveforms = make_backbone(precision=precision), samples_int16(3)
    block = shard_block(8, dtype)
    before = block.map(torch.clone)
    out = block.rows(slice(2, 5))
    returned = encode_to_host(backbone, waveforms, dtype, out)
    assert returned.features.data_ptr() == block.features[2].data_ptr(), "no copy of its own"
    assert_same(block.rows(slice(2, 5)), encode_to_host(backbone, waveforms, dtype))
    assert block.finite[2:5].all()
    for rows in (slice(0, 2), slice(5, 8)):
        assert_same(block.rows(rows), before.rows(rows))


class OfYourOwn:
    """A backbone as the guide shows it; keeps what it was given."""

    name, weights_sha256, layers, dim, sample_rate, precision = "own", "0", 1, 4, SAMPLES, "float32"
    device = torch.device("cpu")

    def encode(self, waveforms):
        self.given = waveforms
        return waveforms.mean(dim=1)[:, None, None, None].expand(-1, 1, 25, 4).contiguous()


def test_a_backbone_of_ones_own_is_given_float32():
    backbone, whole = OfYourOwn(), samples_int16(2)
    encode_to_host(backbone, whole, "float32")
    assert backbone.given.dtype == torch.float32
    np.testing.assert_array_equal(backbone.given.numpy(), as_float(whole.numpy()))


class Small(OfYourOwn):
    """Has memory for so many clips."""

    def __init__(self, room: int):
        self.room, self.sizes = room, []

    def encode(self, waveforms):
        self.sizes.append(len(waveforms))
        if len(waveforms) > self.room:
            raise torch.OutOfMemoryError("full")
        return super().encode(waveforms)


@pytest.mark.parametrize("with_out", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_does_not_fit_is_learnt_once(dtype, with_out):
    backbone, waveforms = Small(4), samples_int16(16)
    expected = encode_to_host(OfYourOwn(), waveforms, dtype)
    for _ in range(3):
        out = shard_block(16, dtype, 1, 4) if with_out else None
        found = encode_to_host(backbone, waveforms, dtype, out)
        assert_same(found, expected)
        assert out is None or out.features.data_ptr() == found.features.data_ptr()
    assert backbone.sizes == [16, 8, 4, 4, 4, 4] + [4, 4, 4, 4] * 2, "tried too large once each"
    note = encode.FITTING.note(backbone, SAMPLES, 16)
    assert "batches of 16 clips did not fit in the memory of cpu and were encoded 4 clips at a time" in note
    assert encode.FITTING.note(backbone, SAMPLES, 4) is None


def test_one_clip_that_does_not_fit_is_an_error():
    with pytest.raises(WhisperATError, match="one clip of 1 s does not fit in the memory of cpu; free some memory"):
        encode_to_host(Small(0), samples_int16(3), "float16")


def test_two_threads_that_run_out_at_once_halve_the_batch_once():
    fitting, backbone = FittingBatches(), OfYourOwn()
    for _ in range(2):
        fitting.failed(backbone, SAMPLES, 64)
    assert fitting.most(backbone, SAMPLES) == 32
    assert fitting.most(backbone, 2 * SAMPLES) is None, "of another length nothing is known"


def state_that_overflows(dim: int = 64, layers: int = 2) -> dict[str, torch.Tensor]:
    """Weights of a Whisper encoder whose first block passes 65504 within a product, and comes back."""
    from whisper.model import AudioEncoder

    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = AudioEncoder(80, 1500, dim, 2, layers).state_dict()
    state["blocks.0.mlp.0.weight"] = torch.zeros(4 * dim, dim)
    state["blocks.0.mlp.0.weight"][0, 0] = 1e5
    state["blocks.0.mlp.2.weight"] = torch.zeros(dim, 4 * dim)
    state["blocks.0.mlp.2.weight"][0, 0] = 1e-6
    return {f"encoder.{name}": tensor for name, tensor in state.items()}


class Weights:
    """Stands for WhisperWeights of a file."""

    name, dims = "big", {"n_audio_head": 2}

    def __init__(self, state, sha256="1"):
        self.state, self.sha256 = state, sha256

    def encoder_sha256(self):
        return self.sha256


def overflowing(**reload):
    from whisper_at_cli.extract.backbones import WhisperBackbone

    weights = Weights(state_that_overflows())
    return WhisperBackbone.from_weights(weights, device=torch.device("cpu"), precision="float16", **reload)


def test_a_clip_that_overflows_is_encoded_again_in_float32_by_itself(monkeypatch):
    loads = []

    def reload():
        loads.append(threading.get_ident())
        return Weights(state_that_overflows())

    backbone, waveforms = overflowing(reload=reload), samples_int16(4)
    twin = load_float32()
    bad = ~backbone.encode(waveforms).isfinite().flatten(1).all(dim=1)
    assert bad.any(), "the planted weights overflow in float16"
    assert not loads, "nothing is loaded before it is needed"
    found = encode_to_host(backbone, waveforms, "float32")
    assert found.finite.all() and torch.equal(found.redone, bad)
    for clip in range(4):
        alone = twin if bad[clip] else backbone
        assert torch.equal(found.features[clip], alone.encode(waveforms[clip : clip + 1])[0]) or not bad[clip]
    out = shard_block(4, "float32", 2)
    assert torch.equal(encode_to_host(backbone, waveforms, "float32", out).redone, bad)
    assert torch.equal(out.features, found.features) and out.finite.all()
    threads = [threading.Thread(target=backbone.in_float32) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(loads) == 1, "loaded once"


def load_float32():
    from whisper_at_cli.extract.backbones import WhisperBackbone

    return WhisperBackbone.from_weights(
        Weights(state_that_overflows()), device=torch.device("cpu"), precision="float32"
    )


def test_without_a_way_to_read_the_weights_again_the_clip_stays_unfinished():
    found = encode_to_host(overflowing(), samples_int16(2), "float16")
    assert not found.finite.all() and found.redone is None


def test_weights_that_changed_on_disk_are_not_mixed_in():
    backbone = overflowing(reload=lambda: Weights(state_that_overflows(), sha256="2"))
    with pytest.raises(WeightsError, match="the weights of big have changed on disk since they were loaded"):
        backbone.in_float32()


def test_what_storage_alone_cannot_hold_is_not_encoded_again():
    class Large(OfYourOwn):
        precision = "float16"

        def encode(self, waveforms):
            return super().encode(waveforms) * 0 + 1e6

        def in_float32(self):
            raise AssertionError("float32 products do not help")

    found = encode_to_host(Large(), samples_int16(2), "float16")
    assert not found.finite.any() and found.redone is None


def test_extract_counts_the_clips_that_were_encoded_again(tmp_path):
    for index in range(3):
        write_wav(tmp_path / "sounds" / "a" / f"{index}.wav", noise(index, 1))
    backbone = overflowing(reload=lambda: Weights(state_that_overflows()))
    report = extract(tmp_path / "sounds", tmp_path / "a.zarr", model=backbone, clip_seconds=1.0)
    assert (report.written, report.failed) == (3, 0) and report.redone_in_float32 > 0
    assert FeatureCache.open(tmp_path / "a.zarr").spec.precision == "float16"
    again = extract(tmp_path / "sounds", tmp_path / "a.zarr", model=backbone, clip_seconds=1.0)
    assert again.redone_in_float32 == 0


def test_a_loaded_model_reads_its_weights_again_for_float32(tiny_en):
    backbone = load_backbone(tiny_en, device="cpu", precision="float16")
    twin = backbone.in_float32()
    assert (twin.precision, twin.weights_sha256) == ("float32", backbone.weights_sha256)
    assert twin.in_float32() is twin and backbone.in_float32() is twin


def test_a_thread_has_one_stream_on_a_device_however_the_device_is_written(monkeypatch):
    made = []

    class Stream:
        def __init__(self, device):
            made.append(device)

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    streams = [encode._stream(torch.device(name)) for name in ("cuda", "cuda:1", "cuda", "cuda:0", "cuda:1")]
    assert made == [torch.device("cuda", 1), torch.device("cuda", 0)]
    assert streams[0] is streams[1] is streams[2] is streams[4] is not streams[3]
    other = threading.Thread(target=lambda: encode._stream(torch.device("cuda")))
    other.start()
    other.join()
    assert len(made) == 3, "another thread has its own"
    del encode._thread.streams
    assert with_index(torch.device("cuda")) == torch.device("cuda", 1) and with_index(torch.device("cpu")).index is None


def test_encoders_from_one_state_are_equal():
    """What the tests above rest on."""
    first, second = (encoder_from_state(state_that_overflows(), heads=2) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


class OnCuda(OfYourOwn):
    """Claims to be on a GPU; each clip takes so many bytes."""

    device = torch.device("cuda", 0)

    def __init__(self, memory, bytes_per_clip):
        self.memory, self.bytes_per_clip, self.sizes = memory, bytes_per_clip, []

    def encode(self, waveforms):
        self.sizes.append(len(waveforms))
        self.memory.use(len(waveforms) * self.bytes_per_clip)
        return super().encode(waveforms)


class Memory:
    """A GPU's memory, as torch.cuda tells of it."""

    def __init__(self, monkeypatch, total):
        self.total, self.peak = total, 0
        for name in ("reset_peak_memory_stats", "synchronize"):
            monkeypatch.setattr(torch.cuda, name, lambda *_: None)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 0)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: self.peak)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (total, total))

    def use(self, count):
        if count > self.total:
            raise torch.OutOfMemoryError("full")
        self.peak = count


@pytest.mark.parametrize(
    "total, expected, probes",
    [(10**9, 256, [8]), (32 * 1000 / 0.4, 32, [8]), (31 * 1000 / 0.4, 16, [8]), (8000, 8, [8]), (2500, 2, [8, 4, 2])],
)
def test_the_batch_is_the_largest_power_of_two_that_fits_beside_another(monkeypatch, total, expected, probes):
    backbone = OnCuda(Memory(monkeypatch, total), 1000)
    assert devices.fitting_batch_size(backbone, SAMPLES) == expected and backbone.sizes == probes
    assert 64 % min(expected, 64) == 0, "it fills a shard of 64 clips"


def test_what_storage_takes_counts_for_the_batch_size(monkeypatch):
    memory = Memory(monkeypatch, 80000 / 0.4)
    backbone = OnCuda(memory, 100)
    assert devices.fitting_batch_size(backbone, SAMPLES, "int8") == 256
    original = devices.to_storage

    def takes_memory(features, dtype):
        memory.use(8 * 1000)
        return original(features, dtype)

    monkeypatch.setattr(devices, "to_storage", takes_memory)
    assert devices.fitting_batch_size(backbone, SAMPLES, "int8") == 64


def test_a_gpu_without_room_for_one_clip_is_an_error(monkeypatch):
    with pytest.raises(WhisperATError, match="one clip of 1 s does not fit in the memory of cuda:0"):
        devices.fitting_batch_size(OnCuda(Memory(monkeypatch, 10), 1000), SAMPLES)


def test_compile_is_for_the_batch_size_that_is_used(monkeypatch):
    backbone, compiled = make_backbone(), []

    def compile(encoder, *, dynamic):
        assert dynamic is False
        return lambda mel: compiled.append(len(mel)) or encoder(mel)

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(backbone, "device", torch.device("cuda", 0))
    backbone.compile(4)
    backbone.compile(4)
    monkeypatch.undo()
    for clips in (8, 4, 4, 3):
        backbone.encode(samples_int16(clips))
    assert compiled == [4, 4], "no other batch waits for the compiler"


def test_float32_on_a_gpu_is_true_float32_and_says_what_it_costs(monkeypatch):
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        precision.use_true_float32(torch.device("cpu"))
        assert torch.get_float32_matmul_precision() == "high", "no GPU, nothing to change"
        precision.use_true_float32(torch.device("cuda", 0))
        assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before)
    assert "69 against 616 clips/s" in precision.cost_note(OnCuda(None, 0))
    assert precision.cost_note(OfYourOwn()) is None


def test_without_triton_the_plain_path_is_taken(monkeypatch):
    monkeypatch.setitem(sys.modules, "whisper_at_cli.extract.backbones.kernels", None)
    assert encoder._kernels_problem(64, torch.float16, torch.device("cpu")) == "Triton is not installed"
