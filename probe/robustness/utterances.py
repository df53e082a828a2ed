"""Speech with transcripts: LibriSpeech's layout, or a manifest.csv with the columns audio and text.

Utterances are sorted by path, so that the same folder gives the same pairs with noise everywhere.
"""

from __future__ import annotations

import csv
import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from whisper_at_cli.extract.audio.decode import SUFFIXES, decode
from whisper_at_cli.extract.datasets.base import unique_ids
from whisper_at_cli.extract.errors import UsageError

LAYOUTS = "SPEAKER/CHAPTER/*.flac with *.trans.txt (LibriSpeech), or manifest.csv with the columns audio and text"


@dataclass(frozen=True, slots=True)
class Utterance:
    """A recording and what is said in it."""

    id: str  # unique
    path: str  # relative to the folder
    text: str


@dataclass(frozen=True)
class Speech:
    """The utterances of one folder, sorted by path."""

    root: Path
    utterances: tuple[Utterance, ...]
    notes: tuple[str, ...] = ()  # what a user should know of how it was read

    def __len__(self) -> int:
        return len(self.utterances)

    def waveform(self, utterance: Utterance) -> np.ndarray:
        """(samples,) float32 at 16 kHz, all of it. Raises AudioError for what cannot be read."""
        return decode(self.root / utterance.path)

    def digest(self) -> str:
        """Changes when a recording comes, goes or gets another size; not with the transcripts."""
        return listing_digest((utterance.path, self.root / utterance.path) for utterance in self.utterances)


def listing_digest(files) -> str:
    """The first 16 digits of SHA-256 over names and sizes of (name, path); a file that is not there has size -1."""
    digest = hashlib.sha256()
    for name, path in files:
        size = path.stat().st_size if path.is_file() else -1
        digest.update(f"{name}\0{size}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:16]


def read_speech(path: str | Path) -> Speech:
    """The utterances of a folder in one of the two layouts, or of a CSV file itself.

    Raises UsageError where nothing is there, neither layout fits, or no utterance is found.
    """
    path = Path(path)
    if not path.exists():
        raise UsageError(f"{path} does not exist; give a folder of speech with transcripts: {LAYOUTS}")
    manifest = path if path.is_file() else path / "manifest.csv"
    if manifest.is_file():
        return _read_manifest(manifest)
    transcripts = sorted(path.rglob("*.trans.txt"))
    if not transcripts:
        raise UsageError(f"{path} holds no speech with transcripts. Looked for {LAYOUTS}")
    return _read_librispeech(path, transcripts)


def _read_manifest(path: Path) -> Speech:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            missing = [column for column in ("audio", "text") if column not in (reader.fieldnames or ())]
            if missing:
                raise UsageError(f"{path} lacks the column {missing[0]!r}; it has {reader.fieldnames}")
            rows = [(reader.line_num, row["audio"], row["text"]) for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{path} is not a readable CSV file: {error}") from error
    lines: dict[str, int] = {}
    for line, audio, text in rows:
        if not audio or text is None:
            raise UsageError(f"line {line} of {path} lacks its audio or its text")
        if audio in lines:
            raise UsageError(f"line {line} of {path} names {audio}, as line {lines[audio]} does; keep one of them")
        lines[audio] = line
    return _speech(path.parent, [(audio, text) for _, audio, text in rows], ())


def _read_librispeech(root: Path, transcripts: list[Path]) -> Speech:
    """All recordings that have both a file and a line in a transcript."""
    texts: dict[Path, str] = {}
    for path in transcripts:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise UsageError(f"{path} is not a text file in UTF-8: {error}") from error
        for line in filter(str.strip, lines):
            name, _, text = line.strip().partition(" ")
            texts[path.parent / name] = text
    folders = sorted({path.parent for path in transcripts})
    audio = [file for folder in folders for file in folder.iterdir() if file.suffix.lower() in SUFFIXES]
    found = [
        (file.relative_to(root).as_posix(), texts[stem]) for file in audio if (stem := file.with_suffix("")) in texts
    ]
    notes = []
    if absent := len(texts.keys() - {file.with_suffix("") for file in audio}):
        notes.append(
            f"{absent} of {len(texts)} transcripts in {root} have no recording beside them; they were left out"
        )
    if silent := len(audio) - len(found):
        notes.append(f"{silent} of {len(audio)} recordings in {root} have no transcript; they were left out")
    return _speech(root, found, tuple(notes))


def _speech(root: Path, found: list[tuple[str, str]], notes: tuple[str, ...]) -> Speech:
    if not found:
        raise UsageError(f"{root} names no recording with a transcript. Looked for {LAYOUTS}")
    found = sorted(found)
    ids = unique_ids([path for path, _ in found])
    utterances = (Utterance(name, path, text.strip()) for name, (path, text) in zip(ids, found, strict=True))
    return Speech(root, tuple(utterances), notes)
