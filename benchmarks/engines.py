"""What the Ray engine costs beside the local one, and how a cluster would scale.

    python benchmarks/engines.py
    python benchmarks/engines.py --random-weights base --clips 600 --workers 1 --workers 2

*Measured*: the same synthetic clips and random weights of Whisper's shapes, extracted by both engines, each pinned to
as many cores as it has workers, alternating, several rounds, best round counts. Time runs from the first shard handed
out to the last one written, so neither loading the model nor starting Ray counts.

*Simulated*: AudioSet-2M on 1 to 256 workers, event by event, as the engine hands out shards: two a worker, a lost
worker's shards to others. Shard times are drawn from the measured ones, scaled to `--shard-seconds`; a share of the
workers is slower, and workers are lost and come back. Drawn in `--figure`.

Prints JSON.
"""

from __future__ import annotations

import argparse
import heapq
import multiprocessing
import os
import tempfile
import time
from pathlib import Path

import numpy as np
from machine import machine, publish

from whisper_at_cli import __version__

AUDIOSET_SHARDS = 32259  # two million clips of large-v1, 62 a shard


def write_model(folder: Path, size: str) -> Path:
    """A `.pt` file of random weights in the shapes of one Whisper size."""
    import torch
    from whisper.model import ModelDimensions, Whisper

    from whisper_at_cli.extract.backbones.sizes import WHISPER_SIZES

    sizes = WHISPER_SIZES[size]
    dims = dict(
        n_mels=sizes.mels, n_audio_ctx=1500, n_audio_state=sizes.dim, n_audio_head=sizes.heads,
        n_audio_layer=sizes.layers, n_vocab=51865, n_text_ctx=8, n_text_state=sizes.dim, n_text_head=sizes.heads,
        n_text_layer=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Whisper(ModelDimensions(**dims))
    torch.save({"dims": dims, "model_state_dict": model.state_dict()}, folder / f"{size}.pt")
    return folder / f"{size}.pt"


def write_sounds(folder: Path, clips: int, seconds: float) -> Path:
    import wave

    rng = np.random.default_rng(0)
    (folder / "sounds" / "noise").mkdir(parents=True)
    for number in range(clips):
        with wave.open(str(folder / "sounds" / "noise" / f"{number:05d}.wav"), "wb") as file:
            file.setparams((1, 2, 16000, 0, "NONE", ""))
            file.writeframes(rng.integers(-9000, 9000, round(seconds * 16000), dtype=np.int16).tobytes())
    return folder / "sounds"


def run_engine(engine: str, workers: int, arguments: dict, messages) -> None:
    """In a process of its own, pinned to `workers` cores: seconds of the extraction, and when each shard was done."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:workers])
    steps = []

    def progress(done: int, total: int, message: str = "") -> None:
        steps.append((time.perf_counter(), done))

    if engine == "ray":
        import ray

        from whisper_at_cli.extract.pipeline.ray_engine import extract_on_ray

        ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        extract_on_ray(progress=progress, encoders=workers, **arguments)
    else:
        from whisper_at_cli.extract import extract

        extract(progress=progress, **arguments)
    messages.put((steps[-1][0] - steps[0][0], steps))


def measure(options: argparse.Namespace, folder: Path) -> dict:
    model = write_model(folder, options.random_weights)
    sounds = write_sounds(folder, options.clips, options.clip_seconds)
    context, seconds, shard_times = multiprocessing.get_context("spawn"), {}, []
    for number in range(options.rounds):
        for workers in options.workers:
            for engine in ("local", "ray"):
                messages = context.Queue()
                arguments = dict(
                    dataset=sounds, cache=folder / f"{engine}{workers}-{number}.zarr", model=model,
                    clip_seconds=options.clip_seconds, shard_mb=options.shard_mb,
                )  # fmt: skip
                process = context.Process(target=run_engine, args=(engine, workers, arguments, messages))
                process.start()
                took, steps = messages.get(timeout=600)
                process.join()
                seconds.setdefault((engine, workers), []).append(took)
                if engine == "ray" and workers == 1:
                    shard_times += np.diff([at for at, _ in steps]).tolist()
    rates = {
        engine: {workers: round(options.clips / min(seconds[engine, workers]), 2) for workers in options.workers}
        for engine in ("local", "ray")
    }
    return {
        "settings": {
            "weights": f"random, shapes of {options.random_weights}", "clips": options.clips,
            "clip_seconds": options.clip_seconds, "shard_mb": options.shard_mb, "rounds": options.rounds,
        },
        "clips_per_second_by_workers": rates,
        "ray / local": {
            workers: round(rates["ray"][workers] / rates["local"][workers], 3) for workers in options.workers
        },
        "shard_seconds": [round(value, 3) for value in shard_times],
    }  # fmt: skip


class Simulation:
    """A cluster at work, event by event. Each worker holds up to `each` shards and works on one."""

    def __init__(self, workers, shards, shard_times, rng, *, slow_share, slow_factor, losses_per_hour, away_seconds):
        self.rng, self.shard_times, self.each = rng, shard_times, 2
        self.slowness = np.where(rng.random(workers) < slow_share, slow_factor, 1.0)
        self.losses_per_hour, self.away_seconds = losses_per_hour, away_seconds
        self.queue, self.life, self.up = [0] * workers, [0] * workers, [True] * workers
        self.waiting, self.left, self.redone, self.now = shards, shards, 0, 0.0
        self.events: list[tuple[float, int, str, int]] = []  # when, which worker, what, in which of its lives

    def run(self) -> tuple[float, int]:
        """Seconds until all shards are done, and how many had to be done again."""
        for worker in range(len(self.queue)):
            self._come(worker)
        while self.left:
            self.now, worker, what, life = heapq.heappop(self.events)
            if what == "back":
                self._come(worker)
            elif life == self.life[worker]:
                self._finish(worker) if what == "done" else self._go(worker)
        return self.now, self.redone

    def _at(self, delay: float, worker: int, what: str) -> None:
        heapq.heappush(self.events, (self.now + delay, worker, what, self.life[worker]))

    def _come(self, worker: int) -> None:
        self.up[worker] = True
        if self.losses_per_hour:
            self._at(self.rng.exponential(3600 / self.losses_per_hour), worker, "lost")
        self._fill(worker)

    def _go(self, worker: int) -> None:
        """Lost, with what it held; others that have room take that over."""
        self.waiting += self.queue[worker]
        self.redone += self.queue[worker]
        self.queue[worker], self.up[worker] = 0, False
        self.life[worker] += 1
        self._at(self.away_seconds, worker, "back")
        for other in range(len(self.queue)):
            self._fill(other)

    def _finish(self, worker: int) -> None:
        self.left -= 1
        self.queue[worker] -= 1
        if self.queue[worker]:
            self._start(worker)
        self._fill(worker)

    def _fill(self, worker: int) -> None:
        take = min(self.each - self.queue[worker], self.waiting) if self.up[worker] else 0
        idle = not self.queue[worker]
        self.queue[worker] += take
        self.waiting -= take
        if idle and take:
            self._start(worker)

    def _start(self, worker: int) -> None:
        self._at(self.rng.choice(self.shard_times) * self.slowness[worker], worker, "done")


def simulated(options: argparse.Namespace, shard_times: np.ndarray) -> list[dict]:
    """Hours and efficiency for each number of workers: smooth, and with slow and lost ones."""
    times = shard_times / shard_times.mean() * options.shard_seconds
    kinds = {
        "all alike": dict(slow_share=0.0, slow_factor=1.0, losses_per_hour=0.0, away_seconds=0.0),
        "stragglers": dict(slow_share=0.05, slow_factor=3.0, losses_per_hour=0.0, away_seconds=0.0),
        "stragglers and losses": dict(slow_share=0.05, slow_factor=3.0, losses_per_hour=0.5, away_seconds=300.0),
    }
    rows = []
    for workers in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        row = {"workers": workers, "ideal_hours": round(options.shards * times.mean() / workers / 3600, 3)}
        for name, kind in kinds.items():
            runs = [
                Simulation(workers, options.shards, times, np.random.default_rng(i), **kind).run() for i in range(3)
            ]
            hours = float(np.median([seconds for seconds, _ in runs])) / 3600
            row[name] = {
                "hours": round(hours, 3),
                "efficiency": round(row["ideal_hours"] / hours, 3),
                "shards_done_again": int(np.median([redone for _, redone in runs])),
            }
        rows.append(row)
    return rows


def draw(rows: list[dict], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4, 2.5), layout="constrained")
    axes = figure.add_subplot()
    workers = [row["workers"] for row in rows]
    styles = {"all alike": ("#0072B2", "o"), "stragglers": ("#D55E00", "s"), "stragglers and losses": ("#009E73", "^")}
    styles = {"all alike": ("#0072B2", "o"), "stragglers": ("#D55E00", "s"), "stragglers and losses": ("#009E73", "^")}
    for name, (colour, marker) in styles.items():
        share = [100 * row[name]["efficiency"] for row in rows]
        axes.plot(workers, share, color=colour, marker=marker, markersize=3, linewidth=1.2, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(workers, [str(number) for number in workers])
    axes.set_ylim(80, 101)
    axes.set_xlabel("Workers", fontsize=8)
    axes.set_ylabel("Of the ideal speed (%), simulated", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.grid(color="0.92", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=200)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random-weights", default="base", help="Whisper size whose shapes are used")
    parser.add_argument("--clips", type=int, default=400)
    parser.add_argument("--clip-seconds", type=float, default=5.0)
    parser.add_argument("--shard-mb", type=float, default=4.0)
    parser.add_argument("--workers", type=int, action="append", help="repeatable; 1 and 2 by default")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shards", type=int, default=AUDIOSET_SHARDS, help="of the simulated job")
    parser.add_argument(
        "--shard-seconds", type=float, default=52.1, help="62 clips at 1.19 clips/s: measured, two cores"
    )
    parser.add_argument("--figure", type=Path, help="draw the simulation here")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    options = parser.parse_args()
    options.workers = options.workers or [1, 2]
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(options, Path(folder))
    rows = simulated(options, np.array(measured["shard_seconds"]))
    result = {
        "benchmark": "engines",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": machine(),
        "versions": {"whisper-at-cli": __version__, "numpy": np.__version__},
        "measured": measured,
        "simulated": {"shards": options.shards, "shard_seconds": options.shard_seconds, "rows": rows},
    }
    if options.figure:
        draw(rows, options.figure)
    publish(result, options.out)


if __name__ == "__main__":
    main()
