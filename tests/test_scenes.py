"""Scenes are what they say: events of their own fold at the times beside them, the same for the same seed."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def scene_sounds():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        import scene_sounds

        yield scene_sounds
    del sys.modules["scene_sounds"]


@pytest.fixture(scope="module")
def folds(scene_sounds, shared):
    return scene_sounds.material(shared / "data" / "esc10", shared / "data" / "speech14")


def test_folds_share_neither_clips_nor_utterances(folds):
    assert {len(of.clips) for of in folds.values()} == {80}
    said = [utterance.tobytes() for of in folds.values() for utterance in of.utterances]
    assert len(said) == len(set(said)) == 14
    clips = [clip.tobytes() for of in folds.values() for _, clip in of.clips]
    assert len(set(clips)) > 390  # some clips of ESC-10 are cut from one file, within a fold


def test_a_scene_is_decided_by_its_numbers_and_has_its_events_where_they_are_said_to_be(scene_sounds, folds):
    backgrounds, counts = set(), set()
    for number in range(12):
        samples, events, background = scene_sounds.scene(folds[1], np.random.default_rng([0, number]))
        again, _, _ = scene_sounds.scene(folds[1], np.random.default_rng([0, number]))
        assert (samples == again).all() and samples.shape == (160_000,) and np.abs(samples).max() <= 0.99
        assert 1 <= len(events) <= 4 and events == sorted(events, key=lambda event: event.start)
        for event in events:
            assert 0 <= event.start < event.end <= 10 and 0.39 < event.end - event.start < 3.01
        if background != "speech" and len(events) == 1:
            (event,), squared = events, samples**2
            inside = squared[round(event.start * 16000) : round(event.end * 16000)].mean()
            outside = (squared.sum() - inside * round((event.end - event.start) * 16000)) / (
                160_000 - round((event.end - event.start) * 16000)
            )
            assert 1.5 < inside / outside < 120  # 0 to 20 dB beside what was there, which stays
        backgrounds.add(background)
        counts.add(len(events))
    assert backgrounds == set(scene_sounds.BACKGROUNDS) and len(counts) > 2


@pytest.mark.slow
def test_the_program_makes_trains_compares_and_goes_on(shared, tmp_path, tiny_en):
    data = shared / "data"
    words = [
        sys.executable, str(FOLDER / "scenes.py"), "--sounds", str(data / "esc10"), "--speech", str(data / "speech14"),
        "--model", str(tiny_en), "--folder", str(tmp_path), "--scenes", "20", "--seeds", "1", "--epochs", "1",
        "--rates", "1e-3", "--head", "wa-pool", "--head", "tl-tr-128", "--head", "concat-linear",
    ]  # fmt: skip
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["scenes"] == 20 and list(found["heads"]) == ["wa-pool", "tl-tr-128", "concat-linear"]
    assert found["heads"]["wa-pool"]["multiply_adds"] * 3 < found["heads"]["tl-tr-128"]["multiply_adds"]
    assert {(pair["a"], pair["b"]) for pair in found["pairs"]} == {
        ("wa-pool", "tl-tr-128"),
        ("wa-pool", "concat-linear"),
    }
    with open(tmp_path / "scenes-20" / "events.csv") as file:
        strong = list(csv.DictReader(file))
    lines = [json.loads(line) for line in (tmp_path / "scenes-20" / "scenes.jsonl").read_text().splitlines()]
    for line in lines:
        assert line["labels"] == sorted({e["event_label"] for e in strong if e["filename"] == line["audio"]})
    again = json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    assert again["heads"] == found["heads"]
