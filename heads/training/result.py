"""What training found: one value of all held-out clips with its interval, its folds and seeds, and what was chosen on
which clips."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from whisper_at_cli.extract.errors import UsageError
from whisper_at_cli.extract.evaluation.metrics import class_ap, mean_and_std, mean_of_defined
from whisper_at_cli.extract.evaluation.predictions import Predictions
from whisper_at_cli.extract.evaluation.summary import value_and_interval
from whisper_at_cli.heads.layers import mean_attention
from whisper_at_cli.heads.training.held_out import LACKING
from whisper_at_cli.heads.training.loop import Trained
from whisper_at_cli.heads.training.plan import Job


@dataclass(frozen=True)
class TrainResult:
    """What training found."""

    head: str
    dim: int  # channels inside the head
    params: int
    metric: str  # "accuracy" where every clip has one label, else "mAP"
    value: float  # of all held-out clips together, as docs/evaluation.md defines it for folds; mean over seeds
    std: float  # population standard deviation over folds, of means over seeds
    folds: list[dict]  # fold, value, train_clips, validation_clips, mAP, mAUC, d_prime, accuracy, ...
    seconds: float  # of this call, reading included
    samples_per_second: float  # clips drawn for training, per second of training
    checkpoint: str | None
    device: str
    recipe: dict
    warnings: list[str] = field(default_factory=list)
    seeds: list[dict] = field(default_factory=list)  # seed, value, std, folds
    std_over_seeds: float = 0.0  # population standard deviation over seeds, of means over folds
    tier: str = "memory"
    waiting_share: float = 0.0  # of the time of training that steps waited for clips
    heads_side_by_side: int = 1
    processes: int = 1
    metrics_file: str | None = None
    curve: str | None = None
    backbone: str = ""  # whose features it was trained on; `figure` and `report` call the result by it
    ci95: list[float] | None = None  # of value
    intervals: dict = field(default_factory=dict)  # level, method, recordings, clips, draws
    predictions_file: str | None = None
    fold_mean: float = math.nan  # mean over folds, of means over seeds; for mAP another number than `value`
    layer_weights: list[float] | None = None  # of heads that average layers: mean over the validated heads
    class_attention: dict[str, list[float]] | None = None  # of tl-tr: attention to each layer, over each class's clips
    selected_on: dict[str, str] = field(default_factory=dict)  # what was chosen -> on which clips, none of them tested
    search: dict | None = None  # rows: every combination, the best first; chosen_on; metric
    permuted_labels: bool = False


@dataclass(frozen=True)
class Verdict:
    """What held-out clips say of heads that were not trained on them: the same number wherever it is told."""

    value: float
    ci95: list[float] | None
    made: dict[str, Any]  # how the interval was made
    fold_mean: float
    fold_std: float
    seeds: list[float]  # the value of each seed


def judge(held_out: Predictions | None, metric: str, by_seed: list[list[float]], seed: int) -> Verdict:
    """`by_seed` are the values of each seed's folds. Without predictions, which runs of an earlier version lack, the
    value is the mean over folds and has no interval."""
    fold_mean, fold_std = mean_and_std([mean_and_std(values)[0] for values in zip(*by_seed, strict=True)])
    if held_out is None:
        return Verdict(fold_mean, None, {}, fold_mean, fold_std, [mean_and_std(values)[0] for values in by_seed])
    value, ci95, made = value_and_interval(held_out, metric, seed=seed)
    if metric == "mAP":
        of_seeds = [mean_of_defined(class_ap(held_out.labels, scores, held_out.folds)) for scores in held_out.scores]
    else:
        of_seeds = [mean_and_std(values)[0] for values in by_seed]
    return Verdict(math.nan if value is None else value, ci95, made, fold_mean, fold_std, of_seeds)


def by_seed(job: Job, done: Sequence[Trained]) -> list[list[Trained]]:
    """The validated trainings of each seed, fold after fold."""
    validated, count = _validated(done), len(job.folds)
    return [validated[first : first + count] for first in range(0, len(validated), count)]


def _validated(done: Sequence[Trained]) -> list[Trained]:
    return [each for each in done if each.metrics]


def values_by_seed(job: Job, done: Sequence[Trained]) -> list[list[float]]:
    return [[each.value(job.metric) for each in of_seed] for of_seed in by_seed(job, done)]


def as_result(job: Job, done: list[Trained], verdict: Verdict, out: str | Path | None, **run: Any) -> TrainResult:
    """The result of a run whose head is that of `job`; `run` is what only the run knows."""
    lines = [seed_line(job, each, value) for each, value in zip(by_seed(job, done), verdict.seeds, strict=True)]
    folds = [mean_of([line["folds"][k] for line in lines]) for k in range(len(job.folds))]
    samples, seconds, waited = (
        sum(each.record[name] for each in done) for name in ("samples", "seconds", "waiting_seconds")
    )
    curve = bool(out) and not job.solved
    return TrainResult(
        head=job.head, dim=job.dim, params=job.parameters(), metric=job.metric, value=verdict.value,
        std=verdict.fold_std, fold_mean=verdict.fold_mean, ci95=verdict.ci95, intervals=verdict.made, folds=folds,
        samples_per_second=samples / max(seconds, 1e-9), checkpoint=str(out) if out else None, device=str(job.device),
        recipe=job.recorded(job.recipe), warnings=[*job.warnings, *_undefined(job, folds)],
        seeds=lines, std_over_seeds=mean_and_std(verdict.seeds)[1], tier=job.tier,
        waiting_share=waited / max(seconds, 1e-9), metrics_file=str(Path(out) / "metrics.jsonl") if out else None,
        curve=str(Path(out) / "curve.png") if out and curve else None, backbone=job.cache.spec.backbone,
        layer_weights=_layer_weights(done), class_attention=_class_attention(job, done), permuted_labels=job.permuted,
        **run,
    )  # fmt: skip


def or_none(value: float) -> float | None:
    """What JSON holds of a value."""
    return value if math.isfinite(value) else None


def with_predictions(result: TrainResult, held_out: Predictions | None, file: Path | None) -> TrainResult:
    """The result, with its predictions saved. Raises UsageError where there are none to save."""
    if held_out is None and file:
        raise UsageError(LACKING)
    if held_out is None:
        return dataclasses.replace(result, warnings=[*result.warnings, LACKING])
    if file:
        held_out.save(file)
    return dataclasses.replace(result, predictions_file=None if file is None else str(file))


def seed_line(job: Job, trained: list[Trained], value: float) -> dict:
    """What one seed found."""
    folds = [
        {
            "fold": fold.number, "value": each.value(job.metric), "train_clips": len(each.training.train),
            "validation_clips": len(fold.test), **(each.metrics or {}), **_chosen(job, each),
            "epochs": each.record["epochs"],
        }
        for fold, each in zip(job.folds, trained, strict=True)
    ]  # fmt: skip
    _, std = mean_and_std([fold["value"] for fold in folds])
    return {"seed": trained[0].training.recipe.seed, "value": value, "std": std, "folds": folds}


def _chosen(job: Job, each: Trained) -> dict:
    """The settings of a training that a search or a fit may have chosen."""
    return {"strength": each.record["strength"]} if job.solved else {"lr": each.training.recipe.lr}


def _undefined(job: Job, folds: list[dict]) -> list[str]:
    found, classes = [], len(job.cache.spec.class_names)
    for fold in folds:
        if job.metric == "mAP" and (missing := fold["classes_without_positives"]):
            said = "no validation clip has a label, so the fold does not count"
            if missing < classes:
                said = f"{missing} of {classes} classes have no validation clip and do not count"
            found.append(f"fold {fold['fold']}: {said}")
    return found


def _layer_weights(done: list[Trained]) -> list[float] | None:
    """None of heads that have none, or that an earlier version trained."""
    found = [weights for each in _validated(done) if (weights := each.record.get("layer_weights"))]
    return np.mean(found, axis=0).tolist() if found and len(found) == len(_validated(done)) else None


def _class_attention(job: Job, done: list[Trained]) -> dict[str, list[float]] | None:
    found = [attention for each in _validated(done) if (attention := each.record.get("class_attention"))]
    complete = found and len(found) == len(_validated(done))
    return mean_attention(found, job.cache.spec.class_names) if complete else None


def mean_of(lines: list[dict]) -> dict:
    """The mean of each number that several seeds found; of what is the same for all, itself."""
    if len(lines) == 1:
        return lines[0]
    return {
        name: first if all(line[name] == first for line in lines) else _mean([line[name] for line in lines])
        for name, first in lines[0].items()
    }


def _mean(values: list) -> float:
    return float(np.mean([math.nan if value is None else value for value in values]))
