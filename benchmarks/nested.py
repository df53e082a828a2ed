"""Accuracy of every head on ESC-10 with settings chosen by nested selection, beside concat-linear.

    python benchmarks/nested.py --cache esc10.zarr
    python benchmarks/nested.py --cache esc10.zarr --folder runs --head wa-tr     # goes on with a run that was stopped

For every official fold the learning rate is chosen on inner folds of its training clips, from the same multiples of
the recipe's rate for all heads; concat-linear chooses its strength there. No test clip takes part in a choice.
Intervals are by bootstrap over recordings, of the mean over seeds. Prints JSON.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from record import Figure, Result, Row, arguments, describe, publish, rounded, settings

from whisper_at_cli.extract.cache import FeatureCache
from whisper_at_cli.heads import search_heads, train_head
from whisper_at_cli.heads.forms import head_form
from whisper_at_cli.heads.training.recipe import named_recipe

HEADS = ("concat-linear", "concat-linear-stats", "last-mlp", "wa-mlp", "last-tr", "wa-tr", "tl-tr-128")
FACTORS = (0.25, 1.0, 4.0)  # of the recipe's learning rate
BASELINE = "concat-linear"


def measure_head(cache: FeatureCache, name: str, options: argparse.Namespace, folder: Path) -> Result:
    head, width = (name.rpartition("-")[0], int(name.rpartition("-")[2])) if name[-1].isdigit() else (name, None)
    kept = {"out": folder / name, "seeds": options.seeds, "device": options.device}
    if head_form(head).solved:
        found = train_head(cache, head=head, **kept)
        chosen = {str(fold["fold"]): rounded(fold["strength"]) for fold in found.folds}
    else:
        changes = {"validate_every": 0} | ({"epochs": options.epochs} if options.epochs else {})
        rate = named_recipe("esc50", head, dim=cache.spec.dim, width=width).lr
        found = search_heads(
            cache, head=head, widths=None if width is None else [width], recipe="esc50", changes=changes,
            rates=[rate * factor for factor in FACTORS], **kept,
        )  # fmt: skip
        chosen = {str(fold["fold"]): rounded(fold["lr"]) for fold in found.folds}
    return {
        "accuracy": rounded(found.value), "ci95": [rounded(end) for end in found.ci95 or []],
        "seeds": [rounded(seed["value"]) for seed in found.seeds], "std_over_seeds": rounded(found.std_over_seeds),
        "std_over_folds": rounded(found.std), "params": found.params, "selected_on": found.selected_on,
        "chosen": chosen, "recordings": found.intervals["recordings"], "training_seconds": rounded(found.seconds),
    }  # fmt: skip


def measure(options: argparse.Namespace, folder: Path) -> Result:
    cache = FeatureCache.open(options.cache)
    heads = options.head or list(HEADS)
    return {
        "settings": settings(options), "clips": int(cache.done.sum()),
        "classes": len(cache.spec.class_names), "backbone": cache.spec.backbone,
        "factors": list(FACTORS), "heads": {name: measure_head(cache, name, options, folder) for name in heads},
    }  # fmt: skip


def rows(result: Result) -> list[Row]:
    found = result["heads"]
    best = found.get(BASELINE)
    made = []
    for name, one in found.items():
        low, high = one["ci95"]
        beside = Figure(rounded(1 / result["classes"]), "", "chance")
        if best and name != BASELINE:
            beside = Figure(best["accuracy"], "", BASELINE)
        made.append(
            Row(
                "heads",
                f"accuracy of {name} on ESC-10 ({result['clips']} clips) with {result['backbone']}, nested selection, "
                f"{len(one['seeds'])} seeds; 95 % interval {low:.3f} to {high:.3f}",
                Figure(one["accuracy"]),
                beside,
                rounded(one["accuracy"] / beside.value),
            )
        )
    return made


def main() -> None:
    parser = arguments(__doc__, seeds=3)
    parser.add_argument("--cache", type=Path, required=True, help="of ESC-10, with its official folds")
    parser.add_argument("--head", action="append", choices=HEADS, help="repeatable; by default all")
    parser.add_argument("--epochs", type=int, help="instead of the recipe's 30")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--folder", type=Path, help="keep the runs here, to go on with them; else they are temporary")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        found = measure(options, options.folder or Path(temporary))
    publish(describe("nested", found, rows, packages=["torch", "numpy"]), options.out)


if __name__ == "__main__":
    main()
