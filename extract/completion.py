"""What the shell offers after Tab: values of options, names of models, files. Nothing heavy is imported for it.

Options stay free text, since a wrong value has its own message; `offer_values` only adds what to suggest.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import click
from click.shell_completion import CompletionItem

from whisper_at_cli.extract.backbones.sizes import WHISPER_SIZES

Completion = Callable[[click.Context, str], list[CompletionItem]]  # of what is typed so far

DATASETS = (
    "auto", "audioset", "esc50", "fsd50k", "urbansound8k", "speech-commands", "vggsound", "hdf5", "huggingface", "json",
    "lhotse", "manifest", "tar", "folder",
)  # fmt: skip
PRECISIONS = ("auto", "float32", "bfloat16", "float16")
VALUES = {  # of the parameters of this name, in whichever command
    "device": ("auto", "cpu", "cuda", "mps"),
    "dtype": ("float16", "float32", "int8"),
    "precision": PRECISIONS,
    "batch_size": ("auto",),
    "strength": ("1.0", "auto"),
    "loss": ("bce", "ce", "asymmetric"),
}
VALUES_OF = {  # of one command's parameter
    ("extract", "format"): DATASETS,
    ("extract", "shard"): ("1/1", "auto"),
    ("extract", "engine"): ("local", "ray"),
    ("extract", "address"): ("auto",),
    ("sync", "format"): DATASETS,
    ("compare", "metric"): ("accuracy", "mAP", "bits"),
    ("compare", "form"): ("text", "markdown"),
    ("verify", "sample"): ("100%", "10%", "1%"),
    ("export", "format"): ("npz", "hdf5"),
    ("probe", "layers"): ("all",),
    ("select", "layers"): ("all",),
    ("probe", "shots"): ("1,2,4,8,16", "8"),
    ("probe", "kind"): ("linear", "knn", "attentive"),
    ("figure", "number"): ("1", "2", "3", "5"),
    ("figure", "wer"): ("whisper", "paper"),
    ("robustness", "noise_format"): DATASETS,
    ("robustness", "mixing"): ("exact", "paper"),
    ("train-head", "head"): (
        "wa-pool",
        "concat-linear",
        "concat-linear-stats",
        "last-mlp",
        "wa-mlp",
        "wa-tr",
        "tl-tr",
        "last-tr",
    ),
    ("train-head", "recipe"): ("as20k", "as2m", "esc50", "modern"),
    ("train-head", "tier"): ("auto", "device", "memory", "stream"),
    ("train-head", "together"): ("auto", "never"),
    ("train-head", "dataset_format"): DATASETS,
    ("train-head", "precision"): ("auto", "float32", "bfloat16"),
    ("train-head", "optimizer"): ("adam", "adamw"),
    ("train-head", "lr_schedule"): ("steps", "cosine"),
    ("train-head", "mixup_partner"): ("batch", "uniform"),
    ("train-head", "time_mask_layers"): ("each", "same"),
    ("train-head", "label_smoothing_form"): ("standard", "original"),
    ("heads", "model"): tuple(WHISPER_SIZES),
    ("import-head", "backbone"): tuple(WHISPER_SIZES),
    ("export-head", "prefix"): ("module.", "at_model."),
    ("table", "number"): ("1", "2"),
    ("table", "form"): ("text", "markdown", "latex", "csv"),
    ("transcribe", "tag_window"): ("shared", "exact"),
}
PATHS = {  # that may be addresses or names too, and so are no click.Path
    ("figure", "inputs"), ("compare", "inputs"), ("figure", "robustness"), ("report", "sources"),
    ("report", "predictions"), ("evaluate", "data"), ("import-head", "cache"),
}  # fmt: skip
MODELS = {(name, "model") for name in ("extract", "robustness", "train-head", "transcribe", "tag")}
FILE = CompletionItem("", type="file")  # has the shell itself complete a path


def offer_values(group: click.Group) -> None:
    """Give the parameters of a group's commands what there is to suggest for them."""
    for name, command in group.commands.items():
        for parameter in command.params:
            completion = _completion(name, parameter.name)
            if completion:
                parameter.shell_complete = completion  # type: ignore[method-assign, assignment]  # one of its own


def _completion(command: str, parameter: str) -> Completion | None:
    values = VALUES_OF.get((command, parameter)) or VALUES.get(parameter)
    if (command, parameter) in MODELS:
        return _models
    if (command, parameter) in PATHS:
        return _paths
    return _fixed(values) if values else None


def _fixed(values: tuple[str, ...]) -> Completion:
    def complete(_ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(value) for value in values if value.startswith(incomplete)]

    return complete


def _paths(_ctx: click.Context, _incomplete: str) -> list[CompletionItem]:
    return [FILE]


def _models(_ctx: click.Context, incomplete: str) -> list[CompletionItem]:
    """Whisper's sizes, and what here may hold weights: folders and .pt files. Anything else is completed as a path.

    A shell takes either values or a path of its own completion, not both.
    """
    names = [*WHISPER_SIZES, *_weights_here()]
    return [CompletionItem(name) for name in names if name.startswith(incomplete)] or [FILE]


def _weights_here() -> list[str]:
    try:
        there = [entry.name for entry in os.scandir() if entry.is_dir() or Path(entry.name).suffix == ".pt"]
    except OSError:  # a folder that may not be read, or is gone
        return []
    return sorted(name for name in there if not name.startswith("."))
