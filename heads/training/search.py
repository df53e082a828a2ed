"""What is trained for each test fold, and nested search: a fold's settings are chosen on clips that it does not test.

A search trains every combination of learning rate and width on the inner folds of a fold's training clips, or on
`train` to judge it on `valid` where a dataset has that; the fold is then tested once, with a head of the combination
that was best there. No test clip takes part in the choice that is made for it, so the value is not optimistic.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from whisper_at_cli.extract.errors import UsageError
from whisper_at_cli.extract.evaluation.metrics import evaluate_scores, mean_and_std
from whisper_at_cli.heads.forms import head_form, head_name
from whisper_at_cli.heads.training.inner import (
    FIRST_NUMBER,
    Division,
    chosen_on,
    divisions_of,
    inner_divisions,
    watched_on,
    watched_rows,
)
from whisper_at_cli.heads.training.loop import Trained, Training
from whisper_at_cli.heads.training.plan import Job
from whisper_at_cli.heads.training.recipe import Recipe
from whisper_at_cli.heads.training.runner import Runner

RATES = (2e-4, 5e-4, 1e-3, 3e-3, 1e-2)  # beside the recipe's own learning rate
WIDTHS = (128, 256, 512)  # of Table 2, those below the encoder's own


@dataclass(frozen=True, eq=False)
class Choice:
    """What is trained for each test fold, by its number; 0 is the head that is kept where that sees all clips."""

    of_fold: dict[int, tuple[Job, Recipe]]
    selected_on: dict[str, str]  # what was chosen -> on which clips
    search: dict | None = None

    @classmethod
    def of(cls, job: Job, searched: dict[str, str] | None = None) -> Choice:
        """The same for every fold."""
        numbers = [0, *(fold.number for fold in job.folds)]
        selected_on = dict(searched or {})
        if job.solved:
            selected_on["strength"] = chosen_on(job)
        elif job.recipe.patience:
            selected_on["epoch"] = watched_on(job)
        return cls(dict.fromkeys(numbers, (job, job.recipe)), selected_on)

    @property
    def name(self) -> str:
        """Of the head, in predictions."""
        job, _ = self.of_fold[0]
        widths = {of_fold.width for of_fold, _ in self.of_fold.values()}
        return job.name if len(widths) == 1 else head_name(job.head, None, job.block)


def fold_trainings(choice: Choice, seeds: int) -> list[tuple[Job, Training]]:
    """A training for each seed and fold."""
    found = []
    first, _ = choice.of_fold[0]
    for seed in range(first.recipe.seed, first.recipe.seed + seeds):
        for fold in first.folds:
            job, recipe = choice.of_fold[fold.number]
            name = f"fold-{fold.number}" if seeds == 1 else f"seed-{seed}/fold-{fold.number}"
            recipe = dataclasses.replace(recipe, seed=seed)
            found.append((job, training_of(job, recipe, name, fold.number, fold.train, fold.test)))
    return found


def training_of(job: Job, recipe: Recipe, name: str, number: int, train: np.ndarray, test: np.ndarray) -> Training:
    """A training on these rows; with patience it watches some of them, or the split `valid`, and does not train on
    those."""
    watched = watched_rows(job, train) if recipe.patience else np.arange(0)
    inner = divisions_of(job, number) if job.solved else []
    return Training(
        name, number, recipe, job.positions(np.setdiff1d(train, watched)), job.positions(test),
        job.positions(watched), tuple((job.positions(one), job.positions(other)) for one, other in inner),
    )  # fmt: skip


@dataclass(frozen=True)
class Grid:
    """Learning rates and widths to choose from; None: RATES and the recipe's own, and for tl-tr those of Table 2."""

    rates: Sequence[float] | None = None
    widths: Sequence[int] | None = None

    def widths_for(self, head: str, dim: int) -> Sequence[int | None]:
        """Raises UsageError for a head that has nothing to choose."""
        if head_form(head).solved:
            raise UsageError(f"{head} always chooses its strength on inner folds: leave out --search")
        table = [width for width in WIDTHS if width < dim] if head == "tl-tr" else []
        return list(dict.fromkeys(self.widths)) if self.widths else table or [None]

    def combinations(self, jobs: list[Job]) -> list[tuple[Job, float]]:
        """Of each job's width with every learning rate, as its recipe has them."""
        return [
            (job, job.recipe.with_changes(lr=rate).lr)
            for job in jobs
            for rate in dict.fromkeys(self.rates or sorted({*RATES, job.recipe.lr}))
        ]


@dataclass(frozen=True, eq=False)
class _Tried:
    """A combination and what it scored on inner clips, for each test fold."""

    job: Job
    rate: float
    of_fold: dict[int, float]
    seconds: float

    @property
    def mean(self) -> float:
        return mean_and_std(list(self.of_fold.values()))[0]

    def rank(self, value: float) -> tuple:
        """To sort by, the best first; of equal ones that which is nearest the recipe's rate, then the narrowest."""
        return (math.isnan(value), -value, round(abs(math.log(self.rate / self.job.recipe.lr)), 9), self.job.dim)


def choose(combinations: list[tuple[Job, float]], runner: Runner, together: str) -> Choice:
    """The best combination for each test fold by the metric on its inner clips, as a mean over inner folds; for the
    head that is kept, that which is best on average over folds. The first seed chooses for all."""
    base, divisions = combinations[0][0], inner_divisions(combinations[0][0])
    trainings = [_inner_training(job, rate, each) for job, rate in combinations for each in divisions]
    runner.expect([training for _, training in trainings])
    done = runner.train(trainings, together, keep_scores=True)
    count = len(divisions)
    tried = [
        _tried(job, rate, divisions, done[at * count : (at + 1) * count]) for at, (job, rate) in enumerate(combinations)
    ]
    best = {fold.number: _best(tried, fold.number) for fold in base.folds}
    best[0] = min(tried, key=lambda each: each.rank(each.mean))
    several = len({job.dim for job, _ in combinations}) > 1
    searched = dict.fromkeys(("lr", "dim") if several else ("lr",), chosen_on(base))
    return dataclasses.replace(
        Choice.of(base, searched),
        of_fold={number: (each.job, each.job.recipe.with_changes(lr=each.rate)) for number, each in best.items()},
        search={"rows": _rows(tried, best), "chosen_on": chosen_on(base), "metric": base.metric},
    )


def _inner_training(job: Job, rate: float, division: Division) -> tuple[Job, Training]:
    recipe = dataclasses.replace(
        job.recipe, lr=rate, validate_every=job.recipe.validate_every if job.recipe.patience else 0
    )
    name = f"search/dim-{job.dim}/lr-{rate:g}/inner-{division.number - FIRST_NUMBER + 1}"
    test = np.concatenate([rows for _, rows in division.tests])
    return job, training_of(job, recipe, name, division.number, division.train, test)


def _tried(job: Job, rate: float, divisions: list[Division], done: list[Trained]) -> _Tried:
    values: dict[int, list[float]] = {fold.number: [] for fold in job.folds}
    for division, each in zip(divisions, done, strict=True):
        assert each.scores is not None, "scores of inner trainings are kept"
        first = 0
        for number, rows in division.tests:
            scores = each.scores[first : first + len(rows)]
            values[number].append(getattr(evaluate_scores(scores, job.labels_of(rows)), job.metric))
            first += len(rows)
    means = {number: mean_and_std(found)[0] for number, found in values.items()}
    return _Tried(job, rate, means, sum(each.record["seconds"] for each in done))


def _best(tried: list[_Tried], number: int) -> _Tried:
    return min(tried, key=lambda each: each.rank(each.of_fold[number]))


def _rows(tried: list[_Tried], best: dict[int, _Tried]) -> list[dict]:
    """A line for each combination, the best on average first; values are of inner clips."""
    ordered = sorted(tried, key=lambda each: each.rank(each.mean))
    return [
        {
            "rank": rank, "lr": each.rate, "dim": each.job.dim, "width": each.job.width,
            "params": each.job.parameters(), "value": each.mean, "std": mean_and_std(list(each.of_fold.values()))[1],
            "folds": list(each.of_fold.values()), "seconds": each.seconds,
            "chosen_for": [number for number, chosen in best.items() if number and chosen is each],
            "kept": best[0] is each,
        }
        for rank, each in enumerate(ordered, 1)
    ]  # fmt: skip
