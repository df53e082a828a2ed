"""Whether features are right on this device: every precision against OpenAI's blocks in float32, one clip at a time.

    python benchmarks/features.py --random-weights large-v1
    python benchmarks/features.py --model tiny.en --dataset ../shared/data/esc10 --clips 40

error        relative error of a layer's pooled features over all clips, the worst layer; beside it one rounding in
             the type, which no computation in it can do without
kernels      where Triton's kernels run the blocks: how far they are from plain operations in the same type
same         whether the same clips have the same bytes twice, and in batches of another size

No times are measured. Prints JSON.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from baseline import Baseline
from encoder import plain_operations, uses_kernels
from record import Bound, Figure, Result, Row, arguments, at_most, describe, gpu_name, publish, rounded, settings
from synthetic import random_weights
from torch import Tensor

from whisper_at_cli.extract.backbones.encoder import PRECISIONS, clip_samples
from whisper_at_cli.extract.backbones.load import WhisperBackbone
from whisper_at_cli.extract.backbones.precision import use_true_float32
from whisper_at_cli.extract.backbones.sizes import WHISPER_SIZES
from whisper_at_cli.extract.backbones.weights import read_weights
from whisper_at_cli.extract.datasets import open_dataset
from whisper_at_cli.extract.devices import choose_device

ERRORS_ASKED = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1.5e-2}
BATCH = 4


def waveforms_of(options: argparse.Namespace) -> tuple[Tensor, float]:
    """Evenly chosen clips of a dataset, or noise from quiet to loud: (clips, samples) float32; and their seconds."""
    if options.dataset:
        dataset = open_dataset(options.dataset)
        seconds = dataset.clip_seconds
        chosen = range(0, len(dataset), max(1, len(dataset) // options.clips))[: options.clips]
        return torch.from_numpy(np.stack([dataset.waveform(row, clip_samples(seconds))[0] for row in chosen])), seconds
    generator = torch.Generator().manual_seed(1)
    loudness = torch.logspace(-2.5, -0.5, options.clips)[:, None]
    samples = clip_samples(options.clip_seconds)
    return torch.randn(options.clips, samples, generator=generator).mul_(loudness).clamp_(-1, 1), options.clip_seconds


def encode(backbone: WhisperBackbone, waveforms: Tensor, batch: int = BATCH) -> Tensor:
    """(clips, L, T, D) float64 on the CPU."""
    return torch.cat([backbone.encode(part.to(backbone.device)).cpu() for part in waveforms.split(batch)]).double()


def errors(found: Tensor, expected: Tensor) -> list[float]:
    """Of each layer, over all clips."""
    difference = (found - expected).square().sum((0, 2, 3)) / expected.square().sum((0, 2, 3))
    return [rounded(value, 3) for value in difference.sqrt().tolist()]


def measure(options: argparse.Namespace) -> Result:
    device = choose_device(options.device)
    weights = read_weights(options.model) if options.model else random_weights(options.random_weights)
    waveforms, seconds = waveforms_of(options)
    use_true_float32(device)
    baseline = Baseline(weights, device, waveforms.shape[1])
    expected = torch.stack([baseline.features(clip).cpu() for clip in waveforms.numpy()]).double()
    del baseline
    precisions: Result = {}
    for precision in ERRORS_ASKED:
        backbone = WhisperBackbone.from_weights(weights, device=device, precision=precision)
        found = encode(backbone, waveforms)
        clips = ((found - expected).flatten(2).norm(dim=2) / expected.flatten(2).norm(dim=2)).max()
        kernels, plain = uses_kernels(backbone), None
        if kernels:
            with plain_operations(backbone):
                plain = encode(backbone, waveforms)
        precisions[precision] = {
            "errors": errors(found, expected), "worst_clip_and_layer": rounded(float(clips), 3), "kernels": kernels,
            "kernels_from_plain": None if plain is None else max(errors(found, plain)),
            "plain_errors": None if plain is None else errors(plain, expected),
            "same_bytes_twice": bool(torch.equal(encode(backbone, waveforms), found)),
            "same_bytes_in_other_batches": bool(torch.equal(encode(backbone, waveforms, BATCH // 2), found)),
            "finite": bool(found.isfinite().all()),
        }  # fmt: skip
    return {
        "settings": settings(options, "dataset", "clips", "clip_seconds")
        | {"model": weights.name, "clips": len(waveforms), "clip_seconds": seconds, "device": str(device)},
        "precisions": precisions,
        "one_rounding": {name: torch.finfo(PRECISIONS[name]).eps / 2 for name in ERRORS_ASKED},
    }


def rows(result: Result) -> list[Row]:
    used = result["settings"]
    model = f"`{used['model'].removeprefix('random ')}`" + " shapes" * used["model"].startswith("random ")
    found = []
    for precision, measured in result["precisions"].items():
        rounding, asked = result["one_rounding"][precision], (at_most("measured", ERRORS_ASKED[precision]),)
        of = f"{model}, {used['clips']} clips of {used['clip_seconds']:g} s, {used['device'].split(':')[0]}"
        worst = f"the worst of {len(measured['errors'])} layers"
        found.append(error_row(f"error in {precision}, {worst} of {of}", max(measured["errors"]), rounding, asked))
        if measured["kernels"]:
            name = f"Triton's kernels against plain operations in {precision}, {worst} of {of}"
            found.append(error_row(name, measured["kernels_from_plain"], rounding, asked, "plain operations"))
    return found


def error_row(
    what: str, error: float, rounding: float, asked: tuple[tuple[Bound, ...], ...],
    of: str = "OpenAI's blocks in float32",
) -> Row:  # fmt: skip
    limit = Figure(rounding, "", "one rounding")
    share = rounded(error / rounding, 3)
    return Row("precision and storage", what, Figure(error), Figure(None, "", of), None, limit, share, asked)


def main() -> None:
    parser = arguments(__doc__, clips=6)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="weights, as for `extract`")
    source.add_argument("--random-weights", choices=sorted(WHISPER_SIZES), metavar="SIZE")
    parser.add_argument("--dataset", help="folder, as for `extract`; noise without it")
    parser.add_argument("--clip-seconds", type=float, default=10.0, help="of noise")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    found = measure(options)
    gpu = gpu_name(found["settings"]["device"])
    publish(describe("features", found, rows, packages=["torch", "openai-whisper"], gpu=gpu), options.out)


if __name__ == "__main__":
    main()
