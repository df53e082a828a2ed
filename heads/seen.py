"""Which clips of a cache a head was trained on, so that an evaluation can leave them out, or say that it did not.

A head's folder lists the clips by the hashes of their ids. Where it does not, the head's folder, seed and number of
training clips are compared with how training divides this cache.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from whisper_at_cli.extract.cache import FeatureCache
from whisper_at_cli.extract.cache.folds import cache_folds
from whisper_at_cli.extract.errors import UsageError
from whisper_at_cli.heads.checkpoint import HeadDescription, id_hashes, trained_id_hashes

FOLD_FOLDER = re.compile(r"fold-(\d+)")


@dataclass(frozen=True, eq=False)
class Choice:
    """The clips of an evaluation."""

    rows: np.ndarray  # (n,) of the cache
    text: str  # what they are
    seen: np.ndarray | None  # (n,) bool: whether the head was trained on each; None where that cannot be told

    @property
    def trained_on(self) -> int | None:
        """How many of them the head was trained on."""
        return None if self.seen is None else int(self.seen.sum())

    @property
    def notes(self) -> list[str]:
        if self.seen is None:
            return ["which clips the head was trained on was not recorded: some of these may be among them"]
        if not self.trained_on:
            return []
        return [
            f"the head was trained on {self.trained_on} of these {len(self.rows)} clips: see this as training error"
        ]

    def only(self, marked: np.ndarray) -> Choice:
        """Those of the clips that are marked, (n,) bool."""
        return Choice(self.rows[marked], self.text, None if self.seen is None else self.seen[marked])


def choose_rows(
    cache: FeatureCache, description: HeadDescription, folder: Path | None, *, rows=None, fold: int | None = None,
    split: str | None = None,
) -> Choice:  # fmt: skip
    """The clips to evaluate a head on, and how many of them it was trained on.

    Asked for nothing, those that it was not trained on, if it was trained on some of the cache; else all finished ones.
    Raises UsageError where no clip is left, or rows are given together with a fold or a split.
    """
    if rows is not None and (fold is not None or split is not None):
        raise UsageError("give either rows, or a fold or a split: they were given together")
    seen = seen_rows(cache, description, folder)
    if rows is not None:
        chosen, text = np.asarray(rows, dtype=np.int64), "rows as given"
    elif fold is not None or split is not None:
        chosen, text = _of_fold_and_split(cache, fold, split)
    else:
        chosen, text = np.flatnonzero(cache.done), "all finished clips"
        if seen is not None and seen[chosen].any() and not seen[chosen].all():
            chosen, text = chosen[~seen[chosen]], "clips that the head was not trained on"
    if not len(chosen):
        raise UsageError(f"{cache.path} has no finished clips to evaluate on; run extract again to continue it")
    return Choice(chosen, text, None if seen is None else seen[chosen])


def seen_rows(cache: FeatureCache, description: HeadDescription, folder: Path | None) -> np.ndarray | None:
    """(N,) bool: whether the head was trained on a clip; None where that cannot be told."""
    hashes = None if folder is None else trained_id_hashes(folder)
    if hashes is not None:
        return np.isin(id_hashes(cache.ids), hashes)
    return _by_division(cache, description, folder)


def _by_division(cache: FeatureCache, description: HeadDescription, folder: Path | None) -> np.ndarray | None:
    """As training divides this cache, if the head's number of training clips is that of the part it would have had."""
    if description.trained_clips == 0 or cache.done.sum() < 2:
        return None
    folds, _ = cache_folds(cache, seed=description.seed)
    named = FOLD_FOLDER.fullmatch(folder.resolve().name) if folder else None
    if named or len(folds) == 1:
        number = int(named[1]) if named else folds[0].number
        trained = next((fold.train for fold in folds if fold.number == number), None)
    else:
        trained = np.unique(np.concatenate([fold.test for fold in folds]))
    if trained is None or len(trained) != description.trained_clips:
        return None
    seen = np.zeros(len(cache), dtype=bool)
    seen[trained] = True
    return seen


def _of_fold_and_split(cache: FeatureCache, fold: int | None, split: str | None) -> tuple[np.ndarray, str]:
    chosen, texts = cache.done.copy(), []
    if fold is not None:
        chosen &= cache.fold == fold
        texts.append(f"fold {fold}")
    if split is not None:
        chosen &= cache.split == split
        texts.append(f"split {split}")
    if not chosen.any():
        folds = ", ".join(map(str, np.unique(cache.fold[cache.done & (cache.fold > 0)]).tolist())) or "none"
        splits = ", ".join(sorted(set(cache.split[cache.done].tolist()) - {""})) or "none"
        raise UsageError(
            f"{cache.path} has no finished clip of {' and '.join(texts)}; its folds are {folds}, its splits {splits}"
        )
    return np.flatnonzero(chosen), " and ".join(texts)
