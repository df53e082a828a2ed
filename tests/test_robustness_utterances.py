"""Speech folders: both layouts give the same utterances in the same order, and what is wrong is named."""

import numpy as np
import pytest

from conftest import noise, write_wav
from whisper_at_cli.extract.errors import UsageError
from whisper_at_cli.probe.robustness.utterances import read_speech

LINES = {
    "84/121550": ["84-121550-0001 SECOND ONE", "84-121550-0000 FIRST ONE"],
    "1089/134686": ["1089-134686-0000 A  B "],
}
LINES = {
    "84/121550": ["84-121550-0001 SECOND ONE", "84-121550-0000 FIRST ONE"],
    "1089/134686": ["1089-134686-0000 A  B "],
}


def librispeech(root):
    """Three utterances of two speakers, transcripts out of order, as WAV files (LibriSpeech's are FLAC)."""
    for number, (folder, lines) in enumerate(LINES.items()):
        for line in lines:
            write_wav(root / folder / f"{line.split()[0]}.wav", noise(number, 0.3))
        (root / folder / f"{folder.replace('/', '-')}.trans.txt").write_text("\n".join(lines) + "\n")
    return root


def test_librispeech_is_read_and_sorted_by_path_as_text(tmp_path):
    speech = read_speech(librispeech(tmp_path / "test-clean"))
    assert [(utterance.id, utterance.text) for utterance in speech.utterances] == [
        ("1089-134686-0000", "A  B"), ("84-121550-0000", "FIRST ONE"), ("84-121550-0001", "SECOND ONE"),
    ]  # fmt: skip
    assert speech.notes == () and speech.waveform(speech.utterances[0]).shape == (4800,)
    above = read_speech(tmp_path)  # the folder above serves as well
    assert [utterance.id for utterance in above.utterances] == [utterance.id for utterance in speech.utterances]


def test_recordings_and_transcripts_without_each_other_are_left_out_and_counted(tmp_path):
    root = librispeech(tmp_path)
    (root / "84/121550/84-121550-0000.wav").unlink()
    write_wav(root / "84/121550/84-121550-0009.wav", noise(0, 0.3))
    speech = read_speech(root)
    assert [utterance.id for utterance in speech.utterances] == ["1089-134686-0000", "84-121550-0001"]
    assert "1 of 3 transcripts" in speech.notes[0] and "1 of 3 recordings" in speech.notes[1]


def test_a_manifest_is_read_and_sorted(tmp_path):
    for name in "ab":
        write_wav(tmp_path / "audio" / f"{name}.wav", noise(0, 0.2))
    (tmp_path / "manifest.csv").write_text('speaker,audio,text\n1,audio/b.wav,"Two, words"\n2,audio/a.wav,one\n')
    for given in (tmp_path, tmp_path / "manifest.csv"):
        speech = read_speech(given)
        assert [(u.id, u.path, u.text) for u in speech.utterances] == [
            ("a", "audio/a.wav", "one"), ("b", "audio/b.wav", "Two, words"),
        ]  # fmt: skip


def test_the_digest_follows_the_recordings_and_not_the_transcripts(tmp_path):
    root = librispeech(tmp_path)
    before = read_speech(root).digest()
    transcript = root / "84/121550/84-121550.trans.txt"
    transcript.write_text(transcript.read_text().replace("FIRST", "THIRST"))
    assert read_speech(root).digest() == before
    write_wav(root / "84/121550/84-121550-0000.wav", np.zeros(99))
    assert read_speech(root).digest() != before


@pytest.mark.parametrize(
    "manifest, said",
    [
        (None, "holds no speech with transcripts"),
        ("clip,text\na.wav,hello\n", "no column of audio: its columns are clip, text; call it audio, path"),
        ("audio,text\n", "names no recording"),
        ("audio,text\na.wav,x\na.wav,y\n", "line 3 .* names a.wav, as line 2 does"),
        ("audio,text\n,x\n", "line 2 .* names no audio file"),
        ("audio,text\na.wav\n", "line 2 .*: the text is empty"),
        (b"audio,text\na.wav,\x81\xfe\n", "not a readable CSV"),
        ("audio,text\na.wav,nan\n", "line 2 .*: the text is 'nan'"),
        ("audio,text\na.wav,one\nb.wav,two, three\n", "line 3 .*more fields than the header"),
        ('audio,text\na.wav,"one\nb.wav,two\n', "line 2 .*opens a quote .* that is not closed"),
    ],
)
def test_what_is_wrong_with_a_folder_is_named(tmp_path, manifest, said):
    if isinstance(manifest, bytes):
        (tmp_path / "manifest.csv").write_bytes(manifest)
    elif manifest:
        (tmp_path / "manifest.csv").write_text(manifest)
    with pytest.raises(UsageError, match=said):
        read_speech(tmp_path)
    with pytest.raises(UsageError, match="does not exist"):
        read_speech(tmp_path / "absent")
