"""Hostile audio: each file is extracted correctly or refused by name, none hangs, takes memory or disturbs another."""

import json
import os
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest

from conftest import noise, write_wav
from whisper_at_cli.extract import FeatureCache
from whisper_at_cli.extract.audio.decode import clip_from_samples, decode, load_clip
from whisper_at_cli.extract.errors import AudioError

FFMPEG = imageio_ffmpeg.get_ffmpeg_exe()
CLIP_SECONDS = 0.5
MEMORY_MB = 60  # beyond what the good files take; the 2 h file alone, decoded whole, would take 690
EMOJI = "\U0001f414"
RUN = (
    "import resource, sys\nfrom whisper_at_cli.cli import main\ntry:\n main(sys.argv[1:])\n"
    "except SystemExit as e:\n"
    " print(e.code, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, file=sys.stderr)"
)


def ffmpeg(*arguments) -> None:
    subprocess.run([FFMPEG, "-v", "error", "-y", *arguments], check=True)


def raw_wav(data: bytes, *, rate: int = 16000, channels: int = 1, bits: int = 16, floating: bool = False) -> bytes:
    width = channels * bits // 8
    head = struct.pack("<HHIIHH", 3 if floating else 1, channels, rate, rate * width % 2**32, width, bits)
    body = b"fmt " + struct.pack("<I", len(head)) + head + b"data" + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WAVE" + body


def make_good(folder: Path) -> None:
    for index in range(9):
        write_wav(folder / f"g{index} good.wav", noise(index, 0.3 + 0.05 * index))


def make_hostile(folder: Path) -> dict[str, str | float]:
    """Each hostile file, sorted between the good ones: its reason, or how many seconds of it are real."""
    made: dict[str, str | float] = {}
    tone = np.sin(np.arange(16000) * 0.2) * 0.3
    source = write_wav(folder.parent / "tone.wav", tone)

    def put(name: str, content: bytes, outcome: str | float) -> Path:
        name = f"g{len(made) % 9} {name}"
        (folder / name).write_bytes(content)
        made[name] = outcome
        return folder / name

    encoded = {}
    for suffix, codec in (("flac", "flac"), ("ogg", "libvorbis"), ("mp3", "libmp3lame"), ("m4a", "aac")):
        ffmpeg("-i", source, "-c:a", codec, "-movflags", "faststart", folder.parent / f"tone.{suffix}")
        encoded[suffix] = (folder.parent / f"tone.{suffix}").read_bytes()
        cut = len(encoded[suffix]) // 4
        put(f"cut.{suffix}", encoded[suffix][:cut], "truncated")
    wav = source.read_bytes()
    put("cut.wav", wav[:6000], "truncated")
    put("empty.wav", b"", "empty (0 bytes)")
    put("header.wav", wav[:44], "truncated")
    put("header.flac", encoded["flac"][:42], "")
    bad = (tone[:8000] * 0.5).astype("<f4")
    bad[500] = np.nan
    put("nan.wav", raw_wav(bad.tobytes(), bits=32, floating=True), "not finite")
    bad = (tone[:8000] * 0.5).astype("<f8")
    bad[500] = -np.inf
    put("infinite.wav", raw_wav(bad.tobytes(), bits=64, floating=True), "not finite")
    put("an mp3.wav", encoded["mp3"], 0.5)
    put("a wav.mp3", wav, 0.5)
    put("a flac.ogg", encoded["flac"], 0.5)
    put("text.flac", b"this is no sound\n" * 99, "no samples")
    put("short.wav", raw_wav((tone[:160] * 9999).astype("<i2").tobytes()), 0.01)
    many = np.repeat((tone[:8000] * 9999).astype("<i2")[:, None], 32, axis=1)
    put("32 channels.wav", raw_wav(many.tobytes(), channels=32), 0.5)
    put("8 kHz 8 bit.wav", raw_wav((tone[:8000] * 99 + 128).astype(np.uint8).tobytes(), rate=8000, bits=8), 0.5)
    put(
        "192 kHz float.wav",
        raw_wav(np.repeat(tone, 12).astype("<f4").tobytes(), rate=192000, bits=32, floating=True),
        0.5,
    )
    put("1 Hz.wav", raw_wav(wav[44:], rate=1), "sample rate is 1 Hz")
    put("1000 channels.wav", raw_wav(wav[44:30044], channels=1000), "cannot be decoded")
    put("playlist.wav", b"ffconcat version 1.0\nfile 'fifo.wav'\n", "playlist")
    put("playlist.m4a", b"#EXTM3U\n#EXTINF:1,\nfifo.wav\n", "playlist")
    put("new\nline.wav", wav, 0.5)
    put(f"{EMOJI * 60}.wav", wav, 0.5)
    put(os.fsdecode(b"not text \xff.wav"), wav, 0.5)
    ffmpeg("-f", "lavfi", "-i", "sine=440:d=7200:r=8000", "-c:a", "flac", folder / "g0 two hours.flac")
    (folder / "g1 folder.wav").mkdir()
    os.mkfifo(folder / "g2 fifo.wav")
    os.mkfifo(folder / "fifo.wav")
    (folder / "g3 gone.wav").symlink_to(folder / "nothing.wav")
    (folder / "g4 loop.wav").symlink_to(folder / "g4 loop.wav")
    return made | {
        "g0 two hours.flac": 0.5, "g1 folder.wav": "not a file", "g2 fifo.wav": "not a file", "fifo.wav": "not a file",
        "g3 gone.wav": "missing: ", "g4 loop.wav": "cannot be read",
    }  # fmt: skip


def extracted(sounds: Path, cache: Path, tiny_en: Path) -> tuple[dict, int, int]:
    """Report, exit status and peak memory in MB of a run of the command in a process of its own."""
    command = ["--quiet", "extract", sounds, cache, "--model", tiny_en, "--clip-seconds", CLIP_SECONDS, "--json"]
    done = subprocess.run(
        [sys.executable, "-c", RUN, *map(str, command)], capture_output=True, text=True, timeout=120, check=False
    )
    assert "Traceback" not in done.stderr and done.stdout, done.stderr
    status, memory = done.stderr.split("\n")[-2].split()
    return json.loads(done.stdout), int(status), int(memory)


def test_hostile_files_are_extracted_or_named_and_disturb_no_other(tmp_path, tiny_en):
    make_good(tmp_path / "good")
    make_good(tmp_path / "both")
    expected = make_hostile(tmp_path / "both")
    good, status, memory = extracted(tmp_path / "good", tmp_path / "good.zarr", tiny_en)
    assert (good["written"], good["failed"], status) == (9, 0, 0)
    both, status, memory_both = extracted(tmp_path / "both", tmp_path / "both.zarr", tiny_en)
    assert status == 1 and both["clips"] == 9 + len(expected)
    print(f"peak memory {memory} MB with the good files, {memory_both} MB with {len(expected)} hostile ones")
    assert memory_both < memory + MEMORY_MB

    reasons = {name: reason for name, reason in expected.items() if isinstance(reason, str)}
    failed = {failure["path"]: failure["error"] for failure in both["failures"]}
    assert failed.keys() == reasons.keys()
    assert {name: error for name, error in failed.items() if reasons[name] not in error} == {}
    cache, alone = FeatureCache.open(tmp_path / "both.zarr"), FeatureCache.open(tmp_path / "good.zarr")
    row_of = {path: row for row, path in enumerate(cache.paths.tolist())}
    for name, seconds in expected.items():
        if not isinstance(seconds, str):
            row = row_of[name.encode("utf-8", "backslashreplace").decode()]
            assert cache.done[row] and cache.valid_frames[row] == -(-seconds * 25 // CLIP_SECONDS), name
    for row, path in enumerate(alone.paths.tolist()):
        assert cache.features([row_of[path]]).tobytes() == alone.features([row]).tobytes(), path
        assert cache.valid_frames[row_of[path]] == alone.valid_frames[row]


def test_what_is_extracted_of_odd_files_is_the_sound_in_them(tmp_path):
    expected = (np.sin(np.arange(8000) * 0.2) * 0.3).astype(np.float32)
    (tmp_path / "both").mkdir()
    make_hostile(tmp_path / "both")
    files = {path.name[3:]: path for path in (tmp_path / "both").iterdir()}
    for name in ("a wav.mp3", "a flac.ogg", "32 channels.wav", "new\nline.wav"):
        clip, real, _ = load_clip(files[name], 8000)
        gain = 9999 / 32768 if name.startswith("32") else 1.0
        assert real == 8000 and np.abs(clip / 32768 - expected * gain).max() < 2e-3, name
    clip, real, _ = load_clip(files["short.wav"], 8000)
    assert real == 160 and not clip[160:].any()
    clip, _, _ = load_clip(files["8 kHz 8 bit.wav"], 8000)
    spectrum = np.abs(np.fft.rfft(clip))
    assert abs(spectrum.argmax() / 4000 - 0.2 / np.pi / 2) < 1e-3, "a tone of 8 kHz is read at half its frequency"


def test_a_name_of_two_hundred_emoji_in_a_manifest_is_reported(tmp_path, random_backbone):
    from whisper_at_cli.extract import extract

    name = EMOJI * 200 + ".wav"
    write_wav(tmp_path / "a.wav", noise(0, 0.5))
    (tmp_path / "m.jsonl").write_text(json.dumps({"audio": name}) + '\n{"audio": "a.wav"}\n')
    report = extract(tmp_path / "m.jsonl", tmp_path / "a.zarr", model=random_backbone, clip_seconds=0.5)
    assert (report.written, report.failures[0].path) == (1, name) and "File name too long" in report.failures[0].error


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can take another user's eyes; others: see test_audio")
def test_a_file_that_may_not_be_read_is_refused_for_that_reason():
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        path = write_wav(Path(folder) / "a.wav", noise(0, 0.5))
        path.chmod(0)
        os.seteuid(65534)
        try:
            with pytest.raises(AudioError, match="cannot be read: Permission denied"):
                decode(path)
        finally:
            os.seteuid(0)


@pytest.mark.parametrize("bits, dtype", [(8, np.uint8), (16, "<i2"), (24, None), (32, "<i4")])
@pytest.mark.parametrize("rate", [8000, 44100, 192000])
def test_every_depth_holds_the_same_tone(tmp_path, bits, dtype, rate):
    tone = np.sin(2 * np.pi * 440 * np.arange(rate) / rate) * 0.5
    if dtype is None:
        data = (tone * (2**23 - 1)).astype("<i4").view(np.uint8).reshape(-1, 4)[:, :3].tobytes()
    else:
        data = (tone * (2 ** (bits - 1) - 1) + (128 if bits == 8 else 0)).astype(dtype).tobytes()
    (tmp_path / "a.wav").write_bytes(raw_wav(data, rate=rate, bits=bits))
    samples = decode(tmp_path / "a.wav")
    at_16k = np.sin(2 * np.pi * 440 * np.arange(16000) / 16000) * 0.5
    assert np.abs(samples[200:15800] - at_16k[200:15800]).max() < (0.02 if bits == 8 else 1e-3)


def test_random_bytes_with_any_suffix_end_in_a_clear_error_or_in_sound(tmp_path):
    rng = np.random.default_rng(0)
    heads = [b"", b"RIFF\x00\x01\x00\x00WAVEfmt ", b"fLaC\0\0\0\x22", b"OggS\0\x02", b"ID3\x04\0\0\0\0\0\x10",
             b"\xff\xfb\x90\x64", b"\0\0\0\x20ftypM4A ", b"\x1a\x45\xdf\xa3"]  # fmt: skip
    for number in range(64):
        path = tmp_path / f"{number}{('.wav', '.mp3', '.ogg', '.m4a')[number % 4]}"
        path.write_bytes(heads[number % 8] + rng.bytes(int(rng.integers(1, 20000))))
        for start in (None, 0.3):
            try:
                clip, real, _ = load_clip(path, 8000, start=start)
                assert np.isfinite(clip).all() and 0 < real <= 8000
            except AudioError as error:
                assert "\n" not in str(error)


def test_samples_that_are_not_finite_in_memory_are_refused():
    with pytest.raises(AudioError, match="not finite"):
        clip_from_samples(np.array([0.1, np.nan, 0.2], dtype=np.float32), 16000, 100)
