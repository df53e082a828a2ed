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


@pytest.fixture
def speech_case(shared):
    folder = shared / "cases" / "speech"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here")
    return folder.joinpath


def test_a_table_with_spaces_before_its_quotes_says_the_same(speech_case):
    texts = [utterance.text for utterance in read_speech(speech_case("sp_ok")).utterances]
    assert len(texts) == 4 and texts[1] == "in being comparatively modern." and "concerned, differs" in texts[0]
    spaced = read_speech(speech_case("sp_space"))
    assert [utterance.text for utterance in spaced.utterances] == texts and spaced.notes == ()


@pytest.mark.parametrize(
    "name, said",
    [
        ("sp_extra_comma", "line 2 of .*manifest.csv has more fields than the header"),
        ("sp_nan", "line 2 of .*manifest.csv: the text is 'nan'"),
    ],
)
def test_a_transcript_that_was_cut_or_lost_is_refused_with_its_line(speech_case, name, said):
    with pytest.raises(UsageError, match=said):
        read_speech(speech_case(name))


def test_speech_is_understood_as_its_table_says(speech_case, tiny_en, tmp_path):
    from whisper_at_cli.probe.robustness.measure import measure_robustness

    speech, noises = speech_case("sp_ok"), speech_case("noise1")
    report = measure_robustness(speech, noises, model=tiny_en, snrs=[20], out=tmp_path / "out", batch_size=4)
    assert abs(report.clean.wer - 0.0435) < 0.0005 and report.clean.utterances == 4


def test_other_tables_and_names_of_columns_are_read(tmp_path):
    for name in ("1.wav", "2.wav"):
        write_wav(tmp_path / "clips" / name, noise(0, 0.2))
    table = 'client_id\tpath\tsentence\n7\t1.wav\t"Stop, he said.\n7\t2.wav\tGo on.\n'
    (tmp_path / "validated.tsv").write_bytes(table.encode("utf-16"))
    speech = read_speech(tmp_path / "validated.tsv")
    assert [(u.path, u.text) for u in speech.utterances] == [
        ("clips/1.wav", '"Stop, he said.'),
        ("clips/2.wav", "Go on."),
    ]
    assert "text from column 'sentence'" in speech.notes[0] and "separated by tabs in UTF-16" in speech.notes[1]
    (tmp_path / "metadata.jsonl").write_text('{"audio_filepath": "clips/2.wav", "text": "go on"}\n')
    assert [u.text for u in read_speech(tmp_path).utterances] == ["go on"]


def test_transcripts_that_are_not_utf_8_are_read_with_a_note(tmp_path):
    write_wav(tmp_path / "1" / "2" / "a.wav", noise(0, 0.2))
    (tmp_path / "1" / "2" / "1-2.trans.txt").write_bytes("a HÖR ZU\n".encode("latin-1"))
    speech = read_speech(tmp_path)
    assert speech.utterances[0].text == "HÖR ZU" and "'HÖR'" in speech.notes[0]
