"""Results on stdout: tables for people, JSON for programs. Progress and messages go to stderr."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, is_dataclass

import click

PIPE_WIDTH = 160  # of tables that no terminal shows


def print_json(result: object) -> None:
    """One JSON document on stdout; NaN and infinity, which JSON does not have, as null."""
    click.echo(json.dumps(_finite(as_data(result)), indent=1))


def as_data(result: object) -> object:
    """A dataclass as dictionaries, anything else as it is."""
    return asdict(result) if is_dataclass(result) and not isinstance(result, type) else result


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_table(rows: Iterable[Iterable[object]], header: tuple[str, ...]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(*header, box=box.SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    terminal = sys.stdout.isatty()
    console = Console(width=None if terminal else PIPE_WIDTH, highlight=False, emoji=False, markup=False)
    with console.capture() as drawn:
        console.print(table)
    lines = [line.rstrip() for line in drawn.get().splitlines()]
    click.echo("\n".join(line for line in lines if line) + "\n")


def print_notes(warnings: Iterable[str]) -> None:
    for warning in warnings:
        click.echo(f"note: {warning}", err=True)


def plain(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value[:12])) + (f", ... ({len(value)})" if len(value) > 12 else "")
    return str(value)


def printable(text: str) -> str:
    """A path on one line, whatever is in its name."""
    return text if text.isprintable() else repr(text)


def score(value: float | None) -> str:
    return "undefined" if value is None or value != value else f"{value:.4f}"


def by_layer(values: list[float]) -> str:
    """A value of each layer, 1 the first."""
    return "  ".join(f"{layer}: {value:.3f}" for layer, value in enumerate(values, 1))


def interval(bounds: list[float] | None, form: Callable[[float], str] = score) -> str:
    return "undefined" if bounds is None else f"{form(bounds[0])} to {form(bounds[1])}"
