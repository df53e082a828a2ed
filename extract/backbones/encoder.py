"""Whisper's encoder on un-padded clips: our own forward over its weights, with every layer pooled as it passes.

B clips, M mel bands, P positions (50 a second), T pooled frames (25), D channels, H attention heads, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from whisper_at_cli.extract.audio import SAMPLE_RATE
from whisper_at_cli.extract.backbones.mel import MEL_FRAMES_PER_SECOND
from whisper_at_cli.extract.backbones.routines import PlainLinear, attention, set_precision
from whisper_at_cli.extract.backbones.sizes import MAX_POSITIONS
from whisper_at_cli.extract.cache.schema import FRAMES
from whisper_at_cli.extract.errors import UsageError, WeightsError

POSITIONS_PER_SECOND = MEL_FRAMES_PER_SECOND // 2  # the second convolution has stride 2
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def clip_samples(clip_seconds: float) -> int:
    """Samples of a clip at 16 kHz. Raises UsageError unless the clip's positions divide into 25 frames."""
    step = FRAMES / POSITIONS_PER_SECOND
    positions = clip_seconds * POSITIONS_PER_SECOND
    if not (0 < positions <= MAX_POSITIONS and positions % FRAMES == 0):
        raise UsageError(
            f"a clip of {clip_seconds:g} s does not divide into {FRAMES} frames; choose a multiple of {step:g} s up to "
            f"{MAX_POSITIONS // POSITIONS_PER_SECOND} s"
        )
    return round(clip_seconds * SAMPLE_RATE)


def pool_frames(x_BPD: Tensor) -> Tensor:
    """P positions, averaged to T frames in float32: (B, P, D) -> (B, T, D). Raises ValueError for fewer than T.

    Frame t is the mean of positions floor(t P / T) to ceil((t + 1) P / T): where P divides by T, of P / T positions of
    its own; elsewhere neighbouring frames share one position.
    """
    B, P, D = x_BPD.shape
    if P < FRAMES:
        raise ValueError(f"{P} positions are too few for {FRAMES} frames")
    if P % FRAMES == 0:  # the same means, faster
        return x_BPD.view(B, FRAMES, P // FRAMES, D).mean(dim=2, dtype=torch.float32)
    return F.adaptive_avg_pool1d(x_BPD.transpose(1, 2).float(), FRAMES).transpose(1, 2)


class EncoderBlock(nn.Module):
    """One pre-norm Transformer block of Whisper, query, key and value in one product; the residual stays float32."""

    LINEAR: ClassVar = {"qkv": False, "out": False, "expand": True, "contract": False}  # and whether GELU follows

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(dim)
        self.qkv = PlainLinear(dim, 3 * dim)
        self.out = PlainLinear(dim, dim)
        self.mlp_norm = nn.LayerNorm(dim)
        self.expand = PlainLinear(dim, 4 * dim)
        self.contract = PlainLinear(4 * dim, dim)

    def forward(self, x_BPD: Tensor) -> Tensor:
        """Adds to `x_BPD` in place and returns it."""
        B, P, D = x_BPD.shape
        dtype = self.qkv.weight.dtype
        qkv = self.qkv(self.attention_norm(x_BPD).to(dtype)).view(B, P, 3, self.heads, D // self.heads)
        mixed = attention(*qkv.permute(2, 0, 3, 1, 4)).transpose(1, 2).reshape(B, P, D)
        x_BPD += self.out(mixed)
        x_BPD += self.contract(self.expand(self.mlp_norm(x_BPD).to(dtype), gelu=True))
        return x_BPD


def windows(x_BPC: Tensor, stride: int) -> Tensor:
    """What a convolution of kernel 3 and padding 1 sees at each place: (B, P, C) -> (B, P // stride, 3 * C), a view of
    a padded copy. A linear layer on it is the convolution."""
    B, P, C = x_BPC.shape
    padded = F.pad(x_BPC, (0, 0, 1, 1))
    return padded.as_strided((B, P // stride, 3 * C), (padded.stride(0), stride * C, 1))


class WhisperEncoder(nn.Module):
    """Mel (B, M, 2 * P) float32 -> the output of every block, mean-pooled: (B, L, T, D) float32.

    Linear layers, the stem's convolutions among them, and attention run in `precision`; layer norms, residual stream
    and pooling in float32, since deep layers carry a few very large activations. No un-pooled layer is kept.
    """

    LINEAR: ClassVar = {"stem1": True, "stem2": True}
    fused = False  # whether Triton's kernels run the blocks; `prepare` finds out
    not_fused = ""  # and why not, where they could

    def __init__(self, *, mels: int, layers: int, dim: int, heads: int):
        super().__init__()
        self.mels, self.dim = mels, dim
        self.positions: Tensor
        self.stem1 = PlainLinear(3 * mels, dim)
        self.stem2 = PlainLinear(3 * dim, dim)
        self.register_buffer("positions", torch.zeros(MAX_POSITIONS, dim))
        self.blocks = cast("Sequence[EncoderBlock]", nn.ModuleList([EncoderBlock(dim, heads) for _ in range(layers)]))

    def forward(self, mel_BMF: Tensor) -> Tensor:
        mel_BFM = mel_BMF.transpose(1, 2).to(self.stem1.weight.dtype)
        x_BPD = self.stem2(windows(self.stem1(windows(mel_BFM, 1), gelu=True), 2), gelu=True)
        B, P, D = x_BPD.shape
        x_BPD = x_BPD + self.positions[:P]  # float32, and a tensor of its own, which the blocks then add to
        if self.fused and P % FRAMES == 0 and not torch.compiler.is_compiling():
            from whisper_at_cli.extract.backbones.kernels import run_blocks

            return run_blocks(self.blocks, x_BPD)
        pooled = x_BPD.new_empty(B, len(self.blocks), FRAMES, D)
        for layer, block in enumerate(self.blocks):
            block(x_BPD)
            pooled[:, layer] = pool_frames(x_BPD)
        return pooled

    def prepare(self, *, precision: str, device: torch.device) -> WhisperEncoder:
        """Move to `device`, cast what runs in `precision`, lay weights out for speed; for inference from here on."""
        dtype = PRECISIONS[precision]
        set_precision(self, self.LINEAR, dtype, device)
        for block in self.blocks:
            set_precision(block, block.LINEAR, dtype, device)
        if device.type == "cuda" and dtype != torch.float32:
            self.not_fused = _kernels_problem(self.dim, dtype, device)
            self.fused = not self.not_fused
        return self.requires_grad_(False).eval().to(device)


def _kernels_problem(dim: int, dtype: torch.dtype, device: torch.device) -> str:
    """Why the fused kernels cannot be used; nothing if they can."""
    try:
        from whisper_at_cli.extract.backbones import kernels
    except ImportError:  # Triton is not there for every build of torch
        return "Triton is not installed"
    return kernels.problem(dim, dtype, device)


def encoder_from_state(state: dict[str, Tensor], *, heads: int) -> WhisperEncoder:
    """An encoder with the weights of a state dict in OpenAI's naming (`encoder.conv1.weight`, ...).

    Raises WeightsError where a tensor is missing or has another shape than the rest implies.
    """
    try:
        dim, mels, _ = state["encoder.conv1.weight"].shape
        layers = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("encoder.blocks."))
        with torch.device("meta"):
            encoder = WhisperEncoder(mels=mels, layers=layers, dim=dim, heads=heads)
        ours = {f"stem{n}.weight": state[f"encoder.conv{n}.weight"].transpose(1, 2).flatten(1) for n in (1, 2)}
        ours |= {f"stem{n}.bias": state[f"encoder.conv{n}.bias"] for n in (1, 2)}
        ours["positions"] = state["encoder.positional_embedding"]
        for layer in range(layers):
            ours |= _block_state(state, f"encoder.blocks.{layer}.", f"blocks.{layer}.")
        ours = {name: tensor.to(torch.float32) for name, tensor in ours.items()}
        encoder.load_state_dict(ours, strict=True, assign=True)
    except (KeyError, ValueError, RuntimeError) as error:
        raise WeightsError(f"these are not the weights of a Whisper encoder: {error}") from error
    return encoder


def _block_state(state: dict[str, Tensor], theirs: str, ours: str) -> dict[str, Tensor]:
    """One block's tensors under our names: query, key and value fused, the key's missing bias as zeros."""
    attention = f"{theirs}attn."
    query_bias = state[f"{attention}query.bias"]
    biases = [query_bias, torch.zeros_like(query_bias), state[f"{attention}value.bias"]]
    fused = {
        f"{ours}qkv.weight": torch.cat([state[f"{attention}{part}.weight"] for part in ("query", "key", "value")]),
        f"{ours}qkv.bias": torch.cat(biases),
    }
    renamed = {
        "attn_ln": "attention_norm",
        "attn.out": "out",
        "mlp_ln": "mlp_norm",
        "mlp.0": "expand",
        "mlp.2": "contract",
    }
    return fused | {
        f"{ours}{new}.{kind}": state[f"{theirs}{old}.{kind}"]
        for old, new in renamed.items()
        for kind in ("weight", "bias")
    }
