"""The commands of stage 2b: probe. Heavy imports sit inside them."""

from __future__ import annotations

from pathlib import Path

import click

from whisper_at_cli.extract.errors import UsageError
from whisper_at_cli.extract.options import CACHE, DEVICE, SEED, command
from whisper_at_cli.extract.output import print_json, print_notes, print_table, score
from whisper_at_cli.extract.progress import progress_on_stderr


@command("probe")
@CACHE
@click.option(
    "--layer", "layers", multiple=True, default=("all",), show_default=True, help="1 = first; repeatable, or all."
)
@click.option("--strength", default=1.0, show_default=True, help="Inverse L2 penalty, scikit-learn's C.")
@click.option(
    "--figure", type=click.Path(path_type=Path), help="Draw accuracy against layer here (.png, .pdf or .svg)."
)
@SEED
@DEVICE
@click.pass_context
def probe_command(ctx, cache, layers, strength, figure, seed, device, as_json):
    """Fit a linear probe to each layer of CACHE and print how well it tells the classes apart.

    Uses the dataset's official folds, its split, or else random folds.

    \b
        whisper-at-cli probe esc50.zarr --layer all --figure layers.pdf
        whisper-at-cli probe esc50.zarr --layer 16 --layer 32 --json
    """
    from whisper_at_cli.extract import FeatureCache
    from whisper_at_cli.probe import probe_layers

    opened = FeatureCache.open(cache)
    with progress_on_stderr("probe", "layers", quiet=ctx.obj["quiet"]) as progress:
        result = probe_layers(
            opened, layers=_layer_numbers(layers), strength=strength, device=device, seed=seed, progress=progress
        )
    print_notes(result.warnings)
    if figure:
        from whisper_at_cli.probe.figures import draw_layer_accuracy

        draw_layer_accuracy([(opened.spec.backbone, result)], figure)
        click.echo(f"figure: {figure}", err=True)
    if as_json:
        print_json(result)
    else:
        print_probe(result)


def _layer_numbers(layers: tuple[str, ...]):
    if "all" in layers:
        return "all"
    wrong = next((layer for layer in layers if not layer.lstrip("-").isdecimal()), None)
    if wrong is not None:
        raise UsageError(f"--layer {wrong} is neither a number nor 'all'")
    return [int(layer) for layer in layers]


def print_probe(result) -> None:
    if result.metric == "accuracy":
        header = ("layer", "accuracy", "std over folds", "macro F1")
        rows = [(row.layer, row.accuracy, row.accuracy_std, row.macro_f1) for row in result.layers]
    else:
        header = ("layer", "mAP", "std over folds")
        rows = [(row.layer, row.mAP, row.mAP_std) for row in result.layers]
    print_table([(row[0], *map(score, row[1:])) for row in rows], header)


COMMANDS = (probe_command,)
