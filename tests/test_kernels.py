"""The fused kernels against plain operations, by Triton's interpreter, and compiled for a GPU without one.

Triton reads TRITON_INTERPRET when it is imported, so each way runs in a process of its own and prints what it found.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is for Linux on x86_64")

INTERPRETED = """
import json, sys, torch
from torch import nn
from whisper_at_cli.extract.backbones import kernels
from whisper_at_cli.extract.backbones.encoder import WhisperEncoder
from whisper_at_cli.extract.backbones.routines import set_precision

CPU, found = torch.device("cpu"), {}

def error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()

@torch.inference_mode()
def encoders(dim, dtype, clips, frames):
    torch.manual_seed(dim)
    encoder = WhisperEncoder(mels=80, layers=2, dim=dim, heads=dim // 64).requires_grad_(False).eval()
    for parameter in encoder.parameters():
        if parameter.ndim == 1:
            parameter += torch.randn_like(parameter) / 4
    encoder.positions.normal_()
    mel = torch.randn(clips, 80, frames)
    exact = encoder(mel)
    for module in encoder.modules():
        if isinstance(module, nn.Linear):
            module.to(dtype)
    plain = encoder(mel)
    encoder.fused = True
    fused = encoder(mel)
    return {"fused": error(fused, exact), "plain": error(plain, exact), "apart": error(fused, plain)}

half, brain = torch.float16, torch.bfloat16
for dim, dtype, clips, frames in (
    (384, half, 2, 50), (384, brain, 2, 50), (512, brain, 1, 100), (768, half, 1, 50), (1280, half, 1, 50)
):
    found[f"{dim} {dtype}"] = encoders(dim, dtype, clips, frames)
found["right"] = [kernels.is_right(64, half, CPU), kernels.is_right(384, brain, CPU)]

def not_divided(x, added, norm, pooled, y):
    original(x, added, norm, pooled, y)
    pooled *= 4

kernels.problem.cache_clear()
original, kernels.add_pool_norm = kernels.add_pool_norm, not_divided
found["pooled wrongly"] = kernels.is_right(64, torch.float16, CPU)
kernels.problem.cache_clear()
kernels.add_pool_norm = original
kernels._launch = lambda D: {"BLOCK": 32, "num_warps": 1}
found["half of the channels"] = kernels.is_right(64, torch.float16, CPU)
print(json.dumps(found))
"""

COMPILED = """
import json
import triton
from triton.backends.compiler import GPUTarget
from whisper_at_cli.extract.backbones import kernels

rows = {"x_ptr": "*fp32", "added_ptr": "*fp16", "y_ptr": "*fp16"}
norm = {"weight_ptr": "*fp32", "bias_ptr": "*fp32", "eps": "fp32"}
pooled = {"pooled_ptr": "*fp32", **norm, "frames": "i32", "rows_a_frame": "i32", "clip_stride": "i32"}
found = []
for capability in (80, 90):
    for kernel, types, switch in (
        (kernels._add_norm_kernel, rows | norm, "ADD"), (kernels._add_pool_norm_kernel, rows | pooled, "NORM")
    ):
        for on in (True, False):
            launch = kernels._launch(1280)
            constants = {switch: on, "D": 1280, "BLOCK": launch.pop("BLOCK")}
            types = types | dict.fromkeys(constants, "constexpr")
            source = triton.compiler.ASTSource(fn=kernel, signature=types, constexprs=constants)
            compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch)
            found.append(len(compiled.asm["cubin"]))
print(json.dumps(found))
"""


def run(program: str, folder: Path, **environment: str):
    """What a program prints as JSON, run in a process of its own."""
    result = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True, timeout=600, cwd=folder,
        env=os.environ | {"TRITON_CACHE_DIR": str(folder / "triton"), "OMP_NUM_THREADS": "1"} | environment,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    return run(INTERPRETED, tmp_path_factory.mktemp("interpreted"), TRITON_INTERPRET="1")


@pytest.mark.parametrize(
    "dim, dtype",
    [(384, torch.float16), (384, torch.bfloat16), (512, torch.bfloat16), (768, torch.float16), (1280, torch.float16)],
)
def test_fused_blocks_give_what_plain_ones_give(interpreted, dim, dtype):
    """They are about as near to float32 as plain blocks are (in bfloat16 with another form of GELU), and to those."""
    found = interpreted[f"{dim} {dtype}"]
    assert found["apart"] < torch.finfo(dtype).eps / 2 and found["fused"] < 1.5 * found["plain"]


def test_kernels_are_compared_before_they_are_used(interpreted):
    assert interpreted["right"] == [True, True]
    assert not interpreted["pooled wrongly"] and not interpreted["half of the channels"]


def test_kernels_compile_for_gpus(tmp_path):
    """Triton's compiler takes less than its interpreter does; that it runs on a GPU is not shown by this."""
    sizes = run(COMPILED, tmp_path)
    assert len(sizes) == 8 and all(size > 1000 for size in sizes)
