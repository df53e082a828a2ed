"""The learning curve of a run: loss and validation metric over epochs, a thin line for each training."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from whisper_at_cli.extract.cache.store import LocalStore
from whisper_at_cli.extract.evaluation.metrics import mean_and_std

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_curve(lines: list[dict], finals: dict[str, float], metric: str, path: Path, title: str) -> None:
    """Write a PNG of `lines` (of metrics.jsonl); `finals` holds the metric of each training's final weights,
    NaN where it is undefined."""
    from io import BytesIO

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    names = list(dict.fromkeys(line["training"] for line in lines))
    for axes, quantity in zip(figure.subplots(1, 2), ("loss", metric), strict=True):
        curves = [
            [(line["epoch"], line[quantity]) for line in lines if line["training"] == name and quantity in line]
            for name in names
        ]
        for name, curve in zip(names, curves, strict=True):
            if curve:
                label = name if len(names) <= 10 else None
                axes.plot(*zip(*curve, strict=True), linewidth=0.8, alpha=0.6, label=label)
        _draw_mean(axes, [curve for curve in curves if curve])
        mean, _ = mean_and_std(list(finals.values()))
        if quantity == metric and not math.isnan(mean):
            axes.axhline(mean, color="black", linestyle=":", linewidth=1, label=f"final weights {mean:.4f}")
        axes.set(xlabel="epoch", ylabel="training loss" if quantity == "loss" else f"validation {metric}")
        axes.grid(alpha=0.3)
        if any(curves):
            axes.legend(fontsize=7)
    figure.suptitle(title, fontsize=10)
    picture = BytesIO()
    figure.savefig(picture, dpi=150)
    LocalStore(path.parent).write_whole(path.name, [picture.getvalue()])


def _draw_mean(axes: Axes, curves: list[list[tuple[int, float]]]) -> None:
    if len(curves) < 2:
        return
    epochs = sorted(set.intersection(*(set(dict(curve)) for curve in curves)))
    means = [np.mean([dict(curve)[epoch] for curve in curves]) for epoch in epochs]
    axes.plot(epochs, means, color="black", linewidth=1.6, label="mean")
