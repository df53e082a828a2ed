"""Whisper weights out of a CTranslate2 (faster-whisper) folder, under OpenAI's names.

`model.bin` is little-endian: version, specification name, revision, then a list of variables (name, shape, type, bytes)
and a list of aliases. Query, key and value of self-attention are one matrix, key and value of cross-attention another,
and the key's bias is zeros.
"""

from __future__ import annotations

import re
import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from whisper_at_cli.extract.errors import WeightsError

KNOWN_VERSION = 6
TYPES = {0: "<f4", 1: "<i1", 2: "<i2", 3: "<i4", 4: "<f2"}


class _Reader:
    """Walks through the bytes of model.bin; a read past the end is a truncated file."""

    def __init__(self, path: Path):
        self.path, self.data, self.at = path, np.memmap(path, dtype=np.uint8, mode="r"), 0

    def take(self, count: int) -> np.ndarray:
        if self.at + count > len(self.data):
            raise WeightsError(f"{self.path} is truncated at byte {len(self.data)}; copy it again from where it came")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, form: str) -> int:
        return struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}")).tobytes())[0]

    def text(self) -> str:
        return self.take(self.number("H")).tobytes().rstrip(b"\0").decode("utf-8", "replace")


def read_variables(path: Path) -> dict[str, np.ndarray]:
    """Every variable of a model.bin by name, aliases resolved. Raises WeightsError for another kind of file."""
    if path.stat().st_size < 16:
        raise WeightsError(f"{path} is not a CTranslate2 model: it is {path.stat().st_size} bytes long")
    reader = _Reader(path)
    version = reader.number("I")
    if not 1 <= version <= KNOWN_VERSION:
        raise WeightsError(
            f"{path} is not a CTranslate2 model of a known version (found {version}, known to {KNOWN_VERSION})"
        )
    specification = reader.text()
    if specification != "WhisperSpec":
        raise WeightsError(f"{path} holds a {specification!r}, not a Whisper model")
    reader.number("I")  # revision
    variables: dict[str, np.ndarray] = {}
    for _ in range(reader.number("I")):
        name = reader.text()
        shape = [reader.number("I") for _ in range(reader.number("B"))]
        kind, size = reader.number("B"), reader.number("I")
        if kind not in TYPES or int(np.prod(shape, dtype=np.int64)) * np.dtype(TYPES[kind]).itemsize != size:
            raise WeightsError(
                f"{path} is damaged: variable {name!r} of type {kind} and shape {shape} has {size} bytes"
            )
        variables[name] = reader.take(size).view(TYPES[kind]).reshape(shape)
    for _ in range(reader.number("I")):
        alias, name = reader.text(), reader.text()
        variables[alias] = variables[name]
    return variables


def read_ctranslate2(folder: Path) -> tuple[dict[str, int], dict[str, Tensor]]:
    """Dimensions and state dict, both as in OpenAI's checkpoints, of the model in `folder`."""
    path = folder / "model.bin"
    variables = read_variables(path)
    try:
        state = _encoder_state(variables) | _decoder_state(variables)
        mels, audio_dim = variables["encoder/conv1/weight"].shape[1], variables["encoder/conv1/weight"].shape[0]
        vocabulary, text_dim = variables["decoder/embeddings/weight"].shape
        dims = {
            "n_mels": mels, "n_audio_ctx": 1500, "n_audio_state": audio_dim,
            "n_audio_head": int(variables["encoder/num_heads"]), "n_audio_layer": _layers(variables, "encoder"),
            "n_vocab": vocabulary, "n_text_ctx": len(state["decoder.positional_embedding"]), "n_text_state": text_dim,
            "n_text_head": int(variables["decoder/num_heads"]), "n_text_layer": _layers(variables, "decoder"),
        }  # fmt: skip
    except KeyError as error:
        raise WeightsError(f"{path} lacks the variable {error} that every Whisper model has") from error
    return dims, state


def _layers(variables: dict[str, np.ndarray], side: str) -> int:
    numbers = (re.match(rf"{side}/layer_(\d+)/", name) for name in variables)
    return 1 + max((int(found[1]) for found in numbers if found), default=-1)


def _tensor(variables: dict[str, np.ndarray], name: str) -> Tensor:
    """A variable in float32; an int8 matrix times its scales, one a row."""
    values = variables[name]
    if values.dtype == np.int8:
        scale = variables[f"{name}_scale"].astype(np.float32).reshape(-1, *[1] * (values.ndim - 1))
        return torch.from_numpy(values.astype(np.float32) / scale)
    if values.dtype.kind != "f":
        raise WeightsError(
            f"variable {name!r} is stored as {values.dtype}, which is not supported; use float16 or int8"
        )
    return torch.from_numpy(values.astype(np.float32))


def _named(variables, theirs: str, ours: str) -> dict[str, Tensor]:
    """Weight and bias of a linear or convolution layer."""
    return {f"{ours}.{kind}": _tensor(variables, f"{theirs}/{kind}") for kind in ("weight", "bias")}


def _norm(variables, theirs: str, ours: str) -> dict[str, Tensor]:
    return {
        f"{ours}.weight": _tensor(variables, f"{theirs}/gamma"),
        f"{ours}.bias": _tensor(variables, f"{theirs}/beta"),
    }


def _self_attention(variables, theirs: str, ours: str) -> dict[str, Tensor]:
    weight = _tensor(variables, f"{theirs}/linear_0/weight").chunk(3)
    bias = _tensor(variables, f"{theirs}/linear_0/bias").chunk(3)
    return {
        f"{ours}.query.weight": weight[0], f"{ours}.query.bias": bias[0],
        f"{ours}.key.weight": weight[1],
        f"{ours}.value.weight": weight[2], f"{ours}.value.bias": bias[2],
    } | _named(variables, f"{theirs}/linear_1", f"{ours}.out")  # fmt: skip


def _cross_attention(variables, theirs: str, ours: str) -> dict[str, Tensor]:
    weight = _tensor(variables, f"{theirs}/linear_1/weight").chunk(2)
    bias = _tensor(variables, f"{theirs}/linear_1/bias").chunk(2)
    return (
        _named(variables, f"{theirs}/linear_0", f"{ours}.query")
        | {f"{ours}.key.weight": weight[0], f"{ours}.value.weight": weight[1], f"{ours}.value.bias": bias[1]}
        | _named(variables, f"{theirs}/linear_2", f"{ours}.out")
    )


def _block(variables, theirs: str, ours: str) -> dict[str, Tensor]:
    """What encoder and decoder blocks share."""
    return (
        _norm(variables, f"{theirs}/self_attention/layer_norm", f"{ours}.attn_ln")
        | _self_attention(variables, f"{theirs}/self_attention", f"{ours}.attn")
        | _norm(variables, f"{theirs}/ffn/layer_norm", f"{ours}.mlp_ln")
        | _named(variables, f"{theirs}/ffn/linear_0", f"{ours}.mlp.0")
        | _named(variables, f"{theirs}/ffn/linear_1", f"{ours}.mlp.2")
    )


def _encoder_state(variables) -> dict[str, Tensor]:
    state = {"encoder.positional_embedding": _tensor(variables, "encoder/position_encodings/encodings")}
    state |= _named(variables, "encoder/conv1", "encoder.conv1") | _named(variables, "encoder/conv2", "encoder.conv2")
    for layer in range(_layers(variables, "encoder")):
        state |= _block(variables, f"encoder/layer_{layer}", f"encoder.blocks.{layer}")
    return state | _norm(variables, "encoder/layer_norm", "encoder.ln_post")


def _decoder_state(variables) -> dict[str, Tensor]:
    state = {
        "decoder.token_embedding.weight": _tensor(variables, "decoder/embeddings/weight"),
        "decoder.positional_embedding": _tensor(variables, "decoder/position_encodings/encodings"),
    }
    for layer in range(_layers(variables, "decoder")):
        theirs, ours = f"decoder/layer_{layer}", f"decoder.blocks.{layer}"
        state |= _block(variables, theirs, ours)
        state |= _norm(variables, f"{theirs}/attention/layer_norm", f"{ours}.cross_attn_ln")
        state |= _cross_attention(variables, f"{theirs}/attention", f"{ours}.cross_attn")
    return state | _norm(variables, "decoder/layer_norm", "decoder.ln")
