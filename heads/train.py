"""Training a head from a cache: validation on folds or a split, then a head to keep.

The loop is the paper's: Adam on mixed and masked batches, then the average of the weights at the ends of the last
epochs. It departs from the original code in dropping no clip, neither in training nor in validation.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel

from whisper_at_cli.extract.cache import FeatureCache
from whisper_at_cli.extract.devices import choose_device, one_thread_per_operation
from whisper_at_cli.extract.errors import UsageError, WhisperATError
from whisper_at_cli.extract.folds import Fold, cache_folds
from whisper_at_cli.extract.progress import Progress
from whisper_at_cli.heads.batches import balancing_weights, draw_epoch, make_batch
from whisper_at_cli.heads.checkpoint import HeadDescription, save_head
from whisper_at_cli.heads.data import Clips, every_clip_has_one_label, load_clips
from whisper_at_cli.heads.evaluate import predict
from whisper_at_cli.heads.forms import build_head, head_form
from whisper_at_cli.heads.metrics import evaluate_scores
from whisper_at_cli.heads.recipe import Recipe, default_recipe_name, named_recipe

SMALL_BATCH = 1 << 18  # numbers in a batch


@dataclass(frozen=True)
class TrainResult:
    """What training found."""

    head: str
    dim: int  # channels inside the head
    params: int
    metric: str  # "accuracy" where every clip has one label, else "mAP"
    value: float  # mean over folds
    std: float  # population standard deviation over folds
    folds: list[dict]  # fold, value, train_clips, validation_clips
    seconds: float  # of all of it, reading included
    samples_per_second: float  # clips drawn for training, per second of training
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
    changes: dict | None = None,
    out: str | Path | None = None,
    device: str = "auto",
    seed: int | None = None,
    progress: Progress | None = None,
) -> TrainResult:
    """Validate a head on a cache's folds or split, and save one in the folder `out`.

    With folds, each is validated on a head trained on the others (saved in `out/fold-N`), and the head in `out` is then
    trained on all clips. With a split, the head in `out` is the validated one. `recipe` is a Recipe or the name of one;
    by default the data decide. `changes` replace some of its settings, `seed` its seed. `progress` is told of epochs.
    Raises UsageError for what cannot work, WhisperATError where memory is short or the loss is not finite.
    """
    started = time.monotonic()
    changes = (changes or {}) | ({} if seed is None else {"seed": seed})
    job = _plan(cache, head=head, width=width, recipe=recipe, changes=changes, device=device)
    out = _writable_folder(out) if out else None
    cross_validated = len(job.folds) > 1
    trainer = _Trainer(job, progress, trainings=len(job.folds) + bool(out and cross_validated))
    results = []
    for fold in job.folds:
        module = trainer.train(fold.train, number=fold.number)
        results.append(_validate(module, fold, job))
        if out:
            folder = out / f"fold-{fold.number}" if cross_validated else out
            _save(module, folder, job, len(fold.train), results[-1]["value"], f"on {len(fold.test)} clips held out")
    values = [result["value"] for result in results]
    if out and cross_validated:
        module = trainer.train(job.clips.rows, number=0)
        note = f"mean over {len(values)} folds, of heads trained without the fold; this one was trained on all clips"
        _save(module, out, job, len(job.clips.rows), float(np.mean(values)), note)
    return TrainResult(
        head=head, dim=width or cache.spec.dim, params=sum(p.numel() for p in module.parameters()), metric=job.metric,
        value=float(np.mean(values)), std=float(np.std(values)), folds=results, seconds=time.monotonic() - started,
        samples_per_second=trainer.samples / trainer.seconds, checkpoint=str(out) if out else None,
        device=str(job.clips.device), recipe=dataclasses.asdict(job.recipe), warnings=job.warnings,
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Job:
    """All that is settled before the first step."""

    cache: FeatureCache
    head: str
    width: int | None
    recipe: Recipe
    folds: list[Fold]
    clips: Clips
    metric: str
    warnings: list[str]

    def new_module(self) -> nn.Module:
        spec = self.cache.spec
        return build_head(self.head, layers=spec.layers, dim=spec.dim, classes=len(spec.class_names), width=self.width)


def _plan(cache, *, head, width, recipe, changes, device) -> _Job:
    """Settle recipe and folds, refuse what cannot work, and read the features."""
    spec, target = cache.spec, choose_device(device)
    with torch.device("meta"):  # refuses an unknown head or a wrong width, at no cost
        build_head(head, layers=spec.layers, dim=spec.dim, classes=max(1, len(spec.class_names)), width=width)
    rows = np.flatnonzero(cache.done)
    if not len(rows):
        raise UsageError(f"0 of {len(cache)} clips are finished in {cache.path}; run extract again to continue it")
    single_label = every_clip_has_one_label(cache.labels[rows])
    if recipe is None:
        recipe = default_recipe_name(single_label=single_label, clips=len(rows))
    if isinstance(recipe, str):
        recipe = named_recipe(recipe, head, dim=spec.dim, width=width)
    recipe = recipe.with_changes(**changes)
    if recipe.precision == "auto":
        recipe = recipe.with_changes(precision=_fastest_precision(head, target))
    _check_recipe(recipe, head, single_label, spec.frames)
    folds, warnings = cache_folds(cache, seed=recipe.seed)
    rows = np.unique(np.concatenate([side for fold in folds for side in (fold.train, fold.test)]))
    clips = load_clips(cache, rows, head_form(head).reads, target)
    return _Job(cache, head, width, recipe, folds, clips, "accuracy" if single_label else "mAP", warnings)


def _check_recipe(recipe: Recipe, head: str, single_label: bool, frames: int) -> None:
    """Raises UsageError where a recipe does not suit the head or the data."""
    masked = recipe.time_mask_frames
    if recipe.loss == "ce" and not single_label:
        raise UsageError("loss ce needs exactly one label on every clip; some here have none or several: use loss bce")
    if masked and head_form(head).reads != "features":
        raise UsageError(f"{head} trains from the mean over time, which cannot be masked: set time_mask_frames to 0")
    if masked and masked >= frames:
        raise UsageError(f"time_mask_frames is {masked} and clips have {frames} frames: set it lower")


def _fastest_precision(head: str, device: torch.device) -> str:
    """bfloat16 for heads with Transformer blocks on a device with instructions for it: measured about twice as fast on
    a CPU, with the same accuracy. Else float32, as always in validation."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        can = torch.cpu.get_capabilities() if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities") else {}
        native = can.get("avx512_bf16") or can.get("amx_bf16")
    return "bfloat16" if native and head_form(head).reads == "features" else "float32"


class _Trainer:
    """The trainings of one job, one after another; counts samples and seconds, and reports epochs."""

    def __init__(self, job: _Job, progress: Progress | None, trainings: int):
        self.job, self.progress = job, progress
        self.epochs_done, self.epochs = 0, trainings * job.recipe.epochs
        self.samples, self.seconds = 0, 0.0

    def train(self, rows: np.ndarray, number: int) -> nn.Module:
        """A head trained on these rows of the cache. `number` sets its random numbers apart from other trainings'."""
        started, clips = time.monotonic(), self.job.clips
        rng = np.random.default_rng([self.job.recipe.seed, number])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(rng.integers(2**62)))
            module = self.job.new_module()
        positions = clips.positions(rows)
        with _few_threads(clips, self.job.recipe):
            module = fit(module.to(clips.device), clips, positions, self.job.recipe, rng, self._after_epoch)
        self.seconds += time.monotonic() - started
        return module

    def _after_epoch(self, samples: int, loss: float) -> None:
        self.samples += samples
        self.epochs_done += 1
        if self.progress:
            self.progress(self.epochs_done, self.epochs, f"loss {loss:.4f}")


def _few_threads(clips: Clips, recipe: Recipe) -> AbstractContextManager:
    """One CPU thread for batches so small that more gain nothing. Measured for WA-MLP on ESC-10, two threads and two
    cores: no faster alone, and 40 times slower while other processes kept the cores busy."""
    small = clips.device.type == "cpu" and recipe.batch_size * clips.features[0].numel() <= SMALL_BATCH
    return one_thread_per_operation(small)


def fit(
    module: nn.Module, clips: Clips, positions: np.ndarray, recipe: Recipe, rng: np.random.Generator,
    after_epoch: Callable[[int, float], None],
) -> nn.Module:  # fmt: skip
    """Train `module` on these clips. Returns the head with averaged weights, or `module` if the recipe averages none.

    `after_epoch` is told how many samples an epoch had and their loss. Raises WhisperATError on a non-finite loss.
    """
    optimizer = torch.optim.Adam(module.parameters(), betas=recipe.betas, weight_decay=recipe.weight_decay)
    averaged = AveragedModel(module)
    weights = None
    if recipe.class_balanced:
        weights = balancing_weights(clips.labels[torch.from_numpy(positions)].cpu().numpy())
    loss_of = F.cross_entropy if recipe.loss == "ce" else F.binary_cross_entropy_with_logits
    module.train()
    step = 0
    for epoch in range(1, recipe.epochs + 1):
        draw = draw_epoch(positions, recipe, rng, frames=clips.frames, weights=weights).to(clips.device)
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
        epoch_loss = torch.stack(losses).mean().item()
        if not math.isfinite(epoch_loss):
            raise WhisperATError(f"the loss became {epoch_loss} in epoch {epoch}: lower lr, which is {recipe.lr:g}")
        if recipe.average_from_epoch is not None and epoch >= recipe.average_from_epoch:
            averaged.update_parameters(module)
        after_epoch(len(draw.clip), epoch_loss)
    return averaged.module if recipe.average_from_epoch is not None else module


def _validate(module: nn.Module, fold: Fold, job: _Job) -> dict:
    """A fold's line in the result: the metric over every one of its test clips."""
    logits = predict(module, job.clips, job.clips.positions(fold.test))
    metrics = evaluate_scores(logits, job.cache.labels[fold.test])
    missing = metrics.classes_without_positives
    if job.metric == "mAP" and missing:
        job.warnings.append(
            f"fold {fold.number}: {missing} of {len(metrics.class_ap)} classes have no validation clip and do not count"
        )
    value = getattr(metrics, job.metric)
    return {"fold": fold.number, "value": value, "train_clips": len(fold.train), "validation_clips": len(fold.test)}


def _writable_folder(path: str | Path) -> Path:
    """The folder, made now: hours of training should not end at a name that cannot be written."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make the folder {folder}: {error}; choose another --out") from error
    return folder


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
