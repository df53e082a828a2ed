"""Sources of audio that do to a decoding process what bad files and bad machines do. Imported by those processes."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from whisper_at_cli.extract.audio.decode import ClipAudio
from whisper_at_cli.extract.audio.sources import FileClip as FileClip
from whisper_at_cli.extract.datasets import Dataset


@dataclass(frozen=True)
class Noise:
    """Noise of its own for every number."""

    number: int

    def read(self, samples: int) -> ClipAudio:
        rng = np.random.default_rng(self.number)
        return ClipAudio(rng.integers(-8000, 8000, samples, dtype=np.int16), samples, "")


@dataclass(frozen=True)
class SlowNoise:
    """Noise that takes a while, so that there is time for something to happen."""

    number: int
    seconds: float = 0.05

    def read(self, samples: int) -> ClipAudio:
        time.sleep(self.seconds)
        return Noise(self.number).read(samples)


@dataclass(frozen=True)
class Noted:
    """Noise of which something was lost."""

    note: str = "0.4 s of 10 s were lost"

    def read(self, samples: int) -> ClipAudio:
        return Noise(0).read(samples)._replace(real=samples - 10, note=self.note)


@dataclass(frozen=True)
class Crash:
    """Takes its process with it, by a signal."""

    signal: int = signal.SIGSEGV

    def read(self, samples: int) -> ClipAudio:
        os.kill(os.getpid(), self.signal)
        raise AssertionError("still alive")


@dataclass(frozen=True)
class Hang:
    """Does not end."""

    def read(self, samples: int) -> ClipAudio:
        while True:
            time.sleep(1)


@dataclass(frozen=True)
class HangOnce:
    """Hangs the first time that it is read, which a file remembers."""

    mark: str

    def read(self, samples: int) -> ClipAudio:
        if not Path(self.mark).exists():
            Path(self.mark).touch()
            time.sleep(1000)
        return Noise(0).read(samples)


@dataclass(frozen=True)
class Bug:
    """Raises what no reader of audio should."""

    def read(self, samples: int) -> ClipAudio:
        raise ZeroDivisionError("division of nothing")


@dataclass(frozen=True)
class PlantedDataset(Dataset):
    """Files, but for some rows, whose source is another."""

    planted: tuple[tuple[int, object], ...] = ()

    def source(self, row: int) -> object:
        return dict(self.planted).get(row) or super().source(row)


def planted(dataset: Dataset, **sources: object) -> PlantedDataset:
    """A dataset with other sources for some rows: `row_3=Crash()`."""
    rows = tuple((int(name.removeprefix("row_")), source) for name, source in sources.items())
    whole = PlantedDataset(dataset.name, dataset.root, dataset.clips, dataset.class_names, dataset.clip_seconds)
    return replace(whole, planted=rows)


def process_of(_request: object) -> tuple[int, int]:
    """A request that tells which process answers."""
    return 0, os.getpid()
