"""Training heads from a cache: validation on folds or a split, over one seed or several, then a head to keep."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from whisper_at_cli.extract.cache import FeatureCache
from whisper_at_cli.extract.errors import UsageError
from whisper_at_cli.extract.evaluation.metrics import mean_and_std
from whisper_at_cli.extract.evaluation.predictions import Predictions, checked_path
from whisper_at_cli.extract.evaluation.summary import value_and_interval
from whisper_at_cli.extract.progress import Progress
from whisper_at_cli.heads.checkpoint import HeadDescription, save_head
from whisper_at_cli.heads.training.board import Board
from whisper_at_cli.heads.training.curve import draw_curve
from whisper_at_cli.heads.training.data import Clips, load_clips
from whisper_at_cli.heads.training.held_out import LACKING, held_out_predictions
from whisper_at_cli.heads.training.loop import Trained, Training, Workplace, train_group
from whisper_at_cli.heads.training.plan import Job, plan
from whisper_at_cli.heads.training.ranks import Ranks, joined_ranks
from whisper_at_cli.heads.training.recipe import Recipe
from whisper_at_cli.heads.training.records import RunFolder, order_kept, precision_kept

if TYPE_CHECKING:
    from whisper_at_cli.heads.training.search import SearchResult

TOGETHER = ("auto", "never")


@dataclass(frozen=True)
class TrainResult:
    """What training found."""

    head: str
    dim: int  # channels inside the head
    params: int
    metric: str  # "accuracy" where every clip has one label, else "mAP"
    value: float  # accuracy: mean over folds, and over seeds; mAP: of positives ranked within their folds
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
    layer_weights: list[float] | None = None  # of heads that average layers: mean over the validated heads


def train_head(
    cache: FeatureCache,
    *,
    head: str,
    width: int | None = None,
    recipe: Recipe | str | None = None,
    changes: dict | None = None,
    faithful: bool = False,
    out: str | Path | None = None,
    device: str = "auto",
    tier: str = "auto",
    seed: int | None = None,
    seeds: int = 1,
    together: str = "auto",
    restart: bool = False,
    tensorboard: bool = False,
    predictions: str | Path | None = None,
    progress: Progress | None = None,
) -> TrainResult:
    """Validate a head on a cache's folds or split, and save one in the folder `out`.

    With folds, each is validated on a head trained on the others (saved in `out/fold-N`), and the head in `out` is then
    trained on all clips. With a split, the head in `out` is the validated one. `seeds` repeat all validation with the
    seeds after the first. `recipe` is a Recipe or the name of one; by default the data decide. `changes` replace some
    of its settings, `seed` its seed; `faithful` draws partners and masks as the original code does. The same call with
    the same `out` continues a run that was stopped; another is refused unless `restart`. The scores of held-out clips
    are written into `predictions`, an .npz file. `progress` is told of epochs.
    Under torchrun all processes call this; each returns the result, the first one writes.
    Raises UsageError for what cannot work, WhisperATError where memory is short or the loss is not finite.
    """
    started = time.monotonic()
    predictions = checked_path(predictions) if predictions else None
    changes = (changes or {}) | ({} if seed is None else {"seed": seed})
    check_options(seeds, together, tensorboard, out)
    if out and tier == "auto" and not restart and order_kept(out) == "streamed":
        tier = "stream"
    with ExitStack() as stack:
        ranks, target = stack.enter_context(joined_ranks(device))
        job = plan(
            cache, head=head, width=width, recipe=recipe, changes=changes, faithful=faithful, device=target, tier=tier,
            processes=ranks.here, precision=None if restart or not out else precision_kept(out),
        )  # fmt: skip
        runner = stack.enter_context(
            open_run(job, ranks, out, {"seeds": seeds}, restart=restart, tensorboard=tensorboard, progress=progress)
        )
        trainings = fold_trainings(job, seeds)
        runner.expect(trainings, also=int(bool(out and job.cross_validated)))
        save = partial(_save_validated, job=job, out=out) if out else None
        done = runner.train(job, trainings, together, save, keep_scores=True)
        if out and job.cross_validated:
            values = [each.value(job.metric) for each in done]
            kept = [_on_all_clips(job, done)]
            done += runner.train(job, kept, together, partial(_save_kept, job=job, out=out, values=values))
        result = _result(job, done, runner, together, out, time.monotonic() - started)
        result = _with_interval(result, held_out_predictions(job, done), predictions if ranks.lead else None)
        runner.finish(result, done)
    return result


def check_options(seeds: int, together: str, tensorboard: bool, out: str | Path | None) -> None:
    if seeds < 1:
        raise UsageError(f"{seeds} seeds were asked for: give 1 or more")
    if together not in TOGETHER:
        raise UsageError(f"together is {together!r} and must be one of {', '.join(TOGETHER)}")
    if tensorboard and not out:
        raise UsageError("--tensorboard writes its files into the folder of --out: give one")


def fold_trainings(job: Job, seeds: int, prefix: str = "") -> list[Training]:
    """A training for each seed and fold."""
    found = []
    for seed in range(job.recipe.seed, job.recipe.seed + seeds):
        recipe = dataclasses.replace(job.recipe, seed=seed)
        for fold in job.folds:
            name = f"fold-{fold.number}" if seeds == 1 else f"seed-{seed}/fold-{fold.number}"
            positions = [np.searchsorted(job.rows, side) for side in (fold.train, fold.test)]
            found.append(Training(prefix + name, fold.number, recipe, *positions))
    return found


def _on_all_clips(job: Job, done: list[Trained]) -> Training:
    """The training of the head that is kept. Where folds stopped early, it takes as many epochs as they did on average,
    since it has no validation clips of its own."""
    recipe, epochs = job.recipe, job.recipe.epochs
    if recipe.patience:
        epochs = max(1, round(float(np.mean([each.record["epochs"] for each in done]))))
        first, last = recipe.average_from_epoch, recipe.average_to_epoch
        averages = first is not None and first <= epochs
        recipe = dataclasses.replace(
            recipe, patience=None, epochs=epochs, average_from_epoch=first if averages else None,
            average_to_epoch=last if averages else None,
        )  # fmt: skip
    return Training("all", 0, recipe, np.arange(len(job.rows)), np.arange(0))


class Runner:
    """Trains what a run consists of, group by group, and keeps what is done; clips are read when first needed."""

    def __init__(self, ranks: Ranks, folder: RunFolder | None, board: Board | None, progress: Progress | None):
        self.ranks, self.folder, self.board, self.progress = ranks, folder, board, progress
        self.finished = ranks.from_lead(folder.finished if folder else {})
        self.epochs_done = self.epochs = self.groups = 0
        self._clips: Clips | None = None
        if folder:
            folder.keep_metrics([line for record in self.finished.values() for line in record["history"]])

    def expect(self, trainings: list[Training], also: int = 0) -> None:
        """How much there is to do, for the progress."""
        self.epochs += sum(training.recipe.epochs for training in trainings) + also * trainings[0].recipe.epochs

    def train(
        self,
        job: Job,
        trainings: list[Training],
        together: str,
        save: Callable[[Trained], None] | None = None,
        *,
        keep_scores: bool = False,
    ) -> list[Trained]:
        """All these trainings, in groups side by side where that is faster; what an earlier call finished is not done
        again. The first process saves each by `save`, and with `keep_scores` what it says of held-out clips."""
        size, done = job.heads_side_by_side(together), []
        for start in range(0, len(trainings), size):
            group, self.groups = trainings[start : start + size], self.groups + 1
            if all(training.name in self.finished for training in group):
                done += [self._finished(training) for training in group]
                self._after_epoch(sum(training.recipe.epochs for training in group), math.nan)
                continue
            name = f"group-{self.groups}"
            trained = train_group(group, self._place(job), job.new_module, name)
            if self.folder:
                for each in trained:
                    if save:
                        save(each)
                    if keep_scores and each.scores is not None:
                        self.folder.save_scores(each.training.name, each.scores)
                self.folder.finish({each.training.name: each.record for each in trained}, name)
            done += trained
        return done

    def _finished(self, training: Training) -> Trained:
        """A training that an earlier call finished."""
        scores = self.folder.load_scores(training.name) if self.folder else None
        return Trained(training, self.finished[training.name], scores=self.ranks.from_lead(scores))

    def finish(self, result: TrainResult | SearchResult, done: list[Trained]) -> None:
        """The run is over: its curve and its result."""
        if self.folder is None:
            return
        lines = [line for each in done for line in each.record["history"]]
        finals = {each.training.name: each.value(result.metric) for each in done if each.metrics}
        draw_curve(lines, finals, result.metric, self.folder.path / "curve.png", title=result.head)
        self.folder.finish_all(dataclasses.asdict(result))

    def _place(self, job: Job) -> Workplace:
        """Where trainings of this job happen; its clips are read now, and kept for jobs that read the same."""
        if self._clips is None:
            processes = self.ranks.here
            self._clips = load_clips(job.cache, job.rows, job.reads, job.device, job.tier, processes=processes)
        labels = job.cache.labels[job.rows]
        return Workplace(
            self._clips, labels, job.metric, job.cache, self.ranks, self.folder, self.board, self._after_epoch
        )

    def _after_epoch(self, heads: int, loss: float) -> None:
        self.epochs_done += heads
        if self.progress and self.ranks.lead:
            self.progress(self.epochs_done, self.epochs, "" if math.isnan(loss) else f"loss {loss:.4f}")


@contextmanager
def open_run(
    job: Job, ranks: Ranks, out: str | Path | None, more: dict, *, restart: bool, tensorboard: bool,
    progress: Progress | None,
) -> Iterator[Runner]:  # fmt: skip
    """A runner with a hold on the folder `out`, if one is given and this is the first process."""
    folder = board = None
    try:
        if out and ranks.lead:
            folder = RunFolder(out, job.command() | more, restart=restart)
            board = Board(folder.path / "tensorboard") if tensorboard else None
        yield Runner(ranks, folder, board, progress)
    finally:
        for opened in (board, folder):
            if opened:
                opened.close()


def _result(
    job: Job, done: list[Trained], runner: Runner, together: str, out: str | Path | None, seconds: float
) -> TrainResult:
    validated = [each for each in done if each.metrics]
    by_seed = [seed_line(job, validated[i : i + len(job.folds)]) for i in range(0, len(validated), len(job.folds))]
    folds = [mean_of([of_seed["folds"][k] for of_seed in by_seed]) for k in range(len(job.folds))]
    value, std = mean_and_std([fold["value"] for fold in folds])
    _, std_over_seeds = mean_and_std([of_seed["value"] for of_seed in by_seed])
    warnings = list(job.warnings)
    classes = len(job.cache.spec.class_names)
    for fold in folds:
        if job.metric == "mAP" and (missing := fold["classes_without_positives"]):
            said = "no validation clip has a label, so the fold does not count"
            if missing < classes:
                said = f"{missing} of {classes} classes have no validation clip and do not count"
            warnings.append(f"fold {fold['fold']}: {said}")
    samples, trained_seconds, waited = (
        sum(each.record[name] for each in done) for name in ("samples", "seconds", "waiting_seconds")
    )
    return TrainResult(
        head=job.head, dim=job.dim, params=job.parameters(), metric=job.metric, value=value, std=std, folds=folds,
        seconds=seconds, samples_per_second=samples / trained_seconds, checkpoint=str(out) if out else None,
        device=str(job.device), recipe=dataclasses.asdict(job.recipe),
        warnings=warnings, seeds=by_seed, std_over_seeds=std_over_seeds, tier=job.tier,
        waiting_share=waited / trained_seconds,
        heads_side_by_side=min(job.heads_side_by_side(together), len(validated)),
        processes=runner.ranks.world, metrics_file=str(Path(out) / "metrics.jsonl") if out else None,
        curve=str(Path(out) / "curve.png") if out else None, backbone=job.cache.spec.backbone,
        layer_weights=_layer_weights(validated),
    )  # fmt: skip


def _layer_weights(validated: list[Trained]) -> list[float] | None:
    """None of heads that have none, or that an earlier version trained."""
    found = [weights for each in validated if (weights := each.record.get("layer_weights"))]
    return np.mean(found, axis=0).tolist() if found and len(found) == len(validated) else None


def _with_interval(result: TrainResult, held_out: Predictions | None, file: Path | None) -> TrainResult:
    """The result with its interval, and the predictions saved. Raises UsageError where there are none to save."""
    if held_out is None and file:
        raise UsageError(LACKING)
    if held_out is None:
        return dataclasses.replace(result, warnings=[*result.warnings, LACKING])
    if file:
        held_out.save(file)
    value, ci95, made = value_and_interval(held_out, result.metric, seed=result.recipe["seed"])
    return dataclasses.replace(
        result, value=math.nan if value is None else value, ci95=ci95, intervals=made,
        predictions_file=None if file is None else str(file),
    )  # fmt: skip


def seed_line(job: Job, trained: list[Trained]) -> dict:
    """What one seed found."""
    folds = [
        {
            "fold": fold.number, "value": each.value(job.metric), "train_clips": len(fold.train),
            "validation_clips": len(fold.test), **(each.metrics or {}), "epochs": each.record["epochs"],
        }
        for fold, each in zip(job.folds, trained, strict=True)
    ]  # fmt: skip
    value, std = mean_and_std([fold["value"] for fold in folds])
    return {"seed": trained[0].training.recipe.seed, "value": value, "std": std, "folds": folds}


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


def _save_validated(each: Trained, job: Job, out: str | Path) -> None:
    """A head that was trained without its fold: into the folder of its training, or `out` itself where there are no
    folds and this is the first seed."""
    name = Path(each.training.name)
    if not job.cross_validated:
        name = Path() if each.training.recipe.seed == job.recipe.seed else name.parent
    note = f"on {len(each.training.test)} clips held out"
    _save(each, Path(out) / name, job, each.value(job.metric), note)


def _save_kept(each: Trained, job: Job, out: str | Path, values: list[float]) -> None:
    note = f"mean over {len(values)} heads, each trained without a fold; this one was trained on all clips"
    _save(each, Path(out), job, mean_and_std(values)[0], note)


def _save(each: Trained, folder: Path, job: Job, value: float, value_of: str) -> None:
    spec, recipe = job.cache.spec, each.training.recipe
    assert each.module is not None, "what an earlier call finished, it has saved too"
    description = HeadDescription(
        head=job.head, width=job.width, layers=spec.layers, dim=spec.dim, frames=spec.frames,
        class_names=spec.class_names, backbone=spec.backbone, weights_sha256=spec.weights_sha256,
        clip_seconds=spec.clip_seconds, loss=recipe.loss, metric=job.metric,
        value=value if math.isfinite(value) else None, value_of=value_of,
        trained_clips=len(each.training.train), seed=recipe.seed, recipe=dataclasses.asdict(recipe),
    )  # fmt: skip
    save_head(each.module, folder, description, trained_ids=job.cache.ids[job.rows[each.training.train]])
