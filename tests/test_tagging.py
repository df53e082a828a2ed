"""Tags are the head's on un-padded clips, file by file, and the commands say what the library finds."""

import json
import wave

import numpy as np
import pytest
import torch
from planted_whisper import PlantedWhisper, planted_head, random_whisper

from conftest import noise, write_wav
from whisper_at_cli.cli import main
from whisper_at_cli.extract.audio.decode import decode, load_clip
from whisper_at_cli.extract.errors import AudioError, UsageError
from whisper_at_cli.heads import load_head, transcribe
from whisper_at_cli.heads.checkpoint import save_head
from whisper_at_cli.heads.tagging.tagger import Tagger, audio_files

NAMES = ("dog", "rain", "siren")


def run(capsys, *arguments) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return exit.value.code, captured.out, captured.err


def tiny_sha256() -> str:
    from whisper_at_cli.extract.backbones.weights import read_weights

    return read_weights("tiny.en").encoder_sha256()


@pytest.fixture(scope="module")
def checkpoint(tiny_en, tmp_path_factory):
    """A head of random weights on real tiny.en."""
    head = planted_head(dim=384, layers=4, backbone="tiny.en", sha256=tiny_sha256())
    return save_head(head, tmp_path_factory.mktemp("head") / "tagger", head.description)


@pytest.fixture(scope="module")
def tagger(checkpoint, tiny_en):
    return Tagger.from_checkpoint(checkpoint, model=tiny_en, device="cpu")


@pytest.fixture
def sounds(tmp_path):
    """12.3 s, 0.1 s and 5 s in a folder, with a text file and a hidden one beside them."""
    for name, seconds in (("a.wav", 12.3), ("deep/b.wav", 0.1), ("c.wav", 5.0)):
        write_wav(tmp_path / "sounds" / name, noise(len(name), seconds))
    (tmp_path / "sounds" / "notes.txt").write_text("rain")
    (tmp_path / "sounds" / ".hidden.wav").write_text("rain")
    return tmp_path / "sounds"


def logits_of(tag: dict) -> list[float]:
    found = {label["name"]: label["logit"] for label in tag["labels"]}
    return [found[name] for name in NAMES]


def by_hand(tagger, path, start=0.0, frames=25) -> list[float]:
    """Logits of a clip of five seconds from `start`, encoded alone, from its first frames."""
    samples = decode(path)[round(start * 16000) :][:80000]
    clip = np.pad(samples, (0, 80000 - len(samples)))
    features = tagger.backbone.encode(torch.from_numpy(clip)[None])[:, :, :frames]
    with torch.inference_mode():
        return tagger.head(features)[0].tolist()


def test_tags_are_the_heads_on_each_clip_by_itself(tagger, sounds):
    found = {result["path"]: result for result in tagger.tag(sounds, all_labels=True)}
    assert list(found) == [str(sounds / name) for name in ("a.wav", "c.wav", "deep/b.wav")]
    long = found[str(sounds / "a.wav")]
    assert long["duration"] == pytest.approx(12.3)
    assert [(tag["start"], tag["end"]) for tag in long["tags"]] == [(0, 5), (5, 10), (10, 12.3)]
    for tag, frames in zip(long["tags"], (25, 25, 11), strict=True):  # of 2.3 s, 11 frames are without padding
        expected = by_hand(tagger, sounds / "a.wav", tag["start"], frames)
        assert logits_of(tag) == pytest.approx(expected, abs=2e-4)
    (short,) = found[str(sounds / "deep/b.wav")]["tags"]
    assert (short["start"], short["end"]) == (0, 0.1)
    assert logits_of(short) == pytest.approx(by_hand(tagger, sounds / "deep/b.wav", frames=1), abs=2e-4)


def test_short_windows_share_a_clip_and_long_ones_take_several(tagger, sounds):
    path = sounds / "a.wav"
    short = next(tagger.tag(path, resolution=2.0, all_labels=True))["tags"]
    assert [tag["start"] for tag in short] == [0, 2, 4, 6, 8, 10, 12]
    features = tagger.backbone.encode(torch.from_numpy(decode(path)[:80000])[None])
    with torch.inference_mode():
        second = tagger.head(features[:, :, 10:20])[0].tolist()
    assert logits_of(short[1]) == pytest.approx(second, abs=2e-4)
    long = next(tagger.tag(path, resolution=8.8, all_labels=True))["tags"]
    clips = torch.from_numpy(np.stack([decode(path)[:80000], decode(path)[80000:160000]]))
    features = tagger.backbone.encode(clips)
    with torch.inference_mode():
        first = tagger.head(torch.cat([features[:1], features[1:, :, :19]], dim=2))[0].tolist()
    assert logits_of(long[0]) == pytest.approx(first, abs=2e-4)


def test_probabilities_are_softmax_or_sigmoid_as_the_head_was_trained():
    logits = np.array([[1.0, -2.0, 0.5]], dtype=np.float32)
    several = Tagger(planted_head(loss="bce"), model=random_whisper()).probabilities(logits)
    np.testing.assert_allclose(several, 1 / (1 + np.exp(-logits)), rtol=1e-6)
    one = Tagger(planted_head(loss="ce"), model=random_whisper()).probabilities(logits)
    np.testing.assert_allclose(one, np.exp(logits) / np.exp(logits).sum(), rtol=1e-6)


def test_labels_are_cut_by_threshold_and_top_and_sorted(tagger, sounds):
    every = next(tagger.tag(sounds / "c.wav", all_labels=True))["tags"][0]["labels"]
    probabilities = [label["probability"] for label in every]
    assert len(every) == 3 and probabilities == sorted(probabilities, reverse=True)
    middle = (probabilities[0] + probabilities[1]) / 2
    assert next(tagger.tag(sounds / "c.wav", threshold=middle))["tags"][0]["labels"] == every[:1]
    assert next(tagger.tag(sounds / "c.wav", threshold=0.0, top=2))["tags"][0]["labels"] == every[:2]


def test_one_bad_file_does_not_stop_the_others(capsys, checkpoint, sounds, tiny_en):
    (sounds / "broken.wav").write_bytes((sounds / "a.wav").read_bytes()[:4000])
    status, out, err = run(capsys, "--quiet", "tag", sounds, "--head", checkpoint, "--model", tiny_en, "--events")
    lines = [json.loads(line) for line in out.splitlines()]
    assert status == 1 and [("error" in line) for line in lines] == [False, True, False, False]
    assert err.count("\n") == 1 and "broken.wav: it is truncated" in err
    assert set(lines[0]) == {"path", "duration", "tags", "events"}


def test_exact_windows_beside_text_are_those_of_tagging_alone(tagger, sounds):
    beside = tagger.transcribe(sounds / "c.wav", tag_window="exact", all_labels=True, sample_len=3, temperature=0.0)
    alone = next(tagger.tag(sounds / "c.wav", all_labels=True))
    assert logits_of(beside["tags"][0]) == pytest.approx(logits_of(alone["tags"][0]), abs=2e-4)


def test_a_result_has_all_its_fields(tagger, sounds):
    from whisper_at_cli.heads.tagging.events import EventSettings

    result = tagger.transcribe(
        sounds / "c.wav", resolution=1.0, all_labels=True, sample_len=3, temperature=0.0,
        events=EventSettings(on=0.001, off=0.001),
    )  # fmt: skip
    assert {"audio", "model", "language", "duration", "text", "segments", "tags", "events", "head", "settings"} == set(
        result
    )
    assert [(tag["start"], tag["end"]) for tag in result["tags"]] == [(n, n + 1) for n in range(5)]
    assert set(result["tags"][0]["labels"][0]) == {"name", "probability", "logit"}
    assert {event["label"] for event in result["events"]} == set(NAMES)  # the threshold is below any probability
    assert all((event["start"], event["end"]) == (0, 5) for event in result["events"])
    assert result["head"]["backbone"] == "tiny.en" and result["settings"]["resolution"] == 1.0
    json.dumps(result)


@pytest.mark.parametrize("seconds", [0.01, 0.1, 31.0])
def test_silence_and_next_to_nothing_go_through(seconds):
    model = PlantedWhisper.make([])
    tagger = Tagger(planted_head(), model=model)
    result = tagger.transcribe(np.zeros(round(seconds * 16000), np.float32), temperature=0.0)
    assert result["duration"] == pytest.approx(seconds)
    assert len(result["tags"]) == {0.01: 0, 0.1: 1, 31.0: 7}[seconds]
    assert all(tag["end"] <= seconds for tag in result["tags"])


def test_a_head_of_another_model_is_refused(checkpoint, capsys, sounds, tmp_path):
    with pytest.raises(UsageError, match="another model"):
        Tagger.from_checkpoint(checkpoint, model=random_whisper())
    other = planted_head(dim=384, layers=4, backbone="tiny.en", sha256="0" * 64)
    folder = save_head(other, tmp_path / "other", other.description)
    for command in ("transcribe", "tag"):
        status, out, err = run(capsys, "--quiet", command, sounds / "c.wav", "--head", folder, "--model", "tiny.en")
        assert status == 2 and out == "" and err.count("\n") == 1
        assert "trained on tiny.en" in err and "0" * 12 in err and tiny_sha256()[:12] in err
    unknown = planted_head(sha256="unknown")
    assert Tagger(unknown, model=random_whisper()).whisper  # nobody recorded the weights: sizes have to do


@pytest.mark.parametrize("command", ["transcribe", "tag"])
@pytest.mark.parametrize("arguments, said", [
    (["{sounds}/c.wav", "--head", "{absent}"], "absent does not exist; give the folder that `train-head --out` wrote"),
    (["{sounds}/c.wav", "--head", "{empty}"], "holds no head"),
    (["{absent}.wav", "--head", "{head}"], "does not exist"),
    (["{empty}", "--head", "{head}"], "holds no audio files"),
    (["{sounds}/c.wav", "--head", "{head}", "--resolution", "0.3"], "frames of 0.2 s"),
    (["{sounds}/c.wav", "--head", "{head}", "--hop", "9"], "untagged"),
    (["{sounds}/c.wav", "--head", "{head}", "--threshold", "2"], "threshold is 2"),
    (["{sounds}/c.wav", "--head", "{head}", "--off", "0.9"], "off 0.9"),
    (["{sounds}/c.wav", "--head", "{head}", "--model", "huge.en"], "no model 'huge.en'"),
])  # fmt: skip
def test_wrong_usage_is_one_clear_line(capsys, tmp_path, checkpoint, sounds, command, arguments, said):
    (tmp_path / "empty").mkdir()
    places = {"sounds": sounds, "absent": tmp_path / "absent", "empty": tmp_path / "empty", "head": checkpoint}
    status, out, err = run(capsys, "--quiet", command, *(argument.format(**places) for argument in arguments))
    assert (status, out) == (2, "") and err.count("\n") == 1 and said in err, err


def test_transcribe_refuses_what_only_it_can_refuse(capsys, checkpoint, sounds, tmp_path):
    base = ("--quiet", "transcribe", sounds / "c.wav", "--head", checkpoint)
    for arguments, said in (
        (("--temperature", "warm"), "temperature 'warm'"), (("--tag-window", "wide"), "choose from shared, exact"),
        (("--clip-timestamps", "x"), "not times"), (("--patience", "2", "--temperature", "0"), "beam_size"),
    ):  # fmt: skip
        status, out, err = run(capsys, *base, *arguments)
        assert (status, out) == (2, "") and err.count("\n") == 1 and said in err, err
    broken = tmp_path / "broken.wav"
    broken.write_bytes((sounds / "c.wav").read_bytes()[:4000])
    status, out, err = run(capsys, "--quiet", "transcribe", broken, "--head", checkpoint)
    assert (status, out) == (1, "") and err.count("\n") == 1 and "broken.wav: it is truncated" in err


@pytest.fixture
def scripted(monkeypatch):
    """A tagger whose results are known at once; the second file fails, and the process is killed before the third."""
    state = {"stop": None, "done": []}

    def transcribe(self, path, **options):
        if path.name == state["stop"]:
            raise KeyboardInterrupt
        if path.name == "b.wav":
            raise AudioError(f"{path}: it is truncated")
        state["done"].append(path.name)
        return {"audio": str(path), "text": f"heard {path.name}", "segments": [], "tags": [], "events": []}

    monkeypatch.setattr(Tagger, "transcribe", transcribe)
    return state


def test_each_result_of_many_is_printed_as_soon_as_it_is_there(capsys, checkpoint, sounds, scripted):
    base = ("--quiet", "transcribe", "--head", checkpoint, sounds)
    status, out, err = run(capsys, *base, "--json")
    assert status == 1 and [result["text"] for result in json.loads(out)] == ["heard a.wav", "heard c.wav"]
    assert out == json.dumps(json.loads(out), indent=1) + "\n", "the array that one call of json.dumps writes"
    scripted["stop"] = "c.wav"
    for form in ("json", "txt"):
        status, out, err = run(capsys, *base, "--format", form)
        assert status == 1 and "a.wav" in out and "c.wav" not in out and "interrupted" in err


def test_transcribe_continues_after_a_kill_and_repeats_nothing(capsys, checkpoint, sounds, scripted, tmp_path):
    out_folder = tmp_path / "out"
    base = ("--quiet", "transcribe", "--head", checkpoint, sounds, "--out", out_folder)
    scripted["stop"] = "c.wav"
    assert run(capsys, *base)[0] == 1
    (out_folder / ".transcribed.jsonl").write_text((out_folder / ".transcribed.jsonl").read_text() + '{"file": "c.t')
    scripted["stop"] = None
    (sounds / "deep/b.wav").unlink()
    status, out, err = run(capsys, *base)
    assert status == 0 and scripted["done"] == ["a.wav", "c.wav"]
    assert (
        out.split() == [str(out_folder / "a.txt"), str(out_folder / "c.txt")]
        and "1 of 2 files were there from an earlier run" in err
    )
    run(capsys, *base)
    assert scripted["done"] == ["a.wav", "c.wav"]
    run(capsys, *base, "--seed", "1")  # another command
    assert scripted["done"] == ["a.wav", "c.wav"] * 2
    write_wav(sounds / "a.wav", noise(9, 3.0))  # other audio
    (out_folder / "c.txt").unlink()
    run(capsys, *base, "--seed", "1")
    assert scripted["done"] == ["a.wav", "c.wav"] * 3


def test_transcribe_writes_json_text_and_one_file_each(capsys, checkpoint, sounds, tmp_path):
    base = ("--quiet", "transcribe", "--head", checkpoint, "--temperature", "0", "--all-labels")
    status, out, _ = run(capsys, *base, sounds / "c.wav", "--json")
    result = json.loads(out)
    assert status == 0 and result["audio"] == str(sounds / "c.wav") and len(result["tags"]) == 1
    status, out, _ = run(capsys, *base, sounds / "c.wav", "--on", "0.1", "--off", "0.05")
    assert status == 0 and "[dog]\n" in out
    for form, mark in (("srt", "1\n00:00:00,000 --> "), ("vtt", "WEBVTT"), ("rttm", "SPEAKER c 1 0.000 "),
                       ("tsv", "start\tend\tlabel"), ("html", "<!doctype html>")):  # fmt: skip
        status, out, _ = run(capsys, *base, sounds / "c.wav", "--on", "0.1", "--off", "0.05", "--format", form)
        assert status == 0 and out.lower().startswith(mark.lower()), form
    status, out, _ = run(capsys, *base, sounds, "--format", "json", "--out", tmp_path / "out")
    assert status == 0 and len(out.splitlines()) == 3
    assert json.loads((tmp_path / "out" / "b.json").read_text())["duration"] == pytest.approx(0.1)
    write_wav(sounds / "deep" / "c.wav", noise(0, 0.1))
    status, _, err = run(capsys, *base, sounds, "--format", "json", "--out", tmp_path / "out")
    assert status == 2 and "several files would become" in err


def test_audio_without_a_channel_or_samples_is_refused(tagger, tmp_path):
    for wrong in (np.zeros(0), np.zeros((2, 100))):
        with pytest.raises(UsageError, match="one channel"):
            tagger.transcribe(wrong)
    with pytest.raises(AudioError, match="nothing.wav: missing: No such file"):
        tagger.transcribe(tmp_path / "nothing.wav")
    with pytest.raises(UsageError, match="no audio"):
        audio_files([])


def test_the_same_head_gives_the_same_tags_from_a_function(checkpoint, sounds, tiny_en):
    options = {"temperature": 0.0, "sample_len": 2, "all_labels": True}
    one = transcribe(sounds / "deep/b.wav", head=checkpoint, model=tiny_en, device="cpu", **options)
    two = Tagger(load_head(checkpoint), model=tiny_en, device="cpu").transcribe(sounds / "deep/b.wav", **options)
    assert one == two and len(one["tags"]) == 1


def test_the_fixture_is_what_it_says(sounds):
    with wave.open(str(sounds / "a.wav")) as file:
        assert file.getnframes() / file.getframerate() == pytest.approx(12.3)
    assert load_clip(sounds / "deep/b.wav", 80000)[1] == 1600
