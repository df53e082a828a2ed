"""How fast a cache is read and written, beside a memory map and beside one compressed npz a clip, in one run.

    python benchmarks/cache.py
    python benchmarks/cache.py --clips 2048 --folder /data/scratch

Data of (clips, layers, 25, channels) float16, by default (256, 32, 25, 1280), page cache warm. Each thing is measured
in turn, several rounds, and each one's best round counts: other work on a shared machine only ever slows a round down.

random batches   48 clips drawn at random, all layers
contiguous       48 clips side by side, all layers
one layer        one layer of all clips; bytes read are the process's own count of what it asked the system for
several threads  random batches, read by a thread for each core at once
many shards      random batches of small clips, four to a shard, from many shards beside few
writing          whole shards, each on disk before the next; beside plain `write` of the same bytes with fsync

Prints JSON.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from record import Figure, Result, Row, arguments, at_least, at_most, best_of, describe, in_folder, publish, settings

from whisper_at_cli.extract.cache import CacheSpec, CacheWriter, ClipTable, FeatureCache, ShardBlock, Status
from whisper_at_cli.extract.machine import cores


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


class Forms:
    """The same features (N, L, T, D) as a cache, as a memory map and, of the first clips, as npz files."""

    NPZ_CLIPS = 64

    def __init__(self, folder: Path, cache: Path, features: np.ndarray, batch: int):
        self.rng, self.batch, self.folder = np.random.default_rng(1), batch, folder
        self.clips, self.layers = features.shape[:2]
        self.cache = FeatureCache.open(cache)
        np.save(folder / "map.npy", features)
        self.map = np.load(folder / "map.npy", mmap_mode="r")
        self.npz_clips = min(self.clips, self.NPZ_CLIPS)
        for clip in range(self.npz_clips):
            np.savez_compressed(folder / f"{clip}.npz", features[clip])
        assert (self.cache.features([3, 1]) == self.map[[3, 1]]).all()
        assert (self.cache.layer(2, [5])[0] == self.map[5, 1]).all()

    def readers(self) -> dict[tuple[str, str], Callable[[], np.ndarray]]:
        """(task, form) -> what reads that much from it."""
        layer = self.layers // 2
        return {
            ("random batches", "cache"): lambda: self.cache.features(self._drawn()),
            ("random batches", "memory map"): lambda: self.map[self._drawn()],
            ("random batches", "npz"): self._npz,
            ("several threads", "cache"): lambda: at_once(lambda: self.cache.features(self._drawn()), cores()),
            ("several threads", "memory map"): lambda: at_once(lambda: self.map[self._drawn()], cores()),
            ("contiguous", "cache"): lambda: self.cache.features(self._run()),
            ("contiguous", "memory map"): self._run_of_map,
            ("one layer", "cache"): lambda: self.cache.layer(layer + 1, dtype="float16"),
            ("one layer", "memory map"): lambda: np.array(self.map[:, layer]),
        }

    def _drawn(self) -> np.ndarray:
        return self.rng.integers(0, self.clips, self.batch)

    def _run(self) -> range:
        start = int(self.rng.integers(0, self.clips - self.batch + 1))
        return range(start, start + self.batch)

    def _run_of_map(self) -> np.ndarray:
        rows = self._run()
        return np.array(self.map[rows.start : rows.stop])

    def _npz(self) -> np.ndarray:
        drawn = self.rng.integers(0, self.npz_clips, self.batch)
        return np.stack([np.load(self.folder / f"{clip}.npz")["arr_0"] for clip in drawn])


class ManyShards:
    """Caches of small clips, four to a shard: one of few shards, one of many."""

    CLIPS_PER_SHARD = 4

    def __init__(self, folder: Path, few: int, many: int, layers: int, channels: int, batch: int):
        clip = np.random.default_rng(0).normal(size=(layers, 25, channels)).astype(np.float16)
        self.rng, self.batch, self.caches = np.random.default_rng(1), batch, {}
        for name, shards in (("few", few), ("many", many)):
            features = np.broadcast_to(clip, (shards * self.CLIPS_PER_SHARD, *clip.shape))
            write_cache(folder / f"{name}.zarr", features, "float16", self.CLIPS_PER_SHARD * clip.nbytes / 1e6)
            self.caches[name] = FeatureCache.open(folder / f"{name}.zarr")
            self.caches[name].features(np.arange(len(features))[:: self.CLIPS_PER_SHARD])  # every shard is known

    def readers(self) -> dict[str, Callable[[], np.ndarray]]:
        return {name: partial(self._read, cache) for name, cache in self.caches.items()}

    def _read(self, cache: FeatureCache) -> np.ndarray:
        return cache.features(self.rng.integers(0, len(cache), self.batch))


def at_once(read: Callable[[], np.ndarray], threads: int) -> None:
    """Call it from several threads at once."""
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(read) for _ in range(threads)]:
            done.result()


def layer_bytes_read_per_byte(path: Path, layer: int) -> float:
    """What a fresh reader asks the system for to read one layer, for each byte of that layer."""
    cache = FeatureCache.open(path)
    before = bytes_read()
    found = cache.layer(layer, dtype="float16")
    return (bytes_read() - before) / found.nbytes


def measure(options: argparse.Namespace, folder: Path) -> Result:
    N, L, T, D, B = options.clips, options.layers, 25, options.channels, options.batch
    features = np.random.default_rng(0).normal(size=(N, L, T, D)).astype(np.float16)
    per_shard = CacheSpec("benchmark", "0", L, D, 10.0).clips_per_shard(options.shard_mb, N)
    writing: dict[str, list[float]] = {"cache": [], "plain write": []}
    for number in range(options.rounds):
        writing["plain write"].append(write_plain(folder / f"plain{number}", features, per_shard))
        writing["cache"].append(write_cache(folder / f"{number}.zarr", features, "float16", options.shard_mb))
    clip_bytes = features[0].nbytes
    forms = Forms(folder, folder / "0.zarr", features, B)
    del features
    readers = forms.readers()
    repeats = {key: 1 if key[1] == "npz" else options.repeats for key in readers}
    seconds = {key: best.seconds for key, best in best_of(options.rounds, readers, repeats).items()}
    clips = {"random batches": B, "several threads": B * cores(), "contiguous": B, "one layer": N}
    many = ManyShards(folder, options.few_shards, options.many_shards, 4, 384, B).readers()
    shards = {name: best.seconds for name, best in best_of(options.rounds, many, dict.fromkeys(many, 20)).items()}
    rates: dict[str, dict] = {task: {} for task in (*clips, "writing")}
    for (task, form), took in seconds.items():
        rate = clips[task] * clip_bytes / (L if task == "one layer" else 1) / took / 1e9
        rates[task][form] = {"clips/s": round(clips[task] / took), "GB/s": round(rate, 3)}
    rates["shards"] = {name: {"clips/s": round(B / took)} for name, took in shards.items()}
    best_writing = {form: min(values) for form, values in writing.items()}
    for form, took in best_writing.items():
        rates["writing"][form] = {"GB/s": round(N * clip_bytes / took / 1e9, 3)}

    def ratio(task: str, other: str) -> float:
        return round(seconds[task, other] / seconds[task, "cache"], 3)

    return {
        "settings": settings(options)
        | {
            "shape": [N, L, T, D],
            "dtype": "float16",
            "clips_per_shard": per_shard,
            "threads": cores(),
        },
        "rates": rates,
        "ratios": {
            "random batches, cache / memory map": ratio("random batches", "memory map"),
            "random batches, cache / npz": ratio("random batches", "npz"),
            "several threads, cache / memory map": ratio("several threads", "memory map"),
            "random batches, many shards / few": round(shards["few"] / shards["many"], 3),
            "contiguous, cache / memory map": ratio("contiguous", "memory map"),
            "one layer, cache / memory map": ratio("one layer", "memory map"),
            "one layer, bytes read / bytes of the layer": round(
                layer_bytes_read_per_byte(folder / "0.zarr", L // 2 + 1), 4
            ),
            "writing, cache / plain write": round(best_writing["plain write"] / best_writing["cache"], 3),
        },
    }


def rows(result: Result) -> list[Row]:
    rates, ratios = result["rates"], result["ratios"]
    batch, (clips, layers, _, channels) = result["settings"]["batch"], result["settings"]["shape"]

    def figure(task: str, form: str, unit: str, of: str = "") -> Figure:
        return Figure(rates[task][form][unit], unit, of)

    mapped = "memory map"
    return [
        Row(
            "cache", f"random batches of {batch} clips, {layers} layers of {channels} channels, float16",
            figure("random batches", "cache", "clips/s"),
            figure("random batches", "npz", "clips/s", "one compressed npz a clip"),
            ratios["random batches, cache / npz"],
            figure("random batches", mapped, "clips/s", "memory map"),
            ratios["random batches, cache / memory map"],
            (at_least("ratio", 20), at_least("share", 0.4)),
        ),
        Row(
            "cache", f"the same by {result['settings']['threads']} threads at once",
            figure("several threads", "cache", "clips/s"),
            limit=figure("several threads", mapped, "clips/s", "memory map, as many threads"),
            share=ratios["several threads, cache / memory map"], asked=(at_least("share", 0.6),),
        ),
        Row(
            "cache", f"random batches of {batch} small clips, {result['settings']['many_shards']} shards",
            figure("shards", "many", "clips/s"),
            limit=figure("shards", "few", "clips/s", f"{result['settings']['few_shards']} shards"),
            share=ratios["random batches, many shards / few"], asked=(at_least("share", 0.9),),
        ),
        Row(
            "cache", f"{batch} clips side by side", figure("contiguous", "cache", "clips/s"),
            limit=figure("contiguous", mapped, "clips/s", "memory map"),
            share=ratios["contiguous, cache / memory map"], asked=(at_least("share", 0.6),),
        ),
        Row(
            "cache", f"one layer of {clips} clips", figure("one layer", "cache", "GB/s"),
            limit=figure("one layer", mapped, "GB/s", "memory map"), share=ratios["one layer, cache / memory map"],
            asked=(at_least("measured", 2) + at_least("share", 0.5),),
        ),
        Row(
            "cache", "bytes read for one layer",
            Figure(ratios["one layer, bytes read / bytes of the layer"], "for each of the layer's"),
            limit=Figure(1, "", "no byte of another layer"), share=ratios["one layer, bytes read / bytes of the layer"],
            asked=(at_most("share", 1.1),),
        ),
        Row(
            "cache", "writing, each shard on disk before the next", figure("writing", "cache", "GB/s"),
            limit=figure("writing", "plain write", "GB/s", "plain `write` and fsync"),
            share=ratios["writing, cache / plain write"], asked=(at_least("share", 0.6),),
        ),
    ]  # fmt: skip


def main() -> None:
    parser = arguments(__doc__, clips=256, layers=32, channels=1280, batch=48, rounds=5, repeats=3)
    parser.add_argument("--shard-mb", type=float, default=128)
    parser.add_argument("--few-shards", type=int, default=100)
    parser.add_argument("--many-shards", type=int, default=2000)
    parser.add_argument("--folder", help="where to write; a temporary folder without it")
    options = parser.parse_args()
    found = in_folder(measure, options)
    publish(describe("cache", found, rows, packages=["numpy"]), options.out)


if __name__ == "__main__":
    main()
