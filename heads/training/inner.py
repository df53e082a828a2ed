"""Which clips choose a setting for a test fold: never its own.

The split `valid` where a dataset has one beside `test`; else inner folds of the training clips. Where a dataset has
three folds or more these are its other folds: a head that saw neither fold i nor fold j serves twice, since it is
tested on j where i is the test fold, and on i where j is. Else they are drawn at random, recordings kept whole.

Rows are those of the cache, ascending.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from whisper_at_cli.extract.cache.folds import Fold, evaluation_folds
from whisper_at_cli.extract.cache.sources import source_recordings
from whisper_at_cli.extract.errors import UsageError

if TYPE_CHECKING:
    from whisper_at_cli.heads.training.plan import Job

FIRST_NUMBER = 1 << 20  # of inner trainings, which sets their random numbers apart from those of folds


@dataclass(frozen=True, eq=False)
class Division:
    """Clips that train, and what they are tested on: for each of these test folds, by number, some clips."""

    number: int
    train: np.ndarray
    tests: list[tuple[int, np.ndarray]]


def inner_divisions(job: Job) -> list[Division]:
    """What to train and to test to choose settings for every test fold. Raises UsageError where there are too few clips
    to divide."""
    folds = job.folds
    if len(job.valid):
        return [Division(FIRST_NUMBER, folds[0].train, [(folds[0].number, job.valid)])]
    if len(folds) >= 3:
        pairs = [
            (np.intersect1d(one.train, other.train), [(one.number, other.test), (other.number, one.test)])
            for one, other in combinations(folds, 2)
        ]
    else:
        pairs = [
            (inner.train, [(fold.number, inner.test)])
            for fold in folds
            for inner in random_folds(job, fold.train, f"fold {fold.number}")
        ]
    return [Division(FIRST_NUMBER + at, train, tests) for at, (train, tests) in enumerate(pairs)]


def divisions_of(job: Job, number: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(train, test) rows that choose for one test fold; for number 0, the head of all clips, the folds themselves."""
    if number == 0:
        return [(fold.train, fold.test) for fold in job.folds]
    return [(each.train, rows) for each in inner_divisions(job) for fold, rows in each.tests if fold == number]


def watched_rows(job: Job, rows: np.ndarray) -> np.ndarray:
    """The clips that stop a training early which has these: `valid`, else a random fifth of them."""
    return job.valid if len(job.valid) else random_folds(job, rows, "the training side")[0].test


def random_folds(job: Job, rows: np.ndarray, where: str) -> list[Fold]:
    """Random folds of these rows, every class spread evenly and clips of one recording together."""
    if len(rows) < 2:
        raise UsageError(f"choosing a setting divides the training clips, and {where} has {len(rows)}: 2 are needed")
    cache, n = job.cache, len(rows)
    folds, _ = evaluation_folds(
        np.zeros(n, dtype=np.int64), np.full(n, ""), job.labels_of(rows), np.ones(n, dtype=bool), seed=job.recipe.seed,
        sources=lambda: source_recordings(cache.ids[rows], cache.paths[rows], cache.dataset),
    )  # fmt: skip
    return [Fold(fold.number, rows[fold.train], rows[fold.test]) for fold in folds]


def chosen_on(job: Job) -> str:
    """In words, for results: on which clips settings were chosen."""
    if len(job.valid):
        return f"the {len(job.valid)} clips of split {job.cache.split[job.valid[0]]}"
    if len(job.folds) >= 3:
        return f"inner folds: the {len(job.folds) - 1} other folds of each test fold"
    return "random inner folds of the training clips, each recording within one"


def watched_on(job: Job) -> str:
    """In words, for results: on which clips trainings were stopped early."""
    return chosen_on(job) if len(job.valid) else "a random fifth of the training clips, recordings kept whole"
