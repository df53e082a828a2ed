"""A search over learning rates and TL-Tr's dimensions: every combination on the same folds and seeds, ranked."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from whisper_at_cli.extract.cache import FeatureCache
from whisper_at_cli.extract.evaluation.metrics import mean_and_std
from whisper_at_cli.extract.progress import Progress
from whisper_at_cli.heads.training.loop import Trained, Training
from whisper_at_cli.heads.training.plan import Job, plan
from whisper_at_cli.heads.training.ranks import joined_ranks
from whisper_at_cli.heads.training.recipe import Recipe
from whisper_at_cli.heads.training.records import precision_kept
from whisper_at_cli.heads.training.train import check_options, fold_trainings, open_run, seed_line

RATE_FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)  # of the recipe's learning rate
WIDTHS = (128, 256, 512)  # of Table 2, those below the encoder's own


@dataclass(frozen=True)
class SearchResult:
    """What a search found, the best first."""

    head: str
    metric: str
    rows: list[dict]  # rank, lr, dim, width, params, value, std, std_over_seeds, folds (values), seconds
    seconds: float
    device: str
    tier: str
    recipe: dict  # of the first combination; lr differs
    warnings: list[str] = field(default_factory=list)


def search_heads(
    cache: FeatureCache, *, head: str, rates: Sequence[float] | None = None, widths: Sequence[int] | None = None,
    recipe: Recipe | str | None = None, changes: dict | None = None, faithful: bool = False,
    out: str | Path | None = None, device: str = "auto", tier: str = "auto", seed: int | None = None, seeds: int = 1,
    together: str = "auto", restart: bool = False, tensorboard: bool = False, progress: Progress | None = None,
) -> SearchResult:  # fmt: skip
    """Train and validate every combination of learning rates and widths on a cache's folds or split; save no head.

    By default a quarter to four times the recipe's learning rate, and for tl-tr the widths of Table 2 that are smaller
    than the encoder's. With `out`, metrics and the ranked table (search.json) are kept there, and the same call
    continues a search that was stopped. Raises as `train_head` does.
    """
    started = time.monotonic()
    changes = (changes or {}) | ({} if seed is None else {"seed": seed})
    check_options(seeds, together, tensorboard, out)
    if widths is None and head == "tl-tr":
        widths = [width for width in WIDTHS if width < cache.spec.dim]
    with ExitStack() as stack:
        ranks, target = stack.enter_context(joined_ranks(device))
        jobs = [
            plan(
                cache, head=head, width=width, recipe=recipe, changes=changes, faithful=faithful, device=target,
                tier=tier, processes=ranks.here, precision=None if restart or not out else precision_kept(out),
            )
            for width in (widths or (None,))
        ]  # fmt: skip
        grid = [(job, _rates(job, rates)) for job in jobs]
        more = {"seeds": seeds, "search": [[job.dim, rates_of] for job, rates_of in grid]}
        runner = stack.enter_context(
            open_run(jobs[0], ranks, out, more, restart=restart, tensorboard=tensorboard, progress=progress)
        )
        plans = [(job, _trainings(job, rates_of, seeds)) for job, rates_of in grid]
        for _, trainings in plans:
            runner.expect(trainings)
        trained = [(job, runner.train(job, trainings, together)) for job, trainings in plans]
        result = _ranked(trained, seeds, time.monotonic() - started)
        if runner.folder:
            runner.folder.write("search.json", (json.dumps(dataclasses.asdict(result), indent=1) + "\n").encode())
            runner.finish(result, [each for _, done in trained for each in done])
    return result


def _rates(job: Job, rates: Sequence[float] | None) -> list[float]:
    found = [job.recipe.lr * factor for factor in RATE_FACTORS] if rates is None else list(dict.fromkeys(rates))
    return [job.recipe.with_changes(lr=rate).lr for rate in found]


def _trainings(job: Job, rates: list[float], seeds: int) -> list[Training]:
    return [
        dataclasses.replace(training, recipe=dataclasses.replace(training.recipe, lr=rate))
        for rate in rates
        for training in fold_trainings(job, seeds, prefix=f"dim-{job.dim}/lr-{rate:g}/")
    ]


def _ranked(trained: list[tuple[Job, list[Trained]]], seeds: int, seconds: float) -> SearchResult:
    rows = []
    for job, done in trained:
        each = seeds * len(job.folds)
        rows += [_row(job, done[start : start + each]) for start in range(0, len(done), each)]
    rows.sort(key=lambda row: (math.isnan(row["value"]), -row["value"]))
    job = trained[0][0]
    warnings = list(dict.fromkeys(warning for each, _ in trained for warning in each.warnings))
    warnings.append(
        f"the best of {len(rows)} combinations was chosen on the clips that it is scored on: its value is optimistic"
    )
    return SearchResult(
        head=job.head, metric=job.metric, rows=[{"rank": rank, **row} for rank, row in enumerate(rows, 1)],
        seconds=seconds, device=str(job.device), tier=job.tier, recipe=dataclasses.asdict(job.recipe),
        warnings=warnings,
    )  # fmt: skip


def _row(job: Job, done: list[Trained]) -> dict:
    """One combination."""
    count = len(job.folds)
    by_seed = [seed_line(job, done[start : start + count]) for start in range(0, len(done), count)]
    by_fold = zip(*([fold["value"] for fold in of_seed["folds"]] for of_seed in by_seed), strict=True)
    of_folds = [mean_and_std(values)[0] for values in by_fold]
    value, std = mean_and_std(of_folds)
    return {
        "lr": done[0].training.recipe.lr, "dim": job.dim, "width": job.width, "params": job.parameters(),
        "value": value, "std": std, "folds": of_folds,
        "std_over_seeds": mean_and_std([of_seed["value"] for of_seed in by_seed])[1],
        "seconds": sum(each.record["seconds"] for each in done),
    }  # fmt: skip
