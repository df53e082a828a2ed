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
from pathlib import Path

import torch
from machine import machine, publish

from extract import random_weights, synthetic_dataset
from whisper_at_cli import __version__
from whisper_at_cli.extract.backbones.load import WhisperBackbone
from whisper_at_cli.extract.backbones.sizes import WHISPER_SIZES
from whisper_at_cli.extract.devices import choose_device
from whisper_at_cli.extract.pipeline.local import extract


def peak(connection, options: argparse.Namespace, clips: int) -> None:
    """Extract `clips` clips and send the peak memory in bytes and the seconds it took."""
    backbone = WhisperBackbone.from_weights(
        random_weights(options.random_weights), device=choose_device(options.device), precision=options.precision
    )
    with tempfile.TemporaryDirectory() as folder:
        dataset = synthetic_dataset(Path(folder) / "data", clips, options.clip_seconds)
        started = time.perf_counter()
        report = extract(dataset, Path(folder) / "cache.zarr", model=backbone, shard_mb=options.shard_mb)
        assert report.written == clips, report
        seconds = time.perf_counter() - started
    unit = 1 if platform.system() == "Darwin" else 1024
    connection.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, seconds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random-weights", default="base", choices=sorted(WHISPER_SIZES), metavar="SIZE")
    parser.add_argument("--clips", type=int, nargs=2, default=(200, 2000))
    parser.add_argument("--clip-seconds", type=float, default=5.0)
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--shard-mb", type=float, default=128)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    peaks = {}
    for clips in options.clips:
        ours, theirs = context.Pipe()
        process = context.Process(target=peak, args=(theirs, options, clips))
        process.start()
        size, seconds = ours.recv()
        process.join()
        peaks[clips] = {"peak_gb": round(size / 1e9, 3), "clips_per_second": round(clips / seconds, 2)}
    few, many = (peaks[clips]["peak_gb"] for clips in options.clips)
    settings = {name: value for name, value in vars(options).items() if name not in ("out", "clips")}
    result = {
        "benchmark": "memory",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": machine(),
        "versions": {"whisper-at-cli": __version__, "torch": torch.__version__},
        "settings": settings,
        "clips": peaks,
        "growth_gb": round(many - few, 3),
    }
    publish(result, options.out)


if __name__ == "__main__":
    main()
