"""Figure 5: what larger models gain: tagging (mAP or accuracy) above, word error rate below, against parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from whisper_at_cli.extract.errors import UsageError
from whisper_at_cli.probe.figures import canvas
from whisper_at_cli.probe.figures.inputs import HEAD, PROBE, ROBUSTNESS, Result, clean_wer, of_kind, wer_at

POSITIONS = 448  # of the decoder


def draw_figure_5(
    results: Sequence[Result], path: str | Path, *, wer: str = "whisper", snr: float | None = None,
    parameters: Mapping[str, int] | None = None,
) -> dict:  # fmt: skip
    """Results of probe (its best layer) or train-head, and of robustness, of models of several sizes.

    WER is that of clean speech, or at `snr`. Parameters come from `parameters`, else from the results, else from the
    name of a Whisper. A panel without results is left out. Returns the numbers, which lie beside `path` too.
    """
    path = canvas.checked_path(path)
    if not results:
        raise UsageError("figure 5 has nothing to draw; give results of train-head or probe, and of robustness")
    sizes = _parameters(results, parameters or {})
    taggers = [_tagging(result, sizes) for result in of_kind(results, PROBE, HEAD)]
    metrics = {point["metric"] for point in taggers}
    if len(metrics) > 1:
        raise UsageError(f"results of {' and '.join(sorted(metrics))} cannot share an axis")
    errors = [
        {
            "model": result.name,
            "parameters": sizes[result.name],
            "wer": clean_wer(result, wer) if snr is None else wer_at(result, snr, wer)[0],
        }
        for result in of_kind(results, ROBUSTNESS)
    ]
    numbers = {
        "figure": 5,
        "metric": metrics.pop() if metrics else None,
        "tagging": sorted(taggers, key=_order),
        "wer": wer,
        "speech": "clean" if snr is None else f"{snr:g} dB SNR",
        "transcription": sorted(errors, key=_order),
    }
    names = dict.fromkeys(map(_curve, numbers["tagging"] + numbers["transcription"]))
    looks = {name: canvas.look(at) for at, name in enumerate(names)}
    figure = canvas.new_figure(0.6 * (bool(taggers) + bool(errors)) + 0.06)
    axes = figure.subplots(bool(taggers) + bool(errors), 1, squeeze=False, sharex=True)[:, 0]
    if taggers:
        _draw(axes[0], numbers["tagging"], "value", canvas.AXIS_NAMES[numbers["metric"]], looks)
    if errors:
        _draw(axes[-1], numbers["transcription"], "wer", f"WER, {numbers['speech']} (%)", looks)
    axes[-1].set_xlabel("Parameters of the whole model (millions)", fontsize=canvas.TEXT)
    _draw_ticks(axes[-1], [point["parameters"] / 1e6 for point in taggers + errors])
    canvas.legend_above(figure, axes)
    return canvas.save(figure, numbers, path)


def _order(point: dict):
    return point["parameters"], point["model"]


def _tagging(result: Result, sizes: dict[str, int]) -> dict:
    content = result.content
    point = {"model": result.name, "parameters": sizes[result.name]}
    if result.kind == HEAD:
        head = (
            f"{content['head']}-{content['dim']}"
            if content["head"] == "tl-tr" and content.get("dim")
            else content["head"]
        )
        return point | {"metric": content["metric"], "value": content["value"], "of": head}
    metric = content.get("metric", "accuracy")
    best = max((row for row in content["layers"] if row[metric] is not None), key=lambda row: row[metric])
    return point | {"metric": metric, "value": best[metric], "of": f"probe of layer {best['layer']}"}


def _parameters(results: Sequence[Result], given: Mapping[str, int]) -> dict[str, int]:
    """Of each model by name. Raises UsageError for one that nothing says."""
    said = {result.name: result.content["parameters"] for result in results if result.content.get("parameters")}
    found = {}
    for result in results:
        size = given.get(result.name) or said.get(result.name) or whisper_parameters(_backbone(result))
        if not size:
            raise UsageError(
                f"nothing says how many parameters {result.name} ({result.source}) has; give --parameters "
                f"{result.name}=N"
            )
        found[result.name] = size
    return found


def _backbone(result: Result) -> str:
    return str(result.content.get("backbone") or result.content.get("model") or result.name)


def whisper_parameters(name: str) -> int | None:
    """Parameters of a whole Whisper, encoder and decoder, by its name; None for another model."""
    from whisper_at_cli.extract.backbones.sizes import WHISPER_SIZES

    size = WHISPER_SIZES.get(name)
    if size is None:
        return None
    d = size.dim
    norm, mlp = 2 * d, 8 * d * d + 5 * d
    attention = 4 * d * d + 3 * d  # the key has no bias
    stem = 3 * size.mels * d + d + 3 * d * d + d
    encoder = stem + size.layers * (attention + mlp + 2 * norm) + norm
    words = 51864 if name.endswith(".en") else 51866 if size.mels == 128 else 51865
    blocks = size.decoder_layers * (2 * attention + mlp + 3 * norm)
    return encoder + (words + POSITIONS) * d + blocks + norm


def _curve(point: dict) -> str:
    """English-only and multilingual Whispers are curves of their own, and so are heads."""
    name = point["model"]
    kind = "English-only" if name.endswith(".en") else "multilingual" if whisper_parameters(name) else "other models"
    of = point.get("of", "WER")
    return f"{'probe' if of.startswith('probe') else of}, {kind}"


def _draw(axes, points: list[dict], field: str, y: str, looks: dict) -> None:
    for name in dict.fromkeys(map(_curve, points)):
        curve = [point for point in points if _curve(point) == name]
        millions, percent = (
            [scale * point[of] for point in curve] for of, scale in (("parameters", 1e-6), (field, 100))
        )
        axes.plot(millions, percent, markersize=3.5, linewidth=1.2, label=name, **looks[name])
    canvas.tidy_axes(axes, "", y)
    axes.set_xscale("log")
    axes.margins(x=0.08, y=0.12)


def _draw_ticks(axes, millions: list[float]) -> None:
    """At the models' own sizes, as far as they can be read beside each other on a logarithmic axis."""
    kept: list[int] = []
    for tick in sorted({max(1, round(size)) for size in millions}):
        if not kept or tick > 1.3 * kept[-1]:
            kept.append(tick)
    axes.set_xticks(kept, labels=map(str, kept))
    axes.minorticks_off()
