"""The commands that change or make caches without encoding: sync. Heavy imports sit inside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from whisper_at_cli.extract.commands import FORMAT, LABELS
from whisper_at_cli.extract.options import CACHE, DATASET, command
from whisper_at_cli.extract.output import print_json, print_notes


@command("sync")
@DATASET
@CACHE
@FORMAT
@LABELS
@click.option("--window", type=float, help="As given to `extract`.")
@click.option("--hop", type=float, help="As given to `extract`.")
@click.option("--update", is_flag=True, help="Mark clips whose audio file has changed, for `extract` to redo.")
@click.option("--prune", is_flag=True, help="Drop clips from CACHE that DATASET no longer has.")
def sync_command(dataset: Path | str, cache: Path | str, as_json: bool, **options: Any) -> None:
    """Update CACHE after DATASET was edited, without encoding anything.

    Labels, folds and splits are replaced, and new clips are added as pending. `extract` does the same by itself; only
    before `extract --shard I/N` or several devices, run `sync` once.

    \b
        whisper-at-cli sync my-sounds sounds.zarr
        whisper-at-cli sync clips.csv clips.zarr --update --prune
    """
    from whisper_at_cli.extract.pipeline.sync import sync

    report = sync(dataset, cache, notify=lambda note: print_notes([note]), **options)
    if as_json:
        print_json(report)
        return
    click.echo(f"{report.cache}: {report.clips} clips, {report.pending} pending; {report.changed or 'nothing changed'}")


COMMANDS = (sync_command,)
