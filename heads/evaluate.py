"""Logits of a head on clips of a cache, and the metrics of a saved head on the clips that it has not seen.

n clips, L layers, T frames, D channels, C classes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from whisper_at_cli.extract.ahead import in_order
from whisper_at_cli.extract.cache import FeatureCache
from whisper_at_cli.extract.cache.folds import ClipColumns
from whisper_at_cli.extract.cache.reader import Rows
from whisper_at_cli.extract.cache.schema import brief
from whisper_at_cli.extract.cache.sources import source_recordings
from whisper_at_cli.extract.devices import choose_device
from whisper_at_cli.extract.errors import UsageError
from whisper_at_cli.extract.evaluation.metrics import Metrics, evaluate_scores
from whisper_at_cli.extract.evaluation.predictions import Predictions, checked_path
from whisper_at_cli.extract.evaluation.summary import value_and_interval
from whisper_at_cli.extract.progress import Progress
from whisper_at_cli.heads.checkpoint import UNKNOWN, HeadDescription, load_head
from whisper_at_cli.heads.forms import Head, TLTr
from whisper_at_cli.heads.layers import attention_sums, layer_weights, mean_attention
from whisper_at_cli.heads.seen import choose_rows
from whisper_at_cli.heads.training.data import Clips

BATCH_BYTES = 64 << 20  # of float32 features
READ_BYTES = 256 << 20  # of features read at once; as much again is read ahead
NEEDS_AUDIO = "the encoder of {} was trained with it, so no cache of frozen features fits: give the dataset instead"
NAMED = 8  # of the classes that a message lists


@dataclass(frozen=True)
class Evaluation:
    """Metrics of a saved head, on which clips, and what to know of them. Means leave out classes that are undefined."""

    checkpoint: str | None
    head: str
    dim: int  # channels inside the head
    data: str  # the cache, or the dataset
    clips: int
    chosen: str  # which clips these are
    clips_trained_on: int | None  # of these clips; None where that cannot be told
    mAP: float
    mAUC: float
    d_prime: float
    accuracy: float
    class_ap: dict[str, float]
    class_auc: dict[str, float]
    class_clips: dict[str, int]
    classes_without_positives: int
    classes_without_negatives: int
    confusion: dict | None  # classes; matrix: a row for each label, a column for each prediction
    seconds: float
    clips_per_second: float
    device: str
    notes: list[str] = field(default_factory=list)
    mAP_ci95: list[float] | None = None
    accuracy_ci95: list[float] | None = None
    intervals: dict = field(default_factory=dict)  # level, method, recordings, clips, draws
    predictions_file: str | None = None
    layer_weights: list[float] | None = None  # of heads that average layers: what each counts, 1 in all
    class_attention: dict[str, list[float]] | None = None  # of tl-tr: attention to each layer, over each class's clips


@torch.no_grad()
def predict(module: nn.Module, clips: Clips, positions: np.ndarray) -> np.ndarray:
    """Logits (n, C) float32 of every one of these clips, in this order."""
    module.eval()
    clip_bytes = 4 * clips.features[0].numel()
    batches = torch.from_numpy(positions).split(max(1, BATCH_BYTES // clip_bytes))
    return torch.cat([module(clips.batch(batch)).cpu() for batch in batches]).numpy()


def evaluate_head(
    checkpoint: str | Path | Head, cache: FeatureCache, *, rows: Rows | None = None, fold: int | None = None,
    split: str | None = None, device: str = "auto", predictions: str | Path | None = None,
    progress: Progress | None = None,
) -> Evaluation:  # fmt: skip
    """Metrics of a saved head on clips of a cache: these rows, or those of a fold or a split; by default those that the
    head was not trained on, where it was trained on a part of this cache, else all finished ones.

    The cache is read once, in pieces, so it may be larger than memory. The scores are written into `predictions`, an
    .npz file.
    Raises UsageError where the cache's features or classes are not those that the head was trained on.
    """
    started = time.monotonic()
    predictions = checked_path(predictions) if predictions else None
    target = choose_device(device)
    if isinstance(checkpoint, nn.Module):
        folder, module = None, checkpoint
    else:
        folder = Path(checkpoint)
        module = load_head(folder)
    description = module.description
    if description.encoder is not None:
        raise UsageError(NEEDS_AUDIO.format(folder or "this head"))
    columns, notes = check_fits(description, cache)
    choice = choose_rows(cache, description, folder, rows=rows, fold=fold, split=split)
    attention: list[Tensor] = []

    def keep_attention(features: Tensor) -> None:
        if isinstance(module, TLTr):
            attention.append(module.layer_attention(features).cpu())

    logits = stream_logits(module.to(target), cache, choice.rows, target, progress, also=keep_attention)
    labels = torch.from_numpy(cache.labels[choice.rows][:, columns]).to(logits.device)
    metrics = evaluate_scores(logits, labels)
    seconds = time.monotonic() - started
    scored = scored_clips(cache, choice.rows, labels, logits, description, source=f"evaluate {folder} {cache.path}")
    if predictions:
        scored.save(predictions)
    return as_evaluation(
        metrics, scored, description, labels.sum(dim=0).tolist(), checkpoint=None if folder is None else str(folder),
        data=str(cache.path), clips=len(choice.rows), chosen=choice.text, clips_trained_on=choice.trained_on,
        seconds=seconds, clips_per_second=len(choice.rows) / seconds, device=str(target), notes=notes + choice.notes,
        predictions_file=None if predictions is None else str(predictions), layer_weights=layer_weights(module),
        class_attention=class_attention(attention, labels.cpu().numpy(), description.class_names),
    )  # fmt: skip


def scored_clips(
    clips: ClipColumns, rows: np.ndarray, labels: Tensor, logits: Tensor, description: HeadDescription, *, source: str
) -> Predictions:
    """Scores of one head on these rows; labels and logits (n, C) in the order of the head's classes."""
    return Predictions(
        ids=clips.ids[rows], recordings=source_recordings(clips.ids[rows], clips.paths[rows], clips.dataset),
        labels=labels.cpu().numpy().astype(np.uint8), class_names=tuple(description.class_names),
        folds=np.ones(len(rows), dtype=np.int64),
        names=(description.name,),
        seeds=np.array([description.seed]), scores=logits.cpu().numpy()[None], source=source,
    )  # fmt: skip


def as_evaluation(
    metrics: Metrics, scored: Predictions, description: HeadDescription, class_clips: list[int], *, notes: list[str],
    **run: Any,
) -> Evaluation:  # fmt: skip
    """Metrics under the names of the classes, with their intervals and what is known of the run."""
    intervals: dict[str, Any] = {}
    if not math.isnan(metrics.mAP):
        _, intervals["mAP_ci95"], intervals["intervals"] = value_and_interval(scored, "mAP")
    if scored.single_label:
        _, intervals["accuracy_ci95"], intervals["intervals"] = value_and_interval(scored, "accuracy")
    names = description.class_names
    matrix = metrics.confusion
    return Evaluation(
        head=description.head, dim=description.width or description.dim, mAP=metrics.mAP, mAUC=metrics.mAUC,
        d_prime=metrics.d_prime, accuracy=metrics.accuracy,
        class_ap=dict(zip(names, metrics.class_ap.tolist(), strict=True)),
        class_auc=dict(zip(names, metrics.class_auc.tolist(), strict=True)),
        class_clips=dict(zip(names, class_clips, strict=True)),
        classes_without_positives=metrics.classes_without_positives,
        classes_without_negatives=metrics.classes_without_negatives,
        confusion=None if matrix is None else {"classes": list(names), "matrix": matrix.tolist()},
        notes=[*notes, *metrics.notes], **intervals, **run,
    )  # fmt: skip


@torch.no_grad()
def stream_logits(
    module: Head, cache: FeatureCache, rows: np.ndarray, device: torch.device, progress: Progress | None = None,
    also: Callable[[Tensor], None] | None = None,
) -> Tensor:  # fmt: skip
    """Logits (n, C) float32 of these rows, in this order, on `device`. Reads ahead by one piece of READ_BYTES. `also`
    is given each batch of features."""
    module.eval()
    found, done = [], 0
    for features in _pieces(cache, rows, module.reads):
        size = max(1, BATCH_BYTES // (4 * features[0].numel()))
        for part in features.split(size):
            batch = part.to(device, dtype=torch.float32)
            found.append(module(batch).float())
            if also:
                also(batch)
        done += len(features)
        if progress:
            progress(done, len(rows))
    return torch.cat(found)


def _pieces(cache: FeatureCache, rows: np.ndarray, reads: str) -> Iterator[Tensor]:
    """What a head reads of these rows (L and T may be 1, as in `heads.training.data`), piece by piece."""
    spec = cache.spec
    layers, frames = {"last mean": (1, 1), "mean": (spec.layers, 1), "features": (spec.layers, spec.frames)}[reads]
    size = max(1, READ_BYTES // (4 * layers * frames * spec.dim))

    def read(some: np.ndarray) -> Tensor:
        if reads == "features":
            return torch.from_numpy(cache.features(some))
        if reads == "mean":
            return torch.from_numpy(cache.mean(rows=some)[:, :, None, :])
        return torch.from_numpy(cache.mean(layer=spec.layers, rows=some)[:, None, None, :])

    parts = (rows[first : first + size] for first in range(0, len(rows), size))
    with ThreadPoolExecutor(1, thread_name_prefix="read ahead") as reader:
        yield from in_order(reader, read, parts, ahead=1)


def class_attention(
    attention: list[Tensor], labels: np.ndarray, class_names: tuple[str, ...]
) -> dict[str, list[float]] | None:
    """Mean attention to each layer over the clips of each class, of batches (b, L) in order; None without any."""
    return mean_attention([attention_sums(torch.cat(attention), labels)], class_names) if attention else None


def check_fits(description: HeadDescription, cache: FeatureCache) -> tuple[np.ndarray, list[str]]:
    """For each class of a head, its column in the cache's labels; and notes.

    Raises UsageError where the head was not made for the features and classes of the cache.
    """
    spec = cache.spec
    notes = []
    for name in ("backbone", "weights_sha256", "layers", "dim", "frames", "clip_seconds"):
        needed, found = getattr(description, name), getattr(spec, name)
        if name == "weights_sha256" and UNKNOWN in (needed, found):
            notes.append(
                f"which weights of {spec.backbone} made the features that the head was trained on, or those of "
                f"{cache.path}, was not recorded: only the backbone's name was compared"
            )
        elif needed != found:
            raise UsageError(
                f"the head was trained on features with {name} {brief(needed)} and {cache.path} has {brief(found)}: "
                "use a cache made like the one it was trained on"
            )
    columns, class_notes = class_columns(description, spec.class_names, str(cache.path))
    return columns, notes + class_notes


def class_columns(description: HeadDescription, names: tuple[str, ...], where: str) -> tuple[np.ndarray, list[str]]:
    """For each class of a head, its place among these names of the data at `where`; and notes.

    Classes in another order are matched by name. Raises UsageError where one has a class that the other lacks.
    """
    needed = description.class_names
    if needed == names:
        return np.arange(len(names)), []
    if not description.class_names_known and len(needed) == len(names):
        note = f"the head does not know its classes' names: they were taken to be those of {where}, in its order"
        return np.arange(len(names)), [note]
    lacking = [name for name in needed if name not in names]
    unknown = [name for name in names if name not in needed]
    if lacking or unknown or len(set(needed)) < len(needed) or len(needed) != len(names):
        differences = [f"{where} lacks {_listed(lacking)} of the head's"] * bool(lacking)
        differences += [f"the head does not know {_listed(unknown)} of {where}"] * bool(unknown)
        raise UsageError(
            f"the head tells {len(needed)} classes apart and {where} has {len(names)}: "
            f"{'; '.join(differences) or 'a name stands there twice'}. Use data with the classes that it was trained on"
        )
    place = {name: column for column, name in enumerate(names)}
    note = f"the classes of {where} stand in another order than the head's and were matched by name"
    return np.array([place[name] for name in needed]), [note]


def _listed(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:NAMED]))
    return f"{len(names)} classes ({shown}{', ...' if len(names) > NAMED else ''})"
