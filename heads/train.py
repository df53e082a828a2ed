"""Training a head from a cache: cross-validation over the folds, then a head trained on all clips, saved.

The loop is the paper's (section 4): Adam on mixed and masked batches, then the average of the weights at the ends of the
last epochs. It departs from the original code in dropping no clip, in training or validation.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel

from whisper_at_cli.extract.backbones import choose_device
from whisper_at_cli.extract.cache import FeatureCache
from whisper_at_cli.extract.errors import UsageError, WhisperATError
from whisper_at_cli.extract.folds import Fold, evaluation_folds
from whisper_at_cli.extract.progress import Progress
from whisper_at_cli.heads.batches import balancing_weights, draw_epoch, make_batch
from whisper_at_cli.heads.checkpoint import HeadDescription, save_head
from whisper_at_cli.heads.data import Clips, every_clip_has_one_label, load_clips
from whisper_at_cli.heads.evaluate import predict
from whisper_at_cli.heads.forms import build_head, head_form
from whisper_at_cli.heads.metrics import evaluate_scores
from whisper_at_cli.heads.recipe import Recipe, default_recipe_name, named_recipe


@dataclass(frozen=True)
class TrainResult:
    """What training found. `value` is the mean over folds, `std` their (population) standard deviation."""

    head: str
    dim: int  # channels inside the head
    params: int
    metric: str  # "accuracy" where every clip has one label, else "mAP"
    value: float
    std: float
    folds: list[dict]  # fold, value, train_clips, validation_clips
    seconds: float  # of all of it, reading included
    samples_per_second: float  # clips drawn for training, by the seconds spent on training
    checkpoint: str | None
    device: str
    recipe: dict
    warnings: list[str] = field(default_factory=list)


def train_head(
    cache: FeatureCache,
    *,
    head: str,
    width: int | None = None,
    recipe: Recipe | str | None = None,
    out: str | Path | None = None,
    device: str = "auto",
    seed: int | None = None,
    progress: Progress | None = None,
) -> TrainResult:
    """Validate a head on a cache's folds (or split), and save one in the folder `out`.

    With folds, each is validated once on a head trained on the others, saved in `out/fold-N`; the head in `out` is then
    trained on all clips. With a split, the head in `out` is the validated one. `recipe` is a Recipe or the name of one;
    by default the data decide. `seed` replaces the recipe's. `progress` is told of epochs.
    """
    started = time.monotonic()
    job = _plan(cache, head=head, width=width, recipe=recipe, device=device, seed=seed)
    run = _Run(job, progress, trainings=len(job.folds) + bool(out and job.cross_validated))
    out = Path(out) if out else None
    folds = []
    for fold in job.folds:
        module, result = run.validate(fold)
        folds.append(result)
        if out:
            folder = out / f"fold-{fold.number}" if job.cross_validated else out
            _save(module, folder, job, result["train_clips"], result["value"], f"validation on fold {fold.number}")
    values = [result["value"] for result in folds]
    value = float(np.mean(values))
    if out and job.cross_validated:
        module = run.train(job.clips.rows, number=0)
        note = f"mean over {len(folds)} heads, each validated on the fold that it was not trained on; this one saw all clips"
        _save(module, out, job, len(job.clips.rows), value, note)
    return TrainResult(
        head=head, dim=width or cache.spec.dim, params=job.params, metric=job.metric, value=value,
        std=float(np.std(values)), folds=folds, seconds=time.monotonic() - started,
        samples_per_second=run.samples / run.seconds, checkpoint=str(out) if out else None, device=str(job.clips.device),
        recipe=dataclasses.asdict(job.recipe), warnings=job.warnings,
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Job:
    """Everything that is settled before the first step."""

    cache: FeatureCache
    head: str
    width: int | None
    recipe: Recipe
    folds: list[Fold]
    clips: Clips
    metric: str
    warnings: list[str]
    params: int

    @property
    def cross_validated(self) -> bool:
        return len(self.folds) > 1

    def new_module(self) -> nn.Module:
        spec = self.cache.spec
        return build_head(
            self.head, layers=spec.layers, dim=spec.dim, classes=len(spec.class_names), width=self.width
        )  # fmt: skip


def _plan(cache, *, head, width, recipe, device, seed) -> _Job:
    """Settle recipe and folds, find what cannot work, then read the features."""
    form, target = head_form(head), choose_device(device)
    rows = np.flatnonzero(cache.done)
    single_label = every_clip_has_one_label(cache.labels[rows])
    if recipe is None:
        recipe = default_recipe_name(single_label=single_label, clips=len(rows))
    if isinstance(recipe, str):
        recipe = named_recipe(recipe, head, dim=cache.spec.dim, width=width)
    if seed is not None:
        recipe = recipe.with_changes(seed=seed)
    _check_recipe(recipe, head, single_label, cache.spec.frames)
    with torch.device("meta"):
        params = sum(
            parameter.numel()
            for parameter in build_head(
                head, layers=cache.spec.layers, dim=cache.spec.dim, classes=len(cache.spec.class_names), width=width
            ).parameters()
        )
    folds, warnings = evaluation_folds(cache.fold, cache.split, cache.labels, cache.done, seed=recipe.seed)
    rows = np.unique(np.concatenate([np.concatenate([fold.train, fold.test]) for fold in folds]))
    clips = load_clips(cache, rows, form.reads, target)
    metric = "accuracy" if single_label else "mAP"
    return _Job(cache, head, width, recipe, folds, clips, metric, warnings, params)


def _check_recipe(recipe: Recipe, head: str, single_label: bool, frames: int) -> None:
    """Raises UsageError where a recipe does not suit the head or the data."""
    if recipe.loss == "ce" and not single_label:
        raise UsageError("loss ce needs exactly one label on every clip, and these have none or several: use loss bce")
    if recipe.time_mask_frames and head_form(head).reads != "features":
        raise UsageError(f"{head} trains from the mean over time, which cannot be masked: set time_mask_frames to 0")
    if recipe.time_mask_frames >= frames and recipe.time_mask_frames:
        raise UsageError(f"time_mask_frames is {recipe.time_mask_frames} and clips have {frames} frames: set it lower")


class _Run:
    """The trainings of one job, one after another; counts samples and seconds, and reports epochs."""

    def __init__(self, job: _Job, progress: Progress | None, trainings: int):
        self.job, self.progress = job, progress
        self.epochs_done, self.epochs = 0, trainings * job.recipe.epochs
        self.samples, self.seconds = 0, 0.0

    def train(self, rows: np.ndarray, number: int) -> nn.Module:
        """A head trained on these rows of the cache. `number` sets its random numbers apart from other trainings'."""
        job, started = self.job, time.monotonic()
        rng = np.random.default_rng([job.recipe.seed, number])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(rng.integers(2**62)))
            module = job.new_module()
        module = fit(module.to(job.clips.device), job.clips, job.clips.positions(rows), job.recipe, rng, self._after_epoch)
        self.seconds += time.monotonic() - started
        return module

    def validate(self, fold: Fold) -> tuple[nn.Module, dict]:
        """A head trained on a fold's training clips, and its result on every one of the others."""
        job = self.job
        module = self.train(fold.train, fold.number)
        logits = predict(module, job.clips, job.clips.positions(fold.test))
        metrics = evaluate_scores(logits, job.cache.labels[fold.test])
        if job.metric == "mAP" and metrics.classes_without_positives:
            job.warnings.append(
                f"fold {fold.number}: {metrics.classes_without_positives} of {len(metrics.class_ap)} classes have no positive "
                "validation clip and are left out of mAP"
            )
        value = getattr(metrics, job.metric)
        sizes = {"train_clips": len(fold.train), "validation_clips": len(fold.test)}
        return module, {"fold": fold.number, "value": value, **sizes}

    def _after_epoch(self, samples: int, loss: float) -> None:
        self.samples += samples
        self.epochs_done += 1
        if self.progress:
            self.progress(self.epochs_done, self.epochs, f"loss {loss:.4f}")


def fit(
    module: nn.Module, clips: Clips, positions: np.ndarray, recipe: Recipe, rng: np.random.Generator,
    after_epoch: Callable[[int, float], None],
) -> nn.Module:  # fmt: skip
    """Train `module` on these clips; returns the head with averaged weights, or `module` where the recipe averages none.

    `after_epoch` is told how many samples an epoch had and its mean loss. Raises WhisperATError on a non-finite loss.
    """
    optimizer = torch.optim.Adam(module.parameters(), betas=recipe.betas, weight_decay=recipe.weight_decay)
    averaged = AveragedModel(module)
    weights = balancing_weights(clips.labels[torch.from_numpy(positions)].cpu().numpy()) if recipe.class_balanced else None
    loss_of = F.cross_entropy if recipe.loss == "ce" else F.binary_cross_entropy_with_logits
    step = 0
    module.train()
    for epoch in range(1, recipe.epochs + 1):
        draw = draw_epoch(positions, recipe, rng, frames=clips.frames, weights=weights)
        losses = []
        for batch in draw.batches(recipe.batch_size):
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate(epoch, step)
            inputs, targets = make_batch(clips, batch, recipe)
            with torch.autocast(clips.device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16"):
                logits = module(inputs)
            loss = loss_of(logits.float(), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
            step += 1
        mean_loss = torch.stack(losses).mean().item()
        if not math.isfinite(mean_loss):
            raise WhisperATError(f"the loss became {mean_loss} in epoch {epoch} of training: lower lr (now {recipe.lr:g})")
        if recipe.average_from_epoch is not None and epoch >= recipe.average_from_epoch:
            averaged.update_parameters(module)
        after_epoch(len(draw.clip), mean_loss)
    return averaged.module if recipe.average_from_epoch is not None else module


def _save(module: nn.Module, folder: Path, job: _Job, trained_clips: int, value: float, value_of: str) -> None:
    spec = job.cache.spec
    description = HeadDescription(
        head=job.head, width=job.width, layers=spec.layers, dim=spec.dim, frames=spec.frames,
        class_names=spec.class_names, backbone=spec.backbone, weights_sha256=spec.weights_sha256,
        clip_seconds=spec.clip_seconds, loss=job.recipe.loss, metric=job.metric,
        value=value if math.isfinite(value) else None, value_of=value_of, trained_clips=trained_clips,
        seed=job.recipe.seed, recipe=dataclasses.asdict(job.recipe),
    )  # fmt: skip
    save_head(module, folder, description)
