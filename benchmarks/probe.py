"""How fast probes of every layer are: this solver's, scikit-learn's and the original's, side by side in one run.

    python benchmarks/probe.py --cache esc10.zarr
    python benchmarks/probe.py --large
    python benchmarks/probe.py --large --device cuda

ours               `probe_layers` from the cache on disk: reading, standardising, solving, scoring, all layers and folds
scikit-learn       StandardScaler and LogisticRegression, one layer and fold after another, features in memory: with its
                   own number of BLAS threads and with one, at its default tolerance and at 1e-5
original           StandardScaler and MLPClassifier without a hidden layer, with the published script's settings
products alone     the limit: the matrix products of as many iterations of the solver and nothing else, a layer a core

What each reaches is measured too: how far its objective lies above the minimum, as a share of it. Loops are measured in
turn, several rounds, and each one's best round counts: other work on a shared machine only ever slows a round down.
Seconds of processor time, of all threads together, are there as well: other work hardly touches them. `--large` plants
2,000 clips, 32 layers, 1280 channels, 50 classes and 5 folds in a cache and measures ours and the products alone.
Prints JSON.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from record import (
    Bound,
    Figure,
    Result,
    Row,
    arguments,
    at_least,
    at_most,
    best_of,
    describe,
    gpu_name,
    publish,
    rounded,
    settings,
)  # fmt: skip
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from whisper_at_cli.extract import FeatureCache
from whisper_at_cli.extract.cache import CacheSpec, CacheWriter, ClipTable, ShardBlock, Status
from whisper_at_cli.extract.devices import cores
from whisper_at_cli.probe import probe_layers
from whisper_at_cli.probe.faithful import fit
from whisper_at_cli.probe.job import Job
from whisper_at_cli.probe.scores import LayerAccuracy
from whisper_at_cli.probe.solver import PRECONDITION_AT, solve

CLIPS, LAYERS, DIM, CLASSES, FOLDS = 2000, 32, 1280, 50, 5
MEASURED_LAYERS = 2  # of the large shapes, for the time of their products alone


class Problems:
    """Every layer and fold of a cache in memory, as a loop over them sees it."""

    def __init__(self, cache: FeatureCache, strength: float):
        self.cache, self.strength = cache, strength
        self.job = Job.plan(cache, device="cpu", seed=0)
        self.layers = np.stack([self.job.mean(layer) for layer in range(1, cache.spec.layers + 1)])
        self.truth = self.job.labels.argmax(axis=1)

    def loop(self, train: Callable[[np.ndarray, np.ndarray], Any]) -> list[float]:
        """Accuracy of each layer; `train(features, truth)` gives a fitted model."""
        accuracy = []
        for features in self.layers:
            right = [
                np.mean(train(features[seen], self.truth[seen]).predict(features[tested]) == self.truth[tested])
                for seen, tested in zip(self.job.train.T, self.job.held_out.tests.values(), strict=True)
            ]
            accuracy.append(float(np.mean(right)))
        return accuracy

    def regression(self, tolerance: float) -> Callable[[np.ndarray, np.ndarray], Any]:
        model = LogisticRegression(C=self.strength, tol=tolerance, max_iter=10_000)
        return lambda features, truth: make_pipeline(StandardScaler(), model).fit(features, truth)

    def original(self, features: np.ndarray, truth: np.ndarray) -> Any:
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


def products_alone(problems: Problems, layers: int) -> Callable[[], None]:
    """The products of the solver's iterations for the first `layers` layers, without what it does between them."""
    x, y = torch.from_numpy(problems.layers[:layers]), torch.from_numpy(problems.job.labels)
    train = torch.from_numpy(problems.job.train)
    solved = solve(x, y, train, strength=problems.strength)
    iterations = solved.iterations_GF.amax(dim=1).tolist()
    clips, dim = x.shape[1], x.shape[2] + 1  # the last is the bias
    x, inverse = torch.randn(clips, dim), torch.randn(dim, dim)
    weights, logits = (torch.randn(rows, train.shape[1] * y.shape[1]) for rows in (dim, clips))

    def layer(count: int) -> None:
        torch.set_num_threads(1)
        with torch.inference_mode():
            for iteration in range(count):
                torch.mm(x, weights)
                torch.mm(x.mT, logits)
                if iteration >= PRECONDITION_AT:
                    torch.mm(inverse, weights)

    def run() -> None:
        with ThreadPoolExecutor(cores()) as pool:
            list(pool.map(layer, iterations))

    return run


def products_on_gpu(problems: Problems) -> Callable[[], None]:
    """The same for all layers together on a GPU, as many iterations as the first few layers need on average."""
    x, y = torch.from_numpy(problems.layers[:MEASURED_LAYERS]), torch.from_numpy(problems.job.labels)
    train = torch.from_numpy(problems.job.train)
    iterations = solve(x, y, train, strength=problems.strength).iterations_GF.amax(dim=1).float().mean().round()
    (layers, clips, dim), columns = problems.layers.shape, train.shape[1] * y.shape[1]
    dim += 1  # the bias
    shapes = (layers, clips, dim), (layers, dim, dim), (layers, dim, columns), (layers, clips, columns)
    features, inverse, weights, logits = (torch.randn(shape, device="cuda") for shape in shapes)

    def run() -> None:
        with torch.inference_mode():
            for iteration in range(int(iterations)):
                torch.bmm(features, weights)
                torch.bmm(features.mT, logits)
                if iteration >= PRECONDITION_AT:
                    torch.bmm(inverse, weights)
            torch.cuda.synchronize()

    return run


def one_blas_thread(do: Callable[[], Any]) -> Callable[[], Any]:
    from threadpoolctl import threadpool_limits

    def limited() -> Any:
        with threadpool_limits(1):
            return do()

    return limited


def loops(options: argparse.Namespace, cache: FeatureCache, problems: Problems) -> dict[str, Callable[[], Any]]:
    """What is compared, by name; all but `products alone` return the accuracy of each layer."""

    def ours() -> list[float]:
        found = probe_layers(cache, strength=options.strength, device=options.device)
        return [layer.accuracy for layer in cast("list[LayerAccuracy]", found.layers)]  # each clip has one label

    default, tight = (functools.partial(problems.loop, problems.regression(tolerance)) for tolerance in (1e-4, 1e-5))
    original = functools.partial(problems.loop, problems.original)
    work = {
        "ours": ours,
        "products alone": products_alone(problems, len(problems.layers)),
        "scikit-learn, one BLAS thread": one_blas_thread(default),
        "scikit-learn at 1e-5, one BLAS thread": one_blas_thread(tight),
        "original, one BLAS thread": one_blas_thread(original),
    }
    return work if options.one_blas_thread else work | {"scikit-learn": default, "original": original}


def compare(options: argparse.Namespace) -> Result:
    cache = FeatureCache.open(options.cache)
    problems = Problems(cache, options.strength)
    work = loops(options, cache, problems)
    work["ours"]()
    best = best_of(options.rounds, work)
    ours, products = best["ours"], best.pop("products alone")
    optimum = one_blas_thread(lambda: problems.loop(problems.regression(1e-8)))()
    others = {name: timing for name, timing in best.items() if name != "ours"}
    tolerances = {"ours": None, "scikit-learn": 1e-4, "scikit-learn at 1e-5": 1e-5}
    return {
        "clips": len(cache), "layers": cache.spec.layers, "dim": cache.spec.dim, "folds": problems.job.train.shape[1],
        "seconds": {name: round(timing.seconds, 3) for name, timing in best.items()},
        "processor_seconds": {name: round(timing.processor_seconds, 3) for name, timing in best.items()},
        "products_alone": {
            "seconds": round(products.seconds, 3), "ours / products": round(ours.seconds / products.seconds, 2)
        },
        "times_as_fast": {name: round(timing.seconds / ours.seconds, 1) for name, timing in others.items()},
        "times_less_processor_time": {
            name: round(timing.processor_seconds / ours.processor_seconds, 1) for name, timing in others.items()
        },
        "accuracy": {name: np.round(timing.result, 4).tolist() for name, timing in best.items()}
        | {"scikit-learn at its optimum": np.round(optimum, 4).tolist()},
        "largest_difference_from_the_optimum": round(float(np.abs(np.subtract(ours.result, optimum)).max()), 4),
        "objective_above_minimum": {
            name: one_blas_thread(functools.partial(problems.excess, tolerance))()
            for name, tolerance in tolerances.items()
        },
    }  # fmt: skip


def planted_cache(path: Path, clips: int, layers: int) -> tuple[FeatureCache, list[int]]:
    """A cache of large-model shapes with one frame a clip; every eighth layer knows the classes well, others less."""
    rng = np.random.default_rng(0)
    y = np.arange(clips) % CLASSES
    spec = CacheSpec(
        backbone="planted", weights_sha256="0" * 64, layers=layers, dim=DIM, frames=1, clip_seconds=5.0,
        class_names=tuple(f"class{c}" for c in range(CLASSES)),
    )  # fmt: skip
    table = ClipTable(
        ids=np.array([f"clip{i}" for i in range(clips)]), paths=np.array([f"clip{i}.wav" for i in range(clips)]),
        fold=(rng.permutation(clips) % FOLDS + 1).astype(np.int16), split=np.full(clips, "", dtype=object),
        labels=np.eye(CLASSES, dtype=np.uint8)[y],
    )  # fmt: skip
    clear = list(range(8, layers + 1, 8))
    signal = np.array([0.35 if layer in clear else 0.1 for layer in range(1, layers + 1)], dtype=np.float32)
    centres = rng.normal(size=(CLASSES, layers, DIM)).astype(np.float32) * signal[:, None]
    with CacheWriter.create(path, spec, table) as writer:
        for shard in writer.pending_shards():
            rows = np.array(writer.rows(shard))
            block = ShardBlock.empty(len(rows), spec)
            block.mean[:] = centres[y[rows]] + rng.standard_normal((len(rows), layers, DIM), dtype=np.float32)
            block.features[:] = block.mean[:, :, None]
            block.valid_frames[:], block.status[:] = 1, Status.DONE
            writer.write(shard, block)
    return FeatureCache.open(path), clear


def large(options: argparse.Namespace) -> Result:
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        cache, clear = planted_cache(Path(folder) / "large.zarr", options.clips, options.layers)
        if options.device != "cpu" and torch.cuda.is_available():
            probe_layers(cache, layers=[1], device=options.device)  # the device wakes up
        ours: Callable[[], Any] = functools.partial(
            probe_layers, cache, strength=options.strength, device=options.device
        )
        work: dict[str, Callable[[], Any]] = {"ours": ours}
        on_cpu = gpu_name() is None or options.device == "cpu"
        problems = Problems(cache, options.strength)
        work["products alone"] = products_alone(problems, MEASURED_LAYERS) if on_cpu else products_on_gpu(problems)
        best = best_of(options.rounds, work)
    timing = best["ours"]
    result = timing.result
    accuracy = {layer.layer: round(layer.accuracy, 4) for layer in result.layers}
    others = [value for layer, value in accuracy.items() if layer not in clear]
    products = best["products alone"].seconds * (options.layers / MEASURED_LAYERS if on_cpu else 1)
    limit = {"seconds": rounded(products, 3), "ours / products": round(timing.seconds / products, 2)}
    return {
        "clips": options.clips, "layers": options.layers, "dim": DIM, "classes": CLASSES, "folds": FOLDS,
        "device": result.device, "seconds": {"ours": round(timing.seconds, 2)},
        "processor_seconds": {"ours": round(timing.processor_seconds, 2)}, "products_alone": limit,
        "accuracy_of_planted_layers": [accuracy[layer] for layer in clear],
        "highest_accuracy_elsewhere": max(others), "warnings": result.warnings,
    }  # fmt: skip


def rows(result: Result) -> list[Row]:
    limit, share = None, None
    if "products_alone" in result:
        limit = Figure(result["products_alone"]["seconds"], "s", "the iterations' matrix products alone")
        share = result["products_alone"]["ours / products"]
    shape = f"{result['layers']} layers of {result['dim']} channels, {result['folds']} folds, {result['clips']} clips"
    ours = Figure(result["seconds"]["ours"], "s")
    if "times_as_fast" not in result:
        on_gpu = str(result["device"]).startswith("cuda")
        asked = at_most("measured", 5 if on_gpu else 90)
        return [Row("probes", f"probes of {shape}", ours, limit=limit, share=share, asked=(asked,))]
    asked_of: dict[str, tuple[tuple[Bound, ...], ...]] = {
        "original": (at_least("ratio", 6),), "scikit-learn": (at_least("ratio", 10),),
    }  # fmt: skip
    loops = {
        "original": "a loop of the original's `MLPClassifier`",
        "original, one BLAS thread": "`MLPClassifier` with one BLAS thread",
        "scikit-learn": "a loop of `LogisticRegression` as it comes",
        "scikit-learn, one BLAS thread": "`LogisticRegression` with one BLAS thread",
        "scikit-learn at 1e-5, one BLAS thread": "`LogisticRegression` with one BLAS thread, tolerance 1e-5",
    }
    found = []
    for name, of in loops.items():
        if name in result["times_as_fast"]:
            baseline, ratio = Figure(result["seconds"][name], "s", of), result["times_as_fast"][name]
            found.append(
                Row("probes", f"probes of {shape}", ours, baseline, ratio, limit, share, asked_of.get(name, ()))
            )
    return found


def blas_pools() -> list[str]:
    """The thread pools of this process, as far as threadpoolctl is here to tell."""
    if not importlib.util.find_spec("threadpoolctl"):
        return []
    from threadpoolctl import threadpool_info

    return sorted({f"{pool['internal_api']} {pool['num_threads']}" for pool in threadpool_info()})


def main() -> None:
    parser = arguments(__doc__, clips=CLIPS, layers=LAYERS, rounds=2)
    parser.add_argument("--cache", type=Path, help="a cache with one label a clip and official folds, such as ESC-10's")
    parser.add_argument("--large", action="store_true", help="plant --clips clips of large-model shapes instead")
    parser.add_argument("--strength", type=float, default=1.0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--folder", help="where --large writes; a temporary folder without it")
    parser.add_argument(
        "--one-blas-thread", action="store_true", help="leave out the loops with scikit-learn's own number of threads"
    )
    options = parser.parse_args()
    if not options.large and not options.cache:
        parser.error("give --cache or --large")
    blas = blas_pools()
    used = settings(options, *([] if options.large else ["clips", "layers"]))
    found = {"pools": blas, "settings": used, **(large(options) if options.large else compare(options))}
    gpu = gpu_name() if options.device != "cpu" else None
    publish(describe("probe", found, rows, packages=["torch", "numpy", "scikit-learn"], gpu=gpu), options.out)


if __name__ == "__main__":
    main()
