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
import os
import platform
import shutil
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from machine import machine, publish

from whisper_at_cli import __version__
from whisper_at_cli.extract.backbones.encoder import PRECISIONS, PackedLinear, clip_samples
from whisper_at_cli.extract.backbones.load import WhisperBackbone
from whisper_at_cli.extract.backbones.sizes import WHISPER_SIZES
from whisper_at_cli.extract.backbones.weights import WhisperWeights, read_weights
from whisper_at_cli.extract.datasets import Dataset, open_dataset
from whisper_at_cli.extract.datasets.base import Clip
from whisper_at_cli.extract.devices import choose_device, cores, fitting_batch_size, one_thread_per_operation
from whisper_at_cli.extract.pipeline.local import extract
from whisper_at_cli.heads.count import encoder_cost


def random_weights(name: str) -> WhisperWeights:
    """A Whisper of this size with random weights: as fast as a real one."""
    from whisper.model import ModelDimensions, Whisper

    size = WHISPER_SIZES[name]
    dims = {
        "n_mels": size.mels, "n_audio_ctx": 1500, "n_audio_state": size.dim, "n_audio_head": size.heads,
        "n_audio_layer": size.layers, "n_vocab": 51864, "n_text_ctx": 448, "n_text_state": size.dim,
        "n_text_head": size.heads, "n_text_layer": 1,
    }  # fmt: skip
    torch.manual_seed(0)
    return WhisperWeights(f"random {name}", "random", dims, Whisper(ModelDimensions(**dims)).state_dict())


def synthetic_dataset(folder: Path, clips: int, seconds: float) -> Dataset:
    """16-bit WAV files at 16 kHz, noise of a spectrum of their own."""
    import wave

    (folder / "audio").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for index in range(clips):
        samples = np.convolve(rng.normal(size=clip_samples(seconds)), rng.normal(size=32), mode="same")
        with wave.open(str(folder / "audio" / f"{index}.wav"), "wb") as file:
            file.setparams((1, 2, 16000, 0, "NONE", ""))
            file.writeframes((samples / np.abs(samples).max() * 20000).astype("<i2").tobytes())
    names = tuple(Clip(id=str(index), path=f"audio/{index}.wav") for index in range(clips))
    return Dataset("synthetic", folder, names, clip_seconds=seconds)


class InMemory(Dataset):
    """Clips whose 16-bit audio is in memory: noise, a few waveforms of it over and over."""

    WAVEFORMS = 64

    def waveform(self, row: int, samples: int) -> tuple[np.ndarray, int]:
        return _noise(samples)[row % self.WAVEFORMS].astype(np.float32) / 32768.0, samples


@lru_cache(maxsize=1)
def _noise(samples: int) -> np.ndarray:
    return np.random.default_rng(0).integers(-8192, 8192, size=(InMemory.WAVEFORMS, samples), dtype=np.int16)


def ffmpeg_in_path(folder: Path) -> str:
    """`ffmpeg` as Whisper's loader calls it: the system's, else the one that a test dependency carries."""
    found = shutil.which("ffmpeg")
    if not found:
        import imageio_ffmpeg

        found = imageio_ffmpeg.get_ffmpeg_exe()
        (folder / "bin").mkdir()
        (folder / "bin" / "ffmpeg").symlink_to(found)
        os.environ["PATH"] = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return found


class Baseline:
    """What people do today."""

    def __init__(self, weights: WhisperWeights, device: torch.device, samples: int):
        from whisper.model import ModelDimensions, Whisper

        model = Whisper(ModelDimensions(**weights.dims))
        model.load_state_dict(weights.state, strict=False)
        self.encoder, self.mels = model.encoder.to(device).eval(), weights.dims["n_mels"]
        self.device, self.samples = device, samples

    @torch.no_grad()
    def run(self, dataset: Dataset, clips: int, out: Path) -> float:
        """Seconds per clip."""
        import whisper

        out.mkdir()
        started = time.perf_counter()
        for clip in dataset.clips[:clips]:
            audio = whisper.pad_or_trim(whisper.load_audio(str(dataset.audio_path(clip))), self.samples)
            x = whisper.log_mel_spectrogram(torch.from_numpy(audio), self.mels).to(self.device)[None]
            x = F.gelu(self.encoder.conv2(F.gelu(self.encoder.conv1(x)))).permute(0, 2, 1)
            x = x + self.encoder.positional_embedding[: x.shape[1]]
            pooled = []
            for block in self.encoder.blocks:
                x = block(x)
                pooled.append(x[0].unflatten(0, (25, -1)).mean(dim=1))
            np.savez_compressed(out / f"{clip.id}.npz", torch.stack(pooled).half().cpu().numpy())
        return (time.perf_counter() - started) / min(clips, len(dataset))


def pipeline_seconds(dataset: Dataset, backbone: WhisperBackbone, out: Path, options: dict) -> float:
    """Seconds per clip of `extract`, from files to shards on disk."""
    started = time.perf_counter()
    report = extract(dataset, out, model=backbone, **options)
    assert report.written == len(dataset), report
    return (time.perf_counter() - started) / len(dataset)


def encoder_seconds(backbone: WhisperBackbone, samples: int, batch_size: int, clips: int) -> float:
    """Seconds per clip of mel and encoder, with as many batches side by side as the pipeline runs."""
    device = backbone.device
    waveforms = torch.randn(batch_size, samples, device=device) * 0.1
    batches = max(2, clips // batch_size)
    if device.type == "cpu":
        threads = cores()
        with one_thread_per_operation(True), ThreadPoolExecutor(threads, initializer=_one_thread) as pool:
            list(pool.map(backbone.encode, [waveforms[:1]] * threads))
            started = time.perf_counter()
            list(pool.map(backbone.encode, [waveforms] * batches))
            return (time.perf_counter() - started) / (batches * batch_size)
    backbone.encode(waveforms)
    _synchronize(device)
    started = time.perf_counter()
    for _ in range(batches):
        backbone.encode(waveforms)
    _synchronize(device)
    return (time.perf_counter() - started) / (batches * batch_size)


def _one_thread() -> None:
    torch.set_num_threads(1)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matrix_rate(device: torch.device, dtype: torch.dtype, dim: int, routine: str, seconds: float) -> float:
    """FLOP/s of the four products of an encoder block, (rows, k) @ (k, n), on all cores; one multiply-add is two."""
    cpu = device.type == "cpu"
    rows = 1000 if cpu else 64000
    shapes = [(dim, 3 * dim), (dim, dim), (dim, 4 * dim), (4 * dim, dim)]
    products = []
    for k, n in shapes:
        x, linear = torch.randn(rows, k, device=device, dtype=dtype), torch.nn.Linear(k, n, device=device, dtype=dtype)
        if routine == "onednn":
            packed = PackedLinear(linear)
            products.append(lambda x=x, packed=packed: packed(x))
        else:
            weight = linear.weight.detach().t()
            products.append(lambda x=x, weight=weight: torch.mm(x, weight))
    flops = sum(2 * rows * k * n for k, n in shapes)

    def loop(until: float) -> int:
        count = 0
        with torch.inference_mode():
            while time.perf_counter() < until or not count:
                for product in products:
                    product()
                count += 1
                _synchronize(device)
        return count

    loop(0)
    threads = cores() if cpu else 1
    with one_thread_per_operation(cpu), ThreadPoolExecutor(threads, initializer=_one_thread if cpu else None) as pool:
        started = time.perf_counter()
        count = sum(pool.map(loop, [started + seconds] * threads))
        return count * flops / (time.perf_counter() - started)


def measure(options: argparse.Namespace, folder: Path) -> dict:
    device = choose_device(options.device)
    weights = random_weights(options.random_weights) if options.random_weights else read_weights(options.model)
    dataset = (
        open_dataset(options.dataset)
        if options.dataset
        else synthetic_dataset(folder / "data", options.clips, options.clip_seconds)
    )
    if options.dataset and options.clips < len(dataset):
        step = len(dataset) // options.clips
        dataset = Dataset(
            dataset.name,
            dataset.root,
            dataset.clips[::step][: options.clips],
            dataset.class_names,
            dataset.clip_seconds,
        )
    seconds = options.clip_seconds or dataset.clip_seconds
    samples, dtype = clip_samples(seconds), PRECISIONS[options.precision]
    backbone = WhisperBackbone.from_weights(weights, device=device, precision=options.precision)
    batch_size = options.batch_size or fitting_batch_size(backbone, samples)
    ffmpeg = ffmpeg_in_path(folder)
    baseline = Baseline(weights, device, samples)
    routines = ["torch.mm"] + (["onednn"] if device.type == "cpu" and PackedLinear.works_for(dtype) else [])
    measured = ["baseline", "pipeline", "encoder"]
    in_memory = None
    if not options.dataset:
        measured.append("memory")
        in_memory = InMemory("in memory", folder, dataset.clips)
        _noise(samples)
    rounds: dict[str, list[float]] = {name: [] for name in (*measured, *routines)}
    extract_options = {"clip_seconds": seconds, "batch_size": batch_size}
    for number in range(options.rounds):
        rounds["baseline"].append(1 / baseline.run(dataset, options.baseline_clips, folder / f"npz{number}"))
        rounds["pipeline"].append(1 / pipeline_seconds(dataset, backbone, folder / f"{number}.zarr", extract_options))
        if in_memory:
            memory = pipeline_seconds(in_memory, backbone, folder / f"memory{number}.zarr", extract_options)
            rounds["memory"].append(1 / memory)
        rounds["encoder"].append(1 / encoder_seconds(backbone, samples, batch_size, min(len(dataset), 64)))
        for routine in routines:
            rounds[routine].append(matrix_rate(device, dtype, backbone.dim, routine, seconds=2.0))
    cost = encoder_cost(mels=weights.dims["n_mels"], layers=backbone.layers, dim=backbone.dim, clip_seconds=seconds)
    flops = 2 * cost.multiply_adds
    best = {name: max(values) for name, values in rounds.items()}
    limit = {routine: best[routine] / flops for routine in routines}
    return {
        "benchmark": "extract",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(torch.cuda.get_device_name(device) if device.type == "cuda" else None),
        "versions": {"whisper-at-cli": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "settings": {
            "model": weights.name, "dataset": dataset.name, "clips": len(dataset), "clip_seconds": seconds,
            "precision": options.precision, "batch_size": batch_size, "device": str(device), "rounds": options.rounds,
            "ffmpeg": Path(ffmpeg).name, "gflops_per_clip": round(flops / 1e9, 3),
        },
        "clips_per_second": {name: round(best[name], 2) for name in measured}
        | {f"limit by {routine}": round(value, 2) for routine, value in limit.items()},
        "matrix_gflops": {routine: round(best[routine] / 1e9, 1) for routine in routines},
        "ratios": {
            "pipeline / baseline": round(best["pipeline"] / best["baseline"], 2),
            "pipeline / encoder": round(best["pipeline"] / best["encoder"], 3),
        }
        | ({"memory / encoder": round(best["memory"] / best["encoder"], 3)} if in_memory else {})
        | {f"encoder / limit by {routine}": round(best["encoder"] / value, 3) for routine, value in limit.items()},
        "rounds": {name: [float(f"{value:.4g}") for value in values] for name, values in rounds.items()},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="weights, as for `extract`")
    source.add_argument(
        "--random-weights", choices=sorted(WHISPER_SIZES), metavar="SIZE", help="such as base or large-v1"
    )
    parser.add_argument("--dataset", help="folder, as for `extract`; synthetic clips without it")
    parser.add_argument("--clips", type=int, default=128)
    parser.add_argument("--baseline-clips", type=int, default=32)
    parser.add_argument("--clip-seconds", type=float)
    parser.add_argument("--precision", default="float32", choices=sorted(PRECISIONS))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    options = parser.parse_args()
    if not options.dataset and not options.clip_seconds:
        options.clip_seconds = 10.0
    with tempfile.TemporaryDirectory() as folder:
        result = measure(options, Path(folder))
    publish(result, options.out)


if __name__ == "__main__":
    main()
