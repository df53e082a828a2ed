"""What a cell of a table means: names, seconds, folds, whole numbers. Every fault is a UsageError with its place."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from typing import SupportsFloat

from whisper_at_cli.extract import notes
from whisper_at_cli.extract.errors import UsageError

NAME_CHARACTERS, PATH_CHARACTERS = 1024, 4096
MAX_FOLD = 32767
NO_NUMBER = frozenset(("", "nan", "na", "n/a", "<na>", "none", "null", "nat"))  # how programs write an empty cell
WHOLE = re.compile(r"([0-9]{1,7})(?:\.0{1,20})?")
FOLD = re.compile(r"(?:fold[-_ ]?)?([0-9]{1,7})(?:\.0{1,20})?", re.IGNORECASE)


def is_nan(value: object) -> bool:
    """Whether a cell is pandas' nan, as a number or as text."""
    return (isinstance(value, float) and math.isnan(value)) or (isinstance(value, str) and value.strip() in NANS)


NANS = frozenset(("nan", "NaN", "NAN"))


def as_name(value: object, what: str, place: str, *, most: int = NAME_CHARACTERS) -> str:
    """Text that can be stored: no longer than `most`, on one line. Numbers are taken as text, 3.0 as 3."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = f"{int(value)}" if isinstance(value, float) and value.is_integer() else f"{value}"
    if not isinstance(value, str):
        raise UsageError(f"{place}: {what} is {shown(value)}, not text")
    if len(value) > most or "\0" in value or ("\n" in value.strip() and what != "audio"):
        raise UsageError(f"{place}: {what} is {shown(value)}; give at most {most} characters on one line")
    value = value.strip() if what != "audio" else value
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{place}: {what} is {shown(value)}, which is not text") from None
    return value


def as_label(value: object, place: str, what: str = "a label") -> str:
    """The name of a class, in one Unicode form: two that look the same are the same."""
    return unicodedata.normalize("NFC", as_name(value, what, place))


def as_seconds(value: object, what: str, place: str) -> float | None:
    """Seconds from 0, None where nothing was given."""
    if _is_empty(value):
        return None
    try:
        seconds = float(value) if isinstance(value, str | SupportsFloat) and not isinstance(value, bool) else math.nan
    except (TypeError, ValueError, OverflowError):
        seconds = math.nan
    if not 0 <= seconds < 1e9:
        raise UsageError(f"{place}: {what} is {shown(value)}; give seconds from 0, such as 12.5")
    return seconds


def as_span(start: object, end: object, place: str) -> tuple[float | None, float | None]:
    start, end = as_seconds(start, "start", place), as_seconds(end, "end", place)
    if end is not None and end <= (start or 0.0):
        raise UsageError(f"{place}: end is {end:g} and start {start or 0:g}; end must be greater than start")
    return start, end


def as_fold(value: object, place: str) -> int | None:
    """A fold from 0, as 1, 1.0 or fold_1; None where nothing was given."""
    if _is_empty(value):
        return None
    match = None if isinstance(value, bool) else FOLD.fullmatch(shown_whole(value))
    if match is None or int(match[1]) > MAX_FOLD:
        raise UsageError(f"{place}: fold is {shown(value)}; give a whole number from 1 to {MAX_FOLD}, or nothing")
    return int(match[1])


def from_one(folds: Sequence[int | None]) -> tuple[list[int], list[str]]:
    """Folds counted from 1, 0 for none; and notes.

    Where 0 stands beside 1 to n - 1, folds were counted from 0: nobody's clips are dropped. Any other 0 is none.
    """
    there = {fold for fold in folds if fold is not None}
    last = max(there, default=0)
    if last and there == set(range(last + 1)):
        shifted = [0 if fold is None else fold + 1 for fold in folds]
        return shifted, [notes.FOLDS_FROM_ZERO(last=last, count=last + 1)]
    said = []
    if len(there) > 1 and 0 in there:
        others = ", ".join(str(fold) for fold in sorted(there - {0})[:12])
        said.append(notes.FOLD_ZERO(clips=sum(fold == 0 for fold in folds), folds=others))
    return [fold or 0 for fold in folds], said


def as_whole(value: object, what: str, place: str, *, most: int = 9_999_999) -> int:
    """A whole number from 0, as 1 or 1.0."""
    match = None if isinstance(value, bool) else WHOLE.fullmatch(shown_whole(value))
    if match is None or int(match[1]) > most:
        raise UsageError(f"{place}: {what} is {shown(value)}; give a whole number from 0 to {most}")
    return int(match[1])


def shown_whole(value: object) -> str:
    """The text of a number; of a very long one, which Python does not write, nothing that is a number."""
    try:
        return str(value).strip()
    except ValueError:
        return "too long"


def shown(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python writes
        return "a number of thousands of digits"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _is_empty(value: object) -> bool:
    return value is None or is_nan(value) or (isinstance(value, str) and value.strip().lower() in NO_NUMBER)
