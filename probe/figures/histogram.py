"""Figure 3: how many classes are best recognised in each layer.

Layers count from 1. A class that is equally well recognised in several layers counts in the lowest of them; the share
of such classes in a bar is hatched, and their number is said in the figure. Whiskers are 95 % intervals of the counts
over bootstrap draws of recordings; the title says in which share of the draws a class keeps its layer, on average.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from whisper_at_cli.extract.errors import UsageError
from whisper_at_cli.probe.figures import canvas
from whisper_at_cli.probe.figures.curves import layer_ticks
from whisper_at_cli.probe.figures.inputs import PROBE, Result, only
from whisper_at_cli.probe.scores import best_layers

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_figure_3(results: Sequence[Result], path: str | Path) -> dict:
    """A panel for each probe's result. Returns the numbers, which lie beside `path` too."""
    path = canvas.checked_path(path)
    if not results:
        raise UsageError("figure 3 has nothing to draw; give a cache, or a result of probe")
    panels = [_histogram(result) for result in only(results, PROBE, "figure 3")]
    figure = canvas.new_figure(0.58 * len(panels) + 0.08)
    axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for here, panel in zip(axes, panels, strict=True):
        _draw(here, panel)
    if any(map(sum, (panel["of_these_tied"] for panel in panels))):
        canvas.legend_above(figure, axes)
    return canvas.save(figure, {"figure": 3, "histograms": panels}, path)


def _histogram(result: Result) -> dict:
    """Counted from the layers' own scores, so that ties are seen in older results too."""
    metric = result.content.get("metric", "accuracy")
    field = "class_f1" if metric == "accuracy" else "class_ap"
    layers = sorted(layer["layer"] for layer in result.content["layers"])
    if len(layers) < 2:
        raise UsageError(f"{result.source} holds one layer, and figure 3 compares layers; probe with --layer all")
    scores = {layer["layer"]: layer[field] for layer in result.content["layers"]}
    kept = result.content.get("best_layer_per_class_kept") or {}
    best, ties = {}, {}
    for name in scores[layers[0]]:
        at = best_layers(layers, [scores[layer][name] for layer in layers])
        if at:
            best[name] = at[0]
        if len(at) > 1:
            ties[name] = at
    return {
        "name": result.name,
        "score": field,
        "layers": layers,
        "classes": [sum(layer == at for at in best.values()) for layer in layers],
        "of_these_tied": [sum(layer == at[0] for at in ties.values()) for layer in layers],
        "best_layer_per_class": best,
        "ties": ties,
        "tie_rule": "a tied class counts in the lowest of its layers",
        "classes_ci95": _intervals(result.content, layers),
        "kept": {name: share for name, share in kept.items() if share is not None},
        "undefined": [name for name in scores[layers[0]] if name not in best],
    }


def _intervals(content: dict, layers: list[int]) -> list[list[float]] | None:
    """Of each layer's count; None of a result that has none."""
    found = {row["layer"]: row["ci95"] for row in content.get("best_layer_counts") or ()}
    return [found[layer] for layer in layers] if all(found.get(layer) for layer in layers) else None


def _draw(axes: Axes, panel: dict) -> None:
    from matplotlib.ticker import MaxNLocator

    layers, tied = panel["layers"], panel["of_these_tied"]
    alone = [count - shared for count, shared in zip(panel["classes"], tied, strict=True)]
    axes.bar(layers, alone, width=0.8, color=canvas.COLOURS[0], label="best in this layer alone")
    if any(tied):
        axes.bar(
            layers, tied, width=0.8, bottom=alone, color="white", edgecolor=canvas.COLOURS[0], hatch="////",
            linewidth=0.6, label="as good in a higher layer",
        )  # fmt: skip
    highest = panel["classes"]
    if panel["classes_ci95"]:
        low, high = zip(*panel["classes_ci95"], strict=True)
        highest = [*highest, *high]
        axes.vlines(layers, low, high, color="black", linewidth=1)
        for ends in (low, high):
            axes.plot(layers, ends, linestyle="", marker="_", markersize=5, color="black")
    canvas.tidy_axes(axes, "Best layer", "Number of classes")
    axes.set_xlim(min(layers) - 0.6, max(layers) + 0.6)
    axes.set_xticks([tick for tick in layer_ticks(max(layers)) if tick >= min(layers)])
    axes.set_ylim(top=max(1, *highest) * 1.08)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    said = f"{sum(tied)} of {sum(panel['classes'])} classes tie" if any(tied) else "no class ties"
    if panel["kept"]:
        said += f"; kept in {sum(panel['kept'].values()) / len(panel['kept']):.0%} of draws"
    axes.set_title(f"{panel['name']}: {said}", fontsize=canvas.TICKS, loc="right")
