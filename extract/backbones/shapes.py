"""Names and shapes of all tensors of a Whisper, from its dimensions alone.

A model on PyTorch's meta device would give the same, but makes torch import torch._dynamo: 3 s of CPU time.
"""

from __future__ import annotations

Shapes = dict[str, tuple[int, ...]]


def whisper_shapes(dims: dict[str, int]) -> Shapes:
    """The shape of each tensor in the state dict of a Whisper of these dimensions; of an encoder alone without text."""
    width = dims["n_audio_state"]
    encoder: Shapes = {
        **_linear("conv1", width, dims["n_mels"], 3),
        **_linear("conv2", width, width, 3),
        "positional_embedding": (dims["n_audio_ctx"], width),
        **_blocks(dims["n_audio_layer"], width, cross=False),
        **_norm("ln_post", width),
    }
    shapes = {f"encoder.{name}": shape for name, shape in encoder.items()}
    if not dims["n_text_layer"]:
        return shapes
    width = dims["n_text_state"]
    decoder: Shapes = {
        "token_embedding.weight": (dims["n_vocab"], width),
        "positional_embedding": (dims["n_text_ctx"], width),
        **_blocks(dims["n_text_layer"], width, cross=True),
        **_norm("ln", width),
    }
    return shapes | {f"decoder.{name}": shape for name, shape in decoder.items()}


def _blocks(count: int, width: int, *, cross: bool) -> Shapes:
    block = _attention("attn", width) | (_attention("cross_attn", width) if cross else {})
    block |= _linear("mlp.0", 4 * width, width) | _linear("mlp.2", width, 4 * width) | _norm("mlp_ln", width)
    return {f"blocks.{number}.{name}": shape for number in range(count) for name, shape in block.items()}


def _attention(name: str, width: int) -> Shapes:
    """With its norm. The key has no bias."""
    parts = [_linear(f"{name}.{part}", width, width) for part in ("query", "value", "out")]
    return {f"{name}.key.weight": (width, width)} | parts[0] | parts[1] | parts[2] | _norm(f"{name}_ln", width)


def _linear(name: str, out: int, *into: int) -> Shapes:
    return {f"{name}.weight": (out, *into), f"{name}.bias": (out,)}


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}
