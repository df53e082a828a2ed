"""Which columns of a table hold the audio files and the labels, by any of their common names."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from whisper_at_cli.extract import notes
from whisper_at_cli.extract.errors import UsageError
from whisper_at_cli.extract.tables import JsonLines, Table, column_name

AUDIO_NAMES = (  # best first
    "audio", "path", "file", "file_name", "filename", "audio_filepath", "audio_path", "audio_file", "file_path",
    "filepath", "wav", "wav_path", "slice_file_name", "fname",
)  # fmt: skip
LABEL_NAMES = (  # best first
    "label", "labels", "category", "class", "target", "class_name", "class_label", "scene_label",
)  # fmt: skip
WANTED_AUDIO, WANTED_LABELS = AUDIO_NAMES[:5], LABEL_NAMES[:5]
OTHERS = ("start", "end", "fold", "split", "id", "text")
LIKE_SPANS = (  # what others call start and end
    "start_time", "start_seconds", "start_sec", "start_s", "begin", "begin_time", "onset", "offset",
    "end_time", "end_seconds", "end_sec", "end_s", "stop", "stop_time",
)  # fmt: skip
SLICES = "slice_file_name"  # of UrbanSound8K, whose start and end are those of the recordings
FLAGS = frozenset(("0", "1", "0.0", "1.0", "true", "false", ""))


@dataclass(frozen=True, slots=True)
class Columns:
    """The columns that were taken; no label column is empty text."""

    audio: str
    label: str = ""
    spans: bool = True  # whether start and end are places in the file


def taken_columns(table: Table | JsonLines, said: list[str]) -> Columns:
    """The columns of audio and labels. Raises UsageError where there is no audio, or labels are columns of 0 and 1."""
    if isinstance(table, JsonLines):
        return _of_json(table, said)
    audio, label = table.column(*AUDIO_NAMES), table.column(*LABEL_NAMES)
    for name in OTHERS:
        table.column(name)  # is not there twice
    if audio is None:
        raise UsageError(
            f"{table.path} has no column of audio files: its columns are {table.described()}; one of them must be "
            f"called {', '.join(WANTED_AUDIO)}"
        )
    written = dict(zip(table.names, table.columns, strict=True))
    taken = [("audio", written[audio])] + ([("labels", written[label])] if label else [])
    taken += [(name, written[name]) for name in OTHERS if written.get(name, name) != name]
    if (
        audio != "audio"
        or label not in (None, "label", "labels")
        or any(column_name(name) != name for _, name in taken)
    ):
        said.append(notes.COLUMNS_TAKEN(table=table.path.name, taken=taken_text(taken)))
    if label is None:
        _refuse_one_hot(table, [name for name in table.names if name and name not in (audio, *OTHERS)])
        said.append(_no_label_column(table.path.name, table.described()))
    return Columns(audio, label or "", _spans(table.path.name, table.names, audio, said))


def _spans(table: str, names: Collection[str], audio: str, said: list[str]) -> bool:
    """Whether start and end are to be used; a note where they are not, or where others are called much the same."""
    given = not {"start", "end"}.isdisjoint(names)
    if given and audio == SLICES:
        said.append(notes.SLICE_SPANS(table=table))
    like = [name for name in LIKE_SPANS if name in names]
    if like and not given:
        said.append(notes.SPANS_UNUSED(table=table, columns=", ".join(like)))
    return audio != SLICES


def taken_text(taken: list[tuple[str, str]]) -> str:
    """How columns were taken, for a note: `audio from column 'filename', labels from column 'category'`."""
    return ", ".join(f"{what} from column {name!r}" for what, name in taken)


def _no_label_column(table: str, columns: str) -> str:
    return notes.NO_LABEL_COLUMN(table=table, wanted=", ".join(WANTED_LABELS), columns=columns)


def _of_json(table: JsonLines, said: list[str]) -> Columns:
    """By the keys of all objects, which need not be the same."""
    return columns_of_keys(table, dict.fromkeys(key for _, row in table.rows() for key in row), said)


def columns_of_keys(table: JsonLines, keys: dict[str, None], said: list[str]) -> Columns:
    """By all keys of a table, in the order in which they appear."""
    audio = next((name for name in AUDIO_NAMES if name in keys), None)
    label = next((name for name in LABEL_NAMES if name in keys), None)
    described = ", ".join(keys)[:300] or "none: it is empty"
    if audio is None and keys:
        raise UsageError(
            f"{table.path} has no key for audio files: its keys are {described}; one of them must be called "
            f"{', '.join(WANTED_AUDIO)}"
        )
    if audio not in (None, "audio") or label not in (None, "label", "labels"):
        taken = [("audio", audio or "audio")] + ([("labels", label)] if label else [])
        said.append(notes.COLUMNS_TAKEN(table=table.path.name, taken=taken_text(taken)))
    if label is None and keys:
        _refuse_one_hot(table, [name for name in keys if name not in (audio, *OTHERS)])
        said.append(_no_label_column(table.path.name, described))
    return Columns(audio or "audio", label or "", _spans(table.path.name, keys, audio or "audio", said))


def _refuse_one_hot(table: Table | JsonLines, columns: list[str]) -> None:
    """Raise UsageError where several columns hold nothing but 0 and 1: they are labels, most likely."""
    seen: dict[str, set[str]] = {name: set() for name in columns}
    for _, row in table.rows():
        for name, values in list(seen.items()):
            value = row.get(name)
            values.add("" if value is None else str(value).strip().lower())
            if not values <= FLAGS:
                del seen[name]
        if not seen:
            return
    flags = [name for name, values in seen.items() if len({value[:1] for value in values} - {""}) == 2]
    if len(flags) > 1:
        raise UsageError(
            f"{table.path} has no column of labels, and its columns {notes.listed(flags)} hold 0 and 1 only. Write the "
            "names of those that are 1 into a column 'labels', with ; between them (or add an empty column 'labels' to "
            "extract without labels)"
        )
