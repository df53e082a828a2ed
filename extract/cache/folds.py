"""Which clips train and which are tested: official folds, else a split, else random stratified folds.

A function of columns of a cache alone, so that probes and heads divide the same cache in the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from whisper_at_cli.extract.cache.sources import source_recordings
from whisper_at_cli.extract.errors import UsageError

RANDOM_FOLDS = 5
TRAIN_NAMES = ("train", "training")
VALID_NAMES = ("valid", "validation", "val", "dev")
TEST_NAMES = ("test", "testing", "eval", "evaluation", *VALID_NAMES)  # best first


@dataclass(frozen=True, eq=False)
class Fold:
    """One division of the cache: `train` and `test` are ascending row numbers that share no row."""

    number: int  # 1-based; the dataset's own number where it has folds
    train: np.ndarray
    test: np.ndarray

    def __post_init__(self) -> None:
        assert len(self.train) and len(self.test), f"fold {self.number} has an empty side"


class ClipColumns(Protocol):
    """What divides clips: the columns of a cache, or of a list of clips that has none."""

    def __len__(self) -> int: ...
    @property
    def path(self) -> object: ...
    @property
    def dataset(self) -> str: ...
    @property
    def fold(self) -> np.ndarray: ...
    @property
    def split(self) -> np.ndarray: ...
    @property
    def labels(self) -> np.ndarray: ...
    @property
    def done(self) -> np.ndarray: ...
    @property
    def ids(self) -> np.ndarray: ...
    @property
    def paths(self) -> np.ndarray: ...


def cache_folds(cache: ClipColumns, *, seed: int) -> tuple[list[Fold], list[str]]:
    """`evaluation_folds` of the finished clips, with their recordings told from their names."""
    return evaluation_folds(
        cache.fold, cache.split, cache.labels, cache.done, seed=seed,
        sources=lambda: source_recordings(cache.ids, cache.paths, cache.dataset),
    )  # fmt: skip


def evaluation_folds(
    fold: np.ndarray, split: np.ndarray, labels: np.ndarray, done: np.ndarray, seed: int = 0,
    sources: Callable[[], np.ndarray] | None = None,
) -> tuple[list[Fold], list[str]]:  # fmt: skip
    """Divisions of the finished clips, and warnings for the user.

    fold (N,) int, 0 = none; split (N,) str, "" = none; labels (N, C) 0/1 or (N,) class numbers; done (N,) bool.
    Two official folds or more: each is tested once on a model of the others. Else a split that has `train` and one to
    test on. Else five random folds with every class spread evenly, which is the only case that uses `seed`, labels and
    `sources`, which gives the recording each clip was cut from, (N,): clips of one recording share a fold then.
    Raises UsageError when fewer than two clips are finished.
    """
    fold, done, labels = np.asarray(fold), np.asarray(done, dtype=bool), np.asarray(labels)
    if done.sum() < 2:
        raise UsageError(f"{done.sum()} of {len(done)} clips are finished; training and testing needs at least 2")

    numbers = np.unique(fold[done & (fold > 0)])
    if len(numbers) > 1:
        warnings = _left_out(done & (fold <= 0), "no fold")
        return _by_number(np.where(done, fold, 0), numbers), warnings

    names = np.char.lower(np.asarray(split, dtype=str))
    train = done & np.isin(names, TRAIN_NAMES)
    test_name = next((name for name in TEST_NAMES if (done & (names == name)).any()), None)
    if train.any() and test_name is not None:
        test = done & (names == test_name)
        warnings = _left_out(done & ~train & ~test, f"a split other than train and {test_name}")
        return [Fold(1, np.flatnonzero(train), np.flatnonzero(test))], warnings

    assigned, grouping = _random_folds(labels, np.flatnonzero(done), seed, sources)
    numbers = np.unique(assigned[assigned > 0])
    warning = f"the dataset has no official folds or split: used {len(numbers)} random stratified folds (seed {seed})"
    return _by_number(assigned, numbers), [warning + grouping]


def valid_split(
    split: np.ndarray, done: np.ndarray, folds: list[Fold], warnings: list[str]
) -> tuple[np.ndarray, list[str]]:
    """Rows of the `valid` split of a dataset that also has `train` and `test`, which `folds` leave out, by which
    settings can be chosen; none of another dataset. And the warnings of `folds` without what they say of these rows.

    split (N,) text, done (N,) bool.
    """
    names = np.char.lower(np.asarray(split, dtype=str))
    if len(folds) > 1 or not np.isin(names[folds[0].train], TRAIN_NAMES).all():
        return np.empty(0, dtype=np.int64), warnings
    free = np.setdiff1d(np.flatnonzero(done), np.concatenate([folds[0].train, folds[0].test]))
    valid = free[np.isin(names[free], VALID_NAMES)]
    if not len(valid):
        return valid, warnings
    others = len(free) - len(valid)
    said = f"{others} finished clips have a split other than train, valid and test and were left out"
    return valid, [said] if others else []


def untrained_classes(labels: np.ndarray, folds: list[Fold]) -> list[str]:
    """A warning where a class that some clip of these folds has is on no training clip of a fold; labels (N, C)."""
    trained = np.stack([labels[fold.train].any(axis=0) for fold in folds])
    tested = np.stack([labels[fold.test].any(axis=0) for fold in folds])
    untrained = int((~trained & (trained | tested).any(axis=0)).any(axis=0).sum())
    if not untrained:
        return []
    classes = "1 class has" if untrained == 1 else f"{untrained} classes have"
    return [f"{classes} no training clip in some fold and cannot be recognised there"]


def _by_number(fold: np.ndarray, numbers: np.ndarray) -> list[Fold]:
    """Each fold tested on a model of all the others; rows with fold 0 or less take no part."""
    return [
        Fold(int(number), np.flatnonzero((fold > 0) & (fold != number)), np.flatnonzero(fold == number))
        for number in numbers
    ]


def _left_out(rows: np.ndarray, reason: str) -> list[str]:
    return [f"{rows.sum()} finished clips have {reason} and were left out"] if rows.any() else []


def _random_folds(
    labels: np.ndarray, rows: np.ndarray, seed: int, sources: Callable[[], np.ndarray] | None
) -> tuple[np.ndarray, str]:
    """(N,) fold numbers from 1, 0 outside `rows`, and what is to be said of clips that share a recording.

    Dealt out class by class: folds and classes both balance.
    """
    shuffled = np.random.default_rng(seed).permutation(rows)
    stratum = labels[shuffled] if labels.ndim == 1 else _rarest_class(labels[shuffled])
    order = np.argsort(stratum, kind="stable")
    dealt, stratum = shuffled[order], stratum[order]
    assigned = np.zeros(len(labels), dtype=np.int64)
    grouping = ""
    if sources is not None:
        _, source, clips = np.unique(sources()[dealt], return_inverse=True, return_counts=True)
        shared = int(clips[clips > 1].sum())
        if shared:
            recordings = f"{shared} clips share {int((clips > 1).sum())} recordings with others"
            if len(clips) > 1:
                assigned[dealt] = _grouped_folds(source, stratum)
                return assigned, f"; {recordings} by their names, so each recording is kept within one fold"
            grouping = f"; {recordings} by their names and cannot be kept apart, so scores are too high"
    assigned[dealt] = np.arange(len(dealt)) % RANDOM_FOLDS + 1
    return assigned, grouping


def _grouped_folds(source: np.ndarray, stratum: np.ndarray) -> np.ndarray:
    """(n,) fold numbers from 1 of clips with recordings (n,) and classes (n,): a recording lies in one fold.

    Recordings with the most clips first, each to the fold that has the fewest clips of its classes, then the fewest.
    """
    _, classes = np.unique(stratum, return_inverse=True)
    count = np.zeros((RANDOM_FOLDS, classes.max() + 1), dtype=np.int64)
    assigned = np.zeros(len(source), dtype=np.int64)
    by_source = np.argsort(source, kind="stable")
    groups = np.split(by_source, np.flatnonzero(np.diff(source[by_source])) + 1)
    for group in sorted(groups, key=lambda clips: (-len(clips), clips[0])):
        has, clips = np.unique(classes[group], return_counts=True)
        crowd = count[:, has] @ clips
        fold = np.lexsort((count.sum(axis=1), crowd))[0]
        assigned[group] = fold + 1
        count[fold, has] += clips
    return assigned


def _rarest_class(labels: np.ndarray) -> np.ndarray:
    """A clip with several labels counts under its rarest one, which is the one hardest to spread; -1 with no label."""
    count = labels.sum(axis=0, dtype=np.int64)
    rarest = np.where(labels > 0, count, len(labels) + 1).argmin(axis=1) if labels.shape[1] else np.zeros(len(labels))
    return np.where((labels > 0).any(axis=1), rarest, -1)
