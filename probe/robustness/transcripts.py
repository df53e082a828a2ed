"""Transcripts on disk: `settings.json`, and `transcripts.jsonl` with a line per utterance, noise class and SNR.

A line is appended when its transcript is there, and is safe on disk before the next batch is. One process per folder.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from whisper_at_cli.extract.cache.store import LocalStore
from whisper_at_cli.extract.errors import UsageError, WhisperATError
from whisper_at_cli.extract.folders import take_lock

FORMAT, FORMAT_VERSION = "whisper-at-cli robustness", 1
SETTINGS, TRANSCRIPTS, RESULTS = "settings.json", "transcripts.jsonl", "results.json"


@dataclass(frozen=True, slots=True)
class Key:
    """What a transcript is of: an utterance, alone or with a clip of a noise class at an SNR."""

    utterance: str
    noise_class: str | None = None
    clip: str | None = None
    snr: float | None = None


@dataclass(frozen=True, slots=True)
class Transcript:
    """One line of `transcripts.jsonl`."""

    key: Key
    text: str  # what the recogniser wrote
    reference: str = ""  # for readers of the file; scores take the reference from the speech folder
    snr_measured: float | None = None
    peak: float | None = None

    def line(self) -> bytes:
        key = {"utterance": self.key.utterance, "class": self.key.noise_class, "clip": self.key.clip}
        rest = {"reference": self.reference, "text": self.text, "snr_measured": self.snr_measured, "peak": self.peak}
        return (json.dumps(key | {"snr": self.key.snr} | rest) + "\n").encode()

    @classmethod
    def from_line(cls, line: bytes) -> Transcript:
        """Raises ValueError, KeyError or TypeError for what is no such line."""
        row = json.loads(line)
        key = Key(row["utterance"], row["class"], row["clip"], row["snr"])
        if not isinstance(row["text"], str):
            raise TypeError("its text is no text")
        return cls(key, row["text"], row["reference"], row["snr_measured"], row["peak"])


class TranscriptFolder:
    """The transcripts of one run, new or continued. `found` holds those that were there, by key.

    `append` may be called from one thread at a time. Use as a context manager; the lock goes with the process.
    Raises UsageError where the folder holds something else, WhisperATError where it was made with other settings, is
    damaged, cannot be written, or another process is at work in it.
    """

    def __init__(self, path: str | Path, settings: dict):
        self.path = Path(path)
        self.store = LocalStore(self.path)
        try:
            self._refuse_other_contents()
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = self._locked()
            try:
                self._settle(settings)
                self._file = open(self.path / TRANSCRIPTS, "a+b")
                self.found = self._read()
            except BaseException:
                self.close()
                raise
        except OSError as error:
            raise WhisperATError(f"cannot write to {self.path}: {error}; choose another --out") from error

    def __enter__(self) -> TranscriptFolder:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        for file in (getattr(self, "_file", None), self._lock):
            if file:
                file.close()

    def append(self, transcripts: list[Transcript]) -> None:
        """Add lines; they are safe on disk when this returns."""
        try:
            self._file.write(b"".join(transcript.line() for transcript in transcripts))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise WhisperATError(f"cannot write to {self.path / TRANSCRIPTS}: {error}") from error

    def write_results(self, document: dict) -> None:
        """`results.json`, whole or not at all."""
        try:
            self.store.write_whole(RESULTS, [(json.dumps(document, indent=1) + "\n").encode()])
        except OSError as error:
            raise WhisperATError(f"cannot write {self.path / RESULTS}: {error}") from error

    def _refuse_other_contents(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"{self.path} is a file; give a folder as --out")
        if not self.path.is_dir() or (self.path / SETTINGS).exists():
            return
        others = sorted(file.name for file in self.path.iterdir() if not file.name.startswith("."))
        if others:
            raise UsageError(f"{self.path} holds other things ({others[0]}) and no {SETTINGS}; choose another --out")

    def _locked(self):
        file = open(self.path / ".lock", "w")
        if not take_lock(file):
            file.close()
            raise WhisperATError(f"another process is at work in {self.path}; wait for it, or choose another --out")
        return file

    def _settle(self, settings: dict) -> None:
        """Keep the settings of a new run; compare those of one that is there."""
        path = self.path / SETTINGS
        if not path.exists():
            record = {"format": FORMAT, "format_version": FORMAT_VERSION, "settings": settings}
            self.store.write_whole(SETTINGS, [(json.dumps(record, indent=1) + "\n").encode()])
            return
        try:
            record = json.loads(path.read_bytes())
            form, version, before = record["format"], record["format_version"], record["settings"]
        except (ValueError, KeyError, TypeError) as error:
            raise WhisperATError(f"{path} is damaged ({error}); choose another --out") from error
        if (form, version) != (FORMAT, FORMAT_VERSION):
            raise WhisperATError(
                f"{path} is of format {form} {version}; this version knows {FORMAT} {FORMAT_VERSION}. "
                "Choose another --out"
            )
        names = [*settings, *(name for name in before if name not in settings)]
        differences = [
            f"{name} {before.get(name)!r} there, {settings.get(name)!r} now"
            for name in names
            if before.get(name) != settings.get(name)
        ]
        if differences:
            raise WhisperATError(
                f"{self.path} was made with other settings ({'; '.join(differences)}). "
                "Choose another --out, or the settings it was made with"
            )

    def _read(self) -> dict[Key, Transcript]:
        """Every whole line. What a killed run left of a last one is cut off, so that it is done again."""
        self._file.seek(0)
        data = self._file.read()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            self._file.truncate(whole)
            os.fsync(self._file.fileno())
        found = {}
        for number, line in enumerate(data[:whole].splitlines(), start=1):
            try:
                transcript = Transcript.from_line(line)
            except (ValueError, KeyError, TypeError) as error:
                raise WhisperATError(
                    f"line {number} of {self.path / TRANSCRIPTS} is damaged ({error}); delete that line, and the same "
                    "command does it again"
                ) from error
            found[transcript.key] = transcript
        return found
