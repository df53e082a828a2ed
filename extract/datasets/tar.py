"""Tar shards as WebDataset has them: members of one key are a clip, its audio and what is said of it.

A key is a member's name up to the first dot of its last part; what follows says what it is: audio by its suffix,
`.json` with labels and more under the names that a manifest's columns have, `.cls` a class, `.txt` a label, or the text
where there are labels already. Nothing is unpacked: where each clip's audio lies is kept, and decoding processes read
it there.
"""

from __future__ import annotations

import itertools
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import cast

import numpy as np

from whisper_at_cli.extract import notes
from whisper_at_cli.extract.audio.sources import TarClip
from whisper_at_cli.extract.datasets.base import Dataset
from whisper_at_cli.extract.datasets.classes import ClassList, read_classes
from whisper_at_cli.extract.datasets.columns import LABEL_NAMES, Columns
from whisper_at_cli.extract.datasets.entries import entry_of
from whisper_at_cli.extract.datasets.manifest import dataset_of
from whisper_at_cli.extract.datasets.rows import RowsBuilder, joined_rows
from whisper_at_cli.extract.datasets.scan import audio_files, is_audio
from whisper_at_cli.extract.datasets.splits import SPLITS
from whisper_at_cli.extract.errors import UsageError
from whisper_at_cli.extract.tables import column_name, parsed

LAYOUT = (
    "tar shards as WebDataset has them: a .tar file, a folder of them, or a pattern such as 'shards-{000..010}.tar', "
    "with KEY.flac (or other audio) and KEY.json, KEY.cls or KEY.txt for labels"
)
SUFFIX = ".tar"
TEXTS = ("json", "cls", "txt")  # of a clip, that are read
TEXT_BYTES = 1 << 20  # at most, of one of them
TAKEN = (
    *LABEL_NAMES,
    "fold",
    "split",
    "id",
    "text",
)  # of a clip's JSON; start and end are those of where it was cut from
BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"([0-9]{1,9})\.\.([0-9]{1,9})")
MOST_SHARDS = 1_000_000
MEMBERS_KEPT = 1000  # by tarfile, of those that were read


@dataclass(frozen=True)
class TarDataset(Dataset):
    """Clips whose audio lies within tar files: `sizes[n]` bytes from `offsets[n]` on in `shards[shard_of[n]]`."""

    shards: tuple[str, ...] = ()  # relative to the root
    shard_of: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int32), compare=False)
    offsets: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64), compare=False)
    sizes: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64), compare=False)

    of_files = False

    def is_there(self, row: int) -> bool:
        return Path(self.source(row).path).exists()

    def source(self, row: int) -> TarClip:
        shard = self.root / self.shards[self.shard_of[row]]
        return TarClip(str(shard), int(self.offsets[row]), int(self.sizes[row]))

    def part(self, rows: Sequence[int]) -> TarDataset:
        """These clips alone, with where they lie and nothing of the others."""
        at = np.asarray(rows, dtype=np.int64)
        there = {"shard_of": self.shard_of[at], "offsets": self.offsets[at], "sizes": self.sizes[at]}
        return replace(cast("TarDataset", super().part(rows)), **there)  # type: ignore[arg-type]


@dataclass
class _Sample:
    """The members of one key."""

    key: str
    audio: list[tuple[str, int, int]] = field(default_factory=list)  # name, first byte, bytes
    texts: dict[str, bytes] = field(default_factory=dict)


def recognise(path: Path) -> bool:
    """A tar file, or a folder of them in which no audio lies by itself."""
    if path.is_dir():
        return bool(_shards_in(path)) and next(audio_files(path), None) is None
    return path.suffix.lower() == SUFFIX


def _shards_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob(f"*{SUFFIX}") if not path.name.startswith(".") and path.is_file())


def read(path: Path, *, labels: Path | None = None) -> TarDataset:
    """Every clip of a tar file, or of those in a folder, in their order."""
    shards = _shards_in(path) if path.is_dir() else [path]
    if not shards:
        raise UsageError(f"{path} holds no {SUFFIX} file; give {LAYOUT}")
    return read_shards(shards, path if path.is_dir() else path.parent, path.stem, labels=labels)


def expanded(pattern: str) -> list[str]:
    """The names that a pattern stands for: `a-{00..02}.tar` and `{a,b}.tar`; without braces the one that it is."""
    pieces, at, count = [], 0, 1
    for match in BRACES.finditer(pattern):
        found = _alternatives(match[1], pattern)
        count *= len(found)
        if count > MOST_SHARDS:
            raise UsageError(f"{pattern} stands for more than {MOST_SHARDS} shards; give a folder, or fewer")
        pieces += [[pattern[at : match.start()]], found]
        at = match.end()
    return ["".join(parts) for parts in itertools.product(*pieces, [pattern[at:]])]


def _alternatives(inside: str, pattern: str) -> Sequence[str]:
    match = RANGE.fullmatch(inside)
    if match is None:
        return inside.split(",")
    first, last = int(match[1]), int(match[2])
    if not first <= last < first + MOST_SHARDS:
        raise UsageError(f"{pattern}: {{{inside}}} is no range of shards; write it as {{000..010}}")
    return [f"{number:0{len(match[1])}d}" for number in range(first, last + 1)]


def read_pattern(pattern: str, *, labels: Path | None = None) -> TarDataset:
    """The clips of all shards that a pattern stands for. Raises UsageError where one is not there."""
    shards = [Path(name) for name in expanded(pattern)]
    missing = [shard for shard in shards if not shard.is_file()]
    if missing:
        named = notes.listed([str(shard) for shard in missing])
        raise UsageError(f"{len(missing)} of the {len(shards)} shards of {pattern} do not exist: {named}")
    root = Path(os.path.commonpath([shard.parent.absolute() for shard in shards]))
    name = BRACES.sub("", Path(pattern).stem).strip("-_.") or root.name
    return read_shards(shards, root, name, labels=labels)


def read_shards(shards: list[Path], root: Path, name: str, *, labels: Path | None = None) -> TarDataset:
    """The clips of these shards, in their order."""
    said: list[str] = []
    tables, places = [], [np.zeros((0, 3), dtype=np.int64)]
    names = tuple(os.path.relpath(shard, root).replace(os.sep, "/") for shard in shards)
    told = _Told()
    for number, (shard, inside) in enumerate(zip(shards, names, strict=True)):
        builder, found = RowsBuilder(), []
        for at, sample in enumerate(_samples(shard), start=1):
            if sample.audio:
                member, offset, size = told.audio_of(sample)
                row = _row(sample, f"clip {at} of {shard}", told) | {"audio": f"{inside}/{member}"}
                row["split"] = row.get("split") or _split_of(shard)
                builder.add(entry_of(row, f"clip {at} of {shard}", Columns("audio", _label_name(row))))
                found.append((number, offset, size))
            else:
                told.without_audio.append(sample.key)
        tables.append(builder.rows(shard))
        places.append(np.array(found, dtype=np.int64).reshape(-1, 3))
    rows, place = joined_rows(tables), np.concatenate(places)
    classes = read_classes(labels, said) if labels else None
    if rows.names and all(label.isascii() and label.isdecimal() for label in rows.names):
        classes = _numbered(classes, rows.names)
    plain = dataset_of(rows, root / name, classes, root, (*said, *told.notes(len(shards))), relocate=False)
    kept = {each.name: getattr(plain, each.name) for each in fields(Dataset)} | {"name": name}
    return TarDataset(
        **kept,
        shards=names,
        shard_of=place[:, 0].astype(np.int32),
        offsets=place[:, 1].copy(),
        sizes=place[:, 2].copy(),
    )


def _numbered(given: ClassList | None, labels: Iterable[str]) -> ClassList:
    """Classes that are given by their numbers: by those of a list, or else in the order of the numbers."""
    if given is not None:
        return ClassList(given.path, given.names, given.index | {str(at): at for at in range(len(given.names))})
    ordered = tuple(sorted(labels, key=int))
    return ClassList(Path("the shards"), ordered, {name: at for at, name in enumerate(ordered)})


def _label_name(row: dict) -> str:
    return next((name for name in LABEL_NAMES if row.get(name) not in (None, "", [])), "")


def _split_of(shard: Path) -> str:
    """The split that a shard's name begins with: `train-000.tar`."""
    return SPLITS.get(re.split(r"[-_.0-9]", shard.name.lower(), maxsplit=1)[0], "")


def _row(sample: _Sample, place: str, told: _Told) -> dict:
    """What the texts of a clip say of it, under the names of a manifest's columns."""
    row: dict = {}
    if "json" in sample.texts:
        content = parsed(_text(sample, "json", place), f"{place}: {sample.key}.json")
        if not isinstance(content, dict):
            raise UsageError(f"{place}: {sample.key}.json is not a JSON object such as {{'label': 'dog'}}")
        row = {name: value for key, value in content.items() if (name := column_name(key)) in TAKEN}
        told.labels["json"] += bool(_label_name(row))
    for suffix in ("cls", "txt"):
        if suffix in sample.texts and (text := _text(sample, suffix, place).strip()):
            if not _label_name(row):
                row["labels" if "\n" in text else "label"] = text.splitlines() if "\n" in text else text
                told.labels[suffix] += 1
            elif suffix == "txt":
                row.setdefault("text", " ".join(text.split()))
    return row


def _text(sample: _Sample, suffix: str, place: str) -> str:
    try:
        return sample.texts[suffix].decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{place}: {sample.key}.{suffix} is not UTF-8 text ({error.reason})") from error


class _Told:
    """What notes say of how shards were read."""

    def __init__(self) -> None:
        self.labels = dict.fromkeys(TEXTS, 0)
        self.suffixes: dict[str, int] = {}
        self.without_audio: list[str] = []
        self.several = 0

    def audio_of(self, sample: _Sample) -> tuple[str, int, int]:
        """The first audio of a key."""
        self.several += len(sample.audio) > 1
        suffix = Path(sample.audio[0][0]).suffix.lower()
        self.suffixes[suffix] = self.suffixes.get(suffix, 0) + 1
        return sample.audio[0]

    def notes(self, shards: int) -> list[str]:
        audio = notes.listed(sorted(self.suffixes)) or "nothing"
        labels = notes.listed([f".{suffix}" for suffix in TEXTS if self.labels[suffix]]) or "nothing"
        said = [notes.SHARDS_READ(shards=shards, audio=audio, labels=labels)]
        if self.several:
            said.append(notes.SHARD_AUDIO(clips=self.several))
        if self.without_audio:
            named = notes.listed(self.without_audio)
            said.append(notes.SHARD_KEYS(keys=len(self.without_audio), names=named))
        return said


def _samples(shard: Path) -> Iterator[_Sample]:
    """The members of a shard by their keys, which stand one after another. Raises UsageError where it is damaged."""
    sample, seen = None, set[str]()
    for name, offset, size, text in _members(shard):
        folder, slash, last = name.rpartition("/")
        stem, dot, suffix = last.partition(".")
        if not dot or not stem:
            continue
        key = f"{folder}{slash}{stem}"
        if sample is None or sample.key != key:
            if sample is not None:
                yield sample
            if key in seen:
                raise UsageError(f"{shard}: the members of {key} do not stand one after another; write the shard again")
            seen.add(key)
            sample = _Sample(key)
        if is_audio(last):
            sample.audio.append((name, offset, size))
        elif text is not None:
            sample.texts.setdefault(suffix.lower(), text)
    if sample is not None:
        yield sample


def _members(shard: Path) -> Iterator[tuple[str, int, int, bytes | None]]:
    """Name, first byte and bytes of each file of a shard, and what it holds where that is text of a clip."""
    try:
        with tarfile.open(shard, "r:") as archive:
            while (member := archive.next()) is not None:
                if len(archive.members) > MEMBERS_KEPT:  # type: ignore[attr-defined]
                    archive.members = []  # type: ignore[attr-defined]
                if not member.isreg() or member.sparse:
                    continue
                text = None
                if member.name.lower().endswith(tuple(f".{suffix}" for suffix in TEXTS)):
                    if member.size > TEXT_BYTES:
                        raise UsageError(f"{shard}: {member.name} has {member.size} bytes; a label takes fewer")
                    file = archive.extractfile(member)
                    text = file.read() if file else b""
                yield member.name, member.offset_data, member.size, text
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        raise UsageError(
            f"{shard} is not a readable tar file ({error}); shards must be whole and not compressed"
        ) from error
