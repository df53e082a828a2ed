"""The encoder alone, beside OpenAI's blocks on the same batches and beside its matrix products alone, in one run.

    python benchmarks/encoder.py --random-weights large-v1 --precision auto bfloat16 --batch 64 128

encoder    log-mel and encoder on waveforms that lie on the device, features pooled, nothing stored
plain      the same without Triton's kernels, where there are any
baseline   OpenAI's own blocks on the same batches, in the same type, features pooled
limit      `torch.mm` on matrices of the encoder's shapes, turned into clips/s by the encoder's own products

Measured in turn, several rounds, best round counts. Prints JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from record import Figure, Result, Row, arguments, at_least, describe, gpu_name, publish, rounded, settings
from synthetic import random_weights
from torch import Tensor

from extract import GPU_SHARE_OF_MATRIX_LIMIT, encoder_flops
from whisper_at_cli.extract.backbones.encoder import PRECISIONS, clip_samples, pool_frames
from whisper_at_cli.extract.backbones.load import WhisperBackbone
from whisper_at_cli.extract.backbones.sizes import WHISPER_SIZES
from whisper_at_cli.extract.backbones.weights import WhisperWeights
from whisper_at_cli.extract.devices import choose_device
from whisper_at_cli.extract.doctor.device import encoder_rate, matrix_rate, synchronize

MEASURED = ("encoder", "plain", "baseline")
KERNELS = "fused"  # the encoder's own switch


class OpenAIBlocks:
    """OpenAI's encoder on whole batches, un-padded, its residual stream in `dtype`."""

    def __init__(self, weights: WhisperWeights, device: torch.device):
        from whisper.model import ModelDimensions, Whisper

        model = Whisper(ModelDimensions(**weights.dims))
        model.load_state_dict(weights.state, strict=False)
        self.encoder, self.mels = model.encoder.to(device).eval(), weights.dims["n_mels"]

    @torch.inference_mode()
    def features(self, waveforms: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, samples) float32 on the device -> (B, L, 25, D) float32."""
        import whisper

        encoder = self.encoder
        x = whisper.log_mel_spectrogram(waveforms, self.mels).to(dtype)
        x = F.gelu(encoder.conv2(F.gelu(encoder.conv1(x)))).permute(0, 2, 1)
        x = x + encoder.get_buffer("positional_embedding")[: x.shape[1]].to(dtype)
        pooled = []
        for block in encoder.blocks:
            x = block(x)
            pooled.append(pool_frames(x))
        return torch.stack(pooled, dim=1)

    def rate(self, samples: int, batch: int, dtype: torch.dtype, device: torch.device, seconds: float) -> float:
        """Clips/s."""
        waveforms, clips = torch.randn(batch, samples, device=device) * 0.1, 0
        self.features(waveforms, dtype)
        synchronize(device)
        started = time.perf_counter()
        while not clips or time.perf_counter() < started + seconds:
            self.features(waveforms, dtype)
            clips += batch
            synchronize(device)
        return clips / (time.perf_counter() - started)


def uses_kernels(backbone: WhisperBackbone) -> bool:
    """Whether Triton's kernels run the blocks."""
    return bool(getattr(backbone.encoder, KERNELS, False))


@contextlib.contextmanager
def plain_operations(backbone: WhisperBackbone) -> Iterator[None]:
    """Without Triton's kernels, where there are any."""
    before = uses_kernels(backbone)
    try:
        if before:
            setattr(backbone.encoder, KERNELS, False)
        yield
    finally:
        if before:
            setattr(backbone.encoder, KERNELS, True)


def measure(options: argparse.Namespace) -> Result:
    device, weights = choose_device(options.device), random_weights(options.random_weights)
    samples, openai = clip_samples(options.clip_seconds), OpenAIBlocks(weights, device)
    found: Result = {"settings": settings(options) | {"device": str(device)}, "precisions": {}}
    for asked in options.precision:
        backbone = WhisperBackbone.from_weights(weights, device=device, precision=asked)
        dtype, kernels = PRECISIONS[backbone.precision], uses_kernels(backbone)
        flops = encoder_flops(weights, backbone, options.clip_seconds)
        rates: dict[str, dict[str, float]] = {name: {} for name in MEASURED if kernels or name != "plain"}
        products, seconds = 0.0, options.matrix_seconds

        def keep(name: str, batch: int, rate: float, rates: dict[str, dict[str, float]] = rates) -> None:
            rates[name][str(batch)] = round(max(rate, rates[name].get(str(batch), 0)), 2)

        for _ in range(options.rounds):
            for batch in options.batch:
                keep("encoder", batch, encoder_rate(backbone, samples, batch, seconds=seconds))
                if kernels:
                    with plain_operations(backbone):
                        keep("plain", batch, encoder_rate(backbone, samples, batch, seconds=seconds))
            products = max(products, matrix_rate(device, dtype, backbone.dim, "torch.mm", seconds=seconds))
        largest = options.batch[-1]
        keep("baseline", largest, openai.rate(samples, largest, dtype, device, seconds))
        found["precisions"][backbone.precision] = {
            "kernels": kernels, "clips_per_second_by_batch": rates, "matrix_gflops": round(products / 1e9, 1),
            "gflops_per_clip": round(flops / 1e9, 3), "limit": round(products / flops, 2),
        }  # fmt: skip
        del backbone
        torch.cuda.empty_cache()
    return found


def rows(result: Result) -> list[Row]:
    used = result["settings"]
    asks = used["device"].startswith("cuda") and used["random_weights"] == "large-v1" and used["clip_seconds"] == 10
    found = []
    for precision, measured in result["precisions"].items():
        rates = measured["clips_per_second_by_batch"]
        batch, best = max(rates["encoder"].items(), key=lambda item: item[1])
        (baseline,) = rates["baseline"].values()
        what = f"`{used['random_weights']}` shapes, {precision}, clips of {used['clip_seconds']:g} s"
        limit = Figure(measured["limit"], "clips/s", "its products by `torch.mm`")
        found.append(
            Row(
                "encoder", f"the encoder alone, {what}, batch {batch}", Figure(best, "clips/s"),
                Figure(baseline, "clips/s", "OpenAI's blocks on such batches"), rounded(best / baseline, 3), limit,
                round(best / measured["limit"], 3),
                (at_least("share", GPU_SHARE_OF_MATRIX_LIMIT),) if asks else (),
            )
        )  # fmt: skip
        if "plain" in rates:
            plain = max(rates["plain"].values())
            found.append(
                Row(
                    "encoder", f"the encoder alone with Triton's kernels, {what}", Figure(best, "clips/s"),
                    Figure(plain, "clips/s", "without them"), rounded(best / plain, 3),
                )
            )  # fmt: skip
    return found


def main() -> None:
    parser = arguments(__doc__, rounds=2)
    parser.add_argument("--random-weights", default="large-v1", choices=sorted(WHISPER_SIZES), metavar="SIZE")
    parser.add_argument("--precision", nargs="+", default=["auto"], choices=[*sorted(PRECISIONS), "auto"])
    parser.add_argument("--batch", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--clip-seconds", type=float, default=10.0)
    parser.add_argument("--matrix-seconds", type=float, default=1.0, help="of each measurement in a round")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    found = measure(options)
    gpu = gpu_name(found["settings"]["device"])
    publish(describe("encoder", found, rows, packages=["torch", "openai-whisper"], gpu=gpu), options.out)


if __name__ == "__main__":
    main()
