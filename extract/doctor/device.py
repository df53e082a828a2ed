"""What the devices are and how fast: matrix products, and Whisper's encoder on clips that are in memory already.

Every measurement stops after a time limit, with one round at least. torch is needed.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from whisper_at_cli.extract.backbones.routines import PackedLinear
from whisper_at_cli.extract.devices import cores, one_thread_per_operation

if TYPE_CHECKING:
    from whisper_at_cli.extract.backbones.load import Backbone

MEASURED_DIM = {"cpu": 512}  # channels of the products that are measured; on an accelerator those of a large Whisper
LARGE_DIM = 1280


@dataclass(frozen=True)
class Accelerator:
    """One GPU. bfloat16 counts where its matrix products are done by the hardware and come out right."""

    name: str
    device: str
    memory_bytes: int | None
    free_memory_bytes: int | None
    compute_capability: str | None
    bfloat16: bool


@dataclass(frozen=True)
class TorchDevices:
    """What torch finds here."""

    torch: str
    threads: int
    capability: str  # the vector instructions that its kernels use, as AVX512
    bfloat16: bool  # instructions for it, in the processor
    amx: bool
    cuda_build: str | None  # the CUDA that torch was built for; None for a build without
    accelerators: tuple[Accelerator, ...]
    mps: bool


def torch_devices() -> TorchDevices:
    can = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    found = [_cuda_device(index) for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    mps = torch.backends.mps.is_available()
    if mps:
        found.append(Accelerator("Apple GPU", "mps", None, None, None, _computes_bfloat16(torch.device("mps"))))
    return TorchDevices(
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        capability=torch.backends.cpu.get_cpu_capability(),
        bfloat16=bool(can.get("avx512_bf16") or can.get("amx_bf16") or can.get("bf16")),
        amx=bool(can.get("amx_bf16") or can.get("amx_tile")),
        cuda_build=torch.version.cuda or torch.version.hip,
        accelerators=tuple(found),
        mps=mps,
    )


def _cuda_device(index: int) -> Accelerator:
    properties = torch.cuda.get_device_properties(index)
    device = torch.device("cuda", index)
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    return Accelerator(
        name=properties.name,
        device=str(device),
        memory_bytes=properties.total_memory,
        free_memory_bytes=torch.cuda.mem_get_info(device)[0],
        compute_capability=f"{properties.major}.{properties.minor}",
        bfloat16=native and _computes_bfloat16(device),
    )


def _computes_bfloat16(device: torch.device) -> bool:
    """Whether a product in bfloat16 comes out right; some builds know the type and have no kernel for this device."""
    try:
        ones = torch.ones(64, 64, device=device, dtype=torch.bfloat16)
        return bool((ones @ ones == 64).all())
    except RuntimeError:
        return False


def fastest_matrix_rate(device: torch.device, dtype: torch.dtype, *, seconds: float) -> float:
    """FLOP/s by the routine that the encoder uses on this device."""
    dim = MEASURED_DIM.get(device.type, LARGE_DIM)
    packed = device.type == "cpu" and PackedLinear.is_right(dim, dim, dtype)
    return matrix_rate(device, dtype, dim, "onednn" if packed else "torch.mm", seconds)


def matrix_rate(device: torch.device, dtype: torch.dtype, dim: int, routine: str, seconds: float) -> float:
    """FLOP/s of the four products of an encoder block, (rows, k) @ (k, n), on all cores; one multiply-add is two."""
    cpu = device.type == "cpu"
    products, flops = _products(device, dtype, dim, routine, rows=1000 if cpu else 64000)

    def loop(until: float) -> int:
        count = 0
        with torch.inference_mode():
            while time.perf_counter() < until or not count:
                for product in products:
                    product()
                count += 1
                synchronize(device)
        return count

    loop(0)
    threads = cores() if cpu else 1
    with one_thread_per_operation(cpu), ThreadPoolExecutor(threads, initializer=_one_thread if cpu else None) as pool:
        started = time.perf_counter()
        count = sum(pool.map(loop, [started + seconds] * threads))
        return count * flops / (time.perf_counter() - started)


def _products(device: torch.device, dtype: torch.dtype, dim: int, routine: str, rows: int) -> tuple[list, int]:
    """Functions that each compute one product, and the FLOPs of all of them."""
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
    return products, sum(2 * rows * k * n for k, n in shapes)


def encoder_rate(backbone: Backbone, samples: int, batch_size: int, *, seconds: float) -> float:
    """Clips per second of mel and encoder, with as many batches side by side as the pipeline runs."""
    device = backbone.device
    waveforms = torch.randn(batch_size, samples, device=device) * 0.1

    def loop(until: float) -> int:
        clips = 0
        while time.perf_counter() < until or not clips:
            backbone.encode(waveforms)
            clips += batch_size
            synchronize(device)
        return clips

    cpu = device.type == "cpu"
    threads = cores() if cpu else 1
    with one_thread_per_operation(cpu), ThreadPoolExecutor(threads, initializer=_one_thread if cpu else None) as pool:
        list(pool.map(backbone.encode, [waveforms[:1] if cpu else waveforms] * threads))
        synchronize(device)
        started = time.perf_counter()
        clips = sum(pool.map(loop, [started + seconds] * threads))
        return clips / (time.perf_counter() - started)


def _one_thread() -> None:
    torch.set_num_threads(1)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
