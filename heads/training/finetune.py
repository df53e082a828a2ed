"""Fine-tuning Whisper's encoder with a head on it, from audio: the end-to-end rows of Table 1.

Each clip is decoded, mixed with another as a waveform, masked in its mel spectrogram, encoded and classified; the
gradient of the loss reaches every weight, the encoder's at a learning rate that is a hundredth of the head's.
"""

from __future__ import annotations

import dataclasses
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from whisper_at_cli.extract.backbones.encoder import POSITIONS_PER_SECOND, clip_samples
from whisper_at_cli.extract.backbones.weights import WhisperWeights, read_weights
from whisper_at_cli.extract.cache.folds import Fold, cache_folds
from whisper_at_cli.extract.cache.schema import FRAMES
from whisper_at_cli.extract.cache.sources import source_recordings
from whisper_at_cli.extract.datasets import Dataset, open_dataset
from whisper_at_cli.extract.devices import choose_device, random_numbers
from whisper_at_cli.extract.errors import UsageError, WhisperATError
from whisper_at_cli.extract.evaluation.metrics import evaluate_scores
from whisper_at_cli.extract.evaluation.predictions import Predictions, checked_path
from whisper_at_cli.extract.folders import writable_folder
from whisper_at_cli.extract.progress import Progress
from whisper_at_cli.heads.checkpoint import HeadDescription
from whisper_at_cli.heads.endtoend import (
    EncoderWithHead,
    ListedClips,
    Waveforms,
    new_model,
    predict_audio,
    save_end_to_end,
)
from whisper_at_cli.heads.forms import build_head, head_name, head_width
from whisper_at_cli.heads.training.batches import Step, balancing_weights, draw_epoch, smoothed, steps
from whisper_at_cli.heads.training.data import every_clip_has_one_label
from whisper_at_cli.heads.training.fleet import clip_losses
from whisper_at_cli.heads.training.plan import training_side_warnings, without_last_batch
from whisper_at_cli.heads.training.recipe import Recipe, default_recipe_name, named_recipe
from whisper_at_cli.heads.training.result import Verdict, judge, or_none

ENCODER_LR_SHARE = 0.01  # of the head's learning rate; the paper says 10 to 100 times smaller
CLIP_COLUMNS = ("ids", "recordings", "labels", "folds")  # of predictions, one value a clip
ON_ALL_POSITIONS = "last-tr"  # this head reads the last layer un-pooled, as in the paper's end-to-end rows


@dataclass(frozen=True)
class FinetuneResult:
    """What fine-tuning found."""

    model: str
    head: str
    dim: int  # channels inside the head
    params: int  # of encoder and head
    encoder_lr: float
    metric: str  # "accuracy" where every clip has one label, else "mAP"
    value: float  # of all held-out clips together, as in TrainResult
    std: float  # population standard deviation over folds
    folds: list[dict]  # fold, value, train_clips, validation_clips
    losses: list[list[float]]  # of each training, by epoch
    seconds: float
    samples_per_second: float  # clips drawn for training, per second of training
    checkpoint: str | None
    device: str
    recipe: dict
    warnings: list[str] = field(default_factory=list)
    fold_mean: float = math.nan  # mean over folds
    ci95: list[float] | None = None  # of value
    intervals: dict = field(default_factory=dict)  # level, method, recordings, clips, draws
    predictions_file: str | None = None


def finetune(
    dataset: str | Path | Dataset, *, model: str | Path | WhisperWeights, head: str = ON_ALL_POSITIONS,
    width: int | None = None, recipe: Recipe | str | None = None, changes: dict | None = None,
    encoder_lr_share: float = ENCODER_LR_SHARE, clip_seconds: float | None = None, format: str = "auto",
    fold: int | None = None, out: str | Path | None = None, device: str = "auto", seed: int | None = None,
    predictions: str | Path | None = None, progress: Progress | None = None,
) -> FinetuneResult:  # fmt: skip
    """Train an encoder and a head on it from a dataset's audio; validate on its folds or split, and save both in `out`.

    Folds, split, recipe, `changes`, `out` and `seed` are as in `train_head`; with `fold`, that one alone is held out,
    and the model in `out` is the validated one. With an `encoder_lr_share` of 0 the encoder stays as it is.
    Clips that cannot be read are left out and named in the warnings. The scores of held-out clips are written into
    `predictions`, an .npz file. Raises UsageError for what cannot work, WhisperATError where the loss is not finite.
    """
    started = time.monotonic()
    predictions = checked_path(predictions) if predictions else None
    changes = (changes or {}) | ({} if seed is None else {"seed": seed})
    job = _plan(dataset, model, head, width, recipe, changes, encoder_lr_share, clip_seconds, format, fold, device)
    out = writable_folder(out) if out else None
    whole = bool(out) and len(job.folds) > 1
    trainer = _Trainer(job, progress, trainings=len(job.folds) + whole)
    results, held_out = [], []
    for each in job.folds:
        trained = trainer.train(each.train, number=each.number)
        line, scored = _validate(trained, each, job)
        results.append(line)
        held_out.append(scored)
        if out:
            folder = out / f"fold-{each.number}" if whole else out
            note = f"on {line['validation_clips']} clips held out"
            verdict = judge(scored, job.metric, [[line["value"]]], job.recipe.seed)
            _save(trained, folder, job, each.train, verdict, note)
    scored = joined(held_out)
    verdict = judge(scored, job.metric, [[result["value"] for result in results]], job.recipe.seed)
    if predictions:
        scored.save(predictions)
    if out and whole:
        rows = np.unique(np.concatenate([each.test for each in job.folds]))
        trained = trainer.train(rows, number=0)
        note = (
            f"on the held-out clips of {len(results)} folds, by models each trained without its fold; this one was "
            "trained on all clips"
        )
        _save(trained, out, job, rows, verdict, note)
    if job.audio.failures:
        job.warnings.append(job.audio.failure_note())
    return FinetuneResult(
        model=job.weights.name, head=head, dim=job.width or job.dim, params=trainer.parameters,
        encoder_lr=job.recipe.lr * encoder_lr_share, metric=job.metric,
        value=verdict.value, ci95=verdict.ci95, intervals=verdict.made, fold_mean=verdict.fold_mean,
        std=verdict.fold_std, folds=results, predictions_file=None if predictions is None else str(predictions),
        losses=trainer.losses, seconds=time.monotonic() - started,
        samples_per_second=trainer.samples / trainer.seconds, checkpoint=str(out) if out else None,
        device=str(job.device), recipe=dataclasses.asdict(job.recipe), warnings=job.warnings,
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Job:
    """All that is settled before the first step."""

    dataset: Dataset
    weights: WhisperWeights
    head: str
    width: int | None
    recipe: Recipe
    encoder_lr_share: float
    clip_seconds: float
    folds: list[Fold]
    audio: Waveforms
    labels: Tensor  # (N, C) uint8, on the CPU
    metric: str
    device: torch.device
    warnings: list[str]

    @property
    def dim(self) -> int:
        return self.weights.dims["n_audio_state"]

    @property
    def pools(self) -> bool:
        return self.head != ON_ALL_POSITIONS

    def new_model(self) -> EncoderWithHead:
        head = build_head(
            self.head, layers=self.weights.dims["n_audio_layer"], dim=self.dim, classes=self.labels.shape[1],
            width=self.width,
        )  # fmt: skip
        head.mlp_layer.dropout = self.recipe.dropout
        return new_model(self.weights, head, pools=self.pools)


def _plan(
    dataset: str | Path | Dataset, model: str | Path | WhisperWeights, head: str, width: int | None,
    recipe: Recipe | str | None, changes: dict, share: float, clip_seconds: float | None, format: str,
    fold: int | None, device: str,
) -> _Job:  # fmt: skip
    """Settle recipe and folds, and refuse what cannot work, before any audio is read."""
    if not 0 <= share <= 1:
        raise UsageError(f"the encoder's share of the learning rate is {share}, and must be from 0 to 1")
    target = choose_device(device)
    dataset = dataset if isinstance(dataset, Dataset) else open_dataset(dataset, format=format)
    seconds = dataset.clip_seconds if clip_seconds is None else clip_seconds
    samples = clip_samples(seconds)
    clips = ListedClips.of(dataset)
    single_label = every_clip_has_one_label(clips.labels)
    if recipe is None:
        recipe = default_recipe_name(head, single_label=single_label, clips=len(clips))
    weights = model if isinstance(model, WhisperWeights) else read_weights(model)
    if isinstance(recipe, str):
        recipe = named_recipe(recipe, head, dim=weights.dims["n_audio_state"], width=width)
    if changes.get("standardise"):
        raise UsageError(
            "--standardise does nothing with --unfreeze: what the encoder gives changes while it is trained; leave it "
            "out"
        )
    if given := {"patience", "validate_every"} & changes.keys():
        raise UsageError(f"fine-tuning validates once, at its end: leave out {', '.join(sorted(given))}")
    recipe = recipe.with_changes(**changes | {"patience": None, "validate_every": 0, "standardise": False})
    if recipe.precision == "auto":
        native = target.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        recipe = recipe.with_changes(precision="bfloat16" if native else "float32")
    if recipe.loss == "ce" and not single_label:
        raise UsageError("loss ce needs exactly one label on every clip; some here have none or several: use loss bce")
    folds, warnings = cache_folds(clips, seed=recipe.seed)
    folds, dropped = without_last_batch(folds, recipe)
    warnings += dropped
    warnings += training_side_warnings(clips.labels, folds, recipe)
    if fold is not None:
        numbers = [each.number for each in folds]
        if fold not in numbers:
            raise UsageError(f"fold {fold} was asked for, and {dataset.root} has {', '.join(map(str, numbers))}")
        folds = [each for each in folds if each.number == fold]
    job = _Job(
        dataset, weights, head, head_width(head, width), recipe, share, seconds, folds, Waveforms(dataset, samples),
        torch.from_numpy(clips.labels), "accuracy" if single_label else "mAP", target, warnings,
    )  # fmt: skip
    with torch.device("meta"):  # refuses an unknown head or a wrong width, at no cost
        build_head(head, layers=1, dim=job.dim, classes=max(1, clips.labels.shape[1]), width=width)
    return job


class _Trainer:
    """The trainings of one job, one after another; counts samples and seconds, and reports epochs."""

    def __init__(self, job: _Job, progress: Progress | None, trainings: int):
        self.job, self.progress = job, progress
        self.epochs_done, self.epochs = 0, trainings * job.recipe.epochs
        self.samples, self.seconds, self.parameters = 0, 0.0, 0
        self.losses: list[list[float]] = []

    def train(self, rows: np.ndarray, number: int) -> EncoderWithHead:
        """A model trained on these clips. `number` sets its random numbers apart from other trainings'."""
        started, job = time.monotonic(), self.job
        rng = np.random.default_rng([job.recipe.seed, number])
        with random_numbers(int(rng.integers(2**62)), job.device):  # of the first weights, and of dropout
            model = job.new_model()
            self.parameters = sum(parameter.numel() for parameter in model.parameters())
            self.losses.append([])
            model = self._fit(model.to(job.device), rows, rng)
        self.seconds += time.monotonic() - started
        return model

    def _fit(self, model: EncoderWithHead, rows: np.ndarray, rng: np.random.Generator) -> EncoderWithHead:
        """Train on these clips; returns the model with averaged weights, or itself if the recipe averages none."""
        recipe = self.job.recipe
        optimizer = _optimizer(model, recipe, self.job.encoder_lr_share)
        averaged = AveragedModel(model) if recipe.average_from_epoch is not None else None
        balance = balancing_weights(self.job.labels[torch.from_numpy(rows)].numpy()) if recipe.class_balanced else None
        step, in_all = 0, recipe.steps(len(rows))
        for epoch in range(1, recipe.epochs + 1):
            model.train()
            losses = []
            drawn = draw_epoch(rows, recipe, rng, frames=FRAMES, layers=1, weights=balance)
            batches = [Batch.of(step) for step in steps([drawn], recipe.batch_size)]
            needed = [_rows_needed(batch) for batch in batches]
            audio = self.job.audio.ahead([rows for rows, _ in needed])
            for batch, (_, where), (waveforms, good) in zip(batches, needed, audio, strict=True):
                for group in optimizer.param_groups:
                    group["lr"] = recipe.learning_rate(epoch, step, in_all) * group["share"]
                place = torch.from_numpy(np.where(good, np.cumsum(good) - 1, -1)[where])
                loss = self._step(model, optimizer, batch, waveforms, place)
                if loss is not None:
                    losses.append(loss)
                    self.samples += len(batch.clip)
                step += 1
            self._after_epoch(epoch, losses)
            if averaged is not None and recipe.averages(epoch):
                averaged.update_parameters(model)
        return cast("EncoderWithHead", averaged.module) if averaged is not None else model

    def _step(
        self, model: EncoderWithHead, optimizer: torch.optim.Optimizer, batch: Batch, waveforms: Tensor, place: Tensor
    ) -> Tensor | None:
        """One step on a batch; None where none of its clips could be read."""
        recipe, device = self.job.recipe, self.job.device
        mixed, targets, kept = mix_waveforms(batch, waveforms, place, self.job.labels, recipe)
        if not len(mixed):
            return None
        start, end = (mask[kept].to(device) for mask in (batch.mask_start, batch.mask_end))
        mel = hide_frames(model.mel(mixed.to(device)), start, end)
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16"):
            logits = model.from_mel(mel)
        loss = clip_losses(logits.float(), targets.to(device), recipe.loss).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    def _after_epoch(self, epoch: int, losses: list[Tensor]) -> None:
        if not losses:
            raise WhisperATError(f"no clip could be read to train on; {self.job.audio.failure_note()}")
        loss = torch.stack(losses).mean().item()
        if not math.isfinite(loss):
            raise WhisperATError(
                f"the loss became {loss} in epoch {epoch}: lower --lr, which is {self.job.recipe.lr:g}"
            )
        self.losses[-1].append(loss)
        self.epochs_done += 1
        if self.progress:
            self.progress(self.epochs_done, self.epochs, f"loss {loss:.4f}")


@dataclass(frozen=True, eq=False)
class Batch:
    """What was drawn for a step: clips, whom each is mixed with and how much of it stays, frames that are hidden."""

    clip: Tensor  # (B,) int64
    partner: Tensor  # (B,) int64
    share: Tensor  # (B,) float32
    mask_start: Tensor  # (B,)
    mask_end: Tensor  # (B,)

    @classmethod
    def of(cls, step: Step) -> Batch:
        clip, partner, share = (torch.from_numpy(column[0]) for column in (step.clip, step.partner, step.share))
        masks = (torch.from_numpy(mask[0, :, 0]) for mask in (step.mask_start, step.mask_end))
        return cls(clip, partner, share, *masks)


def _rows_needed(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """The clips that a batch needs, each once; and (2 B,) the place among them of each clip, then of its partner.

    A clip that is not mixed is its own partner.
    """
    partner = torch.where(batch.share < 1, batch.partner, batch.clip)
    rows, where = np.unique(torch.cat([batch.clip, partner]).numpy(), return_inverse=True)
    return rows, where


def mix_waveforms(
    batch: Batch, waveforms: Tensor, place: Tensor, labels: Tensor, recipe: Recipe
) -> tuple[Tensor, Tensor, Tensor]:
    """Mixed waveforms (b, samples) and smoothed targets (b, C) of the b clips of a batch that could be read, and which
    these are (B,) bool. A clip whose partner could not be read stays unmixed.

    `place` (2 B,) says where in `waveforms` each clip is, then where its partner is; -1 for what could not be read.
    """
    own, other = place.chunk(2)
    kept = own >= 0
    share = torch.where(other >= 0, batch.share, 1.0)[kept]
    own, other = own[kept], torch.where(other >= 0, other, own)[kept]
    mixed = torch.lerp(waveforms[other], waveforms[own], share[:, None])
    targets = torch.lerp(labels[batch.partner[kept]].float(), labels[batch.clip[kept]].float(), share[:, None])
    return mixed, smoothed(targets, share, recipe), kept


def hide_frames(mel_BMF: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Each clip's mel spectrogram with frames start to end (of 25) as silent as its quietest place."""
    frame = torch.arange(mel_BMF.shape[2], device=mel_BMF.device) * FRAMES // mel_BMF.shape[2]
    hidden = (frame >= start[:, None]) & (frame < end[:, None])
    return torch.where(hidden[:, None, :], mel_BMF.amin(dim=(1, 2), keepdim=True), mel_BMF)


def _optimizer(model: EncoderWithHead, recipe: Recipe, share: float) -> torch.optim.Optimizer:
    """Adam, with the encoder's learning rate a share of the head's; at 0 the encoder takes no part."""
    model.encoder.requires_grad_(share > 0)
    groups = [{"params": list(model.head.parameters()), "share": 1.0}]
    if share:
        groups.append({"params": list(model.encoder.parameters()), "share": share})
    kind = torch.optim.AdamW if recipe.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, lr=recipe.lr, betas=recipe.betas, weight_decay=recipe.weight_decay)


def _validate(model: EncoderWithHead, fold: Fold, job: _Job) -> tuple[dict, Predictions]:
    """A fold's line in the result, the metric over every one of its test clips that can be read; and their scores."""
    logits, read = predict_audio(model, job.audio, fold.test, job.device)
    if not read.any():
        raise WhisperATError(f"no clip of fold {fold.number} could be read to validate on; {job.audio.failure_note()}")
    metrics = evaluate_scores(logits, job.labels[torch.from_numpy(fold.test[read])])
    if job.metric == "mAP" and metrics.classes_without_positives:
        job.warnings.append(f"fold {fold.number}: {metrics.notes[0]}")
    line = {
        "fold": fold.number, "value": getattr(metrics, job.metric), "train_clips": len(fold.train),
        "validation_clips": int(read.sum()),
    }  # fmt: skip
    rows, clips = fold.test[read], ListedClips.of(job.dataset)
    scored = Predictions(
        ids=clips.ids[rows], recordings=source_recordings(clips.ids[rows], clips.paths[rows], clips.dataset),
        labels=clips.labels[rows], class_names=tuple(job.dataset.class_names), folds=np.full(len(rows), fold.number),
        names=(head_name(job.head, job.width),), seeds=np.array([job.recipe.seed]),
        scores=logits.cpu().numpy()[None], source=f"train-head --unfreeze {job.dataset.root} ({job.weights.name})",
    )  # fmt: skip
    return line, scored


def joined(several: list[Predictions]) -> Predictions:
    """Predictions of folds as one: the same head, other clips."""
    columns: dict[str, Any] = {name: np.concatenate([getattr(each, name) for each in several]) for name in CLIP_COLUMNS}
    return dataclasses.replace(several[0], scores=np.concatenate([each.scores for each in several], axis=1), **columns)


def _save(model: EncoderWithHead, folder: Path, job: _Job, rows: np.ndarray, verdict: Verdict, value_of: str) -> None:
    frames = FRAMES if job.pools else round(job.clip_seconds * POSITIONS_PER_SECOND)
    read = [row for row in rows.tolist() if row not in job.audio.failures]
    description = HeadDescription(
        head=job.head, width=job.width, layers=job.weights.dims["n_audio_layer"], dim=job.dim, frames=frames,
        class_names=job.dataset.class_names, backbone=job.weights.name, weights_sha256="", loss=job.recipe.loss,
        clip_seconds=job.clip_seconds, metric=job.metric, value=or_none(verdict.value), ci95=verdict.ci95,
        fold_mean=or_none(verdict.fold_mean), fold_std=or_none(verdict.fold_std), value_of=value_of,
        trained_clips=len(read), seed=job.recipe.seed,
        recipe=dataclasses.asdict(job.recipe) | {"encoder_lr_share": job.encoder_lr_share},
    )  # fmt: skip
    save_end_to_end(model, folder, description, [job.dataset.clips[row].id for row in rows])
