"""One system's value with its interval, and how the interval was made, as results of commands hold them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from whisper_at_cli.extract.evaluation.bootstrap import Bootstrap, bootstrap
from whisper_at_cli.extract.evaluation.intervals import LEVEL, interval
from whisper_at_cli.extract.evaluation.predictions import Predictions

METHOD = "BCa bootstrap over recordings"


def value_and_interval(
    predictions: Predictions, metric: str, *, seed: int = 0
) -> tuple[float | None, list[float] | None, dict[str, Any]]:
    """Of the first system: its value, 95 % interval (None where undefined), and what `how_made` says."""
    found = bootstrap(predictions.only(predictions.systems[0]), metric=metric, seed=seed)
    return number(found.estimate[0]), bounds(interval(found)[0]), how_made(found)


def how_made(found: Bootstrap) -> dict[str, Any]:
    """Settings of the intervals, for the record."""
    return {
        "level": LEVEL, "method": METHOD, "recordings": found.recordings, "clips": found.clips,
        "draws": len(found.draws),
    }  # fmt: skip


def number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def bounds(ci: np.ndarray) -> list[float] | None:
    return None if np.isnan(ci).any() else [float(ci[0]), float(ci[1])]
