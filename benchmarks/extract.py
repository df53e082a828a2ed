"""How fast extraction is: a baseline, this pipeline, the encoder alone, and the limit, side by side in one run.

    python benchmarks/extract.py --model tiny.en --dataset ../shared/data/esc10
    python benchmarks/extract.py --random-weights base --clip-seconds 5
    python benchmarks/extract.py --random-weights large-v1 --precision bfloat16 --clips 4096

baseline   one ffmpeg process a clip, one clip at a time, OpenAI's blocks in float32, one compressed npz a clip
pipeline   `extract`: files in, shards on disk, model loading left out on both sides
memory     the same from 16-bit audio that is already in memory, so that decoding is left out (synthetic audio only)
encoder    log-mel and encoder on waveforms already in memory, features pooled, nothing stored
limit      the device's matrix products in the same type, turned into clips/s by the encoder's:
           `torch.mm`, and on a CPU the faster routine of oneDNN where there is one

The four are measured in turn, several rounds, and each one's best round counts: other work on a shared machine only
ever slows a round down. Prints JSON.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from baseline import Baseline, ffmpeg_in_path
from record import Figure, Result, Row, arguments, at_least, describe, gpu_name, in_folder, publish
from synthetic import random_weights, synthetic_dataset

from whisper_at_cli.extract.backbones.encoder import PRECISIONS, clip_samples
from whisper_at_cli.extract.backbones.load import WhisperBackbone
from whisper_at_cli.extract.backbones.routines import PackedLinear
from whisper_at_cli.extract.backbones.sizes import WHISPER_SIZES
from whisper_at_cli.extract.backbones.weights import WhisperWeights, read_weights
from whisper_at_cli.extract.datasets import Dataset, open_dataset
from whisper_at_cli.extract.devices import choose_device, fitting_batch_size
from whisper_at_cli.extract.doctor.device import encoder_rate, matrix_rate
from whisper_at_cli.extract.pipeline.local import extract
from whisper_at_cli.heads.count import encoder_cost

ROUTINES = {"torch.mm": "`torch.mm`", "onednn": "oneDNN with packed weights"}  # the last that there is is the limit
GPU_CLIPS_PER_SECOND, GPU_SHARE_OF_MATRIX_LIMIT = 400, 0.6  # asked of large-v1 in bfloat16 on one GPU
CPU_TIMES_BASELINE = {"float32": 2.2, "bfloat16": 4.0}  # asked of base shapes on two cores
CPU_SHARE_OF_MATRIX_LIMIT = {"bfloat16": 0.4}


class InMemory(Dataset):
    """Clips whose 16-bit audio is in memory: noise, a few waveforms of it over and over."""

    WAVEFORMS = 64

    def waveform(self, row: int, samples: int) -> tuple[np.ndarray, int]:
        return _noise(samples)[row % self.WAVEFORMS].astype(np.float32) / 32768.0, samples


@lru_cache(maxsize=1)
def _noise(samples: int) -> np.ndarray:
    return np.random.default_rng(0).integers(-8192, 8192, size=(InMemory.WAVEFORMS, samples), dtype=np.int16)


def pipeline_seconds(dataset: Dataset, backbone: WhisperBackbone, out: Path, options: dict[str, Any]) -> float:
    """Seconds per clip of `extract`, from files to shards on disk."""
    started = time.perf_counter()
    report = extract(dataset, out, model=backbone, **options)
    assert report.written == len(dataset), report
    return (time.perf_counter() - started) / len(dataset)


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
        device, dtype = choose_device(options.device), PRECISIONS[options.precision]
        weights = random_weights(options.random_weights) if options.random_weights else read_weights(options.model)
        dataset = chosen_clips(options, folder)
        seconds = options.clip_seconds or dataset.clip_seconds
        samples = clip_samples(seconds)
        in_memory = None
        if not options.dataset:
            in_memory = InMemory("in memory", folder, dataset.clips)
            _noise(samples)
        backbone = WhisperBackbone.from_weights(weights, device=device, precision=options.precision)
        packed = (
            ("onednn",) if device.type == "cpu" and PackedLinear.is_right(backbone.dim, backbone.dim, dtype) else ()
        )
        batch_size = options.batch_size or fitting_batch_size(backbone, samples)
        return cls(weights, dataset, in_memory, backbone, seconds, samples, batch_size, ("torch.mm", *packed))

    def flops(self) -> int:
        """Of the encoder's own products, for one clip; one multiply-add is two."""
        backbone = self.backbone
        cost = encoder_cost(
            mels=self.weights.dims["n_mels"], layers=backbone.layers, dim=backbone.dim, clip_seconds=self.clip_seconds
        )
        return 2 * cost.multiply_adds


def chosen_clips(options: argparse.Namespace, folder: Path) -> Dataset:
    """Synthetic clips, or of the given dataset as many as asked for, evenly chosen."""
    if not options.dataset:
        return synthetic_dataset(folder / "data", options.clips, options.clip_seconds)
    dataset = open_dataset(options.dataset)
    if options.clips >= len(dataset):
        return dataset
    some = dataset.clips[:: len(dataset) // options.clips][: options.clips]
    return Dataset(dataset.name, dataset.root, some, dataset.class_names, dataset.clip_seconds)


def measured_rounds(setup: Setup, options: argparse.Namespace, folder: Path) -> dict[str, list[float]]:
    """Clips/s of each thing in every round, and FLOP/s of matrix products."""
    backbone, dataset = setup.backbone, setup.dataset
    baseline = Baseline(setup.weights, backbone.device, setup.samples)
    extract_options = {"clip_seconds": setup.clip_seconds, "batch_size": setup.batch_size}
    names = ["baseline", "pipeline", "encoder", *(["memory"] if setup.in_memory else []), *setup.routines]
    rounds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(options.rounds):
        rounds["baseline"].append(1 / baseline.run(dataset, options.baseline_clips, folder / f"npz{number}"))
        rounds["pipeline"].append(1 / pipeline_seconds(dataset, backbone, folder / f"{number}.zarr", extract_options))
        if setup.in_memory:
            memory = pipeline_seconds(setup.in_memory, backbone, folder / f"memory{number}.zarr", extract_options)
            rounds["memory"].append(1 / memory)
        alone = encoder_rate(backbone, setup.samples, setup.batch_size, seconds=options.matrix_seconds)
        rounds["encoder"].append(alone)
        for routine in setup.routines:
            dtype = PRECISIONS[options.precision]
            rate = matrix_rate(backbone.device, dtype, backbone.dim, routine, seconds=options.matrix_seconds)
            rounds[routine].append(rate)
    return rounds


def measure(options: argparse.Namespace, folder: Path) -> Result:
    ffmpeg, setup = ffmpeg_in_path(folder), Setup.of(options, folder)
    rounds, flops = measured_rounds(setup, options, folder), setup.flops()
    best = {name: max(values) for name, values in rounds.items()}
    limits = {f"limit by {routine}": best.pop(routine) / flops for routine in setup.routines}
    ratios = {
        "pipeline / baseline": round(best["pipeline"] / best["baseline"], 2),
        "pipeline / encoder": round(best["pipeline"] / best["encoder"], 3),
    }
    if setup.in_memory:
        ratios["memory / encoder"] = round(best["memory"] / best["encoder"], 3)
    return {
        "settings": {
            "model": setup.weights.name, "dataset": setup.dataset.name, "clips": len(setup.dataset),
            "baseline_clips": min(options.baseline_clips, len(setup.dataset)), "clip_seconds": setup.clip_seconds,
            "precision": options.precision, "batch_size": setup.batch_size, "device": str(setup.backbone.device),
            "rounds": options.rounds, "ffmpeg": Path(ffmpeg).name, "gflops_per_clip": round(flops / 1e9, 3),
        },
        "clips_per_second": {name: round(value, 2) for name, value in (best | limits).items()},
        "matrix_gflops": {routine: round(max(rounds[routine]) / 1e9, 1) for routine in setup.routines},
        "ratios": ratios | {f"encoder / {name}": round(best["encoder"] / limit, 3) for name, limit in limits.items()},
        "rounds": {name: [float(f"{value:.4g}") for value in values] for name, values in rounds.items()},
    }  # fmt: skip


def rows(result: Result) -> list[Row]:
    used, rates, ratios = result["settings"], result["clips_per_second"], result["ratios"]
    once = ", one round" if used["rounds"] == 1 else ""
    data = "ESC-10" if used["dataset"] == "esc50" and used["clips"] == 400 else used["dataset"]
    model = f"`{used['model'].removeprefix('random ')}`" + " shapes" * used["model"].startswith("random ")
    what = f"{model}, {used['precision']}, {used['clips']} clips of {used['clip_seconds']:g} s ({data}){once}"

    def figure(name: str, of: str = "") -> Figure:
        return Figure(rates[name], "clips/s", of)

    alone = figure("encoder", "the encoder alone")
    on_cpu = used["device"] == "cpu" and used["model"] == "random base"
    times, share = (
        asked.get(used["precision"]) if on_cpu else None for asked in (CPU_TIMES_BASELINE, CPU_SHARE_OF_MATRIX_LIMIT)
    )
    found = [
        Row(
            "extraction", f"files to shards, {what}", figure("pipeline"),
            figure("baseline", "one ffmpeg process, one clip, one npz at a time, float32"),
            ratios["pipeline / baseline"], alone, ratios["pipeline / encoder"],
            (at_least("ratio", times),) if times else (),
        )
    ]  # fmt: skip
    on_gpu = used["device"].startswith("cuda")
    share = GPU_SHARE_OF_MATRIX_LIMIT if on_gpu and "large-v1" in used["model"] else share
    goal = on_gpu and "large-v1" in used["model"] and used["precision"] == "bfloat16"
    if "memory" in rates:
        asked = (at_least("measured", GPU_CLIPS_PER_SECOND),) if goal else ()
        reached = ratios["memory / encoder"]
        found.append(
            Row("extraction", f"audio in memory to shards, {what}", figure("memory"), None, None, alone, reached, asked)
        )
    fastest = next(name for name in reversed(ROUTINES) if f"limit by {name}" in rates)
    other = "torch.mm" if fastest != "torch.mm" else None
    found.append(
        Row(
            "encoder", f"the encoder alone, {what}", figure("encoder"),
            figure(f"limit by {other}", f"its products by {ROUTINES[other]}") if other else None,
            ratios[f"encoder / limit by {other}"] if other else None,
            figure(f"limit by {fastest}", f"its products by {ROUTINES[fastest]}"),
            ratios[f"encoder / limit by {fastest}"], (at_least("share", share),) if share else (),
        )
    )  # fmt: skip
    return found


def main() -> None:
    parser = arguments(__doc__, clips=128, baseline_clips=32, rounds=3)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="weights, as for `extract`")
    source.add_argument(
        "--random-weights", choices=sorted(WHISPER_SIZES), metavar="SIZE", help="such as base or large-v1"
    )
    parser.add_argument("--dataset", help="folder, as for `extract`; synthetic clips without it")
    parser.add_argument("--clip-seconds", type=float)
    parser.add_argument("--precision", default="float32", choices=sorted(PRECISIONS))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument(
        "--matrix-seconds", type=float, default=2.0, help="for which matrices, and the encoder alone, run in a round"
    )
    options = parser.parse_args()
    if not options.dataset and not options.clip_seconds:
        options.clip_seconds = 10.0
    found = in_folder(measure, options)
    gpu = gpu_name(found["settings"]["device"])
    publish(describe("extract", found, rows, packages=["torch", "numpy"], gpu=gpu), options.out)


if __name__ == "__main__":
    main()
