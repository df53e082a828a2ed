"""How fast probes of every layer are: this solver's, scikit-learn's and the original's, side by side in one run.

    python benchmarks/probe.py --cache esc10.zarr
    python benchmarks/probe.py --large
    python benchmarks/probe.py --large --device cuda

ours               `probe_layers` from the cache on disk: reading, standardising, solving, scoring, all layers and folds
scikit-learn       StandardScaler and LogisticRegression, one layer and fold after another, features in memory: with its
                   own number of BLAS threads and with one, at its default tolerance and at 1e-5
original           StandardScaler and MLPClassifier without a hidden layer, with the published script's settings

What each reaches is measured too: how far its objective lies above the minimum, as a share of it. Loops are measured in
turn, several rounds, and each one's best round counts: other work on a shared machine only ever slows a round down.
Seconds of processor time, of all threads together, are there as well: other work hardly touches them. `--large` plants
2,000 clips, 32 layers, 1280 channels, 50 classes and 5 folds in a cache and measures ours alone. Prints JSON.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import numpy as np
import sklearn
import torch
from machine import machine, publish
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_info, threadpool_limits

from whisper_at_cli import __version__
from whisper_at_cli.extract import FeatureCache
from whisper_at_cli.extract.cache import CacheSpec, CacheWriter, ClipTable, ShardBlock, Status
from whisper_at_cli.probe import probe_layers
from whisper_at_cli.probe.faithful import fit
from whisper_at_cli.probe.job import Job
from whisper_at_cli.probe.scores import LayerAccuracy, LayerPrecision
from whisper_at_cli.probe.solver import solve

CLIPS, LAYERS, DIM, CLASSES, FOLDS = 2000, 32, 1280, 50, 5


Result = TypeVar("Result")


class Problems:
    """Every layer and fold of a cache in memory, as a loop over them sees it."""

    def __init__(self, cache: FeatureCache, strength: float):
        self.cache, self.strength = cache, strength
        self.job = Job.plan(cache, device="cpu", seed=0)
        self.layers = np.stack([self.job.mean(layer) for layer in range(1, cache.spec.layers + 1)])
        self.truth = self.job.labels.argmax(axis=1)

    def loop(self, train: Callable[[np.ndarray, np.ndarray], Pipeline]) -> list[float]:
        """Accuracy of each layer; `train(features, truth)` gives a fitted model."""
        accuracy = []
        for features in self.layers:
            right = [
                np.mean(train(features[seen], self.truth[seen]).predict(features[tested]) == self.truth[tested])
                for seen, tested in zip(self.job.train.T, self.job.held_out.tests.values(), strict=True)
            ]
            accuracy.append(float(np.mean(right)))
        return accuracy

    def regression(self, tolerance: float) -> Callable[[np.ndarray, np.ndarray], Pipeline]:
        model = LogisticRegression(C=self.strength, tol=tolerance, max_iter=10_000)
        return lambda features, truth: make_pipeline(StandardScaler(), model).fit(features, truth)

    def original(self, features: np.ndarray, truth: np.ndarray) -> Pipeline:
        return fit(features.astype(np.float64), truth)[0]

    def excess(self, tolerance: float | None) -> float:
        """How far above the minimum objectives lie on average, as a share: scikit-learn's, or ours for None."""
        x, y = torch.from_numpy(self.layers), torch.from_numpy(self.job.labels)
        train = torch.from_numpy(self.job.train)
        least = solve(x.double(), y, train, strength=self.strength, tolerance=1e-11).objective_GF.numpy()
        if tolerance is None:
            return float((solve(x, y, train, strength=self.strength).objective_GF.numpy() / least - 1).mean())
        found = np.empty_like(least)
        for layer, features in enumerate(self.layers):
            for fold, seen in enumerate(self.job.train.T):
                model = self.regression(tolerance)(features[seen], self.truth[seen])
                likely = model.predict_log_proba(features[seen])[np.arange(seen.sum()), self.truth[seen]]
                found[layer, fold] = -self.strength * likely.sum() + (model[-1].coef_ ** 2).sum() / 2
        return float((found / least - 1).mean())


def best_of(rounds: int, work: Mapping[str, Callable[[], Result]]) -> dict[str, tuple[float, float, Result]]:
    """Name -> (seconds and processor seconds of the best round, what it returned). Rounds do all of them in turn."""
    best: dict[str, tuple[float, float, Result]] = {}
    for _ in range(rounds):
        for name, do in work.items():
            started, used = time.perf_counter(), time.process_time()
            result = do()
            seconds, used = time.perf_counter() - started, time.process_time() - used
            if name not in best or seconds < best[name][0]:
                best[name] = (seconds, used, result)
    return best


def accuracy_of(layer: LayerAccuracy | LayerPrecision) -> float:
    assert isinstance(layer, LayerAccuracy), "the benchmark's clips have one label each"
    return layer.accuracy


def one_blas_thread(do: Callable[[], Result]) -> Callable[[], Result]:
    def limited() -> Result:
        with threadpool_limits(1):
            return do()

    return limited


def compare(options: argparse.Namespace) -> dict:
    cache = FeatureCache.open(options.cache)
    problems = Problems(cache, options.strength)
    default, tight = (
        lambda tolerance=tolerance: problems.loop(problems.regression(tolerance)) for tolerance in (1e-4, 1e-5)
    )
    work = {
        "ours": lambda: [
            accuracy_of(layer) for layer in probe_layers(cache, strength=options.strength, device=options.device).layers
        ],
        "scikit-learn, one BLAS thread": one_blas_thread(default),
        "scikit-learn at 1e-5, one BLAS thread": one_blas_thread(tight),
        "original, one BLAS thread": one_blas_thread(lambda: problems.loop(problems.original)),
    }
    if not options.one_blas_thread:
        work |= {"scikit-learn": default, "original": lambda: problems.loop(problems.original)}
    work["ours"]()
    best = best_of(options.rounds, work)
    ours, processor, accuracy = best["ours"]
    optimum = one_blas_thread(lambda: problems.loop(problems.regression(1e-8)))()
    return {
        "clips": len(cache), "layers": cache.spec.layers, "dim": cache.spec.dim, "folds": problems.job.train.shape[1],
        "seconds": {name: round(seconds, 3) for name, (seconds, _, _) in best.items()},
        "processor_seconds": {name: round(used, 3) for name, (_, used, _) in best.items()},
        "times_as_fast": {name: round(seconds / ours, 1) for name, (seconds, _, _) in best.items() if name != "ours"},
        "times_less_processor_time": {
            name: round(used / processor, 1) for name, (_, used, _) in best.items() if name != "ours"
        },
        "accuracy": {name: np.round(found, 4).tolist() for name, (_, _, found) in best.items()}
        | {"scikit-learn at its optimum": np.round(optimum, 4).tolist()},
        "largest_difference_from_the_optimum": round(float(np.abs(np.subtract(accuracy, optimum)).max()), 4),
        "objective_above_minimum": {
            "ours": one_blas_thread(lambda: problems.excess(None))(),
            "scikit-learn": one_blas_thread(lambda: problems.excess(1e-4))(),
            "scikit-learn at 1e-5": one_blas_thread(lambda: problems.excess(1e-5))(),
        },
    }  # fmt: skip


def planted_cache(path: Path, clips: int) -> tuple[FeatureCache, list[int]]:
    """A cache of large-model shapes with one frame a clip; every eighth layer knows the classes well, others less."""
    rng = np.random.default_rng(0)
    y = np.arange(clips) % CLASSES
    spec = CacheSpec(
        backbone="planted", weights_sha256="0" * 64, layers=LAYERS, dim=DIM, frames=1, clip_seconds=5.0,
        class_names=tuple(f"class{c}" for c in range(CLASSES)),
    )  # fmt: skip
    table = ClipTable(
        ids=np.array([f"clip{i}" for i in range(clips)]), paths=np.array([f"clip{i}.wav" for i in range(clips)]),
        fold=(rng.permutation(clips) % FOLDS + 1).astype(np.int16), split=np.full(clips, "", dtype=object),
        labels=np.eye(CLASSES, dtype=np.uint8)[y],
    )  # fmt: skip
    clear = list(range(8, LAYERS + 1, 8))
    signal = np.array([0.35 if layer in clear else 0.1 for layer in range(1, LAYERS + 1)], dtype=np.float32)
    centres = rng.normal(size=(CLASSES, LAYERS, DIM)).astype(np.float32) * signal[:, None]
    with CacheWriter.create(path, spec, table) as writer:
        for shard in writer.pending_shards():
            rows = np.array(writer.rows(shard))
            block = ShardBlock.empty(len(rows), spec)
            block.mean[:] = centres[y[rows]] + rng.standard_normal((len(rows), LAYERS, DIM), dtype=np.float32)
            block.features[:] = block.mean[:, :, None]
            block.valid_frames[:], block.status[:] = 1, Status.DONE
            writer.write(shard, block)
    return FeatureCache.open(path), clear


def large(options: argparse.Namespace) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        cache, clear = planted_cache(Path(folder) / "large.zarr", options.clips)
        if options.device != "cpu" and torch.cuda.is_available():
            probe_layers(cache, layers=[1], device=options.device)  # the device wakes up
        ours = functools.partial(probe_layers, cache, strength=options.strength, device=options.device)
        seconds, processor, result = best_of(options.rounds, {"ours": ours})["ours"]
    accuracy = {layer.layer: round(accuracy_of(layer), 4) for layer in result.layers}
    others = [value for layer, value in accuracy.items() if layer not in clear]
    return {
        "clips": options.clips, "layers": LAYERS, "dim": DIM, "classes": CLASSES, "folds": FOLDS,
        "device": result.device, "seconds": {"ours": round(seconds, 2)},
        "processor_seconds": {"ours": round(processor, 2)},
        "accuracy_of_planted_layers": [accuracy[layer] for layer in clear],
        "highest_accuracy_elsewhere": max(others), "warnings": result.warnings,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, help="a cache with one label a clip and official folds, such as ESC-10's")
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--clips", type=int, default=CLIPS, help="with --large")
    parser.add_argument("--strength", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--one-blas-thread", action="store_true", help="leave out the loops with scikit-learn's own number of threads"
    )
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    options = parser.parse_args()
    if not options.large and not options.cache:
        parser.error("give --cache or --large")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    blas = sorted({f"{pool['internal_api']} {pool['num_threads']}" for pool in threadpool_info()})
    versions = {"whisper-at-cli": __version__, "torch": torch.__version__, "scikit-learn": sklearn.__version__}
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    settings = {name: value for name, value in settings.items() if name not in ("out", "cache")}
    result = {
        "benchmark": "probe", "date": datetime.now(UTC).strftime("%Y-%m-%d"), "machine": machine(gpu),
        "versions": versions, "threads": {"torch": torch.get_num_threads(), "pools": blas}, "settings": settings,
        **(large(options) if options.large else compare(options)),
    }  # fmt: skip
    publish(result, options.out)


if __name__ == "__main__":
    main()
