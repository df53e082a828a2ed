"""Whether extraction takes more memory for more clips: peak memory for 200 and for 2,000 synthetic clips, in one run.

    python benchmarks/memory.py
    python benchmarks/memory.py --random-weights large-v1 --clips 200 20000 --device cuda

Each number of clips is extracted in a process of its own, whose highest resident set is read at the end. Prints JSON.
"""

from __future__ import annotations

import argparse
import multiprocessing
import platform
import resource
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

from record import Figure, Result, Row, arguments, at_most, describe, gpu_name, publish, settings
from synthetic import random_weights, synthetic_dataset

from whisper_at_cli.extract.backbones.load import WhisperBackbone
from whisper_at_cli.extract.backbones.sizes import WHISPER_SIZES
from whisper_at_cli.extract.devices import choose_device
from whisper_at_cli.extract.pipeline.local import extract


def peak(connection: Connection, options: argparse.Namespace, clips: int) -> None:
    """Extract `clips` clips and send the peak memory in bytes and the seconds it took."""
    backbone = WhisperBackbone.from_weights(
        random_weights(options.random_weights), device=choose_device(options.device), precision=options.precision
    )
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        dataset = synthetic_dataset(Path(folder) / "data", clips, options.clip_seconds, distinct=options.distinct)
        started = time.perf_counter()
        report = extract(dataset, Path(folder) / "cache.zarr", model=backbone, shard_mb=options.shard_mb)
        assert report.written == clips, report
        seconds = time.perf_counter() - started
    unit = 1 if platform.system() == "Darwin" else 1024
    connection.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, seconds))


def measure(options: argparse.Namespace) -> Result:
    context, peaks = multiprocessing.get_context("spawn"), {}
    for clips in options.clips:
        ours, theirs = context.Pipe()
        process = context.Process(target=peak, args=(theirs, options, clips))
        process.start()
        theirs.close()
        size, seconds = ours.recv()
        process.join()
        peaks[clips] = {"peak_gb": round(size / 1e9, 3), "clips_per_second": round(clips / seconds, 2)}
    few, many = (peaks[clips]["peak_gb"] for clips in options.clips)
    return {
        "settings": settings(options, "clips"),
        "clips": peaks,
        "growth_gb": round(many - few, 3),
        "ratio": round(many / few, 3),
    }


def rows(result: Result) -> list[Row]:
    (few, less), (many, _) = result["clips"].items()
    of = f"`{result['settings']['random_weights']}` shapes, {result['settings']['precision']}"
    return [
        Row(
            "memory", f"peak memory with {many} clips, above that with {few}; {of}",
            Figure(result["growth_gb"], "GB"), Figure(less["peak_gb"], "GB", f"the peak with {few}"), result["ratio"],
            Figure(0, "GB", "no growth"), asked=(at_most("measured", 1.5),),
        )
    ]  # fmt: skip


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--random-weights", default="base", choices=sorted(WHISPER_SIZES), metavar="SIZE")
    parser.add_argument("--clips", type=int, nargs=2, default=(200, 2000))
    parser.add_argument("--clip-seconds", type=float, default=5.0)
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--shard-mb", type=float, default=128)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--distinct", type=int, help="write so many files, which the clips use in turn")
    parser.add_argument("--folder", help="where to write; a temporary folder without it")
    options = parser.parse_args()
    found, gpu = measure(options), gpu_name(choose_device(options.device))
    publish(describe("memory", found, rows, packages=["torch"], gpu=gpu), options.out)


if __name__ == "__main__":
    main()
