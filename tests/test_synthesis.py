"""The project's own sounds: ESC-50's layout, decided by the seed, no two alike, and never half written."""

import csv
import json

import numpy as np
import pytest

from whisper_at_cli.extract.audio.decode import decode
from whisper_at_cli.extract.datasets import esc50, synthesis
from whisper_at_cli.extract.datasets.synthesis import SAMPLE_RATE, SOUNDS, synthesise, synthesise_clip
from whisper_at_cli.extract.errors import UsageError

SMALL = {"clips_per_class": 2, "folds": 2, "seconds": 0.5}


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    return synthesise(tmp_path_factory.mktemp("sounds") / "small", **SMALL)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_folder_is_an_esc50_dataset_with_every_class_in_every_fold(sounds):
    dataset = esc50.read(sounds)
    assert dataset.class_names == tuple(SOUNDS) and 10 <= len(SOUNDS) <= 12
    assert sorted((clip.labels[0], clip.fold) for clip in dataset.clips) == [
        (target, fold) for target in range(len(SOUNDS)) for fold in (1, 2)
    ]
    with open(sounds / "meta" / "esc50.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["filename", "fold", "target", "category", "esc10", "src_file", "take"]
    for row in rows:
        assert row["filename"] == f"{row['fold']}-{row['src_file']}-{row['take']}-{row['target']}.wav"
    assert len({row["src_file"] for row in rows}) == len(rows)


def test_every_file_is_audio_of_the_length_asked_for(sounds):
    for path in (sounds / "audio").iterdir():
        waveform = decode(path)
        assert abs(len(waveform) - 8000) <= 2 and 0.01 < np.abs(waveform).max() <= 1


def test_the_seed_decides_every_byte(sounds, tmp_path):
    assert contents(synthesise(tmp_path / "again", **SMALL)) == contents(sounds)
    other = contents(synthesise(tmp_path / "other", **SMALL, seed=1))
    assert all(other[name] != data for name, data in contents(sounds).items() if name.suffix == ".wav")


def test_a_clip_does_not_depend_on_those_before_it():
    last = synthesise_clip("footsteps", 3, seconds=0.5)
    synthesise_clip("rain", 0, seconds=0.5)
    assert np.array_equal(synthesise_clip("footsteps", 3, seconds=0.5), last)


@pytest.mark.parametrize("name", SOUNDS)
def test_a_class_is_loud_enough_never_clipped_and_never_the_same_twice(name):
    clips = [synthesise_clip(name, clip, seconds=2) for clip in range(6)]
    for samples in clips:
        peak = np.abs(samples.astype(int)).max()
        assert samples.shape == (2 * SAMPLE_RATE,) and 0.05 * 32767 < peak < 32767
    assert len({samples.tobytes() for samples in clips}) == 6


@pytest.mark.parametrize("name", SOUNDS)
def test_a_dry_sound_is_finite_and_not_silent(name):
    for seed in range(20):
        sound = SOUNDS[name](np.random.default_rng(seed), SAMPLE_RATE * 2)
        assert np.isfinite(sound).all() and sound.std() > 0, f"seed {seed}"


def test_what_is_written_is_told(tmp_path):
    seen = []
    synthesise(tmp_path / "a", **SMALL, progress=lambda done, total, message="": seen.append((done, total)))
    total = 2 * len(SOUNDS)
    assert seen[0] == (1, total) and seen[-1] == (total, total)


def test_a_dataset_of_the_same_settings_is_kept_and_anything_else_refused(sounds, tmp_path, monkeypatch):
    monkeypatch.setattr(synthesis, "_write", None)  # writing again would fail
    assert synthesise(sounds, **SMALL) == sounds
    with pytest.raises(UsageError, match="something other than the sounds asked for"):
        synthesise(sounds, **SMALL, seed=1)
    (tmp_path / "mine.txt").write_text("mine")
    for taken in (tmp_path, tmp_path / "mine.txt"):
        with pytest.raises(UsageError, match="choose another folder"):
            synthesise(taken, **SMALL)


def test_an_interrupted_run_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupted(path, samples):
        raise KeyboardInterrupt

    monkeypatch.setattr(synthesis, "_write_wav", interrupted)
    with pytest.raises(KeyboardInterrupt):
        synthesise(tmp_path / "a", **SMALL)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("settings", [{"folds": 1}, {"clips_per_class": 3, "folds": 5}, {"seconds": 0.1}])
def test_settings_that_make_no_dataset_are_refused(tmp_path, settings):
    with pytest.raises(UsageError, match="there must be 2 folds or more"):
        synthesise(tmp_path / "a", **(SMALL | settings))


def test_the_settings_lie_beside_the_sounds(sounds):
    record = json.loads((sounds / "meta" / "synthesis.json").read_text())
    assert record == SMALL | {"seed": 0, "recipe_version": synthesis.RECIPE_VERSION}
