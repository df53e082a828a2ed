"""Training heads from a cache: validation on folds or a split, over one seed or several, then a head to keep."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from whisper_at_cli.extract.cache import FeatureCache
from whisper_at_cli.extract.errors import UsageError
from whisper_at_cli.extract.evaluation.predictions import Predictions, checked_path
from whisper_at_cli.extract.progress import Progress
from whisper_at_cli.heads.checkpoint import HeadDescription, save_head
from whisper_at_cli.heads.training.distill import Teachers
from whisper_at_cli.heads.training.held_out import held_out_predictions
from whisper_at_cli.heads.training.loop import Trained, Training
from whisper_at_cli.heads.training.plan import Job, plan
from whisper_at_cli.heads.training.ranks import joined_ranks
from whisper_at_cli.heads.training.recipe import Recipe
from whisper_at_cli.heads.training.records import order_kept, precision_kept
from whisper_at_cli.heads.training.result import (
    TrainResult,
    Verdict,
    as_result,
    judge,
    or_none,
    values_by_seed,
    with_predictions,
)
from whisper_at_cli.heads.training.runner import Runner, open_run
from whisper_at_cli.heads.training.search import Choice, Grid, choose, fold_trainings, training_of

TOGETHER = ("auto", "never")


def train_head(
    cache: FeatureCache, *, head: str, width: int | None = None, block: bool = True,
    recipe: Recipe | str | None = None, changes: dict | None = None, faithful: bool = False,
    out: str | Path | None = None, device: str = "auto", tier: str = "auto", seed: int | None = None, seeds: int = 1,
    together: str = "auto", restart: bool = False, tensorboard: bool = False, predictions: str | Path | None = None,
    grid: Grid | None = None, permute_labels: bool = False, teachers: Teachers | None = None,
    progress: Progress | None = None,
) -> TrainResult:  # fmt: skip
    """Validate a head on a cache's folds or split, and save one in the folder `out`.

    With folds, each is validated on a head trained on the others (saved in `out/fold-N`), and the head in `out` is then
    trained on all clips. With a split, the head in `out` is the validated one. `seeds` repeat all validation with the
    seeds after the first. `recipe` is a Recipe or the name of one; by default the data decide. `changes` replace some
    of its settings, `seed` its seed; `faithful` draws partners and masks as the original code does. With `grid`,
    learning rate and width are chosen for each fold on clips that it does not test (`search_heads`). Without `block`,
    wa-pool has no block over time. With `permute_labels`, a control, recordings trade their labels at random. With
    `teachers`, targets are mixed with what these heads say. The same call with the same `out` continues a run that was
    stopped; another is refused unless `restart`. The scores of held-out clips are written into `predictions`, an .npz
    file. `progress` is told of epochs.
    Under torchrun all processes call this; each returns the result, the first one writes.
    Raises UsageError for what cannot work, WhisperATError where memory is short or the loss is not finite.
    """
    started, predictions = time.monotonic(), checked_path(predictions) if predictions else None
    changes = (changes or {}) | ({} if seed is None else {"seed": seed})
    check_options(seeds, together, tensorboard, out)
    if out and tier == "auto" and not restart and order_kept(out) == "streamed":
        tier = "stream"
    widths = (width,) if grid is None else grid.widths_for(head, cache.spec.dim)
    with ExitStack() as stack:
        ranks, target = stack.enter_context(joined_ranks(device))
        jobs = [
            plan(
                cache, head=head, width=each, recipe=recipe, changes=changes, faithful=faithful, device=target,
                tier=tier, processes=ranks.here, precision=None if restart or not out else precision_kept(out),
                chooses=grid is not None, permute_labels=permute_labels, block=block, teachers=teachers,
            )
            for each in widths
        ]  # fmt: skip
        combinations = [] if grid is None else grid.combinations(jobs)
        more = {"seeds": seeds} | ({"search": [[job.dim, rate] for job, rate in combinations]} if grid else {})
        runner = stack.enter_context(
            open_run(jobs[0], ranks, out, more, restart=restart, tensorboard=tensorboard, progress=progress)
        )
        choice = choose(combinations, runner, together) if grid else Choice.of(jobs[0])
        result, held_out, done = _validate_and_keep(choice, runner, seeds, together, out, started)
        result = with_predictions(result, held_out, predictions if ranks.lead else None)
        runner.finish(result, done)
    return result


def _validate_and_keep(
    choice: Choice, runner: Runner, seeds: int, together: str, out: str | Path | None, started: float
) -> tuple[TrainResult, Predictions | None, list[Trained]]:
    """Train what is validated, judge it, and train the head that is kept where none of these is that."""
    job, recipe = choice.of_fold[0]
    trainings = fold_trainings(choice, seeds)
    runner.expect([training for _, training in trainings], also=int(bool(out and job.cross_validated)))
    save = partial(_save_validated, choice=choice, out=out) if out else None
    done = runner.train(trainings, together, save, keep_scores=True)
    held_out = held_out_predictions(job, done, choice.name)
    verdict = judge(held_out, job.metric, values_by_seed(job, done), recipe.seed)
    if out and job.cross_validated:
        kept = _on_all_clips(job, recipe, done)
        done += runner.train([(job, kept)], together, partial(_save_kept, choice=choice, out=out, verdict=verdict))
    validated = sum(bool(each.metrics) for each in done)
    result = as_result(
        dataclasses.replace(job, recipe=recipe), done, verdict, out, seconds=time.monotonic() - started,
        heads_side_by_side=min(job.heads_side_by_side(together), validated), processes=runner.ranks.world,
        selected_on=choice.selected_on, search=choice.search,
    )  # fmt: skip
    return result, held_out, done


def search_heads(
    cache: FeatureCache, *, head: str, rates: Sequence[float] | None = None, widths: Sequence[int] | None = None,
    **options: Any,
) -> TrainResult:  # fmt: skip
    """Train a head whose learning rate, and width of tl-tr, are chosen for each test fold on other clips: the split
    `valid` where there is one, else inner folds of its training clips.

    By default the recipe's learning rate and those from 2e-4 to 1e-2, and for tl-tr the widths of Table 2 that are
    smaller than the encoder's. `search` of the result has every combination; with `out` it is kept in search.json.
    `options` are those of `train_head`, and so is what is raised.
    """
    return train_head(cache, head=head, grid=Grid(rates, widths), **options)


def check_options(seeds: int, together: str, tensorboard: bool, out: str | Path | None) -> None:
    if seeds < 1:
        raise UsageError(f"{seeds} seeds were asked for: give 1 or more")
    if together not in TOGETHER:
        raise UsageError(f"together is {together!r} and must be one of {', '.join(TOGETHER)}")
    if tensorboard and not out:
        raise UsageError("--tensorboard writes its files into the folder of --out: give one")


def _on_all_clips(job: Job, recipe: Recipe, done: list[Trained]) -> Training:
    """The training of the head that is kept. Where folds stopped early, it takes as many epochs as they did on average,
    since it has no clips to watch."""
    if recipe.patience:
        epochs = max(1, round(float(np.mean([each.record["epochs"] for each in done]))))
        first, last = recipe.average_from_epoch, recipe.average_to_epoch
        averages = first is not None and first <= epochs
        recipe = dataclasses.replace(
            recipe, patience=None, epochs=epochs, average_from_epoch=first if averages else None,
            average_to_epoch=last if averages else None,
        )  # fmt: skip
    return training_of(job, recipe, "all", 0, job.rows, np.arange(0))


def _save_validated(job: Job, each: Trained, choice: Choice, out: str | Path) -> None:
    """A head that was trained without its fold: into the folder of its training, or `out` itself where there are no
    folds and this is the first seed."""
    name, recipe = Path(each.training.name), each.training.recipe
    if not job.cross_validated:
        name = Path() if recipe.seed == job.recipe.seed else name.parent
    fold = next(fold for fold in job.folds if fold.number == each.training.number)
    of_fold = dataclasses.replace(job, folds=[fold])
    verdict = judge(
        held_out_predictions(of_fold, [each], choice.name), job.metric, [[each.value(job.metric)]], recipe.seed
    )
    _save(job, each, Path(out) / name, choice, verdict, f"on {len(fold.test)} clips held out")


def _save_kept(job: Job, each: Trained, choice: Choice, out: str | Path, verdict: Verdict) -> None:
    note = (
        f"on the held-out clips of {len(job.folds)} folds, by heads each trained without its fold; this one was "
        "trained on all clips"
    )
    _save(job, each, Path(out), choice, verdict, note)


def _save(job: Job, each: Trained, folder: Path, choice: Choice, verdict: Verdict, value_of: str) -> None:
    spec, training = job.cache.spec, each.training
    assert each.module is not None, "what an earlier call finished, it has saved too"
    chosen = {"strength": each.record["strength"]} if job.solved else {}
    description = HeadDescription(
        head=job.head, width=job.width, block=job.block,
        standardised=training.recipe.standardise and not job.solved,
        layers=spec.layers, dim=spec.dim, frames=spec.frames,
        class_names=spec.class_names, backbone=spec.backbone, weights_sha256=spec.weights_sha256,
        clip_seconds=spec.clip_seconds, loss=training.recipe.loss, metric=job.metric,
        value=or_none(verdict.value), ci95=verdict.ci95, fold_mean=or_none(verdict.fold_mean),
        fold_std=or_none(verdict.fold_std), value_of=value_of, selected_on=choice.selected_on,
        trained_clips=len(training.train), seed=training.recipe.seed,
        recipe=job.recorded(training.recipe) | chosen, permuted_labels=job.permuted,
    )  # fmt: skip
    known = np.concatenate([job.rows[training.train], job.rows[training.watched], job.valid])
    save_head(each.module, folder, description, trained_ids=job.cache.ids[np.unique(known)])
