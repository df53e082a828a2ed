"""Time of this project's metrics beside scikit-learn's, on scores of AudioSet's shape.

python benchmarks/metrics.py --clips 20000 --classes 527 > benchmarks/results/metrics-cpu.json
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
import sklearn
import torch
from machine import machine
from sklearn.metrics import average_precision_score, roc_auc_score

from whisper_at_cli.heads.metrics import evaluate_scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=20000)
    parser.add_argument("--classes", type=int, default=527)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    shape = (arguments.clips, arguments.classes)
    labels = rng.random(shape) < 0.4 / np.arange(1, arguments.classes + 1)  # as unequal as AudioSet: 2.7 labels a clip
    scores = (rng.normal(size=shape) + labels).astype(np.float32)
    labels[0], labels[1] = True, False  # so that every class has both, which scikit-learn needs
    given = torch.from_numpy(scores).to(arguments.device), torch.from_numpy(labels).to(arguments.device)
    ours, theirs, largest = [], [], 0.0
    for _ in range(arguments.rounds):
        started = time.perf_counter()
        found = evaluate_scores(*given)
        ours.append(time.perf_counter() - started)
        started = time.perf_counter()
        ap = average_precision_score(labels, scores, average=None)
        auc = roc_auc_score(labels, scores, average=None)
        theirs.append(time.perf_counter() - started)
        largest = max(np.abs(found.class_ap - ap).max(), np.abs(found.class_auc - auc).max())
    report = {
        "clips": arguments.clips, "classes": arguments.classes, "labels_per_clip": float(labels.sum(axis=1).mean()),
        "seconds": min(ours), "scikit_learn_seconds": min(theirs), "ratio": min(theirs) / min(ours),
        "largest_difference": float(largest), "device": arguments.device, "threads": torch.get_num_threads(),
        "torch": torch.__version__, "scikit_learn": sklearn.__version__, **machine(),
    }  # fmt: skip
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
