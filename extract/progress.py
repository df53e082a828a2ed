"""Progress on stderr: a bar on a terminal, a plain line every few seconds otherwise."""

from __future__ import annotations

import sys
import time
from typing import Protocol, TextIO


class Progress(Protocol):
    """Told how far the work is. Called from one thread."""

    def __call__(self, done: int, total: int, message: str = "", /) -> None: ...


class PlainProgress:
    """A line every `every_seconds`, and one at the end; for logs and pipes."""

    def __init__(self, label: str, unit: str, *, every_seconds: float = 5.0, stream: TextIO | None = None):
        self.label, self.unit, self.every_seconds = label, unit, every_seconds
        self.stream = stream or sys.stderr
        self.started = self.last_line = time.monotonic()
        self.first_done: int | None = None
        self.finished = False

    def __call__(self, done: int, total: int, message: str = "") -> None:
        now = time.monotonic()
        if self.first_done is None:
            self.first_done = done if done < total else 0
        if self.finished or (done < total and now - self.last_line < self.every_seconds):
            return
        self.finished = done >= total
        self.last_line = now
        rate = (done - self.first_done) / max(now - self.started, 1e-9)
        note = f", {message}" if message else ""
        print(f"{self.label}: {done}/{total} {self.unit}, {rate:.1f}/s{note}", file=self.stream, flush=True)

    def close(self) -> None:
        """Nothing is left open; here so that both kinds of progress are used alike."""


class BarProgress:
    """A bar that redraws itself, with rate and time left; for terminals."""

    def __init__(self, label: str, unit: str):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(f"{unit} {{task.fields[rate]}}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        self.bar = RichProgress(*columns, console=Console(stderr=True))
        self.task = self.bar.add_task(label, total=None, rate="", note="")
        self.started = time.monotonic()
        self.first_done: int | None = None

    def __call__(self, done: int, total: int, message: str = "") -> None:
        if self.first_done is None:
            self.first_done = done if done < total else 0
            self.bar.start()  # only now: what is refused before it begins shows no bar
        rate = (done - self.first_done) / max(time.monotonic() - self.started, 1e-9)
        self.bar.update(self.task, completed=done, total=total, rate=f"{rate:.1f}/s", note=message)

    def close(self) -> None:
        self.bar.stop()


class progress_on_stderr:
    """`with progress_on_stderr("extract", "clips") as progress:` picks the form that suits stderr."""

    def __init__(self, label: str, unit: str, *, quiet: bool = False):
        self.label, self.unit, self.quiet = label, unit, quiet
        self.shown: PlainProgress | BarProgress | None = None

    def __enter__(self) -> Progress | None:
        if not self.quiet:
            self.shown = (BarProgress if sys.stderr.isatty() else PlainProgress)(self.label, self.unit)
        return self.shown

    def __exit__(self, *exception: object) -> None:
        if self.shown:
            self.shown.close()
