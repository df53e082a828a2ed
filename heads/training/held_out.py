"""What the validated heads of a run say of the clips that they were not trained on, as one set of predictions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from whisper_at_cli.extract.cache.sources import source_recordings
from whisper_at_cli.extract.evaluation.predictions import Predictions
from whisper_at_cli.heads.training.loop import Trained
from whisper_at_cli.heads.training.plan import Job

LACKING = (
    "this run was finished by an earlier version, which kept no scores of held-out clips: no interval is given, and "
    "the value is the mean over folds; train again with --restart to have one"
)


def held_out_predictions(job: Job, done: Sequence[Trained], name: str) -> Predictions | None:
    """Of the trainings that were validated, for each seed and fold in this order, under the name of their head. None
    where the scores of one were not kept."""
    validated = [each for each in done if each.metrics]
    if any(each.scores is None for each in validated):
        return None
    cache, count = job.cache, len(job.folds)
    by_seed = [validated[start : start + count] for start in range(0, len(validated), count)]
    rows = job.rows[np.concatenate([each.training.test for each in by_seed[0]])]
    return Predictions(
        ids=cache.ids[rows],
        recordings=source_recordings(cache.ids[rows], cache.paths[rows], cache.dataset),
        labels=job.labels_of(rows),
        class_names=tuple(cache.spec.class_names),
        folds=np.concatenate([np.full(len(fold.test), fold.number) for fold in job.folds]),
        names=(name,) * len(by_seed),
        seeds=np.array([of_seed[0].training.recipe.seed for of_seed in by_seed]),
        scores=np.stack([np.concatenate([each.scores for each in of_seed if each.scores is not None])
                         for of_seed in by_seed]),
        source=f"train-head {cache.path} ({cache.spec.backbone})",
    )  # fmt: skip
