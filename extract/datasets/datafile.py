"""The JSON data files of AST and Whisper-AT: {"data": [{"wav": FILE, "labels": "/m/...,/m/..."}, ...]}."""

from __future__ import annotations

from pathlib import Path

from whisper_at_cli.extract.datasets.base import Dataset
from whisper_at_cli.extract.datasets.classes import classes_beside
from whisper_at_cli.extract.datasets.columns import Columns
from whisper_at_cli.extract.datasets.entries import entry_of
from whisper_at_cli.extract.datasets.manifest import dataset_of
from whisper_at_cli.extract.datasets.rows import Entry, RowsBuilder
from whisper_at_cli.extract.errors import UsageError
from whisper_at_cli.extract.tables import whole_json

LAYOUT = (
    'a .json file as {"data": [{"wav": FILE, "labels": "/m/...,/m/..."}]} with a class_labels_indices.csv beside it or '
    "given by --labels"
)
EXAMPLE = '{"data": [{"wav": "a.wav", "labels": "/m/0bt9lr,/m/05tny_"}]}'


def recognise(path: Path) -> bool:
    if not (path.is_file() and path.suffix.lower() == ".json"):
        return False
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return '"data"' in file.read(4096)
    except OSError:
        return False


def read(path: Path, *, labels: Path | None = None) -> Dataset:
    """Every entry, in its order, whether or not its file is there. Paths are relative to the JSON file."""
    if not path.is_file():
        raise UsageError(f"{path} is not a file; give {LAYOUT}")
    content = whole_json(path)
    data = content.get("data") if isinstance(content, dict) else None
    if not isinstance(data, list):
        raise UsageError(f"{path} has no list 'data'; a data file looks like {EXAMPLE}")
    builder = RowsBuilder()
    for number, row in enumerate(data, start=1):
        builder.add(_entry(row, f"entry {number} of {path}"))
    rows = builder.rows(path)
    said: list[str] = []
    classes = classes_beside(path, labels, said)
    if classes is None and len(rows.labels):
        raise UsageError(f"no class_labels_indices.csv lies beside {path}; name it with --labels")
    return dataset_of(rows, path, classes, path.parent, tuple(said))


def _entry(row: object, place: str) -> Entry:
    if not isinstance(row, dict) or not isinstance(row.get("wav"), str):
        raise UsageError(f"{place} names no 'wav'; a data file looks like {EXAMPLE}")
    names = row.get("labels") or []
    if isinstance(names, str):
        names = [name.strip() for name in names.split(",")]
    given = {key: row.get(key) for key in ("start", "end", "fold", "split", "id", "text")}
    row = {**given, "audio": row["wav"], "labels": names, "id": row.get("id") or row.get("video_id")}
    return entry_of(row, place, Columns("audio", "labels"))
