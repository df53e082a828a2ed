"""Sounds that the project makes itself: twelve classes of everyday noise, in ESC-50's own layout. For the demo.

Each class is a small physical caricature (drops, gusts, firing strokes, heel and sole) whose pitch, rate and timbre
are drawn anew for each clip. A recording then adds what makes real clips hard: a room, a microphone, another sound far
away, noise, and any level. A clip depends on (seed, class, clip) alone.

A dry sound is n samples of floats at SAMPLE_RATE, of any level.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import wave
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.random import Generator
from scipy.fft import irfft, next_fast_len, rfft, rfftfreq

from whisper_at_cli.extract.errors import UsageError
from whisper_at_cli.extract.progress import Progress

SAMPLE_RATE = 32_000
RECIPE_VERSION = 1  # raised when a change makes other sounds from the same seed
OTHER_DB = (-30.0, -5.0)  # another class far away, against the sound
NOISE_DB = (-25.0, 4.0)
COLUMNS = ("filename", "fold", "target", "category", "esc10", "src_file", "take")


def synthesise(
    folder: str | Path,
    *,
    clips_per_class: int = 25,
    folds: int = 5,
    seconds: float = 5.0,
    seed: int = 0,
    progress: Progress | None = None,
) -> Path:
    """Write the dataset: `audio/*.wav` (16-bit mono) and `meta/esc50.csv`. Clips are dealt out to folds in turn.

    The folder appears when all of it is written. One that the same settings made is left as it is; raises UsageError
    where anything else is in the way, or for settings that make no dataset.
    """
    folder = Path(folder)
    settings = {
        "recipe_version": RECIPE_VERSION, "clips_per_class": clips_per_class, "folds": folds, "seconds": seconds,
        "seed": seed,
    }  # fmt: skip
    if not (clips_per_class >= folds >= 2 and seconds >= 0.5):
        raise UsageError(
            f"{clips_per_class} clips a class in {folds} folds of {seconds:g} s were asked for; there must be 2 folds "
            "or more, a clip of each class in each, and half a second"
        )
    total = clips_per_class * len(SOUNDS)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        _check_made_before(folder, settings)
    else:
        unfinished = folder.with_name(f".{folder.name}.{os.getpid()}")
        try:
            _write(unfinished, settings, lambda done: progress(done, total) if progress else None)
            os.replace(unfinished, folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    if progress:
        progress(total, total)
    return folder


def synthesise_clip(name: str, clip: int, *, seconds: float = 5.0, seed: int = 0) -> np.ndarray:
    """One recording of a class: (samples,) int16 at SAMPLE_RATE."""
    names = list(SOUNDS)
    rng = np.random.default_rng([seed, names.index(name), clip])
    n = round(seconds * SAMPLE_RATE)
    elsewhere = SOUNDS[names[rng.integers(len(names))]](rng, n)
    return _record(rng, SOUNDS[name](rng, n), elsewhere)


def _check_made_before(folder: Path, settings: dict) -> None:
    record = folder / "meta" / "synthesis.json"
    if not record.is_file() or record.read_text() != _as_text(settings):
        raise UsageError(f"{folder} holds something other than the sounds asked for; choose another folder or empty it")


def _write(folder: Path, settings: dict, report: Callable[[int], None]) -> None:
    (folder / "audio").mkdir(parents=True)
    (folder / "meta").mkdir()

    def write_clip(job: tuple[int, str, int]) -> tuple:
        target, name, clip = job
        fold, source = clip % settings["folds"] + 1, clip * len(SOUNDS) + target
        filename = f"{fold}-{source}-A-{target}.wav"
        samples = synthesise_clip(name, clip, seconds=settings["seconds"], seed=settings["seed"])
        _write_wav(folder / "audio" / filename, samples)
        return filename, fold, target, name, False, source, "A"

    rows = []
    with ThreadPoolExecutor() as pool:  # NumPy and SciPy let go of the interpreter in their long steps
        jobs = [(target, name, i) for target, name in enumerate(SOUNDS) for i in range(settings["clips_per_class"])]
        for row in pool.map(write_clip, jobs):
            rows.append(row)
            report(len(rows))
    with open(folder / "meta" / "esc50.csv", "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])
    (folder / "meta" / "synthesis.json").write_text(_as_text(settings))


def _as_text(settings: dict) -> str:
    return json.dumps(settings, indent=2) + "\n"


def _write_wav(path: Path, samples: np.ndarray) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes(samples.astype("<i2").tobytes())


# What sounds are made of


def _seconds(n: int) -> np.ndarray:
    return np.arange(n) / SAMPLE_RATE


def _noise(rng: Generator, n: int, low: float = 20.0, high: float = 15_000.0, tilt: float = 0.0) -> np.ndarray:
    """Noise of deviation 1 between two frequencies (with skirts), its power falling as frequency ** -tilt."""
    size = next_fast_len(n, real=True)
    square = np.maximum(rfftfreq(size, 1 / SAMPLE_RATE), 1.0) ** 2
    below, above = low**2 / square, square / high**2
    gain = square ** (-tilt / 4) / np.sqrt((1 + below * below * below) * (1 + above * above * above))
    noise = irfft(rfft(rng.standard_normal(size, dtype=np.float32)) * gain.astype(np.float32), size)[:n]
    return noise / noise.std()


def _slow(rng: Generator, n: int, hertz: float) -> np.ndarray:
    """A smooth random curve between 0 and 1 that turns about `hertz` times a second."""
    points = rng.random(max(2, int(n / SAMPLE_RATE * 2 * hertz)) + 2)
    place = np.linspace(0, len(points) - 1.001, 1000)
    left = place.astype(int)
    ease = (1 - np.cos(np.pi * (place - left))) / 2
    coarse = points[left] * (1 - ease) + points[left + 1] * ease
    return np.interp(np.linspace(0, 999, n), np.arange(1000), coarse)


def _tone(frequency: np.ndarray | float, n: int) -> np.ndarray:
    """Phase in turns of an oscillator whose frequency may change, from 0."""
    return np.cumsum(np.broadcast_to(frequency, n)) / SAMPLE_RATE


def _ring(seconds: float, frequencies, decay_seconds: float, rng: Generator) -> np.ndarray:
    """A struck body: decaying modes, higher ones faster."""
    t = _seconds(round(seconds * SAMPLE_RATE))
    modes = [
        rng.uniform(0.4, 1) * np.sin(2 * np.pi * f * t) * np.exp(-t / decay_seconds * (0.5 + 0.5 * f / frequencies[0]))
        for f in frequencies
    ]
    return np.sum(modes, axis=0)


def _place(n: int, events: list[tuple[float, np.ndarray]]) -> np.ndarray:
    """Add sounds at their onsets in seconds; what lies outside is cut."""
    out = np.zeros(n)
    for onset, sound in events:
        start = round(onset * SAMPLE_RATE)
        if 0 <= start < n:
            out[start : start + len(sound)] += sound[: n - start]
    return out


def _regular(rng: Generator, n: int, per_second: float, jitter: float) -> list[float]:
    """Onsets at a rate, each off by a share `jitter` of the period."""
    period = 1 / per_second
    onsets = np.arange(rng.uniform(0, period), n / SAMPLE_RATE, period)
    return list(np.maximum(onsets + rng.normal(0, jitter * period, len(onsets)), 0))


# The classes


def rain(rng: Generator, n: int) -> np.ndarray:
    drops = np.zeros(n)
    at = rng.integers(0, n, int(rng.uniform(100, 2500) * n / SAMPLE_RATE))
    np.add.at(drops, at, rng.exponential(1, len(at)))
    spectrum = rfft(drops, size := next_fast_len(n, real=True))
    centre = rng.uniform(1500, 6000)
    frequency = rfftfreq(size, 1 / SAMPLE_RATE)
    patter = irfft(spectrum / (1 + ((frequency - centre) / (0.6 * centre)) ** 2), size)[:n]
    hiss = _noise(rng, n, rng.uniform(300, 1500), rng.uniform(6000, 14_000), tilt=0.5)
    return patter / patter.std() + rng.uniform(0.2, 1.5) * hiss * (0.7 + 0.3 * _slow(rng, n, 0.5))


def wind(rng: Generator, n: int) -> np.ndarray:
    gust = _slow(rng, n, rng.uniform(0.2, 1.5)) ** 2 + 0.05
    low = _noise(rng, n, 30, rng.uniform(200, 700), tilt=1.0)
    high = _noise(rng, n, rng.uniform(300, 800), rng.uniform(1500, 5000), tilt=1.0)
    whistle = _noise(rng, n, centre := rng.uniform(400, 1400), 1.15 * centre)
    return gust * (low + gust * rng.uniform(0.2, 1.2) * high + gust * rng.uniform(0, 0.8) * whistle)


def sea_waves(rng: Generator, n: int) -> np.ndarray:
    period = rng.uniform(2.5, 8)
    phase = (_seconds(n) / period + rng.random() + 0.15 * _slow(rng, n, 0.5)) % 1
    rise = rng.uniform(0.25, 0.6)
    swell = np.where(phase < rise, phase / rise, (1 - phase) / (1 - rise)) ** rng.uniform(1, 2.5) + 0.08
    surge = _noise(rng, n, 60, rng.uniform(600, 1500), tilt=1.0)
    foam = _noise(rng, n, rng.uniform(800, 2000), rng.uniform(5000, 11_000), tilt=0.3)
    return swell * surge + rng.uniform(0.3, 1.0) * swell**2 * foam


def vacuum_cleaner(rng: Generator, n: int) -> np.ndarray:
    speed = rng.uniform(120, 420) * (1 + 0.03 * _slow(rng, n, 0.7))
    if rng.random() < 0.3:  # switched on or off during the clip
        ramp = np.clip((_seconds(n) - rng.uniform(0, 1.5)) / rng.uniform(0.4, 1.2), 0.02, 1)
        speed = speed * (ramp if rng.random() < 0.5 else ramp[::-1])
    turns = _tone(speed, n)
    motor = sum(rng.uniform(0.2, 1) / k * np.sin(2 * np.pi * k * turns + k) for k in (1, 2, 3, 5, 8))
    air = _noise(rng, n, rng.uniform(200, 800), rng.uniform(3000, 9000), tilt=0.8)
    return (speed / speed.max()) ** 2 * (air + rng.uniform(0.2, 1.2) * motor)


def engine(rng: Generator, n: int) -> np.ndarray:
    strokes = rng.uniform(14, 55) * (1 + rng.uniform(0.05, 0.8) * _slow(rng, n, rng.uniform(0.2, 0.8)))
    turns = _tone(strokes, n)
    stroke = turns % 1
    strength = rng.uniform(0.6, 1, int(turns[-1]) + 1)[turns.astype(int)]  # no two strokes are alike
    bang = strength * np.exp(-rng.uniform(3, 8) * stroke) * np.sin(2 * np.pi * rng.uniform(2, 6) * stroke)
    exhaust = _noise(rng, n, 40, rng.uniform(400, 2500), tilt=1.0) * np.exp(-2 * stroke)
    return bang + rng.uniform(0.1, 0.5) * exhaust


def siren(rng: Generator, n: int) -> np.ndarray:
    t, low = _seconds(n), rng.uniform(400, 900)
    high = low * rng.uniform(1.3, 2.4)
    kind = rng.integers(3)
    if kind == 0:  # wail
        sweep = (1 - np.cos(2 * np.pi * (rng.uniform(0.15, 0.5) * t + rng.random()))) / 2
    elif kind == 1:  # yelp
        sweep = (rng.uniform(2, 5) * t + rng.random()) % 1
    else:  # two notes
        sweep = ((rng.uniform(0.7, 1.6) * t + rng.random()) % 1 < 0.5).astype(float)
    horn = np.sin(2 * np.pi * _tone(low + (high - low) * sweep, n))
    return np.tanh(rng.uniform(0.5, 4) * horn) * (0.5 + 0.5 * _slow(rng, n, 0.4))


def alarm_beep(rng: Generator, n: int) -> np.ndarray:
    t, pitch = _seconds(n) + rng.random(), rng.uniform(700, 3800)
    per_second, in_group = rng.uniform(1.5, 9), rng.integers(2, 6)
    beat = t * per_second
    on = (beat % 1 < rng.uniform(0.3, 0.7)) & ((beat // 1) % in_group < rng.integers(1, in_group + 1))
    second = rng.choice([1.0, 1.0, 1.25, 1.5])  # some alternate between two notes
    tone = np.sin(2 * np.pi * _tone(pitch * np.where((beat // 1) % 2, second, 1.0), n))
    return np.tanh(rng.uniform(0.3, 5) * tone) * on


def birds(rng: Generator, n: int) -> np.ndarray:
    events, seconds = [], n / SAMPLE_RATE
    for _ in range(rng.integers(1, 4)):  # birds, each with a phrase of its own
        base, bend, length = rng.uniform(1800, 6500), rng.uniform(-0.4, 0.4, 3), rng.uniform(0.04, 0.25)
        notes, rate, gain = rng.integers(1, 9), rng.uniform(3, 12), rng.uniform(0.3, 1)
        for start in rng.uniform(0, seconds, rng.integers(1, 5)):
            for note in range(notes):
                samples = int(length * rng.uniform(0.8, 1.2) * SAMPLE_RATE)
                u = np.linspace(0, 1, samples)
                pitch = base * (1 + bend[0] * u + bend[1] * np.sin(2 * np.pi * u) + bend[2] * u**2)
                chirp = np.sin(2 * np.pi * _tone(np.clip(pitch, 800, 12_000), samples)) * np.sin(np.pi * u)
                events.append((start + note / rate, gain * chirp))
    return _place(n, events)


def crickets(rng: Generator, n: int) -> np.ndarray:
    t, out = _seconds(n), np.zeros(n)
    for _ in range(rng.integers(1, 5)):  # insects
        carrier, pulses, chirps = rng.uniform(2500, 6500), rng.uniform(15, 60), rng.uniform(0.8, 4)
        share = rng.choice([1.0, rng.uniform(0.2, 0.7)])  # 1: a trill without pauses
        pulse = np.maximum(np.sin(2 * np.pi * (pulses * t + rng.random())), 0) ** 2
        singing = (chirps * t + rng.random() + 0.2 * _slow(rng, n, 0.5)) % 1 < share
        out += rng.uniform(0.2, 1) * np.sin(2 * np.pi * carrier * t) * pulse * singing
    return out


def clock_tick(rng: Generator, n: int) -> np.ndarray:
    modes = np.sort(rng.uniform(900, 6500, rng.integers(2, 5)))
    decay = rng.uniform(0.003, 0.02)
    tick, tock = (_ring(0.15, modes * change, decay, rng) for change in (1, rng.uniform(0.7, 1.1)))
    onsets = _regular(rng, n, rng.uniform(1, 5), jitter=0.01)
    return _place(n, [(onset, tock if i % 2 else tick) for i, onset in enumerate(onsets)])


def knocking(rng: Generator, n: int) -> np.ndarray:
    modes, decay = np.sort(rng.uniform(120, 1400, 4)), rng.uniform(0.012, 0.06)
    events, start = [], rng.uniform(0, 1.2)
    while start < n / SAMPLE_RATE:
        knocks, rate = rng.integers(2, 7), rng.uniform(2.5, 8)
        for knock in range(knocks):
            events.append((start + knock / rate, rng.uniform(0.5, 1) * _ring(0.3, modes, decay, rng)))
        start += knocks / rate + rng.uniform(0.4, 2.5)
    return _place(n, events)


def footsteps(rng: Generator, n: int) -> np.ndarray:
    modes, sole = np.sort(rng.uniform(60, 500, 3)), rng.uniform(0.1, 1.2)
    floor = (rng.uniform(300, 1200), rng.uniform(2500, 9000))
    events = []
    for onset in _regular(rng, n, rng.uniform(1.3, 3.2), jitter=0.04):
        heel = _ring(0.3, modes, rng.uniform(0.015, 0.05), rng)
        length = int(rng.uniform(0.04, 0.14) * SAMPLE_RATE)
        scrape = _noise(rng, length, *floor) * np.hanning(length)
        events += [(onset, rng.uniform(0.6, 1) * heel), (onset + rng.uniform(0.04, 0.12), 0.4 * sole * scrape)]
    return _place(n, events)


SOUNDS: dict[str, Callable[[Generator, int], np.ndarray]] = {
    sound.__name__: sound
    for sound in (
        rain, wind, sea_waves, vacuum_cleaner, engine, siren,
        alarm_beep, birds, crickets, clock_tick, knocking, footsteps,
    )
}  # fmt: skip


# From a dry sound to a recording


def _record(rng: Generator, dry: np.ndarray, elsewhere: np.ndarray) -> np.ndarray:
    """The sound in a room, through a microphone, over another sound and noise, at some level: (n,) int16."""
    n = len(dry)
    wet = _through_room_and_microphone(rng, _level(dry))
    other = _through_room_and_microphone(rng, _level(elsewhere))
    noise = _noise(rng, n, 20, 15_000, tilt=rng.uniform(0, 2))
    mixed = _level(wet) + _decibels(rng.uniform(*OTHER_DB)) * _level(other) + _decibels(rng.uniform(*NOISE_DB)) * noise
    peak = _decibels(-rng.uniform(1, 25))
    return np.round(32767 * peak * mixed / np.abs(mixed).max()).astype(np.int16)


def _through_room_and_microphone(rng: Generator, sound: np.ndarray) -> np.ndarray:
    reverberation = rng.uniform(0.1, 0.9)
    tail = _seconds(round(reverberation * SAMPLE_RATE))
    room = (rng.standard_normal(len(tail)) * np.exp(-6.9 * tail / reverberation)).astype(np.float32)
    room *= rng.uniform(0, 0.7) / np.sqrt((room**2).sum())
    room[0] = 1
    size = next_fast_len(len(sound) + len(room), real=True)
    frequency = rfftfreq(size, 1 / SAMPLE_RATE)
    microphone = (np.maximum(frequency, 50) / 1000) ** rng.uniform(-0.4, 0.4)
    microphone /= np.sqrt(1 + ((frequency / rng.uniform(5000, 15_000)) ** 2) ** 2)
    heard = rfft(sound.astype(np.float32), size) * rfft(room, size) * microphone.astype(np.float32)
    return irfft(heard, size)[: len(sound)]


def _level(sound: np.ndarray) -> np.ndarray:
    """At a deviation of 1; silence stays silence."""
    return sound / max(sound.std(), 1e-9)


def _decibels(db: float) -> float:
    return 10 ** (db / 20)
