"""All that is settled before the first step of a training: recipe, folds, metric, tier, and which heads to train."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass

import numpy as np
import torch

from whisper_at_cli.extract.cache import FeatureCache
from whisper_at_cli.extract.cache.folds import Fold, cache_folds, untrained_classes, valid_split
from whisper_at_cli.extract.cache.sources import source_recordings
from whisper_at_cli.extract.errors import UsageError
from whisper_at_cli.extract.evaluation.permutation import permuted_by_recording
from whisper_at_cli.heads.forms import Head, build_head, head_form, head_name, head_width
from whisper_at_cli.heads.training.data import choose_tier, every_clip_has_one_label, stored_bytes, why_not_accuracy
from whisper_at_cli.heads.training.distill import Teachers
from whisper_at_cli.heads.training.recipe import (
    Recipe,
    default_recipe_name,
    faithful_changes,
    named_recipe,
    whole_batches,
)

SOLVED_SETTINGS = ("loss", "seed", "standardise")  # of a recipe, that count for a head without epochs
PERMUTED = (
    "labels were permuted by recording: whatever a head scores beyond chance here comes from the head, not from the "
    "features"
)
STACKED_NUMBERS = {"cpu": 1 << 20, "cuda": 1 << 28}  # of heads side by side; more fall out of a processor's cache
STACKED_INPUTS = {"cpu": 1 << 24, "cuda": 1 << 30}  # numbers in a step's inputs


@dataclass(frozen=True, eq=False)
class Job:
    """A head, a cache and a recipe that fit each other."""

    cache: FeatureCache
    head: str
    width: int | None
    recipe: Recipe
    folds: list[Fold]
    valid: np.ndarray  # rows of the split `valid` where settings are chosen on it, else none
    rows: np.ndarray  # of all folds and of `valid`, ascending
    labels: np.ndarray  # (n, C) uint8 of these rows
    metric: str
    device: torch.device
    tier: str
    warnings: list[str]
    permuted: bool = False  # whether recordings traded their labels
    block: bool = True  # of wa-pool: whether it has a block over time
    teachers: Teachers | None = None

    @property
    def name(self) -> str:
        """Of the head, in predictions and tables."""
        return head_name(self.head, self.width, self.block)

    @property
    def reads(self) -> str:
        return head_form(self.head).reads

    @property
    def solved(self) -> bool:
        return head_form(self.head).solved

    def positions(self, rows: np.ndarray) -> np.ndarray:
        """Where these rows of the cache are among the job's."""
        return np.searchsorted(self.rows, rows)

    def labels_of(self, rows: np.ndarray) -> np.ndarray:
        return self.labels[self.positions(rows)]

    def recorded(self, recipe: Recipe) -> dict:
        """The settings of a recipe that count for this head."""
        settings = dataclasses.asdict(recipe)
        if self.solved:
            return {name: settings[name] for name in SOLVED_SETTINGS}
        return settings | (self.teachers.recorded() if self.teachers else {})

    @property
    def dim(self) -> int:
        """Channels inside the head."""
        return self.width or self.cache.spec.dim

    @property
    def cross_validated(self) -> bool:
        return len(self.folds) > 1

    def new_module(self) -> Head:
        spec = self.cache.spec
        return build_head(
            self.head, layers=spec.layers, dim=spec.dim, classes=len(spec.class_names), width=self.width,
            block=self.block,
        )  # fmt: skip

    def parameters(self) -> int:
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in self.new_module().parameters())

    def heads_side_by_side(self, together: str) -> int:
        """How many heads to train as one model: MLP heads as many as gain by it, others one. One, too, with dropout,
        whose random numbers no other head may change, and with teachers, which give each head targets of its own."""
        alone = self.reads == "features" or self.tier == "stream" or self.solved or self.recipe.dropout or self.teachers
        if together == "never" or alone:
            return 1
        kind = "cuda" if self.device.type == "cuda" else "cpu"
        layers = self.cache.spec.layers if self.reads == "mean" else 1
        inputs = self.recipe.batch_size * layers * self.cache.spec.dim
        return max(1, min(STACKED_NUMBERS[kind] // self.parameters(), STACKED_INPUTS[kind] // inputs))

    def command(self) -> dict:
        """All that decides the weights, in a form that JSON holds and a person can compare."""
        spec, rows = self.cache.spec, self.rows
        content = [self.cache.ids[rows].tolist(), np.packbits(self.labels).tobytes().hex()]
        folds = [(fold.number, fold.train.tolist(), fold.test.tolist()) for fold in self.folds]
        return {
            "head": self.name, "dim": self.dim, "recipe": self.recorded(self.recipe),
            "folds": f"{len(folds)} ({_digest(folds)})", "clips": f"{len(rows)} ({_digest(content)})",
            "backbone": f"{spec.backbone} ({spec.weights_sha256[:12]})", "classes": len(spec.class_names),
            "clip_seconds": spec.clip_seconds, "dtype": spec.dtype,
            "order": "streamed" if self.tier == "stream" else "drawn",
        }  # fmt: skip


def _digest(content: object) -> str:
    return hashlib.sha256(repr(content).encode()).hexdigest()[:12]


def plan(
    cache: FeatureCache, *, head: str, width: int | None, recipe: Recipe | str | None, changes: dict, faithful: bool,
    device: torch.device, tier: str, processes: int = 1, precision: str | None = None, chooses: bool = False,
    permute_labels: bool = False, block: bool = True, teachers: Teachers | None = None,
) -> Job:  # fmt: skip
    """Settle recipe and folds, and refuse what cannot work; nothing is read but labels. Raises UsageError.

    `precision` is what `auto` stood for where the run began, if it continues one. With `chooses` settings are chosen on
    clips that no fold tests; with `permute_labels` recordings trade their labels at random.
    """
    spec = cache.spec
    with torch.device("meta"):  # refuses an unknown head or a wrong width, at no cost
        build_head(
            head, layers=spec.layers, dim=spec.dim, classes=max(1, len(spec.class_names)), width=width, block=block
        )
    width = head_width(head, width)
    if spec.layer_numbers:
        raise UsageError(
            f"{cache.path} has only layers {', '.join(map(str, spec.layer_numbers))}; a head needs all layers of the "
            "encoder. Train it on the cache that this one was selected from"
        )
    if not (count := int(cache.done.sum())):
        raise UsageError(f"0 of {len(cache)} clips are finished in {cache.path}; run extract again to continue it")
    single_label = every_clip_has_one_label(cache.labels[cache.done])
    recipe = _settled(recipe, changes, faithful, head, width, cache, single_label, count)
    if recipe.precision == "auto":
        recipe = recipe.with_changes(precision=precision or fastest_precision(head, device))
    _check_recipe(recipe, head, single_label, spec.frames)
    if teachers and (chooses or head_form(head).solved):
        why = "--search: teachers know the clips that it would choose on" if chooses else f"{head}, which is solved"
        raise UsageError(f"--teacher does not go with {why}; leave one of them out")
    if head_form(head).solved and changes.keys() - set(SOLVED_SETTINGS):
        given = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(changes.keys() - set(SOLVED_SETTINGS)))
        raise UsageError(f"{head} is solved and has no epochs: {given} does nothing with it, so leave it out")
    folds, warnings = cache_folds(cache, seed=recipe.seed)
    valid = np.arange(0)
    if chooses or recipe.patience or head_form(head).solved:
        valid, warnings = valid_split(cache.split, cache.done, folds, warnings)
    folds, dropped = without_last_batch(folds, recipe)
    warnings += dropped
    rows = np.unique(np.concatenate([valid, *(side for fold in folds for side in (fold.train, fold.test))]))
    labels = cache.labels[rows]
    if permute_labels:
        recordings = source_recordings(cache.ids[rows], cache.paths[rows], cache.dataset)
        labels = labels[permuted_by_recording(recordings, recipe.seed)]
        warnings.append(PERMUTED)
    if not single_label:
        warnings.append(why_not_accuracy(cache.labels[cache.done], cache.ids[cache.done]))
    warnings += training_side_warnings(labels, [_at(rows, fold) for fold in folds], recipe)
    if recipe.epoch_share < 1:
        passes = recipe.epochs * recipe.epoch_share
        warnings.append(
            f"an epoch here draws {recipe.epoch_share:g} of the clips: {recipe.epochs} epochs are {passes:g} passes"
        )
    tier = choose_tier(stored_bytes(cache, len(rows), head_form(head).reads), device, tier, processes=processes)
    metric = "accuracy" if single_label else "mAP"
    return Job(
        cache, head, width, recipe, folds, valid, rows, labels, metric, device, tier, warnings, permute_labels, block,
        teachers,
    )  # fmt: skip


def _settled(
    recipe: Recipe | str | None, changes: dict, faithful: bool, head: str, width: int | None, cache: FeatureCache,
    single_label: bool, clips: int,
) -> Recipe:  # fmt: skip
    """The recipe that was asked for, or the one that suits the data, with its changes."""
    if recipe is None:
        recipe = default_recipe_name(head, single_label=single_label, clips=clips)
    if isinstance(recipe, str):
        recipe = named_recipe(recipe, head, dim=cache.spec.dim, width=width)
    return recipe.with_changes(**((faithful_changes(head) if faithful else {}) | changes))


def without_last_batch(folds: list[Fold], recipe: Recipe) -> tuple[list[Fold], list[str]]:
    """Folds whose test clips fill whole batches where the recipe drops the last one, and how many clips that leaves
    out."""
    if not recipe.drop_last:
        return folds, []
    kept = [
        Fold(fold.number, fold.train, fold.test[: whole_batches(len(fold.test), recipe.batch_size)]) for fold in folds
    ]
    lost = sum(len(fold.test) for fold in folds) - sum(len(fold.test) for fold in kept)
    return kept, [f"{lost} clips are not tested: the last incomplete batch is dropped, as originally"] * bool(lost)


def _at(rows: np.ndarray, fold: Fold) -> Fold:
    """A fold by places among these rows."""
    return Fold(fold.number, np.searchsorted(rows, fold.train), np.searchsorted(rows, fold.test))


def training_side_warnings(labels: np.ndarray, folds: list[Fold], recipe: Recipe) -> list[str]:
    """What the training clips of these folds lack; labels (N, C) are of the clips that folds count."""
    warnings = untrained_classes(labels, folds)
    sides = [fold.train[~labels[fold.train].any(axis=1)] for fold in folds if labels[fold.train].any()]
    unlabelled = len(set().union(*(side.tolist() for side in sides)))
    if recipe.class_balanced and unlabelled:
        warnings.append(f"{unlabelled} training clips have no label and are never drawn: drawing is class-balanced")
    return warnings


def _check_recipe(recipe: Recipe, head: str, single_label: bool, frames: int) -> None:
    """Raises UsageError where a recipe does not suit the head or the data."""
    masked = recipe.time_mask_frames
    if recipe.loss == "ce" and not single_label:
        raise UsageError("loss ce needs exactly one label on every clip; some here have none or several: use loss bce")
    if masked and head_form(head).reads != "features":
        raise UsageError(f"{head} trains from the mean over time, which cannot be masked: set time_mask_frames to 0")
    if masked and masked >= frames:
        raise UsageError(f"time_mask_frames is {masked} and clips have {frames} frames: set it lower")


def fastest_precision(head: str, device: torch.device) -> str:
    """bfloat16 for heads with Transformer blocks on a device with instructions for it: measured about twice as fast on
    a CPU, with the same accuracy. Else float32, as always in validation."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        can = torch.cpu.get_capabilities() if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities") else {}
        native = can.get("avx512_bf16") or can.get("amx_bf16")
    return "bfloat16" if native and head_form(head).reads == "features" else "float32"
