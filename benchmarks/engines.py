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
import logging
import multiprocessing
import os
import tempfile
import time
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import numpy as np
from record import Figure, Result, Row, arguments, at_least, describe, gpu_name, publish, settings
from synthetic import synthetic_dataset, write_model

AUDIOSET_SHARDS = 32259  # two million clips of large-v1, 62 a shard
ENGINES = ("local", "ray")
SIMULATED = ("all alike", "stragglers", "stragglers and losses")


def run_engine(engine: str, workers: int, options: dict[str, Any], messages: Queue) -> None:
    """In a process of its own, pinned to `workers` cores: seconds of the extraction, and when each shard was done.

    With encoders on GPUs nothing is pinned: all cores decode for them.
    """
    on_gpu = options["device"].startswith("cuda")
    if not on_gpu:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:workers])
    steps = []

    def progress(done: int, *_: object) -> None:
        steps.append((time.perf_counter(), done))

    if engine == "ray":
        import ray

        from whisper_at_cli.extract.pipeline.ray_engine import extract_on_ray

        cpus = None if on_gpu else workers  # without a number, Ray counts them itself
        ray.init(num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        extract_on_ray(progress=progress, encoders=workers, **options)
    else:
        from whisper_at_cli.extract import extract

        extract(progress=progress, **options)
    messages.put((steps[-1][0] - steps[0][0], steps))


def measure(options: argparse.Namespace, folder: Path) -> Result:
    model = write_model(folder, options.random_weights)
    sounds = synthetic_dataset(folder / "sounds", options.clips, options.clip_seconds)
    context = multiprocessing.get_context("spawn")
    seconds: dict[tuple[str, int], list[float]] = {}
    shard_times: list[float] = []
    for number in range(options.rounds):
        for workers in options.workers:
            for engine in ENGINES:
                messages = context.Queue()
                of_extract = {
                    "dataset": sounds, "cache": folder / f"{engine}{workers}-{number}.zarr", "model": model,
                    "clip_seconds": options.clip_seconds, "shard_mb": options.shard_mb,
                    "device": options.device, "precision": options.precision,
                }  # fmt: skip
                process = context.Process(target=run_engine, args=(engine, workers, of_extract, messages))
                process.start()
                took, steps = messages.get(timeout=600)
                process.join()
                seconds.setdefault((engine, workers), []).append(took)
                if engine == "ray" and workers == 1:
                    shard_times += np.diff([at for at, _ in steps]).tolist()
    rates = {
        engine: {workers: round(options.clips / min(seconds[engine, workers]), 2) for workers in options.workers}
        for engine in ENGINES
    }
    return {
        "settings": settings(options, "shards", "shard_seconds"),
        "clips_per_second_by_workers": rates,
        "ray / local": {
            workers: round(rates["ray"][workers] / rates["local"][workers], 3) for workers in options.workers
        },
        "shard_seconds": [round(value, 3) for value in shard_times],
    }


class Simulation:
    """A cluster at work, event by event. Each worker holds up to `each` shards and works on one."""

    def __init__(
        self, workers: int, shards: int, shard_times: np.ndarray, rng: np.random.Generator, *, slow_share: float,
        slow_factor: float, losses_per_hour: float, away_seconds: float,
    ) -> None:  # fmt: skip
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


def simulated(options: argparse.Namespace, shard_times: np.ndarray) -> list[dict[str, Any]]:
    """Hours and efficiency for each number of workers: smooth, and with slow and lost ones."""
    times = shard_times / shard_times.mean() * options.shard_seconds
    smooth = {"slow_share": 0.0, "slow_factor": 1.0, "losses_per_hour": 0.0, "away_seconds": 0.0}
    stragglers = smooth | {"slow_share": 0.05, "slow_factor": 3.0}
    losses = stragglers | {"losses_per_hour": 0.5, "away_seconds": 300.0}
    found = []
    for workers in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        ideal = round(options.shards * times.mean() / workers / 3600, 3)
        row: dict[str, Any] = {"workers": workers, "ideal_hours": ideal}
        for name, kind in zip(SIMULATED, (smooth, stragglers, losses), strict=True):
            runs = [
                Simulation(workers, options.shards, times, np.random.default_rng(i), **kind).run() for i in range(3)
            ]
            hours = float(np.median([seconds for seconds, _ in runs])) / 3600
            row[name] = {
                "hours": round(hours, 3),
                "efficiency": round(ideal / hours, 3),
                "shards_done_again": int(np.median([redone for _, redone in runs])),
            }
        found.append(row)
    return found


def rows(result: Result) -> list[Row]:
    rates, simulated_rows = result["measured"]["clips_per_second_by_workers"], result["simulated"]["rows"]
    used = result["measured"]["settings"]
    of = f"`{used['random_weights']}` shapes, {used.get('device', 'cpu')}"
    alone = rates["local"].get("1")
    found = []
    for workers, rate in rates["ray"].items():
        limit = Figure(round(alone * int(workers), 2), "clips/s", f"{workers} x one local worker") if alone else None
        found.append(
            Row(
                "engines", f"the Ray engine, {of}, {workers} worker{'s' * (workers != '1')}",
                Figure(rate, "clips/s"), Figure(rates["local"][workers], "clips/s", "the local engine"),
                result["measured"]["ray / local"][workers], limit, round(rate / limit.value, 3) if limit else None,
                (at_least("ratio", 0.9),),
            )
        )  # fmt: skip
    shown = [row for row in simulated_rows if row["workers"] in (1, 8, 64, 256)]
    counts = " / ".join(str(row["workers"]) for row in shown)
    found += [
        Row(
            "engines", f"simulated, not measured: AudioSet-2M on {counts} workers, {kind}",
            Figure([row[kind]["hours"] for row in shown], "hours"),
            limit=Figure([row["ideal_hours"] for row in shown], "hours", "all alike and none lost"),
            share=[row[kind]["efficiency"] for row in shown],
        )
        for kind in SIMULATED
    ]  # fmt: skip
    return found


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4, 2.5), layout="constrained")
    axes = figure.add_subplot()
    workers = [row["workers"] for row in rows]
    styles = zip(SIMULATED, ("#0072B2", "#D55E00", "#009E73"), "os^", strict=True)
    for name, colour, marker in styles:
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
    parser = arguments(__doc__, clips=400, rounds=3, shards=AUDIOSET_SHARDS)
    parser.add_argument("--random-weights", default="base", help="Whisper size whose shapes are used")
    parser.add_argument("--clip-seconds", type=float, default=5.0)
    parser.add_argument("--shard-mb", type=float, default=4.0)
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda: then a worker is a GPU and all cores decode")
    parser.add_argument("--workers", type=int, action="append", help="repeatable; 1 and 2 by default")
    parser.add_argument(
        "--shard-seconds", type=float, default=52.1, help="62 clips at 1.19 clips/s: measured, two cores"
    )
    parser.add_argument("--figure", type=Path, help="draw the simulation here")
    options = parser.parse_args()
    options.workers = options.workers or [1, 2]
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(options, Path(folder))
    found = simulated(options, np.array(measured["shard_seconds"]))
    if options.figure:
        draw(found, options.figure)
    simulation = {"shards": options.shards, "shard_seconds": options.shard_seconds, "rows": found}
    result, gpu = {"measured": measured, "simulated": simulation}, gpu_name(options.device)
    publish(describe("engines", result, rows, packages=["torch", "numpy", "ray"], gpu=gpu), options.out)


if __name__ == "__main__":
    main()
