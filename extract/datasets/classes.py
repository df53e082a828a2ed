"""Lists of class names: AudioSet's class_labels_indices.csv, those of AST's other data sets, or a name per line."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from whisper_at_cli.extract.datasets.tables import as_name, csv_columns, csv_rows, text_lines
from whisper_at_cli.extract.errors import UsageError

LISTS = "*class_labels_indices.csv"
COLUMNS = ("index", "display_name")


@dataclass(frozen=True)
class ClassList:
    """Class names in the order of their numbers, and what each may be called by."""

    path: Path
    names: tuple[str, ...]
    index: dict[str, int] = field(repr=False)  # of machine ids and of names

    def numbers(self, labels: list[str], place: str) -> tuple[int, ...]:
        unknown = next((label for label in labels if label not in self.index), None)
        if unknown is not None:
            raise UsageError(f"{place}: label {unknown[:60]!r} is none of the {len(self.names)} classes of {self.path}")
        return tuple(sorted({self.index[label] for label in labels}))


def read_classes(path: Path) -> ClassList:
    """A CSV with the columns index, display_name and optionally mid; or a text file with one name per line."""
    if not path.is_file():
        raise UsageError(f"{path} does not exist; give a class_labels_indices.csv or a file with one class per line")
    if not set(COLUMNS) <= set(csv_columns(path)):
        names = [as_name(line, "a class", str(path)) for line in text_lines(path)]
        return _class_list(path, [("", name) for name in names])
    numbered = {}
    for place, row in csv_rows(path, needs=COLUMNS):
        if not (row["index"].isascii() and row["index"].isdecimal() and len(row["index"]) < 8):
            raise UsageError(f"{place}: index is {row['index']!r}; give a whole number from 0")
        if int(row["index"]) in numbered:
            raise UsageError(f"{place}: index {row['index']} is there twice")
        name = as_name(row["display_name"], "display_name", place)
        numbered[int(row["index"])] = (as_name(row.get("mid", ""), "mid", place), name)
    if sorted(numbered) != list(range(len(numbered))):
        raise UsageError(
            f"{path} numbers its {len(numbered)} classes from {min(numbered)} to {max(numbered)} with gaps"
        )
    return _class_list(path, [numbered[number] for number in range(len(numbered))])


def classes_beside(path: Path, given: Path | None) -> ClassList | None:
    """The list that was given, else the only one that lies in this file's folder or, failing that, in the one above."""
    if given is not None:
        return read_classes(given)
    for folder in (path.parent, path.parent.parent):
        found = sorted(file for file in folder.glob(LISTS) if file.is_file())
        if len(found) > 1:
            names = ", ".join(file.name for file in found)
            raise UsageError(f"{folder} holds several lists of classes ({names}); choose one with --labels")
        if found:
            return read_classes(found[0])
    return None


def _class_list(path: Path, classes: list[tuple[str, str]]) -> ClassList:
    if not classes:
        raise UsageError(f"{path} names no class")
    index: dict[str, int] = {}
    for at, (mid, name) in enumerate(classes):
        for key in {mid, name} - {""}:
            if index.setdefault(key, at) != at:
                raise UsageError(f"{path} names the class {key!r} twice")
    return ClassList(path, tuple(name or mid for mid, name in classes), index)
