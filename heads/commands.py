"""The commands of stage 2a: train-head, heads. Heavy imports sit inside them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, TypeVar

import click

from whisper_at_cli.extract.errors import UsageError
from whisper_at_cli.extract.options import CACHE, DEVICE, SEED, command
from whisper_at_cli.extract.output import by_layer, interval, print_json, print_notes, print_table, score
from whisper_at_cli.extract.progress import progress_on_stderr
from whisper_at_cli.heads.options import (
    ONLY_FROZEN,
    ONLY_UNFROZEN,
    given_settings,
    recipe_options,
    refuse_the_other_kind,
    run_options,
)

if TYPE_CHECKING:
    from pathlib import Path

    from whisper_at_cli.heads.training.finetune import FinetuneResult
    from whisper_at_cli.heads.training.result import TrainResult


Value = TypeVar("Value")


@command("train-head")
@CACHE
@run_options
@recipe_options
@SEED
@DEVICE
@click.pass_context
def train_head_command(
    ctx: click.Context, /, cache: Path | str, head: str | None, widths: tuple[int, ...], rates: tuple[float, ...],
    search: bool, unfreeze: bool, as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Train a head on CACHE: validate it on the folds or the split, then save it.

    With folds, each is validated on a head trained on the others, and the head that is saved saw all clips. The same
    command with the same --out continues a run that was stopped. torchrun starts it on several GPUs.

    \b
        whisper-at-cli train-head esc50.zarr --head wa-mlp --seeds 3
        whisper-at-cli train-head esc50.zarr --head tl-tr --dim 128 --out tagger
        whisper-at-cli train-head esc50.zarr --head wa-mlp --search --lr 0.003 --lr 0.01
        torchrun --nproc-per-node 8 -m whisper_at_cli.cli train-head as2m.zarr --head tl-tr --dim 512 --out tagger
        whisper-at-cli train-head ESC-50 --unfreeze --model tiny.en --fold 1 --out tuned
    """
    refuse_the_other_kind(ctx, unfreeze)
    options["changes"] = given_settings(options)
    share = options.pop("teacher_share")
    teachers = options.pop("teachers")
    if unfreeze:
        _finetune(ctx, cache, head, widths, rates, as_json, **options)
        return
    if head is None:
        raise UsageError(
            "--head is missing; choose wa-pool, concat-linear, last-mlp, wa-mlp, wa-tr, tl-tr, last-tr or "
            "concat-linear-stats"
        )
    for name in ONLY_UNFROZEN:
        del options[name]
    from whisper_at_cli.extract import FeatureCache
    from whisper_at_cli.heads import search_heads, train_head
    from whisper_at_cli.heads.training.distill import SHARE, Teachers
    from whisper_at_cli.heads.training.ranks import is_lead

    options["head"] = head
    if share is not None and not teachers:
        raise UsageError("--teacher-share needs --teacher: give the folder of a trained head, or leave it out")
    options["teachers"] = Teachers(teachers, SHARE if share is None else share) if teachers else None
    opened, lead = FeatureCache.open(cache), is_lead()
    with progress_on_stderr(f"train {head}", "epochs", quiet=ctx.obj["quiet"] or not lead) as progress:
        if search:
            result = search_heads(opened, rates=rates or None, widths=widths or None, progress=progress, **options)
        else:
            options["changes"] |= {"lr": one_of("--lr", rates)} if rates else {}
            result = train_head(opened, width=one_of("--dim", widths), progress=progress, **options)
    if not lead:
        return
    print_notes(result.warnings)
    if as_json:
        print_json(result)
    else:
        print_training(result)


def _finetune(
    ctx: click.Context, dataset: Path | str, head: str | None, widths: tuple[int, ...], rates: tuple[float, ...],
    as_json: bool, *, changes: dict, faithful: bool, dataset_format: str, **options: Any,
) -> None:  # fmt: skip
    from whisper_at_cli.heads.training.finetune import finetune
    from whisper_at_cli.heads.training.recipe import faithful_changes

    if not options["model"]:
        raise UsageError("--unfreeze needs --model: the Whisper to start from, such as tiny.en")
    changes = (
        (faithful_changes(head or "last-tr") if faithful else {})
        | changes
        | ({"lr": one_of("--lr", rates)} if rates else {})
    )
    options = {name: value for name, value in options.items() if name not in ONLY_FROZEN}
    with progress_on_stderr(f"fine-tune {options['model']}", "epochs", quiet=ctx.obj["quiet"]) as progress:
        result = finetune(
            dataset, head=head or "last-tr", width=one_of("--dim", widths), changes=changes, format=dataset_format,
            progress=progress, **options,
        )  # fmt: skip
    print_notes(result.warnings)
    if as_json:
        print_json(result)
    else:
        print_finetuning(result)


def one_of(option: str, values: tuple[Value, ...]) -> Value | None:
    """The value of an option that only a search may repeat."""
    if len(values) > 1:
        raise UsageError(f"{option} was given {len(values)} times: add --search to compare them, or give it once")
    return values[0] if values else None


@command("heads")
@click.option("--model", default="large-v1", show_default=True, help="Whisper size by name.")
@click.option("--classes", default=527, show_default=True, help="Classes that the heads tell apart.")
@click.option("--clip-seconds", default=10.0, show_default=True, help="Length of the clip that is counted.")
def heads_command(model: str, classes: int, clip_seconds: float, as_json: bool) -> None:
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
                row["name"], row["dim"], digits(row["params"] / 1e6), digits(row["flops"] / 1e9),
                digits(row["flops_two_per_multiply_add"] / 1e9), f"{digits(100 * row['share_of_encoder'])}%",
                f"{row['speedup_vs_ast']:,.0f}",
            )
            for row in rows
        ],
        ("head", "dim", "params (M)", "GFLOPs", "GFLOPs 2x", "of encoder", "speed-up vs AST"),
    )  # fmt: skip


def digits(value: float) -> str:
    """Four significant digits, without an exponent."""
    return f"{value:.{max(0, 3 - math.floor(math.log10(value)))}f}" if value > 0 else "0"


def print_training(result: TrainResult) -> None:
    if result.search:
        print_search(result)
    rows = [
        ("head", f"{result.head}, {result.dim} channels, {result.params:,} parameters"),
        (result.metric, f"{score(result.value)} ({_interval(result)})"),
        ("folds", f"{_by_fold(result.folds)} (mean {score(result.fold_mean)}, std {score(result.std)})"),
    ]
    rows += [(f"{what} chosen on", where) for what, where in result.selected_on.items()]
    if "strength" in result.selected_on:
        rows.append(("strength", "  ".join(f"{fold['fold']}: {fold['strength']:.2g}" for fold in result.folds)))
    if result.layer_weights:
        rows.append(("layer weights", by_layer(result.layer_weights)))
    if result.class_attention:
        mean = [sum(layer) / len(layer) for layer in zip(*result.class_attention.values(), strict=True)]
        rows.append(("attention to layers", f"{by_layer(mean)} (mean over classes; evaluate has each)"))
    if len(result.seeds) > 1:
        seeds = "  ".join(f"{of_seed['seed']}: {score(of_seed['value'])}" for of_seed in result.seeds)
        rows.append(("seeds", f"{seeds} (std over seeds {score(result.std_over_seeds)})"))
    rows += [
        ("time", f"{result.seconds:.1f} s, {result.samples_per_second:,.0f} samples/s, "
                 f"{result.waiting_share:.1%} of it waiting for clips ({result.tier})"),
        ("checkpoint", result.checkpoint or "not saved (give --out FOLDER)"),
    ]  # fmt: skip
    if result.curve:
        rows.append(("curve", result.curve))
    print_table(rows, ("training", ""))


def _interval(result: TrainResult | FinetuneResult) -> str:
    made = result.intervals
    if not made:
        return "without an interval"
    drawn = f"bootstrap over {made['recordings']} recordings, {made['draws']:,} draws"
    return f"95 % interval {interval(result.ci95)}, {drawn}"


def print_finetuning(result: FinetuneResult) -> None:
    print_table(
        [
            ("model", f"{result.model} with {result.head}, {result.params:,} parameters, all trained"),
            ("learning rate", f"{result.recipe['lr']:g}, the encoder's {result.encoder_lr:g}"),
            (result.metric, f"{score(result.value)} ({_interval(result)})"),
            ("folds", f"{_by_fold(result.folds)} (mean {score(result.fold_mean)}, std {score(result.std)})"),
            ("time", f"{result.seconds:.1f} s, {result.samples_per_second:,.1f} samples/s"),
            ("checkpoint", result.checkpoint or "not saved (give --out FOLDER)"),
        ],
        ("fine-tuning", ""),
    )


def _by_fold(folds: list[dict]) -> str:
    return "  ".join(f"{fold['fold']}: {score(fold['value'])}" for fold in folds)


def print_search(result: TrainResult) -> None:
    """What was tried; values are of the clips that chose."""
    assert result.search is not None, "only a search has rows"
    print_table(
        [
            (
                row["rank"], f"{row['lr']:.3g}", row["dim"], f"{row['params']:,}", score(row["value"]),
                score(row["std"]), ", ".join(map(str, row["chosen_for"])), f"{row['seconds']:.1f}",
            )
            for row in result.search["rows"]
        ],
        ("rank", "lr", "dim", "params", f"inner {result.metric}", "std over folds", "chosen for fold", "seconds"),
    )  # fmt: skip


COMMANDS = (train_head_command, heads_command)
