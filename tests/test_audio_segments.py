"""A part of a file has the samples that the whole file has there, and costs what the part costs."""

import subprocess
import time
import wave
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest

from conftest import noise, write_wav
from whisper_at_cli.extract.audio import mp3, resample, segments
from whisper_at_cli.extract.audio.decode import audio_seconds, decode, decode_int16, load_clip
from whisper_at_cli.extract.errors import AudioError

FFMPEG = imageio_ffmpeg.get_ffmpeg_exe()
SECONDS = 24.317
FORMS = {  # how each file is written, and whether a part of it is found without decoding all before it
    "s16.wav": (["-c:a", "pcm_s16le"], True),
    "s24.wav": (["-c:a", "pcm_s24le", "-ar", "96000"], True),
    "f32.wav": (["-c:a", "pcm_f32le", "-ar", "192000"], True),
    "u8.wav": (["-c:a", "pcm_u8", "-ar", "8000", "-ac", "1"], True),
    "odd.wav": (["-c:a", "pcm_s16le", "-ar", "44099"], True),
    "a.flac": (["-c:a", "flac"], True),
    "22k.flac": (["-c:a", "flac", "-ar", "22050"], True),
    "cbr.mp3": (["-c:a", "libmp3lame", "-b:a", "128k"], True),
    "vbr.mp3": (["-c:a", "libmp3lame", "-q:a", "4"], True),
    "noxing.mp3": (["-c:a", "libmp3lame", "-q:a", "4", "-write_xing", "0"], True),
    "tiny.mp3": (["-c:a", "libmp3lame", "-b:a", "8k", "-ar", "8000", "-ac", "1"], True),
    "tagged.mp3": (["-c:a", "libmp3lame", "-b:a", "320k", "-ar", "48000", "-write_id3v1", "1"], True),
    "a.ogg": (["-c:a", "libvorbis"], True),
    "a.opus": (["-c:a", "libopus"], True),
    "plain.m4a": (["-c:a", "aac", "-aac_pns", "0"], True),
    "alac.m4a": (["-c:a", "alac"], True),
    "a.aiff": (["-c:a", "pcm_s16be"], True),
    "a.w64": (["-c:a", "pcm_s16le"], True),
    "a.webm": (["-c:a", "libopus"], False),
    "a.aac": (["-c:a", "aac"], False),
    "a.wma": (["-c:a", "wmav2"], False),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("forms")
    bursts = np.repeat(np.random.default_rng(0).random(98), 11025)[: round(SECONDS * 44100)] ** 3
    stereo = np.stack([noise(1, SECONDS, 44100) * bursts, noise(2, SECONDS, 44100)], axis=1)
    source = write_wav(folder / "source.wav", stereo, 44100)
    for name, (arguments, _) in FORMS.items():
        subprocess.run([FFMPEG, "-v", "error", "-i", source, *arguments, folder / name], check=True)
    return {name: folder / name for name in FORMS}


@pytest.mark.parametrize("name", FORMS)
def test_a_part_has_the_samples_of_the_whole(files, name, monkeypatch):
    whole = decode(files[name])
    end = len(whole) / 16000
    slowly = []
    original = segments._from_start
    monkeypatch.setattr(segments, "_from_start", lambda *all: slowly.append(1) or original(*all))
    starts = [0.01, 1 / 3, 7.12345, 13.0, 17.00001, end - 4, end - 0.3, end - 0.01]
    for start in starts:
        first = round(start * 16000)
        expected = whole[first : first + 48000]
        part = decode(files[name], start=start, max_seconds=3.0)[:48000]
        assert len(part) == len(expected), f"from {start}: {len(part)} samples, not {len(expected)}"
        worst = np.abs(part - expected).max() * 32768
        assert worst <= 1, f"from {start}: {worst:.0f} steps of 16 bits apart, mean {np.abs(part - expected).mean()}"
        clip, real, _ = load_clip(files[name], 48000, start=start)
        assert real == len(expected) and not clip[real:].any()
    assert bool(len(slowly) <= 6) is FORMS[name][1], "only what is near the start is decoded from there"
    with pytest.raises(AudioError, match="no samples from"):
        decode(files[name], start=end + 1, max_seconds=3.0)


@pytest.mark.parametrize("name", ["cbr.mp3", "vbr.mp3", "noxing.mp3", "a.ogg", "a.flac", "a.opus"])
def test_a_part_of_bytes_in_memory_is_that_of_the_file(files, name):
    data = files[name].read_bytes()
    np.testing.assert_array_equal(
        decode(data, start=11.1, max_seconds=2), decode(files[name], start=11.1, max_seconds=2)
    )


def test_an_end_before_the_clips_end_leaves_zeros(files):
    clip, real, _ = load_clip(files["a.flac"], 48000, start=2.0, end=3.5)
    np.testing.assert_array_equal(clip[:24000], decode_int16(files["a.flac"])[32000:56000])
    assert real == 24000 and not clip[24000:].any()
    clip, real, _ = load_clip(files["a.flac"], 48000, end=1.5)
    assert real == 24000 and not clip[24000:].any()


@pytest.mark.parametrize("name", FORMS)
def test_a_length_is_told_without_decoding(files, name, monkeypatch):
    real = len(decode(files[name])) / 16000
    monkeypatch.setattr(resample.Resampler, "push", None)
    seconds, exact = audio_seconds(files[name])
    assert abs(seconds - real) <= (0.001 if exact else 0.05)
    assert exact or not name.endswith((".wav", ".flac", ".mp3"))


def test_damage_between_mp3_frames_ends_the_counting(files):
    """What no run of frames explains is decoded from the start, or refused: never taken from a wrong place."""
    good = files["vbr.mp3"].read_bytes()
    first = good.index(b"\xff\xfb", good.index(b"Xing"))
    whole = mp3.Mp3Index(lambda at, length: good[at : at + length], first)
    assert whole.count(1 << 40) * 1152 > SECONDS * 44100
    middle = whole._kept[20]  # where frame 640 begins
    data = good[:middle] + b"abc" + good[middle + 3 :]
    index = mp3.Mp3Index(lambda at, length: data[at : at + length], first)
    assert index.count(640) == 640
    with pytest.raises(mp3.Unindexable):
        index.count(1 << 40)
    with pytest.raises(mp3.Unindexable):
        index.count(1 << 40)  # asked again, the same answer
    inserted = good[:middle] + b"\0" * 37 + good[middle:]
    try:
        whole = decode(inserted)
    except AudioError:
        with pytest.raises(AudioError):
            decode(inserted, start=20.0, max_seconds=2)
    else:
        np.testing.assert_array_equal(decode(inserted, start=20.0, max_seconds=2)[:32000], whole[320000:352000])


def test_a_file_that_was_replaced_is_counted_again(files, tmp_path):
    path = tmp_path / "a.mp3"
    path.write_bytes(files["cbr.mp3"].read_bytes())
    decode(path, start=20.0, max_seconds=1)
    path.write_bytes(files["vbr.mp3"].read_bytes())
    np.testing.assert_array_equal(
        decode(path, start=20.0, max_seconds=1), decode(files["vbr.mp3"], start=20.0, max_seconds=1)
    )


def long_wav(path: Path, seconds: int) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setparams((2, 2, 44100, 0, "NONE", ""))
        minute = np.stack([noise(3, 60, 44100), noise(4, 60, 44100)], axis=1)
        rng = np.random.default_rng(5)
        for done in range(0, seconds, 60):
            length = min(60, seconds - done) * 44100
            envelope = np.repeat(rng.random(240) ** 2, 11025)[:, None]
            file.writeframes((minute * envelope * 20000).astype("<i2")[:length].tobytes())
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a.flac", "cbr.mp3", "vbr.mp3", "noxing.mp3"])
def test_ten_seconds_from_the_middle_of_two_hours_cost_at_most_three_times_ten_seconds(tmp_path, name):
    """And are the same samples. The first time in a file, which for MP3 means counting an hour of its frames."""
    files = []
    for seconds in (10, 7200):
        source = long_wav(tmp_path / "source.wav", seconds)
        files.append(tmp_path / f"{seconds}-{name}")
        subprocess.run([FFMPEG, "-v", "error", "-y", "-i", source, *FORMS[name][0], files[-1]], check=True)
    short, long = files
    times: dict[str, list[float]] = {"short": [], "middle": [], "again": []}

    def timed(kind, *arguments, **options):
        started = time.perf_counter()
        clip, _, _ = load_clip(*arguments, **options)
        times[kind].append(time.perf_counter() - started)
        return clip

    for _ in range(11):
        timed("short", short, 160000)
        mp3._indexes.clear()
        part = timed("middle", long, 160000, start=3599.777, end=3609.777)
        timed("again", long, 160000, start=3599.777, end=3609.777)
    short, middle, again = (float(np.median(values)) for values in times.values())
    print(
        f"{name}: 10 s file {short * 1e3:.1f} ms, from the middle {middle / short:.2f} times, again {again / short:.2f}"
    )
    first = round(3599.777 * 16000)
    np.testing.assert_array_equal(part, decode_int16(long, max_seconds=3620)[first : first + 160000])
    assert middle <= 3 * short
