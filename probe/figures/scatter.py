"""Figure 2: sounds that the encoder recognises well are sounds that disturb its transcription less.

A point for each class: how well a probe of one layer recognises it, and by how much it raises the word error rate from
a high SNR to a low one. The line is fitted to all classes; where it falls, r is negative. Bars are 95 % intervals: of
the score over draws of recordings, of the increase over draws of utterances; those of r are over draws of classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from whisper_at_cli.extract.errors import UsageError
from whisper_at_cli.probe.figures import canvas
from whisper_at_cli.probe.figures.inputs import PROBE, ROBUSTNESS, Result, increase_intervals, of_kind, wer_at
from whisper_at_cli.probe.figures.labels import label_points

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LOW_SNR, HIGH_SNR = -10.0, 20.0
LEAST_CLASSES = 3
MARK = 3.0  # points
LABEL = 6.0
DRAWS = 10_000
MINUS = "\N{MINUS SIGN}"


def draw_figure_2(
    results: Sequence[Result], path: str | Path, *, layer: int | None = None, low_snr: float = LOW_SNR,
    high_snr: float = HIGH_SNR, wer: str = "whisper",
) -> dict:  # fmt: skip
    """One probe's result and one of robustness; `layer` is the last that was probed unless it is given. Returns the
    numbers, which lie beside `path` too."""
    path = canvas.checked_path(path)
    probes, robust = of_kind(results, PROBE), of_kind(results, ROBUSTNESS)
    if len(results) != 2 or len(probes) != 1 or len(robust) != 1:
        found = ", ".join(f"{result.source} ({result.kind})" for result in results) or "nothing"
        raise UsageError(f"figure 2 takes one result of probe, or a cache, and one of robustness; it was given {found}")
    score, score_ci, at = _class_scores(probes[0], layer)
    (_, low), (_, high) = (wer_at(robust[0], snr, wer) for snr in (low_snr, high_snr))
    increase_ci = increase_intervals(robust[0].content["results"], low_snr, high_snr, wer)
    common = [name for name in score if name in low and name in high]
    if len(common) < LEAST_CLASSES:
        raise UsageError(
            f"{probes[0].source} and {robust[0].source} have {len(common)} classes in common, and a line needs "
            f"{LEAST_CLASSES}; the first has {_some(score)}, the second {_some(low)}"
        )
    points: list[dict[str, Any]] = [
        {"class": name, "score": score[name], "score_ci95": score_ci.get(name), "wer_increase": low[name] - high[name],
         "wer_increase_ci95": increase_ci.get(name), "wer": [low[name], high[name]]}
        for name in common
    ]  # fmt: skip
    numbers = {
        "figure": 2,
        "probe": probes[0].name,
        "robustness": robust[0].name,
        "layer": at,
        "score": "class_f1" if probes[0].content.get("metric", "accuracy") == "accuracy" else "class_ap",
        "snr": [low_snr, high_snr],
        "wer": wer,
        "classes": points,
        "left_out": sorted(set(score) ^ set(common) | set(low) ^ set(common)),
        **_correlation([point["score"] for point in points], [point["wer_increase"] for point in points]),
    }
    figure = canvas.new_figure(1.0)
    numbers["labels_that_overlap"] = _draw(figure.add_subplot(), numbers)
    return canvas.save(figure, numbers, path)


def _class_scores(result: Result, layer: int | None) -> tuple[dict[str, float], dict[str, list[float]], int]:
    """Score of each class that has one, its 95 % interval where the result has one, and the layer."""
    layers = {row["layer"]: row for row in result.content["layers"]}
    layer = max(layers) if layer is None else layer
    if layer not in layers:
        raise UsageError(
            f"{result.source} holds layers {', '.join(map(str, sorted(layers)))}; layer {layer} was asked for"
        )
    field = "class_f1" if result.content.get("metric", "accuracy") == "accuracy" else "class_ap"
    values = {name: value for name, value in layers[layer][field].items() if value is not None}
    return values, layers[layer].get("class_ci95") or {}, layer


def _some(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)[:4]) or "none"


def _correlation(x: list[float], y: list[float]) -> dict:
    """Line and correlations over all points; None where one side does not vary."""
    from scipy.stats import linregress, spearmanr

    if len(set(x)) == 1 or len(set(y)) == 1:
        return {"line": None, "pearson": None, "spearman": None}
    line, rank = linregress(x, y), spearmanr(x, y)
    return {
        "line": {"slope": float(line.slope), "intercept": float(line.intercept)},
        "pearson": {"r": float(line.rvalue), "p": float(line.pvalue), "ci95": _interval_of_r(x, y)},
        "spearman": {"r": float(rank.statistic), "p": float(rank.pvalue), "ci95": _interval_of_r(x, y, ranks=True)},
    }


def _interval_of_r(x: list[float], y: list[float], *, ranks: bool = False) -> list[float]:
    """Percentiles over draws of classes; draws in which one side does not vary are left out."""
    from scipy.stats import rankdata

    drawn = np.random.default_rng(0).integers(0, len(x), size=(DRAWS, len(x)))
    sides = [np.array(side)[drawn] for side in (x, y)]
    if ranks:
        sides = [rankdata(side, axis=1) for side in sides]
    a, b = (side - side.mean(axis=1, keepdims=True) for side in sides)
    spread = np.sqrt((a**2).sum(axis=1) * (b**2).sum(axis=1))
    varies = spread > 1e-12
    return np.quantile((a * b).sum(axis=1)[varies] / spread[varies], [0.025, 0.975]).tolist()


def _said(name: str, found: dict) -> str:
    p, (low, high) = found["p"], found["ci95"]
    probability = f"p = {p:.2g}" if p >= 1e-4 else "p < 0.0001"
    return f"{name} = {found['r']:.2f} (95 %: {low:.2f} to {high:.2f}), {probability}".replace("-", MINUS)


def _draw(axes: Axes, numbers: dict) -> int:
    points = numbers["classes"]
    x, y = ([100 * point[field] for point in points] for field in ("score", "wer_increase"))
    for point, across, up in zip(points, x, y, strict=True):
        for bars, middle in (("score_ci95", across), ("wer_increase_ci95", up)):
            if ends := point[bars]:
                reach = [[max(0, middle - 100 * ends[0])], [max(0, 100 * ends[1] - middle)]]
                sides = (None, reach) if bars == "score_ci95" else (reach, None)
                axes.errorbar(across, up, *sides, color="0.75", linewidth=0.6, zorder=1)
    axes.plot(x, y, linestyle="", marker="o", markersize=MARK, color=canvas.COLOURS[0], zorder=3)
    name = canvas.F1_NAMES["accuracy" if numbers["score"] == "class_f1" else "mAP"]
    low, high = numbers["snr"]
    canvas.tidy_axes(
        axes, f"Class-wise {name} (%)", f"WER increase, {high:g} to {low:g} dB (points)".replace("-", MINUS)
    )
    axes.margins(0.1)
    line = None
    if numbers["line"]:
        ends = [min(x), max(x)]
        fitted = [100 * numbers["line"]["intercept"] + numbers["line"]["slope"] * end for end in ends]
        line = (ends, fitted)
        axes.plot(ends, fitted, linestyle="--", linewidth=1, color="0.35", zorder=2)
        said = f"{len(points)} classes: {_said('r', numbers['pearson'])}\n{_said('Spearman', numbers['spearman'])}"
        axes.set_title(said, fontsize=canvas.TICKS, loc="right")
    names = [point["class"].replace("_", " ") for point in points]
    return label_points(axes, x, y, names, fontsize=LABEL, mark=MARK, line=line)
