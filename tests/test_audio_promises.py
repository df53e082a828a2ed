"""What a container promises of its length, and what is said where a file does not keep that."""

import re
import subprocess
import zlib

import numpy as np
import pytest
from test_audio_cases import FFMPEG, assert_same, loaded

from conftest import noise, write_wav
from whisper_at_cli.extract.audio import flac
from whisper_at_cli.extract.audio.decode import audio_seconds, load_clip
from whisper_at_cli.extract.errors import AudioError

SECONDS = 5.0
CUT = r"its header promises 5\.00 s, but its last frame is whole and ends at (\d\.\d\d) s: it was cut"


def made(folder, name, *arguments, source=None):
    """A file that FFmpeg's program writes, of some noise or of another file."""
    if source is None:
        source = folder / "source.wav"
        if not source.exists():
            write_wav(source, np.stack([noise(1, SECONDS, 44100), noise(2, SECONDS, 44100)], axis=1), 44100)
    subprocess.run([FFMPEG, "-v", "error", "-y", "-i", source, *arguments, folder / name], check=True)
    return folder / name


@pytest.mark.parametrize("begin, length", [("0", "1.3"), ("0", "4.7"), ("1.1", "2"), ("2.05", "9")])
def test_flac_cut_out_by_stream_copy_is_as_long_as_its_frames_and_says_so(tmp_path, begin, length):
    whole = made(tmp_path, "whole.flac")
    part = made(tmp_path, "part.flac", "-ss", begin, "-t", length, "-c", "copy", source=whole)
    expected = loaded(part)
    clip = load_clip(part, 16000 * 9)
    assert_same(clip.samples[: clip.real], expected)
    ends = float(begin) + float(length) < SECONDS
    assert bool(re.fullmatch(CUT + r".*", clip.note)) == ends, clip.note
    assert audio_seconds(part)[0] == pytest.approx(len(expected) / 16000, abs=1e-3)
    middle = load_clip(part, 4000, start=0.5)
    assert_same(middle.samples[: middle.real], expected[8000:12000])
    assert middle.note == ""
    last = load_clip(part, 16000, start=len(expected) / 16000 - 0.5)
    assert 7990 <= last.real <= 8000 and bool(last.note) == ends


def test_flac_that_ends_within_a_frame_is_truncated(tmp_path):
    whole = made(tmp_path, "whole.flac").read_bytes()
    (tmp_path / "a.flac").write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(AudioError, match=r"truncated: its header promises 5\.00 s, it holds 3\.\d\d s"):
        load_clip(tmp_path / "a.flac", 16000 * 9)
    assert audio_seconds(tmp_path / "a.flac")[0] == pytest.approx(5.0, abs=0.01), "so that the lost windows are missed"
    (tmp_path / "b.flac").write_bytes(whole[:-20000])
    assert re.match(r"0\.\d\d s of 5\.00 s are lost", load_clip(tmp_path / "b.flac", 16000 * 9).note)


@pytest.mark.parametrize("promised", [0, 1, 44100, 5 * 44100 - 9000, 5 * 44100 + 2000, 50 * 44100])
def test_flac_with_a_wrong_number_of_samples_is_read_to_its_end(tmp_path, promised):
    """As encoders leave it that were killed, or that wrote into a pipe."""
    data = bytearray(made(tmp_path, "whole.flac").read_bytes())
    data[21:26] = bytes([data[21] & 0xF0]) + promised.to_bytes(4, "big")
    path = tmp_path / "a.flac"
    path.write_bytes(data)
    expected = loaded(path)
    clip = load_clip(path, 16000 * 9)
    assert_same(clip.samples[: clip.real], expected)
    assert len(expected) > 79000 and bool(clip.note) == (promised > 50 * 44000)
    assert audio_seconds(path)[0] == pytest.approx(len(expected) / 16000, abs=0.05)


@pytest.mark.parametrize(
    "arguments", [[], ["-frame_size", "1000"], ["-sample_fmt", "s32", "-ar", "96000"], ["-ac", "1"]]
)
def test_the_last_frame_of_flac_is_found_and_its_checksum_held(tmp_path, arguments):
    data = made(tmp_path, "a.flac", *arguments).read_bytes()
    block, rate = int.from_bytes(data[8:10], "big"), int.from_bytes(data[18:21], "big") >> 4

    def end(data):
        return flac.end_of_frames(lambda at, length: data[at : at + length], len(data), block)

    assert end(data) == SECONDS * rate
    assert end(data + b"TAG" + bytes(125)) == SECONDS * rate
    assert end(data[:-1]) is None and end(data[:-1] + bytes([data[-1] ^ 1])) is None and end(b"") is None


def test_the_checksums_of_flac_are_right():
    """A CRC of 8 bits and one of 16, against a slow division bit by bit."""
    data = zlib.compress(bytes(range(256)))
    for polynomial, bits in ((0x107, 8), (0x18005, 16)):
        value = int.from_bytes(data, "big") << bits
        for at in range(value.bit_length() - 1, bits - 1, -1):
            value ^= polynomial << (at - bits) if value >> at & 1 else 0
        assert flac._remainder(data, polynomial & ((1 << bits) - 1), bits) == value


KINDS = {"a.wma": [], "v1.wma": ["-c:a", "wmav1"], "mp3.asf": ["-c:a", "mp3"], "a.avi": ["-c:a", "mp3"]}


@pytest.mark.parametrize("name", KINDS)
def test_wma_and_avi_promise_their_length_however_much_is_gone(tmp_path, name):
    """FFmpeg believes a header less the more of the file is missing."""
    whole = made(tmp_path, name, *KINDS[name]).read_bytes()
    expected = len(loaded(tmp_path / name)) / 16000
    assert load_clip(whole, 16000 * 9).note == ""
    for share, said in ((0.94, r"^0\.\d\d s of \d\.\d\d s are lost"), (0.6, None)):
        path = tmp_path / f"cut_{name}"
        path.write_bytes(whole[: int(len(whole) * share)])
        assert audio_seconds(path)[0] == pytest.approx(expected, abs=0.06), "so that the lost windows are missed"
        if said is None:
            with pytest.raises(AudioError, match=r"truncated: its header promises [45]\.\d\d s, it holds"):
                load_clip(path, 16000 * 9)
            continue
        clip = load_clip(path, 16000 * 9)
        assert_same(clip.samples[: clip.real], loaded(path))
        assert re.search(said, clip.note), clip.note


@pytest.mark.parametrize("name", ["a.wma", "a.avi", "a.flv", "a.ts"])
def test_a_fifth_damaged_in_the_middle_is_a_failed_clip_and_a_pause_is_not(tmp_path, name):
    arguments = {"a.avi": ["-c:a", "mp3"], "a.flv": ["-c:a", "mp3"], "a.ts": ["-c:a", "aac"]}.get(name, [])
    whole = made(tmp_path, name, *arguments).read_bytes()
    at, length = int(len(whole) * 0.4), len(whole) // 5
    noise_ = np.random.default_rng(0).bytes(length)
    (tmp_path / f"damaged_{name}").write_bytes(whole[:at] + noise_ + whole[at + length :])
    with pytest.raises(AudioError, match="it is (damaged|truncated): its header promises"):
        load_clip(tmp_path / f"damaged_{name}", 16000 * 9)
    if name in ("a.flv", "a.ts"):
        paused = made(
            tmp_path, f"paused_{name}", "-c", "copy", "-bsf:a", "setts=ts=if(gt(TS*TB\\,2)\\,TS+2/TB\\,TS)",
            source=tmp_path / name,
        )  # fmt: skip
        assert "timestamps skip" in load_clip(paused, 16000 * 9).note


def changed(data, mark, offset, value):
    """The same bytes with a number at a place behind a mark."""
    at = data.find(mark) + offset
    return data[:at] + value + data[at + len(value) :]


HEADERS = {  # name of a file, how it is written, and what its header says wrongly
    "aiff, half": ("a.aiff", [], b"COMM", 10, (110250).to_bytes(4, "big")),
    "aiff, none": ("a.aiff", [], b"COMM", 10, bytes(4)),
    "au, half": ("a.au", [], b".snd", 8, (441000).to_bytes(4, "big")),
    "au, unknown": ("a.au", [], b".snd", 8, b"\xff" * 4),
    "caf, none": ("a.caf", [], b"data", 4, (4).to_bytes(8, "big")),
    "caf, unknown": ("a.caf", [], b"data", 4, b"\xff" * 8),
    "m4a, half": ("a.m4a", ["-aac_pns", "0"], b"mdhd", 20, (110250).to_bytes(4, "big")),
    "m4a, none": ("a.m4a", ["-aac_pns", "0"], b"mdhd", 20, bytes(4)),
    "m4a, more": ("a.m4a", ["-aac_pns", "0"], b"mdhd", 20, (10**7).to_bytes(4, "big")),
    "wma, none": ("a.wma", [], bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365"), 64, bytes(8)),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_says_too_little_or_nothing_costs_no_audio_and_no_window(tmp_path, name):
    file, arguments, *change = HEADERS[name]
    path = tmp_path / f"wrong_{file}"
    path.write_bytes(changed(made(tmp_path, file, *arguments).read_bytes(), *change))
    expected = loaded(path)
    clip = load_clip(path, 16000 * 9)
    assert_same(clip.samples[: clip.real], expected)
    assert clip.note == "" and len(expected) > 79000
    assert audio_seconds(path)[0] == pytest.approx(len(expected) / 16000, abs=0.05)


def test_packets_that_do_not_say_how_long_they_are_are_decoded_for_the_length(tmp_path):
    """RealAudio: all of its packets begin at the same time, as FFmpeg has it."""
    path = made(tmp_path, "a.rm", "-c:a", "real_144", "-ac", "1", "-ar", "8000")
    assert audio_seconds(path)[0] == pytest.approx(len(loaded(path)) / 16000, abs=0.05)


def test_what_ffmpeg_knows_of_a_stream_is_asked_for_while_it_is_open(tmp_path):
    """Afterwards its number and its rate are whatever lies in that memory: one result of five was another."""
    path = made(tmp_path, "a.avi", "-c:a", "mp3")
    path.write_bytes(path.read_bytes()[:-8000])
    assert len({load_clip(path, 16000 * 9).note for _ in range(10)}) == 1
