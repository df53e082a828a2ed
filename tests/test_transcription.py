"""Text is Whisper's own, whatever the options; the encoder runs once a window, and what it held has the right time."""

import numpy as np
import pytest
import torch
import whisper
from planted_whisper import DIM, LAYERS, PlantedWhisper, planted_head, random_whisper

from conftest import noise
from whisper_at_cli.extract.audio.decode import decode
from whisper_at_cli.extract.errors import UsageError
from whisper_at_cli.heads.tagging import transcription
from whisper_at_cli.heads.tagging.tagger import Tagger
from whisper_at_cli.heads.tagging.transcription import log_mel_in_pieces, transcribe_once
from whisper_at_cli.heads.tagging.windows import FrameAssembler

FRAME = 10  # positions
SECONDS = 37.0  # two windows and more


class Frames(FrameAssembler):
    """A receiver that keeps everything."""

    def begin(self, position):
        pass


def sound(seconds: float) -> np.ndarray:
    """Noise whose loudness and colour change all the time."""
    samples = np.concatenate([noise(seed, 1.0) for seed in range(int(np.ceil(seconds)))])[: round(seconds * 16000)]
    return samples.astype(np.float32)


def mel_frames(samples: np.ndarray, positions: int) -> torch.Tensor:
    """The frames that the passing encoder should give, from the whole file's mel: (T, DIM)."""
    mel = whisper.log_mel_spectrogram(samples, 80, padding=480000)[:DIM, : positions * 2]
    by_position = mel.unflatten(1, (-1, 2)).mean(dim=2).T
    return torch.stack([by_position[at : at + FRAME].mean(dim=0) for at in range(0, positions, FRAME)])


def assert_same_text(found: dict, expected: dict):
    """The same to the character, and numbers to the last digits, which Whisper itself does not repeat."""
    assert found["text"] == expected["text"] and found["language"] == expected["language"]
    assert len(found["segments"]) == len(expected["segments"])
    for ours, theirs in zip(found["segments"], expected["segments"], strict=True):
        assert set(ours) == set(theirs)
        for name, value in theirs.items():
            if name == "words":
                assert [{**word, "probability": 0} for word in ours[name]] == [
                    {**word, "probability": 0} for word in value
                ]
            elif name in ("avg_logprob", "no_speech_prob"):
                assert ours[name] == pytest.approx(value, rel=1e-4, abs=1e-4)
            else:
                assert ours[name] == value, name


@pytest.mark.parametrize("seconds", [0.005, 0.1, 29.99, 95.3])
def test_mel_in_pieces_is_whispers_own_mel(seconds, monkeypatch):
    monkeypatch.setattr(transcription, "PIECE_FRAMES", 700)
    samples = sound(seconds)
    ours = log_mel_in_pieces(samples, 80, 480000)
    theirs = whisper.log_mel_spectrogram(samples, 80, padding=480000)
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("seconds, moves", [
    (0.1, []), (12.34, []), (75.0, [1500, 1500]), (75.0, [700, 1321, None, 5]), (100.0, [1372, None, 1499, 640, 333]),
    (61.0, [None, None]),
])  # fmt: skip
def test_every_frame_holds_the_sound_of_its_own_time(seconds, moves):
    samples = sound(seconds)
    model, frames = PlantedWhisper.make(moves), Frames(FRAME)
    transcribe_once(model, samples, receiver=frames, frame_positions=FRAME)
    positions = len(samples) // 320
    found, expected = frames.take(0, -(-positions // FRAME)), mel_frames(samples, positions)
    for layer, factor in enumerate(np.cumprod(np.arange(LAYERS) + 1.0)):
        torch.testing.assert_close(found[layer], expected * factor, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("failures", [0, 2])
def test_the_encoder_runs_once_a_window_also_when_decoding_falls_back(failures):
    model = PlantedWhisper.make([1000, 1500], failures)
    done = transcribe_once(model, sound(65.0), receiver=Frames(FRAME), frame_positions=FRAME)
    windows = len({segment["seek"] for segment in done.result["segments"]})
    assert windows == 3 and model.encoder.calls == done.encoder_passes == windows
    assert len(model.asked) == windows * (1 + failures)  # Whisper by itself would have run it as often


def test_windows_that_sound_alike_are_each_heard():
    """Two windows of digital silence are the same to the bit; each is still part of the file."""
    samples, frames = np.zeros(90 * 16000, np.float32), Frames(FRAME)
    model = PlantedWhisper.make([1500, 1500, 1500])
    transcribe_once(model, samples, receiver=frames, frame_positions=FRAME)
    assert frames.take(0, 450).shape[1] == 450


def test_language_detection_and_decoding_share_the_first_window():
    model, samples = random_whisper(multilingual=True), sound(40.0)
    options = {"sample_len": 4, "temperature": 0.0}
    expected = whisper.transcribe(model, samples, fp16=False, **options)
    frames = Frames(FRAME)
    done = transcribe_once(model, samples, receiver=frames, frame_positions=FRAME, **options)
    assert_same_text(done.result, expected)
    known = transcribe_once(model, samples, language=expected["language"], **options)
    assert done.encoder_passes == known.encoder_passes  # detecting it cost none
    assert frames.take(0, 200).shape[1] == 200


@pytest.mark.parametrize("options", [
    {}, {"temperature": (0.0, 0.4, 0.8), "logprob_threshold": -0.01}, {"beam_size": 2, "patience": 1.5},
    {"temperature": 0.5, "best_of": 2}, {"word_timestamps": True},
    {"word_timestamps": True, "hallucination_silence_threshold": 0.5, "logprob_threshold": None},
    {"clip_timestamps": "2,33,35,37"}, {"clip_timestamps": [33, 37, 2, 10]},
    {"condition_on_previous_text": False, "initial_prompt": "Names: Ada.", "without_timestamps": True},
    {"initial_prompt": "Ada", "carry_initial_prompt": True, "no_speech_threshold": None},
], ids=str)  # fmt: skip
def test_options_change_the_text_as_they_change_whispers(options):
    model, samples = random_whisper(), sound(SECONDS)
    options = {"sample_len": 4, "temperature": 0.0} | options
    torch.manual_seed(0)
    expected = whisper.transcribe(model, samples, fp16=False, **options)
    tagger = Tagger(planted_head(), model=model)
    found = tagger.transcribe(samples, seed=0, resolution=2.0, all_labels=True, **options)
    assert_same_text(found, expected)
    stretches = {"2,33,35,37": [(2, 33), (35, 37)], "[33, 37, 2, 10]": [(2, 10), (33, 37)]}.get(
        str(options.get("clip_timestamps")), [(0, SECONDS)]
    )
    for second in np.arange(0.25, SECONDS, 0.5):
        times = sum(tag["start"] <= second < tag["end"] for tag in found["tags"])
        assert times == any(start <= second < end for start, end in stretches), second


def test_the_callers_model_is_left_as_it_was():
    model = random_whisper()
    before, encoder = set(dict(model.named_modules())), model.encoder
    transcribe_once(model, sound(1.0), receiver=Frames(FRAME), frame_positions=FRAME, sample_len=2)
    assert model.encoder is encoder and set(dict(model.named_modules())) == before
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("options, said", [
    ({"patience": 1.0}, "patience requires beam_size"), ({"language": "klingon"}, "klingon"),
    ({"clip_timestamps": "0,900"}, "lasts 2.00 s"), ({"clip_timestamps": "a,b"}, "not times"),
    ({"clip_timestamps": "1.5,0.5"}, "in order"), ({"beam_seize": 3}, "no option beam_seize"),
])  # fmt: skip
def test_options_that_whisper_refuses_are_one_clear_line(options, said):
    model = random_whisper(multilingual=True)
    with pytest.raises(UsageError, match=said):
        transcribe_once(model, sound(2.0), **{"temperature": 0.0, "sample_len": 2} | options)


def test_a_whisper_without_the_expected_names_is_refused(monkeypatch):
    monkeypatch.setattr(whisper, "transcribe", lambda model, audio, *, fp16=True: None)
    with pytest.raises(Exception, match="install openai-whisper"):
        transcribe_once(random_whisper(), sound(1.0))


@pytest.fixture(scope="module")
def spoken(shared, tiny_en):
    """Real speech with a rooster behind it, 33 s, through real tiny.en: Whisper's own result and ours, greedy."""
    from whisper_at_cli.extract import load_whisper

    data = shared / "data"
    files = [data / "speech14" / "audio" / f"LJ001-000{n}.flac" for n in (1, 2, 3, 4)]
    rooster = next(file for file in sorted((data / "esc10" / "audio").iterdir()) if file.stem.endswith("-1"))
    samples = np.concatenate([decode(file) for file in [*files, rooster]])
    model = load_whisper(tiny_en, device="cpu")
    tagger = Tagger(planted_head(dim=384, layers=4, backbone="tiny.en"), model=model)
    calls = []
    hook = model.encoder.register_forward_hook(lambda *_: calls.append(1))
    expected = whisper.transcribe(model, samples, fp16=False, temperature=0.0)
    hook.remove()
    expected["encoder calls"] = len(calls)
    found = tagger.transcribe(samples, temperature=0.0, all_labels=True, resolution=4.4)
    return samples, model, expected, found


def test_real_speech_is_whispers_text_to_the_character(spoken):
    samples, _, expected, found = spoken
    assert len(expected["text"]) > 200
    assert_same_text(found, expected)
    assert found["settings"]["encoder_passes"] == expected["encoder calls"] > 1  # nothing to save at one temperature


def test_real_tags_are_those_of_whispers_own_encoder(spoken):
    """The first tag window lies in the first encoder window alone: its logits by hand, from hooks on the blocks."""
    samples, model, _, found = spoken
    mel = whisper.pad_or_trim(whisper.log_mel_spectrogram(samples, 80, padding=480000)[:, :3000], 3000)
    kept = []
    hooks = [block.register_forward_hook(lambda _, i, out: kept.append(out[0])) for block in model.encoder.blocks]
    with torch.no_grad():
        model.encoder(mel[None])
        features = torch.stack([x[:220].unflatten(0, (22, 10)).mean(dim=1) for x in kept])
        logits = planted_head(dim=384, layers=4)(features[None])[0]
    for hook in hooks:
        hook.remove()
    labels = {label["name"]: label["logit"] for label in found["tags"][0]["labels"]}
    assert [labels[name] for name in ("dog", "rain", "siren")] == pytest.approx(logits.tolist(), abs=1e-3)
    assert found["tags"][-1]["end"] == pytest.approx(len(samples) / 16000, abs=1e-3)


@pytest.mark.slow
def test_three_hours_go_through_whispers_own_loop():
    rng = np.random.default_rng(0)
    samples = (rng.normal(size=3 * 3600 * 16000).astype(np.float32)) * 0.05
    model = PlantedWhisper.make([int(move) for move in rng.integers(400, 1501, size=1000)])
    found = Tagger(planted_head(clip_seconds=10.0), model=model).transcribe(samples, resolution=8.8, temperature=0.0)
    tags = found["tags"]
    assert [tag["start"] for tag in tags[1:]] == [tag["end"] for tag in tags[:-1]]
    assert (tags[0]["start"], tags[-1]["end"]) == (0.0, 10800.0)
