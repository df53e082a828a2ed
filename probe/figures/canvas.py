"""How every figure looks and is saved: one column wide, told apart without colour, the numbers beside the picture.

Drawn with matplotlib's objects alone, so it needs no display and no pyplot.
"""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whisper_at_cli.extract.cache.store import LocalStore
from whisper_at_cli.extract.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.typing import RcKeyType

SUFFIXES = (".png", ".pdf", ".svg")
COLUMN_INCHES = 3.15  # 80 mm, a column of Interspeech's template
COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
    "#7F7F7F",
)  # Okabe and Ito's, and grey
MARKERS = "os^Dv<>PX"  # nine, so that they repeat with other colours and lines
MARKS = 8  # on one curve, at most: more hide its dashes
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
FONTS: dict[RcKeyType, object] = {
    "pdf.fonttype": 42,
    "svg.fonttype": "path",
    "svg.hashsalt": "whisper-at-cli",
}  # TrueType; the same ids again
DPI = 240  # of PNG; also what text is measured at
TEXT, TICKS = 8, 7  # points
AXIS_NAMES = {"accuracy": "Accuracy (%)", "mAP": "mAP (%)"}
F1_NAMES = {"accuracy": "F1", "mAP": "average precision"}

_settings = threading.Lock()  # matplotlib's are global


def marks(points: int, number: int) -> tuple[int, int]:
    """matplotlib's `markevery` of the n-th curve: at most MARKS, not at the same points as the next curve's."""
    step = -(-points // MARKS)
    return number % step, step


def look(number: int) -> dict:
    """Colour, marker and line of the n-th curve, counted from 0. No two of the first 72 share colour and marker."""
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": MARKERS[number % len(MARKERS)],
        "linestyle": LINES[(number + number // len(LINES)) % len(LINES)],
    }


def new_figure(height: float) -> Figure:
    """A figure one column wide; `height` is in column widths."""
    from matplotlib.figure import Figure

    return Figure(figsize=(COLUMN_INCHES, height * COLUMN_INCHES), dpi=DPI, layout="constrained")


def legend_above(figure: Figure, axes: Iterable[Axes]) -> None:
    """One legend for all panels, above them, where it covers no curve; of names that several panels share one entry."""
    entries: dict[str, Artist] = {}
    for panel in axes:
        for handle, name in zip(*panel.get_legend_handles_labels(), strict=True):
            entries.setdefault(name, handle)
    figure.legend(
        entries.values(), entries.keys(), loc="outside upper left", ncols=legend_columns(entries), fontsize=TICKS,
        frameon=False, handlelength=2.6, columnspacing=1.2, borderaxespad=0.1,
    )  # fmt: skip


def legend_columns(names: Collection[str]) -> int:
    """How many of these names fit beside each other."""
    return next((n for n in (3, 2) if max(map(len, names)) <= 36 // n), 1)


def legend_height(names: Collection[str]) -> float:
    """Of the lines of a legend after the first, in column widths."""
    lines = -(-len(names) // legend_columns(names))
    return 0.055 * (lines - 1)


def tidy_axes(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x, fontsize=TEXT)
    axes.set_ylabel(y, fontsize=TEXT)
    axes.tick_params(labelsize=TICKS, length=3)
    axes.grid(axis="y", color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def checked_path(path: str | Path) -> Path:
    """Raises UsageError for a name that cannot be drawn, before any work is done."""
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"{path.name} ends in none of {', '.join(SUFFIXES)}; rename the figure")
    return path


def save(figure: Figure, numbers: dict, path: Path) -> dict:
    """Write the picture by its suffix and the numbers beside it as JSON, each whole or not at all; the numbers again.

    The same numbers give the same bytes.
    """
    numbers_path = path.with_suffix(".json")
    try:
        store = LocalStore(path.parent)
        store.write_whole(path.name, [_picture(figure, path.suffix[1:].lower())])
        store.write_whole(numbers_path.name, [(json.dumps(numbers, indent=2) + "\n").encode()])
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}; choose another path") from error
    return numbers


def _picture(figure: Figure, form: str) -> bytes:
    """A figure as png, pdf or svg."""
    from matplotlib import rc_context

    undated = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}.get(form, {})
    content = io.BytesIO()
    with _settings, rc_context(FONTS):
        small: dict[str, Any] = {"pil_kwargs": {"optimize": True}} if form == "png" else {}
        figure.savefig(content, format=form, metadata=undated, **small)
    return content.getvalue()
