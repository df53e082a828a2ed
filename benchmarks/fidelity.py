"""What precisions and storage types cost in accuracy, and what they save in bytes: real weights, real sounds.

    python benchmarks/fidelity.py --model tiny.en --dataset ../shared/data/esc10

precision   relative error of each layer's pooled features against OpenAI's blocks, one clip at a time in float32;
            beside it one rounding in that type, which no computation in it can do without
storage     bytes of features and scales of the whole dataset, error against features stored in float32, and by how
            much the accuracy of any layer's linear probe moves

No times are measured: the machine may do other work. Prints JSON.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import cast

import numpy as np
import torch
from baseline import Baseline
from record import Figure, Result, Row, arguments, at_most, describe, gpu_name, in_folder, publish, rounded, settings

from extract import chosen_clips
from whisper_at_cli.extract import FeatureCache
from whisper_at_cli.extract.audio.decode import as_float, load_clip
from whisper_at_cli.extract.backbones.encoder import PRECISIONS, clip_samples
from whisper_at_cli.extract.backbones.load import WhisperBackbone
from whisper_at_cli.extract.backbones.weights import WhisperWeights, read_weights
from whisper_at_cli.extract.datasets import Dataset
from whisper_at_cli.extract.devices import choose_device
from whisper_at_cli.extract.pipeline.local import extract
from whisper_at_cli.probe import probe_layers
from whisper_at_cli.probe.scores import LayerAccuracy

ERRORS_ASKED = {"float32": 1e-5, "float16": 5e-3, "bfloat16": 1.5e-2}
WAYS = {  # name -> storage type, precision; the first is what the others are compared with
    "float32": ("float32", "float32"),
    "int8": ("int8", "float32"),
    "bfloat16 (stored in float16)": ("float16", "bfloat16"),
}


def errors_of_precisions(weights: WhisperWeights, dataset: Dataset, device: torch.device, clips: int) -> Result:
    """Precision -> relative error of each layer over evenly chosen clips."""
    samples = clip_samples(dataset.clip_seconds)
    chosen = dataset.clips[:: max(1, len(dataset) // clips)][:clips]
    waveforms = np.stack([as_float(load_clip(dataset.audio_path(clip), samples).samples) for clip in chosen])
    baseline = Baseline(weights, device, samples)
    expected = torch.stack([baseline.features(waveform) for waveform in waveforms]).double()
    errors = {}
    for precision in ERRORS_ASKED:
        backbone = WhisperBackbone.from_weights(weights, device=device, precision=precision)
        found = torch.cat([backbone.encode(part.to(device)) for part in torch.from_numpy(waveforms).split(2)]).double()
        difference = ((found - expected).square().sum((0, 2, 3)) / expected.square().sum((0, 2, 3))).sqrt()
        errors[precision] = [rounded(value, 3) for value in difference.tolist()]
    return errors


def stored(weights: WhisperWeights, dataset: Dataset, device: torch.device, folder: Path) -> Result:
    """Way -> bytes, error of each layer and accuracy of each layer's probe."""
    found: Result = {}
    exact: np.ndarray = np.empty(0)
    for name, (dtype, precision) in WAYS.items():
        backbone = WhisperBackbone.from_weights(weights, device=device, precision=precision)
        path = folder / f"{dtype}-{precision}.zarr"
        report = extract(dataset, path, model=backbone, dtype=dtype)
        assert report.written == len(dataset), report
        cache = FeatureCache.open(path)
        features = cache.features(range(len(cache))).astype(np.float32)
        if not found:
            exact = features
        of_error, of_exact = ((part.astype(np.float64) ** 2).sum(axis=(0, 2, 3)) for part in (features - exact, exact))
        sizes = cache.store.sizes()
        scores = cast("list[LayerAccuracy]", probe_layers(cache).layers)  # each clip has one label
        found[name] = {
            "bytes": sum(size for key, size in sizes.items() if key.startswith(("features/c", "scale/c"))),
            "bytes of the means": sum(size for key, size in sizes.items() if key.startswith("mean/c")),
            "error": [rounded(float(value), 3) for value in np.sqrt(of_error / of_exact)],
            "accuracy": [round(layer.accuracy, 4) for layer in scores],
        }
    return found


def measure(options: argparse.Namespace, folder: Path) -> Result:
    device, weights = choose_device(options.device), read_weights(options.model)
    dataset = chosen_clips(options, folder)
    errors = errors_of_precisions(weights, dataset, device, options.error_clips)
    storage = stored(weights, dataset, device, folder)
    exact, small = storage["float32"], storage["int8"]
    moved = {
        name: round(float(np.abs(np.subtract(way["accuracy"], exact["accuracy"])).max()), 4)
        for name, way in storage.items()
    }
    return {
        "settings": settings(options, "dataset") | {"clips": len(dataset), "device": str(device)},
        "errors": errors,
        "one_rounding": {name: torch.finfo(PRECISIONS[name]).eps / 2 for name in ERRORS_ASKED},
        "storage": storage,
        "ratios": {
            "int8 / float32, features and scales": round(small["bytes"] / exact["bytes"], 4),
            "int8 / float32, means too": round(
                (small["bytes"] + small["bytes of the means"]) / (exact["bytes"] + exact["bytes of the means"]), 4
            ),
        },
        "accuracy_moved": moved,
    }


def rows(result: Result) -> list[Row]:
    group, used = "precision and storage", result["settings"]
    of = f"layers 1 to {len(result['errors']['float32'])} of `{used['model']}`, {used['error_clips']} clips"
    found = [
        Row(
            group, f"error in {precision}, {of}", Figure(None),
            Figure(None, "", "OpenAI's blocks in float32"), errors,
            Figure(result["one_rounding"][precision], "", "one rounding"),
            [rounded(error / result["one_rounding"][precision], 3) for error in errors],
            (at_most("ratio", ERRORS_ASKED[precision]),),
        )
        for precision, errors in result["errors"].items()
    ]  # fmt: skip
    ratio, small, exact = result["ratios"], result["storage"]["int8"], result["storage"]["float32"]
    found.append(
        Row(
            group, f"bytes of int8 features with their scales, {used['clips']} clips",
            Figure(round(small["bytes"] / 1e6, 2), "MB"), Figure(round(exact["bytes"] / 1e6, 2), "MB", "float32"),
            ratio["int8 / float32, features and scales"], Figure(0.25, "", "a quarter, without scales"),
            rounded(ratio["int8 / float32, features and scales"] / 0.25, 4), (at_most("ratio", 0.27),),
        )
    )  # fmt: skip
    found.append(
        Row(
            group, "error of int8 features, the same layers", Figure(None),
            Figure(None, "", "features stored in float32"), small["error"], asked=(at_most("ratio", 0.01),),
        )
    )  # fmt: skip
    for name, moved in result["accuracy_moved"].items():
        if name != "float32":
            best = max(exact["accuracy"])
            found.append(
                Row(
                    group, f"the most that {name} moves any layer's probe", Figure(moved, "of accuracy"),
                    Figure(best, "", "accuracy of the best layer in float32"), limit=Figure(0, "", "no change"),
                    asked=(at_most("measured", 0.005),),
                )
            )  # fmt: skip
    return found


def main() -> None:
    parser = arguments(__doc__, clips=1_000_000, error_clips=20)
    parser.add_argument("--model", default="tiny.en", help="weights, as for `extract`")
    parser.add_argument("--dataset", required=True, help="folder, as for `extract`, with labels and folds")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    found = in_folder(measure, options)
    gpu = gpu_name(found["settings"]["device"])
    publish(describe("fidelity", found, rows, packages=["torch", "numpy", "scikit-learn"], gpu=gpu), options.out)


if __name__ == "__main__":
    main()
