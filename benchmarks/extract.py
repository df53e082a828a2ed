"""How fast extraction is: a baseline, this pipeline, the encoder alone, and the limit, side by side in one run.

    python benchmarks/extract.py --model tiny.en --dataset ../shared/data/esc10
    python benchmarks/extract.py --random-weights base --clip-seconds 5
    python benchmarks/extract.py --random-weights large-v1 --precision auto --clips 4096 --folder /dev/shm

baseline   one ffmpeg process a clip, one clip at a time, OpenAI's blocks in float32, one compressed npz a clip;
           `--baseline-clips 0` leaves it out
pipeline   `extract`: files in, shards on disk, model loading left out on both sides
memory     the same from 16-bit audio that is already in memory, so that decoding is left out (synthetic WAV only)
decoding   the decoding processes alone, into memory that nobody reads; `--decoding-alone` asks for it
encoder    log-mel and encoder on waveforms already in memory, features pooled, nothing stored
limit      the device's matrix products in the same type, turned into clips/s by the encoder's:
           `torch.mm`, and on a CPU the faster routine of oneDNN where there is one

They are measured in turn, several rounds, and each one's best round counts: other work on a shared machine only ever
slows a round down. The pipeline's best round also has its processor time and its context switches. Prints JSON.
"""

from __future__ import annotations

import argparse
import math
import resource
import shutil
import time
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from baseline import Baseline, ffmpeg_in_path
from record import Bound, Figure, Result, Row, arguments, describe, gpu_name, in_folder, in_memory, publish, rounded
from synthetic import InMemory, random_weights, synthetic_dataset

from whisper_at_cli.extract.backbones.encoder import PRECISIONS, clip_samples
from whisper_at_cli.extract.backbones.load import WhisperBackbone
from whisper_at_cli.extract.backbones.routines import PackedLinear
from whisper_at_cli.extract.backbones.sizes import WHISPER_SIZES
from whisper_at_cli.extract.backbones.weights import WhisperWeights, read_weights
from whisper_at_cli.extract.datasets import Dataset, open_dataset
from whisper_at_cli.extract.devices import GPU_STREAMS, choose_device, cores, fitting_batch_size
from whisper_at_cli.extract.doctor.device import encoder_rate, matrix_rate
from whisper_at_cli.extract.pipeline.audio_batches import AudioBatches, Batch, batches_for
from whisper_at_cli.extract.pipeline.decode_pool import CLIPS_EACH, DecodePool
from whisper_at_cli.extract.pipeline.decode_worker import DONE
from whisper_at_cli.extract.pipeline.local import extract
from whisper_at_cli.extract.pipeline.shard_run import BATCHES_AHEAD
from whisper_at_cli.heads.count import encoder_cost

ROUTINES = {"torch.mm": "`torch.mm`", "onednn": "oneDNN with packed weights"}  # the last that there is is the limit
KINDS = {"wav": "WAV", "flac": "FLAC", "mp3": "MP3", "m4a": "M4A", "ogg": "Ogg"}
GPU_CLIPS_PER_SECOND, GPU_SHARE_OF_MATRIX_LIMIT = 400, 0.8  # asked of large-v1, clips of 10 s, on one GPU
GPU_SHARES = {"wav": 0.85, "flac": 0.9}  # of the encoder, or of the decoding processes where those are slower
TINY_CLIPS_PER_SECOND = 1000  # asked of tiny.en on one GPU, clips of 5 s
DECODED_TOGETHER = 64  # clips, at most: as many as a shard of large-v1 has
MAIN_PROCESS_CPU_MS = 1.5  # asked of a clip of 10 s, large-v1
CPU_TIMES_BASELINE = {"float32": 2.2, "bfloat16": 4.0}  # asked of base shapes on two cores
CPU_SHARE_OF_MATRIX_LIMIT = {"bfloat16": 0.4}


@dataclass(frozen=True)
class Run:
    """One run of `extract`; everything but `clips` in units for each clip."""

    seconds: float
    cpu_seconds: float  # of this process, all of its threads
    switches: float  # times that a thread of this process waited for something
    workers_cpu_seconds: float  # of the decoding processes

    def __lt__(self, other: Run) -> bool:
        return self.seconds < other.seconds


def pipeline_run(dataset: Dataset, backbone: WhisperBackbone, out: Path, options: dict[str, Any]) -> Run:
    """`extract` from files to shards. The cache is removed afterwards."""
    own, workers = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    started = time.perf_counter()
    report = extract(dataset, out, model=backbone, **options)
    seconds = time.perf_counter() - started
    assert report.written == len(dataset), report
    own_after, workers_after = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    shutil.rmtree(out)
    cpu, workers_cpu = (
        after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        for before, after in ((own, own_after), (workers, workers_after))
    )
    switches, clips = own_after.ru_nvcsw - own.ru_nvcsw, len(dataset)
    return Run(seconds / clips, cpu / clips, switches / clips, workers_cpu / clips)


def decoding_rate(dataset: Dataset, samples: int, batch_size: int) -> float:
    """Clips/s of the decoding processes alone, as many as `extract` starts, once they have begun."""
    clips, workers, size = len(dataset), cores(), min(batch_size, DECODED_TOGETHER)
    count = GPU_STREAMS + 1 + max(BATCHES_AHEAD, batches_for(workers, size))
    with DecodePool(workers) as pool:
        feed = AudioBatches(pool, dataset, samples=samples, batch_size=size, count=count)
        decode(feed, min(clips, 2 * CLIPS_EACH * workers), size)  # starts the processes
        started = time.perf_counter()
        decode(feed, clips, size)
        seconds = time.perf_counter() - started
        feed.close()
    return clips / seconds


def decode(feed: AudioBatches, clips: int, size: int) -> None:
    """Decode the first clips of a feed's dataset, in batches of this size."""
    batches = deque(Batch(at, range(at, min(at + size, clips))) for at in range(0, clips, size))
    left = len(batches)
    while left:
        while batches and feed.free():
            batch = batches.popleft()
            feed.start(batch, batch.slots)
        while decoded := feed.take():
            assert all(kind == DONE for kind, _ in decoded.outcomes), decoded.outcomes
            feed.release(decoded.batch)
            left -= 1
        if left and not (batches and feed.free()):
            feed.wait()


@dataclass(frozen=True, eq=False)
class Setup:
    """What is measured, and on what."""

    weights: WhisperWeights
    dataset: Dataset
    in_memory: Dataset | None  # synthetic clips without files
    backbone: WhisperBackbone
    clip_seconds: float
    samples: int
    batch_size: int
    routines: tuple[str, ...]  # matrix products whose rate is a limit

    @classmethod
    def of(cls, options: argparse.Namespace, folder: Path) -> Setup:
        device = choose_device(options.device)
        weights = random_weights(options.random_weights) if options.random_weights else read_weights(options.model)
        dataset = chosen_clips(options, folder)
        seconds = options.clip_seconds or dataset.clip_seconds
        samples = clip_samples(seconds)
        with_memory = not options.dataset and options.files == "wav"
        in_memory = InMemory("in memory", folder, dataset.clips) if with_memory else None
        backbone = WhisperBackbone.from_weights(weights, device=device, precision=options.precision)
        dtype = PRECISIONS[backbone.precision]
        packed = (
            ("onednn",) if device.type == "cpu" and PackedLinear.is_right(backbone.dim, backbone.dim, dtype) else ()
        )
        batch_size = options.batch_size or fitting_batch_size(backbone, samples)
        return cls(weights, dataset, in_memory, backbone, seconds, samples, batch_size, ("torch.mm", *packed))

    def flops(self) -> int:
        """Of the encoder's own products, for one clip; one multiply-add is two."""
        return encoder_flops(self.weights, self.backbone, self.clip_seconds)


def encoder_flops(weights: WhisperWeights, backbone: WhisperBackbone, clip_seconds: float) -> int:
    """Of the encoder's own products, for one clip; one multiply-add is two."""
    mels = weights.dims["n_mels"]
    cost = encoder_cost(mels=mels, layers=backbone.layers, dim=backbone.dim, clip_seconds=clip_seconds)
    return 2 * cost.multiply_adds


def chosen_clips(options: argparse.Namespace, folder: Path) -> Dataset:
    """Synthetic clips, or of the given dataset as many as asked for, evenly chosen and as often as asked for."""
    if not options.dataset:
        return synthetic_dataset(
            folder / "data", options.clips, options.clip_seconds, files=options.files, distinct=options.distinct
        )
    dataset = open_dataset(options.dataset)
    clips = dataset.clips
    if options.clips < len(dataset):
        clips = clips[:: len(dataset) // options.clips][: options.clips]
    times = getattr(options, "times", 1)
    if times > 1:
        clips = tuple(replace(clip, id=f"{clip.id}-{number}") for number in range(times) for clip in clips)
    return Dataset(dataset.name, dataset.root, clips, dataset.class_names, dataset.clip_seconds)


def measured_rounds(
    setup: Setup, options: argparse.Namespace, folder: Path
) -> tuple[dict[str, list[float]], dict[str, Run]]:
    """Clips/s of each thing in every round, and FLOP/s of matrix products; and the best run of each pipeline."""
    backbone, dtype = setup.backbone, PRECISIONS[setup.backbone.precision]
    with_baseline = options.baseline_clips > 0
    baseline = Baseline(setup.weights, backbone.device, setup.samples) if with_baseline else None
    datasets = {"pipeline": setup.dataset} | ({"memory": setup.in_memory} if setup.in_memory else {})
    extract_options = {"clip_seconds": setup.clip_seconds, "batch_size": setup.batch_size}
    rounds: dict[str, list[float]] = {}
    best: dict[str, Run] = {}

    def keep(name: str, rate: float) -> None:
        rounds.setdefault(name, []).append(rate)

    started = time.perf_counter()
    for number in range(options.rounds):
        if number and time.perf_counter() - started > options.stop_after:
            break
        if baseline:
            keep("baseline", 1 / baseline.run(setup.dataset, options.baseline_clips, folder / f"npz{number}"))
        for name, dataset in datasets.items():
            run = pipeline_run(dataset, backbone, folder / f"{name}{number}.zarr", extract_options)
            keep(name, 1 / run.seconds)
            best[name] = min(run, best.get(name, run))
        if options.decoding_alone:
            keep("decoding", decoding_rate(setup.dataset, setup.samples, setup.batch_size))
        keep("encoder", encoder_rate(backbone, setup.samples, setup.batch_size, seconds=options.matrix_seconds))
        for routine in setup.routines:
            keep(routine, matrix_rate(backbone.device, dtype, backbone.dim, routine, seconds=options.matrix_seconds))
    return rounds, best


def measure(options: argparse.Namespace, folder: Path) -> Result:
    ffmpeg = ffmpeg_in_path(folder) if options.baseline_clips else None
    setup = Setup.of(options, folder)
    (rounds, runs), flops = measured_rounds(setup, options, folder), setup.flops()
    best = {name: max(values) for name, values in rounds.items()}
    limits = {f"limit by {routine}": best.pop(routine) / flops for routine in setup.routines}
    compared = {"pipeline / baseline": 2, "pipeline / encoder": 3, "memory / encoder": 3, "pipeline / decoding": 3}
    ratios = {
        name: round(best[ours] / best[other], digits)
        for name, digits in compared.items()
        for ours, _, other in [name.partition(" / ")]
        if ours in best and other in best
    }
    synthetic = {} if options.dataset else {"files": options.files, "distinct": options.distinct or options.clips}
    return {
        "settings": {
            "model": setup.weights.name, "dataset": setup.dataset.name, "clips": len(setup.dataset),
            "baseline_clips": min(options.baseline_clips, len(setup.dataset)), "clip_seconds": setup.clip_seconds,
            "precision": setup.backbone.precision, "batch_size": setup.batch_size,
            "device": str(setup.backbone.device), "rounds": len(rounds["encoder"]),
            "ffmpeg": ffmpeg and Path(ffmpeg).name, "gflops_per_clip": round(flops / 1e9, 3), "times": options.times,
            **synthetic,
            "shards_in_memory": in_memory(folder), "files_in_memory": in_memory(setup.dataset.root),
        },
        "clips_per_second": {name: round(value, 2) for name, value in (best | limits).items()},
        "matrix_gflops": {routine: round(max(rounds[routine]) / 1e9, 1) for routine in setup.routines},
        "ratios": ratios | {f"encoder / {name}": round(best["encoder"] / limit, 3) for name, limit in limits.items()},
        "per_clip": {
            name: {
                "wall_ms": rounded(1e3 * run.seconds), "main_process_cpu_ms": rounded(1e3 * run.cpu_seconds),
                "main_process_waits": rounded(run.switches), "workers_cpu_ms": rounded(1e3 * run.workers_cpu_seconds),
            }
            for name, run in runs.items()
        },
        "rounds": {name: [float(f"{value:.4g}") for value in values] for name, values in rounds.items()},
    }  # fmt: skip


def described(used: dict[str, Any]) -> str:
    """What was extracted, with what."""
    once = ", one round" if used["rounds"] == 1 else ""
    data = "ESC-10" if used["dataset"] == "esc50" and used["clips"] % 400 == 0 else used["dataset"]
    if (times := used.get("times", 1)) > 1:
        data += f", {times} times over"
    model = f"`{used['model'].removeprefix('random ')}`" + " shapes" * used["model"].startswith("random ")
    return f"{model}, {used['precision']}, {used['clips']} clips of {used['clip_seconds']:g} s ({data}){once}"


def asked_of(result: Result) -> dict[str, list[Bound]]:
    """Row -> what is asked of it, for the shapes and devices of which anything is."""
    used = result["settings"]
    model, seconds = used["model"], used["clip_seconds"]
    if used["device"] == "cpu" and model == "random base":
        times, share = (given.get(used["precision"]) for given in (CPU_TIMES_BASELINE, CPU_SHARE_OF_MATRIX_LIMIT))
        return {
            "files": [Bound("ratio", at_least=times)] if times else [],
            "encoder": [Bound("share", at_least=share)] if share else [],
        }
    if not used["device"].startswith("cuda"):
        return {}
    if "large-v1" in model and seconds == 10:
        share = GPU_SHARES.get(used.get("files", ""))
        return {
            "files": [Bound("share", at_least=share)] if share else [],
            "memory": [Bound("measured", at_least=GPU_CLIPS_PER_SECOND)],
            "encoder": [Bound("share", at_least=GPU_SHARE_OF_MATRIX_LIMIT)],
            "cpu": [Bound("measured", at_most=MAIN_PROCESS_CPU_MS)] if used.get("files") == "wav" else [],
        }
    return {"files": [Bound("measured", at_least=TINY_CLIPS_PER_SECOND)]} if "tiny" in model and seconds == 5 else {}


def rows(result: Result) -> list[Row]:
    used, rates, ratios = result["settings"], result["clips_per_second"], result["ratios"]
    what = described(used)
    asked = {name: tuple((bound,) for bound in bounds) for name, bounds in asked_of(result).items()}

    def figure(name: str, of: str = "") -> Figure:
        return Figure(rates[name], "clips/s", of)

    alone, share = figure("encoder", "the encoder alone"), ratios["pipeline / encoder"]
    if used.get("files") not in (None, "wav") and rates.get("decoding", rates["encoder"]) < rates["encoder"]:
        alone, share = figure("decoding", "the decoding processes alone"), ratios["pipeline / decoding"]
    kind = f"{KINDS[used['files']]} " if "files" in used else ""
    where = [" in memory" * bool(used.get(f"{part}_in_memory")) for part in ("files", "shards")]
    decoded = "one ffmpeg process" if used["ffmpeg"] else "decoded in process"
    with_baseline = "baseline" in rates
    found = [
        Row(
            "extraction", f"{kind}files{where[0]} to shards{where[1]}, {what}", figure("pipeline"),
            figure("baseline", f"{decoded}, one clip, one npz at a time, float32") if with_baseline else None,
            ratios["pipeline / baseline"] if with_baseline else None, alone, share, asked.get("files", ()),
        )
    ]  # fmt: skip
    if "memory" in rates:
        of_memory = Figure(rates["encoder"], "clips/s", "the encoder alone"), ratios["memory / encoder"]
        name = f"audio in memory to shards{where[1]}, {what}"
        found.append(Row("extraction", name, figure("memory"), None, None, *of_memory, asked.get("memory", ())))
    if used["device"].startswith("cuda") and "per_clip" in result:
        found += main_process_rows(result["per_clip"]["pipeline"], f"{kind}files, {what}", asked.get("cpu", ()))
    fastest = next(name for name in reversed(ROUTINES) if f"limit by {name}" in rates)
    other = "torch.mm" if fastest != "torch.mm" else None
    found.append(
        Row(
            "encoder", f"the encoder alone, {what}", figure("encoder"),
            figure(f"limit by {other}", f"its products by {ROUTINES[other]}") if other else None,
            ratios[f"encoder / limit by {other}"] if other else None,
            figure(f"limit by {fastest}", f"its products by {ROUTINES[fastest]}"),
            ratios[f"encoder / limit by {fastest}"], asked.get("encoder", ()),
        )
    )  # fmt: skip
    return found


def main_process_rows(used: dict[str, float], what: str, asked: tuple[tuple[Bound, ...], ...]) -> list[Row]:
    """What a clip costs the process that feeds the GPU."""
    cpu, wall = used["main_process_cpu_ms"], used["wall_ms"]
    one_core = Figure(wall, "ms", "one core, all of the time")
    return [
        Row(
            "extraction", f"processor time of the main process for a clip, {what}", Figure(cpu, "ms"),
            limit=one_core, share=rounded(cpu / wall, 3), asked=asked,
        ),
        Row(
            "extraction", f"times that the main process waits for something in a clip, {what}",
            Figure(used["main_process_waits"]), limit=Figure(0, "", "no waiting"),
        ),
    ]  # fmt: skip


def main() -> None:
    parser = arguments(__doc__, clips=128, baseline_clips=32, rounds=3)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="weights, as for `extract`")
    source.add_argument(
        "--random-weights", choices=sorted(WHISPER_SIZES), metavar="SIZE", help="such as base or large-v1"
    )
    parser.add_argument("--dataset", help="folder, as for `extract`; synthetic clips without it")
    parser.add_argument("--clip-seconds", type=float)
    parser.add_argument("--files", default="wav", choices=sorted(KINDS), help="format of synthetic clips")
    parser.add_argument("--distinct", type=int, help="write so many synthetic files, which the clips use in turn")
    parser.add_argument("--times", type=int, default=1, help="extract every clip of --dataset so many times")
    parser.add_argument("--decoding-alone", action="store_true", help="measure the decoding processes too")
    parser.add_argument("--folder", help="where synthetic files and shards go; a temporary folder without it")
    parser.add_argument("--precision", default="float32", choices=[*sorted(PRECISIONS), "auto"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument(
        "--matrix-seconds", type=float, default=2.0, help="for which matrices, and the encoder alone, run in a round"
    )
    parser.add_argument(
        "--stop-after", type=float, default=math.inf, metavar="SECONDS", help="begin no other round after this long"
    )
    options = parser.parse_args()
    if not options.dataset and not options.clip_seconds:
        options.clip_seconds = 10.0
    found = in_folder(measure, options)
    gpu = gpu_name(found["settings"]["device"])
    publish(describe("extract", found, rows, packages=["torch", "numpy"], gpu=gpu), options.out)


if __name__ == "__main__":
    main()
