"""Speech with transcripts: LibriSpeech's layout, or a manifest.csv with the columns audio and text.

Utterances are sorted by path, so that the same folder gives the same pairs with noise everywhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from whisper_at_cli.extract import notes
from whisper_at_cli.extract.audio.decode import SUFFIXES, decode
from whisper_at_cli.extract.cells import PATH_CHARACTERS, as_name, is_nan, shown
from whisper_at_cli.extract.datasets.base import unique_ids
from whisper_at_cli.extract.datasets.beside import MANIFESTS, METADATA
from whisper_at_cli.extract.datasets.columns import AUDIO_NAMES, taken_text
from whisper_at_cli.extract.datasets.locate import located
from whisper_at_cli.extract.datasets.scan import first_file
from whisper_at_cli.extract.errors import UsageError
from whisper_at_cli.extract.tables import JsonLines, Table, columns_of, is_csv, text_lines

TEXT_NAMES = ("text", "sentence", "transcript", "transcription", "normalized_text")  # best first
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


def listing_digest(files: Iterable[tuple[str, Path]]) -> str:
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
    manifest = path if path.is_file() else first_file(path, *MANIFESTS)
    if manifest is None and (metadata := first_file(path, *METADATA)):
        manifest = metadata if not set(TEXT_NAMES).isdisjoint(columns_of(metadata)) else None
    if manifest is not None:
        return _read_manifest(manifest)
    transcripts = sorted(path.rglob("*.trans.txt"))
    if not transcripts:
        raise UsageError(f"{path} holds no speech with transcripts. Looked for {LAYOUTS}")
    return _read_librispeech(path, transcripts)


def _read_manifest(path: Path) -> Speech:
    """The rows of a table. Raises UsageError with the line where audio or text is empty, or audio is named twice."""
    table = Table(path) if is_csv(path) else JsonLines(path)
    said: list[str] = []
    audio_column, text_column = _columns(table, said)
    places: dict[str, str] = {}
    texts = []
    for place, row in table.rows():
        audio = as_name(row.get(audio_column) or "", "audio", place, most=PATH_CHARACTERS)
        text = row.get(text_column) or ""
        if not audio or is_nan(audio):
            raise UsageError(f"{place} names no audio file")
        if not isinstance(text, str) or not text or is_nan(text):
            raise UsageError(
                f"{place}: the text is {shown(text) if text else 'empty'}; write what is said, or remove the row"
            )
        if audio in places:
            raise UsageError(f"{place} names {audio}, as {places[audio]} does; keep one of them")
        places[audio] = place.split(" of ")[0]
        texts.append(text)
    paths, moved = located(path.parent, list(places))
    return _speech(path.parent, list(zip(paths, texts, strict=True)), (*said, *table.notes, *moved))


def _columns(table: Table | JsonLines, said: list[str]) -> tuple[str, str]:
    """The columns of audio and text, by any of their common names. Raises UsageError where one of them is not there."""
    if isinstance(table, JsonLines):
        keys = tuple(dict.fromkeys(key for _, row in table.rows() for key in row))
        names, described = keys, ", ".join(keys)[:300] or "none"
    else:
        names, described = table.names, table.described()
    found = []
    for what, wanted in (("audio", AUDIO_NAMES), ("text", TEXT_NAMES)):
        taken = next((name for name in wanted if name in names), None)
        if taken is None:
            shown_names = ", ".join(wanted[:5])
            raise UsageError(
                f"{table.path} has no column of {what}: its columns are {described}; call it {shown_names}"
            )
        if isinstance(table, Table):
            table.column(taken)  # is not there twice
        found.append((what, taken))
    if found != [("audio", "audio"), ("text", "text")]:
        said.append(notes.COLUMNS_TAKEN(table=table.path.name, taken=taken_text(found)))
    return found[0][1], found[1][1]


def _read_librispeech(root: Path, transcripts: list[Path]) -> Speech:
    """All recordings that have both a file and a line in a transcript."""
    texts: dict[Path, str] = {}
    said: list[str] = []
    for path in transcripts:
        for line in text_lines(path, said):
            name, _, text = line.partition(" ")
            texts[path.parent / name] = text
    folders = sorted({path.parent for path in transcripts})
    audio = [file for folder in folders for file in folder.iterdir() if file.suffix.lower() in SUFFIXES]
    found = [
        (file.relative_to(root).as_posix(), texts[stem]) for file in audio if (stem := file.with_suffix("")) in texts
    ]
    if absent := len(texts.keys() - {file.with_suffix("") for file in audio}):
        said.append(f"{absent} of {len(texts)} transcripts in {root} have no recording beside them; they were left out")
    if silent := len(audio) - len(found):
        said.append(f"{silent} of {len(audio)} recordings in {root} have no transcript; they were left out")
    return _speech(root, found, tuple(said))


def _speech(root: Path, found: list[tuple[str, str]], said: tuple[str, ...]) -> Speech:
    if not found:
        raise UsageError(f"{root} names no recording with a transcript. Looked for {LAYOUTS}")
    found = sorted(found)
    ids = unique_ids([path for path, _ in found])
    utterances = (Utterance(name, path, text.strip()) for name, (path, text) in zip(ids, found, strict=True))
    return Speech(root, tuple(utterances), said)
