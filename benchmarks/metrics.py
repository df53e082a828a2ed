"""Time of this project's metrics beside scikit-learn's and beside sorting alone, on scores of AudioSet's shape.

    python benchmarks/metrics.py
    python benchmarks/metrics.py --device cuda

Average precision and AUC of every class. Sorting alone is NumPy's sort of each class's scores, which no exact way to
either can do without. Measured in turn, several rounds, best round counts. Prints JSON.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from record import Figure, Result, Row, arguments, best_of, describe, gpu_name, publish, rounded, settings
from sklearn.metrics import average_precision_score, roc_auc_score

from whisper_at_cli.extract.evaluation.metrics import evaluate_scores


def measure(options: argparse.Namespace) -> Result:
    rng = np.random.default_rng(0)
    shape = (options.clips, options.classes)
    labels = rng.random(shape) < 0.4 / np.arange(1, options.classes + 1)  # as unequal as AudioSet: 2.7 labels a clip
    scores = (rng.normal(size=shape) + labels).astype(np.float32)
    labels[0], labels[1] = True, False  # so that every class has both, which scikit-learn needs
    given = torch.from_numpy(scores).to(options.device), torch.from_numpy(labels).to(options.device)
    best = best_of(
        options.rounds,
        {
            "ours": lambda: evaluate_scores(*given),
            "scikit-learn": lambda: [
                score(labels, scores, average=None) for score in (average_precision_score, roc_auc_score)
            ],
            "sorting": lambda: np.sort(np.ascontiguousarray(scores.T), axis=1),
        },
    )
    ours, (ap, auc) = best["ours"].result, best["scikit-learn"].result
    seconds = {name: rounded(timing.seconds) for name, timing in best.items()}
    return {
        "settings": settings(options),
        "labels_per_clip": rounded(float(labels.sum(axis=1).mean())),
        "seconds": seconds,
        "ratios": {
            "scikit-learn / ours": rounded(best["scikit-learn"].seconds / best["ours"].seconds),
            "ours / sorting": rounded(best["ours"].seconds / best["sorting"].seconds),
        },
        "largest_difference": float(max(np.abs(ours.class_ap - ap).max(), np.abs(ours.class_auc - auc).max())),
    }


def rows(result: Result) -> list[Row]:
    seconds, ratios, used = result["seconds"], result["ratios"], result["settings"]
    sorting = "sorting" in seconds
    return [
        Row(
            "metrics",
            f"average precision and AUC of {used['classes']} classes, {used['clips']} clips, {used['device']}",
            Figure(seconds["ours"], "s"),
            Figure(seconds["scikit-learn"], "s", "scikit-learn"),
            ratios["scikit-learn / ours"],
            Figure(seconds["sorting"], "s", "sorting the scores alone") if sorting else None,
            ratios["ours / sorting"] if sorting else None,
        )
    ]


def main() -> None:
    parser = arguments(__doc__, clips=20000, classes=527, rounds=3)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    gpu = gpu_name(options.device)
    publish(
        describe("metrics", measure(options), rows, packages=["torch", "numpy", "scikit-learn"], gpu=gpu), options.out
    )


if __name__ == "__main__":
    main()
