"""Probing a cache: how well each of its layers tells the classes apart, and which layer is best for which class."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from whisper_at_cli.extract.cache import FeatureCache
from whisper_at_cli.extract.errors import UsageError
from whisper_at_cli.extract.evaluation.predictions import checked_path
from whisper_at_cli.extract.progress import Progress
from whisper_at_cli.probe.description import Description, description_length
from whisper_at_cli.probe.job import Job, Prediction
from whisper_at_cli.probe.linear import LinearProbe
from whisper_at_cli.probe.nested import nested_best
from whisper_at_cli.probe.scores import LayerAccuracy, LayerPrecision, best_layers
from whisper_at_cli.probe.shots import Shots, few_shot
from whisper_at_cli.probe.strength import AUTO, inner_divisions
from whisper_at_cli.probe.transfer import TransferCaches
from whisper_at_cli.probe.uncertainty import chance, held_out_predictions, with_bits, with_intervals

KINDS = ("linear", "knn", "attentive", "faithful")
TESTED = "the tested clips themselves, so its value is too high on average"
PROBABILITIES = ("linear", "attentive")  # kinds whose scores are the logits of a softmax
NEIGHBOURS = 10


@dataclass(frozen=True)
class ProbeResult:
    """Scores of every layer that was asked for, and what they came from. `asdict` of it is the command's JSON."""

    metric: str  # accuracy or mAP: what `layers` holds and what the best layers are best in
    layers: list[LayerAccuracy | LayerPrecision]  # of one kind
    best_layer: int | None  # of several that are equally good, the lowest
    best_layer_per_class: dict[str, int | None]  # by F1 or average precision; None where that is undefined
    clips: int  # that were trained or tested on
    backbone: str
    strength: float | str | None  # None where the kind of probe has none
    seed: int
    device: str
    warnings: list[str] = field(default_factory=list)
    probe: str = "linear"
    best_layer_ties: list[int] = field(default_factory=list)  # all of the best layers, where there are several
    best_layer_per_class_ties: dict[str, list[int]] = field(default_factory=dict)  # the same for each class with a tie
    settings: dict = field(default_factory=dict)  # of this kind of probe
    dataset: str = ""
    weights_sha256: str = ""
    not_distinguishable_from_best: list[int] = field(default_factory=list)  # layers, the best among them
    best_layer_counts: list[dict] = field(default_factory=list)  # layer, classes, ci95
    best_layer_per_class_kept: dict[str, float | None] = field(default_factory=dict)  # share of bootstrap draws
    intervals: dict = field(default_factory=dict)  # level, method, band, recordings, draws, ...
    predictions_file: str | None = None
    permuted_labels: bool = False
    chance: float | None = None  # the metric of a model that does not look at the clips
    best_layer_chosen_on: str = TESTED
    nested: dict | None = None  # value, ci95, chosen_on, layers[{fold, layer}]: see nested.py
    shots: list[Shots] = field(default_factory=list)
    mdl: Description | None = None
    test_cache: str | None = None  # tested on this one
    classes_matched: list[str] = field(default_factory=list)  # with a test cache
    classes_left_out: list[str] = field(default_factory=list)


def probe_layers(
    cache: FeatureCache,
    *,
    layers: str | Sequence[int] = "all",
    kind: str = "linear",
    strength: float | str = 1.0,
    neighbours: int = NEIGHBOURS,
    standardise: bool = True,
    device: str = "auto",
    seed: int = 0,
    predictions: str | Path | None = None,
    permute_labels: bool = False,
    nested: bool = False,
    shots: Sequence[int] = (),
    mdl: bool = False,
    test_cache: FeatureCache | None = None,
    progress: Progress | None = None,
) -> ProbeResult:
    """Probe layers (1-based, or "all") on the official folds, else the split, else random folds from `seed`.

    `kind` is one of KINDS. `strength`, of linear and attentive probes, is scikit-learn's C: the smaller, the stronger
    the penalty; linear probes take "auto" too. `neighbours` is for knn, `standardise` for faithful. `progress` is told
    of layers. Of linear probes alone: `nested` also chooses the best layer on inner folds, `shots` measures with so
    many training clips of each class, `mdl` the description length. With `test_cache` all clips of `cache` train and
    all of the other are tested. Raises UsageError where there is no such layer or nothing to tell apart, CacheError
    for features that are not finite.
    """
    predictions = checked_path(predictions) if predictions else None
    _check_linear(kind, strength, nested=nested, shots=shots, mdl=mdl)
    numbers = _layer_numbers(cache, layers)
    method, settings = _method(kind, strength=strength, neighbours=neighbours, standardise=standardise)
    both = TransferCaches(cache, test_cache) if test_cache else None
    job = Job.plan(
        both or cache, device=device, seed=seed, permute_labels=permute_labels, selects=nested or strength == AUTO
    )
    inner = inner_divisions(job) if nested else None
    if inner:
        method = LinearProbe(strength, inner)
    found = _run(job, method, numbers, progress)
    held_out = held_out_predictions(job, found)
    if predictions:
        held_out.save(predictions)
    scores, certainty = with_intervals([_score(job, each) for each in found], held_out, job.metric, seed=seed)
    if job.metric == "accuracy" and kind in PROBABILITIES:
        scores = with_bits(scores, held_out, seed=seed)
    return ProbeResult(
        metric=job.metric, layers=scores, clips=len(job.rows), backbone=cache.spec.backbone, probe=kind,
        strength=strength if kind in ("linear", "attentive") else None,
        **_best(numbers, scores, job.metric),
        warnings=[*job.warnings, *(both.notes() if both else []), *_notes(found, strength)],
        **_known_of(job, settings),
        **(_known_of_both(both) if both else {}),
        predictions_file=str(predictions) if predictions else None,
        permuted_labels=permute_labels,
        chance=chance(job),
        nested=nested_best(job, inner, found, held_out) if inner else None,
        shots=list(few_shot(job, numbers, shots, strength=float(strength))) if shots else [],
        mdl=description_length(job, numbers, strength=float(strength)) if mdl else None,
        **certainty,
    )  # fmt: skip


def _best(numbers: list[int], scores: list[LayerAccuracy | LayerPrecision], metric: str) -> dict:
    """The best layer, of all classes and of each, and those that tie with it."""
    best = best_layers(numbers, [getattr(score, metric) for score in scores])
    per_class = _best_per_class(scores)
    return {
        "best_layer": best[0] if best else None,
        "best_layer_ties": best if len(best) > 1 else [],
        "best_layer_per_class": {name: layers[0] if layers else None for name, layers in per_class.items()},
        "best_layer_per_class_ties": {name: layers for name, layers in per_class.items() if len(layers) > 1},
    }


def _run(job: Job, method: Method, numbers: list[int], progress: Progress | None) -> list[Prediction]:
    """What the probes of these layers say of the held-out clips."""
    found: list[Prediction] = []
    for prediction in method.run(job, numbers):
        found.append(prediction)
        if progress:
            progress(len(found), len(numbers), f"layer {prediction.layer}")
    return found


def _check_linear(kind: str, strength: float | str, *, nested: bool, shots: Sequence[int], mdl: bool) -> None:
    """Raises UsageError for what only linear probes have, and for wrong numbers of shots."""
    asked = [name for name, wanted in (("--nested", nested), ("--shots", shots), ("--mdl", mdl)) if wanted]
    if asked and kind != "linear":
        raise UsageError(f"{asked[0]} is for linear probes; leave it out with --kind {kind}")
    if strength == AUTO and asked and asked[-1] != "--nested":
        raise UsageError(f"{asked[-1]} needs a number for --strength (got auto)")
    if wrong := [count for count in shots if count < 1]:
        raise UsageError(f"--shots must be at least 1 (got {wrong[0]})")


def _known_of_both(both: TransferCaches) -> dict:
    return {
        "test_cache": str(both.caches[1].path), "classes_matched": list(both.matched),
        "classes_left_out": [name for names in both.left_out for name in names],
    }  # fmt: skip


def _known_of(job: Job, settings: dict) -> dict:
    """What the result says of the cache and of how it was probed."""
    spec = job.cache.spec
    return {
        "settings": settings, "dataset": spec.dataset, "weights_sha256": spec.weights_sha256, "seed": job.seed,
        "device": str(job.device),
    }  # fmt: skip


def _best_per_class(scores: list[LayerAccuracy | LayerPrecision]) -> dict[str, list[int]]:
    """All of the best layers of each class."""
    numbers = [score.layer for score in scores]
    per_class = [score.class_f1 if isinstance(score, LayerAccuracy) else score.class_ap for score in scores]
    return {name: best_layers(numbers, [values[name] for values in per_class]) for name in per_class[0]}


class Method(Protocol):
    """A kind of probe."""

    def run(self, job: Job, layers: list[int]) -> Iterator[Prediction]:
        """Predictions of each layer in order."""
        ...


def _method(kind: str, *, strength: float | str, neighbours: int, standardise: bool) -> tuple[Method, dict]:
    """The probe of a kind, and its settings for the record."""
    if kind == "linear":
        return LinearProbe(strength), {}
    if kind == "knn":
        from whisper_at_cli.probe.neighbours import NeighbourProbe

        return NeighbourProbe(neighbours), {"neighbours": neighbours}
    if kind == "attentive":
        from whisper_at_cli.probe.attentive import WRONG_STRENGTH, AttentiveProbe

        if isinstance(strength, str):
            raise UsageError(WRONG_STRENGTH.format(strength))
        probe = AttentiveProbe(strength)
        return probe, {"steps": probe.steps, "learning_rate": probe.learning_rate, "query_rate": probe.query_rate}
    if kind == "faithful":
        from whisper_at_cli.probe.faithful import FaithfulProbe

        classifier = FaithfulProbe(standardise)
        return classifier, {"standardised": standardise, **classifier.settings}
    raise UsageError(f"there is no probe of kind {kind!r}; choose from {', '.join(KINDS)}")


def _score(job: Job, prediction: Prediction) -> LayerAccuracy | LayerPrecision:
    score = job.held_out.accuracy if job.metric == "accuracy" else job.held_out.precision
    scored = score(prediction.layer, prediction.logits)
    for fold in scored.folds:
        if fold["fold"] in prediction.strengths:
            fold["strength"] = prediction.strengths[fold["fold"]]
    return scored


def _notes(predictions: list[Prediction], strength: float | str) -> list[str]:
    early = [f"layer {found.layer} fold {number}" for found in predictions for number in found.unconverged]
    if not early:
        return []
    advice = "" if isinstance(strength, str) else f"; lower the strength {strength:g}"
    return [f"not converged, so approximate: {', '.join(early)}{advice}"]


def _layer_numbers(cache: FeatureCache, layers: str | Sequence[int]) -> list[int]:
    """Ascending, each once."""
    if isinstance(layers, str):
        if layers != "all":
            raise UsageError(f"layers are numbers from 1 or 'all'; {layers!r} was asked for")
        return list(cache.spec.numbered_layers)
    numbers = sorted({operator.index(layer) for layer in layers})
    if not numbers:
        raise UsageError("no layer was asked for; give numbers from 1 or 'all'")
    for layer in numbers:
        cache.spec.refuse_layer(layer, str(cache.path))
    return numbers
