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
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from record import Figure, Result, Row, arguments, best_of, describe, in_folder, publish, settings

from whisper_at_cli.extract.cache.shards import ShardFile, shard_buffers
from whisper_at_cli.extract.cache.store import LocalStore

CHOSEN = (1, 1)
TASKS = ("random batches", "contiguous", "one layer", "one layer, random")


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


def draw(task: str, options: argparse.Namespace, rng: np.random.Generator) -> tuple[np.ndarray, Sequence[int]]:
    """The clips and layers that one reading of a task wants."""
    N, B, one = options.clips, options.batch, [options.layers // 2]
    if task == "contiguous":
        return np.arange(B) + int(rng.integers(0, N - B + 1)), range(options.layers)
    if task == "one layer":
        return np.arange(N), one
    return rng.permutation(N)[:B], range(options.layers) if task == "random batches" else one


def bytes_of_reading(form: ChunkedFeatures, task: str, options: argparse.Namespace, rng: np.random.Generator) -> int:
    """Read what a task wants, and say how many bytes that took."""
    return form.read(*draw(task, options, rng))[1]


def laid_out(options: argparse.Namespace, folder: Path) -> dict[tuple[int, int], ChunkedFeatures]:
    """Shape of a chunk -> the same random features in such chunks, checked."""
    N, L, S = options.clips, options.layers, options.per_shard
    rng = np.random.default_rng(0)
    features = rng.integers(0, 2**14, size=(N, L, 25, options.channels), dtype=np.uint16).view(np.float16)
    shapes = list(dict.fromkeys([CHOSEN, (1, 4), (1, L), (4, 1), (S, 1), (S, L)]))
    forms = {shape: ChunkedFeatures(folder / f"{shape[0]}x{shape[1]}", features, shape, S) for shape in shapes}
    some = rng.permutation(N)[:7]
    for form in forms.values():
        got, _ = form.read(some, [0, L - 1])
        assert (got.view(np.uint16) == features[some][:, [0, L - 1]].view(np.uint16)).all()
    return forms


def measure(options: argparse.Namespace, folder: Path) -> Result:
    forms, rng = laid_out(options, folder), np.random.default_rng(1)
    work: dict[tuple[str, tuple[int, int]], Callable[[], int]] = {
        (task, shape): functools.partial(bytes_of_reading, form, task, options, rng)
        for task in TASKS
        for shape, form in forms.items()
    }
    best = best_of(options.rounds, work, dict.fromkeys(work, options.repeats))
    layer_bytes = 25 * options.channels * 2
    useful = {
        "random batches": options.batch * options.layers * layer_bytes,
        "contiguous": options.batch * options.layers * layer_bytes,
        "one layer": options.clips * layer_bytes,
        "one layer, random": options.batch * layer_bytes,
    }

    def of_task(task: str, shape: tuple[int, int]) -> dict[str, float]:
        found = best[task, shape]
        return {
            "useful GB/s": round(useful[task] / found.seconds / 1e9, 3),
            "time / time of (1, 1)": round(found.seconds / best[task, CHOSEN].seconds, 2),
            "bytes read / useful": round(found.result / useful[task], 2),
        }

    return {
        "settings": settings(options) | {"dtype": "float16"},
        "shapes": [
            {"clips": shape[0], "layers": shape[1], **{task: of_task(task, shape) for task in TASKS}} for shape in forms
        ],
    }


def rows(result: Result) -> list[Row]:
    def row(shape: dict) -> Row:
        chosen = (shape["clips"], shape["layers"]) == CHOSEN
        of = {
            key: [shape[task][key] for task in TASKS]
            for key in ("useful GB/s", "time / time of (1, 1)", "bytes read / useful")
        }
        name = (
            f"{shape['clips']} clip{'s' * (shape['clips'] > 1)} x {shape['layers']} layer{'s' * (shape['layers'] > 1)}"
        )
        return Row(
            "chunks", f"chunks of {name}: random batches / contiguous / one layer / one layer of random clips",
            Figure(of["useful GB/s"], "GB/s"),
            None if chosen else Figure(None, "", "time of chunks of 1 clip x 1 layer"),
            None if chosen else of["time / time of (1, 1)"],
            Figure(1, "", "bytes read for each useful one"), of["bytes read / useful"],
        )  # fmt: skip

    return [row(shape) for shape in result["shapes"]]


def main() -> None:
    parser = arguments(__doc__, clips=256, layers=32, channels=1280, batch=48, per_shard=64, rounds=5, repeats=2)
    parser.add_argument("--folder", help="where to write; a temporary folder without it")
    options = parser.parse_args()
    found = in_folder(measure, options)
    publish(describe("chunks", found, rows, packages=["numpy"]), options.out)


if __name__ == "__main__":
    main()
