"""What extraction costs the host: CPU time of a clip, by process and by part, with an encoder that answers at once.

    python benchmarks/host.py
    python benchmarks/host.py --clips 2048 --workers 16

The pipeline runs from audio files in memory to shards, with the shapes of large-v1 in float16 and clips of 10 s. In
place of the encoder stands one that does nothing: what a GPU does by itself (computing, casting, copying into pinned
memory) costs the host no time. What is left is what bounds how fast a GPU can be fed.

main process   CPU ms a clip: handing out and filling shards, and writing them (checksums, system calls)
workers        CPU ms a clip of the decoding processes, without their start
threads        the baseline: the same files decoded by as many threads of one process
processes      the limit: the decoding processes alone, without the pipeline
hand-overs     voluntary context switches of the main process, a clip: how often its threads wait for each other

What it means for more cores is computed, not measured: as many decoding processes as cores, each as fast as here.
Prints JSON.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from decoding import decode_once
from record import Figure, Result, Row, arguments, at_least, at_most, describe, in_folder, publish, rounded
from sounds import write_sound

from whisper_at_cli.extract.audio import SAMPLE_RATE
from whisper_at_cli.extract.backbones.sizes import WHISPER_SIZES
from whisper_at_cli.extract.cache.storage import Stored
from whisper_at_cli.extract.cache.writer import CacheWriter
from whisper_at_cli.extract.datasets import Dataset
from whisper_at_cli.extract.datasets.base import Clip
from whisper_at_cli.extract.machine import cores
from whisper_at_cli.extract.pipeline import shard_run
from whisper_at_cli.extract.pipeline.decode_pool import DecodePool
from whisper_at_cli.extract.pipeline.decode_worker import DONE
from whisper_at_cli.extract.pipeline.local import extract
from whisper_at_cli.extract.pipeline.shard_run import ShardRun

SECONDS = 10.0
SAMPLES = round(SAMPLE_RATE * SECONDS)
FILES = ("wav", "flac", "m4a", "mp3")
MEMORY = Path("/dev/shm")  # noqa: S108 - where there is one, files are read from memory
UNIQUE = 64  # files, read over and over
MORE_CORES = (16, 32, 64)
MOST_MAIN_MS, LEAST_TWO_WORKERS = 1.5, 1.8  # asked


@dataclass
class Instant:
    """A backbone with the shapes of a Whisper. `NoEncoding` stands where it would be called."""

    layers: int
    dim: int
    name: str = "instant"
    weights_sha256: str = "none"
    sample_rate: int = SAMPLE_RATE
    precision: str = "float32"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def encode(self, waveforms: torch.Tensor) -> torch.Tensor:
        raise AssertionError("the encoder is left out")


@dataclass
class Part:
    """CPU time of one method, in whichever thread it runs."""

    seconds: float = 0.0

    def timed(self, method: Callable) -> Callable:
        def call(*args: object, **options: object) -> object:
            started = time.thread_time()
            try:
                return method(*args, **options)
            finally:
                self.seconds += time.thread_time() - started

        return call


class NoEncoding:
    """Stands for `encode_to_host`: what a GPU leaves in the block of a shard, in no time.

    Memory that is used for the first time is filled with numbers, which is not counted; later it is left as it is.
    """

    def __init__(self) -> None:
        self.filled: set[int] = set()  # addresses
        self.filling = Part()

    def __call__(self, _backbone: Instant, _waveforms: torch.Tensor, _dtype: str, out: Stored | None = None) -> Stored:
        assert out is not None, "whole shards are extracted"
        if out.features.data_ptr() not in self.filled:
            self.filled.add(out.features.data_ptr())
            self.filling.timed(out.features.fill_)(1.5)
            self.filling.timed(out.mean.fill_)(1.5)
        out.finite.fill_(True)
        return out


def write_sounds(folder: Path, suffix: str) -> Dataset:
    """Files of noise of one kind, in a folder."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(UNIQUE):
        write_sound(folder / f"{number}.{suffix}", rng, SECONDS)
    return Dataset(suffix, folder, ())


def clips_of(folder: Dataset, clips: int) -> Dataset:
    names = tuple(Clip(id=str(at), path=f"{at % UNIQUE}.{folder.name}") for at in range(clips))
    return Dataset(folder.name, folder.root, names, clip_seconds=SECONDS)


def processes_alone(dataset: Dataset, workers: int) -> tuple[float, float]:
    """Clips/s of so many decoding processes, and their CPU ms a clip, without their start."""
    sources = [(dataset.source(row), SAMPLES) for row in range(len(dataset))]
    with DecodePool(workers) as pool:
        pool.start(len(sources))
        pool.map(decode_once, sources[: 32 * workers])
        used, started = sum(map(cpu_seconds, pool.pids())), time.perf_counter()
        outcomes = pool.map(decode_once, sources)
        seconds = time.perf_counter() - started
        used = sum(map(cpu_seconds, pool.pids())) - used
    assert all(kind == DONE for kind, _ in outcomes)
    return len(sources) / seconds, used / len(sources) * 1e3


def cpu_seconds(pid: int) -> float:
    """Processor time that another process has taken."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def threads_alone(dataset: Dataset, workers: int) -> tuple[float, float]:
    """Clips/s of so many threads of this process that decode, and CPU ms a clip: what there was before processes."""
    with ThreadPoolExecutor(workers) as pool:
        started, used = time.perf_counter(), time.process_time()
        list(pool.map(lambda row: decode_once((dataset.source(row), SAMPLES)), range(len(dataset))))
        seconds, used = time.perf_counter() - started, time.process_time() - used
    return len(dataset) / seconds, used / len(dataset) * 1e3


def pipeline(dataset: Dataset, out: Path, options: argparse.Namespace) -> dict[str, float]:
    """One extraction: CPU ms a clip of the main process, by part, hand-overs, and clips/s."""
    size = WHISPER_SIZES["large-v1"]
    parts, encoder = {"hand out": Part(), "write shards": Part()}, NoEncoding()
    with ExitStack() as stack:
        patch = partial(mock.patch.object, autospec=False)
        stack.enter_context(patch(shard_run, "encode_to_host", encoder))
        stack.enter_context(patch(ShardRun, "_drive", parts["hand out"].timed(ShardRun._drive)))
        stack.enter_context(patch(CacheWriter, "write", parts["write shards"].timed(CacheWriter.write)))
        before, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        report = extract(
            dataset, out, model=Instant(size.layers, size.dim), clip_seconds=SECONDS, workers=options.workers,
            batch_size=options.batch_size,
        )  # fmt: skip
        seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF)
    assert report.written == len(dataset), report
    clips = len(dataset) / 1e3  # CPU ms a clip are seconds a thousand clips
    whole = (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime - encoder.filling.seconds) / clips
    found = {f"main: {name}": part.seconds / clips for name, part in parts.items()}
    rest = {"main: all else": whole - sum(found.values()), "main": whole}
    switches = {"hand-overs": (after.ru_nvcsw - before.ru_nvcsw) / len(dataset), "clips/s": len(dataset) / seconds}
    return found | rest | switches


def measure(options: argparse.Namespace, folder: Path) -> Result:
    place = MEMORY if MEMORY.is_dir() else None
    best: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(dir=place) as files:
        for suffix in options.files:
            dataset = clips_of(write_sounds(Path(files) / suffix, suffix), options.clips)
            some = clips_of(dataset, min(options.clips, options.decoded))
            rounds = [
                one_round(dataset, some, folder / f"{suffix}{number}", options) for number in range(options.rounds)
            ]
            best[suffix] = {name: pick([found[name] for found in rounds], name) for name in rounds[0]}
    more = {
        str(number): {suffix: more_cores(best[suffix], number) for suffix in options.files} for number in MORE_CORES
    }
    return {
        "settings": {
            "clips": options.clips, "clip_seconds": SECONDS, "workers": options.workers, "rounds": options.rounds,
            "batch_size": options.batch_size, "shapes": "large-v1", "dtype": "float16",
            "files_in": "memory" if place else "a folder",
            "shards_in": "a folder that was given" if options.folder else "a temporary folder",
        },
        "found": {suffix: {name: rounded(value) for name, value in values.items()} for suffix, values in best.items()},
        "computed clips/s with more cores": more,
    }  # fmt: skip


def pick(values: list[float], name: str) -> float:
    """The best of the rounds: rates are best when high, costs when low."""
    return max(values) if "clips/s" in name else min(values)


def one_round(dataset: Dataset, some: Dataset, out: Path, options: argparse.Namespace) -> dict[str, float]:
    found = pipeline(dataset, out, options)
    for file in sorted(out.rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()
    for workers in sorted({1, options.workers}):
        rate, used = processes_alone(some, workers)
        found |= {f"processes, {workers}: clips/s": rate, f"processes, {workers}: CPU ms": used}
    rate, used = threads_alone(some, options.workers)
    return found | {"threads: clips/s": rate, "threads: CPU ms": used}


def more_cores(found: dict[str, float], number: int) -> float:
    """Clips/s that so many cores could feed an encoder that takes none of them: what bounds it first."""
    workers = found[max(name for name in found if name.startswith("processes, ") and name.endswith("CPU ms"))]
    decoding = (number - 1) * 1e3 / workers
    writing = shard_run.MOST_WRITERS * 1e3 / found["main: write shards"]
    handing_out = 1e3 / (found["main: hand out"] + found["main: all else"])
    return rounded(min(decoding, writing, handing_out), 3)


def rows(result: Result) -> list[Row]:
    used, found = result["settings"], result["found"]
    on = f"10 s files in {used['files_in']}, `large-v1` shapes, float16, no encoder"
    first, many = next(iter(found)), used["workers"]
    own, threads = (
        [values[name] for values in found.values()] for name in (f"processes, {many}: CPU ms", "threads: CPU ms")
    )
    lines = [
        Row(
            "host", f"CPU time of the main process for a clip of {first.upper()}, {on}",
            Figure(found[first]["main"], "ms"), Figure(found[first]["threads: CPU ms"], "ms", "threads decode"),
            rounded(found[first]["main"] / found[first]["threads: CPU ms"], 3),
            asked=(at_most("measured", MOST_MAIN_MS),),
        ),
        Row(
            "host", f"CPU time of a decoding process for a clip of {', '.join(name.upper() for name in found)}",
            Figure(own, "ms"), Figure(threads, "ms", "of threads that decode"),
            [rounded(ours / theirs, 3) for ours, theirs in zip(own, threads, strict=True)],
        ),
    ]  # fmt: skip
    if many > 1:
        one, all_of_them = (
            [values[f"processes, {number}: clips/s"] for values in found.values()] for number in (1, many)
        )
        lines.append(
            Row(
                "host", f"decoding {', '.join(name.upper() for name in found)} by {many} processes",
                Figure(all_of_them, "clips/s"), Figure(one, "clips/s", "one process"),
                [rounded(several / alone, 3) for several, alone in zip(all_of_them, one, strict=True)],
                asked=(at_least("ratio", LEAST_TWO_WORKERS),) if many == 2 else (),
            )
        )  # fmt: skip
    return lines


def main() -> None:
    parser = arguments(__doc__, clips=1024, rounds=3, batch_size=64, workers=cores(), decoded=512)
    parser.add_argument("--files", nargs="+", choices=FILES, default=FILES)
    parser.add_argument("--folder", type=Path, help="for the shards  [default: a temporary one]")
    options = parser.parse_args()
    found = in_folder(measure, options)
    publish(describe("host", found, rows, packages=["torch", "numpy", "av"]), options.out)


if __name__ == "__main__":
    main()
