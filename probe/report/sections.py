"""The sections of a report as HTML. One without results is empty."""

from __future__ import annotations

from collections.abc import Sequence

from whisper_at_cli.extract.evaluation.commands import p_best
from whisper_at_cli.extract.evaluation.compare import Comparison
from whisper_at_cli.extract.html import escape
from whisper_at_cli.probe.report.charts import Curve, bar_chart, fit_line, line_chart, scatter_chart, whole_ticks
from whisper_at_cli.probe.report.results import (
    METRICS,
    Probe,
    Source,
    clean_wer,
    head_interval,
    head_name,
    head_value,
    increase_between,
    intervals_in_noise,
    model_name,
    noise_of,
    probes_in_noise,
    scored_in_noise,
    wer_at,
    wer_increase,
)
from whisper_at_cli.probe.report.tables import class_table, confusion_table, percent, table

LAYERS_INTRO = (
    "Layer 1 is the first encoder block. The band holds the true values of all layers at once with 95 % confidence "
    "(bootstrap over recordings; of results without intervals it is one standard deviation over folds). Bars count for "
    "how many classes each layer is the best by class-wise score, with 95 % intervals; of layers that tie, the lowest "
    "counts, hatched."
)
NOISE_INTRO = (
    "Thin dotted lines are clean speech. WER exceeds 100 % where errors outnumber the reference's words. Where "
    "the same model was probed, a dot per class shows whether the sounds it knows better disturb it less, with 95 % "
    "intervals of both where the results have them; the line is a least-squares fit over all classes."
)
SCORINGS = {"wer": "after Whisper's normalisation of text", "wer_paper": "as the paper scores it"}


def section(title: str, content: str, intro: str = "") -> str:
    said = f'<p class="soft">{escape(intro)}</p>' if intro else ""
    return f"<section><h2>{escape(title)}</h2>{said}{content}</section>" if content else ""


def _charts(title: str, intro: str, figures: list[str]) -> str:
    return section(title, f'<div class="charts">{"".join(figures)}</div>' if figures else "", intro)


def _chart(title: str, chart: str, numbers: str = "") -> str:
    numbers = f"<details><summary>Numbers</summary>{numbers}</details>" if numbers else ""
    return f"<figure><figcaption>{escape(title)}</figcaption>{chart}{numbers}</figure>"


def glance(probes: Sequence[Probe], robustness: Sequence[Source], heads: Sequence[Source]) -> str:
    """The best layers, the error rates and the heads, a line each."""
    parts = []
    if probes:
        header = ("Probe", "Clips", "Classes", "Best layer", "Value there (%)", "Metric", "Macro F1 (%)")
        parts.append(table(header, map(_glance_row, probes)))
    if robustness:
        rows = [
            (model_name(noisy), *map(percent, (clean_wer(noisy), wer_at(noisy, max), wer_at(noisy, min))))
            for noisy in robustness
        ]
        parts.append(table(("Model in noise", "WER, clean (%)", "WER, highest SNR (%)", "WER, lowest SNR (%)"), rows))
    if heads:
        trained = []
        for head in heads:
            value = head_value(head.result)
            shown = _with_interval(value["value"], head_interval(head.result, value["metric"]), head.result.get("std"))
            size = (head.result.get("dim"), head.result.get("params"))
            trained.append((head_name(head), *size, shown, value["metric"], head.path))
        parts.append(table(("Head", "Channels", "Parameters", "Value (%)", "Metric", "From"), trained))
    return section(
        "At a glance",
        "".join(parts),
        "In brackets: 95 % intervals by bootstrap over recordings. ± is one standard deviation over folds.",
    )


def _glance_row(probe: Probe) -> tuple:
    best = probe.best_row or {}
    value = _with_interval(best.get(probe.metric), best.get("ci95"), best.get(f"{probe.metric}_std"))
    where = f"{probe.best_layer or '–'} of {probe.layers[-1]}"
    clips = probe.result.get("clips")
    return probe.name, clips, len(probe.classes), where, value, probe.title, percent(best.get("macro_f1"))


def _with_interval(value: float | None, ci95: Sequence[float] | None, std: float | None) -> str:
    """The interval where there is one, else the standard deviation."""
    if value is not None and ci95:
        return f"{percent(value)} ({percent(ci95[0])}–{percent(ci95[1])})"
    return percent(value) + (f" ± {percent(std)}" if value is not None and std else "")


def compared(found: Comparison) -> str:
    """Every system of the predictions that were given, one a row."""
    rows = [
        (each["name"], _with_interval(each["value"], each["ci95"], None), p_best(found, each), each["seeds"])
        for each in found.systems
    ]
    return section(
        "All models",
        table(("Model", f"{METRICS[found.metric][0]} (%)", "p against the best", "Seeds"), rows),
        f"On the same {found.clips} held-out clips of {found.recordings} recordings. In brackets: 95 % intervals by "
        "bootstrap over recordings. p is adjusted for all pairs (max-t). Chance does not look at the clips.",
    )


def layers(probes: Sequence[Probe]) -> str:
    figures = [figure for metric in METRICS if (figure := _layer_curves(probes, metric))]
    return _charts("Layers", LAYERS_INTRO, figures + _histograms(probes))


def _layer_curves(probes: Sequence[Probe], metric: str) -> str:
    curves = []
    for probe in probes:
        points = [
            (layer, 100 * value, *(100 * end for end in band or (value - std, value + std)))
            for layer, value, std, band in zip(probe.layers, probe.values, probe.stds, probe.bands, strict=True)
            if value is not None and probe.metric == metric
        ]
        if points:
            numbers, values, low, high = (list(column) for column in zip(*points, strict=True))
            curves.append(Curve(probe.name, numbers, values, low, high))
    if not curves:
        return ""
    every = [int(layer) for curve in curves for layer in curve.x]
    title = METRICS[metric][0]
    chart = line_chart(
        curves, x_ticks=whole_ticks(min(every), max(every)), x_label="Encoder layer", y_label=f"{title} (%)",
        about=f"{title} against encoder layer",
    )  # fmt: skip
    told = "".join(_layer_numbers(probe) for probe in probes if probe.metric == metric)
    return _chart(f"{title} of a probe of each layer", chart, told)


def _layer_numbers(probe: Probe) -> str:
    folds = [fold["fold"] for fold in probe.rows[0].get("folds", [])]
    sure = any(probe.intervals)
    header = ("Layer", f"{probe.title} (%)", *(("95 % interval", "worse than best") if sure else ()), "std over folds",
              *(f"fold {number}" for number in folds))  # fmt: skip
    rows = []
    for row, value, std, ci95 in zip(probe.rows, probe.values, probe.stds, probe.intervals, strict=True):
        by_fold = (percent(fold.get(probe.metric)) for fold in row.get("folds", []))
        interval = "–" if not ci95 else f"{percent(ci95[0])}–{percent(ci95[1])}"
        known = (interval, "yes" if row.get("differs_from_best") else "no") if sure else ()
        rows.append((row["layer"], percent(value), *known, percent(std), *by_fold))
    return f"<h3>{escape(probe.name)}</h3>" + table(header, rows)


def _histograms(probes: Sequence[Probe]) -> list[str]:
    figures = []
    for probe in probes:
        best = [layer for layer in probe.best_per_class.values() if layer]
        if len(probe.layers) < 2 or not best:
            continue
        counts = {layer: best.count(layer) for layer in probe.layers}
        chart = bar_chart(
            counts, x_label="Encoder layer", y_label="Classes", about="classes by their best layer", tied=probe.ties,
            intervals=probe.count_intervals,
        )  # fmt: skip
        kept = [share for share in (probe.result.get("best_layer_per_class_kept") or {}).values() if share is not None]
        said = f"; a class keeps its layer in {sum(kept) / len(kept):.0%} of bootstrap draws" if kept else ""
        figures.append(_chart(f"Best layer of each of {len(best)} classes: {probe.name}{said}", chart))
    return figures


def noise(probes: Sequence[Probe], robustness: Sequence[Source]) -> str:
    figures = [figure for key in SCORINGS if (figure := _wer_curves(robustness, key))]
    scatters = [_scatter(probe, noisy) for probe, noisy in probes_in_noise(probes, robustness)]
    return _charts("Noise", NOISE_INTRO, figures + scatters)


def _wer_curves(robustness: Sequence[Source], key: str) -> str:
    curves = []
    for noisy in robustness:
        levels = [level for level in noisy.result["results"] if level.get(key) is not None]
        levels.sort(key=lambda level: level["snr"])
        clean = clean_wer(noisy, key)
        if levels:
            snrs, rates = [level["snr"] for level in levels], [100 * level[key] for level in levels]
            clean = None if clean is None else 100 * clean
            curves.append(Curve(model_name(noisy), snrs, rates, level=clean))
    if not curves:
        return ""
    ticks = sorted({snr for curve in curves for snr in curve.x})
    chart = line_chart(
        curves, x_ticks=ticks[:: -(-len(ticks) // 11)], x_label="SNR (dB)", y_label="WER (%)",
        about="word error rate against signal-to-noise ratio", falling_x=True,
    )  # fmt: skip
    return _chart(f"Word error rate, {SCORINGS[key]}", chart, _wer_numbers(robustness, key))


def _wer_numbers(robustness: Sequence[Source], key: str) -> str:
    snrs = sorted({level["snr"] for noisy in robustness for level in noisy.result["results"]}, reverse=True)
    rows = []
    for noisy in robustness:
        by_snr = {level["snr"]: level.get(key) for level in noisy.result["results"]}
        rates = (clean_wer(noisy, key), *(by_snr.get(snr) for snr in snrs))
        rows.append((model_name(noisy), *map(percent, rates)))
    return table(("Model", "clean", *(f"{snr:g} dB".replace("-", "−") for snr in snrs)), rows)


def _scatter(probe: Probe, noisy: Source) -> str:
    low, high = increase_between(noisy)
    points = scored_in_noise(probe, noisy)
    chart = scatter_chart(
        {name.replace("_", " "): point for name, point in points.items()},
        x_label=f"{probe.measure} of the class in layer {probe.layers[-1]} (%)",
        y_label=f"WER at {low:g} dB minus at {high:g} dB (%)".replace("-", "−"),
        about=f"increase of the word error rate against class-wise {probe.measure}, a dot per class",
        bars={name.replace("_", " "): ends for name, ends in intervals_in_noise(probe, noisy).items()},
    )  # fmt: skip
    fitted = fit_line(*zip(*points.values(), strict=True))
    correlated = f", Pearson's r {fitted[2]:.2f}".replace("-", "−") if fitted else ""
    return _chart(f"{len(points)} classes and noise{correlated}: {probe.name}", chart)


def classes(probe: Probe, robustness: Sequence[Source]) -> str:
    if not probe.classes:
        return ""
    noisy = noise_of(probe, robustness)
    content = class_table(
        probe.classes, probe.layers, probe.class_values, probe.best_per_class, measure=probe.measure,
        increase=wer_increase(noisy) if noisy else {},
    )  # fmt: skip
    return section(f"Classes: {probe.name}", content)


def confusion(probe: Probe) -> str:
    found = (probe.best_row or {}).get("confusion")
    if not found:
        return ""
    return section(f"Confusion in layer {probe.best_layer}: {probe.name}", confusion_table(found, probe.classes))


def notes(probes: Sequence[Probe], robustness: Sequence[Source], heads: Sequence[Source]) -> str:
    """What a reader should know before the numbers."""
    found = []
    for probe in probes:
        found += [(probe.name, note) for note in probe.result.get("warnings") or ()]
        cache = probe.source.cache or {}
        if cache.get("failed"):
            found.append((probe.name, f"{cache['failed']} clips failed in extraction and are not part of this"))
        if cache.get("pending"):
            found.append((probe.name, f"{cache['pending']} clips are not extracted yet and are not part of this"))
    for noisy in robustness:
        found += [(model_name(noisy), note) for note in noisy.result.get("notes") or ()]
        if skipped := noisy.result.get("skipped"):
            found.append((model_name(noisy), f"{len(skipped)} mixtures or files were skipped"))
    for head in heads:
        found += [(head_name(head), note) for note in head.result.get("warnings") or ()]
    return "".join(f'<p class="note"><b>{escape(name)}</b>: {escape(note)}</p>' for name, note in found)


def provenance(probes: Sequence[Probe], robustness: Sequence[Source], heads: Sequence[Source]) -> str:
    """Every setting and origin that the results and the caches state."""
    blocks = []
    for probe in probes:
        left_out = (
            "layers", "best_layer_per_class", "best_layer_per_class_ties", "best_layer_per_class_kept",
            "best_layer_counts", "warnings", "shots", "mdl", "nested",
        )  # fmt: skip
        known = _known(probe.source, left_out)
        if cache := probe.source.cache:
            known |= _without(cache, ("cache", "class_names", "failures", "made"))
            known |= {f"made: {key}": value for key, value in (cache.get("made") or {}).items()}
        blocks.append(_settings(f"Probe: {probe.name}", known))
    for noisy in robustness:
        known = _known(noisy, ("results", "clean", "skipped", "notes"))
        blocks.append(_settings(f"Noise: {model_name(noisy)}", known))
    for head in heads:
        known = _known(head, ("folds", "seeds", "warnings"))
        known = {key: value for key, value in known.items() if not key.startswith("class_")}
        blocks.append(_settings(f"Head: {head_name(head)}", known))
    return section("Settings and provenance", f'<div class="settings">{"".join(blocks)}</div>' if blocks else "")


def _known(source: Source, left_out: Sequence[str]) -> dict:
    return {"source": source.path} | _without(source.result, left_out)


def _without(known: dict, left_out: Sequence[str]) -> dict:
    return {key: value for key, value in known.items() if key not in left_out}


def _settings(title: str, known: dict) -> str:
    """A list of names and values; settings within settings are named with a dot."""
    rows = "".join(f"<dt>{escape(name.replace('_', ' '))}</dt><dd>{escape(value)}</dd>" for name, value in _flat(known))
    return f"<div><h3>{escape(title)}</h3><dl>{rows}</dl></div>"


def _flat(known: dict, prefix: str = "") -> list[tuple[str, str]]:
    rows = []
    for key, value in known.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            rows += _flat(value, f"{name}.")
        elif isinstance(value, list | tuple):
            rows += [(name, ", ".join(map(str, value)))] if value else []
        elif isinstance(value, bool):
            rows.append((name, "yes" if value else "no"))
        elif isinstance(value, float):
            rows.append((name, f"{value:.6g}"))
        elif value not in (None, ""):
            rows.append((name, str(value)))
    return rows
