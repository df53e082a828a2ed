"""Every note that extraction can give: of how data was read, and of what makes a run slower than it could be.

A note is one line here. Whoever gives it calls it with its values, `notes.NO_LABELS(name="clips.csv")`, and gets the
text; `whisper-at-cli notes` prints the list, and tests/test_notes.py provokes each of them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

SHOWN = 5  # names that a note lists


@dataclass(frozen=True, slots=True)
class Note:
    """A note: its id, its text with {places} for values, and what it means for the user."""

    id: str
    template: str
    meaning: str

    def __call__(self, **values: object) -> str:
        return self.template.format(**values)

    def matches(self, text: str) -> bool:
        """Whether a text is this note with some values."""
        parts = re.split(r"\{[a-z_]+(?:![a-z])?(?::[^}]*)?\}", self.template)
        return re.fullmatch(".*?".join(re.escape(part) for part in parts), text, re.DOTALL) is not None


NOTES: dict[str, Note] = {}


def _note(id: str, template: str, meaning: str) -> Note:
    assert id not in NOTES, f"two notes are called {id}"
    NOTES[id] = Note(id, template, meaning)
    return NOTES[id]


def listed(names: Sequence[str], *, most: int = SHOWN) -> str:
    """The first few names, and `...` where there are more."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


# fmt: off
# Tables
TABLE_FORM = _note("table-form", "{table} was read as {form}", "The table is not plain UTF-8 with commas.")
TABLE_ENCODING = _note(
    "table-encoding", "{table} is not UTF-8 and was read as Windows-1252 (Latin-1), with words such as {sample}; if "
    "they look wrong, save it as UTF-8", "Letters outside ASCII may be wrong if the file has another encoding.")
SHORT_ROWS = _note(
    "short-rows", "{rows} rows of {table} have fewer fields than its header (first: line {line}); the missing fields "
    "were read as empty", "Something may be missing from these rows.")
COLUMNS_TAKEN = _note(
    "columns-taken", "{table}: {taken}", "Which columns were used, where they do not have the names of the manual.")
NAN_LABELS = _note(
    "nan-labels", "{clips} clips of {table} have the label nan, which was read as no label",
    "pandas writes nan for an empty cell.")
WHOLE_LABELS = _note(
    "whole-labels", "the labels of {table} are whole numbers and were read as such: {old} is {new}",
    "pandas writes whole numbers as 1.0 where a column has empty cells.")
LABELS_SPLIT = _note(
    "labels-split", "the labels of {table} were split at {separator!r}, as {example!r} was into {count}",
    "A column labels holds several labels, usually with ; between them.")
LABELS_WHOLE = _note(
    "labels-whole", "labels of {table} hold {separator!r} and were read as one class each, for example {example!r}; "
    "several labels are separated by ; in a column labels", "Names of classes may hold commas, but few hold ; or |.")
SPANS_UNUSED = _note(
    "spans-unused", "the columns {columns} of {table} were not used; if they say which part of its file a clip is, "
    "call them start and end (in seconds)", "Without start and end, a clip begins where its file does.")
SLICE_SPANS = _note(
    "slice-spans", "start and end of {table} were not used: beside slice_file_name they say where a slice was cut from",
    "This is a table of UrbanSound8K, whose files are cut already.")
TABLE_FOUND = _note(
    "table-found", "clips and labels were read from {table}", "The table was found beside the audio.")
TABLES_JOINED = _note(
    "tables-joined", "{count} tables were read, each as a split: {tables}", "Their names are names of splits.")
TABLE_UNREAD = _note(
    "table-unread", "{table} was not read: {reason}", "A table lies beside the audio, and labels come from elsewhere.")
UNLISTED = _note(
    "unlisted", "{files} audio files are not listed in {table} and were left out: {names}",
    "Only the clips of the table are extracted.")
# Labels, folds and splits
NO_LABEL_COLUMN = _note(
    "no-label-column", "{table} has none of the label columns {wanted}; its columns are {columns}",
    "If one of its columns holds the labels, rename it to label.")
NO_LABELS = _note(
    "no-labels", "{name} has no labels: features are extracted, but probes and heads need labels",
    "No column, folder or list says what is in the clips.")
SOME_UNLABELLED = _note(
    "some-unlabelled", "{unlabelled} of {clips} clips have no label", "Their cells are empty.")
FOLDER_CLASSES = _note(
    "folder-classes", "{classes} from folder names: {names}", "The name of each clip's folder is its label.")
CLASSES_ALIKE = _note(
    "classes-alike", "some classes differ only in capitals, spaces or hyphens: {names}",
    "If they mean the same, write them in one way.")
FOLDER_ROLES = _note(
    "folder-roles", "folders that are not classes: {roles}",
    "Names of splits, folds and containers such as audio/ are not taken for labels.")
FOLDER_DOUBT = _note(
    "folder-doubt", "some folders that were taken for classes look like splits, folds or containers: {names}",
    "Not all clips lie in such folders, so they could not be told apart.")
FOLDS_FROM_ZERO = _note(
    "folds-from-zero", "folds 0 to {last} were read as folds 1 to {count}",
    "Folds are counted from 1 here, and 0 stands for none.")
FOLD_ZERO = _note(
    "fold-zero", "{clips} clips have fold 0, which was read as no fold: the folds are {folds}",
    "Evaluation by folds leaves these clips out.")
# Files
RELOCATED = _note(
    "relocated", "{count} files were found in other folders than listed, for example {listed} at {found}",
    "The dataset was packed in another way than it was published.")
SAME_NAME = _note(
    "same-name", "{count} clips have several files of the same name, and one of them was used: {names}",
    "Copies of a file lie in several folders.")
NAMES_ADAPTED = _note(
    "names-adapted", "{count} files were found under names that differ in {how}, for example {listed} as {found}",
    "The table writes names in another way than the disk.")
MISSING_FILES = _note(
    "missing-files", "{missing} of {clips} {looked} are missing; the first was looked for at {path}",
    "Missing clips are marked failed; the same command takes them once they are there.")
BESIDE_LEFT_OUT = _note(
    "beside-left-out", "the dataset was found in {folder}; {files} audio files beside it were left out: {names}",
    "The dataset lies deeper than the folder that was given.")
LEFT_OUT = _note(
    "left-out-suffix", "{files} files were left out, because they do not have a known audio suffix: {suffixes}",
    "A folder is searched for files with known suffixes; a manifest can name any file.")
CUT = _note(
    "cut", "{long} of {clips} {looked} are longer than {seconds:g} s, and {share:.0f} % of the audio is cut: use "
    "--clip-seconds or --window", "Only the first seconds of each file are encoded.")
# Single layouts
BACKGROUND_NOISE = _note(
    "background-noise", "{files} files of {folder} were left out: they are not words",
    "Speech Commands has minutes of noise beside its words.")
PACK_RATE = _note(
    "pack-rate", "{pack} does not state its sample rate; {rate} Hz was assumed, as in PANNs",
    "With another rate, all features would be wrong.")
PACK_CLASSES = _note(
    "pack-classes", "no list of classes lies beside {pack}: they are named by number (see --labels)",
    "An HDF5 pack has no class names of its own.")
SHARDS_READ = _note(
    "shards-read", "{shards} tar shards were read: audio from {audio}, labels from {labels}",
    "Members of one key are a clip; what else it holds was left out.")
SHARD_AUDIO = _note(
    "shard-audio", "{clips} keys of the shards hold several audio files, of which the first was taken",
    "A clip is one audio file.")
SHARD_KEYS = _note(
    "shard-keys", "{keys} keys of the shards have no audio and were left out: {names}",
    "Members of a key must stand one after another.")
CUTS_READ = _note(
    "cuts-read", "{cuts} cuts were read, with their {what}", "Labels come from custom fields, text from supervisions.")
# Single files: with the clip's path, in the report, the cache and `info`
AUDIO_LOST = _note(
    "audio-lost", "{lost:.2f} s of {promised:.2f} s are lost: the file is truncated or damaged",
    "The rest was read. Above a tenth, the clip fails instead; up to 0.1 s nothing is said.")
PACKETS_SKIPPED = _note(
    "packets-skipped", "{packets} skipped: damaged, or not audio",
    "The file holds something between its packets of audio, as tags in MP3 files, or packets that cannot be decoded.")
AUDIO_GAP = _note(
    "audio-gap", "its timestamps skip {gap:.2f} s: the recording was paused, or audio was lost",
    "The audio before and behind the gap was joined, as Whisper's loader does.")
FLAC_CUT = _note(
    "flac-cut", "its header promises {promised:.2f} s, but its last frame is whole and ends at {end:.2f} s: it was cut "
    "out of a longer file without encoding it again",
    "As ffmpeg -c copy does, which keeps the header of the longer file. All of its frames were read.")
OGG_CUT = _note(
    "ogg-cut", "the file ends in the middle of an Ogg page: it was truncated, and how much is missing is unknown",
    "An Ogg file does not say how long it is; what is there was read.")
# The run
FLOAT32_SLOW = _note(
    "float32-slow", "float32 is about nine times as slow as float16 on a GPU (large-v1 on an H200: 69 against 616 "
    "clips/s); --precision auto computes in float16 in a new cache", "The run takes longer than it needs to.")
KERNELS_UNUSED = _note(
    "kernels-unused", "the fused GPU kernels are not used ({reason}); the encoder is about a fifth slower without them",
    "They need Triton and a C compiler, such as gcc. The features are the same.")
OTHER_DEVICE = _note(
    "other-device", "the cache was begun on {begun} with --batch-size {size}; this run, on {device}, uses {fitting}. "
    "Features from the two devices differ in their last bits", "Another kind of device has room for other batches.")
BATCHES_SPLIT = _note(
    "batches-split", "batches of {size} clips did not fit in the memory of {device} and were encoded {most} clips at a "
    "time; free some memory, or give --batch-size {most} for a new cache", "Something else used the device's memory.")
AGAIN_IN_FLOAT32 = _note(
    "again-in-float32", "{clips} clips were encoded again in float32, because their features were not finite in a "
    "smaller type", "They are as good as all others.")
# fmt: on
