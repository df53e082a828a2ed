"""Which chunk shape a cache should have: the same shards, cut into chunks of several shapes, read in four ways.

    python benchmarks/chunks.py
    python benchmarks/chunks.py --clips 2048 --folder /data/scratch

A chunk is the smallest thing that can be read and whose CRC-32C can be checked: reading one layer from chunks that hold
all layers reads all layers. Shapes are (clips, layers) of a chunk; each always holds all frames and channels. Data of
(clips, layers, 25, channels) float16, page cache warm; each thing is measured in turn, several rounds, and the
best round of each counts.

random batches      48 clips drawn at random, all layers        (Transformer heads, random access)
contiguous          48 clips side by side, all layers           (streaming)
one layer           one layer of all clips                      (probes on frames, attentive probes)
one layer, random   one layer of 48 clips drawn at random       (Last-MLP on frames)

Prints JSON: useful GB/s, and how many bytes are read for each useful one.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from machine import machine, publish

from whisper_at_cli import __version__
from whisper_at_cli.extract.cache.shards import ShardFile, shard_buffers
from whisper_at_cli.extract.cache.store import LocalStore

CHOSEN = (1, 1)


class ChunkedFeatures:
    """Features (N, L, T, D) in shard files of `per_shard` clips, in chunks of (clips, layers, T, D)."""

    def __init__(self, folder: Path, features: np.ndarray, shape: tuple[int, int], per_shard: int):
        N, L, T, D = features.shape
        self.shape, self.per_shard, self.frame_shape = shape, per_shard, (T, D)
        self.across = L // shape[1]  # chunks side by side in the layer dimension
        folder.mkdir()
        store = LocalStore(folder)
        count = per_shard // shape[0] * self.across
        self.chunk_bytes = shape[0] * shape[1] * T * D * 2
        self.shards = []
        for number, start in enumerate(range(0, N, per_shard)):
            grid = features[start : start + per_shard].reshape(-1, shape[0], self.across, shape[1], T, D)
            chunks = np.ascontiguousarray(grid.transpose(0, 2, 1, 3, 4, 5)).reshape(count, -1)
            with open(folder / str(number), "wb") as file:
                file.writelines(shard_buffers(chunks, np.ones(count, dtype=bool)))
            self.shards.append(ShardFile(store, str(number), chunk_count=count, chunk_bytes=self.chunk_bytes))

    def read(self, rows: np.ndarray, layers: Sequence[int]) -> tuple[np.ndarray, int]:
        """(n, len(layers), T, D) float16, and the bytes of the chunks that were read for it. Rows in any order."""
        c, k = self.shape
        columns = np.unique(np.asarray(layers) // k)
        out = np.empty((len(rows), len(layers), *self.frame_shape), dtype=np.float16)
        read = 0
        order = np.argsort(rows, kind="stable")
        shard_of = rows // self.per_shard
        for shard in np.unique(shard_of):
            at = order[shard_of[order] == shard]
            within = rows[at] % self.per_shard
            lines, line_of = np.unique(within // c, return_inverse=True)
            chunks = (lines[:, None] * self.across + columns).ravel()
            whole = c == 1 and len(layers) == len(columns) * k and len(lines) == len(at)
            if whole and (np.diff(at) == 1).all():  # straight into the result
                self.shards[shard].read(chunks.tolist(), out[at[0] : at[-1] + 1].reshape(len(chunks), -1))
            else:
                buffer = np.empty((len(lines), len(columns), c, k, *self.frame_shape), dtype=np.float16)
                self.shards[shard].read(chunks.tolist(), buffer.reshape(len(chunks), -1))
                for number, layer in enumerate(layers):
                    column = int(np.searchsorted(columns, layer // k))
                    out[at, number] = buffer[line_of, column, within % c, layer % k]
            read += len(chunks) * self.chunk_bytes
        return out, read


def measure(options: argparse.Namespace, folder: Path) -> dict:
    N, L, T, D, B = options.clips, options.layers, 25, options.channels, options.batch
    rng = np.random.default_rng(0)
    features = rng.integers(0, 2**14, size=(N, L, T, D), dtype=np.uint16).view(np.float16)
    S = options.per_shard
    shapes = list(dict.fromkeys([CHOSEN, (1, L), (1, 4), (4, 1), (S, 1), (S, L)]))
    laid_out = {shape: ChunkedFeatures(folder / f"{shape[0]}x{shape[1]}", features, shape, S) for shape in shapes}
    every = range(L)
    tasks = {
        "random batches": lambda: (rng.permutation(N)[:B], every),
        "contiguous": lambda: (np.arange(B) + int(rng.integers(0, N - B + 1)), every),
        "one layer": lambda: (np.arange(N), [L // 2]),
        "one layer, random": lambda: (rng.permutation(N)[:B], [L // 2]),
    }
    rows = rng.permutation(N)[:7]
    for data in laid_out.values():
        got, _ = data.read(rows, [0, L - 1])
        assert (got.view(np.uint16) == features[rows][:, [0, L - 1]].view(np.uint16)).all()
    clip_bytes = features[0].nbytes
    del features
    seconds: dict[tuple[tuple[int, int], str], list[float]] = {(shape, task): [] for shape in shapes for task in tasks}
    reads: dict = {}
    for _ in range(options.rounds):
        for task, draw in tasks.items():
            for shape, data in laid_out.items():
                wanted = [draw() for _ in range(options.repeats)]
                started = time.perf_counter()
                read = [data.read(*each)[1] for each in wanted]
                seconds[shape, task].append((time.perf_counter() - started) / options.repeats)
                reads[shape, task] = read[0]
    useful = {
        "random batches": B * clip_bytes, "contiguous": B * clip_bytes,
        "one layer": N * clip_bytes / L, "one layer, random": B * clip_bytes / L,
    }  # fmt: skip
    return {
        "benchmark": "chunks",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": machine(),
        "versions": {"whisper-at-cli": __version__, "numpy": np.__version__},
        "settings": {
            "shape": [N, L, T, D], "dtype": "float16", "batch": B, "clips_per_shard": S,
            "rounds": options.rounds, "repeats": options.repeats,
        },
        "shapes": [
            {
                "clips": shape[0],
                "layers": shape[1],
                **{
                    task: {
                        "useful GB/s": round(useful[task] / min(seconds[shape, task]) / 1e9, 3),
                        "time / time of (1, 1)": round(min(seconds[shape, task]) / min(seconds[CHOSEN, task]), 2),
                        "bytes read / useful": round(reads[shape, task] / useful[task], 2),
                    }
                    for task in tasks
                },
            }
            for shape in shapes
        ],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (
        ("clips", 256),
        ("layers", 32),
        ("channels", 1280),
        ("batch", 48),
        ("per-shard", 64),
        ("rounds", 5),
        ("repeats", 2),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--folder", help="where to write; a temporary folder without it")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        result = measure(options, Path(folder))
    publish(result, options.out)


if __name__ == "__main__":
    main()
