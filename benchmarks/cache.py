"""How fast a cache is read and written, beside a memory map and beside one compressed npz a clip, in one run.

    python benchmarks/cache.py
    python benchmarks/cache.py --clips 2048 --folder /data/scratch

Data of (clips, layers, 25, channels) float16, by default (256, 32, 25, 1280), page cache warm. Each thing is measured
in turn, several rounds, and each one's best round counts: other work on a shared machine only ever slows a round down.

random batches   48 clips drawn at random, all layers
contiguous       48 clips side by side, all layers
one layer        one layer of all clips; bytes read are the process's own count of what it asked the system for
writing          whole shards, each on disk before the next; beside plain `write` of the same bytes with fsync

Prints JSON.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from machine import machine, publish

from whisper_at_cli import __version__
from whisper_at_cli.extract.cache import CacheSpec, CacheWriter, ClipTable, FeatureCache, ShardBlock, Status


def write_cache(path: Path, features: np.ndarray, dtype: str, shard_mb: float) -> float:
    """Seconds to write a cache of these features (N, L, T, D)."""
    N, L, T, D = features.shape
    spec = CacheSpec("benchmark", "0", L, D, 10.0, dtype=dtype)
    names = np.array([f"clip{i}" for i in range(N)])
    empty = np.full(N, "")
    clips = ClipTable(names, names, np.zeros(N, np.int16), empty, np.zeros((N, 0), np.uint8))
    seconds = 0.0
    with CacheWriter.create(path, spec, clips, shard_mb=shard_mb) as writer:
        for shard in writer.pending_shards():
            rows = writer.rows(shard)
            block = ShardBlock.empty(len(rows), spec)
            block.features[:] = features[rows.start : rows.stop]
            block.status[:] = Status.DONE
            started = time.perf_counter()
            writer.write(shard, block)
            seconds += time.perf_counter() - started
    return seconds


def write_plain(folder: Path, features: np.ndarray, per_file: int) -> float:
    """Seconds for plain `write` of the same bytes into as many files, each with fsync."""
    folder.mkdir()
    seconds = 0.0
    for start in range(0, len(features), per_file):
        data = features[start : start + per_file]
        started = time.perf_counter()
        with open(folder / str(start), "wb") as file:
            file.write(data.data.cast("B"))
            file.flush()
            os.fsync(file.fileno())
        seconds += time.perf_counter() - started
    return seconds


def bytes_read() -> int:
    """Bytes that this process has asked the system for so far, from the page cache or the disk."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("rchar"))


def timed(function: Callable[[], object], repeats: int) -> float:
    """Seconds per call."""
    started = time.perf_counter()
    for _ in range(repeats):
        function()
    return (time.perf_counter() - started) / repeats


def measure(options: argparse.Namespace, folder: Path) -> dict:
    N, L, T, D, B = options.clips, options.layers, 25, options.channels, options.batch
    rng = np.random.default_rng(0)
    features = rng.normal(size=(N, L, T, D)).astype(np.float16)
    clip_bytes = features[0].nbytes
    per_shard = CacheSpec("benchmark", "0", L, D, 10.0).clips_per_shard(options.shard_mb, N)
    writing: dict[str, list[float]] = {"cache": [], "plain write": []}
    for number in range(options.rounds):
        writing["plain write"].append(write_plain(folder / f"plain{number}", features, per_shard))
        writing["cache"].append(write_cache(folder / f"{number}.zarr", features, "float16", options.shard_mb))
    cache = FeatureCache.open(folder / "0.zarr")
    np.save(folder / "map.npy", features)
    mapped = np.load(folder / "map.npy", mmap_mode="r")
    few = range(min(N, 64))
    for clip in few:
        np.savez_compressed(folder / f"{clip}.npz", features[clip])
    del features

    def batch() -> np.ndarray:
        return rng.integers(0, N, B)

    def run() -> range:
        start = int(rng.integers(0, N - B + 1))
        return range(start, start + B)

    def npz_batch() -> np.ndarray:
        return np.stack([np.load(folder / f"{clip}.npz")["arr_0"] for clip in rng.integers(0, len(few), B)])

    def contiguous_of_map() -> np.ndarray:
        rows = run()
        return np.array(mapped[rows.start : rows.stop])

    layer = L // 2
    readers = {
        "random batches": {
            "cache": lambda: cache.features(batch()), "memory map": lambda: mapped[batch()], "npz": npz_batch,
        },
        "contiguous": {"cache": lambda: cache.features(run()), "memory map": contiguous_of_map},
        "one layer": {
            "cache": lambda: cache.layer(layer + 1, dtype="float16"),
            "memory map": lambda: np.array(mapped[:, layer]),
        },
    }  # fmt: skip
    assert (cache.features([3, 1]) == mapped[[3, 1]]).all() and (cache.layer(2, [5])[0] == mapped[5, 1]).all()
    seconds: dict[tuple[str, str], list[float]] = {(task, name): [] for task, of in readers.items() for name in of}
    for _ in range(options.rounds):
        for task, of in readers.items():
            for name, read in of.items():
                seconds[task, name].append(timed(read, 1 if name == "npz" else options.repeats))
    fresh = FeatureCache.open(folder / "0.zarr")
    before = bytes_read()
    layer_array = fresh.layer(layer + 1, dtype="float16")
    layer_bytes_read = bytes_read() - before
    best = {key: min(values) for key, values in seconds.items()}
    clips = {"random batches": B, "contiguous": B, "one layer": N}
    rates = {
        task: {
            name: {
                "clips/s": round(clips[task] / best[task, name]),
                "GB/s": round(clips[task] * clip_bytes / (L if task == "one layer" else 1) / best[task, name] / 1e9, 3),
            }
            for name in of
        }
        for task, of in readers.items()
    }
    wrote = {name: N * clip_bytes / min(values) / 1e9 for name, values in writing.items()}
    rates["writing"] = {name: {"GB/s": round(rate, 3)} for name, rate in wrote.items()}

    def ratio(task: str, other: str) -> float:
        return round(best[task, other] / best[task, "cache"], 3)

    return {
        "benchmark": "cache",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": machine(),
        "versions": {"whisper-at-cli": __version__, "numpy": np.__version__},
        "settings": {
            "shape": [N, L, T, D], "dtype": "float16", "batch": B, "clips_per_shard": per_shard,
            "rounds": options.rounds, "repeats": options.repeats,
        },
        "rates": rates,
        "ratios": {
            "random batches, cache / memory map": ratio("random batches", "memory map"),
            "random batches, cache / npz": ratio("random batches", "npz"),
            "contiguous, cache / memory map": ratio("contiguous", "memory map"),
            "one layer, cache / memory map": ratio("one layer", "memory map"),
            "one layer, bytes read / bytes of the layer": round(layer_bytes_read / layer_array.nbytes, 4),
            "writing, cache / plain write": round(wrote["cache"] / wrote["plain write"], 3),
        },
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (
        ("clips", 256),
        ("layers", 32),
        ("channels", 1280),
        ("batch", 48),
        ("rounds", 5),
        ("repeats", 3),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--shard-mb", type=float, default=128)
    parser.add_argument("--folder", help="where to write; a temporary folder without it")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        result = measure(options, Path(folder))
    publish(result, options.out)


if __name__ == "__main__":
    main()
