"""Whisper weights out of a CTranslate2 (faster-whisper) folder, under OpenAI's names.

`model.bin` is little-endian: version, specification name, revision, then a list of variables (name, shape, type, bytes)
and a list of aliases. Query, key and value of self-attention are one matrix, key and value of cross-attention another,
and the key's bias is zeros. int8 matrices have a scale a row, int16 matrices one scale; stored = weight * scale.

The file is not trusted: what it declares is held against its own length before anything is allocated.
"""

from __future__ import annotations

import math
import re
import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from whisper_at_cli.extract.backbones.forms import check_file
from whisper_at_cli.extract.errors import WeightsError

VERSIONS = range(4, 7)  # that share this layout; Whisper came with the last
BFLOAT16 = 5
TYPES = {0: "<f4", 1: "<i1", 2: "<i2", 3: "<i4", 4: "<f2", BFLOAT16: "<u2"}
MAX_ENTRIES = 100_000  # variables or aliases; large-v3 has some 1,300
MAX_NAME, MAX_RANK = 256, 4
ALIAS_ROOM = 1 << 20  # elements that may be read over and above two for each byte of the file: aliased norms and biases


class _Reader:
    """Walks through the bytes of model.bin; a read past the end is a truncated file."""

    def __init__(self, path: Path):
        self.path, self.at = path, 0
        try:
            self.data = np.memmap(path, dtype=np.uint8, mode="r")
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            raise WeightsError(f"{path} cannot be read as a CTranslate2 model: {error}") from error

    def take(self, count: int) -> np.ndarray:
        if count > len(self.data) - self.at:
            raise WeightsError(f"{self.path} is truncated at byte {len(self.data)}; copy it again from where it came")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, form: str) -> int:
        return struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}")).tobytes())[0]

    def count(self, what: str) -> int:
        count = self.number("I")
        if count > MAX_ENTRIES:
            raise self.damaged(f"it declares {count} {what}")
        return count

    def text(self) -> str:
        """A name. Raises WeightsError unless it is short, UTF-8 and ends in its only zero byte."""
        length = self.number("H")
        if not 1 <= length <= MAX_NAME:
            raise self.damaged(f"a name of {length} bytes")
        raw = self.take(length).tobytes()
        try:
            name = raw[:-1].decode("utf-8")
        except UnicodeDecodeError:
            raise self.damaged(f"the name {raw[:40]!r}") from None
        if raw.find(b"\0") != length - 1:
            raise self.damaged(f"the name {raw[:40]!r}")
        return name

    def variable(self, name: str) -> _Variable:
        shape = [self.number("I") for _ in range(self.number("B"))]
        kind, size = self.number("B"), self.number("I")
        if (
            kind not in TYPES
            or len(shape) > MAX_RANK
            or math.prod(shape) * np.dtype(TYPES[kind]).itemsize != size
            or not size
        ):
            raise self.damaged(f"variable {name!r} of type {kind} and shape {shape[: MAX_RANK + 1]} has {size} bytes")
        return _Variable(self.take(size).view(TYPES[kind]).reshape(shape), kind == BFLOAT16)

    def damaged(self, what: str) -> WeightsError:
        return WeightsError(f"{self.path} is damaged near byte {self.at}: {what}; copy it again from where it came")


class _Variable:
    """An array as it is stored: a view of the mapped file."""

    def __init__(self, values: np.ndarray, bfloat16: bool):
        self.values, self.bfloat16 = values, bfloat16

    def floats(self) -> np.ndarray:
        """A float32 copy; integers as they are stored, without their scale."""
        if self.bfloat16:  # the upper half of a float32
            upper = self.values.astype(np.uint32)
            upper <<= 16  # in place: of a single number, `upper << 16` would be no array
            return upper.view(np.float32)
        return self.values.astype(np.float32)


class Variables:
    """Every variable of a model.bin by name, and its aliases. Raises WeightsError for another or a damaged file."""

    def __init__(self, path: Path):
        self.path = path
        check_file(path)
        reader = _Reader(path)
        version = reader.number("I")
        if version not in VERSIONS:
            raise WeightsError(
                f"{path} is not a CTranslate2 model of a known version (found {version}, known to {VERSIONS[-1]})"
            )
        specification = reader.text()
        if specification != "WhisperSpec":
            raise WeightsError(f"{path} holds a {specification!r}, not a Whisper model")
        reader.number("I")  # revision
        self.stored: dict[str, _Variable] = {}
        for _ in range(reader.count("variables")):
            name = reader.text()
            if name in self.stored:
                raise reader.damaged(f"variable {name!r} is there twice")
            self.stored[name] = reader.variable(name)
        self.aliases: dict[str, str] = {}
        for _ in range(reader.count("aliases")):
            alias, name = reader.text(), reader.text()
            if alias in self.stored or alias in self.aliases or name not in self.stored:
                raise reader.damaged(f"alias {alias!r} of {name!r}")
            self.aliases[alias] = name
        if reader.at != len(reader.data):
            raise reader.damaged(f"{len(reader.data) - reader.at} bytes after its end")
        self.budget = 2 * len(reader.data) + ALIAS_ROOM

    def names(self) -> list[str]:
        return [*self.stored, *self.aliases]

    def stored_name(self, name: str) -> str:
        """Where a variable lies: itself, or what it is an alias of. Raises KeyError where there is none."""
        name = self.aliases.get(name, name)
        if name not in self.stored:
            raise KeyError(name)
        return name

    def number(self, name: str) -> int:
        return int(self.stored[self.stored_name(name)].values.item())

    def tensor(self, name: str) -> Tensor:
        """A variable in float32; integers are divided by their scale."""
        name = self.stored_name(name)
        variable = self.stored[name]
        self.budget -= variable.values.size
        if self.budget < 0:  # one matrix under many names
            raise WeightsError(f"{self.path} is damaged: its aliases name more weights than it can hold")
        values = variable.floats()
        if variable.values.dtype.kind == "i":
            values /= self._scale(name, values)
        return torch.from_numpy(values)

    def _scale(self, name: str, values: np.ndarray) -> np.ndarray:
        """The scale of an integer matrix, so shaped that it divides the matrix."""
        if (scale_name := f"{name}_scale") not in self.stored:
            raise WeightsError(f"{self.path} is damaged: {name!r} is stored as integers without a scale")
        scale = self.stored[scale_name].floats()
        if scale.size not in (1, len(values)) or not (np.isfinite(scale).all() and (scale > 0).all()):
            raise WeightsError(f"{self.path} is damaged: {scale_name!r} is no scale for {name!r}")
        return scale.reshape(-1, *[1] * (values.ndim - 1))


def read_ctranslate2(folder: Path) -> tuple[dict[str, Tensor], int, int]:
    """State dict as in OpenAI's checkpoints, float32, of the model in `folder`, and the number of attention heads of
    its encoder and of its decoder. Raises WeightsError."""
    path = folder / "model.bin"
    variables = Variables(path)
    try:
        state = _encoder_state(variables) | _decoder_state(variables)
        heads = variables.number("encoder/num_heads"), variables.number("decoder/num_heads")
    except KeyError as error:
        raise WeightsError(f"{path} lacks the variable {error} that every Whisper model has") from error
    except (ValueError, IndexError, RuntimeError, TypeError) as error:  # TypeError: one number where rows should be
        raise WeightsError(f"{path} is damaged: its arrays have other shapes than a Whisper model's") from error
    _check_projection(variables)
    return state, *heads


def _check_projection(variables: Variables) -> None:
    """Whisper's output layer is its token embedding; other weights there would be left out."""
    embedding, projection = "decoder/embeddings/weight", "decoder/projection/weight"
    if projection not in variables.names() or variables.stored_name(projection) == variables.stored_name(embedding):
        return
    tied, own = (variables.stored[variables.stored_name(name)].values for name in (embedding, projection))
    if not np.array_equal(tied, own):
        raise WeightsError(f"{variables.path} has an output layer of its own, which OpenAI's Whisper has not")


def _layers(variables: Variables, side: str) -> int:
    numbers = (re.match(rf"{side}/layer_(\d+)/", name) for name in variables.names())
    return 1 + max((int(match[1]) for match in numbers if match), default=-1)


def _named(variables: Variables, theirs: str, ours: str) -> dict[str, Tensor]:
    """Weight and bias of a linear or convolution layer."""
    return {f"{ours}.{kind}": variables.tensor(f"{theirs}/{kind}") for kind in ("weight", "bias")}


def _norm(variables: Variables, theirs: str, ours: str) -> dict[str, Tensor]:
    return {
        f"{ours}.weight": variables.tensor(f"{theirs}/gamma"),
        f"{ours}.bias": variables.tensor(f"{theirs}/beta"),
    }


def _parts(variables: Variables, name: str, count: int) -> list[Tensor]:
    """A fused matrix or vector, taken apart."""
    tensor = variables.tensor(name)
    return list(tensor.split(len(tensor) // count))[:count]


def _check_key_bias(variables: Variables, bias: Tensor) -> None:
    if bias.any():
        raise WeightsError(f"{variables.path} has keys with a bias, which OpenAI's Whisper has not")


def _self_attention(variables: Variables, theirs: str, ours: str) -> dict[str, Tensor]:
    weight = _parts(variables, f"{theirs}/linear_0/weight", 3)
    bias = _parts(variables, f"{theirs}/linear_0/bias", 3)
    _check_key_bias(variables, bias[1])
    return {
        f"{ours}.query.weight": weight[0], f"{ours}.query.bias": bias[0],
        f"{ours}.key.weight": weight[1],
        f"{ours}.value.weight": weight[2], f"{ours}.value.bias": bias[2],
    } | _named(variables, f"{theirs}/linear_1", f"{ours}.out")  # fmt: skip


def _cross_attention(variables: Variables, theirs: str, ours: str) -> dict[str, Tensor]:
    weight = _parts(variables, f"{theirs}/linear_1/weight", 2)
    bias = _parts(variables, f"{theirs}/linear_1/bias", 2)
    _check_key_bias(variables, bias[0])
    return (
        _named(variables, f"{theirs}/linear_0", f"{ours}.query")
        | {f"{ours}.key.weight": weight[0], f"{ours}.value.weight": weight[1], f"{ours}.value.bias": bias[1]}
        | _named(variables, f"{theirs}/linear_2", f"{ours}.out")
    )


def _block(variables: Variables, theirs: str, ours: str) -> dict[str, Tensor]:
    """What encoder and decoder blocks share."""
    return (
        _norm(variables, f"{theirs}/self_attention/layer_norm", f"{ours}.attn_ln")
        | _self_attention(variables, f"{theirs}/self_attention", f"{ours}.attn")
        | _norm(variables, f"{theirs}/ffn/layer_norm", f"{ours}.mlp_ln")
        | _named(variables, f"{theirs}/ffn/linear_0", f"{ours}.mlp.0")
        | _named(variables, f"{theirs}/ffn/linear_1", f"{ours}.mlp.2")
    )


def _encoder_state(variables: Variables) -> dict[str, Tensor]:
    state = {"encoder.positional_embedding": variables.tensor("encoder/position_encodings/encodings")}
    state |= _named(variables, "encoder/conv1", "encoder.conv1") | _named(variables, "encoder/conv2", "encoder.conv2")
    for layer in range(_layers(variables, "encoder")):
        state |= _block(variables, f"encoder/layer_{layer}", f"encoder.blocks.{layer}")
    return state | _norm(variables, "encoder/layer_norm", "encoder.ln_post")


def _decoder_state(variables: Variables) -> dict[str, Tensor]:
    state = {
        "decoder.token_embedding.weight": variables.tensor("decoder/embeddings/weight"),
        "decoder.positional_embedding": variables.tensor("decoder/position_encodings/encodings"),
    }
    for layer in range(_layers(variables, "decoder")):
        theirs, ours = f"decoder/layer_{layer}", f"decoder.blocks.{layer}"
        state |= _block(variables, theirs, ours)
        state |= _norm(variables, f"{theirs}/attention/layer_norm", f"{ours}.cross_attn_ln")
        state |= _cross_attention(variables, f"{theirs}/attention", f"{ours}.cross_attn")
    return state | _norm(variables, "decoder/layer_norm", "decoder.ln")
