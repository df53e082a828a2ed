"""Decoding: the samples of Whisper's own loader, and one clear reason for whatever cannot be read."""

import os
import stat
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import whisper

from conftest import noise, write_wav
from whisper_at_cli.extract.audio.decode import decode, decode_int16, load_clip
from whisper_at_cli.extract.errors import AudioError

FFMPEG = imageio_ffmpeg.get_ffmpeg_exe()


@pytest.fixture
def ffmpeg_in_path(tmp_path, monkeypatch):
    """Whisper's loader runs `ffmpeg` from PATH."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ffmpeg").symlink_to(FFMPEG)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")


def test_decoding_equals_whispers_own_loader(esc10, ffmpeg_in_path):
    for path in sorted((esc10 / "audio").iterdir())[::40]:
        np.testing.assert_array_equal(decode(path), whisper.load_audio(str(path)))


@pytest.mark.parametrize("rate, channels", [(8000, 1), (22050, 2), (48000, 6), (192000, 1)])
def test_any_rate_and_channel_count_comes_out_at_16_khz_mono(tmp_path, ffmpeg_in_path, rate, channels):
    tone = np.sin(2 * np.pi * 440 * np.arange(rate) / rate) * 0.5
    path = write_wav(tmp_path / "tone.wav", np.repeat(tone[:, None], channels, axis=1), rate)
    samples = decode(path)
    assert samples.dtype == np.float32 and abs(len(samples) - 16000) <= 32
    spectrum = np.abs(np.fft.rfft(samples[:16000]))
    assert spectrum.argmax() == 440
    theirs = whisper.load_audio(str(path))
    assert np.abs(samples[: len(theirs)] - theirs[: len(samples)]).max() < 2e-4


@pytest.mark.parametrize(
    "codec, suffix", [("flac", "flac"), ("libmp3lame", "mp3"), ("libopus", "opus"), ("aac", "m4a")]
)
def test_compressed_formats_decode_to_the_same_sound(tmp_path, codec, suffix):
    source = write_wav(tmp_path / "source.wav", noise(1, 2.0))
    path = tmp_path / f"sound.{suffix}"
    subprocess.run([FFMPEG, "-v", "error", "-i", source, "-c:a", codec, path], check=True)
    samples = decode(path)
    assert abs(len(samples) - 32000) < 1600
    assert 0.5 < samples.std() / decode(source).std() < 1.5


def test_a_start_of_a_file_is_the_start_of_the_whole(esc10):
    """Decoding stops early, and what was decoded until then is not touched by it."""
    for path in sorted((esc10 / "audio").iterdir())[::100]:
        np.testing.assert_array_equal(decode(path, max_seconds=1.5)[:24000], decode(path)[:24000])


def test_damaged_files_end_in_an_error_or_in_samples_on_many_threads(esc10, tmp_path):
    """Bytes changed at random in real files; a crash of the decoder would take all clips with it."""
    rng = np.random.default_rng(0)
    paths = []
    for source in sorted((esc10 / "audio").iterdir())[:40]:
        data = np.frombuffer(source.read_bytes(), dtype=np.uint8).copy()
        data[rng.integers(len(data), size=20)] = rng.integers(256, size=20)
        paths.append(tmp_path / source.name)
        paths[-1].write_bytes(data.tobytes())

    def outcome(path):
        try:
            return len(decode(path))
        except AudioError as error:
            return str(error)

    with ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(outcome, paths))
    assert all(isinstance(found, str) or found > 0 for found in outcomes)


def test_a_clip_is_cut_or_zero_padded_and_says_how_much_is_real(tmp_path):
    path = write_wav(tmp_path / "a.wav", noise(0, 2.0))
    cut, real, _ = load_clip(path, 16000)
    assert len(cut) == 16000 and real == 16000
    np.testing.assert_array_equal(cut, decode_int16(path)[:16000])
    padded, real, _ = load_clip(path, 48000)
    assert real == 32000 and not padded[32000:].any() and padded[:32000].any()


def cut_file(source: Path, share: float) -> Path:
    target = source.with_name(f"cut{source.suffix}")
    target.write_bytes(source.read_bytes()[: round(source.stat().st_size * share)])
    return target


def unreadable_files(folder: Path) -> dict[Path, str]:
    """Each bad file, and what its error must say."""
    wav = write_wav(folder / "good.wav", noise(3, 2.0))
    flac = folder / "good.flac"
    subprocess.run([FFMPEG, "-v", "error", "-i", wav, flac], check=True)
    ogg = folder / "good.ogg"
    subprocess.run([FFMPEG, "-v", "error", "-i", wav, "-c:a", "libvorbis", ogg], check=True)
    (folder / "empty.wav").touch()
    (folder / "text.wav").write_text("this is a sentence, not a sound\n" * 100)
    (folder / "folder.wav").mkdir()
    (folder / "header.wav").write_bytes(wav.read_bytes()[:44])
    os.mkfifo(folder / "fifo.wav")
    return {
        cut_file(wav, 0.5): "truncated",
        cut_file(flac, 0.5): "truncated: its header promises 2.00 s, it holds 0.",
        cut_file(ogg, 0.5): "truncated",
        folder / "empty.wav": "empty",
        folder / "text.wav": "cannot be decoded",
        folder / "folder.wav": "not a file",
        folder / "fifo.wav": "not a file",
        folder / "header.wav": "truncated",
        folder / "absent.wav": "No such file",
    }


def test_each_unreadable_file_is_refused_with_its_own_reason(tmp_path):
    for path, reason in unreadable_files(tmp_path).items():
        with pytest.raises(AudioError, match=reason) as error:
            decode(path)
        assert "\n" not in str(error.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_read_permission_is_refused(tmp_path):
    path = write_wav(tmp_path / "a.wav", noise(0, 1.0))
    path.chmod(stat.S_IWUSR)
    with pytest.raises(AudioError, match="Permission denied"):
        decode(path)


def test_a_name_that_looks_like_a_protocol_is_only_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_wav(tmp_path / "concat:a|b\n.wav", noise(0, 1.0))
    assert len(decode("concat:a|b\n.wav")) == 16000
