"""Lists of class names: AudioSet's class_labels_indices.csv, those of AST's other data sets, or a name per line."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from whisper_at_cli.extract.cells import as_label, as_name, as_whole
from whisper_at_cli.extract.errors import UsageError
from whisper_at_cli.extract.tables import Table, columns_of, text_lines

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


def read_classes(path: Path, said: list[str] | None = None) -> ClassList:
    """A CSV with the columns index, display_name and optionally mid; or a text file with one name per line.

    Notes on how it was read are appended to `said`.
    """
    said = [] if said is None else said
    if not path.is_file():
        raise UsageError(f"{path} does not exist; give a class_labels_indices.csv or a file with one class per line")
    if not set(COLUMNS) <= set(columns_of(path)):
        names = [as_label(line, str(path), "a class") for line in text_lines(path, said)]
        return _class_list(path, [("", name) for name in names])
    table = Table(path)
    table.need(*COLUMNS)
    numbered = {}
    for place, row in table.rows():
        number = as_whole(row["index"], "index", place)
        if number in numbered:
            raise UsageError(f"{place}: index {number} is there twice")
        name = as_label(row["display_name"], place, "display_name")
        numbered[number] = (as_name(row.get("mid", ""), "mid", place), name)
    said += table.notes
    if not numbered:
        raise UsageError(f"{path} names no class")
    if sorted(numbered) != list(range(len(numbered))):
        raise UsageError(
            f"{path} lists {len(numbered)} classes with indices from {min(numbered)} to {max(numbered)}; they must run "
            f"from 0 to {len(numbered) - 1}"
        )
    return _class_list(path, [numbered[number] for number in range(len(numbered))])


def numbered_classes(rows: list[tuple[str, int, str]], what: str) -> tuple[list[int], tuple[str, ...]]:
    """Labels as indices, and class names in the order of their numbers, of rows with place, number and name.

    Raises UsageError where one number has two names.
    """
    names: dict[int, str] = {}
    for place, number, name in rows:
        if names.setdefault(number, as_label(name, place, "a class")) != name:
            raise UsageError(f"{place}: {what} {number} is {name!r} here and {names[number]!r} above")
    at = {number: index for index, number in enumerate(sorted(names))}
    return [at[number] for _, number, _ in rows], tuple(names[number] for number in sorted(names))


def classes_beside(path: Path, given: Path | None, said: list[str] | None = None) -> ClassList | None:
    """The list that was given, else the only one that lies in this file's folder or, failing that, in the one above."""
    if given is not None:
        return read_classes(given, said)
    for folder in (path.parent, path.parent.parent):
        found = sorted(file for file in folder.glob(LISTS) if file.is_file())
        if len(found) > 1:
            names = ", ".join(file.name for file in found)
            raise UsageError(f"{folder} holds several lists of classes ({names}); choose one with --labels")
        if found:
            return read_classes(found[0], said)
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
