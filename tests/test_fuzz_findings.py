"""What fuzzing found in files that others wrote: each stays a clear refusal, without much time or memory."""

import hashlib
import json
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from whisper_forms import random_whisper, write_form

from whisper_at_cli.extract import extract
from whisper_at_cli.extract.audio.decode import audio_seconds, load_clip
from whisper_at_cli.extract.backbones.ctranslate2 import Variables, read_ctranslate2
from whisper_at_cli.extract.backbones.weights import read_weights
from whisper_at_cli.extract.datasets import waveforms
from whisper_at_cli.extract.errors import AudioError, UsageError, WeightsError, WhisperATError
from whisper_at_cli.heads.checkpoint import HeadDescription, load_head, save_head, to_safetensors, trained_id_hashes
from whisper_at_cli.heads.forms import build_head
from whisper_at_cli.heads.original import read_state

FUZZ = Path(__file__).parent / "fuzz" / "fuzz.py"


def test_no_reader_has_a_finding_within_a_few_hundred_inputs(tmp_path):
    """A glance at what `make fuzz` does for long; the same inputs each time."""
    command = [sys.executable, FUZZ, "all", "--inputs", "100", "--seed", "7", "--findings", tmp_path]
    done = subprocess.run(list(map(str, command)), check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    records = {record["reader"]: record for record in json.loads(done.stdout)}
    assert records.keys() == {"manifest", "ctranslate2", "cache", "hdf5", "heads", "sounds"}
    for record in records.values():
        assert record["inputs"] == 100 and record["accepted"] > 0 and record["refused"] > 10, record


def test_the_fuzzer_sees_a_reader_that_fails(tmp_path):
    """An exception, a signal, and memory: each is a finding, kept as the input that led to it."""
    code = f"""
import os, sys
sys.path[:0] = [{str(FUZZ.parent)!r}]
from pathlib import Path
import engine
from whisper_at_cli.extract.errors import UsageError

def read(folder):
    data = (folder / "input.bin").read_bytes()
    if data == b"1": raise KeyError("a")
    if data == b"2": os.abort()
    if data == b"3": return str(len(bytearray(b"a") * (600 << 20)))
    if data == b"4": raise UsageError("it is bad")
    if data == b"5": raise UsageError(f"{{folder}}/input.bin is bad")
    return "read"

seeds = [{{"input.bin": bytes([48 + number])}} for number in range(6)]
reader = engine.Reader("planted", lambda folder: seeds, lambda files, rng, other: files, read)
tally = engine.fuzz(reader, cpu_seconds=60, inputs=6, seed=0, findings=Path({str(tmp_path)!r}))
print(dict(tally.kinds))
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == str({"accepted": 1, "exception": 2, "signal": 1, "memory": 1, "refused": 1}), done
    kept = {
        (folder / "input" / "input.bin").read_text(): (folder / "finding.json").read_text()
        for folder in tmp_path.iterdir()
    }
    assert kept.keys() == {"1", "2", "3", "4"}
    assert "KeyError" in kept["1"] and "SIGABRT" in kept["2"] and "names no file" in kept["4"]


# CTranslate2


def model_bin(variables) -> bytes:
    """A model.bin of (name, shape, type, bytes)."""

    def text(value: str) -> bytes:
        return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"

    parts = [struct.pack("<I", 6), text("WhisperSpec"), struct.pack("<II", 3, len(variables))]
    for name, shape, kind, data in variables:
        parts += [text(name), struct.pack(f"<B{len(shape)}IBI", len(shape), *shape, kind, len(data)), data]
    return b"".join([*parts, struct.pack("<I", 0)])


def test_a_model_of_single_numbers_is_refused_as_damaged(tmp_path):
    """len() of one number was a TypeError."""
    names = ("encoder/position_encodings/encodings", "encoder/conv1/weight", "encoder/conv1/bias",
             "encoder/conv2/weight", "encoder/conv2/bias")  # fmt: skip
    layer = "encoder/layer_0/self_attention"
    names += (f"{layer}/layer_norm/gamma", f"{layer}/layer_norm/beta", f"{layer}/linear_0/weight")
    (tmp_path / "model.bin").write_bytes(model_bin([(name, [], 0, struct.pack("<f", 1)) for name in names]))
    with pytest.raises(WeightsError, match="model.bin is damaged: its arrays have other shapes"):
        read_ctranslate2(tmp_path)
    whole = [("a", [], 1, b"\x01"), ("a_scale", [], 0, struct.pack("<f", 1))]
    (tmp_path / "model.bin").write_bytes(model_bin(whole))
    with pytest.raises(WeightsError, match="model.bin"):
        read_ctranslate2(tmp_path)


def test_one_number_in_bfloat16_is_read_as_an_array(tmp_path):
    """NumPy's shift of an array of one number gives no array."""
    (tmp_path / "model.bin").write_bytes(model_bin([("a", [], 5, struct.pack("<H", 0x3FC0))]))
    assert torch.equal(Variables(tmp_path / "model.bin").tensor("a"), torch.tensor(1.5))


def test_alignment_heads_that_are_infinite_do_not_keep_a_model_from_being_read(tmp_path):
    folder = write_form(random_whisper("en"), "ct2-float16", tmp_path)
    (folder / "config.json").write_text('{"alignment_heads": [[Infinity, 0]]}')
    assert read_weights(folder).alignment_heads is None


# HDF5 packs


def pack(path: Path, **parts) -> Path:
    with h5py.File(path, "w") as file:
        whole = {"audio_name": np.array([b"a.wav", b"b.wav"]), "waveform": np.zeros((2, 50), "i2")}
        for name, value in (whole | parts).items():
            if isinstance(value, dict):
                file.create_dataset(name, **value)
            elif value is not None:
                file[name] = value
    return path


@pytest.mark.parametrize("name", ["audio_name", "target", "fold"])
def test_a_pack_that_declares_more_than_it_holds_is_refused_at_once(tmp_path, name):
    """HDF5 would fill memory with what was never written."""
    shape = {"audio_name": (2**31,), "target": (2, 2**40), "fold": (2**40,)}[name]
    kind = "S8" if name == "audio_name" else "f4"
    path = pack(tmp_path / "a.h5", **{name: {"shape": shape, "dtype": kind, "chunks": (1,) * len(shape)}})
    with pytest.raises(UsageError, match=rf"a.h5: {name} is .* more than the file holds"):
        waveforms.read(path)


def test_a_waveform_in_huge_chunks_is_refused(tmp_path):
    path = pack(tmp_path / "a.h5", waveform={"shape": (2, 2**31), "dtype": "i2", "chunks": (1, 2**30)})
    with pytest.raises(UsageError, match="a.h5: waveform is packed in chunks of"):
        waveforms.read(path)


@pytest.mark.parametrize("rate", [np.inf, np.nan, "16000", [16000, 1], b"x", h5py.Empty("f4"), np.void(b"ab")])
def test_a_sample_rate_that_is_no_number_is_refused(tmp_path, rate):
    path = pack(tmp_path / "a.h5")
    with h5py.File(path, "a") as file:
        file.attrs["sample_rate"] = rate
    with pytest.raises(UsageError, match="a.h5"):
        waveforms.read(path)


def test_a_sample_rate_in_an_array_of_one_is_a_sample_rate(tmp_path):
    path = pack(tmp_path / "a.h5")
    with h5py.File(path, "a") as file:
        file.attrs["sample_rate"] = [16000]
    assert waveforms.read(path).rate == 16000


@pytest.mark.parametrize("fold", [[1, -1], [1, 40000], [np.nan, 1.0]])
def test_a_fold_that_no_cache_can_hold_is_refused(tmp_path, fold):
    with pytest.raises(UsageError, match="a.h5: fold"):
        waveforms.read(pack(tmp_path / "a.h5", fold=np.array(fold)))


def test_names_that_are_tables_are_refused_on_one_line(tmp_path):
    path = pack(tmp_path / "a.h5", audio_name=np.zeros((2, 30, 30), "i4"))
    with pytest.raises(UsageError, match="a.h5: audio_name holds") as raised:
        waveforms.read(path)
    assert "\n" not in str(raised.value)


def test_a_heap_of_texts_that_goes_round_in_circles_is_refused(tmp_path):
    """One byte says that a text is longer than it is; the library then walks zeros for ever."""
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("audio_name", data=["a.wav", "b.wav"], dtype=h5py.string_dtype())
        file["waveform"] = np.zeros((2, 50), "i2")
    assert [clip.path for clip in waveforms.read(tmp_path / "a.h5").clips] == ["a.wav", "b.wav"]
    data = bytearray((tmp_path / "a.h5").read_bytes())
    sizes = [data.find(name) - 8 for name in (b"a.wav\0\0\0", b"b.wav\0\0\0")]
    assert data[sizes[0]] == 5
    data[sizes[0]] = 0x15
    (tmp_path / "a.h5").write_bytes(data)
    with pytest.raises(UsageError, match="a.h5 cannot be read: the file is corrupt"):
        waveforms.read(tmp_path / "a.h5")


# Heads


def change_json(path: Path, change) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def small_head(folder: Path) -> Path:
    torch.manual_seed(0)
    head = build_head("wa-mlp", layers=2, dim=4, classes=3)
    description = HeadDescription(
        head="wa-mlp", layers=2, dim=4, frames=25, class_names=("a", "b", "c"), backbone="b", weights_sha256="0",
        clip_seconds=5.0, loss="bce",
    )  # fmt: skip
    return save_head(head, folder / "head", description, trained_ids=["x"])


def replace_tensors(folder: Path, name: str, content: bytes) -> None:
    """Other bytes for NAME.safetensors, with the checksum in head.json that they should have."""
    (folder / f"{name}.safetensors").write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    change_json(folder / "head.json", lambda record: record.update({f"{name}_sha256": digest}))


@pytest.mark.parametrize("content", [b"", b"\xff" * 40, b"\x02\0\0\0\0\0\0\0{]", b"\x08\0\0\0\0\0\0\0" + b'{"a":{}}'])
def test_a_head_whose_tensors_are_none_is_damaged(tmp_path, content):
    folder = small_head(tmp_path)
    replace_tensors(folder, "head", content)
    replace_tensors(folder, "trained_on", content)
    for read in (load_head, trained_id_hashes):
        with pytest.raises(WhisperATError, match="safetensors is damaged") as raised:
            read(folder)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "tensors", [{}, {"id_hash": torch.zeros(3)}, {"id_hash": torch.zeros(2, 2, dtype=torch.int64)}]
)
def test_a_list_of_ids_that_is_none_is_damaged(tmp_path, tensors):
    folder = small_head(tmp_path)
    replace_tensors(folder, "trained_on", to_safetensors(tensors))
    with pytest.raises(WhisperATError, match="trained_on.safetensors is damaged: it holds no list of ids"):
        trained_id_hashes(folder)


@pytest.mark.parametrize(
    "wrong",
    [
        {"dim": 10**6}, {"layers": 3}, {"layers": 2.0}, {"layers": True}, {"layers": 10**12}, {"frames": "25"},
        {"class_names": ["a"]}, {"class_names": [1, 2, 3]}, {"class_names": 3}, {"width": "8"}, {"width": 8},
        {"clip_seconds": "5"}, {"clip_seconds": float("nan")}, {"backbone": None}, {"head": []}, {"more": 1},
    ],
)  # fmt: skip
def test_a_head_that_is_described_wrongly_is_one_line_and_takes_no_memory(tmp_path, wrong):
    folder = small_head(tmp_path)
    change_json(folder / "head.json", lambda record: record.update(wrong))
    with pytest.raises(WhisperATError, match="head.json does not fit its weights") as raised:
        load_head(folder)
    assert "\n" not in str(raised.value)


def test_a_head_json_that_is_nested_without_end_is_damaged(tmp_path):
    folder = small_head(tmp_path)
    (folder / "head.json").write_text("[" * 100_000)
    with pytest.raises(WhisperATError, match="head.json is damaged"):
        load_head(folder)


PICKLES = {
    "a stack that is empty": b"\x80\x02.",
    "a number cut off": b"\x80\x02J\x01",
    "a storage that is none": b"\x80\x02X\x01\x00\x00\x00aQ.",
    "an attribute of nothing": b"\x80\x02}b.",
}


@pytest.mark.parametrize("kind", PICKLES)
def test_a_head_of_a_pickle_that_is_none_is_refused(tmp_path, kind):
    with zipfile.ZipFile(tmp_path / "head.pth", "w") as archive:
        archive.writestr("a/data.pkl", PICKLES[kind])
        archive.writestr("a/version", "3\n")
    with pytest.raises(WhisperATError, match="head.pth is not a file of tensors alone") as raised:
        read_state(tmp_path / "head.pth")
    assert "\n" not in str(raised.value)


def test_a_head_that_declares_larger_tensors_than_its_file_holds_is_damaged(tmp_path):
    torch.save(
        {"module.mlp_layer.1.weight": torch.zeros(1, dtype=torch.float16).expand(2**20, 2**20)}, tmp_path / "a.pth"
    )
    with pytest.raises(WhisperATError, match="a.pth is damaged: it declares larger tensors than it holds"):
        read_state(tmp_path / "a.pth")


@pytest.mark.parametrize("tensor", [torch.zeros(3, 4).to_sparse(), torch.zeros(3, 4, dtype=torch.complex64)])
def test_a_head_of_tensors_that_are_no_plain_arrays_is_refused(tmp_path, tensor):
    torch.save({"module.mlp_layer.1.weight": tensor}, tmp_path / "a.pth")
    with pytest.raises(WhisperATError, match="a.pth"):
        read_state(tmp_path / "a.pth")


def test_a_head_packed_to_a_thousandth_is_refused_before_it_is_unpacked(tmp_path):
    torch.save({"module.mlp_layer.1.weight": torch.zeros(1000, 1000)}, tmp_path / "a.pth")
    packed = zipfile.ZipFile(tmp_path / "b.pth", "w", zipfile.ZIP_DEFLATED)
    with packed, zipfile.ZipFile(tmp_path / "a.pth") as plain:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    with pytest.raises(WhisperATError, match="b.pth is damaged in 'its list of records'"):
        read_state(tmp_path / "b.pth")


# Audio


def wav(*, codec: int = 1, chunks: bytes = b"") -> bytes:
    head = struct.pack("<HHIIHH", codec, 1, 16000, 32000, 2, 16)
    tone = (np.sin(np.arange(8000) * 0.2) * 9999).astype("<i2").tobytes()
    body = b"WAVEfmt " + struct.pack("<I", len(head)) + head + chunks + b"data" + struct.pack("<I", len(tone)) + tone
    return b"RIFF" + struct.pack("<I", len(body)) + body


def asked_all(path: Path) -> list[str]:
    """What is said of a file by whatever reads it."""
    found = []
    for ask in (lambda: load_clip(path, 8000), lambda: load_clip(path, 800, start=0.2), lambda: audio_seconds(path)):
        with pytest.raises(AudioError) as raised:
            ask()
        found.append(str(raised.value))
    return found


def test_audio_of_a_codec_that_nobody_knows_fails_alone(tmp_path, random_backbone):
    """It was an AttributeError, which ended the whole extraction."""
    (tmp_path / "a.wav").write_bytes(wav(codec=0xFF10))
    assert all("a codec that FFmpeg does not know" in reason for reason in asked_all(tmp_path / "a.wav"))
    (tmp_path / "b.wav").write_bytes(wav())
    (tmp_path / "m.csv").write_text("audio,start\na.wav,0\na.wav,0.1\nb.wav,0\n")
    report = extract(tmp_path / "m.csv", tmp_path / "a.zarr", model=random_backbone, clip_seconds=0.5)
    assert (report.written, report.failed) == (1, 2)


def test_a_chunk_that_is_larger_than_its_file_takes_no_memory(tmp_path):
    """FFmpeg makes room for what a LIST chunk says, a gigabyte here."""
    huge = b"LIST" + struct.pack("<I", 2**30) + b"INFOISFT" + struct.pack("<I", 2**29)
    (tmp_path / "a.wav").write_bytes(wav(chunks=huge))
    assert all("its chunk b'LIST' says 1073741824 bytes" in reason for reason in asked_all(tmp_path / "a.wav"))
    (tmp_path / "b.wav").write_bytes(wav(chunks=b"LIST" + struct.pack("<I", 12) + b"INFOISFT\0\0\0\0"))
    assert load_clip(tmp_path / "b.wav", 8000)[1] == 8000


def test_a_file_of_empty_chunks_is_not_walked_to_its_end(tmp_path):
    (tmp_path / "a.wav").write_bytes(b"RIFF\xff\xff\xff\x7fWAVE" + b"junk\0\0\0\0" * 2_000_000)
    begin = time.process_time()
    assert all("more than 9999 chunks" in reason for reason in asked_all(tmp_path / "a.wav"))
    assert time.process_time() - begin < 3
