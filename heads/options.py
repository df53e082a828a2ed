"""The options of train-head: one for each setting of a recipe, from its declaration, and those of the run itself.

Nothing heavy is imported here, since `--help` reads it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import cast

import click

from whisper_at_cli.extract.errors import UsageError
from whisper_at_cli.extract.options import PREDICTIONS
from whisper_at_cli.heads.training.recipe import Recipe

RUN_SETTINGS = ("lr", "seed")  # declared below, with what a run makes of them


Function = Callable[..., None]
Decorator = Callable[[Function], Function]


class WholeOrNone(click.ParamType):
    """A whole number, or `none`."""

    name = "integer or none"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        text = str(value)
        return "none" if text.lower() == "none" else cast("click.ParamType[int]", click.INT).convert(text, param, ctx)


TYPES: dict[str, click.ParamType] = {
    "int": click.INT,
    "float": click.FLOAT,
    "str": click.STRING,
    "int | None": WholeOrNone(),
}


def _setting_option(setting: dataclasses.Field) -> Decorator:
    """The option of one setting; where it is not given, the recipe's value holds."""
    flag, help, kind = setting.name.replace("_", "-"), setting.metadata["help"], str(setting.type)
    if kind == "bool":
        return click.option(f"--{flag}/--no-{flag}", setting.name, default=None, help=help)
    if kind.startswith("tuple"):
        return click.option(f"--{flag}", setting.name, type=float, nargs=2, default=None, help=help)
    return click.option(f"--{flag}", setting.name, type=TYPES[kind], help=help)


def recipe_options(function: Function) -> Function:
    """Decorate a command with an option for every setting of a recipe; `given_settings` picks what was given."""
    for setting in reversed(dataclasses.fields(Recipe)):
        if setting.name not in RUN_SETTINGS:
            function = _setting_option(setting)(function)
    return function


def given_settings(options: dict) -> dict:
    """The settings among a command's options that a user gave, as changes to a recipe."""
    names = [setting.name for setting in dataclasses.fields(Recipe) if setting.name not in RUN_SETTINGS]
    given = {name: options.pop(name) for name in names}
    return {name: None if value == "none" else value for name, value in given.items() if value is not None}


RUN_OPTIONS = (
    click.option("--head",
        help="wa-pool, concat-linear, last-mlp, wa-mlp, wa-tr or tl-tr; concat-linear-stats and last-tr too.  "
        "[required; last-tr with --unfreeze]",
    ),
    click.option(
        "--dim", "widths", type=int, multiple=True,
        help="tl-tr, wa-tr and wa-pool: project to this many channels first. Repeatable with --search.  [default: "
        "wa-pool 128, others none]",
    ),
    click.option(
        "--block/--no-block", default=True, show_default=True, help="wa-pool only: a Transformer block over time."
    ),
    click.option(
        "--recipe",
        help="as20k, as2m, esc50 or modern; each setting has an option too.  [default: modern for wa-pool, else by the "
        "data]",
    ),
    click.option(
        "--lr", "rates", type=float, multiple=True,
        help="Learning rate of Adam. Repeatable with --search.  [default: the recipe's]",
    ),
    click.option("--seeds", type=int, default=1, show_default=True, help="Repeat with so many seeds: mean and spread."),
    click.option(
        "--faithful", is_flag=True,
        help="Mix, mask, smooth labels and drop last batches as the original code does; docs/heads.md has the list.",
    ),
    click.option(
        "--search", is_flag=True,
        help="Choose the learning rate (of --lr) and dimension (of --dim) for each test fold on other clips.",
    ),
    click.option(
        "--teacher", "teachers", type=click.Path(path_type=Path), multiple=True,
        help="Also learn from a trained head: the folder of an earlier --out with the same folds. Repeatable.",
    ),
    click.option(
        "--teacher-share", type=float,
        help="--teacher only: the part of a clip's target that the teachers have.  [default: 0.5]",
    ),
    click.option("--permute-labels", is_flag=True, help="Control: permute the labels between recordings at random."),
    click.option("--out", type=click.Path(path_type=Path), help="Save heads, metrics and curve in this folder."),
    PREDICTIONS,
    click.option("--restart", is_flag=True, help="Replace the run that --out holds instead of continuing it."),
    click.option("--tensorboard", is_flag=True, help="Also write TensorBoard event files below --out."),
    click.option(
        "--tier", default="auto", show_default=True,
        help="Where features lie: device, memory or stream (read each epoch); auto: the fastest that is large enough.",
    ),
    click.option(
        "--together", default="auto", show_default=True,
        help="auto: folds, seeds and learning rates of MLP heads train as one model; never: one after another.",
    ),
)  # fmt: skip


UNFREEZE_OPTIONS = (
    click.option("--unfreeze", is_flag=True, help="Train the encoder too, from audio: CACHE is then a dataset."),
    click.option("--model", help="--unfreeze only: the Whisper to start from; as `extract --model`."),
    click.option(
        "--encoder-lr-share", type=float, default=0.01, show_default=True,
        help="--unfreeze only: the encoder's learning rate as a share of the head's; 0 leaves the encoder as it is.",
    ),
    click.option("--fold", type=int, help="--unfreeze only: hold out this fold alone.  [default: each in turn]"),
    click.option("--format", "dataset_format", default="auto", show_default=True, help="--unfreeze only."),
    click.option("--clip-seconds", type=float, help="--unfreeze only: as `extract`.  [default: the dataset's]"),
)  # fmt: skip
# what means nothing without, and with, --unfreeze
ONLY_UNFROZEN = ("model", "encoder_lr_share", "fold", "dataset_format", "clip_seconds")
ONLY_FROZEN = (
    "teachers",
    "teacher_share",
    "block",
    "seeds",
    "search",
    "restart",
    "tensorboard",
    "tier",
    "together",
    "permute_labels",
)


def run_options(function: Function) -> Function:
    for option in reversed(RUN_OPTIONS + UNFREEZE_OPTIONS):
        function = option(function)
    return function


def refuse_the_other_kind(ctx: click.Context, unfreeze: bool) -> None:
    """Raises UsageError for an option that was given and would do nothing."""
    default = click.core.ParameterSource.DEFAULT
    names = ONLY_FROZEN if unfreeze else ONLY_UNFROZEN
    given = [
        param.opts[0]
        for param in ctx.command.params
        if param.name in names and ctx.get_parameter_source(param.name) != default
    ]
    if given:
        raise UsageError(f"{', '.join(given)} {'does nothing with' if unfreeze else 'needs'} --unfreeze")
