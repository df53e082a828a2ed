"""Figure 1: WER against SNR for each model above, accuracy against layer for each model's encoder below."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whisper_at_cli.extract.errors import UsageError
from whisper_at_cli.probe.figures import canvas
from whisper_at_cli.probe.figures.inputs import PROBE, ROBUSTNESS, Result, as_result, of_kind, wer_curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BAND = "95 % simultaneous band"
SPECTROGRAM = "log-mel"  # a backbone whose only layer lies before the encoder: layer 0
FOLDS_BAND = "1 std over folds"  # of results that have no intervals


def draw_layer_accuracy(curves: Sequence[tuple[str, object]], path: str | Path) -> dict:
    """Draw a curve for each (name, ProbeResult or its JSON), with the 95 % band that holds all its layers at once.

    Results without intervals have a band of one standard deviation over folds.
    Writes `path` as PNG, PDF or SVG by its suffix, and beside it the numbers that were drawn, which it returns.
    """
    path = canvas.checked_path(path)
    lower = _lower([as_result(name, result) for name, result in curves])
    numbers = {"figure": "layer accuracy", **lower}
    figure = canvas.new_figure(0.7)
    looks = {curve["name"]: canvas.look(at) for at, curve in enumerate(lower["curves"])}
    axes = figure.add_subplot()
    _draw_layers(axes, lower, looks)
    canvas.legend_above(figure, [axes])
    return canvas.save(figure, numbers, path)


def draw_figure_1(results: Sequence[Result], path: str | Path, *, wer: str = "whisper", chance: bool = False) -> dict:
    """Results of robustness above, of probes below; a model has the same look in both. A panel without results is left
    out. With `chance` a line shows the score of a model that does not look at the clips. Returns the numbers, which lie
    beside `path` too."""
    path = canvas.checked_path(path)
    probes, robust = of_kind(results, PROBE), of_kind(results, ROBUSTNESS)
    if len(probes) + len(robust) < len(results):
        other = next(result for result in results if result.kind not in (PROBE, ROBUSTNESS))
        raise UsageError(f"{other.source} is a result of {other.kind}; figure 1 takes those of probe and robustness")
    if not results:
        raise UsageError("figure 1 has nothing to draw; give caches, or results of probe and robustness")
    numbers: dict[str, Any] = {
        "figure": 1,
        "upper": _upper(robust, wer) if robust else None,
        "lower": (_lower(probes) | {"chance": _chance(probes) if chance else None}) if probes else None,
    }
    names = list(dict.fromkeys(result.name for result in [*robust, *probes]))
    looks = {name: canvas.look(at) for at, name in enumerate(names)}
    panels = [numbers[panel] is not None for panel in ("upper", "lower")]
    listed = [*names, "chance"] if chance and probes else names
    figure = canvas.new_figure(0.62 * sum(panels) + 0.08 + canvas.legend_height(listed))
    axes = figure.subplots(sum(panels), 1, squeeze=False)[:, 0]
    if robust:
        _draw_wer(axes[0], numbers["upper"], looks)
    if probes:
        _draw_layers(axes[-1], numbers["lower"], looks)
    canvas.legend_above(figure, axes)
    return canvas.save(figure, numbers, path)


def _upper(results: Sequence[Result], wer: str) -> dict:
    curves = []
    for result in results:
        snr, values = wer_curve(result, wer)
        curves.append({"name": result.name, "snr": snr, "wer": values})
    return {"wer": wer, "curves": curves}


def _lower(results: Sequence[Result]) -> dict:
    curves = [_layer_curve(result) for result in results]
    metrics = {curve["metric"] for curve in curves}
    if len(metrics) != 1:
        raise UsageError(f"curves of {' and '.join(sorted(metrics)) or 'nothing'} cannot share an axis")
    return {
        "metric": metrics.pop(),
        "band": ", ".join(dict.fromkeys(curve["band"] for curve in curves)),
        "curves": curves,
    }


def _chance(results: Sequence[Result]) -> float:
    """Of the first result that says it and whose labels are the dataset's own."""
    found = (result.content for result in results if not result.content.get("permuted_labels"))
    value = next((content["chance"] for content in found if content.get("chance") is not None), None)
    if value is None:
        raise UsageError("none of the results says what chance is; probe again with this version")
    return value


def _layer_curve(result: Result) -> dict:
    """Layers without a value are left out."""
    metric = result.content.get("metric", "accuracy")
    layers = [layer for layer in result.content["layers"] if layer[metric] is not None]
    std = [layer.get(f"{metric}_std") or 0.0 for layer in layers]
    bands = [layer.get("band95") for layer in layers]
    if all(bands):
        low, high = ([band[side] for band in bands] for side in (0, 1))
    else:
        low, high = ([layer[metric] + sign * s for layer, s in zip(layers, std, strict=True)] for sign in (-1, 1))
    return {
        "name": result.name,
        "metric": metric,
        "layers": [layer["layer"] - (result.content.get("backbone") == SPECTROGRAM) for layer in layers],
        "value": [layer[metric] for layer in layers],
        "std": std,
        "ci95": [layer.get("ci95") for layer in layers],
        "band": BAND if all(bands) else FOLDS_BAND,
        "low": low,
        "high": high,
    }


def _draw_wer(axes: Axes, numbers: dict, looks: dict) -> None:
    for at, curve in enumerate(numbers["curves"]):
        percent = [100 * value for value in curve["wer"]]
        axes.plot(
            curve["snr"], percent, markersize=3, linewidth=1.2, label=curve["name"], **looks[curve["name"]],
            markevery=canvas.marks(len(percent), at),
        )  # fmt: skip
    canvas.tidy_axes(axes, "Signal-to-noise ratio (dB)", "Word error rate (%)")
    axes.invert_xaxis()  # as in the paper: harder to the right
    axes.set_ylim(bottom=0)


def _draw_layers(axes: Axes, numbers: dict, looks: dict) -> None:
    from matplotlib.ticker import MaxNLocator

    for at, curve in enumerate(numbers["curves"]):
        _draw_layer_curve(axes, curve, looks[curve["name"]], at)
    every = [layer for curve in numbers["curves"] for layer in curve["layers"]]
    first, last = min([1, *every]), max([1, *every])
    if numbers.get("chance") is not None:
        axes.axhline(100 * numbers["chance"], color="0.35", linewidth=1, linestyle=(0, (1, 2)), label="chance")
    canvas.tidy_axes(axes, "Encoder layer", canvas.AXIS_NAMES[numbers["metric"]])
    axes.set_xlim(first - 0.03 * last, last + 0.03 * last)
    axes.set_xticks([0, *layer_ticks(last)] if first == 0 else layer_ticks(last))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10], integer=True))
    axes.set_title(f"shaded: {numbers['band']}", fontsize=canvas.TICKS, loc="right")


def _draw_layer_curve(axes: Axes, curve: dict, look: dict, number: int) -> None:
    layers = curve["layers"]
    value, low, high = ([100 * v for v in curve[name]] for name in ("value", "low", "high"))
    if len(layers) == 1:  # too narrow for a band
        reach = [[value[0] - low[0]], [high[0] - value[0]]]
        axes.errorbar(layers, value, reach, color=look["color"], linewidth=1.2, capsize=3)
    axes.fill_between(layers, low, high, color=look["color"], alpha=0.15, linewidth=0)
    every = canvas.marks(len(layers), number)
    axes.plot(layers, value, markersize=3, linewidth=1.2, label=curve["name"], markevery=every, **look)


def draw_shots(results: Sequence[tuple[str, object]], path: str | Path) -> dict:
    """Accuracy against the number of training clips of each class, a curve for each layer (or, of several results, each
    result and layer), with 95 % intervals over recordings. Returns the numbers, which lie beside `path` too."""
    path = canvas.checked_path(path)
    curves: list[dict[str, Any]] = []
    for name, result in results:
        rows = as_result(name, result).content["shots"]
        for at, layer in enumerate(rows[0]["layers"]):
            points = [row["layers"][at] for row in rows]
            curves.append(
                {
                    "name": f"layer {layer['layer']}" if len(results) == 1 else f"{name}, layer {layer['layer']}",
                    "shots": [row["shots"] for row in rows],
                    "accuracy": [point["accuracy"] for point in points],
                    "std_over_draws": [point["std_over_draws"] for point in points],
                    "ci95": [point["ci95"] for point in points],
                }
            )
    figure = canvas.new_figure(0.7 + canvas.legend_height([curve["name"] for curve in curves]))
    axes = figure.add_subplot()
    for number, curve in enumerate(curves):
        look = canvas.look(number)
        middle = [100 * value for value in curve["accuracy"]]
        shift = 1 + 0.02 * (number - (len(curves) - 1) / 2)  # so that whiskers do not cover each other
        x = [shots * shift for shots in curve["shots"]]
        axes.plot(x, middle, markersize=3, linewidth=1.2, label=curve["name"], **look)
        for at, ends in zip(x, curve["ci95"], strict=True):
            if ends:
                axes.vlines(at, 100 * ends[0], 100 * ends[1], color=look["color"], linewidth=0.6)
    axes.set_xscale("log", base=2)
    canvas.tidy_axes(axes, "Training clips of each class", "Accuracy (%)")
    ticks = curves[0]["shots"]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_title("bars: 95 % intervals over recordings", fontsize=canvas.TICKS, loc="right")
    canvas.legend_above(figure, [axes])
    return canvas.save(figure, {"figure": "shots", "curves": curves}, path)


def layer_ticks(last: int) -> list[int]:
    """Layer 1 and then round layer numbers, at most nine in all."""
    if last <= 8:
        return list(range(1, last + 1))
    step = next(step for step in (2, 4, 5, 8, 10, 20, 50, 100) if last // step <= 8)
    return [1, *range(step, last + 1, step)]
