"""The commands of stage 2a: train-head, heads. Heavy imports sit inside them."""

from __future__ import annotations

from pathlib import Path

import click

from whisper_at_cli.extract.options import CACHE, DEVICE, SEED, command
from whisper_at_cli.extract.output import print_json, print_notes, print_table, score
from whisper_at_cli.extract.progress import progress_on_stderr


@command("train-head")
@CACHE
@click.option("--head", required=True, help="last-mlp, wa-mlp, wa-tr or tl-tr.")
@click.option("--dim", type=int, help="tl-tr only: project the layers to this many channels first.")
@click.option("--recipe", help="as20k, as2m or esc50.  [default: by the data]")
@click.option("--lr", type=float, help="Learning rate.  [default: the recipe's]")
@click.option("--epochs", type=int, help="[default: the recipe's]")
@click.option("--out", type=click.Path(path_type=Path), help="Save the head, trained on all clips, in this folder.")
@SEED
@DEVICE
@click.pass_context
def train_head_command(ctx, cache, head, dim, recipe, lr, epochs, out, seed, device, as_json):
    """Train a head on CACHE: validate it on the folds or the split, then save it.

    With folds, each is validated on a head trained on the others, and the head that is saved saw all clips.

    \b
        whisper-at-cli train-head esc50.zarr --head wa-mlp
        whisper-at-cli train-head esc50.zarr --head tl-tr --dim 128 --out tagger
    """
    from whisper_at_cli.extract import FeatureCache
    from whisper_at_cli.heads import train_head

    opened = FeatureCache.open(cache)
    changes = {name: value for name, value in (("lr", lr), ("epochs", epochs)) if value is not None}
    with progress_on_stderr(f"train {head}", "epochs", quiet=ctx.obj["quiet"]) as progress:
        result = train_head(
            opened, head=head, width=dim, recipe=recipe, changes=changes, out=out, device=device, seed=seed,
            progress=progress,
        )  # fmt: skip
    print_notes(result.warnings)
    if as_json:
        print_json(result)
    else:
        print_training(result)


@command("heads")
@click.option("--model", default="large-v1", show_default=True, help="Whisper size by name.")
@click.option("--classes", default=527, show_default=True, help="Classes that the heads tell apart.")
@click.option("--clip-seconds", default=10.0, show_default=True, help="Length of the clip that is counted.")
def heads_command(model, classes, clip_seconds, as_json):
    """Parameters and FLOPs of every head for one clip, beside Whisper's encoder and AST (tables 1 and 2 of the paper).

    FLOPs count one multiply-add as one, as the paper does; "2x" counts it as two.

    \b
        whisper-at-cli heads --model large-v1
    """
    from whisper_at_cli.heads.count import head_table

    rows = head_table(model, classes=classes, clip_seconds=clip_seconds)
    if as_json:
        print_json({"model": model, "classes": classes, "clip_seconds": clip_seconds, "heads": rows})
        return
    print_table(
        [
            (
                row["head"], row["dim"], f"{row['params'] / 1e6:.2f}", f"{row['flops'] / 1e9:.4f}",
                f"{row['flops_two_per_multiply_add'] / 1e9:.4f}", f"{row['share_of_encoder']:.4%}",
                f"{row['speedup_vs_ast']:,.0f}",
            )
            for row in rows
        ],
        ("head", "dim", "params (M)", "GFLOPs", "GFLOPs 2x", "of encoder", "speed-up vs AST"),
    )  # fmt: skip


def print_training(result) -> None:
    folds = "  ".join(f"{fold['fold']}: {score(fold['value'])}" for fold in result.folds)
    print_table(
        [
            ("head", f"{result.head}, {result.dim} channels, {result.params:,} parameters"),
            (result.metric, f"{score(result.value)} (std over folds {score(result.std)})"),
            ("folds", folds),
            ("time", f"{result.seconds:.1f} s, {result.samples_per_second:,.0f} samples/s"),
            ("checkpoint", result.checkpoint or "not saved (give --out FOLDER)"),
        ],
        ("training", ""),
    )


COMMANDS = (train_head_command, heads_command)
