"""Scenes of ten seconds from the clips of ESC-10 and read speech: a few short events over a background.

A scene has one to four events, each a stretch of 0.4 to 3 s of one clip, at random places, 0 to 20 dB above a
background of white noise, pink noise or speech. Scenes of a fold use that fold's clips and a fifth of the utterances,
and no other fold's. Its labels are the classes of its events; when each begins and ends stands in events.csv. All that
is random in a scene comes from the seed and its number.
"""

from __future__ import annotations

import csv
import json
import wave
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from whisper_at_cli.extract.audio import SAMPLE_RATE
from whisper_at_cli.extract.audio.decode import decode

SECONDS = 10
FOLDS = 5
EVENTS = (1, 4)  # of a scene, fewest and most
EVENT_SECONDS = (0.4, 3.0)
SNR_DB = (0.0, 20.0)  # of an event, over the background
BACKGROUND_RMS = 0.01
BACKGROUNDS = ("white noise", "pink noise", "speech")
FADE_SECONDS = 0.01
PLACES_TRIED = 8  # in a clip, of which the loudest is taken: many clips are mostly silent
PEAK = 0.99


@dataclass(frozen=True)
class Event:
    """A label, and when it sounds: seconds from the beginning of the scene."""

    label: str
    start: float
    end: float


@dataclass(frozen=True)
class Material:
    """What the scenes of one fold are made of; samples at 16 kHz."""

    clips: list[tuple[str, np.ndarray]]  # class, samples
    utterances: list[np.ndarray]


def esc_rows(sounds: Path) -> list[dict[str, str]]:
    """The lines of meta/esc50.csv."""
    with open(sounds / "meta" / "esc50.csv") as file:
        return list(csv.DictReader(file))


def read_utterances(speech: Path) -> list[np.ndarray]:
    """The samples of each file that a manifest.csv lists in its column `audio`."""
    with open(speech / "manifest.csv") as file:
        return [decode(speech / row["audio"]) for row in csv.DictReader(file)]


def f1(true: np.ndarray, said: np.ndarray) -> float:
    """F1 of what was said to be there, two arrays of bool; 0 where nothing is there and nothing was said."""
    return 2 * float((true & said).sum()) / max(1, int(true.sum() + said.sum()))


def material(sounds: Path, speech: Path) -> dict[int, Material]:
    """By fold: the clips of ESC-10 (in ESC-50's layout), and its part of the utterances."""
    rows, utterances = esc_rows(sounds), read_utterances(speech)
    return {
        fold: Material(
            [(row["category"], decode(sounds / "audio" / row["filename"])) for row in rows if int(row["fold"]) == fold],
            utterances[fold - 1 :: FOLDS],
        )
        for fold in range(1, FOLDS + 1)
    }


def scene(of: Material, rng: np.random.Generator) -> tuple[np.ndarray, list[Event], str]:
    """A scene's samples, its events in order of time, and its background."""
    background = BACKGROUNDS[rng.integers(len(BACKGROUNDS))]
    samples = _background(background, of, rng)
    samples *= BACKGROUND_RMS / _rms(samples)
    events = []
    for _ in range(rng.integers(*EVENTS, endpoint=True)):
        label, sound = "", np.zeros(0)
        while not sound.any():  # some clips end in silence
            label, clip = of.clips[rng.integers(len(of.clips))]
            sound = _loud_part(clip, rng)
        sound = sound * (BACKGROUND_RMS * 10 ** (rng.uniform(*SNR_DB) / 20) / _rms(sound))
        start = int(rng.integers(0, len(samples) - len(sound), endpoint=True))
        samples[start : start + len(sound)] += sound
        events.append(Event(label, start / SAMPLE_RATE, (start + len(sound)) / SAMPLE_RATE))
    samples *= min(1.0, PEAK / np.abs(samples).max())
    return samples, sorted(events, key=lambda event: event.start), background


def _loud_part(clip: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The loudest of several stretches of one random length, faded in and out."""
    length = min(len(clip), round(rng.uniform(*EVENT_SECONDS) * SAMPLE_RATE))
    starts = rng.integers(0, len(clip) - length, size=PLACES_TRIED, endpoint=True).tolist()
    part = max((clip[start : start + length] for start in starts), key=_rms).astype(np.float32)
    fade = np.minimum(1.0, np.arange(length) / (FADE_SECONDS * SAMPLE_RATE))
    return part * fade * fade[::-1]


def _background(kind: str, of: Material, rng: np.random.Generator) -> np.ndarray:
    count = SECONDS * SAMPLE_RATE
    if kind == "speech":
        spoken = np.concatenate([of.utterances[at] for at in rng.permutation(len(of.utterances))])
        return np.resize(np.roll(spoken, -int(rng.integers(len(spoken)))), count).astype(np.float64)
    white = rng.normal(size=count)
    if kind == "white noise":
        return white
    spectrum = np.fft.rfft(white)
    return np.fft.irfft(spectrum / np.sqrt(np.maximum(1, np.arange(len(spectrum)))), count)


def _rms(samples: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(samples, dtype=np.float64)))) or 1.0


def make_scenes(sounds: Path, speech: Path, out: Path, count: int, seed: int = 0) -> Path:
    """Write scenes as WAV into `out`, beside them events.csv; returns their manifest. What is there already is kept."""
    manifest = out / "scenes.jsonl"
    if manifest.exists():
        return manifest
    (out / "audio").mkdir(parents=True, exist_ok=True)
    folds = material(sounds, speech)
    lines, strong = [], [("filename", "onset", "offset", "event_label")]
    for number in range(count):
        fold = number % FOLDS + 1
        samples, events, background = scene(folds[fold], np.random.default_rng([seed, number]))
        name = f"audio/scene-{number:05d}.wav"
        with wave.open(str(out / name), "wb") as file:
            file.setparams((1, 2, SAMPLE_RATE, 0, "NONE", ""))
            file.writeframes(np.round(samples * 32767).astype("<i2").tobytes())
        labels = sorted({event.label for event in events})
        lines.append({"audio": name, "labels": labels, "fold": fold, "background": background})
        strong += [(name, f"{event.start:.3f}", f"{event.end:.3f}", event.label) for event in events]
    with open(out / "events.csv", "w", newline="") as file:
        csv.writer(file).writerows(strong)
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return manifest


def read_events(manifest: Path) -> dict[str, list[Event]]:
    """By the audio's name: the events that `make_scenes` has put there."""
    found: dict[str, list[Event]] = {}
    with open(manifest.with_name("events.csv")) as file:
        for row in csv.DictReader(file):
            event = Event(row["event_label"], float(row["onset"]), float(row["offset"]))
            found.setdefault(row["filename"], []).append(event)
    return found
