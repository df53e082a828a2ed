"""Where FFmpeg or its filter graph is left out, the samples are those that it gives; and what reading costs."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest

from conftest import noise, write_wav
from whisper_at_cli.extract.audio import opened, resample
from whisper_at_cli.extract.audio.decode import audio_seconds, decode_int16
from whisper_at_cli.extract.audio.opened import AudioFile

FFMPEG = imageio_ffmpeg.get_ffmpeg_exe()
FOLDERS = {"wav": "u8 s16le s24le s32le s64le f32le f64le alaw mulaw", "aiff": "s8 s16be s24be s32be f32be f64be",
           "au": "s8 s16be s24be s32be f32be f64be alaw mulaw", "w64": "u8 s16le s24le s32le f32le f64le",
           "caf": "s8 s16be s16le s24be s32le f32be f64le alaw mulaw"}  # fmt: skip
FORMS = [(suffix, f"pcm_{codec}") for suffix, codecs in FOLDERS.items() for codec in codecs.split()]
FORMS += [("flac", "flac"), ("flac", "flac -sample_fmt s32"), ("wv", "wavpack"), ("m4a", "alac"), ("mka", "pcm_s16le"),
          ("mov", "pcm_s16be"), ("wav", "adpcm_ima_wav"), ("wav", "adpcm_ms"), ("tta", "tta"),
          ("wav", "pcm_s16le -rf64 always")]  # fmt: skip


def made(folder: Path, suffix: str, codec: str, rate: int, channels: int) -> Path:
    """1.3 s of noise in this form."""
    sound = np.stack([noise(seed, 1.3, rate) for seed in range(channels)], axis=1)
    source = write_wav(folder / "source.wav", sound, rate)
    path = folder / f"made.{suffix}"
    subprocess.run([FFMPEG, "-v", "error", "-y", "-i", source, "-c:a", *codec.split(), path], check=True)
    return path


def by_graph(path: Path, monkeypatch, **options) -> np.ndarray:
    """The samples by FFmpeg's demuxer and its filter graph, whatever they are."""
    with monkeypatch.context() as patch:
        patch.setattr(resample.Unchanged, "FORMS", ())
        patch.setattr(opened.AudioFile, "riff", None)
        return decode_int16(path, **options)


@pytest.mark.parametrize("rate, channels", [(16000, 1), (16000, 2), (44100, 1), (44100, 2), (8000, 1)])
@pytest.mark.parametrize("suffix, codec", FORMS)
def test_every_pcm_form_has_the_samples_of_the_graph(tmp_path, monkeypatch, suffix, codec, rate, channels):
    path = made(tmp_path, suffix, codec, rate, channels)
    for options in ({}, {"start": 0.4, "max_seconds": 0.31}, {"start": 0.7001}):
        expected = by_graph(path, monkeypatch, **options)
        found = decode_int16(path, **options)
        assert found.dtype == np.int16 and len(found) == len(expected), options
        np.testing.assert_array_equal(found, expected)
    start = decode_int16(path, max_seconds=0.5)
    np.testing.assert_array_equal(start[:8000], decode_int16(path)[:8000])
    seconds, exact = audio_seconds(path)
    assert seconds == pytest.approx(len(decode_int16(path)) / 16000, abs=0.001 if exact else 0.05)


def test_the_graph_is_left_out_only_where_it_has_nothing_to_do(tmp_path, monkeypatch):
    built = []
    original = resample.Resampler.__init__
    monkeypatch.setattr(resample.Resampler, "__init__", lambda *a, **b: built.append(a) or original(*a, **b))
    for suffix, codec, rate, channels, graphs in (
        ("wav", "pcm_s16le", 16000, 1, 0), ("flac", "flac", 16000, 1, 0), ("aiff", "pcm_s16be", 16000, 1, 0),
        ("wav", "pcm_u8", 16000, 1, 1), ("wav", "pcm_s16le", 16000, 2, 1), ("wav", "pcm_s16le", 16001, 1, 1),
        ("flac", "flac -sample_fmt s32", 16000, 1, 1),
    ):  # fmt: skip
        built.clear()
        decode_int16(made(tmp_path, suffix, codec, rate, channels))
        assert len(built) == graphs, (suffix, codec, rate, channels)


def riff(*chunks: tuple[bytes, bytes], tag: bytes = b"WAVE") -> bytes:
    body = tag + b"".join(name + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2) for name, data in chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def form(tag=1, channels=1, rate=16000, width=2, bits=16, more=b"") -> tuple[bytes, bytes]:
    return b"fmt ", struct.pack("<HHIIHH", tag, channels, rate, rate * width, width, bits) + more


TONE = (np.sin(np.arange(8000) * 0.2) * 9999).astype("<i2").tobytes()
FLOATS = (np.sin(np.arange(8000) * 0.2) * 0.3).astype("<f4").tobytes()
LIST = (b"LIST", b"INFOISFT\x05\0\0\0Lavf\0\0")
PCM_GUID = bytes.fromhex("0100000000001000800000aa00389b71")
ODD_WAVS = {
    "chunks before": riff((b"JUNK", bytes(28)), form(), LIST, (b"fact", bytes(4)), (b"data", TONE)),
    "an odd chunk": riff(form(), (b"note", b"abc"), (b"data", TONE)),
    "chunks behind": riff(form(), (b"data", TONE), LIST, (b"id3 ", bytes(11))),
    "junk behind": riff(form(), (b"data", TONE)) + bytes(range(256)) * 9,
    "a LIST behind that lies": riff(form(), (b"data", TONE)) + b"LIST\xff\xff\xff\x3fINFOISFT\xff\xff\xff\x2f",
    "floats and junk behind": riff(form(3, width=4, bits=32), (b"data", FLOATS)) + bytes(range(256)) * 9,
    "floats and a LIST that lies":
        riff(form(3, width=4, bits=32), (b"data", FLOATS)) + b"LIST\xff\xff\xff\x3fINFOISFT\xff\xff\xff\x2f",
    "half a sample": riff(form(), (b"data", TONE + b"a")),
    "two data chunks": riff(form(), (b"data", TONE), (b"data", TONE[::-1])),
    "data before its form": riff((b"data", TONE), form()),
    "two forms": riff(form(rate=8000), form(), (b"data", TONE)),
    "a long form": riff(form(more=b"\0\0"), (b"data", TONE)),
    "extensible": riff(form(0xFFFE, more=struct.pack("<HHI", 22, 16, 4) + PCM_GUID), (b"data", TONE)),
    "another width": riff(form(width=4), (b"data", TONE)),
    "12 of 16 bits": riff(form(bits=12), (b"data", TONE)),
    "no samples but half of one": riff(form(), (b"data", b"a")),
    "another kind of RIFF": riff(form(), (b"data", TONE), tag=b"AVI "),
    "MP3 inside": riff(form(0x55), (b"data", TONE)),
    "three channels": riff(form(channels=3, width=6), (b"data", TONE)),
    "S/PDIF inside": riff(form(channels=2, rate=48000, width=4),
                          (b"data", (b"\x72\xf8\x1f\x4e\x01\0\0\x18" + bytes(6136)) * 12)),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD_WAVS)
def test_odd_wav_files_are_read_as_ffmpeg_reads_them(tmp_path, monkeypatch, name):
    path = tmp_path / "a.wav"
    path.write_bytes(ODD_WAVS[name])

    def outcome(read, *arguments):
        try:
            return read(path, *arguments).tolist()
        except resample.AudioError:
            return "refused"

    assert outcome(decode_int16) == outcome(by_graph, monkeypatch)
    found = subprocess.run(
        [FFMPEG, "-v", "quiet", "-i", path, "-f", "s16le", "-ac", "1", "-ar", "16000", "-"],
        capture_output=True, check=False,
    ).stdout  # fmt: skip
    if found and "inside" not in name:
        assert np.frombuffer(found, np.int16).tolist() == outcome(decode_int16)


def test_the_wav_files_that_matter_are_read_without_ffmpeg(tmp_path):
    plain = ("chunks before", "an odd chunk", "chunks behind", "half a sample", "a long form", "junk behind",
             "a LIST behind that lies")  # fmt: skip
    for name, data in ODD_WAVS.items():
        with AudioFile(data) as file:
            assert bool(file.riff and file.riff.plain) is (name in plain or name == "no samples but half of one"), name


def test_a_file_is_opened_once(tmp_path, monkeypatch):
    """Whatever is asked of it: its head, its chunks, its tail and its samples."""
    opens = []
    original = opened.os.open
    monkeypatch.setattr(opened.os, "open", lambda path, *rest: opens.append(path) or original(path, *rest))
    for suffix, codec in (("wav", "pcm_s16le"), ("wav", "pcm_f32le"), ("flac", "flac"), ("ogg", "libvorbis"),
                          ("m4a", "aac"), ("mp3", "libmp3lame"), ("opus", "libopus")):  # fmt: skip
        path = made(tmp_path, suffix, codec, 48000, 2)
        opens.clear()
        decode_int16(path)
        assert opens == [path], suffix


def test_a_process_that_decodes_stays_small(tmp_path):
    """Nothing of the encoder, the probes or the cache is imported: hundreds of megabytes in every worker."""
    write_wav(tmp_path / "a.wav", noise(0, 2.0, 44100), 44100)
    code = (
        "import json, re, sys\nimport whisper_at_cli.extract.audio.sources as sources, av\n"
        f"real = sources.FileClip({str(tmp_path / 'a.wav')!r}).read(16000).real\n"
        "memory = int(re.search(r'VmHWM:\\s*(\\d+) kB', open('/proc/self/status').read())[1]) // 1024\n"
        "print(json.dumps([memory, real, sorted({name.split('.')[0] for name in sys.modules})]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    memory, real, modules = json.loads(done.stdout)
    assert real == 16000
    assert not {"torch", "sklearn", "zarr", "scipy", "h5py", "pyarrow", "obstore", "transformers"} & set(modules)
    assert memory <= 80, f"{memory} MB"
