"""Figures from probe results. `draw_layer_accuracy` is the lower panel of the paper's Figure 1: accuracy against layer.

Drawn with matplotlib's objects alone: nothing global is touched, so any number can be drawn at once, without a display.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path

from whisper_at_cli.extract.errors import UsageError

SUFFIXES = (".png", ".pdf", ".svg")
COLUMN_INCHES = 3.4
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito's
MARKERS = "os^Dv<>"
AXIS_NAMES = {"accuracy": "Accuracy (%)", "mAP": "mAP (%)"}


def draw_layer_accuracy(curves: Sequence[tuple[str, object]], path: str | Path) -> dict:
    """Draw a curve with a band of one standard deviation over folds for each (name, ProbeResult or its JSON).

    Writes `path` as PNG, PDF or SVG by its suffix, and beside it the numbers that were drawn, which it returns.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"{path.name} ends in none of {', '.join(SUFFIXES)}; rename the figure")
    drawn = [_numbers(name, result) for name, result in curves]
    metrics = {curve["metric"] for curve in drawn}
    if len(metrics) != 1:
        raise UsageError(f"curves of {' and '.join(sorted(metrics)) or 'nothing'} cannot share an axis")
    numbers = {"figure": "layer accuracy", "metric": metrics.pop(), "band": "1 std over folds", "curves": drawn}

    path.parent.mkdir(parents=True, exist_ok=True)
    _replace(path, lambda unfinished: _draw(numbers, unfinished))
    _replace(path.with_suffix(".json"), lambda unfinished: unfinished.write_text(json.dumps(numbers, indent=2) + "\n"))
    return numbers


def _numbers(name: str, result) -> dict:
    """What is drawn of a probe's result. Layers without a value are left out."""
    if is_dataclass(result):
        result = asdict(result)
    metric = result.get("metric", "accuracy")
    layers = [layer for layer in result["layers"] if layer[metric] is not None]
    return {
        "name": name,
        "metric": metric,
        "layers": [layer["layer"] for layer in layers],
        "value": [layer[metric] for layer in layers],
        "std": [layer.get(f"{metric}_std") or 0.0 for layer in layers],
    }


def _draw(numbers: dict, path: Path) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(COLUMN_INCHES, 0.7 * COLUMN_INCHES), layout="constrained")
    axes = figure.add_subplot()
    for i, curve in enumerate(numbers["curves"]):
        _draw_curve(axes, curve, COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)])

    last = max((layer for curve in numbers["curves"] for layer in curve["layers"]), default=1)
    axes.set_xlim(1 - 0.03 * last, last + 0.03 * last)
    axes.set_xticks(_layer_ticks(last))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10], integer=True))
    axes.set_xlabel("Encoder layer", fontsize=8)
    axes.set_ylabel(AXIS_NAMES[numbers["metric"]], fontsize=8)
    axes.tick_params(labelsize=7, length=3)
    axes.grid(axis="y", color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, frameon=False, loc="best")
    figure.savefig(path, dpi=300, format=path.suffix[1:].lower(), metadata=_undated(path))


def _draw_curve(axes, curve: dict, colour: str, marker: str) -> None:
    layers, value = curve["layers"], [100 * v for v in curve["value"]]
    std = [100 * s for s in curve["std"]]
    if len(layers) == 1:  # too narrow for a band
        axes.errorbar(layers, value, std, color=colour, linewidth=1.2, capsize=3)
    low, high = ([v + sign * s for v, s in zip(value, std, strict=True)] for sign in (-1, 1))
    axes.fill_between(layers, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.plot(layers, value, color=colour, marker=marker, markersize=3, linewidth=1.2, label=curve["name"])


def _layer_ticks(last: int) -> list[int]:
    """Layer 1 and then round layer numbers, at most nine in all."""
    if last <= 8:
        return list(range(1, last + 1))
    step = next(step for step in (2, 4, 5, 8, 10, 20, 50, 100) if last // step <= 8)
    return [1, *range(step, last + 1, step)]


def _undated(path: Path) -> dict:
    """Metadata that leave the date out, so that drawing the same numbers again does not change a PNG or PDF."""
    return {".pdf": {"CreationDate": None}, ".svg": {"Date": None}}.get(path.suffix.lower(), {})


def _replace(path: Path, write) -> None:
    """Write to a name beside `path`, then rename: the file is never half there."""
    unfinished = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        write(unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
