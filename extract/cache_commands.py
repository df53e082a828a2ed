"""The commands that change or make caches without encoding: sync, merge, select, copy. Heavy imports sit inside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from whisper_at_cli.extract.commands import FORMAT, LABELS
from whisper_at_cli.extract.options import ADDRESS, CACHE, DATASET, command, layer_numbers
from whisper_at_cli.extract.output import print_json, print_notes
from whisper_at_cli.extract.progress import progress_on_stderr

SKIP_PENDING = click.option(
    "--skip-pending",
    is_flag=True,
    help="Leave out clips that are not extracted yet. Without this option they are an error.",
)
OUT = click.argument("out", type=ADDRESS)


@command("sync")
@DATASET
@CACHE
@FORMAT
@LABELS
@click.option("--window", type=float, help="As given to `extract`.")
@click.option("--hop", type=float, help="As given to `extract`.")
@click.option("--update", is_flag=True, help="Mark clips whose audio file has changed, for `extract` to redo.")
@click.option("--prune", is_flag=True, help="Drop clips from CACHE that DATASET no longer has.")
def sync_command(
    dataset: Path | str, cache: Path | str, as_json: bool, update: bool, prune: bool, **reading: Any
) -> None:
    """Update CACHE after DATASET was edited, without encoding anything.

    Labels, folds and splits are replaced, and new clips are added as pending. `extract` does the same by itself; only
    before `extract --shard I/N` or several devices, run `sync` once.

    \b
        whisper-at-cli sync my-sounds sounds.zarr
        whisper-at-cli sync clips.csv clips.zarr --update --prune
    """
    from whisper_at_cli.extract.pipeline.options import ReadOptions
    from whisper_at_cli.extract.pipeline.sync import sync

    options = ReadOptions(**reading)
    report = sync(dataset, cache, options, update=update, prune=prune, notify=lambda note: print_notes([note]))
    if as_json:
        print_json(report)
        return
    click.echo(f"{report.cache}: {report.clips} clips, {report.pending} pending; {report.changed or 'nothing changed'}")


@command("merge")
@click.argument("caches", nargs=-1, required=True, type=ADDRESS, metavar="CACHE...")
@OUT
@SKIP_PENDING
@click.pass_context
def merge_command(
    ctx: click.Context, caches: tuple[Path | str, ...], out: Path | str, skip_pending: bool, as_json: bool
) -> None:
    """Join two or more caches into the new cache OUT. They must have the same backbone and settings.

    Clips keep the order of the caches, and no id may occur twice. Classes are matched by name. Where possible, whole
    shards are hard links to those of the first cache, which take no extra disk space.

    \b
        whisper-at-cli merge as20k.zarr esc50.zarr both.zarr
    """
    from whisper_at_cli.extract.cache.derive import merge

    with progress_on_stderr("merge", "clips", quiet=ctx.obj["quiet"]) as progress:
        report = merge(caches, out, skip_pending=skip_pending, progress=progress)
    _print_derived(report, as_json)


@command("select")
@CACHE
@OUT
@click.option("--split", "splits", multiple=True, help="Keep clips of this split. May be given again.")
@click.option(
    "--class",
    "classes",
    multiple=True,
    help="Keep clips that have this label, and drop other labels. May be given again.",
)
@click.option("--layers", multiple=True, metavar="LAYERS", help="Keep these layers: 4 or 1,2 or 1-4.  [default: all]")
@click.option(
    "--dtype",
    type=click.Choice(["float16", "float32", "int8"]),
    help="Storage type of the features.  [default: as in CACHE]",
)
@SKIP_PENDING
@click.pass_context
def select_command(
    ctx: click.Context, cache: Path | str, out: Path | str, splits: tuple[str, ...], classes: tuple[str, ...],
    layers: tuple[str, ...], dtype: str | None, skip_pending: bool, as_json: bool,
) -> None:  # fmt: skip
    """Write a part of CACHE into the new cache OUT, for example to share it.

    Layers keep their numbers. Without options, OUT holds all of CACHE in the newest version of the cache format.

    \b
        whisper-at-cli select as20k.zarr small.zarr --layers 4,8,16 --dtype int8
        whisper-at-cli select fsd50k.zarr dogs.zarr --split test --class Bark --class Growling
    """
    from whisper_at_cli.extract.cache.derive import select

    with progress_on_stderr("select", "clips", quiet=ctx.obj["quiet"]) as progress:
        report = select(
            cache, out, splits=splits, classes=classes, layers=layer_numbers(layers, "--layers"),
            dtype=dtype, skip_pending=skip_pending, progress=progress,
        )  # fmt: skip
    _print_derived(report, as_json)


@command("copy")
@CACHE
@OUT
@click.pass_context
def copy_command(ctx: click.Context, cache: Path | str, out: Path | str, as_json: bool) -> None:
    """Copy CACHE to OUT, each a folder or an address in a bucket.

    Every checksum is checked during the copy. If the copy is interrupted, the same command completes it. Until then,
    OUT cannot be opened as a cache.

    \b
        whisper-at-cli copy esc50.zarr s3://my-bucket/esc50.zarr
        whisper-at-cli copy s3://my-bucket/esc50.zarr here.zarr
    """
    from whisper_at_cli.extract.cache.copying import copy

    with progress_on_stderr("copy", "files", quiet=ctx.obj["quiet"]) as progress:
        report = copy(cache, out, progress=progress)
    if as_json:
        print_json(report)
        return
    skipped = f", {report.skipped} of them by an earlier run" if report.skipped else ""
    click.echo(f"{report.cache}: {report.files} files copied{skipped}; {report.bytes / 1e6:.1f} MB")


def _print_derived(report: Any, as_json: bool) -> None:
    if as_json:
        print_json(report)
        return
    failed = f", {report.failed} failed" if report.failed else ""
    left_out = f"; {report.left_out} pending clips were left out" if report.left_out else ""
    there = report.clips - report.written
    already = f"; {there} were there already" if there else ""
    click.echo(
        f"{report.cache}: {report.clips} clips ({report.done} done{failed}), {report.layers} layers, {report.dtype}, "
        f"{report.bytes / 1e6:.1f} MB{already}{left_out}"
    )


COMMANDS = (sync_command, merge_command, select_command, copy_command)
