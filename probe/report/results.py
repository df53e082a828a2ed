"""What a report asks of the results it is made from: probes by name, their best layers, and WER in noise by class."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import PurePath

from whisper_at_cli.probe.figures.inputs import increase_intervals

NOISY_SNR, QUIET_SNR = -10.0, 20.0  # between which the paper's Figure 2 takes the increase of the WER
METRICS = {"accuracy": ("Accuracy", "class_f1", "F1"), "mAP": ("mAP", "class_ap", "AP")}


@dataclass(frozen=True)
class Source:
    """A result (the JSON of `probe`, `robustness`, `train-head` or `evaluate`) and the file or cache it came from."""

    path: str
    result: dict
    cache: dict | None = None  # what `info` says of the cache that was probed

    @property
    def stem(self) -> str:
        return PurePath(self.path).stem or self.path


class Probe:
    """A probe's result with what a report asks of it. Layers count from 1."""

    def __init__(self, source: Source, name: str):
        self.source, self.name, self.result = source, name, source.result
        self.metric = self.result.get("metric", "accuracy")
        self.rows = sorted(self.result["layers"], key=lambda row: row["layer"])
        self.layers = [row["layer"] for row in self.rows]
        self.title, self.per_class, self.measure = METRICS[self.metric]
        self.values = [row.get(self.metric) for row in self.rows]
        self.stds = [row.get(f"{self.metric}_std") or 0.0 for row in self.rows]
        self.bands = [row.get("band95") for row in self.rows]
        self.intervals = [row.get("ci95") for row in self.rows]
        self.best_layer = self.result.get("best_layer") or _best(self.layers, self.values)
        self.classes = list(self.rows[0].get(self.per_class, {}))
        self.class_values = {
            name: [row.get(self.per_class, {}).get(name) for row in self.rows] for name in self.classes
        }
        given = self.result.get("best_layer_per_class") or {}
        self.best_per_class = {
            name: given[name] if name in given else _best(self.layers, self.class_values[name]) for name in self.classes
        }

    @property
    def ties(self) -> dict[int, int]:
        """By layer, how many of the classes that count there are as good in a higher layer."""
        tied = [layers[0] for layers in (self.result.get("best_layer_per_class_ties") or {}).values()]
        return {layer: tied.count(layer) for layer in self.layers}

    @property
    def count_intervals(self) -> dict[int, tuple[float, float]]:
        """By layer, the 95 % interval of how many classes are best there."""
        rows = self.result.get("best_layer_counts") or ()
        return {row["layer"]: (row["ci95"][0], row["ci95"][1]) for row in rows if row["ci95"]}

    @property
    def best_row(self) -> dict | None:
        return next((row for row in self.rows if row["layer"] == self.best_layer), None)

    @property
    def last_scores(self) -> dict[str, float]:
        """Class-wise score in the last layer, as a part of 1."""
        return {name: values[-1] for name, values in self.class_values.items() if values[-1] is not None}


def _best(layers: Sequence[int], values: Sequence[float | None]) -> int | None:
    """The layer with the greatest value, the lowest of several."""
    defined = [(value, -layer) for layer, value in zip(layers, values, strict=True) if value is not None]
    return -max(defined)[1] if defined else None


def name_probes(sources: Sequence[Source]) -> list[Probe]:
    """Each by its backbone, with the file's name and at last a number where that does not tell them apart."""
    backbones = [str(source.result.get("backbone") or source.stem) for source in sources]
    names = [
        backbone if backbones.count(backbone) == 1 else f"{backbone}, {source.stem}"
        for backbone, source in zip(backbones, sources, strict=True)
    ]
    names = [name if names.count(name) == 1 else f"{name} ({n})" for n, name in enumerate(names, 1)]
    return [Probe(source, name) for source, name in zip(sources, names, strict=True)]


def head_value(result: dict) -> dict:
    """Metric and value of a trained or an evaluated head."""
    if "value" in result:
        return {"metric": str(result.get("metric", "")), "value": result["value"]}
    metric = "mAP" if result.get("mAP") is not None else "accuracy"
    return {"metric": metric, "value": result.get(metric)}


def head_interval(result: dict, metric: str) -> list[float] | None:
    """95 % interval of the value of a trained or an evaluated head; None of a result that has none."""
    return result.get("ci95") or result.get(f"{metric}_ci95")


def head_name(head: Source) -> str:
    return str(head.result.get("head") or head.stem)


def model_name(noisy: Source) -> str:
    return str(noisy.result.get("model") or noisy.stem)


def clean_wer(noisy: Source, key: str = "wer") -> float | None:
    return (noisy.result.get("clean") or {}).get(key)


def wer_at(noisy: Source, edge: Callable[..., dict]) -> float | None:
    """At the highest (max) or lowest (min) SNR."""
    return edge(noisy.result["results"], key=lambda level: level["snr"])["wer"]


def increase_between(noisy: Source) -> tuple[float, float]:
    """The SNRs between which the increase of the WER is taken: the paper's where measured, else the extremes."""
    snrs = {float(level["snr"]) for level in noisy.result["results"]}
    return NOISY_SNR if NOISY_SNR in snrs else min(snrs), QUIET_SNR if QUIET_SNR in snrs else max(snrs)


def wer_increase(noisy: Source) -> dict[str, float]:
    """By class, WER at the low SNR minus WER at the high one; nothing where only one SNR was measured."""
    low, high = increase_between(noisy)
    if not low < high:
        return {}
    levels = {float(level["snr"]): level.get("class_wer") or {} for level in noisy.result["results"]}
    rates = ((name, rate, levels[high].get(name)) for name, rate in levels[low].items())
    return {name: rate - quiet for name, rate, quiet in rates if None not in (rate, quiet)}


def noise_of(probe: Probe, robustness: Sequence[Source]) -> Source | None:
    """The robustness of the model that was probed."""
    backbone = str(probe.result.get("backbone")).casefold()
    return next((noisy for noisy in robustness if model_name(noisy).casefold() == backbone), None)


def scored_in_noise(probe: Probe, noisy: Source) -> dict[str, tuple[float, float]]:
    """By class, its score in the last layer and its WER increase, in percent; classes that have both."""
    increase, scores = wer_increase(noisy), probe.last_scores
    return {name: (100 * score, 100 * increase[name]) for name, score in scores.items() if name in increase}


def intervals_in_noise(probe: Probe, noisy: Source) -> dict[str, tuple[list[float] | None, list[float] | None]]:
    """By class of `scored_in_noise`, the 95 % intervals of both, in percent; None where the results do not say."""
    scores = probe.rows[-1].get("class_ci95") or {}
    increase = increase_intervals(noisy.result["results"], *increase_between(noisy), "whisper")
    return {name: (_percent(scores.get(name)), _percent(increase.get(name))) for name in scored_in_noise(probe, noisy)}


def _percent(ends: Sequence[float] | None) -> list[float] | None:
    return [100 * end for end in ends] if ends else None


def probes_in_noise(probes: Sequence[Probe], robustness: Sequence[Source]) -> list[tuple[Probe, Source]]:
    """Probes whose model was heard in noise of some of the same classes."""
    pairs = ((probe, noise_of(probe, robustness)) for probe in probes)
    return [(probe, noisy) for probe, noisy in pairs if noisy and scored_in_noise(probe, noisy)]
