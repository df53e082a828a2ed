"""Time of intervals, the band and the tests of many layers, beside SciPy's bootstrap one layer after another.

    python benchmarks/evaluation.py

Planted scores. Ours: 10,000 draws shared by all layers, BCa intervals, the simultaneous band, p-values for all pairs of
layers. SciPy: BCa intervals alone, of as many draws. Measured in turn, several rounds, best round counts. Prints JSON.
"""

from __future__ import annotations

import argparse
import dataclasses

import numpy as np
from record import Bound, Figure, Result, Row, arguments, best_of, describe, publish, rounded, settings
from scipy import stats

from whisper_at_cli.extract.evaluation.bootstrap import affordable_draws, bootstrap, bootstrap_classes
from whisper_at_cli.extract.evaluation.intervals import intervals
from whisper_at_cli.extract.evaluation.predictions import Predictions
from whisper_at_cli.extract.evaluation.statistics import right


def planted(options: argparse.Namespace) -> Predictions:
    """Layers that recognise 60 to 95 % of the clips."""
    rng = np.random.default_rng(0)
    N, C, K = options.clips, options.classes, options.layers
    y = rng.integers(0, C, N)
    scores = rng.normal(size=(K, N, C)).astype(np.float32)
    scores[:, np.arange(N), y] += 6 * (rng.random((K, N)) < np.linspace(0.6, 0.95, K)[:, None])
    return Predictions(
        ids=np.array([f"clip{i:05d}" for i in range(N)]), recordings=np.array([f"clip{i:05d}" for i in range(N)]),
        labels=np.eye(C, dtype=np.uint8)[y], class_names=tuple(f"class{c}" for c in range(C)),
        folds=np.arange(N) % 5 + 1, names=tuple(f"layer-{k + 1}" for k in range(K)),
        seeds=np.zeros(K, dtype=int), scores=scores,
    )  # fmt: skip


def measure(options: argparse.Namespace) -> Result:
    found = planted(options)
    noise = np.random.default_rng(1).normal(size=found.scores.shape).astype(np.float32)
    chance = dataclasses.replace(found, scores=noise)  # most work: every positive has many clips above it
    correct = right(found).astype(float)

    def scipys() -> np.ndarray:
        ends = [
            stats.bootstrap((of,), np.mean, n_resamples=10_000, method="BCa", rng=np.random.default_rng(0), batch=500)
            for of in correct[: options.baseline_layers]
        ]
        return np.array([(end.confidence_interval.low, end.confidence_interval.high) for end in ends])

    best = best_of(
        options.rounds,
        {
            "accuracy": lambda: intervals(bootstrap(found)),
            "mAP": lambda: intervals(bootstrap(found, metric="mAP")),
            "mAP of chance": lambda: intervals(bootstrap(chance, metric="mAP")),
            "classes": lambda: bootstrap_classes(found),
            "scipy": scipys,
        },
    )
    seconds = {name: rounded(timing.seconds) for name, timing in best.items()}
    seconds["scipy"] = rounded(best["scipy"].seconds * options.layers / options.baseline_layers)
    difference = np.abs(best["accuracy"].result.ci[: options.baseline_layers] - best["scipy"].result).max()
    return {
        "settings": settings(options),
        "seconds": seconds,
        "map_draws": affordable_draws([found]),
        "ratios": {"scipy / accuracy": rounded(seconds["scipy"] / seconds["accuracy"])},
        "largest_difference": float(difference),
    }


def rows(result: Result) -> list[Row]:
    seconds, used = result["seconds"], result["settings"]
    shape = f"{used['layers']} layers, {used['clips']} clips"
    return [
        Row(
            "metrics",
            f"intervals, band and tests of accuracy, {shape}",
            Figure(seconds["accuracy"], "s"),
            Figure(seconds["scipy"], "s", f"SciPy's intervals alone, from {used['baseline_layers']} layers"),
            result["ratios"]["scipy / accuracy"],
            asked=((Bound("measured", at_most=2.0),),),
        ),
        Row(
            "metrics",
            f"the same of mAP, {used['classes']} classes, {result['map_draws']:,} draws",
            Figure(seconds["mAP"], "s"),
            asked=((Bound("measured", at_most=2.0),),),
        ),
    ]


def main() -> None:
    parser = arguments(__doc__, layers=32, clips=2000, classes=50, rounds=3)
    parser.add_argument("--baseline-layers", type=int, default=4, help="Layers that SciPy is timed on.")
    options = parser.parse_args()
    publish(describe("evaluation", measure(options), rows, packages=["numpy", "scipy"]), options.out)


if __name__ == "__main__":
    main()
