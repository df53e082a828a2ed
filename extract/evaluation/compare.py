"""Comparing systems on the clips that all of them scored: values, paired differences with intervals, and exact tests.

M systems, N clips.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

import numpy as np

from whisper_at_cli.extract.errors import UsageError
from whisper_at_cli.extract.evaluation.bootstrap import Bootstrap, bootstrap_together
from whisper_at_cli.extract.evaluation.intervals import ExactTest, difference, exact_test, intervals, pair_p
from whisper_at_cli.extract.evaluation.predictions import Predictions, load_predictions
from whisper_at_cli.extract.evaluation.summary import bounds, number

METHOD = (
    "BCa bootstrap over recordings, shared by all; adjusted p by max-t over all pairs; exact p by swapping predictions "
    "in whole recordings (McNemar's test where each recording has one clip)"
)


@dataclass(frozen=True)
class Comparison:
    """Systems side by side. Differences are the first's value minus the second's."""

    metric: str  # accuracy or mAP
    systems: list[dict]  # name, value, ci95, band95, seeds, differs_from_best, p_best (adjusted for all pairs)
    pairs: list[dict]  # a, b, difference, ci95, p, test, p_bootstrap, p_adjusted, only_a, only_b
    clips: int
    recordings: int
    draws: int
    seed: int
    method: str = METHOD
    warnings: list[str] = field(default_factory=list)


def compare(
    several: Sequence[tuple[str, Predictions]], *, metric: str | None = None, draws: int | None = None, seed: int = 0,
    chance: bool = False,
) -> Comparison:  # fmt: skip
    """Compare every system of several predictions, each under a name that is put before its own ("" for none).

    Only clips that all have, by id, are compared. With `chance` a model that does not look at the clips is one more.
    Raises UsageError where classes or labels differ, or fewer than two
    systems are given.
    """
    matched, warnings = _matched([predictions for _, predictions in several])
    if chance:
        several, matched = [*several, ("", matched[0].of_chance())], [*matched, matched[0].of_chance()]
    found = bootstrap_together(matched, metric=metric, draws=draws, seed=seed)
    apart = [each.only(system) for each in matched for system in each.systems]
    if len(apart) < 2:
        raise UsageError(f"only {apart[0].names[0]} was given; a comparison needs two layers or heads")
    names = [
        f"{prefix}:{system}" if prefix else system
        for (prefix, _), each in zip(several, matched, strict=True)
        for system in each.systems
    ]
    if len(set(names)) < len(names):
        raise UsageError("two files give layers or heads of the same name; rename one of the files")
    return Comparison(
        metric=found.metric,
        systems=_systems(found, names, apart),
        pairs=_pairs(found, names, apart),
        clips=found.clips,
        recordings=found.recordings,
        draws=len(found.draws),
        seed=seed,
        warnings=warnings,
    )


def _matched(several: list[Predictions]) -> tuple[list[Predictions], list[str]]:
    """The clips that all have, in the first one's order, with its classes in order; and notes."""
    first = several[0]
    common = set(first.ids.tolist()).intersection(*(each.ids.tolist() for each in several[1:]))
    if not common:
        raise UsageError("the files have no clip in common: their ids differ; compare predictions for the same dataset")
    kept = [name for name in first.ids.tolist() if name in common]
    matched = []
    for each in several:
        place = {name: at for at, name in enumerate(each.ids.tolist())}
        matched.append(each.classes(first.class_names).clips(np.array([place[name] for name in kept])))
    for each in matched[1:]:
        if (different := (each.labels != matched[0].labels).any(axis=1)).any():
            raise UsageError(
                f"{different.sum()} of {len(kept)} clips have other labels in {each.source or 'another file'}, the "
                f"first {kept[int(different.argmax())]!r}; compare predictions for the same labels"
            )
    warnings = []
    left_out = max(len(each.ids) for each in several) - len(kept)
    if left_out:
        warnings.append(f"{len(kept)} clips are in all files and are compared; up to {left_out} others are left out")
    if any((np.unique(each.folds, return_inverse=True)[1] != np.unique(matched[0].folds, return_inverse=True)[1]).any()
           for each in matched[1:]):  # fmt: skip
        warnings.append("the files divide these clips into different folds, so their models were trained on others")
    return matched, warnings


def _systems(found: Bootstrap, names: list[str], apart: list[Predictions]) -> list[dict]:
    judged = intervals(found)
    return [
        {
            "name": name, "value": number(found.estimate[at]), "ci95": bounds(judged.ci[at]),
            "band95": bounds(judged.band[at]), "seeds": len(apart[at].names),
            "differs_from_best": bool(judged.differs[at]), "p_best": number(judged.p[at]),
        }
        for at, name in enumerate(names)
    ]  # fmt: skip


def _pairs(found: Bootstrap, names: list[str], apart: list[Predictions]) -> list[dict]:
    pairs = list(combinations(range(len(names)), 2))
    alone, adjusted = pair_p(found, pairs)
    rows = []
    for at, (a, b) in enumerate(pairs):
        value, ci = difference(found, (a, b))
        exact = _exact(found, apart[a], apart[b])
        test = "bootstrap" if exact is None else "McNemar, exact" if exact.mcnemar else "swapped recordings, exact"
        rows.append(
            {
                "a": names[a], "b": names[b], "difference": number(value), "ci95": bounds(np.array(ci)),
                "p": number(alone[at] if exact is None else exact.p), "test": test, "p_bootstrap": number(alone[at]),
                "p_adjusted": number(adjusted[at]), "only_a": exact and exact.only_first,
                "only_b": exact and exact.only_second,
            }
        )  # fmt: skip
    return rows


def _exact(found: Bootstrap, a: Predictions, b: Predictions) -> ExactTest | None:
    return exact_test(a, b) if found.metric == "accuracy" else None


def read_inputs(inputs: Sequence[str]) -> list[tuple[str, Predictions]]:
    """Files, each given as F.npz for all that it holds or F.npz:NAME for one; a name before each where there are two.

    Raises UsageError where a file or a name in it is not there.
    """
    files: dict[str, list[str]] = {}
    for text in inputs:
        path, colon, name = text.rpartition(":")
        if not colon or Path(text).exists() or not path.lower().endswith(".npz"):
            path, name = text, ""
        files.setdefault(path, []).append(name)
    found = []
    for path, names in files.items():
        whole = load_predictions(path)
        prefix = _short(path, list(files)) if len(files) > 1 else ""
        if "" in names:
            found.append((prefix, whole))
        else:
            found += [(prefix, whole.only(name)) for name in dict.fromkeys(names)]
    return found


def _short(path: str, paths: list[str]) -> str:
    """The file's name without its suffix, or the whole path where another file has the same."""
    stem = Path(path).stem
    return stem if sum(Path(other).stem == stem for other in paths) == 1 else path
