"""What the commands of every room share: how one is declared, and the arguments that mean the same everywhere."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import click

from whisper_at_cli.extract.errors import UsageError


class Address(click.Path):
    """A path, or the address of something in a bucket as it is: `s3://...`, which a Path would mangle."""

    def convert(
        self, value: str | os.PathLike[str], param: click.Parameter | None, ctx: click.Context | None
    ) -> str | bytes | os.PathLike[str]:
        return value if "://" in str(value) else super().convert(value, param, ctx)


ADDRESS = Address(path_type=Path)
CACHE = click.argument("cache", type=ADDRESS)
DATASET = click.argument("dataset", type=ADDRESS)
DEVICE = click.option(
    "--device", default="auto", show_default=True, help="cuda, cuda:1, mps or cpu; auto takes the best."
)
SEED = click.option("--seed", default=0, show_default=True, help="For whatever is drawn at random.")
PREDICTIONS = click.option(
    "--predictions", type=click.Path(path_type=Path, dir_okay=False),
    help="Write the scores of held-out clips into this .npz file, for `compare`.",
)  # fmt: skip


def command(name: str) -> Callable[[Callable[..., None]], click.Command]:
    """A command with --json. `ctx.obj["quiet"]` says whether progress is unwanted."""

    def register(function: Callable[..., None]) -> click.Command:
        function = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")(function)
        return click.command(name)(function)

    return register


def layer_numbers(given: tuple[str, ...], option: str) -> list[int] | None:
    """The layers that an option names, as `4`, `1,2` or `1-4`, in that order; None for `all`, or for none given.

    Raises UsageError for anything else.
    """
    if not given or "all" in given:
        return None
    numbers: list[int] = []
    for part in ",".join(given).split(","):
        match = re.fullmatch(r"\s*(\d{1,4})\s*(?:-\s*(\d{1,4})\s*)?", part)
        if not match:
            raise UsageError(f"{option} {part} is not a layer: give numbers from 1, as 4 or 1,2 or 1-4, or all")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise UsageError(f"{option} {part} is empty: give the lower layer first, as {last}-{first}")
        numbers += range(first, last + 1)
    return numbers
